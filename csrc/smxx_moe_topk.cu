// MoE router: p = sigmoid(logits), select the top_k of p + bias, weight = p / sum of the selected p * scale.
//
// Tile: one warp owns one token, and lane l keeps experts l, l + 32, l + 64, ... in registers:
//
//            lane 0   lane 1  ...  lane 31
//   key[0]  expert 0        1          31     <- one coalesced 128-byte load a row of this picture
//   key[1]        32       33          63
//   ...                                       kItems rows; 9 hold Step's 288 experts exactly
//
// Each of top_k rounds takes the maximum over a lane's keys, then over the warp, and strikes the winner out.
// Bytes: 4 * experts read and 8 * top_k written a token; the bias stays in L1.
// Waiting: lanes meet in the warp reductions; no shared memory, no block barrier, no token waits on another.
#include "common/warp.cuh"

constexpr int kWarpsPerBlock = 4;  // the launcher's TOKENS_PER_BLOCK
constexpr unsigned kStruckOut = 0;  // below the key of every float, -inf included

// expf and IEEE division, as torch computes it: equal bits are what make the ids equal.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Unsigned integers in the order of the floats; NaN ranks with -inf, so the lower id decides between those two.
__device__ inline unsigned sort_key(float x) {
  unsigned bits = __float_as_uint(isnan(x) ? __uint_as_float(0xff800000u) : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

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

  int selected = 0;  // lane j keeps the winner of round j
#pragma unroll 1
  for (int round = 0; round < top_k; ++round) {
    unsigned best = key[0];
    int item = 0;
#pragma unroll
    for (int i = 1; i < kItems; ++i) {
      if (key[i] > best) {  // strict: among equals the lower id stays
        best = key[i];
        item = i;
      }
    }
    const unsigned top = __reduce_max_sync(kAllLanes, best);
    const int expert = item * kWarpSize + lane;
    const int winner = __reduce_min_sync(kAllLanes, best == top ? expert : 0x7fffffff);
    if (lane == round) selected = winner;
    if (expert == winner) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {  // compile-time indices keep key[] in registers
        if (i == item) key[i] = kStruckOut;
      }
    }
  }

  const float score = lane < top_k ? sigmoid(logits[selected]) : 0.0f;
  const float sum = warp_sum(score) + 1e-20f;
  if (lane < top_k) {
    const long long at = static_cast<long long>(token) * top_k + lane;
    weights[at] = score / sum * scale;
    ids[at] = selected;
  }
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
