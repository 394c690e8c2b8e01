//! Where the time of a training step goes: kernels by family, gaps, and calls in which the CPU waited.
//!
//! Times come from [`crate::ffi::profile`]. This file is arithmetic on them: [`Family::of`] sorts a kernel by its
//! name, [`Profile::new`] adds up. A kernel in the wrong row is moved by one word in [`FAMILIES`].

use crate::ffi::profile::{Activity, ActivityKind};
use serde::Serialize;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::Write;

/// What a kernel is for; a row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Linear layers, forward and backward.
    MatrixProducts,
    /// Attention, its softmax and the helpers of its backward pass.
    Attention,
    /// RMSNorm and LayerNorm.
    Norms,
    /// Rotary embedding.
    Rope,
    /// The MLP's activation.
    Swiglu,
    /// Cross-entropy.
    Loss,
    /// Casts to fp8 and their transposed copies, SwiGLU's backward pass among them.
    Fp8Casts,
    /// Token embedding.
    Embedding,
    /// Gradient norm and AdamW.
    Optimizer,
    /// ATen's casts, copies, sums and element-wise operations.
    Elementwise,
    /// What travels between ranks; its kernels also wait for the other ranks.
    Communication,
    /// Copies and memsets that are no kernels.
    Memory,
    /// All else.
    Other,
}

/// Words in the lower-case name of a kernel; the first line with one of them decides. Attention comes first, since
/// FlashAttention-2 has cutlass's types in its names.
const FAMILIES: &[(Family, &[&str])] = &[
    (Family::Communication, &["nccl"]),
    (Family::Fp8Casts, &["fp8cast", "fp8swiglu", "fp8slot"]),
    (Family::Attention, &["flash", "sdpa", "fmha", "cudnn", "attention"]),
    (Family::MatrixProducts, &["nvjet", "gemm", "gemv", "xmma", "cutlass", "cublas", "splitk"]),
    (Family::Loss, &["crossentropy", "cross_entropy", "tl::scaleby", "nll_loss", "logsoftmax"]),
    (Family::Attention, &["softmax"]),
    (Family::Norms, &["rmsnorm", "rms_norm", "layernorm", "layer_norm"]),
    (Family::Optimizer, &["adamw", "squares_kernel", "::norm_kernel", "normtwoops", "lpnorm"]),
    (Family::Rope, &["rope_kernel", "tl::rope"]),
    (Family::Swiglu, &["swiglu", "silu"]),
    (Family::Embedding, &["embedding", "gather", "indexselect", "grad_weight", "radixsort"]),
    (Family::Memory, &["memcpy", "memset"]),
    (Family::Elementwise, &["at::native"]),
];

impl Family {
    /// The family of a kernel, by its demangled name.
    pub fn of(kernel: &str) -> Self {
        let name = kernel.to_lowercase();
        let matches = |words: &&[&str]| words.iter().any(|word| name.contains(word));
        FAMILIES.iter().find(|(_, words)| matches(words)).map_or(Self::Other, |(family, _)| *family)
    }

    /// As the table calls it.
    pub fn title(self) -> &'static str {
        match self {
            Self::MatrixProducts => "matrix products",
            Self::Attention => "attention",
            Self::Norms => "norms",
            Self::Rope => "RoPE",
            Self::Swiglu => "SwiGLU",
            Self::Loss => "loss",
            Self::Fp8Casts => "fp8 casts",
            Self::Embedding => "embedding",
            Self::Optimizer => "optimizer",
            Self::Elementwise => "casts, element-wise",
            Self::Communication => "communication",
            Self::Memory => "copies, memsets",
            Self::Other => "other",
        }
    }
}

/// One optimizer step, in nanoseconds of the recording's clock.
#[derive(Clone, Copy, Debug)]
pub struct StepSpan {
    /// Its batches are asked for.
    pub start_ns: i64,
    /// Forward, backward and update are launched; next the CPU reads loss and gradient norm.
    pub launched_ns: i64,
    /// The next step may begin.
    pub end_ns: i64,
}

