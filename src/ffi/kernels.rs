//! The kernels of `csrc/`: differentiable ops on CUDA tensors, and what the optimizer calls.
//!
//! Each checks its arguments in C++; an error names the op, the argument, expected and got. [`crate::ops`]
//! chooses between these and their references.

use super::{Handle, check, cuda_functions, handle};
use anyhow::Result;
use std::ffi::{CString, c_char, c_int, c_void};
use std::ptr::{null, null_mut};
use tch::Tensor;

unsafe extern "C" {
    fn tl_backward(out: Handle, grad: Handle) -> c_int;
    fn tl_gradients(
        n_out: c_int,
        out: *mut Handle,
        grad: *mut Handle,
        n: c_int,
        inputs: *mut Handle,
        gradients: *mut Handle,
    ) -> c_int;
    fn tl_node_backward(out: Handle, n: c_int, gradients: *mut Handle) -> c_int;
}

cuda_functions! {
    fn tl_event_new(event: *mut *mut c_void) -> c_int;
    fn tl_event_free(event: *mut c_void);
    fn tl_event_record(event: *mut c_void) -> c_int;
    fn tl_event_wait(event: *mut c_void) -> c_int;
    fn tl_event_elapsed_ms(from: *mut c_void, to: *mut c_void, ms: *mut f32) -> c_int;
    fn tl_flash_attention(
        q: Handle,
        k: Handle,
        v: Handle,
        doc_start: Handle,
        doc_end: Handle,
        scale: f64,
        causal: c_int,
        deterministic: c_int,
        arch: c_int,
        out: *mut Handle,
        lse: *mut Handle,
    ) -> c_int;
    fn tl_flash_attention_qkv(
        qkv: Handle,
        heads: i64,
        groups: i64,
        cos: Handle,
        sin: Handle,
        doc_start: Handle,
        doc_end: Handle,
        scale: f64,
        causal: c_int,
        deterministic: c_int,
        arch: c_int,
        out: *mut Handle,
    ) -> c_int;
    fn tl_rms_norm(
        x: Handle,
        residual: Handle,
        weight: Handle,
        eps: f64,
        y: *mut Handle,
        sum: *mut Handle,
    ) -> c_int;
    fn tl_rope(
        x: Handle,
        cos: Handle,
        sin: Handle,
        heads: i64,
        head_size: i64,
        out: *mut Handle,
    ) -> c_int;
    fn tl_set_matmul(mode: c_int, file: *const c_char) -> c_int;
    fn tl_linear(x: Handle, weight: Handle, fp8: *mut Handle, out: *mut Handle) -> c_int;
    fn tl_norm_linear(
        x: Handle,
        residual: Handle,
        norm: Handle,
        eps: f64,
        weight: Handle,
        fp8: *mut Handle,
        out: *mut Handle,
        sum: *mut Handle,
    ) -> c_int;
    fn tl_norm_mlp(
        x: Handle,
        residual: Handle,
        norm: Handle,
        eps: f64,
        fc_1: Handle,
        fc_2: Handle,
        proj: Handle,
        fp8_gate_up: *mut Handle,
        fp8_down: *mut Handle,
        out: *mut Handle,
        sum: *mut Handle,
    ) -> c_int;
    fn tl_fp8_cast_weight(weight: Handle, second: Handle, layer: *mut Handle) -> c_int;
    fn tl_fp8_update(scales: Handle) -> c_int;
    fn tl_swiglu(gate_up: Handle, out: *mut Handle) -> c_int;
    fn tl_swiglu_mlp(
        x: Handle,
        fc_1: Handle,
        fc_2: Handle,
        proj: Handle,
        out: *mut Handle,
    ) -> c_int;
    fn tl_cross_entropy(
        logits: Handle,
        target: Handle,
        scale: f64,
        label_smoothing: f64,
        z_loss: f64,
        loss: *mut Handle,
    ) -> c_int;
    fn tl_head_loss(
        x: Handle,
        weight: Handle,
        target: Handle,
        chunks: i64,
        scale: f64,
        label_smoothing: f64,
        z_loss: f64,
        loss: *mut Handle,
    ) -> c_int;
    fn tl_adamw(
        n: c_int,
        tensors: *const RawAdamWTensors,
        clip: Handle,
        lr: f64,
        beta1: f64,
        beta2: f64,
        eps: f64,
        weight_decay: f64,
        step: i64,
    ) -> c_int;
    fn tl_grad_norm(
        n: c_int,
        grad: *mut Handle,
        max_norm: f64,
        watch: Handle,
        norm: *mut Handle,
        clip: *mut Handle,
    ) -> c_int;
}

