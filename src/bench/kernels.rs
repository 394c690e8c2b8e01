//! The kernel laboratory: every kernel of `csrc/` beside its reference and libtorch's best.
//!
//! Speeds count the bytes that must move (each input read once, each output written once) or the operations
//! that must be done (causal attention: half the square). The two ceilings, a large copy and a large matrix
//! product, are measured in the same run.

mod optimizer;

use crate::bail_hint;
use crate::config::AttentionBackend;
use crate::ffi::{self, Event, FlashOptions, LossScalars};
use crate::ops::{self, Mask};
use anyhow::{Result, bail};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

/// One measured kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What is computed.
    pub op: String,
    /// Tokens of the micro-batch; 0 where it does not matter.
    pub tokens: i64,
    /// By which kernel.
    pub kernel: String,
    /// Milliseconds of GPU time, median.
    pub ms: f64,
    /// In `unit`.
    pub speed: f64,
    /// Of `speed`.
    pub unit: Unit,
    /// Percent of the ceiling of this run.
    pub share: f64,
    /// `||out - reference|| / ||reference||` against fp32, the largest over outputs and gradients.
    pub error: Option<f64>,
}

/// What limits a kernel.
#[derive(Clone, Copy, Debug, Serialize)]
pub enum Unit {
    /// TB/s.
    Bandwidth,
    /// TFLOP/s.
    Arithmetic,
}

/// All measurements of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The card's name.
    pub card: String,
    /// Version.
    pub libtorch: String,
    /// Version.
    pub cudnn: String,
    /// Bytes read and written a second by a large device-to-device copy, TB/s.
    pub copy_tb_s: f64,
    /// bf16 product of two 8,192 x 8,192 matrices, TFLOP/s.
    pub matmul_tflop_s: f64,
    /// In order of measurement.
    pub rows: Vec<Row>,
}

/// TinyLlama-1.1B: rows of T tokens, C, H, G, D, F, V.
const T: i64 = 2048;
const C: i64 = 2048;
const H: i64 = 32;
const G: i64 = 4;
const D: i64 = 64;
const F: i64 = 5632;
const V: i64 = 32_000;
const EPS: f64 = 1e-5;

/// Measures all ops, or those whose name contains `only`.
pub fn run(device: Device, tokens: &[i64], only: Option<&str>) -> Result<Report> {
    let Device::Cuda(index) = device else {
        bail_hint!(
            "run it on a machine with a card; `tinyllama doctor` says what libtorch sees";
            "kernels run on a CUDA card, and this machine shows none to libtorch"
        );
    };
    if let Some(bad) = tokens.iter().find(|&&n| n < T || n % T != 0) {
        bail!("`--tokens` takes multiples of {T}, got {bad}");
    }
    let (versions, card) = (ffi::versions(), ffi::cuda_device(index)?);
    let mut lab = Lab {
        device,
        hopper: card.capability == (9, 0),
        only: only.map(str::to_owned),
        report: Report {
            card: card.name,
            libtorch: versions.libtorch,
            cudnn: versions.cudnn,
            copy_tb_s: copy_speed(device)?,
            matmul_tflop_s: matmul_speed(device)?,
            rows: vec![],
        },
    };
    for &n in tokens {
        lab.attention(n)?;
        lab.rms_norm(n)?;
        lab.rope(n)?;
        lab.swiglu(n)?;
        lab.loss(n)?;
    }
    lab.optimizer()?;
    if lab.report.rows.is_empty() {
        bail_hint!(
            "leave it out for all: attention, rms_norm, add_rms_norm, rope, swiglu, mlp, cross_entropy, \
             head_loss, grad_norm, adamw";
            "`--only`: no op has `{}` in its name", only.unwrap_or_default()
        );
    }
    // What is computed, then by which kernel, in the order measured.
    let rows = std::mem::take(&mut lab.report.rows);
    for i in 0..rows.len() {
        let key = |row: &Row| (row.tokens, row.op.clone());
        if rows[..i].iter().all(|before| key(before) != key(&rows[i])) {
            lab.report.rows.extend(rows.iter().filter(|row| key(row) == key(&rows[i])).cloned());
        }
    }
    Ok(lab.report)
}

