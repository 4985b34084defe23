// What the router's kernels share: scores as torch computes them, their order, and a warp's choice of the best.
#pragma once
#include "common/warp.cuh"

constexpr unsigned kStruckOut = 0;  // below the key of every float, -inf included

// expf and IEEE division, as torch computes it: equal bits are what make the ids equal.
__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Unsigned integers in the order of the floats; NaN ranks with -inf, so the lower id decides between those two.
__device__ inline unsigned sort_key(float x) {
  unsigned bits = __float_as_uint(isnan(x) ? __uint_as_float(0xff800000u) : x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Lane l's key[i] is that of expert 32 i + l. Lane j gets the expert with the j-th largest key, among equals the lower.
//
// Each of top_k rounds takes the maximum over a lane's keys, then over the warp, and strikes the winner out.
template <int kItems>
__device__ inline int choose(unsigned (&key)[kItems], int top_k) {
  const int lane = threadIdx.x % kWarpSize;
  int chosen = 0;
#pragma unroll 1
  for (int round = 0; round < top_k; ++round) {
    unsigned best = key[0];
#pragma unroll
    for (int i = 1; i < kItems; ++i) best = max(best, key[i]);
    best = __reduce_max_sync(kAllLanes, best);
    int expert = 0x7fffffff;
#pragma unroll
    for (int i = kItems - 1; i >= 0; --i) {  // downwards: the lower id stays
      if (key[i] == best) expert = i * kWarpSize + lane;
    }
    expert = __reduce_min_sync(kAllLanes, expert);
    if (lane == round) chosen = expert;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (i * kWarpSize + lane == expert) key[i] = kStruckOut;
    }
  }
  return chosen;
}

// A token's row of weights and ids: lane j has the j-th choice and its score, the sigmoid without bias.
__device__ inline void store_choices(float score, int expert, int top_k, float scale, float* weights, int* ids) {
  const int lane = threadIdx.x % kWarpSize;
  const float sum = warp_sum(lane < top_k ? score : 0.0f) + 1e-20f;
  if (lane < top_k) {
    weights[lane] = score / sum * scale;
    ids[lane] = expert;
  }
}
