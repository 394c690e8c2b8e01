// The whole C ABI between Rust (src/ffi) and C++/CUDA (csrc).
//
// Two parts. What only libtorch's CPU half needs (csrc/torch, csrc/cpu) is linked into the program. CUDA code (the
// kernels and csrc/torch_cuda) is the library libtinyllama_cuda.so, which src/ffi/cuda.rs loads where there is a card.
//
// Rules. Every function returns 0 on success and 1 on failure; on failure tl_last_error() holds the full
// exception text of this thread. No exception crosses the border. A `TlTensor` is an `at::Tensor*`, the
// same pointer that tch and torch-sys carry; the callee never frees it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef void* TlTensor;

// Text of the last failure on this thread; valid until the next failing call on this thread.
const char* tl_last_error(void);
// Puts a text there, for a function of Rust's that C++ calls and that fails.
void tl_set_last_error(const char* text, size_t length);

// ---- runtime (csrc/torch/runtime.cpp) ----------------------------------------------------------------

const char* tl_libtorch_version(void);
// State of the default generator of the CPU (device = -1) or of a CUDA device, as a new byte tensor in
// *out, which the caller owns.
int tl_rng_state(int device, TlTensor* out);
int tl_set_rng_state(int device, TlTensor state);
// TF32 for fp32 matrix products (torch.set_float32_matmul_precision("high")); deterministic algorithms.
int tl_set_math_mode(int allow_tf32, int deterministic);
// Lets the caching allocator grow its segments instead of leaving gaps between them (expandable segments), unless the
// user's environment configures it. Before the first CUDA allocation.
int tl_configure_allocator(void);
// Attention kernels that scaled_dot_product_attention may pick from: bit 0 math, 1 flash, 2 efficient,
// 3 cuDNN.
int tl_set_sdp_backends(int mask);

// ---- the CUDA library (csrc/torch_cuda/library.cpp, device.cpp) ---------------------------------------------

// Before all else: where its functions leave the text of a failure, which is tl_set_last_error.
void tl_cuda_library_open(void (*set_last_error)(const char* text, size_t length));
// Versions as text, joined by '\n': CUDA runtime, cuDNN, NCCL.
int tl_cuda_versions(char* buffer, size_t capacity);
// out[0..4] = allocated, peak allocated, reserved, peak reserved bytes of the caching allocator.
int tl_cuda_memory(int device, int64_t out[4]);
int tl_cuda_reset_peak_memory(int device);
// What `cuda` without a number means on this thread: its streams and allocations.
int tl_cuda_set_device(int device);
// The caching allocator takes at most so many bytes of the card.
int tl_cuda_memory_limit(int device, int64_t bytes);
// Device name, compute capability, total memory in bytes.
int tl_cuda_device(int device, char* name, size_t capacity, int* major, int* minor, int64_t* total);

// A CUDA event; record it on the current stream; milliseconds between two (waits for the second).
int tl_event_new(void** event);
void tl_event_free(void* event);
int tl_event_record(void* event);
int tl_event_elapsed_ms(void* from, void* to, float* ms);

// ---- profiler (csrc/torch_cuda/profile.cpp) ---------------------------------------------------------------------

// What a recorded activity is; `lane` is the CUDA stream, of a wait the CPU thread.
enum { TL_KERNEL = 0, TL_MEMCPY = 1, TL_MEMSET = 2, TL_WAIT = 3 };
typedef struct {
  const char* name;  // demangled; of a wait the API call
  int64_t start_ns, end_ns;
  uint32_t lane;
  int32_t kind;
} TlActivity;
// Waits for the current device, then records what all streams do. One recording at a time.
int tl_profile_start(void);
// CUPTI's clock, in which activities are told.
int tl_profile_now(int64_t* ns);
// Waits for the current device, ends the recording and shows it in order of start; valid until the next recording
// ends. A driver call inside a runtime call is told beside it.
int tl_profile_stop(const TlActivity** activities, size_t* n);

