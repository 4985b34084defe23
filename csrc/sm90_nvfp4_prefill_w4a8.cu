// NVFP4 weights x FP8 activations for many tokens on Hopper: sm_90's FP8 tensor cores take twice what bf16's do. For
// those who accept the rounding (step_kernels/w4a8.py): x becomes e4m3 with a power of two a token, code * block scale
// becomes e4m3.
//
//   out[token, row] = global_scale * x_scale[token] * 2^3
//                     * sum over k of x8[token, k] * e4m3(code[row, k] * block_scale[row, k / 16] * 2^-3)
//
// Tiles, clusters, copies and waiting are sm90_nvfp4_prefill.cu's. A stage of x, 128 bytes a token, holds 128 k here and
// meets two weight tiles; the loop takes two of the four stages at a time, so that k is padded to 256 and not to 512.
//
// 2^-3 brings the largest product, 2688, within e4m3's 448. Products below 2^-3, 21504 times less, become e4m3's
// subnormals: steps of 2^-6. The others keep 4 of their up to 6 significant bits, rounded to nearest, ties to even, by
// the hardware's conversion from f16, where they are exact. A row of x keeps its precision if its largest is between
// 2^-112 and 2^110.
//
// Sums stay in the tensor core's own accumulator of about 14 bits, as cuBLAS's do with fast accumulation. A model of it
// that truncates every addend of 32 k's at 2^-13 of the largest errs by 0.13 % at k = 4096 and 0.25 % at 12288, where
// the roundings cost 3.3 %. Adding up in f32 now and then would need 128 registers more than there are.

#include "common/nvfp4_sm90_prefill_many.cuh"

constexpr int kAhead = 4;        // weight tiles of 64 k in registers, ahead of use
constexpr int kSmallTile = 128;  // tokens up to which weights are prefetched into L2

// ---- rounding x ----

constexpr int kRowsAtOnce = 8;  // a warp each

// Two bf16 of a word as e4m3, times the power of two `inverse`.
__device__ __forceinline__ unsigned to_e4m3x2(unsigned word, float inverse) {
  u16 d;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;"
      : "=h"(d)
      : "f"(__uint_as_float(word & 0xffff0000u) * inverse), "f"(__uint_as_float(word << 16) * inverse));
  return d;
}

// A warp rounds a row of x and writes it to its places. Its scale is the least power of two that brings the row within
// 448, at least 2^-121; with an infinity or a NaN in it the row's is NaN. Bytes 4 t + {0, 1, 2, 3} of 16 are
// k = 2 t + {0, 1, 8, 9}: the order in which an FP8 fragment of the prepared layout has its codes.
extern "C" __global__ void __launch_bounds__(32 * kRowsAtOnce) sm90_nvfp4_prefill_w4a8_quantize(
    const uint4* x,       // bf16 [rows, k], rows x_stride elements apart
    const int* position,  // [count, slots]: where x's row goes, -1: nowhere; null: to its own number
    uint4* x8,            // e4m3 [places, k]
    float* x_scales,      // [places]: scale * 2^-5, for the fragments owe 2^-3 and write_tile pays 2^-8 back
    long long x_stride, int count, int k, int slots,
    int sorted) {  // not 0: x is in places already, and slots 1
  const int lane = threadIdx.x % 32, units = k / 16;
  const int index = blockIdx.x * kRowsAtOnce + threadIdx.x / 32;
  if (index >= count) return;
  if (position) position += static_cast<long long>(index) * slots;
  const int row = sorted ? __ldg(position) : index;
  if (row < 0) return;
  x += row * (x_stride / 8);
  unsigned largest = 0;
#pragma unroll 4
  for (int unit = lane; unit < units; unit += 32) {
    const uint4 a = __ldg(x + 2 * unit), b = __ldg(x + 2 * unit + 1);
    const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) largest = __vmaxu2(largest, words[i] & 0x7fff7fffu);
  }
  largest = __reduce_max_sync(kAllLanes, max(largest & 0xffffu, largest >> 16));  // bf16 bits: NaN is above infinity
  // exponent of the largest, one more where its mantissa is beyond 448's 1.75, less 448's
  const int exponent = max(static_cast<int>((largest + 0x1f) >> 7) - 8, 6);
  const unsigned scale = largest >= 0x7f80u ? 0x7fc00000u : static_cast<unsigned>(exponent - 5) << 23;
  const float inverse = __uint_as_float(static_cast<unsigned>(254 - exponent) << 23);