/// `TlAdamWTensors` of `csrc/api.h`, field by field.
#[repr(C)]
struct RawAdamWTensors {
    param: Handle,
    grad: Handle,
    exp_avg: Handle,
    exp_avg_sq: Handle,
    exp_avg_scale: Handle,
    exp_avg_sq_scale: Handle,
    weight: Handle,
    key: u64,
    clear_grad: c_int,
}

/// A null handle for an absent tensor.
fn optional(tensor: Option<&Tensor>) -> Handle {
    tensor.map_or(null_mut(), handle)
}

/// Runs a call that makes one tensor.
fn one(call: impl FnOnce(*mut Handle) -> c_int) -> Result<Tensor> {
    let mut out: Handle = null_mut();
    check(call(&mut out))?;
    // SAFETY: on success `out` is a new tensor that this side owns.
    Ok(unsafe { Tensor::from_ptr(out) })
}

/// Runs a call that makes two tensors.
fn two(call: impl FnOnce(*mut Handle, *mut Handle) -> c_int) -> Result<(Tensor, Tensor)> {
    let (mut a, mut b): (Handle, Handle) = (null_mut(), null_mut());
    check(call(&mut a, &mut b))?;
    // SAFETY: on success both are new tensors that this side owns.
    Ok(unsafe { (Tensor::from_ptr(a), Tensor::from_ptr(b)) })
}

/// Runs a call that makes one tensor, or two.
fn one_or_two(
    both: bool,
    call: impl FnOnce(*mut Handle, *mut Handle) -> c_int,
) -> Result<(Tensor, Option<Tensor>)> {
    if both {
        return two(call).map(|(a, b)| (a, Some(b)));
    }
    one(|out| call(out, null_mut())).map(|a| (a, None))
}

/// A point in the work of the current CUDA stream.
#[derive(Debug)]
pub struct Event(*mut c_void);

impl Event {
    /// Records the stream's state now. No CPU wait.
    pub fn record() -> Result<Self> {
        let mut event = null_mut();
        // SAFETY: on success `event` is a new CUDA event, freed by `drop`.
        check(unsafe { tl_event_new(&mut event) })?;
        let event = Self(event);
        check(unsafe { tl_event_record(event.0) })?;
        Ok(event)
    }

    pub(super) fn as_ptr(&self) -> *mut c_void {
        self.0
    }

    /// Makes the CPU wait for what was launched before the event.
    pub fn wait(&self) -> Result<()> {
        // SAFETY: the event is live and was recorded.
        check(unsafe { tl_event_wait(self.0) })
    }

    /// Milliseconds of GPU time since `earlier`. The CPU waits for this event.
    pub fn elapsed_ms(&self, earlier: &Event) -> Result<f64> {
        let mut ms = 0f32;
        // SAFETY: both events are live and were recorded.
        check(unsafe { tl_event_elapsed_ms(earlier.0, self.0, &mut ms) })?;
        Ok(f64::from(ms))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made by `tl_event_new`, freed once.
        unsafe { tl_event_free(self.0) }
    }
}