// ---- autograd (csrc/torch/runtime.cpp) ---------------------------------------------------------------------

// out.backward(grad), keeping the graph: gradients are added to the leaves' .grad.
int tl_backward(TlTensor out, TlTensor grad);
// torch.autograd.grad(out, inputs, grad), keeping the graph: n new tensors, nothing accumulated.
int tl_gradients(int n_out, TlTensor* out, TlTensor* grad, int n, TlTensor* inputs, TlTensor* gradients);

// Runs the backward function of the one op that made `out`, given the gradients of its first n results, and drops what
// it returns: without the autograd engine, whose cost would hide that of a short kernel.
int tl_node_backward(TlTensor out, int n, TlTensor* gradients);

// ---- CUDA graphs and copies beside the work (csrc/torch_cuda/graph.cpp) ---------------------------------------

// Starts to capture what this thread and its backward passes launch, on a stream of its own; waits for the card first.
// `other`, null or a graph that never runs at the same time: its memory is used again. tl_graph_free also ends a capture
// that was broken off.
int tl_graph_begin(void* other, void** graph);
int tl_graph_end(void* graph);
int tl_graph_replay(void* graph);
void tl_graph_free(void* graph);

// Copies a CPU tensor to the card beside the current work; tl_stage_take makes the current stream, not the CPU, wait.
int tl_stage_new(TlTensor tensor, int device, void** staged);
int tl_stage_take(void* staged, TlTensor* out);
void tl_stage_free(void* staged);
// Copies a CUDA tensor into page-locked memory when the work before it is done, and records the event after it.
int tl_read_back(TlTensor numbers, TlTensor* host, void* event);
// Makes the CPU wait for the event.
int tl_event_wait(void* event);

// ---- optimizer state on the host (csrc/torch_cuda/offload.cpp) ------------------------------------------------

// `bytes` of page-locked memory as a CPU tensor (bytes,) uint8, freed with its last view. Not zeroed.
int tl_page_locked(int64_t bytes, int device, TlTensor* out);
// Copies between n page-locked tensors host[i] (blocks, ..) and slots on the card, card[i] (slots, blocks, ..) of the
// same dtype, on two streams of their own. Slots are free once the current stream has done its work so far. The link
// keeps the tensors until it is freed, which waits for its copies.
int tl_link_new(int device, int slots, int n, TlTensor* host, TlTensor* card, void** link);
// Blocks start, .., start + blocks - 1 of every host tensor into the slot, after the slot's last store; the current
// stream waits for it.
int tl_link_load(void* link, int slot, int64_t start, int64_t blocks);
// And back, after the current stream's work so far. The CPU does not wait in either.
int tl_link_store(void* link, int slot, int64_t start, int64_t blocks);
// Makes the CPU wait for all copies.
int tl_link_wait(void* link);
void tl_link_free(void* link);

// ---- process groups (csrc/torch/store.cpp, process_group.cpp, nccl_group.cpp) -------------------------------------

// libtorch's key-value store: served at a port of all interfaces (0: any free one), or that of host and port. Calls
// may come from any thread. A timeout is for connecting and for tl_store_get.
int tl_store_new(const char* host, uint16_t port, int serve, int64_t timeout_ms, void** store);
// The server lives until the last group over this store is gone as well.
void tl_store_free(void* store);
uint16_t tl_store_port(void* store);
int tl_store_set(void* store, const char* key, const uint8_t* data, size_t size);
// Of a key that is there; where it is not, waits for it and blocks all other calls. *data is valid until the next
// tl_store_get or tl_store_compare_set of this thread.
int tl_store_get(void* store, const char* key, const uint8_t** data, size_t* size);
// *sum = value + what the key held, as decimal text (0 where there was none).
int tl_store_add(void* store, const char* key, int64_t value, int64_t* sum);
// Whether all keys are there.
int tl_store_check(void* store, int n, const char* const* keys, int* present);
// Sets a key that holds `expected`, or that is not there where expected is empty; *data is what it holds afterwards
// (of a key that is not there: expected).
int tl_store_compare_set(void* store, const char* key, const uint8_t* expected, size_t expected_size,
                         const uint8_t* desired, size_t desired_size, const uint8_t** data, size_t* size);

