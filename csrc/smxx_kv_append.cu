// Between the q/k/v projections and attention: RMS-norm and rope of q and k, and the paged write of k and v.
//
// Tile: a few lanes own a head, a warp 32 / kLanes heads at a time, kRounds times over, all of q, of k or of v, token
// after token. A lane has two chunks of kChunk values, which rope turns into each other: no value moves between lanes.
// With chunks of 8 and 32 frequencies in a head of 128:
//
//   lane       0      1      2      3   |   4      5      6      7      from 64 on nothing turns
//   first     0-7    8-15  16-23  24-31 | 64-71  72-79  80-87  88-95    <- loads and stores of 16 bytes, an e4m3
//   second   32-39  40-47  48-55  56-63 | 96-103  ..     ..   120-127      cache's of 8, in whole sectors
//
// Few tokens: chunks of 4 and few rounds, the shortest way through a warp. Many: chunks of 8 and 4 rounds, all loads in
// flight before the first use, in blocks that stay for several tokens. That is 4800 warp instructions for a token of
// 64 + 8 heads; an H200 issues 9000 while its memory moves the bytes.
// Angles are the token's: lane l takes the sine and cosine of frequencies 2l and 2l + 1, shuffles hand them out.
// Bytes a token: 2 d (2 q_heads + 2 kv_heads) and what the cache holds; Step's 64 + 8 heads in e4m3: 38912.
// Waiting: only for the kernel ahead in the stream, before anything is read; warps have nothing to tell each other.
#include "common/bf16.cuh"
#include "common/dependent_launch.cuh"
#include "common/warp.cuh"

using u16 = unsigned short;
using u32 = unsigned;
using i64 = long long;

struct Arguments {  // as the launcher packs them
  const u16 *q, *k, *v;            // bf16 [tokens, heads, dim]
  u16* out;                        // bf16 [tokens, q_heads, dim], contiguous
  void *k_cache, *v_cache;         // e4m3 or bf16 [pages, kv_heads, page_size, dim]
  const void *q_norm, *k_norm;     // bf16 or f32 [dim]
  const float* inv_freq;           // [frequencies]
  const void *positions, *slots;   // i32 or i64 [tokens]
  const float *k_scale, *v_scale;  // [] or [kv_heads]
  i64 q_token, q_head, k_token, k_head, v_token, v_head;  // strides, in values
  i64 k_page, k_cache_head, k_offset, v_page, v_cache_head, v_offset;
  int k_scale_stride, v_scale_stride;
  int q_norm_bytes, k_norm_bytes, position_bytes, slot_bytes;  // of an element
  int tokens, q_heads, kv_heads, q_warps, k_warps;             // warps for all q heads; for all k heads, and for v
  u32 dim, frequencies, page_size;                             // multiples of 8; at most 128 and 64
  float eps, share;                                            // 1 / dim
};
static_assert(sizeof(Arguments) == 264);  // what the launcher packs

// To the nearest, ties to even, saturating at 448; NaN stays NaN.
__device__ inline u32 e4m3_pair(float low, float high) {
  u16 pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

// x within -limit and limit; NaN, unlike fminf's and fmaxf's, stays NaN.
__device__ inline float clamped(float x, float limit) {
  asm("min.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(limit), "f"(-limit));
  return x;
}

// Has the compiler work out a value here, neither earlier nor where it is used.
template <class T>
__device__ inline void keep(T*& pointer) { asm volatile("" : "+l"(pointer)); }
__device__ inline void keep(float& x) { asm volatile("" : "+f"(x)); }

// Loads in the order in which they are written; 0 where there is nothing.
__device__ inline u32 load_4_bytes(const void* from, bool there = true) {
  u32 x;
  asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %2, 0;\nmov.b32 %0, 0;\n@there ld.global.u32 %0, [%1];\n}"
               : "=r"(x) : "l"(from), "r"(static_cast<int>(there)) : "memory");
  return x;
}
__device__ inline void load(u32 (&x)[2], const void* from, bool there) {
  asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %3, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\n"
               "@there ld.global.v2.u32 {%0, %1}, [%2];\n}"
               : "=r"(x[0]), "=r"(x[1]) : "l"(from), "r"(static_cast<int>(there)) : "memory");
}
__device__ inline void load(u32 (&x)[4], const void* from, bool there) {
  asm volatile("{\n.reg .pred there;\nsetp.ne.b32 there, %5, 0;\nmov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\n"
               "mov.b32 %3, 0;\n@there ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "l"(from), "r"(static_cast<int>(there)) : "memory");
}
__device__ inline void store(void* to, const u32 (&x)[1]) { *static_cast<u32*>(to) = x[0]; }
__device__ inline void store(void* to, const u32 (&x)[2]) { *static_cast<uint2*>(to) = make_uint2(x[0], x[1]); }
__device__ inline void store(void* to, const u32 (&x)[4]) {
  *static_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
}

// An i32 or i64, loaded alike and told apart when it is needed: loads behind it need not wait for it.
__device__ inline uint2 load_integer(const u32* words, int bytes) {
  return make_uint2(load_4_bytes(words), load_4_bytes(words + bytes / 4 - 1));
}
__device__ inline i64 integer(uint2 words, int bytes) {
  return bytes == 8 ? static_cast<i64>(words.y) << 32 | words.x : static_cast<int>(words.x);
}

struct Chunks {  // a lane's two: where they begin in the head, and whether there are such
  u32 first, second;
  bool has_first, has_second, turned;
};

template <int kChunk>
__device__ inline Chunks chunks_of(u32 lane, u32 dim, u32 frequencies) {
  const u32 count = dim / kChunk, turning = frequencies / kChunk, pairs = (count + 1) / 2;
  const bool turned = lane < turning;
  const u32 first = turned ? lane : lane + turning;
  const u32 second = turned ? lane + turning : lane + pairs;
  return {first * kChunk, second * kChunk, lane < pairs, lane < pairs && second < count, turned};
}

template <int kCount>
__device__ inline void unpack(float* x, const u32 (&pairs)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    x[2 * i] = __uint_as_float(pairs[i] << 16);
    x[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000u);
  }
}

