//! `attention: auto`: our kernels or cuDNN's, whichever is faster at the run's shape on its card.
//!
//! Which one wins depends on card and shape: on an H100 ours are 1.2 times as fast with 8,192 tokens of TinyLlama, and
//! cuDNN's forward pass is ahead with 32,768 (`csrc/README.md`). It takes a second, once: the times are kept in a file.

use super::backends::{cache_file, set_attention};
use crate::config::{AttentionBackend, Precision, RunConfig};
use crate::ffi::{self, Event, Graph};
use crate::guard;
use crate::model::ModelConfig;
use crate::ops::{self, Mask};
use anyhow::Result;
use std::io::Write;
use std::path::Path;
use tch::{Device, Kind, Tensor};

/// What attention is timed for: causal, in bf16, over a packed projection (B, T, H+2G, D).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Sequences of a micro-batch.
    pub b: i64,
    /// Tokens of a sequence.
    pub t: i64,
    /// Heads of queries.
    pub h: i64,
    /// Heads of keys and values.
    pub g: i64,
    /// Size of a head.
    pub d: i64,
}

/// Milliseconds of one forward and backward pass on the GPU, medians.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Times {
    /// Of `csrc/flash_attention`.
    pub ours: f64,
    /// Of cuDNN through libtorch, with the copy that packs its gradients.
    pub cudnn: f64,
}

impl Times {
    /// The faster one, as a setting that forces it.
    pub fn faster(self) -> AttentionBackend {
        if self.cudnn < self.ours { AttentionBackend::Cudnn } else { AttentionBackend::Flash }
    }
}

/// The kernels of a run.
#[derive(Clone, Debug, PartialEq)]
pub struct Picked {
    /// For the model.
    pub backend: AttentionBackend,
    /// What was compared, for people; `None`: nothing was.
    pub told: Option<String>,
}

/// Whether there is a choice: ours apply, cuDNN's may be used, and neither was asked for.
pub fn is_open(config: &RunConfig, shape: Shape) -> bool {
    config.attention == AttentionBackend::Auto
        && !config.deterministic // cuDNN adds its gradients in any order
        && !config.data.document_mask // which cuDNN knows only as a matrix
        && config.precision != Precision::Fp32True // no kernel of ours or of cuDNN's
        && ops::flash_covers(Kind::BFloat16, shape.t, shape.d)
}

/// The kernels of attention for a run, and libtorch's switches set for them.
///
/// # Sync
/// The CPU waits for the GPU where the times are not known yet.
pub fn pick_attention(
    config: &RunConfig,
    model: &ModelConfig,
    sequence: i64,
    device: Device,
) -> Result<Picked> {
    let shape = Shape {
        b: config.train.micro_batch_size as i64,
        t: sequence,
        h: model.n_head,
        g: model.n_query_groups,
        d: model.head_size,
    };
    match device {
        Device::Cuda(card) if is_open(config, shape) => {
            pick(shape, card, cache_file("attention.txt").as_deref())
        }
        _ => Ok(Picked { backend: config.attention, told: None }),
    }
}

/// [`pick_attention`] where there is a choice, on libtorch's current card. Times come from `cache`, where it has them,
/// and go there.
pub fn pick(shape: Shape, card: usize, cache: Option<&Path>) -> Result<Picked> {
    let key = key(shape, card)?;
    let known = cache.and_then(|file| look_up(&read(file), &key));
    let (times, when) = match known {
        Some(times) => (Ok(times), ", as measured before"),
        None => (measure(shape, Device::Cuda(card)), ""),
    };
    if let (Ok(times), None, Some(file)) = (&times, known, cache) {
        // Not kept, it is measured again.
        let _ = append(file, &line(&key, *times));
    }
    let (backend, told) = match times {
        Ok(times) => (times.faster(), tell(times) + when),
        // Where it is ours that failed, the first step tells.
        Err(e) => (AttentionBackend::Flash, format!("ours, not compared with cuDNN's: {e:#}")),
    };
    obey(backend)?;
    Ok(Picked { backend, told: Some(told) })
}

/// Sets libtorch's switches for what was picked. What ours do not cover, such as a prompt of one token, stays
/// libtorch's choice.
pub fn obey(backend: AttentionBackend) -> Result<()> {
    set_attention(
        match backend {
            AttentionBackend::Cudnn => AttentionBackend::Cudnn,
            _ => AttentionBackend::Auto,
        },
        false,
    )
}