// ProcessGroupNCCL on a card, connected to all `size` ranks, as a c10d::Backend* that the caller owns. `store` is a
// c10::intrusive_ptr<c10d::Store>*.
int tl_make_nccl(const void* store, int rank, int size, int device, int64_t timeout_ms, void** backend);
typedef int (*TlMakeNccl)(const void* store, int rank, int size, int device, int64_t timeout_ms, void** backend);
// Joins a group of `size` ranks, all of which must call this, for tensors on the CUDA device (-1: the CPU): by NCCL,
// where tl_make_nccl is given, else by Gloo at `address` (null: that of the machine's host name). No other group over
// the store may have the prefix.
int tl_group_new(void* store, const char* prefix, TlMakeNccl nccl, int rank, int size, int device, const char* address,
                 int64_t timeout_ms, void** group);
// Before the end, a group is finished: NCCL waits for its operations and for the other ranks. Else it is aborted.
int tl_group_finish(void* group);
void tl_group_free(void* group);
// Ends operations in flight, from any thread.
int tl_group_abort(void* group);
// Fails where an operation of the group failed or took too long.
int tl_group_check(void* group);
// Makes the CPU wait until all ranks are here.
int tl_group_barrier(void* group);
enum { TL_SUM = 0, TL_AVG = 1, TL_MAX = 2 };
// Start an operation on contiguous tensors of the group's device, in the same order on all ranks. whole: the shards of
// all ranks in order of rank; a shard may lie in it where it belongs.
int tl_all_reduce(void* group, TlTensor tensor, int op, void** work);
int tl_all_gather(void* group, TlTensor whole, TlTensor shard, void** work);
int tl_reduce_scatter(void* group, TlTensor shard, TlTensor whole, int op, void** work);
int tl_broadcast(void* group, TlTensor tensor, int root, void** work);
// NCCL: makes the current stream wait. Gloo: makes the CPU wait, and does what is left to do.
int tl_work_wait(void* work);
void tl_work_free(void* work);
// As NCCL counts: 10000 major + 100 minor + patch. Of the header, and of the library in the process.
int tl_nccl_versions(int* built, int* running);

// ---- activation checkpointing (csrc/torch/checkpoint.cpp) ------------------------------------------------

// A part of the network, in Rust: makes n_out new tensors, which C++ then owns, of n_in borrowed ones. May be called
// from another thread than the one that handed it over, by one at a time. 1: failed; tl_set_last_error() was told why.
typedef int (*TlPart)(void* context, int n_in, TlTensor* inputs, int n_out, TlTensor* outputs);

// out[i], new, is results[i] with a backward pass that runs the part again on the inputs. results: what the part made
// of the inputs without a graph. At least one input should require a gradient: else out has none. The callee owns the
// context from the call on, also where it fails, and frees it by drop once no graph needs it.
int tl_recompute(int n_in, TlTensor* inputs, int n_out, TlTensor* results, TlPart run, void* context,
                 void (*drop)(void*), TlTensor* out);

// A Rust function; 1: failed, tl_set_last_error() was told why.
typedef int (*TlCall)(void* context);

// Calls it in each backward pass through t once t's gradient is known, before the function that made t runs backward.
// The callee owns the context from the call on, also where it fails, and frees it by drop.
int tl_on_gradient(TlTensor t, TlCall call, void* context, void (*drop)(void*));

// ---- attention (csrc/torch_cuda/attention.cpp -> csrc/flash_attention) ----------------------------------------