// A chunk of a norm as it lies: bf16 in the first half, f32 in all of the words.
template <int kChunk>
__device__ inline void load_weights(u32 (&words)[2][kChunk / 2], const void* norm, int bytes, u32 column, bool there) {
  const char* at = static_cast<const char*>(norm) + column * bytes;
  load(words[0], at, there);
  load(words[1], at + (bytes == 4 ? 2 * kChunk : 0), there);
}

// 1 + w.
template <int kChunk>
__device__ inline void to_factors(float* factor, const u32 (&words)[2][kChunk / 2], int bytes) {
  unpack(factor, words[0]);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float weight = __uint_as_float(words[i / (kChunk / 2)][i % (kChunk / 2)]);
    factor[i] = 1.0f + (bytes == 4 ? weight : factor[i]);
  }
}

// To 8e-8. CUDA's own functions go a long way through local memory beyond 105615 radians, which positions exceed. Here
// up to 2^20 quarter turns times the first part of pi/2 are exact in the fused product, and so is the difference.
__device__ inline void cos_sin(float angle, float& cosine, float& sine) {
  float r;
  u32 quarter;
  if (fabsf(angle) < 0x1p20f) {
    const float shifted = fmaf(angle, 0x1.45f306p-1f, 0x1.8p23f);  // 2/pi; the integer is in the low bits
    const float quarters = shifted - 0x1.8p23f;
    r = fmaf(quarters, -0x1.921fb6p+0f, angle);
    r = fmaf(quarters, 0x1.777a5cp-25f, r);
    r = fmaf(quarters, 0x1.ee59dap-50f, r);
    quarter = __float_as_uint(shifted);
  } else {  // exact to 2^50 radians
    const double quarters = rint(angle * 0x1.45f306dc9c883p-1);
    r = fma(quarters, -0x1.1a62633145c07p-54, fma(quarters, -0x1.921fb54442d18p+0, static_cast<double>(angle)));
    quarter = static_cast<u32>(static_cast<i64>(quarters));
  }
  const float r2 = r * r;  // the polynomials are minimax for |r| < 0.83: pi/4, and what `shifted` rounds by
  float c = fmaf(fmaf(0x1.994daep-16f, r2, -0x1.6c0a0ap-10f), r2, 0x1.555546p-5f);
  c = fmaf(fmaf(c, r2, -0.5f), r2, 1.0f);
  float s = fmaf(fmaf(-0x1.9803c0p-13f, r2, 0x1.1102eap-7f), r2, -0x1.555538p-3f);
  s = fmaf(s * r2, r, r);
  cosine = __uint_as_float(__float_as_uint(quarter & 1 ? s : c) ^ (quarter + 1) << 30 & 0x80000000u);
  sine = __uint_as_float(__float_as_uint(quarter & 1 ? c : s) ^ quarter << 30 & 0x80000000u);
}

template <int kChunk>
__device__ inline void norm_and_rotate(float (&x)[2 * kChunk], const float (&factor)[2 * kChunk],
                                       const float (&cosine)[kChunk], const float (&sine)[kChunk], bool turned,
                                       float share, float eps) {
  constexpr int kLanes = 64 / kChunk;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 2 * kChunk; ++i) sum = fmaf(x[i], x[i], sum);
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
  const float scale = rsqrtf(sum * share + eps);
