// out = scale * (x W^T), or SwiGLU of its halves, for e4m3 weights [n, k] with an f32 scale a row and up to 64 bf16
// rows of x.
//
// Bytes: 1 a weight, once, and x's bf16 from L2 with them: 1/8 of their bytes for 4 tokens, 1/4 for 16, 2/3 for 64.
// The tensor cores read codes and x from shared memory. x is split first, by a warpgroup of its own or, from 9 tokens
// on, by a kernel ahead: x = 2^e (hi + lo), hi in e4m3, lo in e5m2, e of the largest of a unit's k. bf16 has 8
// significant bits, hi takes 4 and lo the rest: exact down to 2^-13 of that largest, with an error of at most 2^-21 of
// it below. A hi + A lo stay in the tensor core, whose sums keep some 13 bits, for 128 k; then they go, times 2^e, to
// f32: an error of 3.5e-4 by a model. With up to four tokens hi and 16 lo, in e4m3, are columns of one product.
#include "common/linear_sm90.cuh"

template <int kTokens_, bool kPaired_>
struct Tile {
  static constexpr int kTokens = kTokens_;
  static constexpr bool kJoined = kTokens == 4;  // columns: hi of four tokens, then lo
  static constexpr int kColumns = kJoined ? 8 : kTokens;
  static constexpr int kGroups = kTokens <= 8 ? 1 : kTokens == 64 ? 3 : 2;  // warpgroups of 64 rows
  static constexpr int kRows = 64 * kGroups;
  static constexpr int kBoxes = kGroups == 1 ? 2 : 1;  // of a unit, 128 k each
  static constexpr int kUnitK = 128 * kBoxes;
  static constexpr int kMath = kGroups * kWarpgroup, kConverters = kTokens <= 8 ? kWarpgroup : 0;
  static constexpr int kFetcher = kMath + kConverters, kFetcherX = kFetcher + 32, kThreads = kFetcher + 64;
  static constexpr bool kScaled = true, kPaired = kPaired_;
  static constexpr int kWeightBox = kRows * 128, kHalf = kTokens * 128;  // bytes of 128 k; kHalf: hi, and as many lo
  static constexpr int kX = kBoxes * kWeightBox;                         // where x begins in a stage
  static constexpr int kFactors = kX + kBoxes * 2 * kHalf;               // as bf16 x takes no less
  static constexpr int kXBytes = kFactors - kX + (kConverters ? 0 : 4 * kTokens), kUnitBytes = kFactors + 1024;
  static constexpr int kStages = kTokens <= 16 ? 10 : kTokens == 32 ? 8 : 5, kInFlight = kTokens == 64 ? 5 : 6;
  static constexpr int kAtOnce = kTokens <= 32 ? 4 : 2;
  static constexpr int kBytes = 1024 + kStages * (kUnitBytes + 32);
  static_assert(kBytes <= 227 * 1024);

  static __device__ void copy_weights(const Maps& maps, u32 stage, int row, int unit, u32 barrier) {
#pragma unroll
    for (int i = 0; i < kBoxes; ++i)
      copy_weight_box<Tile>(stage + i * kWeightBox, &maps.weight, (unit * kBoxes + i) * 128, row, barrier);
  }
  static __device__ void copy_x(const Maps& maps, const Problem& problem, u32 stage, int unit, u32 barrier) {
    copy_box(stage + kX, &maps.x, unit * kUnitK, 0, barrier);  // bf16 [kTokens, kUnitK], not swizzled, or hi
    if (kConverters) return;
    copy_box(stage + kX + kHalf, &maps.x, unit * kUnitK, kTokens, barrier);
    copy_bulk(stage + kFactors, reinterpret_cast<const u8*>(problem.factor + unit * kTokens), 4 * kTokens, barrier);
  }
};