// softmax(scale q k^T + mask) v, differentiable. q (B, H, T, D), k and v (B, G, S, D): bf16 or fp16 on one CUDA
// device, D 64 or 128, H a multiple of G, last dimension contiguous, other strides multiples of 8 elements.
// scale 0: 1/sqrt(D). The queries are the last T of the S positions. doc_start, doc_end: (B, S) int32 or null;
// the query at position p sees the keys in [doc_start[b][p], doc_end[b][p]). deterministic: the backward pass
// repeats bit for bit. arch: 80 or 90 picks the kernels, 0 the card's own. *out (B, H, T, D), strides of
// (B, T, H, D). *lse, where lse is not null: (B, H, T) fp32, not differentiable.
int tl_flash_attention(TlTensor q, TlTensor k, TlTensor v, TlTensor doc_start, TlTensor doc_end, double scale,
                       int causal, int deterministic, int arch, TlTensor* out, TlTensor* lse);
// The same on a packed projection qkv (B, T, H + 2G, D); its gradient is packed as well. With cos, sin (T, n) fp32, not
// null, queries and keys are turned first, as by tl_rope, in place: qkv, contiguous, is then of no further use.
int tl_flash_attention_qkv(TlTensor qkv, int64_t heads, int64_t groups, TlTensor cos, TlTensor sin,
                           TlTensor doc_start, TlTensor doc_end, double scale, int causal, int deterministic, int arch,
                           TlTensor* out);

// ---- matrix products (csrc/torch_cuda/matmul.cpp, linear.cpp) ----------------------------------------------------

// How products of 16-bit matrices in the ops below are computed: 0 by libtorch, 1 by cuBLASLt with its first choice,
// 2 by cuBLASLt with the fastest of its candidates, found at first use and kept in `file` (null: only in the process).
int tl_set_matmul(int mode, const char* file);
// x (.., C), weight (O, C) -> (.., O), differentiable, without bias. Here and in the ops below, where weight.grad is fp32
// and the weight is not, its gradient is added there. fp8: null, or the layer's four tensors (csrc/torch_cuda/fp8.h): e4m3
// weight (O, C), the same transposed (C, O), scales (2, 8) and weight scale (8,) fp32.
int tl_linear(TlTensor x, TlTensor weight, TlTensor* fp8, TlTensor* out);
// linear(rms_norm(x + residual)); *sum = x + residual, where there is a residual. The norm is computed again backward.
int tl_norm_linear(TlTensor x, TlTensor residual, TlTensor norm, double eps, TlTensor weight, TlTensor* fp8,
                   TlTensor* out, TlTensor* sum);
// swiglu_mlp(rms_norm(x + residual)), likewise.
int tl_norm_mlp(TlTensor x, TlTensor residual, TlTensor norm, double eps, TlTensor fc_1, TlTensor fc_2, TlTensor proj,
                TlTensor* fp8_gate_up, TlTensor* fp8_down, TlTensor* out, TlTensor* sum);
// Casts a weight (or two that lie behind each other) of an fp8 layer anew, by its weight scale.
int tl_fp8_cast_weight(TlTensor weight, TlTensor second, TlTensor* layer);
// Scales (.., 8) from the largest magnitudes cast since the last update.
int tl_fp8_update(TlTensor scales);
// weight.grad = grad, also of another dtype; a null grad takes it away.
int tl_set_grad(TlTensor weight, TlTensor grad);
// Watches which of these gradients matrix products write from now on. Where they are `old`, so is what they hold: the
// first product of each overwrites it.
int tl_gradients_watch(int n, TlTensor* grads, int old);
// written[i]: whether a product has written grads[i] since. They are watched no longer.
int tl_gradients_written(int n, TlTensor* grads, int* written);

// ---- element-wise ops, differentiable: fp32, bf16 or fp16, contiguous, on one CUDA device ------------------