#pragma unroll 2
  for (int unit = lane; unit < units; unit += 32) {
    const uint4 a = __ldg(x + 2 * unit), b = __ldg(x + 2 * unit + 1);
    const uint4 v = make_uint4(to_e4m3x2(a.x, inverse) | to_e4m3x2(b.x, inverse) << 16,
                               to_e4m3x2(a.y, inverse) | to_e4m3x2(b.y, inverse) << 16,
                               to_e4m3x2(a.z, inverse) | to_e4m3x2(b.z, inverse) << 16,
                               to_e4m3x2(a.w, inverse) | to_e4m3x2(b.w, inverse) << 16);
#pragma unroll 8
    for (int slot = 0; slot < slots; ++slot) {
      const int to = position ? __ldg(position + slot) : index;
      if (to >= 0) x8[static_cast<long long>(to) * units + unit] = v;
    }
  }
  for (int slot = lane; slot < slots; slot += 32) {
    const int to = position ? __ldg(position + slot) : index;
    if (to >= 0) x_scales[to] = __uint_as_float(scale);
  }
}

// ---- weights ----

// a times one half of b, which HMUL2 takes as it is.
template <int kHalf>
__device__ __forceinline__ unsigned multiply_f16(unsigned a, unsigned b) {
  unsigned d;
  if (kHalf == 0)
    asm("{\n.reg .b16 x, y;\n.reg .b32 z;\nmov.b32 {x, y}, %2;\nmov.b32 z, {x, x};\nmul.rn.f16x2 %0, %1, z;\n}"
        : "=r"(d)
        : "r"(a), "r"(b));
  else
    asm("{\n.reg .b16 x, y;\n.reg .b32 z;\nmov.b32 {x, y}, %2;\nmov.b32 z, {y, y};\nmul.rn.f16x2 %0, %1, z;\n}"
        : "=r"(d)
        : "r"(a), "r"(b));
  return d;
}

// Codes of bytes 0 and 2, and of 1 and 3, times their scale, as e4m3. The codes are f16 pairs, value * 2^-14.
template <int kHalf>
__device__ __forceinline__ unsigned product(unsigned even, unsigned odd, unsigned scales, unsigned more) {
  unsigned d;
  asm("{\n.reg .b16 x, y;\ncvt.rn.satfinite.e4m3x2.f16x2 x, %1;\ncvt.rn.satfinite.e4m3x2.f16x2 y, %2;\n"
      "mov.b32 %0, {x, y};\n}"
      : "=r"(d)
      : "r"(multiply_f16<kHalf>(multiply_f16<0>(even, more), scales)),
        "r"(multiply_f16<kHalf>(multiply_f16<0>(odd, more), scales)));
  return d;
}

// The two m64k32 A fragments of a 64 x 64 tile. A code's bits, put where f16 has its sign, its exponent's lowest two and
// its mantissa's highest, are its value * 2^-14; a scale byte << 7 is the scale * 2^3 of a first code, * 2^-5 of a second.
// f16 has no 2^16 to make up for both, so the second's exponent gets one more: a zero scale there becomes 2^-14, whose
// products with codes times 2 are at most 3/4 of what e4m3 still rounds to 0.
__device__ __forceinline__ void expand_e4m3(const Weights& weights, unsigned* first, unsigned* second) {
  constexpr unsigned kCode = 0x8e008e00u, kFirstMore = 0x5c005c00u, kSecondMore = 0x78007800u;  // 2^8, 2^15
  const unsigned words[4] = {weights.codes.x, weights.codes.y, weights.codes.z, weights.codes.w};
  const unsigned scales[2] = {weights.scales.x, weights.scales.y};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // of a row: bytes 0 (of the first codes) and 2 (of the second), then 1 and 3
    const unsigned pairs[2] = {(scales[h] & 0x00ff00ffu) * 128 + (1u << 26),
                               __byte_perm(scales[h], 0, 0x4341) * 128 + (1u << 26)};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned w = words[2 * h + r];
      first[2 * h + r] = product<0>((w << 8) & kCode, w & kCode, pairs[r], kFirstMore);
      // One product moves a code's sign and value by different distances; its one carry is masked out.
      second[2 * h + r] = product<1>(((w & 0x00710071u) * (1 << 5 | 1 << 15)) & kCode,
                                     ((w >> 3) & 0x0e000e00u) | ((w << 7) & 0x80008000u), pairs[r], kSecondMore);
    }
  }
}

// ---- wgmma: D[64 rows, tokens] += A[64, 32] in registers * B[32, tokens] in shared memory, both e4m3 and K-major ----

template <int kTokens>
struct Wgmma8;

