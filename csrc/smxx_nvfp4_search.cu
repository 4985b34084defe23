// NVFP4 block scales and codes of a weight by the searches of step_kernels/nvfp4.py, with its bits: `max`, `four-six`
// and `mse`, the best of nine scales around `max`'s. And what they lose: sums of squares.
//
// Tile: a thread takes a block of 16 weights, a warp 32 neighbouring blocks, all warps go through the weight in turn.
// Search: dividing and rounding in f32 for nine scales costs 150 instructions a weight. 16-bit weights have the errors
// and codes in f16 first, two weights an instruction, 40 instructions a weight, with a bound on what they err: that
// leaves one scale and no doubt about a code to 88 % of Gaussian blocks. The others wait in a queue of their warp until
// they are 32, a full warp's work, and are compared in f32 as the specification says, among the scales that are left.
// Bytes: of 16 weights 32 (64 in f32) in, 9 out.
// Waiting: none but a warp's own.
//
// Why f16 is enough. With t = weight / scale, t * t is summed as (t - round(t))^2, which as a function of the scale is
// continuous: rounding changes codes where both are as far away. So an inverse scale that is off by a factor 1 + e
// moves a sum by 2 e sqrt(sum of errors * sum of squares) at most, and f16's roundings of differences, squares and sums
// move it by kRounding of itself. What the two smallest sums may err together is kBoth times as much.
using u8 = unsigned char;
using u16 = unsigned short;

constexpr int kThreads = 128;  // the launcher's THREADS
constexpr int kWarps = kThreads / 32;
constexpr int kErrorBlocks = 4;  // the launcher's ERROR_BLOCKS
constexpr int kCandidates = 9;
constexpr int kLeast = -2;  // the first candidate's offset from `max`'s scale code, the others follow it
constexpr int kMax = 0, kFourSix = 1, kMse = 2;
constexpr unsigned kMost = 0x7e;          // e4m3's 448; one more is NaN
constexpr float kRounding = 0.0049f;      // 2^-11 for each of 8 sums, and twice for the difference that is squared
constexpr float kBoth = 2.05f;
constexpr float kFloor = 0x1p-11f;        // for f16's subnormals, where all weights lie on the grid
constexpr unsigned kSteps = 0x61006100u;  // 640 in f16, whose neighbours are 0.5 away: adding it rounds