/// Time and launches of a family or of a kernel.
#[derive(Debug, Serialize)]
pub struct Row {
    /// What it is for.
    pub family: Family,
    /// The kernel; `None` in the row of a family.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Milliseconds a step, all launches.
    pub ms: f64,
    /// The same as a fraction of the step.
    pub share: f64,
    /// Launches a step.
    pub launches: f64,
}

/// API calls of one name in which the CPU waited.
#[derive(Debug, Serialize)]
pub struct Wait {
    /// The call.
    pub call: String,
    /// Whether it came in forward, backward or update, not where loss and norm are read.
    pub inside: bool,
    /// How often, over all steps.
    pub count: usize,
    /// Milliseconds in it, over all steps.
    pub ms: f64,
}

/// Where the time of some steps went: `sum of families - overlap + gaps = step`.
#[derive(Debug, Serialize)]
pub struct Profile {
    /// Steps that were recorded.
    pub steps: usize,
    /// Milliseconds from the start of a step to that of the next.
    pub step_ms: f64,
    /// Families that had something to do.
    pub families: Vec<Row>,
    /// Milliseconds a step that several rows count, since kernels ran at the same time.
    pub overlap_ms: f64,
    /// Milliseconds a step in which the GPU communicated and did nothing else.
    pub communication_alone_ms: f64,
    /// Milliseconds a step in which the GPU did nothing.
    pub gap_ms: f64,
    /// CPU waits within forward, backward and update, over all steps.
    pub waits_inside: usize,
    /// Every wait, by name and place.
    pub waits: Vec<Wait>,
    /// Every kernel, the longest first.
    pub kernels: Vec<Row>,
}

impl Profile {
    /// Adds up what happened from the start of the first of `steps` to the end of the last.
    ///
    /// # Panics
    /// Without steps.
    pub fn new(activities: &[Activity], steps: &[StepSpan]) -> Self {
        let (first, last) = (steps[0].start_ns, steps[steps.len() - 1].end_ns);
        let within = |a: &&Activity| (first..last).contains(&a.start_ns);
        let (waits, work): (Vec<&Activity>, Vec<&Activity>) =
            activities.iter().filter(within).partition(|a| a.kind == ActivityKind::Wait);
        // What outlasts the last step is cut there.
        let interval = |a: &Activity| (a.start_ns, a.end_ns.min(last));

        let mut families = Sums::new();
        let mut kernels = Sums::new();
        let family = |a: &Activity| match a.kind {
            ActivityKind::Kernel => Family::of(&a.name),
            _ => Family::Memory,
        };
        for &a in &work {
            let family = family(a);
            let (start, end) = interval(a);
            add(&mut families, (family, None), end - start);
            add(&mut kernels, (family, Some(&a.name)), end - start);
        }
        let total: i64 = families.values().map(|(ns, _)| ns).sum();
        let busy = covered_ns(work.iter().map(|a| interval(a)).collect());
        let computing = work.iter().filter(|a| family(a) != Family::Communication);
        let computing = covered_ns(computing.map(|a| interval(a)).collect());

        let a_step = |ns: i64| ns as f64 / 1e6 / steps.len() as f64;
        let step_ms = a_step(last - first);
        let rows = |sums: Sums| -> Vec<Row> {
            let row = |((family, kernel), (ns, n)): ((Family, Option<&str>), (i64, usize))| Row {
                family,
                kernel: kernel.map(str::to_owned),
                ms: a_step(ns),
                share: a_step(ns) / step_ms,
                launches: n as f64 / steps.len() as f64,
            };
            sums.into_iter().map(row).collect()
        };
        let mut kernels = rows(kernels);
        kernels.sort_by(|a, b| b.ms.total_cmp(&a.ms));
        let waits = count_waits(&outermost(&waits), steps);
        Self {
            steps: steps.len(),
            step_ms,
            families: rows(families),
            overlap_ms: a_step(total - busy),
            communication_alone_ms: a_step(busy - computing),
            gap_ms: a_step(last - first - busy),
            waits_inside: waits.iter().filter(|w| w.inside).map(|w| w.count).sum(),
            waits,
            kernels,
        }
    }
}