#pragma unroll
  for (int i = 0; i < 2 * kChunk; ++i) x[i] = x[i] * scale * factor[i];
  if (turned) {  // not cosine 1, sine 0: an infinity would make its partner NaN
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const float a = x[i], b = x[i + kChunk];
      x[i] = a * cosine[i] - b * sine[i];
      x[i + kChunk] = b * cosine[i] + a * sine[i];
    }
  }
}

// x / scale as IEEE division rounds it, where it is not past e4m3's 448. A division is a branch for each value; two
// corrections of the product with the reciprocal, by exact remainders, give the same while nothing leaves f32's range.
// The remainders are negated for -0 to stay -0.
template <int kCount>
__device__ inline void divide(float (&x)[kCount], float scale) {
  if (scale >= 0x1p-60f && scale <= 0x1p60f) {
    const float reciprocal = 1.0f / scale, limit = 512.0f * scale;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float value = clamped(x[i], limit);
      float quotient = value * reciprocal;
      quotient = fmaf(-fmaf(quotient, scale, -value), reciprocal, quotient);
      x[i] = fmaf(-fmaf(quotient, scale, -value), reciprocal, quotient);
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {  // values move up one by one: a division for each would be much code for nothing
      const float quotient = x[0] / scale;
#pragma unroll
      for (int j = 1; j < kCount; ++j) x[j - 1] = x[j];
      x[kCount - 1] = quotient;
    }
  }
}

template <int kChunk>
__device__ inline void store_bf16(void* to, const float* x) {
  u32 words[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) words[i] = bf16_pair(x[2 * i], x[2 * i + 1]);
  store(to, words);
}

template <int kChunk>
__device__ inline void store_e4m3(void* to, const float* x) {
  u32 words[kChunk / 4];
#pragma unroll
  for (int i = 0; i < kChunk / 4; ++i) {
    words[i] = e4m3_pair(x[4 * i], x[4 * i + 1]) | e4m3_pair(x[4 * i + 2], x[4 * i + 3]) << 16;
  }
  store(to, words);
}

template <bool kE4m3, int kChunk, int kRounds>
__device__ void kv_append(const Arguments& a) {
  constexpr int kLanes = 64 / kChunk, kHeads = kWarpSize / kLanes;  // of a head; of a round
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kWarpSize, 0);  // the same in all lanes, and the compiler knows
  const int lane = threadIdx.x % kWarpSize, part = lane % kLanes;
  const int item = blockIdx.x * (blockDim.x / kWarpSize) + warp;
  if (item >= a.q_warps + 2 * a.k_warps) return;
  const bool is_q = item < a.q_warps, is_v = item >= a.q_warps + a.k_warps;
  const int heads = is_q ? a.q_heads : a.kv_heads;
  const int first_head = (item - (is_q ? 0 : is_v ? a.q_warps + a.k_warps : a.q_warps)) * kHeads * kRounds;
  const int head = first_head + lane / kLanes;  // in the first round
  const Chunks chunks = chunks_of<kChunk>(part, a.dim, a.frequencies);
  const i64 head_stride = is_q ? a.q_head : is_v ? a.v_head : a.k_head;
  const i64 token_stride = is_q ? a.q_token : is_v ? a.v_token : a.k_token;
  const u16* from = (is_q ? a.q : is_v ? a.v : a.k) + head * head_stride + blockIdx.y * token_stride + chunks.first;
  const u32* position_words = static_cast<const u32*>(a.positions) + blockIdx.y * (a.position_bytes / 4);
  const u32* slot_words = static_cast<const u32*>(a.slots) + blockIdx.y * (a.slot_bytes / 4);
  const void* norm = is_q ? a.q_norm : a.k_norm;
  const int norm_bytes = is_q ? a.q_norm_bytes : a.k_norm_bytes;
  const int scale_stride = is_v ? a.v_scale_stride : a.k_scale_stride;
  const float* scales = (is_v ? a.v_scale : a.k_scale) + head * scale_stride;
  keep(from);
  keep(position_words);
  keep(slot_words);
  keep(norm);
  keep(scales);
  wait_for_previous_kernel();
  let_next_kernel_start();

  float frequency[2], factor[2 * kChunk], scale[kRounds];