#define WGMMA8(tokens, list, a0, a1, a2, a3, b, ...)                                                                 \
  template <>                                                                                                        \
  struct Wgmma8<tokens> {                                                                                            \
    static __device__ __forceinline__ void run(float* d, const unsigned* a, u64 descriptor) {                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k32.f32.e4m3.e4m3 {" list "}, {%" #a0 ",%" #a1      \
                   ",%" #a2 ",%" #a3 "}, %" #b ", 1, 1, 1;"                                                          \
                   : __VA_ARGS__                                                                                     \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                                   \
    }                                                                                                                \
  };
WGMMA8(32, D0, 16, 17, 18, 19, 20, R16(0))
WGMMA8(64, D0 D1, 32, 33, 34, 35, 36, R16(0), R16(16))
WGMMA8(96, D0 D1 D2, 48, 49, 50, 51, 52, R16(0), R16(16), R16(32))
WGMMA8(128, D0 D1 D2 D3, 64, 65, 66, 67, 68, R16(0), R16(16), R16(32), R16(48))
WGMMA8(192, D0 D1 D2 D3 D4 D5, 96, 97, 98, 99, 100, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80))
WGMMA8(224, D0 D1 D2 D3 D4 D5 D6, 112, 113, 114, 115, 116, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
       R16(96))
WGMMA8(256, D0 D1 D2 D3 D4 D5 D6 D7, 128, 129, 130, 131, 132, R16(0), R16(16), R16(32), R16(48), R16(64), R16(80),
       R16(96), R16(112))

// ---- the products ----

// Two of the four stages at a time; their barriers' parity changes when all four have been used.
struct Turn {
  unsigned count;
  __device__ __forceinline__ int stage() const { return count % 2 * 2; }
  __device__ __forceinline__ unsigned parity() const { return count / 2 % 2; }
  __device__ __forceinline__ void pass() { count += 1; }
};

struct Consumer {
  const Weight& weight;
  const float* x_scales;
  const TensorMap* out;
  float limit;
  unsigned stages, full, empty, staging;
  int group, thread, cta;  // warpgroup 0 or 1, thread in it
  Turn turn;
  bool leads;  // has not let the other warpgroup start yet
  Weights ahead[kAhead];

  // Weight tile i of four, `left` of which exist; beyond them the last one again, to meet x's zeros.
  __device__ __forceinline__ void load(int first, int left, int i) {
    const long long at = first + min(i, left - 1);
    ahead[i].codes = load_once(weight.codes + at * 128 + thread);
    ahead[i].scales = load_once(weight.scales + at * 32 + thread / 4);
  }

  __device__ __forceinline__ void release(int stage) {
    if (thread % 32 < kCluster) barrier_arrive(empty + 8 * stage, thread % 32);
  }

  // Leaves the first weight tiles of the next tile, from number `next` on, in `ahead`.
  template <int kTokens, bool kPaired>
  __device__ __forceinline__ void run(const Tile& tile, int current, int next) {
    float d[kTokens / 2];
#pragma unroll
    for (float& v : d) v = 0.0f;
    unsigned a[2][4][4];
#pragma unroll 1
    for (int chunk = 0; chunk < weight.chunks; chunk += kAhead) {
      const bool last = chunk + kAhead >= weight.chunks;
      const int first = last ? next : current + chunk + kAhead;
      const int left = weight.chunks - (last ? 0 : chunk + kAhead);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int stage = turn.stage() + i;
        expand_e4m3(ahead[2 * i], a[i][0], a[i][1]);
        load(first, left, 2 * i);
        expand_e4m3(ahead[2 * i + 1], a[i][2], a[i][3]);
        load(first, left, 2 * i + 1);
        barrier_wait(full + 8 * stage, turn.parity());
        wgmma_fence();
        const u64 x = tile_descriptor(stages + stage * kStageBytes);
#pragma unroll
        for (int q = 0; q < 4; ++q) Wgmma8<kTokens>::run(d, a[i][q], x + 2 * q);
        wgmma_commit();
        wgmma_wait<1>();
        if (i > 0 || chunk > 0) release((stage + kStages - 1) % kStages);
        if (i == kLead - 1 && leads) {
          lead_arrive();
          leads = false;
        }
      }
      turn.pass();
    }
    wgmma_wait<0>();
#pragma unroll
    for (float& v : d) asm volatile("" : "+f"(v)::"memory");  // nothing reads the sums before this
    release((turn.stage() + kStages - 1) % kStages);
    scale_tokens<kTokens>(d, x_scales + tile.first);
    write_tile<kTokens, kPaired>(d, weight, out, tile.expert, block_of(tile, cta, group), tile.first, limit, staging,
                                 1 + group);
  }

  // A thread has tokens 8 j + 2 (lane % 4) and the next in d[4 j ...].
  template <int kTokens>
  __device__ __forceinline__ void scale_tokens(float* d, const float* scales) {
    const float2* from = reinterpret_cast<const float2*>(scales) + thread_anew() % 4;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 scale = __ldg(from + 4 * j);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[4 * j + i] *= i % 2 ? scale.y : scale.x;
    }
  }
};