/// Nanoseconds and launches by family and kernel.
type Sums<'a> = BTreeMap<(Family, Option<&'a str>), (i64, usize)>;

fn add<'a>(sums: &mut Sums<'a>, key: (Family, Option<&'a str>), ns: i64) {
    let sum = sums.entry(key).or_default();
    *sum = (sum.0 + ns, sum.1 + 1);
}

/// Length of the union of intervals: time in which at least one of them ran.
fn covered_ns(mut intervals: Vec<(i64, i64)>) -> i64 {
    intervals.sort_unstable();
    let mut covered = 0;
    let mut reached = i64::MIN;
    for (start, end) in intervals {
        covered += (end - start.max(reached)).max(0);
        reached = reached.max(end);
    }
    covered
}

/// Leaves out a wait within another one: the driver's call that the runtime's makes.
fn outermost<'a>(waits: &[&'a Activity]) -> Vec<&'a Activity> {
    let length = |a: &Activity| a.end_ns - a.start_ns;
    let holds = |outer: &Activity, inner: &Activity| {
        let within = outer.start_ns <= inner.start_ns && inner.end_ns <= outer.end_ns;
        outer.lane == inner.lane && within && length(outer) > length(inner)
    };
    waits.iter().copied().filter(|w| !waits.iter().any(|outer| holds(outer, w))).collect()
}

fn count_waits(waits: &[&Activity], steps: &[StepSpan]) -> Vec<Wait> {
    let mut counts: BTreeMap<(bool, &str), (usize, i64)> = BTreeMap::new();
    for w in waits {
        let inside = steps.iter().any(|s| (s.start_ns..s.launched_ns).contains(&w.start_ns));
        let count = counts.entry((!inside, &w.name)).or_default();
        *count = (count.0 + 1, count.1 + w.end_ns - w.start_ns);
    }
    let wait = |((outside, call), (count, ns)): ((bool, &str), (usize, i64))| Wait {
        call: call.to_owned(),
        inside: !outside,
        count,
        ms: ns as f64 / 1e6,
    };
    counts.into_iter().map(wait).collect()
}