#pragma unroll 1
  for (int token = blockIdx.y; token < a.tokens; token += gridDim.y) {
    const uint2 loaded_position = load_integer(position_words, a.position_bytes);
    const uint2 loaded_slot = load_integer(slot_words, a.slot_bytes);
    u32 loaded[kRounds][2][kChunk / 2];
    const u16* row = from;
#pragma unroll
    for (int round = 0; round < kRounds; ++round, row += kHeads * head_stride) {
      const bool inside = head + kHeads * round < heads;
      load(loaded[round][0], row, inside && chunks.has_first);
      load(loaded[round][1], row + (chunks.second - chunks.first), inside && chunks.has_second);
    }
    if (token == static_cast<int>(blockIdx.y)) {  // what all tokens share, behind the loads of the first
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const u32 at = 2 * lane + i;
        frequency[i] = __uint_as_float(load_4_bytes(a.inv_freq + at, at < a.frequencies));
      }
      u32 weights[2][2][kChunk / 2];
      load_weights<kChunk>(weights[0], norm, norm_bytes, chunks.first, chunks.has_first);
      load_weights<kChunk>(weights[1], norm, norm_bytes, chunks.second, chunks.has_second);
#pragma unroll
      for (int round = 0; kE4m3 && round < kRounds; ++round) {
        const bool inside = !is_q && head + kHeads * round < heads;
        const u32 bits = load_4_bytes(scales + kHeads * round * scale_stride, inside);
        scale[round] = inside ? __uint_as_float(bits) : 1.0f;  // not 0, which is divided by the slow way
      }
      to_factors<kChunk>(factor, weights[0], norm_bytes);
      to_factors<kChunk>(factor + kChunk, weights[1], norm_bytes);
    }
    from += gridDim.y * token_stride;
    position_words += gridDim.y * (a.position_bytes / 4);
    slot_words += gridDim.y * (a.slot_bytes / 4);

    float cosine[kChunk], sine[kChunk];
    if (!is_v) {
      const float position = integer(loaded_position, a.position_bytes);
      float c[2], s[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) cos_sin(position * frequency[i], c[i], s[i]);
#pragma unroll
      for (int i = 0; i < kChunk; ++i) {
        const int owner = kChunk / 2 * part + i / 2;
        cosine[i] = __shfl_sync(kAllLanes, c[i % 2], owner);
        sine[i] = __shfl_sync(kAllLanes, s[i % 2], owner);
      }
    }

    // Where the lane's first chunk goes, and from there the second and the next round's, in bytes.
    char* to = reinterpret_cast<char*>(a.out);
    i64 at = static_cast<i64>(token) * a.q_heads * a.dim, stride = a.dim;
    if (!is_q) {
      const i64 slot = integer(loaded_slot, a.slot_bytes);
      if (slot < 0) continue;
      const u32 page = static_cast<u32>(slot) / a.page_size, offset = static_cast<u32>(slot) % a.page_size;
      to = static_cast<char*>(is_v ? a.v_cache : a.k_cache);
      at = is_v ? page * a.v_page + offset * a.v_offset : page * a.k_page + offset * a.k_offset;
      stride = is_v ? a.v_cache_head : a.k_cache_head;
    }
    const int size = kE4m3 && !is_q ? 1 : 2;
    to += (at + head * stride + chunks.first) * size;
    const i64 next = kHeads * stride * size, second = (chunks.second - chunks.first) * size;
#pragma unroll
    for (int round = 0; round < kRounds; ++round, to += next) {
      if (first_head + kHeads * round >= heads) break;
      const bool inside = head + kHeads * round < heads;
      float x[2 * kChunk];
      unpack(x, loaded[round][0]);
      unpack(x + kChunk, loaded[round][1]);
      if (!is_v) norm_and_rotate<kChunk>(x, factor, cosine, sine, chunks.turned, a.share, a.eps);
      if (kE4m3 && !is_q) {
        keep(scale[round]);  // or the reciprocals of all rounds take registers
        divide(x, scale[round]);
        if (inside && chunks.has_first) store_e4m3<kChunk>(to, x);
        if (inside && chunks.has_second) store_e4m3<kChunk>(to + second, x + kChunk);
      } else {
        if (inside && chunks.has_first) store_bf16<kChunk>(to, x);
        if (inside && chunks.has_second) store_bf16<kChunk>(to + second, x + kChunk);
      }
    }
  }
}

#define VARIANT(name, e4m3, chunk, rounds)                                                          \
  extern "C" __global__ void __launch_bounds__(160, 3) smxx_kv_append_##name##_##chunk##_##rounds( \
      const __grid_constant__ Arguments arguments) {                                                \
    kv_append<e4m3, chunk, rounds>(arguments);                                                      \
  }

VARIANT(e4m3, true, 4, 1)
VARIANT(e4m3, true, 4, 2)
VARIANT(e4m3, true, 8, 4)
VARIANT(bf16, false, 4, 1)
VARIANT(bf16, false, 4, 2)
VARIANT(bf16, false, 8, 4)
