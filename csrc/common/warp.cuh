// What the 32 lanes of a warp work out together; every lane must call and every lane gets the result.
#pragma once

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Butterfly: the order of the additions is fixed, so the same values give the same bits on every run.
__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}