// --- instructions
__device__ inline unsigned half2_fma(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline unsigned bf16_pair_fma(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
__device__ inline unsigned half2_mul(unsigned a, unsigned b) {
  unsigned d;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline unsigned half2_sub(unsigned a, unsigned b) {
  unsigned d;
  asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline unsigned half2_max(unsigned a, unsigned b) {
  unsigned d;
  asm("max.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline unsigned half2_min(unsigned a, unsigned b) {
  unsigned d;
  asm("min.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
  return d;
}
__device__ inline unsigned half2_abs(unsigned a) {
  unsigned d;
  asm("abs.f16x2 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ inline unsigned half2_of(float low, float high) {
  unsigned d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ inline float half_float(u16 a) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(a));
  return d;
}
__device__ inline float square_root(float a) {
  float d;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(d) : "f"(a));
  return d;
}
// The larger of each half as an integer.
__device__ inline unsigned larger_u16(unsigned a, unsigned b) { return __vmaxu2(a, b); }
__device__ inline unsigned bytes(unsigned a, unsigned b, unsigned which) { return __byte_perm(a, b, which); }
// a, one bit up, with the sign of b below.
__device__ inline unsigned shifted_in(unsigned a, float b) { return __funnelshift_l(__float_as_uint(b), a, 1); }
// The larger of the two, into *a; of numbers from 0 on, whose bits are ordered as they are.
__device__ inline void raise(float* a, float b) { atomicMax(reinterpret_cast<unsigned*>(a), __float_as_uint(b)); }
// --- arithmetic

__device__ inline float halves_sum(unsigned pair) { return half_float(pair & 0xffff) + half_float(pair >> 16); }

struct Bf16 {
  static constexpr int kBytes = 2;
  static __device__ float at(const u8* x, long long i) { return low(reinterpret_cast<const u16*>(x)[i]); }
  static __device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
  // Two magnitudes over 2^exponent in f16, by moving their bits; below 2^-14 to something as small.
  static __device__ unsigned over_power(unsigned pair, int exponent) {
    const unsigned zero = max(exponent + 112, 0) * 0x00800080u;  // the bits that become f16's zero
    return (larger_u16(pair, zero) - zero) << 3;
  }
  static __device__ unsigned plus_zero(unsigned pair) { return bf16_pair_fma(pair, 0x3f803f80u, 0); }
};
struct F16 {
  static constexpr int kBytes = 2;
  static __device__ float at(const u8* x, long long i) { return low(reinterpret_cast<const u16*>(x)[i]); }
  static __device__ float low(unsigned pair) { return half_float(pair & 0xffff); }
  static __device__ float high(unsigned pair) { return half_float(pair >> 16); }
  static __device__ unsigned over_power(unsigned pair, int exponent) {
    const float factor = __uint_as_float((127 - exponent) << 23);
    return half2_of(low(pair) * factor, high(pair) * factor);
  }
  static __device__ unsigned plus_zero(unsigned pair) { return half2_fma(pair, 0x3c003c00u, 0); }
};
struct F32 {
  static constexpr int kBytes = 4;
  static __device__ float at(const u8* x, long long i) { return reinterpret_cast<const float*>(x)[i]; }
};

// 16 weights; at any address of a multiple of 16.
template <typename Input>
__device__ inline void load(float (&x)[16], const u8* weight, unsigned block) {
  const uint4* from = reinterpret_cast<const uint4*>(weight + static_cast<long long>(block) * (16 * Input::kBytes));
#pragma unroll
  for (int i = 0; i < Input::kBytes; ++i) {
    const uint4 four = from[i];
    const unsigned words[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (Input::kBytes == 4) {
        x[4 * i + j] = __uint_as_float(words[j]);
      } else {
        x[8 * i + 2 * j] = Input::low(words[j]);
        x[8 * i + 2 * j + 1] = Input::high(words[j]);
      }
    }
  }
}

// To the nearest e4m3, from 2^-6 to 448.
__device__ inline unsigned normal_e4m3_code(float scale) {
  const unsigned bits = __float_as_uint(scale);
  return ((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120 << 3);
}

// To the nearest e4m3 from 2^-9 to 448; NaN to 0x7f.
__device__ inline unsigned e4m3_code(float scale) {
  if (scale != scale) return 0x7f;
  scale = fminf(fmaxf(scale, 0x1p-9f), 448.0f);
  if (scale < 0x1p-6f) return __float2int_rn(scale * 512.0f);  // subnormal
  return normal_e4m3_code(scale);
}

__device__ inline float e4m3_value(unsigned code) {
  if (code < 8) return static_cast<float>(code) * 0x1p-9f;
  return __uint_as_float(code == 0x7f ? 0x7fffffffu : (code + (120 << 3)) << 20);
}

// The scale code of `max`, or with 1.5 times a block's amax the other one of `four-six`.
__device__ inline unsigned first_code(float amax, float factor, float outer) {
  return e4m3_code(amax == 0 && factor == 1.0f ? 1.0f : __fdiv_rn(__fmul_rn(factor, amax), __fmul_rn(6.0f, outer)));
}

// Scale code `i` in the order in which candidates win ties: offsets 0, 1, -1, 2, -2, 3, 4, 5, 6.
__device__ inline unsigned candidate(unsigned first, int i) {
  const int offset = (i > 4 ? i : 0x04132 >> 4 * i & 7) + kLeast;
  return min(max(static_cast<int>(first) + offset, 1), static_cast<int>(kMost));
}
__device__ constexpr int order(int offset) {
  return offset > 2 ? offset + 2 : offset > 0 ? 2 * offset - 1 : -2 * offset;
}

// Whether the quick ways may be used: no product with a scale code leaves f32's normal numbers.
__device__ inline bool usual(float outer) { return outer >= 0x1p-60f && outer <= 1.0f; }

// x / d by the division of CUDA's own library less its first steps, which depend on d alone: r is 1 / d. For x of 0 or
// 2^-80 to 2^40, d from 2^-70 to 2^12.
__device__ inline float divide(float x, float d, float r) {
  float q = __fmul_rn(x, r);
  q = __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
  return __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
}

// nvfp4.e2m1_round of a number from 0 on.
__device__ inline float round_e2m1(float t) {
  t = fminf(t, 6.0f);
  // 1.5 * 2^22, doubled where the step doubles, from t = 2 and 4 on: its neighbours are a step away.
  const float shift = __uint_as_float((__float_as_uint(t * 0x1p-127f) & 0x7f800000u) + 0x4ac00000u);
  return __fsub_rn(__fadd_rn(t, shift), shift);
}

// nvfp4.e2m1_encode of t from 0 on, three bits; NaN becomes 7.
__device__ inline unsigned encode_e2m1(float t) {
  t = fminf(t, 6.0f);
  const float power = fmaxf(__uint_as_float(__float_as_uint(t) & 0x7f800000u), 1.0f);
  // Steps of power / 2: the low bits count them, and two codes are skipped for each doubling of the step.
  const float steps = __fmaf_rn(power, 0.5f * 8388608.0f, t);
  return (__float_as_uint(steps) + (__float_as_uint(power) >> 22) + 2) & 7;
}

// A block as the specification has it; `mask` has the candidates that may win, as bits in the order of ties.
// This one for weights and global scales within `divide`'s bounds; x and amax are sizes, `negative` has the signs.
template <int kSearch>
__device__ inline void usual_block(const float (&x)[16], unsigned negative, float amax, uint2* codes, u8* scales,
                                   unsigned block, unsigned mask, float outer) {
  unsigned best = first_code(amax, 1.0f, outer);
  if constexpr (kSearch != kMax) {
    const unsigned first = best, second = kSearch == kFourSix ? first_code(amax, 1.5f, outer) : 0;
    float y[16], least = 0;
    const float inverse = __fdiv_rn(1.0f, outer);
#pragma unroll
    for (int k = 0; k < 16; ++k) y[k] = divide(x[k], outer, inverse);
#pragma unroll 1
    for (bool any = false; mask; mask &= mask - 1, any = true) {
      const int i = __ffs(mask) - 1;
      const unsigned code = kSearch == kMse ? candidate(first, i) : i ? second : first;
      const float scale = e4m3_value(code), d = __fmul_rn(scale, outer), r = __fdiv_rn(1.0f, d);
      float total = 0;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const float rounded = round_e2m1(divide(x[k], d, r));
        const float error = __fsub_rn(__fmul_rn(rounded, scale), y[k]), squared = __fmul_rn(error, error);
        total = k ? __fadd_rn(total, squared) : squared;
      }
      if (!any || total < least) best = code, least = total;
    }
  }
  const float d = __fmul_rn(e4m3_value(best), outer), r = __fdiv_rn(1.0f, d);
  unsigned packed[2] = {0, 0};
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    packed[k / 8] |= (encode_e2m1(divide(x[k], d, r)) | (negative >> k & 1) << 3) << (4 * (k % 8));
  }
  codes[block] = make_uint2(packed[0], packed[1]);
  scales[block] = best;
}

// And this one for any others: NaN, quotients that overflow or are subnormal.
template <typename Input, int kSearch>
__device__ inline void unusual_block(const u8* weight, float amax, uint2* codes, u8* scales, unsigned block,
                                     unsigned mask, float outer) {
  const long long from = 16ll * block;
  unsigned best = first_code(amax, 1.0f, outer);
  if constexpr (kSearch != kMax) {
    const unsigned first = best, second = kSearch == kFourSix ? first_code(amax, 1.5f, outer) : 0;
    float least = 0;
#pragma unroll 1
    for (bool any = false; mask; mask &= mask - 1, any = true) {
      const int i = __ffs(mask) - 1;
      const unsigned code = kSearch == kMse ? candidate(first, i) : i ? second : first;
      const float scale = e4m3_value(code), d = __fmul_rn(scale, outer);
      float total = 0;
#pragma unroll 1
      for (int k = 0; k < 16; ++k) {
        const float x = Input::at(weight, from + k), q = __fdiv_rn(x, d);
        const float rounded = q == q ? copysignf(round_e2m1(fabsf(q)), q) : q;
        const float error = __fsub_rn(__fmul_rn(rounded, scale), __fdiv_rn(x, outer));
        const float squared = __fmul_rn(error, error);
        total = k ? __fadd_rn(total, squared) : squared;
      }
      if (!any || total < least) best = code, least = total;
    }
  }
  const float d = __fmul_rn(e4m3_value(best), outer);
  unsigned packed[2] = {0, 0};
#pragma unroll 1
  for (int k = 15; k >= 0; --k) {
    const float q = __fdiv_rn(Input::at(weight, from + k), d);
    packed[1] = packed[1] << 4 | packed[0] >> 28;
    packed[0] = packed[0] << 4 | encode_e2m1(fabsf(q)) | (q < 0 ? 8u : 0u);
  }
  codes[block] = make_uint2(packed[0], packed[1]);
  scales[block] = best;
}

template <typename Input, int kSearch>
__device__ inline void exact_block(const u8* weight, uint2* codes, u8* scales, unsigned block, unsigned mask,
                                   float outer) {
  float x[16];
  load<Input>(x, weight, block);
  unsigned top = 0, negative = 0;  // as an integer NaN is the largest
  bool tiny = false;
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    negative |= x[k] < 0 ? 1u << k : 0u;
    x[k] = fabsf(x[k]);
    top = max(top, __float_as_uint(x[k]));
    tiny |= __float_as_uint(x[k]) - 1 < 0x17800000u - 1;  // 0 < |x| < 2^-80
  }
  const float amax = __uint_as_float(top);
  if (!tiny && amax < 0x1p40f && usual(outer)) {
    usual_block<kSearch>(x, negative, amax, codes, scales, block, mask, outer);
  } else {
    unusual_block<Input, kSearch>(weight, amax, codes, scales, block, mask, outer);
  }
}

// What the candidates around a scale code have in common for all blocks whose code has the same mantissa. In units of
// 2^exponent of the code and of outer a scale is 0.8 to 3.3, and t = weight / (scale * outer) = z * inverse, where
// z = weight / 16.
struct __align__(16) Row {
  unsigned inverse[kCandidates];     // f16 twice, as all unsigned here
  unsigned octave[kCandidates / 3];  // z * octave is 2^-14 where steps of t grow from 0.5 to 1
  unsigned rest[kCandidates];        // what inverse lacks
  unsigned six[kCandidates];         // z of t = 6
  float weight[kCandidates];         // squared scale; infinite for a scale beyond e4m3
  float off;                         // the most that an inverse is off, as a factor
  unsigned steps;                    // kSteps, which the compiler may not know: `and`, `or` of two constants take two
  unsigned unused[3];                // the first eight rows begin in different 16 bytes of 128: no bank conflicts
};
constexpr int kRows = 8 + 6;  // a row for each mantissa; one for each of the six largest codes

__device__ inline int row_of(unsigned first) { return first > kMost - 6 ? first - (kMost - 6) + 7 : first & 7; }

__device__ inline void fill_row(Row* rows, int thread, float outer_mantissa) {
  const int at = thread / kCandidates, i = thread % kCandidates;
  Row& row = rows[at];
  const int mantissa = at < 8 ? at : at - 7, position = mantissa + i + kLeast;
  const float scale = position >= 8 ? position * 0.25f : 1.0f + position * (position < 0 ? 0.0625f : 0.125f);
  const float d = __fmul_rn(scale, outer_mantissa), inverse = __fdiv_rn(16.0f, d);
  row.inverse[i] = half2_of(inverse, inverse);
  const float kept = half_float(row.inverse[i] & 0xffff), rest = __fdiv_rn(__fmaf_rn(-kept, d, 16.0f), d);
  row.rest[i] = half2_of(rest, rest);
  row.six[i] = half2_of(d * 0.375f, d * 0.375f);
  row.weight[i] = at >= 8 && at + i + kLeast > 8 + 5 ? __uint_as_float(0x7f800000u) : scale * scale;
  // Steps of t may grow anywhere from 1.75 to 2.25 and from 3.5 to 4.5: there both roundings agree. So one place, 1.984
  // and 3.968 for the middle one, serves three candidates, which are at most 9/8 of it and 8/9.
  if (i % 3 == 1) row.octave[i / 3] = half2_of(inverse * (1.008f * 0x1p-15f), inverse * (1.008f * 0x1p-15f));
  row.steps = kSteps;
  raise(&row.off, fabsf(rest) * d * (1.01f / 16.0f) + 0x1p-20f);
}

// 16 magnitudes z -> the sum of (t - round(t))^2, in f16. `magic`: 640 where steps are 0.5, 1280 and 2560 for 1 and 2.
template <bool kClip>
__device__ inline float quick_error(const unsigned (&z)[8], const unsigned (&magic)[8], unsigned inverse) {
  unsigned total = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    unsigned negative = half2_sub(magic[k], half2_fma(z[k], inverse, magic[k]));
    if (kClip) negative = half2_max(negative, 0xc600c600u);  // -6
    const unsigned difference = half2_fma(z[k], inverse, negative);
    total = half2_fma(difference, difference, total);
  }
  return halves_sum(total);
}

__device__ inline unsigned magic_of(unsigned z, unsigned octave, unsigned steps) {
  return (half2_mul(z, octave) & 0x7c007c00u) | steps;
}

// The candidates that may have the least error, as bits in the order of ties. `offset`: of four-six's second scale.
template <int kSearch>
__device__ inline unsigned contenders(const unsigned (&z)[8], const Row& row, float outer_mantissa, int offset) {
  constexpr int kCount = kSearch == kMse ? kCandidates : 2;
  float error[kCount];  // in the order of ties
  unsigned magic[8];
  const unsigned steps = row.steps;
  if constexpr (kSearch == kMse) {
#pragma unroll
    for (int group = 0; group < kCandidates / 3; ++group) {
#pragma unroll
      for (int k = 0; k < 8; ++k) magic[k] = magic_of(z[k], row.octave[group], steps);
#pragma unroll
      for (int i = 3 * group; i < 3 * group + 3; ++i) {  // scales from `max`'s on keep t below 7
        const float sum = i + kLeast < 0 ? quick_error<true>(z, magic, row.inverse[i])
                                         : quick_error<false>(z, magic, row.inverse[i]);
        error[order(i + kLeast)] = sum * row.weight[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned inverse = row.inverse[i ? offset - kLeast : -kLeast], octave = half2_mul(inverse, 0x02000200u);
#pragma unroll
      for (int k = 0; k < 8; ++k) magic[k] = magic_of(z[k], octave, steps);
      error[i] = quick_error<false>(z, magic, inverse) * row.weight[i ? offset - kLeast : -kLeast];
    }
  }
  unsigned squares = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) squares = half2_fma(z[k], z[k], squares);
  const float size = halves_sum(squares) * (258.0f / (outer_mantissa * outer_mantissa));
  float least = error[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) least = fminf(least, error[i]);
  const float shift = 2.0f * row.off * square_root(least * size);
  const float limit = least + kBoth * (kRounding * least + shift) + 16.0f * row.off * row.off * size + kFloor;
  unsigned beyond = ~0u;
#pragma unroll
  for (int i = kCount - 1; i >= 0; --i) beyond = shifted_in(beyond, limit - error[i]);  // its sign
  return ~beyond;
}

// Codes of 16 weights whose scale is the row's candidate i, or false: a weight is so near a tie that f16 cannot tell.
template <typename Input>
__device__ inline bool quick_codes(const unsigned (&pairs)[8], const unsigned (&z)[8], const Row& row, int i,
                                   uint2* to) {
  const unsigned inverse = row.inverse[i], rest = row.rest[i], six = row.six[i], steps = row.steps;
  const unsigned octave = half2_mul(inverse, 0x02000200u);  // 2^-15
  unsigned near = 0xbc00bc00u, half[4];
#pragma unroll
  for (int k = 0; k < 8; k += 2) {
    unsigned code[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned size = half2_min(z[k + j], six), magic = magic_of(size, octave, steps);
      const unsigned sum = half2_fma(size, inverse, magic), negative = half2_sub(magic, sum);
      const unsigned difference = half2_fma(size, rest, half2_fma(size, inverse, negative));
      // Ties are magic / 2560 away; a 256th less is four times what the difference may err.
      near = half2_max(near, half2_fma(magic, 0x8e608e60u, half2_abs(difference)));
      code[j] = sum + (magic >> 9);  // the low bits count steps; two codes are skipped for each doubling
    }
    const unsigned a = Input::plus_zero(pairs[k]), b = Input::plus_zero(pairs[k + 1]);  // the code of -0 has no sign
    const unsigned four = (bytes(code[0], code[1], 0x6420) & 0x07070707u) | (bytes(a, b, 0x7531) >> 4 & 0x08080808u);
    half[k / 2] = four + (four >> 4);  // codes 0 and 1 in byte 0, 2 and 3 in byte 2
  }
  *to = make_uint2(bytes(half[0], half[1], 0x6420), bytes(half[2], half[3], 0x6420));
  return (~near & 0x80008000u) == 0;
}

// Finishes a block if f16 can tell its best scale and codes, and gives 0; or gives the candidates that may be the best.
template <typename Input, int kSearch>
__device__ unsigned quick_block(const u8* weight, uint2* codes, u8* scales, unsigned block, const Row* rows,
                                float outer, float outer_mantissa, float six_outer, float inverse_six_outer) {
  const uint4* from = reinterpret_cast<const uint4*>(weight) + 2ll * block;
  const uint4 a = from[0], b = from[1];
  const unsigned pairs[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  unsigned z[8], top = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    z[k] = pairs[k] & 0x7fff7fffu;
    top = larger_u16(top, z[k]);
  }
  if (top == 0) {
    codes[block] = make_uint2(0, 0);
    scales[block] = 0x38;  // 1
    return 0;
  }
  constexpr unsigned kAll = kSearch == kMax ? 1 : kSearch == kFourSix ? 3 : (1 << kCandidates) - 1;
  const float amax = Input::low(max(top & 0xffff, top >> 16));
  const float scale = divide(amax, six_outer, inverse_six_outer);
  // Scales below 10's have candidates that are subnormal; far above 448 weights clip. NaN is neither.
  if (!(amax > 0x1p-80f && scale >= 1.2f * 0x1p-6f && scale <= 460.0f)) return kAll;
  const unsigned first = normal_e4m3_code(fminf(scale, 448.0f));
  if (first < 10) return kAll;

  // z = weight / 2^(4 + exponents of the code and of outer): at most 1.7, and t = 6 has z of 0.3 or more.
  const int exponent = static_cast<int>((__float_as_uint(outer) >> 23) + (first >> 3)) - 127 - 7 + 4;
#pragma unroll
  for (int k = 0; k < 8; ++k) z[k] = Input::over_power(z[k], exponent);
  const Row& row = rows[row_of(first)];
  unsigned code = first, mask = 1;
  if constexpr (kSearch == kMse) {
    mask = contenders<kMse>(z, row, outer_mantissa, 0);
    code = candidate(first, __ffs(mask) - 1);
  }
  if constexpr (kSearch == kFourSix) {
    const unsigned second = normal_e4m3_code(fminf(divide(1.5f * amax, six_outer, inverse_six_outer), 448.0f));
    mask = contenders<kFourSix>(z, row, outer_mantissa, second - first);
    if (mask == 2) code = second;
  }
  const int i = static_cast<int>(code - first) - kLeast;
  uint2 packed;
  if (mask & (mask - 1) || !quick_codes<Input>(pairs, z, row, i, &packed)) return mask;
  codes[block] = packed;
  scales[block] = code;
  return 0;
}

template <typename Input, int kSearch>
__device__ void search_exactly(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) {
  const float outer = *global_scale;
  const unsigned all = kSearch == kMax ? 1u : kSearch == kFourSix ? 3u : (1u << kCandidates) - 1;
  for (unsigned block = blockIdx.x * kThreads + threadIdx.x; block < blocks; block += gridDim.x * kThreads) {
    exact_block<Input, kSearch>(weight, codes, scales, block, all, outer);
  }
}

template <typename Input, int kSearch>
__device__ void search_quickly(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) {
  __shared__ Row rows[kRows];
  __shared__ uint2 queues[kWarps][64];  // block, candidates
  const float outer = *global_scale;
  if (!usual(outer)) {
    search_exactly<Input, kSearch>(weight, global_scale, codes, scales, blocks);
    return;
  }
  if (threadIdx.x < kRows) rows[threadIdx.x].off = 0;
  __syncthreads();
  const float outer_mantissa = __uint_as_float((__float_as_uint(outer) & 0x7fffffu) | 0x3f800000u);
  if (threadIdx.x < kRows * kCandidates) fill_row(rows, threadIdx.x, outer_mantissa);
  __syncthreads();

  const float six_outer = __fmul_rn(6.0f, outer), inverse_six_outer = __fdiv_rn(1.0f, six_outer);
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  uint2* queue = queues[warp];
  unsigned waiting = 0;
  for (unsigned begin = (blockIdx.x * kWarps + warp) * 32; begin < blocks; begin += gridDim.x * kThreads) {
    const unsigned block = begin + lane;
    unsigned mask = 0;
    if (block < blocks) {
      mask = quick_block<Input, kSearch>(weight, codes, scales, block, rows, outer, outer_mantissa, six_outer,
                                         inverse_six_outer);
    }
    const unsigned left = __ballot_sync(~0u, mask != 0);
    if (mask) queue[waiting + __popc(left & ((1u << lane) - 1))] = make_uint2(block, mask);
    waiting += __popc(left);
    const bool last = blocks - begin <= gridDim.x * kThreads;
    __syncwarp();
    while (waiting >= 32 || (last && waiting)) {
      const unsigned now = min(waiting, 32u);
      waiting -= now;
      if (lane < now) {
        const uint2 item = queue[waiting + lane];
        exact_block<Input, kSearch>(weight, codes, scales, item.x, item.y, outer);
      }
      __syncwarp();
    }
  }
}

// Sums of squared errors and of squared weights over kErrorBlocks blocks a thread, two f64 each thread block: squares
// as f32 has them, added up in one order whatever the GPU.
template <typename Input>
__device__ void error_sums(const u8* weight, const float* global_scale, const uint2* codes, const u8* scales,
                           double* sums, unsigned blocks) {
  __shared__ double shared[2][kWarps];
  const float outer = *global_scale;
  double error = 0, size = 0;
#pragma unroll 1
  for (int i = 0; i < kErrorBlocks; ++i) {
    const unsigned block = (blockIdx.x * kErrorBlocks + i) * kThreads + threadIdx.x;
    if (block >= blocks) break;
    float x[16];
    load<Input>(x, weight, block);
    const uint2 code = codes[block];
    const unsigned scale = scales[block];
    const float magnitude = __fmul_rn(e4m3_value(scale & 0x7f), outer), value = scale >> 7 ? -magnitude : magnitude;
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const unsigned bits = (k < 8 ? code.x : code.y) >> (4 * (k % 8));
      // Bits of e2m1 as those of an f32 that is 2^-126 of it; both factors are powers of two.
      const float e2m1 = __uint_as_float((bits & 7) << 22 | (bits & 8) << 28) * 0x1p126f;
      const float difference = __fsub_rn(__fmul_rn(e2m1, value), x[k]);
      error += static_cast<double>(__fmul_rn(difference, difference));
      size += static_cast<double>(__fmul_rn(x[k], x[k]));
    }
  }
  for (int step = 16; step; step /= 2) {
    error += __shfl_down_sync(~0u, error, step);
    size += __shfl_down_sync(~0u, size, step);
  }
  if (threadIdx.x % 32 == 0) shared[0][threadIdx.x / 32] = error, shared[1][threadIdx.x / 32] = size;
  __syncthreads();
  if (threadIdx.x < 2) {
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared[threadIdx.x][warp];
    sums[2 * blockIdx.x + threadIdx.x] = total;
  }
}

// `blocks_each`: thread blocks of a multiprocessor, the launcher's BLOCKS.
#define KERNEL(name, blocks_each, how)                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads, blocks_each)                                 \
      name(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) { \
    how(weight, global_scale, codes, scales, blocks);                                                 \
  }

KERNEL(smxx_nvfp4_search_bf16_max, 8, (search_quickly<Bf16, kMax>))
KERNEL(smxx_nvfp4_search_f16_max, 8, (search_quickly<F16, kMax>))
KERNEL(smxx_nvfp4_search_f32_max, 8, (search_exactly<F32, kMax>))
KERNEL(smxx_nvfp4_search_bf16_four_six, 6, (search_quickly<Bf16, kFourSix>))
KERNEL(smxx_nvfp4_search_f16_four_six, 6, (search_quickly<F16, kFourSix>))
KERNEL(smxx_nvfp4_search_f32_four_six, 6, (search_exactly<F32, kFourSix>))
KERNEL(smxx_nvfp4_search_bf16_mse, 5, (search_quickly<Bf16, kMse>))
KERNEL(smxx_nvfp4_search_f16_mse, 5, (search_quickly<F16, kMse>))
KERNEL(smxx_nvfp4_search_f32_mse, 5, (search_exactly<F32, kMse>))

#define ERROR(name, Input)                                                                                 \
  extern "C" __global__ void __launch_bounds__(kThreads)                                                   \
      name(const u8* weight, const float* global_scale, const uint2* codes, const u8* scales, double* sums, \
           unsigned blocks) {                                                                              \
    error_sums<Input>(weight, global_scale, codes, scales, sums, blocks);                                  \
  }

ERROR(smxx_nvfp4_search_error_bf16, Bf16)
ERROR(smxx_nvfp4_search_error_f16, F16)
ERROR(smxx_nvfp4_search_error_f32, F32)