__device__ inline void store_shared_2(u32 to, u32 a, u32 b) {
  asm volatile("st.shared.v2.u32 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}
__device__ inline void store_factor(u32 to, float factor) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(to), "f"(factor) : "memory");
}
__device__ inline float2 load_factors(u32 from) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(from) : "memory");
  return v;
}

// Eight neighbours of a token as hi and lo; e is the largest bf16 exponent of its unit.
struct Halves {
  u32 hi[2], lo[2];
};
template <bool kJoined>
__device__ inline Halves split(const uint4& x, int e) {
  const u32 words[4] = {x.x, x.y, x.z, x.w};
  const float up = __uint_as_float((261 - e) << 23);  // 2^(134 - e): the largest value lands in [2^7, 2^8)
  Halves halves{{0, 0}, {0, 0}};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float u = __uint_as_float(words[i] << 16) * up, v = __uint_as_float(words[i] & 0xFFFF0000u) * up;
    const u32 pair = pair_e4m3(u, v);
    float u_hi, v_hi;
    from_pair_e4m3(pair, u_hi, v_hi);
    halves.hi[i / 2] |= pair << (i % 2 * 16);
    const u32 rest = kJoined ? pair_e4m3(16.0f * (u - u_hi), 16.0f * (v - v_hi)) : pair_e5m2(u - u_hi, v - v_hi);
    halves.lo[i / 2] |= rest << (i % 2 * 16);
  }
  if (e == 255) halves.hi[0] = halves.hi[1] = 0x7F7F7F7Fu;  // infinity or NaN somewhere: the token's result is NaN
  return halves;
}

__device__ inline u32 largest_of(const uint4& x) {
  u32 largest = 0;
#pragma unroll
  for (const u32 word : {x.x, x.y, x.z, x.w}) largest = max(largest, max(word & 0x7FFFu, word >> 16 & 0x7FFFu));
  return largest;
}

// x [m, k], rows `stride` apart, to codes [2, tokens, k], hi and then lo, and factors [(k + 127) / 128, tokens]. Half a
// warp takes 128 k of a token. What is of no token stays as it was: it is a column of its own, which nobody reads.
extern "C" __global__ void __launch_bounds__(kWarpgroup)
    sm90_fp8_linear_split(const u16* x, i64 stride, u8* codes, float* factors, int m, int k, int tokens) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int units = (k + 127) / 128, part = blockIdx.x * (kWarpgroup / 16) + threadIdx.x / 16;
  const int token = part / units, unit = part - token * units, column = unit * 128 + threadIdx.x % 16 * 8;
  const bool inside = token < m && column < k;
  // From L2: with programmatic launch L1 could hold what was there before the kernel that wrote x.
  const uint4 v = inside ? __ldcg(reinterpret_cast<const uint4*>(x + token * stride + column)) : make_uint4(0, 0, 0, 0);
  u32 largest = largest_of(v);
#pragma unroll
  for (int step = 8; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
  if (!inside) return;
  const int e = max(static_cast<int>(largest >> 7), 8);
  const Halves halves = split<false>(v, e);
  const i64 at = static_cast<i64>(token) * k + column;
  *reinterpret_cast<uint2*>(codes + at) = make_uint2(halves.hi[0], halves.hi[1]);
  *reinterpret_cast<uint2*>(codes + static_cast<i64>(tokens) * k + at) = make_uint2(halves.lo[0], halves.lo[1]);
  if (threadIdx.x % 16 == 0) factors[unit * tokens + token] = __uint_as_float((e - 7) << 23);
}