fn tell(times: Times) -> String {
    let Times { ours, cudnn } = times;
    match times.faster() {
        AttentionBackend::Cudnn => format!("cuDNN {cudnn:.3} ms a layer, ours {ours:.3}"),
        _ => format!("ours {ours:.3} ms a layer, cuDNN {cudnn:.3}"),
    }
}

// ---- the file: a line a shape, "CARD, VERSIONS, SHAPE = OURS CUDNN" --------------------------------------------

/// What the times depend on.
fn key(shape: Shape, card: usize) -> Result<String> {
    let Shape { b, t, h, g, d } = shape;
    let (card, versions) = (ffi::cuda_device(card)?.name, ffi::versions());
    Ok(format!(
        "{card}, libtorch {}, cuDNN {}, tinyllama {}, bf16 causal B {b} T {t} H {h} G {g} D {d}",
        versions.libtorch,
        versions.cudnn,
        env!("CARGO_PKG_VERSION"),
    ))
}

/// A line of the file.
pub fn line(key: &str, times: Times) -> String {
    format!("{key} = {} {}\n", times.ours, times.cudnn)
}

/// The newest times of `key`. Lines that are damaged are passed over.
pub fn look_up(file: &str, key: &str) -> Option<Times> {
    let times = |line: &str| {
        let rest = line.strip_prefix(key)?.strip_prefix(" = ")?;
        let (ours, cudnn) = rest.split_once(' ')?;
        let time = |text: &str| text.parse().ok().filter(|ms: &f64| ms.is_finite() && *ms > 0.0);
        Some(Times { ours: time(ours)?, cudnn: time(cudnn)? })
    };
    file.lines().rev().find_map(times)
}

fn read(file: &Path) -> String {
    std::fs::read(file)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default()
}

/// On a line of its own, also behind one that was cut off.
fn append(file: &Path, line: &str) -> std::io::Result<()> {
    let before = read(file);
    let gap = if before.is_empty() || before.ends_with('\n') { "" } else { "\n" };
    let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file)?;
    file.write_all(format!("{gap}{line}").as_bytes())
}

// ---- the measurement -------------------------------------------------------------------------------------------

/// Forward and backward passes between two events.
const CALLS: usize = 10;
/// Times that they are timed.
const ROUNDS: usize = 5;

/// Times both kernels in turns, so that a card that warms up slows both.
///
/// # Errors
/// cuDNN, or libtorch for it, refuses the shape; out of memory.
fn measure(shape: Shape, device: Device) -> Result<Times> {
    guard::catch("timing attention", device, super::LOWER, || {
        let Shape { b, t, h, g, d } = shape;
        let options = (Kind::BFloat16, device);
        let qkv = Tensor::randn([b, t, h + 2 * g, d], options);
        let dy = Tensor::randn([b, t, h, d], options).transpose(1, 2); // (B, H, T, D)
        let pass = |backend| {
            let qkv = qkv.detach().set_requires_grad(true);
            let y = ops::attention_qkv(&qkv, h, g, Mask::CAUSAL, backend); // (B, H, T, D)
            ffi::gradients(&y, &dy, &[&qkv]).map(drop)
        };
        let ours = capture(|| pass(AttentionBackend::Flash))?;
        set_attention(AttentionBackend::Cudnn, false)?;
        let cudnn = capture(|| pass(AttentionBackend::Cudnn))?;
        let (mut of_ours, mut of_cudnn) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            of_ours.push(time(&ours)?);
            of_cudnn.push(time(&cudnn)?);
        }
        Ok(Times { ours: median(of_ours), cudnn: median(of_cudnn) })
    })
}

/// [`CALLS`] calls as one CUDA graph: the CPU's time does not count, as in a captured micro-step.
fn capture(mut pass: impl FnMut() -> Result<()>) -> Result<Graph> {
    // cuDNN makes its plan, libtorch its workspaces.
    (0..3).try_for_each(|_| pass())?;
    Graph::capture(None, || (0..CALLS).try_for_each(|_| pass()))
}