/// Calls between two events, so that launching one hides behind running another.
const CALLS: usize = 10;

/// Median GPU milliseconds of one call, of 10 times [`CALLS`], after as many to warm up.
fn time(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    let ms = time_all(|| (0..CALLS).try_for_each(|_| f()))?;
    Ok(ms / CALLS as f64)
}

/// Median GPU milliseconds of `f`, of 10 times after one to warm up. The CPU waits at the end only, so that
/// the card is never idle between them.
fn time_all(mut f: impl FnMut() -> Result<()>) -> Result<f64> {
    f()?;
    let mut events = vec![Event::record()?];
    for _ in 0..10 {
        f()?;
        events.push(Event::record()?);
    }
    let times: Result<Vec<f64>> =
        events.windows(2).map(|pair| pair[1].elapsed_ms(&pair[0])).collect();
    let mut times = times?;
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

/// How a backward pass is run.
#[derive(Clone, Copy, PartialEq)]
enum Backward {
    /// By autograd's engine: for several ops, or one of milliseconds.
    Engine,
    /// The op's own backward function: the engine takes as long as a short kernel, about 75 us an op.
    Node,
}

/// Median GPU milliseconds of one backward pass of `f`, of [`CALLS`] over the same inputs.
fn time_backward(
    how: Backward,
    inputs: &[&Tensor],
    dy: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<f64> {
    let (mut leaves, mut results) = (vec![], vec![]);
    for _ in 0..CALLS {
        let own: Vec<Tensor> = inputs.iter().map(|x| leaf(x)).collect();
        results.push(f(&own)?);
        leaves.extend(own);
    }
    let leaves: Vec<&Tensor> = leaves.iter().collect();
    let outputs: Vec<(&Tensor, &Tensor)> =
        results.iter().flat_map(|all| all.iter().zip(dy)).collect();
    let ms = time_all(|| match how {
        Backward::Engine => ffi::gradients_of(&outputs, &leaves).map(drop),
        Backward::Node => results.iter().try_for_each(|all| ffi::node_backward(&all[0], dy)),
    })?;
    Ok(ms / CALLS as f64)
}

fn copy_speed(device: Device) -> Result<f64> {
    let from = Tensor::randn([1 << 27], (Kind::Float, device));
    let mut to = from.empty_like();
    let ms = time(|| {
        to.copy_(&from);
        Ok(())
    })?;
    Ok(2.0 * 4.0 * from.numel() as f64 / ms / 1e9)
}

fn matmul_speed(device: Device) -> Result<f64> {
    let n = 8192;
    let [a, b] = [0, 1].map(|_| Tensor::randn([n, n], (Kind::BFloat16, device)));
    let ms = time(|| {
        let _ = a.matmul(&b);
        Ok(())
    })?;
    Ok(2.0 * (n as f64).powi(3) / ms / 1e9)
}

/// `||got - want|| / ||want||`, the largest over the pairs.
fn error(got: &[Tensor], want: &[Tensor]) -> f64 {
    let one = |(got, want): (&Tensor, &Tensor)| {
        let want = want.to_kind(Kind::Float);
        ((got.to_kind(Kind::Float) - &want).norm() / want.norm()).double_value(&[])
    };
    got.iter().zip(want).map(one).fold(0.0, f64::max)
}

fn leaf(x: &Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

/// What one call must move (bytes) or do (operations).
#[derive(Clone, Copy)]
enum Work {
    Bytes(f64),
    Flops(f64),
}

struct Lab {
    device: Device,
    /// The sm_90a kernels run here.
    hopper: bool,
    only: Option<String>,
    report: Report,
}

impl Lab {
    fn wants(&self, op: &str) -> bool {
        self.only.as_deref().is_none_or(|word| op.contains(word))
    }

    fn add(
        &mut self,
        op: &str,
        tokens: i64,
        kernel: &str,
        ms: f64,
        work: Work,
        error: Option<f64>,
    ) {
        let (speed, unit, ceiling) = match work {
            Work::Bytes(bytes) => (bytes / ms / 1e9, Unit::Bandwidth, self.report.copy_tb_s),
            Work::Flops(n) => (n / ms / 1e9, Unit::Arithmetic, self.report.matmul_tflop_s),
        };
        let (op, kernel) = (op.to_owned(), kernel.to_owned());
        let share = 100.0 * speed / ceiling;
        self.report.rows.push(Row { op, tokens, kernel, ms, speed, unit, share, error });
    }

    fn random(&self, shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::BFloat16, self.device))
    }

    /// Times `f` forward and backward and compares its results and gradients with `want`.
    fn both(
        &mut self,
        (op, tokens, kernel, how): (&str, i64, &str, Backward),
        inputs: &[&Tensor],
        dy: &[Tensor],
        work: [Work; 2],
        want: &[Tensor],
        f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
    ) -> Result<()> {
        let error = error(&results_and_gradients(inputs, dy, &f)?, want);
        let forward = {
            let _guard = tch::no_grad_guard();
            let inputs: Vec<Tensor> = inputs.iter().map(|x| x.shallow_clone()).collect();
            time(|| f(&inputs).map(drop))?
        };
        let backward = time_backward(how, inputs, dy, f)?;
        self.add(&format!("{op} forward"), tokens, kernel, forward, work[0], Some(error));
        self.add(&format!("{op} backward"), tokens, kernel, backward, work[1], Some(error));
        Ok(())
    }

    fn attention(&mut self, n: i64) -> Result<()> {
        if !self.wants("attention") {
            return Ok(());
        }
        let b = n / T;
        let qkv = self.random(&[b, T, H + 2 * G, D]);
        let dy = self.random(&[b, T, H, D]).transpose(1, 2); // (B, H, T, D)
        // The first sequence in fp32, by the plain formula.
        let first = |x: &Tensor| x.narrow(0, 0, 1).to_kind(Kind::Float);
        let x = leaf(&first(&qkv));
        let (q, k, v) = ops::split_heads(&x, H, G);
        let y = ops::attention_reference(&q, &k, &v, Mask::CAUSAL);
        let mut want = vec![y.detach()];
        want.extend(ffi::gradients(&y, &first(&dy), &[&x])?);
        drop((x, q, k, v, y));

        // Causal: half of the T x T scores, two products forward and five backward.
        let flops = (2 * 2 * b * H * T * T * D) as f64 / 2.0;
        let work = [Work::Flops(flops), Work::Flops(2.5 * flops)];
        let hopper = self.hopper;
        let own = |arch| {
            move |x: &Tensor| {
                let o = FlashOptions { causal: true, documents: None, deterministic: false, arch };
                ffi::flash_attention_qkv(x, H, G, None, o)
            }
        };
        let libtorch = |x: &Tensor| {
            let (q, k, v) = ops::split_heads(x, H, G);
            Ok(ops::attention(&q, &k, &v, Mask::CAUSAL, AttentionBackend::Cudnn))
        };
        type Attention<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;
        let mut kernels: Vec<(&str, Attention)> = vec![("ours, sm_80", Box::new(own(80)))];
        if hopper {
            kernels.push(("ours, sm_90a", Box::new(own(90))));
            kernels.push(("libtorch cuDNN", Box::new(libtorch)));
        }
        kernels.push(("libtorch FlashAttention-2", Box::new(libtorch)));
        for (name, f) in &kernels {
            let (cudnn, flash) = (name.ends_with("cuDNN"), name.ends_with('2'));
            ffi::set_sdp_backends(ffi::SdpBackends {
                math: false,
                flash,
                efficient: false,
                cudnn,
            })?;
            let x = leaf(&qkv);
            let y = f(&x)?;
            let dx = ffi::gradients(&y, &dy, &[&x])?;
            let error = error(&[first(&y.detach()), first(&dx[0])], &want);
            drop(dx);
            let forward = {
                let _guard = tch::no_grad_guard();
                time(|| f(&x).map(drop))?
            };
            drop((x, y));
            // By separate leaves for libtorch, whose gradients would otherwise be packed by a copy.
            let dy = [dy.shallow_clone()];
            let backward = if cudnn || flash {
                let (q, k, v) = ops::split_heads(&qkv, H, G);
                time_backward(Backward::Engine, &[&q, &k, &v], &dy, |x| {
                    let y =
                        ops::attention(&x[0], &x[1], &x[2], Mask::CAUSAL, AttentionBackend::Cudnn);
                    Ok(vec![y])
                })?
            } else {
                time_backward(Backward::Engine, &[&qkv], &dy, |x| Ok(vec![f(&x[0])?]))?
            };
            self.add("attention forward", n, name, forward, work[0], Some(error));
            self.add("attention backward", n, name, backward, work[1], Some(error));
        }
        ffi::set_sdp_backends(ffi::SdpBackends {
            math: true,
            flash: true,
            efficient: true,
            cudnn: true,
        })
    }

    fn rms_norm(&mut self, n: i64) -> Result<()> {
        let [x, residual, dy, dsum] = [0; 4].map(|_| self.random(&[n, C]));
        let w = Tensor::rand([C], (Kind::BFloat16, self.device)) + 0.5;
        let tensor = (n * C * 2) as f64; // bytes
        use Backward::{Engine, Node};
        if self.wants("rms_norm") {
            let (inputs, dy) = ([&x, &w], [dy.shallow_clone()]);
            let work = [Work::Bytes(2.0 * tensor), Work::Bytes(3.0 * tensor)];
            let ours = |x: &[Tensor]| Ok(vec![ffi::rms_norm(&x[0], &x[1], EPS)?]);
            let libtorch = |x: &[Tensor]| {
                Ok(vec![Tensor::internal_fused_rms_norm(&x[0], C, Some(&x[1]), EPS).0])
            };
            let reference = |x: &[Tensor]| Ok(vec![ops::rms_norm_reference(&x[0], &x[1], EPS)]);
            let want = in_fp32(&inputs, &dy, reference)?;
            let op = |kernel, how| ("rms_norm", n, kernel, how);
            self.both(op("ours", Node), &inputs, &dy, work, &want, ours)?;
            self.both(op("libtorch fused", Node), &inputs, &dy, work, &want, libtorch)?;
            self.both(op("reference", Engine), &inputs, &dy, work, &want, reference)?;
        }
        if self.wants("add_rms_norm") {
            // The gradient of the sum arrives by both ways, as in a model.
            let (inputs, dy) = ([&x, &residual, &w], [dy, dsum]);
            let work = [Work::Bytes(4.0 * tensor); 2];
            let ours = |x: &[Tensor]| {
                let (y, sum) = ffi::add_rms_norm(&x[0], &x[1], &x[2], EPS)?;
                Ok(vec![y, sum])
            };
            let libtorch = |x: &[Tensor]| {
                let sum = &x[0] + &x[1];
                Ok(vec![Tensor::internal_fused_rms_norm(&sum, C, Some(&x[2]), EPS).0, sum])
            };
            let reference = |x: &[Tensor]| {
                let sum = &x[0] + &x[1];
                Ok(vec![ops::rms_norm_reference(&sum, &x[2], EPS), sum])
            };
            let want = in_fp32(&inputs, &dy, reference)?;
            let op = |kernel, how| ("add_rms_norm", n, kernel, how);
            self.both(op("ours", Node), &inputs, &dy, work, &want, ours)?;
            self.both(op("libtorch fused", Engine), &inputs, &dy, work, &want, libtorch)?;
            self.both(op("reference", Engine), &inputs, &dy, work, &want, reference)?;
        }
        Ok(())
    }

    fn rope(&mut self, n: i64) -> Result<()> {
        if !self.wants("rope") {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let qkv = self.random(&[n / T, T, (H + 2 * G) * D]);
        let angle = Tensor::rand([T, D / 2], (Kind::Float, self.device)) * 6.0;
        let angle = Tensor::cat(&[&angle, &angle], 1); // (T, D)
        let (cos, sin) = (angle.cos(), angle.sin());
        let want = ops::rope_qkv(&qkv.to_kind(Kind::Float), &cos, &sin, H + G, D, false);
        let got = ops::rope_qkv(&qkv.copy(), &cos, &sin, H + G, D, true);
        let error = Some(error(&[got], &[want]));
        let work = Work::Bytes((2 * n * (H + G) * D * 2) as f64);
        let ms = time(|| ffi::rope(&qkv, &cos, &sin, H + G, D).map(drop))?;
        self.add("rope forward", n, "ours, in place", ms, work, error);
        // The backward pass turns the other way.
        let back = sin.neg();
        let ms = time(|| ffi::rope(&qkv, &cos, &back, H + G, D).map(drop))?;
        self.add("rope backward", n, "ours, in place", ms, work, error);
        let ms = time(|| {
            let _ = ops::rope_qkv(&qkv, &cos, &sin, H + G, D, false);
            Ok(())
        })?;
        self.add("rope forward", n, "reference", ms, work, None);
        Ok(())
    }

    fn swiglu(&mut self, n: i64) -> Result<()> {
        use Backward::{Engine, Node};
        if self.wants("swiglu") {
            let (gate_up, dy) = (self.random(&[n, 2 * F]), [self.random(&[n, F])]);
            let act = (n * F * 2) as f64; // bytes
            let work = [Work::Bytes(3.0 * act), Work::Bytes(5.0 * act)];
            let ours = |x: &[Tensor]| Ok(vec![ffi::swiglu(&x[0])?]);
            let reference = |x: &[Tensor]| Ok(vec![ops::swiglu(&x[0], false)]);
            let want = in_fp32(&[&gate_up], &dy, reference)?;
            let op = |kernel, how| ("swiglu", n, kernel, how);
            self.both(op("ours", Node), &[&gate_up], &dy, work, &want, ours)?;
            self.both(op("reference", Engine), &[&gate_up], &dy, work, &want, reference)?;
        }
        if self.wants("mlp") {
            let w12 = self.random(&[2 * F, C]) * 0.02;
            let (x, w1, w2) = (self.random(&[n, C]), w12.narrow(0, 0, F), w12.narrow(0, F, F));
            let (w3, dy) = (self.random(&[C, F]) * 0.02, [self.random(&[n, C])]);
            let inputs = [&x, &w1, &w2, &w3];
            let flops = (2 * 3 * n * C * F) as f64;
            let work = [Work::Flops(flops), Work::Flops(2.0 * flops)];
            let ours = |x: &[Tensor]| Ok(vec![ffi::swiglu_mlp(&x[0], &x[1], &x[2], &x[3])?]);
            let reference =
                |x: &[Tensor]| Ok(vec![ops::swiglu_mlp(&x[0], &x[1], &x[2], &x[3], false)]);
            let want = in_fp32(&inputs, &dy, reference)?;
            let op = |kernel| ("mlp", n, kernel, Engine);
            self.both(op("ours"), &inputs, &dy, work, &want, ours)?;
            self.both(op("reference"), &inputs, &dy, work, &want, reference)?;
        }
        Ok(())
    }

    fn loss(&mut self, n: i64) -> Result<()> {
        let s = LossScalars { scale: 1.0 / n as f64, label_smoothing: 0.0, z_loss: 0.0 };
        let target = Tensor::randint(V, [n], (Kind::Int64, self.device));
        if self.wants("cross_entropy") {
            let name = "cross_entropy forward + backward";
            let logits = self.random(&[n, V]);
            let few = 2048; // rows in fp32
            let x = leaf(&logits.narrow(0, 0, few).to_kind(Kind::Float));
            let t = target.narrow(0, 0, few);
            let loss = ops::cross_entropy_reference(&x, &t, s);
            let mut want = vec![loss.detach()];
            want.extend(ffi::gradients(&loss, &loss.ones_like(), &[&x])?);
            let x = leaf(&logits.narrow(0, 0, few));
            let loss = ops::cross_entropy_reference(&x, &t, s);
            let mut got = vec![loss.detach()];
            got.extend(ffi::gradients(&loss, &loss.ones_like(), &[&x])?);
            let libtorch = Some(error(&got, &want));
            let d = logits.narrow(0, 0, few).copy();
            let got = ffi::cross_entropy(&d, &t, s)?;
            let ours = Some(error(&[got, d], &want));
            let work = Work::Bytes((2 * n * V * 2) as f64);
            let x = leaf(&logits);
            let ms = time(|| {
                let loss = ops::cross_entropy_reference(&x, &target, s);
                ffi::gradients(&loss, &loss.ones_like(), &[&x]).map(drop)
            })?;
            self.add(name, n, "libtorch, fp32 logits", ms, work, libtorch);
            drop(x);
            let _guard = tch::no_grad_guard();
            let ms = time(|| ffi::cross_entropy(&logits, &target, s).map(drop))?;
            self.add(name, n, "ours, in place", ms, work, ours);
        }
        if self.wants("head_loss") {
            let name = "head_loss forward + backward";
            let (x, w) = (leaf(&self.random(&[n, C])), leaf(&(self.random(&[V, C]) * 0.02)));
            let work = Work::Flops((3 * 2 * n * C * V) as f64);
            let few = 2048; // rows compared in fp32
            let run = |x: &Tensor, w: &Tensor, target: &Tensor, fused: bool| {
                let loss = ops::head_loss(x, w, target, s, fused);
                let mut all = vec![loss.detach()];
                all.extend(ffi::gradients(&loss, &loss.ones_like(), &[x, w])?);
                anyhow::Ok(all)
            };
            let wide = |x: &Tensor| leaf(&x.to_kind(Kind::Float));
            let t = target.narrow(0, 0, few);
            let want = run(&wide(&x.narrow(0, 0, few)), &wide(&w), &t, false)?;
            for (kernel, fused) in [("ours, chunked", true), ("reference, fp32 logits", false)] {
                let error = error(&run(&leaf(&x.narrow(0, 0, few)), &w, &t, fused)?, &want);
                let ms = time(|| run(&x, &w, &target, fused).map(drop))?;
                self.add(name, n, kernel, ms, work, Some(error));
            }
        }
        Ok(())
    }
}

/// Results and gradients, one after the other.
fn results_and_gradients(
    inputs: &[&Tensor],
    dy: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let leaves: Vec<Tensor> = inputs.iter().map(|x| leaf(x)).collect();
    let results = f(&leaves)?;
    let outputs: Vec<(&Tensor, &Tensor)> = results.iter().zip(dy).collect();
    let gradients = ffi::gradients_of(&outputs, &leaves.iter().collect::<Vec<_>>())?;
    Ok(results.iter().map(Tensor::detach).chain(gradients).collect())
}

/// [`results_and_gradients`] in fp32.
fn in_fp32(
    inputs: &[&Tensor],
    dy: &[Tensor],
    f: impl Fn(&[Tensor]) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let wide: Vec<Tensor> = inputs.iter().map(|x| x.to_kind(Kind::Float)).collect();
    let dy: Vec<Tensor> = dy.iter().map(|x| x.to_kind(Kind::Float)).collect();
    results_and_gradients(&wide.iter().collect::<Vec<_>>(), &dy, f)
}