// The converters' work: x of each stage from bf16 [kTokens, kUnitK] to [kBoxes] x {hi, lo} of [kTokens, 128], swizzled,
// in the same place, and a factor 2^e a token.
template <class T>
__device__ inline void convert_all(const Ring<T>& ring, int units, int m) {
  constexpr int kLanes = T::kUnitK / 8, kTogether = 32 / kLanes;  // of a token; tokens of a warp at a time
  constexpr int kWarps = T::kConverters / 32, kPasses = T::kTokens / (kTogether * kWarps);
  const int warp = threadIdx.x % T::kConverters / 32, lane = threadIdx.x % 32, eighth = lane % kLanes;
  const int token0 = warp * kTogether + lane / kLanes;
  const u32 to0 = eighth / 16 * 2 * T::kHalf + eighth % 16 / 2 * 16, to8 = eighth % 2 * 8;
  int stage = 0;
  u32 parity = 0;
  for (int i = 0; i < units; ++i) {
    wait_for_copies(ring.has_x + 8 * stage, parity);
    const u32 x = ring.stages + stage * T::kUnitBytes + T::kX;
    uint4 raw[kPasses];
#pragma unroll
    for (int p = 0; p < kPasses; ++p)
      raw[p] = load_shared_4<0>(x + (token0 + p * kWarps * kTogether) * T::kUnitK * 2 + eighth * 16);
    meet_group(0);  // all have read
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const int token = token0 + p * kWarps * kTogether;
      if (p * kWarps * kTogether + (warp * kTogether & ~1) >= m) continue;  // the same for the warp, in pairs
      u32 largest = largest_of(raw[p]);
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2)
        largest = max(largest, __shfl_xor_sync(0xFFFFFFFFu, largest, step));
      const int e = max(static_cast<int>(largest >> 7), 8);
      const Halves halves = split<T::kJoined>(raw[p], e);
      const u32 hi = x + token * 128 + (to0 ^ (token & 7) << 4) + to8;
      const u32 lo = T::kJoined ? (hi ^ 4 << 4) + T::kHalf : hi + T::kHalf;  // joined, the row of lo is token + 4
      store_shared_2(hi, halves.hi[0], halves.hi[1]);
      store_shared_2(lo, halves.lo[0], halves.lo[1]);
      if (eighth == 0) store_factor(x + T::kFactors - T::kX + token * 4, __uint_as_float((e - 7) << 23));
    }
    show_to_engines();
    __syncwarp();
    if (lane == 0) arrive(ring.ready + 8 * stage);
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
}

// d = or += 64 rows x 32 k of weights times 32 k x kColumns of hi or lo.
#define WGMMA(tokens, type, add, list, a, b, ...)                                                            \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " #add ", 0; wgmma.mma_async.sync.aligned.m64n" #tokens       \
               "k32.f32.e4m3." type " {" list "}, %" #a ", %" #b ", p, 1, 1; }" : __VA_ARGS__ : "l"(weights), "l"(x))
#define FOR_COLUMNS(type, add)                                                              \
  if constexpr (kColumns == 8) WGMMA(8, type, add, "%0,%1,%2,%3", 4, 5, R4(0));              \
  else if constexpr (kColumns == 16) WGMMA(16, type, add, D8, 8, 9, R4(0), R4(4));           \
  else if constexpr (kColumns == 32) WGMMA(32, type, add, D16, 16, 17, R16(0));              \
  else WGMMA(64, type, add, D32, 32, 33, R16(0), R16(16))