/// Milliseconds of one call, after as many to warm up.
fn time(calls: &Graph) -> Result<f64> {
    calls.replay()?;
    let start = Event::record()?;
    calls.replay()?;
    Ok(Event::record()?.elapsed_ms(&start)? / CALLS as f64)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    const KEY: &str = "NVIDIA H100, libtorch 2.11.0, bf16 causal B 8 T 2048 H 32 G 4 D 64";
    const TIMES: Times = Times { ours: 1.25, cudnn: 1.5 };

    #[test]
    fn times_come_back_from_the_file_and_the_newest_count() {
        let newer = Times { ours: 1.5, cudnn: 1.125 };
        let text = line(KEY, TIMES) + &line("another card", newer);
        assert_eq!(look_up(&text, KEY), Some(TIMES));
        assert_eq!(look_up(&(text + &line(KEY, newer)), KEY), Some(newer));
        // 64 is no key of 6, nor one of 640.
        assert_eq!(look_up(&line(&format!("{KEY}0"), TIMES), KEY), None);
        assert_eq!(look_up(&line(&KEY[..KEY.len() - 1], TIMES), KEY), None);
        assert_eq!(look_up("", KEY), None);
    }

    #[test]
    fn damaged_lines_are_passed_over() {
        let good = line(KEY, TIMES);
        for rest in
            ["", " =", " = ", " = 1.2", " = 1.2 ", " = x 1", " = 1 2 3", " = 0 1", " = NaN 1"]
                .into_iter()
                .chain([" = 1 inf", " = -1 1", "= 1 1", "\u{fffd} = 1 1"])
        {
            assert_eq!(look_up(&format!("{KEY}{rest}\n"), KEY), None, "{rest}");
            assert_eq!(look_up(&format!("{good}{KEY}{rest}\n"), KEY), Some(TIMES), "{rest}");
        }
    }

    #[test]
    fn a_line_is_added_whole_behind_one_that_was_cut_off_or_is_no_text() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("attention.txt");
        append(&file, &line(KEY, TIMES)).unwrap();
        assert_eq!(look_up(&read(&file), KEY), Some(TIMES));
        std::fs::write(&file, b"\xff\xfe NVIDIA").unwrap();
        append(&file, &line(KEY, TIMES)).unwrap();
        assert_eq!(look_up(&read(&file), KEY), Some(TIMES));
        assert_eq!(read(&file).lines().count(), 2);
        assert!(append(folder.path(), "x").is_err(), "a folder is told, not a panic");
    }

    #[test]
    fn the_faster_one_is_picked_and_told_first() {
        assert_eq!(TIMES.faster(), AttentionBackend::Flash);
        assert_eq!(tell(TIMES), "ours 1.250 ms a layer, cuDNN 1.500");
        let other = Times { ours: 2.0, cudnn: 1.0 };
        assert_eq!(other.faster(), AttentionBackend::Cudnn);
        assert_eq!(tell(other), "cuDNN 1.000 ms a layer, ours 2.000");
        assert_eq!(Times { ours: 1.0, cudnn: 1.0 }.faster(), AttentionBackend::Flash);
    }

    #[test]
    fn nothing_is_measured_where_there_is_no_choice() {
        let open = |set: &str, t, d| {
            let text = "data: {train: [{path: x}]}\ntrain: {max_steps: 3000}\ntokenizer_dir: x\n";
            let config = config::parse(text, &[set.to_owned()]).unwrap();
            is_open(&config, Shape { b: 2, t, h: 4, g: 2, d })
        };
        assert!(open("precision=bf16-mixed", 2048, 64));
        assert!(open("precision=bf16-true", 2048, 128));
        for (set, t, d) in [
            ("attention=flash", 2048, 64),
            ("attention=cudnn", 2048, 64),
            ("attention=math", 2048, 64),
            ("deterministic=true", 2048, 64),
            ("data.document_mask=true", 2048, 64),
            ("precision=32-true", 2048, 64),
            ("seed=1", 2048, 96),
            ("seed=1", 1, 64),
        ] {
            assert!(!open(set, t, d), "{set}, T {t}, D {d}");
        }
        let config = config::parse("data: {train: [{path: x}]}\ntrain: {max_steps: 3000}\n", &[]);
        let (config, model) = (config.unwrap(), ModelConfig::preset("tiny-llama-1.1b").unwrap());
        let picked = pick_attention(&config, &model, 2048, Device::Cpu).unwrap();
        assert_eq!(picked, Picked { backend: AttentionBackend::Auto, told: None });
    }
}