// *y = rms_norm(x) * weight over the last dimension; with a residual (not null) of *sum = x + residual.
int tl_rms_norm(TlTensor x, TlTensor residual, TlTensor weight, double eps, TlTensor* y, TlTensor* sum);
// Rotates the first `heads` heads of x (B, T, heads' D) in place by cos, sin (T, n) fp32; *out is x.
int tl_rope(TlTensor x, TlTensor cos, TlTensor sin, int64_t heads, int64_t head_size, TlTensor* out);
// gate_up (.., 2F) -> silu(gate) * up (.., F).
int tl_swiglu(TlTensor gate_up, TlTensor* out);
// x (.., C), fc_1 and fc_2 (F, C), proj (C', F) -> (.., C').
int tl_swiglu_mlp(TlTensor x, TlTensor fc_1, TlTensor fc_2, TlTensor proj, TlTensor* out);
// scale * sum over rows with target != -100 of the cross-entropy, () fp32. logits (N, V) become their gradient and
// must not be used again; target (N,) int64. backward once.
int tl_cross_entropy(TlTensor logits, TlTensor target, double scale, double label_smoothing, double z_loss,
                     TlTensor* loss);
// The same of the logits x weight^T, x (N, C), weight (V, C), a chunk of rows at a time.
int tl_head_loss(TlTensor x, TlTensor weight, TlTensor target, int64_t chunks, double scale, double label_smoothing,
                 double z_loss, TlTensor* loss);

// ---- NF4 weights (csrc/torch_cuda/nf4.cpp -> csrc/nf4.cu) ---------------------------------------------------------

// A frozen weight of n = rows * columns values, as src/quant/nf4.rs says; all on one CUDA device.
typedef struct {
  TlTensor codes;                          // (ceil(n/2),) uint8
  TlTensor absmax;                         // (ceil(n/64),) fp32, or uint8 where the next three are not null
  TlTensor nested_map;                     // (256,) fp32
  TlTensor nested_absmax, nested_offset;   // (ceil(n/64/256),) fp32 and () fp32
  int64_t rows, columns;
} TlNf4;
enum { TL_FP32 = 0, TL_BF16 = 1, TL_FP16 = 2 };
// *out (rows, columns) of that type.
int tl_nf4_dequantize(const TlNf4* weight, int type, TlTensor* out);
// x (.., columns) fp32, bf16 or fp16 -> x W^T (.., rows), differentiable in x. W is made anew in each pass.
int tl_nf4_linear(TlTensor x, const TlNf4* weight, TlTensor* out);

// ---- decoding (csrc/torch_cuda/decode.cpp -> csrc/decode) ---------------------------------------------------------
// One new token for each of B sequences, in bf16. Tensors lie on one CUDA device; nothing waits, so that a graph can hold
// it all.

// A weight (N, K): bf16, or bytes of codes and scales as csrc/decode/weights.cuh says.
typedef struct {
  TlTensor data;
  int format;  // 0: bf16, 1: int8, 2: int4
  int group;   // columns that share a scale
  int64_t rows, columns;
} TlWeight;
// *out (N, K) bf16.
int tl_dequantize(const TlWeight* weight, TlTensor* out);

// A layer's keys and values, (slots, G, D) in blocks of block_size slots: bf16, or int8 with scales (slots, G).
typedef struct {
  TlTensor k, v, k_scale, v_scale;
} TlPagedLayer;
// Where the new tokens are.
typedef struct {
  TlTensor table;      // (B, blocks) int32
  TlTensor positions;  // (B,) int32; below 0: nothing is done
  TlTensor cos, sin;   // (positions, n) fp32
  TlTensor arrived;    // (B * G * ceil(H/G/8),) int32 zeros
  int block_size;
  int longest;  // no sequence is longer
} TlDecodeState;
// Turns queries and keys of qkv (B, (H+2G) D), appends keys and values to the cache, attends: *out (B, H D).
int tl_decode_attention(const TlDecodeState* state, const TlPagedLayer* layer, TlTensor qkv, TlTensor* out);

