// out = x W^T, or SwiGLU of its halves, for a bf16 weight [n, k] as checkpoints store it and up to 64 bf16 rows of x,
// at the speed of the memory.
//
// Bytes: 2 a weight, once. x comes from L2 with the weights: 1/8 of their bytes for up to 16 tokens, 1/2 for 64.
// The tensor cores read both from shared memory, so no instruction touches a weight: they are busy a fifth of the time.
#include "common/linear_sm90.cuh"

template <int kTokens_, int kStages_, bool kPaired_>
struct Tile {
  static constexpr int kTokens = kTokens_, kColumns = kTokens;
  static constexpr int kGroups = kTokens == 8 ? 1 : 2;  // warpgroups of 64 rows that share the tokens
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kBoxes = 2 / kGroups;  // of a unit, 64 k each
  static constexpr int kMath = kGroups * kWarpgroup, kConverters = 0;
  static constexpr int kFetcher = kMath, kFetcherX = kMath + 32, kThreads = kMath + 64;
  static constexpr bool kScaled = false, kPaired = kPaired_;
  static constexpr int kWeightBox = kRows * 128, kBox = kTokens * 128;
  static constexpr int kX = kBoxes * kWeightBox, kXBytes = kBoxes * kBox, kUnitBytes = kX + kXBytes;
  static constexpr int kStages = kStages_, kInFlight = 6;
  static constexpr int kAtOnce = kTokens <= 16 ? 4 : kTokens == 32 ? 2 : 1;
  static constexpr int kBytes = 1024 + kStages * (kUnitBytes + 24);
  static_assert(kBytes <= 227 * 1024);

  static __device__ void copy_weights(const Maps& maps, u32 stage, int row, int unit, u32 barrier) {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i)
      copy_weight_box<Tile>(stage + i * kWeightBox, &maps.weight, (unit * kBoxes + i) * 64, row, barrier);
  }
  static __device__ void copy_x(const Maps& maps, const Problem&, u32 stage, int unit, u32 barrier) {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i)
      copy_box(stage + kX + i * kBox, &maps.x, (unit * kBoxes + i) * 64, 0, barrier);
  }
};

// d += 64 rows x 16 k of weights times 16 k x kTokens of x.
#define WGMMA(tokens, list, a, b, ...)                                                                   \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32.bf16.bf16 {" list "}, %" #a ", %" #b \
               ", 1, 1, 1, 0, 0;" : __VA_ARGS__ : "l"(weights), "l"(x))
template <int kTokens>
__device__ inline void multiply(float (&d)[kTokens / 2], u64 weights, u64 x) {
  if constexpr (kTokens == 8) WGMMA(8, "%0,%1,%2,%3", 4, 5, R4(0));
  else if constexpr (kTokens == 16) WGMMA(16, D8, 8, 9, R4(0), R4(4));
  else if constexpr (kTokens == 32) WGMMA(32, D16, 16, 17, R16(0));
  else WGMMA(64, D32, 32, 33, R16(0), R16(16));
}

template <class T>
__device__ inline void linear(const Maps& maps, const Problem& problem, u8* s_all) {
  const Line line = Line::of<T>(problem);
  const Ring<T> ring(s_all);
  if (threadIdx.x == T::kFetcher) make_barriers<T>(maps, ring);
  __syncthreads();
  if (threadIdx.x == T::kFetcher) {
    fetch_weights<T>(maps, ring, line);
    return;
  }
  wait_for_previous_kernel();  // every thread: parts are read and written by all
  if (threadIdx.x >= T::kMath) {
    if (threadIdx.x == T::kFetcherX) fetch_x<T>(maps, problem, ring, line);
    return;
  }

  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  int stage = 0;
  u32 parity = 0;
  for (int at = line.begin; at < line.end;) {
    const int row = at / line.units, stop = min(line.end, (row + 1) * line.units);
    float d[T::kTokens / 2];
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) d[i] = 0.0f;
    int before = -1;  // the stage whose products may still be in flight
    for (; at < stop; ++at) {
      wait_for_copies(ring.filled + 8 * stage, parity);
      wait_for_copies(ring.has_x + 8 * stage, parity);
      // The shuffle tells ptxas that a warp's is one: descriptors stay in uniform registers, half the instructions.
      const u32 from = __shfl_sync(0xFFFFFFFFu, ring.stages + stage * T::kUnitBytes, 0);
      const u64 weights = tile_descriptor(from + group * 64 * 128);
      const u64 x = tile_descriptor(from + T::kX);
      begin_products();
#pragma unroll
      for (int i = 0; i < T::kBoxes; ++i)
#pragma unroll
        for (int k = 0; k < 4; ++k)
          multiply<T::kTokens>(d, weights + (i * T::kWeightBox + k * 32 >> 4), x + (i * T::kBox + k * 32 >> 4));
      commit_products();
      wait_for_products<1>();
      if (before >= 0 && threadIdx.x % 32 == 0) arrive(ring.used + 8 * before);
      before = stage;
      if (++stage == T::kStages) stage = 0, parity ^= 1;
    }
    wait_for_products<0>();
    settle(d);
    if (threadIdx.x % 32 == 0) arrive(ring.used + 8 * before);
    finish<T>(d, problem, line, row, Scales{1.0f, 1.0f});
  }
}

#define KERNEL(name, tokens, stages, paired)                                                                      \
  extern "C" __global__ void __launch_bounds__((Tile<tokens, stages, paired>::kThreads), 1)                       \
      name##_t##tokens##_##stages(void* out, float4* partial, int m, int n, int units, int wide, float limit,     \
                                  const __grid_constant__ Maps maps) {                                            \
    extern __shared__ u8 s_all[];                                                                                 \
    const Problem problem{m, n, units, wide != 0, limit, out, partial, nullptr, nullptr};                         \
    linear<Tile<tokens, stages, paired>>(maps, problem, s_all);                                                   \
  }
#define VARIANT(tokens, stages)                     \
  KERNEL(sm90_linear, tokens, stages, false)        \
  KERNEL(sm90_linear_swiglu, tokens, stages, true)

VARIANT(8, 6)  // half of the shared memory: a kernel beside has the other
VARIANT(8, 12)
VARIANT(16, 12)
KERNEL(sm90_linear, 32, 10, false)  // with SwiGLU cuBLAS and a kernel behind it are the faster from 17 tokens on
KERNEL(sm90_linear, 64, 9, false)
