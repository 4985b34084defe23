// What the kernels for many tokens share: copies and their barriers, wgmma, codes to bf16 fragments, output tiles.
#pragma once

#include "common/nvfp4_sm90.cuh"
#include "common/warp.cuh"

struct alignas(64) TensorMap {
  char bytes[128];
};

struct Maps {
  TensorMap x;    // bf16 [rows, k] in boxes of kBox x 64, swizzled by 128 bytes
  TensorMap out;  // bf16 [rows, n] in boxes of kBox x 64 by 128 bytes, paired: kBox x 32 by 64
};

constexpr int kBox = 32;  // tokens of one copy

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---- barriers and copies ----

__device__ __forceinline__ void barrier_init(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\nwait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

__device__ __forceinline__ void barrier_expect(unsigned barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void copy_bytes(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
               "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void store_box(const TensorMap* map, int column, int row, unsigned from) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(map), "r"(column),
               "r"(row), "r"(from)
               : "memory");
}

__device__ __forceinline__ void warpgroup_sync(int id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

// ---- wgmma: D[64 rows, tokens] += A[64, 16] in registers * B[16, tokens] in shared memory, both K-major ----

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// 1024 bytes from 8 tokens to the next 8, swizzle of 128 bytes (PTX ISA, "Matrix-Descriptor")
__device__ __forceinline__ u64 tile_descriptor(unsigned address) {
  return u64{(address & 0x3ffff) >> 4} | u64{1} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}

template <int kTokens>
struct Wgmma;

#define D0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define D1 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define D2 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define D3 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define D4 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define D5 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define D6 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define D7 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define H1 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define H2 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define H3 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define H4 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define H5 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define H6 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define H7 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R8(i) R4(i), R4(i + 4)
#define R16(i) R8(i), R8(i + 8)
#define WGMMA(tokens, list, a0, a1, a2, a3, b, ...)                                                           \
  template <>                                                                                                      \
  struct Wgmma<tokens> {                                                                                           \
    static __device__ __forceinline__ void run(float* d, const unsigned* a, u64 descriptor) {     \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens    \
                   "k16.f32.bf16.bf16 {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b                     \
                   ", 1, 1, 1, 0;"                                                                              \
                   : __VA_ARGS__                                                                                   \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));               \
    }                                                                                                              \
  };
WGMMA(32, D0, 16, 17, 18, 19, 20, R16(0))
WGMMA(48, D0 H1, 24, 25, 26, 27, 28, R16(0), R8(16))
WGMMA(64, D0 D1, 32, 33, 34, 35, 36, R16(0), R16(16))
WGMMA(80, D0 D1 H2, 40, 41, 42, 43, 44, R16(0), R16(16), R8(32))
WGMMA(96, D0 D1 D2, 48, 49, 50, 51, 52, R16(0), R16(16), R16(32))
WGMMA(112, D0 D1 D2 H3, 56, 57, 58, 59, 60, R16(0), R16(16), R16(32), R8(48))
WGMMA(128, D0 D1 D2 D3, 64, 65, 66, 67, 68, R16(0), R16(16), R16(32), R16(48))
WGMMA(144, D0 D1 D2 D3 H4, 72, 73, 74, 75, 76, R16(0), R16(16), R16(32), R16(48), R8(64))
WGMMA(160, D0 D1 D2 D3 D4, 80, 81, 82, 83, 84, R16(0), R16(16), R16(32), R16(48), R16(64))
WGMMA(176, D0 D1 D2 D3 D4 H5, 88, 89, 90, 91, 92, R16(0), R16(16), R16(32), R16(48), R16(64), R8(80))
WGMMA(192, D0 D1 D2 D3 D4 D5, 96, 97, 98, 99, 100, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80))
WGMMA(208, D0 D1 D2 D3 D4 D5 H6, 104, 105, 106, 107, 108, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80), R8(96))
WGMMA(224, D0 D1 D2 D3 D4 D5 D6, 112, 113, 114, 115, 116, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80), R16(96))
WGMMA(240, D0 D1 D2 D3 D4 D5 D6 H7, 120, 121, 122, 123, 124, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
      R16(96), R8(112))
WGMMA(256, D0 D1 D2 D3 D4 D5 D6 D7, 128, 129, 130, 131, 132, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
      R16(96), R16(112))

// ---- weights ----

struct Weights {  // a thread's part of a 64 x 64 tile
  uint4 codes;
  uint2 scales;
};

// a times one half of b, which HMUL2 takes as it is.
template <int kHalf>
__device__ __forceinline__ unsigned multiply(unsigned a, unsigned b) {
  unsigned d;
  if (kHalf == 0)
    asm("{\n.reg .b16 x, y;\n.reg .b32 z;\nmov.b32 {x, y}, %2;\nmov.b32 z, {x, x};\nmul.bf16x2 %0, %1, z;\n}"
        : "=r"(d)
        : "r"(a), "r"(b));
  else
    asm("{\n.reg .b16 x, y;\n.reg .b32 z;\nmov.b32 {x, y}, %2;\nmov.b32 z, {y, y};\nmul.bf16x2 %0, %1, z;\n}"
        : "=r"(d)
        : "r"(a), "r"(b));
  return d;
}

// The four A fragments of a tile, code * scale * 2^-8. A code's bits, put where bf16 has its sign, its exponent's
// lowest two and its mantissa's highest, are the code's value * 2^-126; the scale's exponent makes up for that. A zero
// scale byte would become a power of two as well: its codes are cleared first, in the few tiles that have one.
__device__ __forceinline__ void expand(const Weights& weights, unsigned (&a)[4][4]) {
  constexpr unsigned kSign = 0x80008000u, kValue = 0x01c001c0u;
  // exponent fields that turn scale * 2^bias into scale * 2^(126 - 8): bf16's own bias is 127
  constexpr unsigned kFirst = (126 + 127 - 8 - kFirstBias) << 7, kSecond = (126 + 127 - 8 - kSecondBias) << 7;
  constexpr unsigned kBase = kFirst | kSecond << 16;
  unsigned words[4] = {weights.codes.x, weights.codes.y, weights.codes.z, weights.codes.w};
  const unsigned scales[2] = {weights.scales.x, weights.scales.y};
  const unsigned zeros =
      (((scales[0] - 0x01010101u) & ~scales[0]) | ((scales[1] - 0x01010101u) & ~scales[1])) & 0x80808080u;
  if (__any_sync(kAllLanes, zeros)) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned pair = scales[j / 2] >> (8 * (j % 2));
      words[j] &= (pair & 0xff ? 0x8e8e8e8eu : 0) | (pair & 0xff0000 ? 0x71717171u : 0);
    }
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // as bf16 pairs of a row: bytes 0 and 2, unsigned e5m3, then 1 and 3
    const unsigned pairs[2] = {(scales[h] & 0x00ff00ffu) * 16 + kBase, __byte_perm(scales[h], 0, 0x4341) * 16 + kBase};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned w = words[2 * h + r];
      // One product moves a code's sign and value by different distances; nothing that it adds overlaps.
      a[h][r] = multiply<0>(((w & 0x008e008eu) * (1 << 5 | 1 << 8)) & (kSign | kValue), pairs[r]);
      a[h][r + 2] = multiply<0>(((w >> 3) & kValue) | (w & kSign), pairs[r]);
      a[h + 2][r] = multiply<1>(((w & 0x00710071u) * (1 << 2 | 1 << 15)) & (kSign | kValue), pairs[r]);
      a[h + 2][r + 2] = multiply<1>(((w >> 6) & kValue) | ((w << 7) & kSign), pairs[r]);
    }
  }
}