/// Writes activities as a Chrome trace, which chrome://tracing and ui.perfetto.dev show: a line a CUDA stream, and
/// one for the waits of each CPU thread. Microseconds from the first activity.
pub fn write_trace(activities: &[Activity], mut out: impl Write) -> std::io::Result<()> {
    let zero = activities.iter().map(|a| a.start_ns).min().unwrap_or(0);
    let us = |ns: i64| ns as f64 / 1e3;
    let group = |pid: u32, title: &str| {
        let args = json!({ "name": title });
        json!({"ph": "M", "name": "process_name", "pid": pid, "args": args})
    };
    let mut events = vec![group(0, "GPU, by stream"), group(1, "CPU waits, by thread")];
    events.extend(activities.iter().map(|a| {
        let (pid, category) = match a.kind {
            ActivityKind::Kernel => (0, Family::of(&a.name).title()),
            ActivityKind::Wait => (1, "wait"),
            _ => (0, Family::Memory.title()),
        };
        json!({
            "ph": "X", "name": a.name, "cat": category, "pid": pid, "tid": a.lane,
            "ts": us(a.start_ns - zero), "dur": us(a.end_ns - a.start_ns),
        })
    }));
    serde_json::to_writer(&mut out, &json!({ "traceEvents": events }))?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use ActivityKind::{Kernel, Memcpy, Wait as CpuWait};

    #[test]
    fn a_kernel_is_sorted_by_its_name() {
        for (family, names) in [
            (
                Family::MatrixProducts,
                &[
                    "nvjet_tst_128x256_64x4_1x2_h_bz_coopB_NNT",
                    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas",
                    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>(T1::Params)",
                    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(int)",
                ][..],
            ),
            (
                Family::Attention,
                &[
                    "void flash::(anonymous namespace)::backward_kernel<64>(flash::Backward, int)",
                    "void flash::(anonymous namespace)::store_dq_kernel<64>(flash::Backward, int)",
                    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, cutlass::half_t>>",
                    "fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)",
                    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_6_64x64x64",
                    "void cudnn::fusion::compute_dot_do_o_specialized<true, float, 128>(float*)",
                    "void (anonymous namespace)::softmax_warp_forward<float, float, 11, false>(float*)",
                ],
            ),
            (
                Family::Norms,
                &[
                    "void tl::(anonymous namespace)::forward_kernel<__nv_bfloat16, 1>(tl::RmsNorm)",
                    "void tl::(anonymous namespace)::dweight_kernel<float>(tl::RmsNormBackward)",
                    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float>(int)",
                ],
            ),
            (
                Family::Rope,
                &["void tl::(anonymous namespace)::rope_kernel<float>(tl::Rope, int, int)"],
            ),
            (
                Family::Swiglu,
                &[
                    "void tl::(anonymous namespace)::swiglu_kernel<float, 2>(tl::SwiGlu, long, int)",
                    "void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel(int)>",
                ],
            ),
            (
                Family::Loss,
                &[
                    "void tl::(anonymous namespace)::one_pass_kernel<float, 1024>(tl::CrossEntropy)",
                    "void tl::(anonymous namespace)::scale_kernel<__nv_bfloat16>(tl::ScaleBy)",
                    "void at::native::(anonymous namespace)::nll_loss_forward_reduce_cuda_kernel_2d",
                    "void at::native::cunn_SoftMaxForward<4, float, LogSoftMaxForwardEpilogue>(float*)",
                ],
            ),
            (
                Family::Optimizer,
                &[
                    "tl::(anonymous namespace)::adamw_kernel(List<tl::AdamWTensor>, float const*)",
                    "void tl::(anonymous namespace)::squares_kernel<float>(List<tl::NormTensor>, bool)",
                    "tl::(anonymous namespace)::norm_kernel(float const*, float, float*, float*)",
                    "void at::native::reduce_kernel<512, 1, ReduceOp<float, NormTwoOps<float, float>>>",
                ],
            ),
            (
                Family::Embedding,
                &[
                    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*)",
                    "void at::native::(anonymous namespace)::embedding_backward_feature_kernel<float>",
                ],
            ),
            (
                Family::Elementwise,
                &[
                    "void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>(int)",
                    "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda(int)>(int)",
                ],
            ),
            (
                Family::Communication,
                &["ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)"],
            ),
        ] {
            for name in names {
                assert_eq!(Family::of(name), family, "{name}");
            }
        }
    }

    #[test]
    fn time_in_which_two_streams_work_is_counted_once() {
        assert_eq!(covered_ns(vec![]), 0);
        assert_eq!(covered_ns(vec![(0, 10), (10, 15)]), 15);
        assert_eq!(covered_ns(vec![(20, 30), (0, 10)]), 20);
        assert_eq!(covered_ns(vec![(0, 10), (2, 4), (8, 12)]), 12);
    }

    fn activity(kind: ActivityKind, name: &str, start_ns: i64, end_ns: i64) -> Activity {
        Activity { kind, name: name.into(), lane: 7, start_ns, end_ns }
    }

    /// Two steps of 1 ms: a product of 0.4 ms, beside it a copy of 0.2 ms, AdamW of 0.1 ms.
    fn two_steps() -> (Vec<Activity>, [StepSpan; 2]) {
        let ms = 1_000_000;
        let mut all = vec![activity(Kernel, "nvjet_tst", -ms, -ms / 2)]; // before them
        let steps = [10 * ms, 11 * ms].map(|at| {
            all.push(activity(Kernel, "nvjet_tst", at + ms / 10, at + ms / 2));
            all.push(activity(Memcpy, "memcpy HtoD", at + ms * 4 / 10, at + ms * 6 / 10));
            all.push(activity(Kernel, "tl::adamw_kernel", at + ms * 7 / 10, at + ms * 8 / 10));
            all.push(activity(CpuWait, "cudaStreamSynchronize", at + ms / 4, at + ms * 8 / 10));
            all.push(activity(CpuWait, "cuStreamSynchronize", at + ms / 4 + 9, at + ms * 7 / 10));
            StepSpan { start_ns: at, launched_ns: at + ms / 5, end_ns: at + ms }
        });
        (all, steps)
    }

    #[test]
    fn rows_less_overlap_plus_gaps_are_the_step() {
        let (all, steps) = two_steps();
        let p = Profile::new(&all, &steps);
        assert_eq!((p.steps, p.step_ms), (2, 1.0));
        let rows: Vec<_> = p.families.iter().map(|r| (r.family, r.ms, r.launches)).collect();
        let want = [
            (Family::MatrixProducts, 0.4, 1.0),
            (Family::Optimizer, 0.1, 1.0),
            (Family::Memory, 0.2, 1.0),
        ];
        assert_eq!(rows, want);
        assert_eq!((p.overlap_ms, p.gap_ms), (0.1, 0.4));
        assert_eq!(p.kernels[0].kernel.as_deref(), Some("nvjet_tst"));
        let sum: f64 = p.families.iter().map(|r| r.ms).sum();
        assert!((sum - p.overlap_ms + p.gap_ms - p.step_ms).abs() < 1e-12);
    }

    #[test]
    fn a_wait_counts_once_and_where_it_came() {
        let (mut all, steps) = two_steps();
        let p = Profile::new(&all, &steps);
        let [wait] = &p.waits[..] else { panic!("{:?}", p.waits) };
        assert_eq!(
            (wait.call.as_str(), wait.inside, wait.count),
            ("cudaStreamSynchronize", false, 2)
        );
        assert!((wait.ms - 1.1).abs() < 1e-12);
        assert_eq!(p.waits_inside, 0);

        let at = steps[1].start_ns + 5;
        all.push(activity(CpuWait, "cudaMemcpy", at, at + 100));
        let p = Profile::new(&all, &steps);
        assert_eq!((p.waits_inside, p.waits[0].call.as_str()), (1, "cudaMemcpy"));
    }

    #[test]
    fn communication_beside_other_kernels_is_told_from_that_alone() {
        let steps = [StepSpan { start_ns: 0, launched_ns: 10, end_ns: 2_000_000 }];
        let all = [
            activity(Kernel, "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgs)", 0, 1_000_000),
            activity(Kernel, "nvjet_tst", 250_000, 500_000),
            activity(Memcpy, "copy", 900_000, 1_500_000),
        ];
        let p = Profile::new(&all, &steps);
        let rows: Vec<_> = p.families.iter().map(|r| (r.family, r.ms)).collect();
        let want =
            [(Family::MatrixProducts, 0.25), (Family::Communication, 1.0), (Family::Memory, 0.6)];
        assert_eq!(rows, want);
        assert_eq!((p.communication_alone_ms, p.gap_ms), (0.65, 0.5));
    }

    #[test]
    fn what_outlasts_the_last_step_is_cut_there() {
        let steps = [StepSpan { start_ns: 0, launched_ns: 10, end_ns: 100 }];
        let p = Profile::new(&[activity(Kernel, "nvjet_tst", 50, 150)], &steps);
        assert_eq!((p.families[0].share, p.gap_ms), (0.5, 5e-5));
    }

    #[test]
    fn a_trace_is_json_in_microseconds() {
        let (all, _) = two_steps();
        let mut bytes = vec![];
        write_trace(&all[1..], &mut bytes).unwrap();
        let trace: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        let event = &trace["traceEvents"][2];
        assert_eq!((&event["ph"], &event["cat"]), (&"X".into(), &"matrix products".into()));
        assert_eq!((event["ts"].as_f64(), event["dur"].as_f64()), (Some(0.0), Some(400.0)));
        let wait = &trace["traceEvents"][5];
        assert_eq!((&wait["pid"], &wait["tid"]), (&1.into(), &7.into()));
    }
}
