// What the attentions of few queries share: the split of f32 into e4m3 and e5m2, fragments of values, products.
// csrc/sm90_paged_attention.cu draws how keys, values, queries and probabilities lie in shared memory.
#pragma once

#include "common/paged_sm90.cuh"

constexpr int kKeys = 64;         // of a tile
constexpr int kPitch = kDim + 4;  // floats of a query's sums: stores of a warp differ in bank
constexpr float kProbabilityExponent = 8.0f;  // probabilities are kept times 2^8: e4m3 ends at 448

// ---- shared memory ----

__device__ inline void store_shared(u32 at, u32 x) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(at), "r"(x) : "memory");
}
__device__ inline void store_shared(u32 at, u16 x) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(at), "h"(x) : "memory");
}
__device__ inline void store_shared(u32 at, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory");
}
__device__ inline void store_shared(u32 at, float2 x) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(x.x), "f"(x.y) : "memory");
}
__device__ inline float4 load_shared_4(u32 at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}
__device__ inline float2 load_shared_2(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ inline float load_shared_1(u32 at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
// Four 8 x 8 matrices of 16-bit pairs, transposed; each lane names a row.
__device__ inline void load_transposed(u32 (&r)[4], u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at)
               : "memory");
}

// ---- arithmetic ----

__device__ inline u16 pair_e4m3(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline u16 pair_e5m2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline float2 from_pair_e4m3(u16 pair) {
  float2 v;
  asm("{ .reg .b32 h; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {x, y}, h;"
      " cvt.f32.f16 %0, x; cvt.f32.f16 %1, y; }"
      : "=f"(v.x), "=f"(v.y)
      : "h"(pair));
  return v;
}
// Both halves of two values, x = hi + lo.
__device__ inline void split(float a, float b, u16& hi, u16& lo) {
  hi = pair_e4m3(a, b);
  const float2 h = from_pair_e4m3(hi);
  lo = pair_e5m2(a - h.x, b - h.y);
}

// A query's hi and lo, each lane with four of its 128 values, and the power of two by which they are too large.
__device__ inline float split_query(uint2 raw, u32& high, u32& low) {
  const u32 x = raw.x, y = raw.y;
  const u32 largest = max(max(x & 0x7FFF, x >> 16 & 0x7FFF), max(y & 0x7FFF, y >> 16 & 0x7FFF));
  const int e = max(__reduce_max_sync(kAllLanes, largest) >> 7, 7u);
  const float up = __uint_as_float((261 - e) << 23);  // 2^(134 - e): the largest value lands in [2^7, 2^8)
  u16 hi[2], lo[2];
  split(__uint_as_float(x << 16) * up, __uint_as_float(x & 0xFFFF0000u) * up, hi[0], lo[0]);
  split(__uint_as_float(y << 16) * up, __uint_as_float(y & 0xFFFF0000u) * up, hi[1], lo[1]);
  high = hi[0] | static_cast<u32>(hi[1]) << 16;
  low = lo[0] | static_cast<u32>(lo[1]) << 16;
  if (e == 255) high = 0x7F7F7F7Fu;  // infinity or NaN somewhere: the query's whole result is NaN
  return __uint_as_float((e - 7) << 23);
}
// Which of the four keys of 16 that a word of a V fragment holds are inside [low, high); word: lane % 4.
__device__ inline u32 bytes_inside(int key, int t, int low, int high) {
  u32 mask = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int at = key + 2 * t + (i >> 1) + 8 * (i & 1);
    if (at >= low && at < high) mask |= 0xFFu << (8 * i);
  }
  return mask;
}
// A tile's values as fragments, [half of d][32 keys][4 words]; `at`: this warp's 16 of d of the row that a lane names.
__device__ inline void load_values(u32 (&v)[2][2][4], u32 at) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      u32 r[4];
      load_transposed(r, (at ^ (half * 64)) + step * 32 * kDim);
      v[half][step][0] = __byte_perm(r[0], r[1], 0x6420);
      v[half][step][1] = __byte_perm(r[0], r[1], 0x7531);
      v[half][step][2] = __byte_perm(r[2], r[3], 0x6420);
      v[half][step][3] = __byte_perm(r[2], r[3], 0x7531);
    }
  }
}
// Zeros for keys outside [low, high): what was not read or is not the request's may be NaN.
__device__ inline void hide_values(u32 (&v)[2][2][4], int t, int low, int high) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32 mask = bytes_inside(32 * step + 16 * i, t, low, high);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        v[half][step][2 * i] &= mask;
        v[half][step][2 * i + 1] &= mask;
      }
    }
  }
}

// ---- wgmma of m64 n(columns): sums (+)= A B; k32, A in e4m3, B hi in e4m3 or lo in e5m2; or k16, both in one type ----