// ---- outputs ----

struct Weight {
  const uint4* codes;         // [experts, blocks, chunks, 128]
  const uint2* scales;        // [experts, blocks, chunks, 32]
  const float* global_scale;  // [experts, parts]
  int blocks, chunks;         // of 64 rows, of 64 k
  int parts;                  // equal ranges of rows
  int rows;                   // that are not padding; paired: half of them
};

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ __forceinline__ void store_transposed(unsigned address, unsigned a, unsigned b, unsigned c, unsigned d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(a), "r"(b),
               "r"(c), "r"(d)
               : "memory");
}

// Step's SwiGLU (ops/swiglu.py); comparisons, not fmin, so that NaN passes
__device__ __forceinline__ float swiglu(float gate, float up, float limit) {
  gate = __fdividef(gate, 1.0f + __expf(-gate));
  gate = gate > limit ? limit : gate;
  up = up > limit ? limit : up < -limit ? -limit : up;
  return gate * up;
}

// The thread's number in its warpgroup, read anew: what follows from it takes no registers in the main loops.
__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}

// The fragments' 2^-8 goes into the factors, or into the sums where a factor has no room for it.
template <int kTokens>
__device__ __forceinline__ void undo_debt(float* d, float& low, float& high) {
  if (fmaxf(fabsf(low), fabsf(high)) < 0x1p119f) {
    low *= 256.0f;
    high *= 256.0f;
  } else {
#pragma unroll
    for (int i = 0; i < kTokens / 2; ++i) d[i] *= 256.0f;
  }
}

