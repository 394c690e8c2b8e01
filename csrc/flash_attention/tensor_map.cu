// Encodes TMA tensor maps. The encoder lives in the driver, looked up once, so that nothing links libcuda.
#include "hopper.cuh"

namespace flash {

namespace {
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode encoder() {
  static const Encode found = [] {
    void* f = nullptr;
    cudaDriverEntryPointQueryResult status;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &status) !=
            cudaSuccess ||
        status != cudaDriverEntryPointSuccess) {
      f = nullptr;
    }
    return reinterpret_cast<Encode>(f);
  }();
  return found;
}
}  // namespace

cudaError_t make_tensor_map(CUtensorMap* map, const View& view, int batch, int rows_total, int heads, int head_size,
                            bool fp16, int rows) {
  if (!encoder()) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {(cuuint64_t)head_size, (cuuint64_t)rows_total, (cuuint64_t)heads, (cuuint64_t)batch};
  // Strides in bytes of the three outer dimensions. One of length 1 may carry any stride: give it a valid one.
  const cuuint64_t row = 2 * view.row;
  const cuuint64_t strides[3] = {rows_total > 1 ? row : 16, heads > 1 ? (cuuint64_t)(2 * view.head) : 16,
                                 batch > 1 ? (cuuint64_t)(2 * view.batch) : 16};
  const cuuint32_t box[4] = {64, (cuuint32_t)rows, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const auto type = fp16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult code = encoder()(map, type, 4, view.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                  CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t make_row_map(CUtensorMap* map, float* data, int batch, int heads, int64_t t_pad, int columns) {
  if (!encoder()) return cudaErrorNotSupported;
  const cuuint64_t sizes[4] = {(cuuint64_t)t_pad, (cuuint64_t)heads, (cuuint64_t)batch, 1};
  const cuuint64_t row = 4 * t_pad, strides[3] = {row, row * heads, row * heads * batch};
  const cuuint32_t box[4] = {(cuuint32_t)columns, 1, 1, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  const CUresult code = encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, data, sizes, strides, box, steps,
                                  CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                                  CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return code == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace flash