// Until no more than kLeft groups are under way, of which none has these sums.
template <int kLeft = 0, int kSums>
__device__ inline void wgmma_wait(float (&d)[kSums]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
#pragma unroll
  for (int i = 0; i < kSums; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

// Descriptors' low words; the high ones are constants. Keys, and values as transposed keys: 64 rows of 128 bytes,
// swizzled by 128, 1024 bytes from 8 rows to the next. Columns: 8 x 16 byte matrices, 128 bytes apart along the
// columns, all columns' 16 bytes apart along k.
__device__ inline u32 describe_keys(u32 address) { return address >> 4 | 1 << 16; }
template <int kColumns>
__device__ inline u32 describe_columns(u32 address) {
  return address >> 4 | kColumns << 16;
}
constexpr u32 kKeysHigh = 1024 >> 4 | 1 << 30, kColumnsHigh = 128 >> 4;
template <u32 kHigh>
__device__ inline u64 descriptor(u32 low) {
  u64 r;
  asm("mov.b64 %0, {%1, %2};" : "=l"(r) : "r"(low), "n"(kHigh));
  return r;
}
// A warp's value as ptxas sees that it is one: descriptors stay in uniform registers.
__device__ inline u32 uniform(u32 x) { return __shfl_sync(kAllLanes, x, 0); }
// Keeps a value in a register where the compiler would compute it again each time.
__device__ inline void keep(u32& x) { asm volatile("" : "+r"(x)); }

template <int kColumns>
struct Wgmma;

#define D8 "%0,%1,%2,%3"
#define D16 D8 ",%4,%5,%6,%7"
#define D32 D16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define WGMMA_SHARED(n, list, type, a, b, add, ...)                                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n               \
               "k32.f32.e4m3." type " {" list "}, %" #a ", %" #b ", p, 1, 1; }"                                  \
               : __VA_ARGS__                                                                                     \
               : "l"(keys), "l"(columns), "n"(kAdd))
#define WGMMA_REGISTERS(n, list, type, a0, a1, a2, a3, b, add, ...)                                               \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n               \
               "k32.f32.e4m3." type " {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1; }"    \
               : __VA_ARGS__                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"(kAdd))
#define WGMMA_F16(n, list, a0, a1, a2, a3, b, add, ...)                                                           \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n               \
               "k16.f32.f16.f16 {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", p, 1, 1, 0; }"       \
               : __VA_ARGS__                                                                                     \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(columns), "n"(1))
#define WGMMA_BF16(n, list, a, b, add, transposed, ...)                                                           \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %" #add ", 0; wgmma.mma_async.sync.aligned.m64n" #n               \
               "k16.f32.bf16.bf16 {" list "}, %" #a ", %" #b ", p, 1, 1, " transposed ", 0; }"                   \
               : __VA_ARGS__                                                                                     \
               : "l"(keys), "l"(columns), "n"(kAdd))
#define WGMMA(n, list, i0, i1, i2, i3, i4, i5, ...)                                                               \
  template <>                                                                                                     \
  struct Wgmma<n> {                                                                                               \
    template <bool kLow, bool kAdd>                                                                               \
    static __device__ inline void shared(float (&d)[n / 2], u32 k, u32 c) {                                       \
      const u64 keys = descriptor<kKeysHigh>(k), columns = descriptor<kColumnsHigh>(c);                           \
      if constexpr (kLow) WGMMA_SHARED(n, list, "e5m2", i0, i1, i2, __VA_ARGS__);                                 \
      else WGMMA_SHARED(n, list, "e4m3", i0, i1, i2, __VA_ARGS__);                                                \
    }                                                                                                             \
    template <bool kLow, bool kAdd>                                                                               \
    static __device__ inline void registers(float (&d)[n / 2], const u32 (&a)[4], u32 c) {                        \
      const u64 columns = descriptor<kColumnsHigh>(c);                                                            \
      if constexpr (kLow) WGMMA_REGISTERS(n, list, "e5m2", i0, i1, i2, i3, i4, i5, __VA_ARGS__);                  \
      else WGMMA_REGISTERS(n, list, "e4m3", i0, i1, i2, i3, i4, i5, __VA_ARGS__);                                 \
    }                                                                                                             \
    static __device__ inline void add_f16(float (&d)[n / 2], const u32 (&a)[4], u32 c) {                          \
      const u64 columns = descriptor<kColumnsHigh>(c);                                                            \
      WGMMA_F16(n, list, i0, i1, i2, i3, i4, i5, __VA_ARGS__);                                                    \
    }                                                                                                             \
    template <bool kTransposed, bool kAdd>                                                                        \
    static __device__ inline void bf16(float (&d)[n / 2], u32 k, u32 c) {                                         \
      const u64 keys = descriptor<kKeysHigh>(k), columns = descriptor<kColumnsHigh>(c);                           \
      if constexpr (kTransposed) WGMMA_BF16(n, list, i0, i1, i2, "1", __VA_ARGS__);                               \
      else WGMMA_BF16(n, list, i0, i1, i2, "0", __VA_ARGS__);                                                     \
    }                                                                                                             \
  };
WGMMA(8, D8, 4, 5, 6, 7, 8, 9, R4(0))
WGMMA(16, D16, 8, 9, 10, 11, 12, 13, R4(0), R4(4))
WGMMA(32, D32, 16, 17, 18, 19, 20, 21, R16(0))