// A thread's two factors: of rows row and row + 8, or paired of gate and up.
template <bool kPaired>
__device__ __forceinline__ float2 factors(const Weight& weight, int expert, int row) {
  const float* global_scale = weight.global_scale + static_cast<long long>(expert) * weight.parts;
  if (kPaired) return make_float2(__ldg(global_scale), __ldg(global_scale + weight.parts - 1));
  const int part_rows = weight.rows / weight.parts;
  return make_float2(__ldg(global_scale + min(row, weight.rows - 1) / part_rows),
                     __ldg(global_scale + min(row + 8, weight.rows - 1) / part_rows));
}

// A warpgroup's sums to shared memory, bf16 [token][64 rows], paired [token][32], swizzled. A thread holds rows
// r = 16 * warp + lane / 4 and r + 8 of tokens 8 * j + 2 * (lane % 4) and the next in d[4 j ...]. `tokens` count.
template <int kTokens, bool kPaired>
__device__ __forceinline__ void stage(const float* d, float low, float high, float limit, unsigned staging,
                                      int thread, int tokens = kTokens) {
  const int lane = thread % 32, warp = thread / 32;
  if constexpr (kPaired) {
    const unsigned to = staging + lane * 64 + ((warp ^ lane / 2 % 4) << 4);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 4) {
      if (8 * j >= tokens) break;
      unsigned m[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* v = d + 4 * (j + i);
        m[i] = pack(swiglu(v[0] * low, v[2] * high, limit), swiglu(v[1] * low, v[3] * high, limit));
      }
      store_transposed(to + j * 8 * 64, m[0], m[1], m[2], m[3]);
    }
  } else {
    const int unit = 2 * warp + lane / 8 % 2, in_pair = lane / 16 * 8 + lane % 8;
    const unsigned to = staging + in_pair * 128 + ((unit ^ lane % 8) << 4);
#pragma unroll
    for (int j = 0; j < kTokens / 8; j += 2) {
      if (8 * j >= tokens) break;
      unsigned m[4];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float* v = d + 4 * (j + i);
        m[2 * i] = pack(v[0] * low, v[1] * low);
        m[2 * i + 1] = pack(v[2] * high, v[3] * high);
      }
      store_transposed(to + j * 8 * 128, m[0], m[1], m[2], m[3]);
    }
  }
}

// A warpgroup's tile of the output, 64-row block `block` x tokens from `first` on. The copy engine writes what is
// staged while the next tile is computed, kStored tokens at a time, and leaves out what is beyond the output. `barrier`
// is the warpgroup's.
template <int kTokens, bool kPaired, int kStored = kBox>
__device__ __forceinline__ void write_tile(float* d, const Weight& weight, const TensorMap* out, int expert, int block,
                                           int first, float limit, unsigned staging, int barrier,
                                           int tokens = kTokens) {
  const int thread = thread_anew(), column = block * (kPaired ? 32 : 64);
  float2 factor = factors<kPaired>(weight, expert, column + thread / 32 * 16 + thread % 32 / 4);
  undo_debt<kTokens>(d, factor.x, factor.y);
  if (thread == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the tile before has been read
  warpgroup_sync(barrier);
  stage<kTokens, kPaired>(d, factor.x, factor.y, limit, staging, thread, tokens);
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  warpgroup_sync(barrier);
  if (thread == 0 && column < weight.rows) {
#pragma unroll
    for (int i = 0; i < kTokens; i += kStored) {
      if (i >= tokens) break;
      store_box(out, column, first + i, staging + i * (kPaired ? 64 : 128));
    }
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
  }
}
