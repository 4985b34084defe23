// MoE router: p = sigmoid(logits), select the top_k of p + bias, weight = p / sum of the selected p * scale.
//
// Tile: one warp owns one token, and lane l keeps experts l, l + 32, l + 64, ... in registers:
//
//            lane 0   lane 1  ...  lane 31
//   key[0]  expert 0        1          31     <- one coalesced 128-byte load a row of this picture
//   key[1]        32       33          63
//   ...                                       kItems rows; 9 hold Step's 288 experts exactly
//
// Bytes: 4 * experts read and 8 * top_k written a token; the bias stays in L1.
// Waiting: lanes meet in the warp reductions; no shared memory, no block barrier, no token waits on another.
#include "common/moe_topk.cuh"

constexpr int kWarpsPerBlock = 4;  // the launcher's TOKENS_PER_BLOCK

template <int kItems>
__device__ void moe_topk(const float* logits,  // [tokens, experts], rows row_stride apart
                         const float* bias,    // [experts]
                         float* weights,       // [tokens, top_k]
                         int* ids,             // [tokens, top_k], top_k <= 32
                         long long row_stride, int tokens, int experts, int top_k, float scale) {
  const int lane = threadIdx.x % kWarpSize;
  const int token = blockIdx.x * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (token >= tokens) return;
  logits += token * row_stride;

  float logit[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {  // all loads in flight before the first use
    const int expert = i * kWarpSize + lane;
    logit[i] = expert < experts ? logits[expert] : 0.0f;
  }
  unsigned key[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = i * kWarpSize + lane;
    key[i] = expert < experts ? sort_key(sigmoid(logit[i]) + bias[expert]) : kStruckOut;
  }

  const int chosen = choose(key, top_k);
  const float score = lane < top_k ? sigmoid(logits[chosen]) : 0.0f;
  const long long row = static_cast<long long>(token) * top_k;
  store_choices(score, chosen, top_k, scale, weights + row, ids + row);
}

#define VARIANT(max_experts)                                                                                   \
  extern "C" __global__ void __launch_bounds__(kWarpsPerBlock* kWarpSize) smxx_moe_topk_e##max_experts(        \
      const float* logits, const float* bias, float* weights, int* ids, long long row_stride, int tokens,      \
      int experts, int top_k, float scale) {                                                                   \
    moe_topk<max_experts / kWarpSize>(logits, bias, weights, ids, row_stride, tokens, experts, top_k, scale); \
  }

VARIANT(128)
VARIANT(256)
VARIANT(288)
VARIANT(512)