/// `out.backward(grad)`, keeping the graph: gradients are added to the leaves' `.grad`.
pub fn backward(out: &Tensor, grad: &Tensor) -> Result<()> {
    // SAFETY: both tensors outlive the call.
    check(unsafe { tl_backward(handle(out), handle(grad)) })
}

/// `torch.autograd.grad([out], inputs, [grad])`, keeping the graph; nothing is accumulated.
pub fn gradients(out: &Tensor, grad: &Tensor, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    gradients_of(&[(out, grad)], inputs)
}

/// [`gradients`] of several outputs, each with its gradient.
pub fn gradients_of(outputs: &[(&Tensor, &Tensor)], inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let mut out: Vec<Handle> = outputs.iter().map(|(out, _)| handle(out)).collect();
    let mut grad: Vec<Handle> = outputs.iter().map(|(_, grad)| handle(grad)).collect();
    let mut wanted: Vec<Handle> = inputs.iter().map(|t| handle(t)).collect();
    let mut found: Vec<Handle> = vec![null_mut(); inputs.len()];
    // SAFETY: the arrays have as many entries as said; on success each of `found` is a new tensor of
    // this side's.
    check(unsafe {
        tl_gradients(
            outputs.len() as c_int,
            out.as_mut_ptr(),
            grad.as_mut_ptr(),
            inputs.len() as c_int,
            wanted.as_mut_ptr(),
            found.as_mut_ptr(),
        )
    })?;
    Ok(found.into_iter().map(|t| unsafe { Tensor::from_ptr(t) }).collect())
}

/// Runs the backward function of the one op that made `out`, given the gradients of its first results, and drops
/// what it returns; for timing without the autograd engine.
pub fn node_backward(out: &Tensor, gradients: &[Tensor]) -> Result<()> {
    let mut list: Vec<Handle> = gradients.iter().map(handle).collect();
    // SAFETY: the tensors outlive the call; C++ checks their number.
    check(unsafe { tl_node_backward(handle(out), list.len() as c_int, list.as_mut_ptr()) })
}

/// How attention is computed; documents are `(start, end)`, each (B, S) i32 (see `csrc/api.h`).
#[derive(Clone, Copy, Debug)]
pub struct FlashOptions<'a> {
    pub causal: bool,
    pub documents: Option<(&'a Tensor, &'a Tensor)>,
    /// The backward pass repeats bit for bit; also switched on by deterministic algorithms.
    pub deterministic: bool,
    /// 80 or 90 picks the kernels; 0: the card's own.
    pub arch: i32,
}

/// FlashAttention: q (B, H, T, D), k, v (B, G, S, D) -> out (B, H, T, D), log sum exp (B, H, T).
pub fn flash_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    o: FlashOptions,
) -> Result<(Tensor, Tensor)> {
    let (start, end) = (optional(o.documents.map(|d| d.0)), optional(o.documents.map(|d| d.1)));
    let (q, k, v) = (handle(q), handle(k), handle(v));
    // SAFETY: the tensors outlive the call; both outputs are filled on success.
    two(|out, lse| unsafe {
        let (causal, deterministic) = (o.causal.into(), o.deterministic.into());
        tl_flash_attention(q, k, v, start, end, 0.0, causal, deterministic, o.arch, out, lse)
    })
}

/// FlashAttention on a packed projection: qkv (B, T, H + 2G, D) -> (B, H, T, D). With rotary tables (cos, sin), each
/// (T, n) fp32, queries and keys are turned first, in place.
pub fn flash_attention_qkv(
    qkv: &Tensor,
    h: i64,
    g: i64,
    rotary: Option<(&Tensor, &Tensor)>,
    o: FlashOptions,
) -> Result<Tensor> {
    let (cos, sin) = (optional(rotary.map(|r| r.0)), optional(rotary.map(|r| r.1)));
    let (start, end) = (optional(o.documents.map(|d| d.0)), optional(o.documents.map(|d| d.1)));
    // SAFETY: the tensors outlive the call.
    one(|out| unsafe {
        let (causal, deterministic) = (o.causal.into(), o.deterministic.into());
        tl_flash_attention_qkv(
            handle(qkv),
            h,
            g,
            cos,
            sin,
            start,
            end,
            0.0,
            causal,
            deterministic,
            o.arch,
            out,
        )
    })
}