typedef struct {
  TlTensor norm_1, norm_2;                // (C,)
  TlWeight qkv, proj, gate_up, mlp_proj;  // ((H+2G) D, C), (C, H D), (2F, C), (C, F)
  TlPagedLayer cache;
} TlDecodeLayer;
typedef struct {
  int n_layer, heads;
  const TlDecodeLayer* layers;
  TlTensor norm;  // (C,)
  TlWeight head;  // (V, C)
  TlDecodeState state;
  double eps;
} TlDecoder;
// All layers and the head for at most 8 sequences. The decoder keeps the tensors.
int tl_decoder_new(const TlDecoder* decoder, void** out);
// x (B, C), the embeddings, is overwritten; logits (B, V) fp32.
int tl_decoder_run(void* decoder, TlTensor x, TlTensor logits, int rows);
void tl_decoder_free(void* decoder);

// The next id of each sequence, as src/generate/sampler.rs chooses it, and its embedding.
typedef struct {
  int rows, vocab;
  TlTensor logits;                                         // (B, V) fp32 or bf16
  TlTensor temperature, top_k, top_p, repetition_penalty;  // (B,) fp32, top_k int32
  TlTensor seen;                                           // (B, ceil(vocab/32)) int32 bits
  TlTensor key;                                            // (B, 8) int32, ChaCha8's
  TlTensor count, positions;                               // (B,) int32, incremented
  TlTensor next, log_prob, not_finite;                     // (B,) int32, fp32, int32
  TlTensor ids;                                            // (B, n) int32 ring of the last ids
  TlTensor embedding, x;                                   // (V, C), (B, C)
} TlSample;
int tl_sample(const TlSample* sample);

// ---- optimizer (csrc/torch_cuda/optim.cpp -> csrc/adamw.cu) -----------------------------------------------------

// One parameter of an AdamW step: contiguous tensors of n elements on one CUDA device. The dtypes say how master and
// moments are kept, the same for all parameters of a call.
typedef struct {
  TlTensor param;       // exact weight, fp32; or the 16 bits that `weight` lacks, int16; or null: `weight` alone
  TlTensor grad;        // fp32
  TlTensor exp_avg;     // fp32, bf16, or int8 codes
  TlTensor exp_avg_sq;  // fp32, bf16, or uint8 codes
  TlTensor exp_avg_scale, exp_avg_sq_scale;  // (ceil(n / 256),) fp32 where there are codes, else null
  TlTensor weight;      // what the model computes with, bf16; null only beside an fp32 param
  uint64_t key;         // of the random bits of this tensor in this step
  int clear_grad;       // leave zeros in grad
} TlAdamWTensors;
// One AdamW update in place:
//   g' = g * clip;  m = b1 m + (1-b1) g';  v = b2 v + (1-b2) g'^2
//   p -= lr*wd*p + lr * (m / (1-b1^s)) / (sqrt(v / (1-b2^s)) + eps)
// where clip is a 0-dim fp32 tensor on the device. weight receives p rounded to bf16. Where clip is not finite, nothing
// is written. The CPU does not wait.
int tl_adamw(int n, const TlAdamWTensors* tensors, TlTensor clip, double lr, double beta1, double beta2, double eps,
             double weight_decay, int64_t step);
// *norm = L2 norm over all gradients (fp32, bf16 or fp16), *clip = min(1, max_norm / (norm + 1e-6)), not finite
// where the norm is not; both () fp32 on the device. watch, null or (n + 1,) int32 of zeros at first, keeps what the
// first norm that is not finite was due to: 1 for each such gradient, and 1 in the last place, with which clip is nan
// from then on. The CPU does not wait.
int tl_grad_norm(int n, TlTensor* grad, double max_norm, TlTensor watch, TlTensor* norm, TlTensor* clip);

#ifdef __cplusplus
}
#endif