template <int kColumns, bool kFirst>
__device__ inline void multiply_hi(float (&d)[kColumns / 2], u64 weights, u64 x) {
  if constexpr (kFirst) {
    FOR_COLUMNS("e4m3", 0);
  } else {
    FOR_COLUMNS("e4m3", 1);
  }
}
template <int kColumns>
__device__ inline void multiply_lo(float (&d)[kColumns / 2], u64 weights, u64 x) {
  FOR_COLUMNS("e5m2", 1);
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
    if constexpr (T::kConverters > 0)
      if (threadIdx.x < T::kFetcher) convert_all<T>(ring, line.end - line.begin, problem.m);
    if (threadIdx.x == T::kFetcherX) fetch_x<T>(maps, problem, ring, line);
    return;
  }

  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  const u32 none = static_cast<u32>(line.units) >> 31;  // 0, but ptxas does not know
  int stage = 0;
  u32 parity = 0;
  for (int at = line.begin; at < line.end;) {
    const int row = at / line.units, stop = min(line.end, (row + 1) * line.units);
    const Scales scales = scales_of<T>(problem, row);
    float total[T::kColumns / 2];
#pragma unroll
    for (int i = 0; i < T::kColumns / 2; ++i) total[i] = 0.0f;
    for (; at < stop; ++at) {
      wait_for_copies(ring.filled + 8 * stage, parity);
      wait_for_copies((T::kConverters ? ring.ready : ring.has_x) + 8 * stage, parity);
      // The shuffle tells ptxas that a warp's is one: descriptors stay in uniform registers, half the instructions.
      const u32 from = __shfl_sync(0xFFFFFFFFu, ring.stages + stage * T::kUnitBytes, 0);
      const u64 weights = tile_descriptor(from + group * 64 * 128), x = tile_descriptor(from + T::kX);
      float d[T::kBoxes][T::kColumns / 2];
      begin_products();
#pragma unroll
      for (int i = 0; i < T::kBoxes; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const u64 a = weights + (i * T::kWeightBox + k * 32 >> 4), b = x + (i * 2 * T::kHalf + k * 32 >> 4);
          if (k == 0) multiply_hi<T::kColumns, true>(d[i], a, b);
          else multiply_hi<T::kColumns, false>(d[i], a, b);
          if (!T::kJoined) multiply_lo<T::kColumns>(d[i], a, b + (T::kHalf >> 4));
        }
        commit_products();
      }
      const u32 factors = from + T::kFactors + threadIdx.x % 4 * 2 % T::kTokens * 4;
      u32 loaded = 0;
#pragma unroll
      for (int i = 0; i < T::kBoxes; ++i) {
        if (i == T::kBoxes - 1) wait_for_products<0>();
        else wait_for_products<1>();
        settle(d[i]);
#pragma unroll
        for (int j = 0; j < T::kColumns / 2; j += 4) {
          const float2 factor = load_factors(factors + j * 8);
          loaded |= __float_as_uint(factor.x);
          total[j] = fmaf(d[i][j], factor.x, total[j]);
          total[j + 1] = fmaf(d[i][j + 1], factor.y, total[j + 1]);
          total[j + 2] = fmaf(d[i][j + 2], factor.x, total[j + 2]);
          total[j + 3] = fmaf(d[i][j + 3], factor.y, total[j + 3]);
        }
      }
      __syncwarp();
      // Not before the factors are in registers: the copy engine, which puts others there, does not queue behind loads.
      if (threadIdx.x % 32 == 0) arrive(ring.used + 8 * stage + (T::kConverters ? 0 : loaded & none));
      if (++stage == T::kStages) stage = 0, parity ^= 1;
    }
    if (T::kJoined) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += 0.0625f * __shfl_xor_sync(0xFFFFFFFFu, total[i], 2);
    }
    finish<T>(total, problem, line, row, scales);
  }
}

#define KERNEL(name, tokens, paired)                                                                              \
  extern "C" __global__ void __launch_bounds__((Tile<tokens, paired>::kThreads), 1)                               \
      name##_t##tokens(const float* scale, const float* factor, void* out, float4* partial, int m, int n,         \
                       int units, int wide, float limit, const __grid_constant__ Maps maps) {                     \
    extern __shared__ u8 s_all[];                                                                                 \
    const Problem problem{m, n, units, wide != 0, limit, out, partial, scale, factor};                            \
    linear<Tile<tokens, paired>>(maps, problem, s_all);                                                           \
  }
#define VARIANT(tokens)                        \
  KERNEL(sm90_fp8_linear, tokens, false)       \
  KERNEL(sm90_fp8_linear_swiglu, tokens, true)

VARIANT(4)
VARIANT(8)
VARIANT(16)
VARIANT(32)
VARIANT(64)