/// RMSNorm of x (.., C).
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    // SAFETY: the tensors outlive the call; without a residual there is no second output.
    one(|out| unsafe { tl_rms_norm(handle(x), null_mut(), handle(weight), eps, out, null_mut()) })
}

/// (RMSNorm of x + residual, x + residual).
pub fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    // SAFETY: the tensors outlive the call.
    two(|y, sum| unsafe { tl_rms_norm(handle(x), handle(residual), handle(weight), eps, y, sum) })
}

/// Rotates the first `heads` heads of x (B, T, heads' D) in place and returns it.
pub fn rope(x: &Tensor, cos: &Tensor, sin: &Tensor, heads: i64, head_size: i64) -> Result<Tensor> {
    // SAFETY: the tensors outlive the call.
    one(|out| unsafe { tl_rope(handle(x), handle(cos), handle(sin), heads, head_size, out) })
}

/// How products of 16-bit matrices in [`linear`] and the ops with weights below are computed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Matmul<'a> {
    /// By libtorch.
    Aten,
    /// By cuBLASLt with its first choice.
    Heuristic,
    /// By cuBLASLt with the fastest of its candidates, kept in this file or in the process.
    Search(Option<&'a std::path::Path>),
}

/// Process-wide switch.
pub fn set_matmul(how: Matmul) -> Result<()> {
    let (mode, file) = match how {
        Matmul::Aten => (0, None),
        Matmul::Heuristic => (1, None),
        Matmul::Search(file) => (2, file),
    };
    let file = file.map(|path| CString::new(path.as_os_str().as_encoded_bytes())).transpose()?;
    // SAFETY: the text outlives the call; null stands for none.
    check(unsafe { tl_set_matmul(mode, file.as_ref().map_or(null(), |text| text.as_ptr())) })
}

/// What a linear layer needs beside its weight to compute in e4m3; handles share storage.
#[derive(Debug)]
pub struct Fp8Linear {
    /// e4m3 (O, C)
    pub weight: Tensor,
    /// e4m3 (C, O), the same transposed
    pub weight_t: Tensor,
    /// fp32 (2, 8): scales of the input and of the output's gradient
    pub scales: Tensor,
    /// fp32 (8,)
    pub weight_scale: Tensor,
}

impl Fp8Linear {
    fn handles(&self) -> [Handle; 4] {
        [&self.weight, &self.weight_t, &self.scales, &self.weight_scale].map(handle)
    }

    /// Another handle on the same tensors.
    pub fn shallow_clone(&self) -> Self {
        let [weight, weight_t, scales, weight_scale] =
            [&self.weight, &self.weight_t, &self.scales, &self.weight_scale]
                .map(Tensor::shallow_clone);
        Self { weight, weight_t, scales, weight_scale }
    }
}

/// A null pointer, or one to the handles.
fn optional_array(handles: &mut Option<[Handle; 4]>) -> *mut Handle {
    handles.as_mut().map_or(null_mut(), |array| array.as_mut_ptr())
}

/// x (.., C), weight (O, C) -> (.., O).
pub fn linear(x: &Tensor, weight: &Tensor, fp8: Option<&Fp8Linear>) -> Result<Tensor> {
    let mut fp8 = fp8.map(Fp8Linear::handles);
    // SAFETY: the tensors outlive the call.
    one(|out| unsafe { tl_linear(handle(x), handle(weight), optional_array(&mut fp8), out) })
}