template <bool kPaired, int... kTokens>
__device__ __forceinline__ void prefill(const Maps& maps, const Work& work, const Weight& weight,
                                        const float* x_scales, float limit) {
  extern __shared__ char s_bytes[];
  __shared__ u64 s_full[kStages], s_empty[kStages];
  const unsigned stages = (shared_address(s_bytes) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(s_full), empty = shared_address(s_empty);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // uniform: else ptxas serialises wgmma
  const int cta = blockIdx.x % kCluster, clusters = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumerWarps * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int count = work.count();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      Turn turn = {2};  // a new barrier's parity: the stages are free
      const int padded = (weight.chunks + kAhead - 1) / kAhead * kAhead;
      for (int index = cluster_number(); index < count; index += clusters) {
        const Tile tile = tile_at(work, index);
        for (int chunk = 0; chunk < weight.chunks; chunk += kAhead) {
          if (tile.tokens <= kSmallTile) {
            const int later = chunk + kPrefetched;
            if (later < weight.chunks)
              prefetch(weight, tile, cta, later);
            else if (index + clusters < count)
              prefetch(weight, tile_at(work, index + clusters), cta, later - padded);
          }
#pragma unroll 1
          for (int i = 0; i < 2; ++i) {
            const int stage = turn.stage() + i, column = (chunk / 2 + i) * kTileK;  // the map counts pairs of bytes
            barrier_wait(empty + 8 * stage, turn.parity());
            barrier_expect(full + 8 * stage, tile.tokens * 128);
#pragma unroll 1
            for (int row = cta * kBox; row < tile.tokens; row += kCluster * kBox)
              copy_box(stages + stage * kStageBytes + row * 128, &maps.x, column, tile.first + row, full + 8 * stage);
          }
          turn.pass();
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const unsigned staging = stages + kStages * kStageBytes + (group - 1) * kStagingBytes;
    Consumer consumer = {weight, x_scales, &maps.out, limit, stages, full, empty, staging, group - 1,
                         static_cast<int>(threadIdx.x % 128), cta, {0}, group == 1};
    int index = cluster_number();
    if (index < count) {
      Tile tile = tile_at(work, index);
      int current = first_weights(weight, tile, cta, group - 1);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) consumer.load(current, weight.chunks, i);
      if (group == 2) lead_wait();
      for (; index < count; index += clusters) {
        const Tile next_tile = tile_at(work, min(index + clusters, count - 1));
        const int next = first_weights(weight, next_tile, cta, group - 1);
        const int tokens = __shfl_sync(kAllLanes, tile.tokens, 0);
        ((tokens == kTokens ? consumer.run<kTokens, kPaired>(tile, current, next) : void()), ...);
        tile = next_tile;
        current = next;
      }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();
  cluster_sync();  // the other CTA may still arrive here
}

#define PRODUCT(name, paired, ...)                                                                                \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)                      \
      name(const uint4* codes, const uint2* scales, const float* global_scale, const float* x_scales,            \
           const int4* tiles, const int* tile_count, int token_tiles, int tile_tokens, int group, int row_tiles, \
           int blocks, int chunks, int parts, int rows, float limit, const __grid_constant__ Maps maps) {        \
    const Work work = {tiles, tile_count, token_tiles, tile_tokens, group, row_tiles};                            \
    const Weight weight = {codes, scales, global_scale, blocks, chunks, parts, rows};                             \
    prefill<paired, __VA_ARGS__>(maps, work, weight, x_scales, limit);                                            \
  }

// By the largest tile. ptxas spills with more sizes in a kernel.
PRODUCT(sm90_nvfp4_prefill_w4a8_plain_128, false, 32, 64, 96, 128)
PRODUCT(sm90_nvfp4_prefill_w4a8_plain_192, false, 128, 192)
PRODUCT(sm90_nvfp4_prefill_w4a8_plain_256, false, 128, 224, 256)
PRODUCT(sm90_nvfp4_prefill_w4a8_paired_128, true, 32, 64, 96, 128)
PRODUCT(sm90_nvfp4_prefill_w4a8_paired_192, true, 128, 192)
PRODUCT(sm90_nvfp4_prefill_w4a8_paired_256, true, 128, 224, 256)
