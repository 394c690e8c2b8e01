// Host-side entry of adamw.cu; free of CUDA and torch headers.
#pragma once
#include <stdint.h>

struct AdamWConfig {
  float lr, beta1, beta2, eps;
  float decay;           // 1 - lr * weight_decay
  float step_size;       // lr / (1 - beta1^step)
  float inv_sqrt_bias2;  // 1 / sqrt(1 - beta2^step)
};

#ifdef TL_WITH_CUDA
#include <cuda_runtime_api.h>
cudaError_t adamw_launch(float* param, const float* grad, float* exp_avg, float* exp_avg_sq, void* weight_bf16,
                         const float* clip, int64_t n, AdamWConfig c, cudaStream_t stream);
#endif