/// (RMSNorm of x + residual) W^T, and x + residual where there is a residual.
pub fn norm_linear(
    x: &Tensor,
    residual: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weight: &Tensor,
    fp8: Option<&Fp8Linear>,
) -> Result<(Tensor, Option<Tensor>)> {
    let mut fp8 = fp8.map(Fp8Linear::handles);
    let (x, norm, weight) = (handle(x), handle(norm), handle(weight));
    // SAFETY: the tensors outlive the call; the sum is filled where there is a residual.
    one_or_two(residual.is_some(), |out, sum| unsafe {
        let fp8 = optional_array(&mut fp8);
        tl_norm_linear(x, optional(residual), norm, eps, weight, fp8, out, sum)
    })
}

/// The LLaMA MLP without biases of the RMSNorm of x + residual, and x + residual where there is a residual.
pub fn norm_mlp(
    x: &Tensor,
    residual: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weights: [&Tensor; 3],
    fp8: Option<[&Fp8Linear; 2]>,
) -> Result<(Tensor, Option<Tensor>)> {
    let mut gate_up = fp8.map(|layers| layers[0].handles());
    let mut down = fp8.map(|layers| layers[1].handles());
    let (x, norm, [fc_1, fc_2, proj]) = (handle(x), handle(norm), weights.map(handle));
    // SAFETY: as above.
    one_or_two(residual.is_some(), |out, sum| unsafe {
        let (gate_up, down) = (optional_array(&mut gate_up), optional_array(&mut down));
        let residual = optional(residual);
        tl_norm_mlp(x, residual, norm, eps, fc_1, fc_2, proj, gate_up, down, out, sum)
    })
}

/// Casts the weight of an fp8 layer anew, or two that lie behind each other in memory.
pub fn fp8_cast_weight(weight: &Tensor, second: Option<&Tensor>, layer: &Fp8Linear) -> Result<()> {
    let mut layer = layer.handles();
    // SAFETY: the tensors outlive the call.
    check(unsafe { tl_fp8_cast_weight(handle(weight), optional(second), layer.as_mut_ptr()) })
}

/// New scales (.., 8) from the largest magnitudes cast since the last update.
pub fn fp8_update(scales: &Tensor) -> Result<()> {
    // SAFETY: the tensor outlives the call.
    check(unsafe { tl_fp8_update(handle(scales)) })
}

/// gate_up (.., 2F) -> silu(gate) * up (.., F).
pub fn swiglu(gate_up: &Tensor) -> Result<Tensor> {
    // SAFETY: the tensor outlives the call.
    one(|out| unsafe { tl_swiglu(handle(gate_up), out) })
}

/// The LLaMA MLP without biases.
pub fn swiglu_mlp(x: &Tensor, fc_1: &Tensor, fc_2: &Tensor, proj: &Tensor) -> Result<Tensor> {
    // SAFETY: the tensors outlive the call.
    one(|out| unsafe { tl_swiglu_mlp(handle(x), handle(fc_1), handle(fc_2), handle(proj), out) })
}

/// Scalars of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossScalars {
    pub scale: f64,
    pub label_smoothing: f64,
    pub z_loss: f64,
}

impl LossScalars {
    /// The plain sum.
    pub const SUM: Self = Self { scale: 1.0, label_smoothing: 0.0, z_loss: 0.0 };
}

/// Loss of logits (N, V), which become their gradient.
pub fn cross_entropy(logits: &Tensor, target: &Tensor, s: LossScalars) -> Result<Tensor> {
    // SAFETY: the tensors outlive the call.
    one(|loss| unsafe {
        let (logits, target) = (handle(logits), handle(target));
        tl_cross_entropy(logits, target, s.scale, s.label_smoothing, s.z_loss, loss)
    })
}

/// Loss of the logits x weight^T, `chunks` pieces of rows one after the other.
pub fn head_loss(
    x: &Tensor,
    weight: &Tensor,
    target: &Tensor,
    chunks: i64,
    s: LossScalars,
) -> Result<Tensor> {
    // SAFETY: the tensors outlive the call.
    one(|loss| unsafe {
        let (x, weight, target) = (handle(x), handle(weight), handle(target));
        tl_head_loss(x, weight, target, chunks, s.scale, s.label_smoothing, s.z_loss, loss)
    })
}

/// The tensors of one parameter in an AdamW step, on one CUDA device. Their dtypes say how master and moments are
/// kept (`csrc/api.h`), the same for all parameters of a call.
#[derive(Clone, Copy, Debug)]
pub struct AdamWTensors<'a> {
    /// Exact weight, fp32; or the 16 bits that `weight` lacks, int16; or `None`: `weight` is all there is.
    pub param: Option<&'a Tensor>,
    /// Gradient, fp32.
    pub grad: &'a Tensor,
    /// First moment: fp32, bf16, or int8 codes.
    pub exp_avg: &'a Tensor,
    /// Second moment: fp32, bf16, or uint8 codes.
    pub exp_avg_sq: &'a Tensor,
    /// Scales of the codes, `(ceil(n / 256),) fp32`.
    pub scales: Option<(&'a Tensor, &'a Tensor)>,
    /// What the model computes with, bf16.
    pub weight: Option<&'a Tensor>,
    /// Key of the random bits of this tensor in this step.
    pub key: u64,
    /// Leave zeros in the gradient.
    pub clear_grad: bool,
}

/// Scalars of one AdamW step; `step` counts from 1.
#[derive(Clone, Copy, Debug)]
pub struct AdamWScalars {
    pub lr: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    pub weight_decay: f64,
    pub step: i64,
}

/// One fused AdamW update in place (formula in `csrc/adamw.cu`). Gradients are multiplied by `clip`,
/// a 0-dim fp32 CUDA tensor; where it is not finite nothing is written. The CPU does not wait.
pub fn adamw(tensors: &[AdamWTensors], clip: &Tensor, s: AdamWScalars) -> Result<()> {
    let raw = |t: &AdamWTensors| RawAdamWTensors {
        param: optional(t.param),
        grad: handle(t.grad),
        exp_avg: handle(t.exp_avg),
        exp_avg_sq: handle(t.exp_avg_sq),
        exp_avg_scale: optional(t.scales.map(|s| s.0)),
        exp_avg_sq_scale: optional(t.scales.map(|s| s.1)),
        weight: optional(t.weight),
        key: t.key,
        clear_grad: t.clear_grad.into(),
    };
    let list: Vec<RawAdamWTensors> = tensors.iter().map(raw).collect();
    // SAFETY: the array has as many entries as said; the tensors outlive the call, and C++ checks dtype, layout,
    // device and size of each before it launches.
    check(unsafe {
        tl_adamw(
            list.len() as c_int,
            list.as_ptr(),
            handle(clip),
            s.lr,
            s.beta1,
            s.beta2,
            s.eps,
            s.weight_decay,
            s.step,
        )
    })
}

/// L2 norm over all gradients, and the factor that brings it to `max_norm` (`None`: 1), both () fp32 on the
/// device; the factor is not finite where the norm is not. The CPU does not wait.
///
/// `watch`, `(n + 1,) i32` of zeros at first, keeps what the first norm that is not finite was due to: 1 for each such
/// gradient, and 1 in the last place, with which the factor stays nan.
pub fn grad_norm(
    grads: &[&Tensor],
    max_norm: Option<f64>,
    watch: Option<&Tensor>,
) -> Result<(Tensor, Tensor)> {
    let mut grad: Vec<Handle> = grads.iter().map(|t| handle(t)).collect();
    let max_norm = max_norm.unwrap_or(f64::INFINITY);
    // SAFETY: the array has `grads.len()` entries; the tensors outlive the call.
    two(|norm, clip| unsafe {
        tl_grad_norm(grads.len() as c_int, grad.as_mut_ptr(), max_norm, optional(watch), norm, clip)
    })
}
