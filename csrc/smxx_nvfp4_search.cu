// NVFP4 block scales and codes of a weight by the searches of step_kernels/nvfp4.py, with its bits: `max`, `four-six`
// and `mse`, the best of nine scales around `max`'s. And what they lose: sums of squares.
//
// Tile: a thread takes a block of 16 weights, a warp 32 neighbouring blocks. One thread block fills a multiprocessor; its
// warps, which differ in speed, take tiles as they get to them, and load one ahead.
// Search: dividing and rounding in f32 for nine scales costs 150 instructions a weight. bf16 weights have the errors in
// f16 first, two weights an instruction, 40 instructions a weight with the codes, and a bound on what the errors err:
// that leaves one scale to 89 % of Gaussian blocks. The others wait in a queue of their warp until they are 32, a full
// warp's work; then f32 compares the scales that are left as the specification says. f16 and f32 weights have f32
// alone.
// What holds `mse` on an H200: ports of registers, two reads a clock of a scheduler. A warp's tile is 715 instructions,
// which read 1360 registers and take 920 clocks. `max` is held by memory.
// Bytes: of 16 weights 32 (64 in f32) in, 9 out.
// Waiting: none but a warp's own.
//
// Why f16 is enough for codes. bf16 numbers are 2^-8 apart, so that a factor of 11 bits is found (`Row`) by which all
// of them round as the quotients do, but for one mantissa of a scale in 300, whose blocks are left to f32.
// Why it is enough for errors. With q, the rounded z / scale, the square root of sum (z - q * scale)^2 is a length, and
// a scale that is off by a factor 1 + e moves it by e |q * scale| at most, which is |z| and that length at most. f16's
// roundings of differences, squares and sums move the sum by kRounding of itself. What the two smallest sums may err
// together is kBoth times as much.
using u8 = unsigned char;
using u16 = unsigned short;

constexpr int kErrorThreads = 128, kErrorBlocks = 4;  // the launcher's ERROR_THREADS and ERROR_BLOCKS
constexpr int kCandidates = 9;
constexpr int kLeast = -2;  // the first candidate's offset from `max`'s scale code, the others follow it
constexpr int kMax = 0, kFourSix = 1, kMse = 2;
__device__ constexpr int kThreads[] = {1024, 768, 640};  // the launcher's THREADS, as registers allow
constexpr unsigned kMost = 0x7e;          // e4m3's 448; one more is NaN
constexpr float kRounding = 0.0054f;      // 2^-11 for each of 9 sums, and twice for the difference that is squared
constexpr float kBoth = 2.05f;
constexpr float kFloor = 0x1p-11f;        // for f16's subnormals, where all weights lie on the grid
constexpr unsigned kSteps = 0x60d060d0u;  // 616 in f16, whose neighbours are 0.5 away: adding it rounds

// --- instructions
__device__ inline unsigned half2_fma(unsigned a, unsigned b, unsigned c) {
  unsigned d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Two bf16 numbers; -0 becomes 0.
__device__ inline unsigned plus_zero(unsigned a) {
  unsigned d;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(0x3f803f80u), "r"(0));
  return d;
}
__device__ inline unsigned half2_add(unsigned a, unsigned b) {
  unsigned d;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
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
// The larger of the two, into *a; of numbers from 0 on, whose bits are ordered as they are.
__device__ inline void raise(float* a, float b) { atomicMax(reinterpret_cast<unsigned*>(a), __float_as_uint(b)); }
// --- arithmetic

__device__ inline float halves_sum(unsigned pair) { return half_float(pair & 0xffff) + half_float(pair >> 16); }

struct Bf16 {
  static constexpr int kBytes = 2;
  static __device__ float at(const u8* x, long long i) { return low(reinterpret_cast<const u16*>(x)[i]); }
  static __device__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ float high(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
};
struct F16 {
  static constexpr int kBytes = 2;
  static __device__ float at(const u8* x, long long i) { return low(reinterpret_cast<const u16*>(x)[i]); }
  static __device__ float low(unsigned pair) { return half_float(pair & 0xffff); }
  static __device__ float high(unsigned pair) { return half_float(pair >> 16); }
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

// A block as the specification has it. This one for weights and global scales within `divide`'s bounds; x and amax are
// sizes, `negative` has the signs.
template <int kSearch>
__device__ inline void usual_block(const float (&x)[16], unsigned negative, float amax, uint2* codes, u8* scales,
                                   unsigned block, float outer) {
  unsigned best = first_code(amax, 1.0f, outer);
  if constexpr (kSearch != kMax) {
    constexpr int kCount = kSearch == kMse ? kCandidates : 2;
    const unsigned first = best, second = kSearch == kFourSix ? first_code(amax, 1.5f, outer) : 0;
    float y[16], least = 0;
    const float inverse = __fdiv_rn(1.0f, outer);
#pragma unroll
    for (int k = 0; k < 16; ++k) y[k] = divide(x[k], outer, inverse);
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const unsigned code = kSearch == kMse ? candidate(first, i) : i ? second : first;
      const float scale = e4m3_value(code), d = __fmul_rn(scale, outer), r = __fdiv_rn(1.0f, d);
      float total = 0;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const float rounded = round_e2m1(divide(x[k], d, r));
        const float error = __fsub_rn(__fmul_rn(rounded, scale), y[k]), squared = __fmul_rn(error, error);
        total = k ? __fadd_rn(total, squared) : squared;
      }
      if (i == 0 || total < least) best = code, least = total;
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
                                     float outer) {
  const long long from = 16ll * block;
  unsigned best = first_code(amax, 1.0f, outer);
  if constexpr (kSearch != kMax) {
    constexpr int kCount = kSearch == kMse ? kCandidates : 2;
    const unsigned first = best, second = kSearch == kFourSix ? first_code(amax, 1.5f, outer) : 0;
    float least = 0;
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
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
      if (i == 0 || total < least) best = code, least = total;
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
__device__ inline void exact_block(const u8* weight, uint2* codes, u8* scales, unsigned block, float outer) {
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
    usual_block<kSearch>(x, negative, amax, codes, scales, block, outer);
  } else {
    unusual_block<Input, kSearch>(weight, amax, codes, scales, block, outer);
  }
}

// What the candidates around a scale code have in common for all blocks whose code has the same mantissa: in units of
// 2^exponent of the code and of outer, a scale is 0.8 to 6.5, z = weight is 24 at most and t = z / scale.
struct __align__(16) Row {
  unsigned inverse[kCandidates];     // f16 twice, as all unsigned here but `unfit`; z * inverse rounds as t but at ties
  unsigned scale[kCandidates];       // negative; far too large for one beyond e4m3
  unsigned first[kCandidates];       // z * first, to f16, * second has the code of t, ties too
  unsigned second[kCandidates];
  unsigned octave[kCandidates / 3];  // z * octave is 1024 or a little more where steps of t grow from 0.5 to 1
  unsigned least;                    // z * octave is 512 or more from here on
  unsigned most;                     // up to here t is 6.9, of the second candidate 5.9
  unsigned steps;                    // kSteps, which the compiler may not know: `and`, `or` of two constants take two
  float off;                         // the most that a scale is off, as a factor
  unsigned unfit;                    // candidates, as bits, for which there is no such product
  unsigned unused[24];               // the first eight rows begin in different 16 bytes of 128: no bank conflicts
};
constexpr int kRows = 8 + 6;  // a row for each mantissa; one for each of the six largest codes

__device__ inline int row_of(unsigned first) { return first > kMost - 6 ? first - (kMost - 6) + 7 : first & 7; }

// Which of the bf16 numbers z next to each tie have a quotient above it, as bits; << 8 those for which it is the tie.
// Other z are on their own side whatever the quotient's last bits, ties times a power of two go to an even code on the
// same side.
template <typename Quotient>
__device__ inline unsigned sides(float d, Quotient quotient) {
  unsigned above = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float tie = 0.25f + 0.5f * (i / 2);
    const float t = quotient(__uint_as_float((__float_as_uint(tie * d) & 0xffff0000u) + i % 2 * 0x10000));
    above |= (t > tie || (t == tie && i / 2 % 2) ? 1u : 0u) << i;
    above |= (fabsf(t - tie) < 0x1p-20f ? 0x100u : 0u) << i;
  }
  return above;
}

// The inverse nearest to a scale's, the one above, the one below: each by itself, and rounding before.
constexpr int kTries = 6;
__device__ inline unsigned tried_inverse(unsigned nearest, int tried) {
  return nearest + (tried / 2 == 1 ? 0x00010001u : tried / 2 == 2 ? 0xfffeffffu : 0);
}

// Bits of `fits`, of a mantissa: that z times an inverse rounds as t but at ties, and << kTries that it does so there.
__device__ inline void try_inverse(unsigned* fits, int thread, float outer_mantissa) {
  const int mantissa = thread / kTries, tried = thread % kTries;
  const float d = __fmul_rn(1.0f + mantissa * 0.125f, outer_mantissa), inverse = __fdiv_rn(1.0f, d);
  const float factor = half_float(tried_inverse(half2_of(inverse, inverse), tried) & 0xffff);
  const unsigned wanted = sides(d, [=](float z) { return divide(z, d, inverse); });
  const unsigned got = sides(d, [=](float z) {
    const float product = z * factor;  // exact, of 8 and 11 bits
    return tried % 2 ? half_float(half2_of(product, product) & 0xffff) : product;
  });
  const unsigned wrong = (got ^ wanted) & 0xff;
  const bool rounds = tried % 2 == 0 && (wrong & ~(wanted >> 8)) == 0;
  atomicOr(&fits[mantissa], (rounds ? 1u << tried : 0) | (wrong ? 0 : 1u << (kTries + tried)));
}

__device__ inline void fill_row(Row* rows, const unsigned* fits, int thread, float outer_mantissa) {
  const int at = thread / kCandidates, i = thread % kCandidates;
  Row& row = rows[at];
  const int mantissa = at < 8 ? at : at - 7, position = mantissa + i + kLeast;
  const float scale = position >= 8 ? position * 0.25f : 1.0f + position * (position < 0 ? 0.0625f : 0.125f);
  const float d = __fmul_rn(scale, outer_mantissa), inverse = __fdiv_rn(1.0f, d);
  const unsigned nearest = half2_of(inverse, inverse), one = 0x3c003c00u, fit = fits[position & 7];
  const int rounds = __ffs(fit & ((1 << kTries) - 1)) - 1, encodes = __ffs(fit >> kTries) - 1;  // -1: none
  const unsigned factor = tried_inverse(nearest, encodes);
  row.inverse[i] = tried_inverse(nearest, rounds);
  row.first[i] = encodes % 2 ? factor : one;
  row.second[i] = encodes % 2 ? one : factor;
  const bool beyond = at >= 8 && at + i + kLeast > 8 + 5;
  row.scale[i] = beyond ? 0xe400e400u : half2_of(-d, -d);
  float off = beyond ? 0 : fabsf(half_float(row.scale[i] & 0xffff) + d) * inverse;
  if (rounds < 0) off += 2.0f * fabsf(half_float(nearest & 0xffff) - inverse) * d;  // some t to the next but one
  if (encodes < 0) atomicOr(&row.unfit, 1u << i);
  raise(&row.off, off * 1.01f + 0x1p-20f);
  // Steps of t may grow anywhere from 1.75 to 2.25 and from 3.5 to 4.5: there both roundings agree. So one place serves
  // three candidates: 1.984 for the middle one, or the bf16 number next to it. No z below has a sum beyond 1024.
  if (i % 3 == 1) {
    const float grow = __uint_as_float((__float_as_uint(1.984f * d) + 0x8000u) & 0xffff0000u);
    const float octave = __fdiv_rn(1025.0f, grow);
    row.octave[i / 3] = half2_of(octave, octave);
    if (i == 7) row.least = half2_of(0.52f * grow, 0.52f * grow);
  }
  if (i == 0) row.most = half2_of(6.9f * d, 6.9f * d);
  row.steps = kSteps;
}

// Sizes of 16 bf16 weights, `top` the largest; their signs in bits 7, 15, 23 and 31 of a word, a 0 has none.
__device__ inline void take_apart(const unsigned (&pairs)[8], unsigned (&sizes)[8], unsigned (&signs)[4],
                                  unsigned& top) {
  top = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    sizes[k] = pairs[k] & 0x7fff7fffu;
    top = larger_u16(top, sizes[k]);
  }
#pragma unroll
  for (int k = 0; k < 4; ++k) signs[k] = bytes(plus_zero(pairs[2 * k]), plus_zero(pairs[2 * k + 1]), 0x7531);
}

// bf16 sizes -> z, f16: over 2^exponent, by moving bits; below 2^-14 zero.
__device__ inline void scale_sizes(unsigned (&z)[8], const unsigned (&sizes)[8], int exponent) {
  const unsigned zero = max(exponent + 112, 0) * 0x00800080u;  // the bits that become f16's zero
#pragma unroll
  for (int k = 0; k < 8; ++k) z[k] = (larger_u16(sizes[k], zero) << 3) - (zero << 3);
}

__device__ inline int exponent_of(unsigned first, float outer) {
  return static_cast<int>((__float_as_uint(outer) >> 23) + (first >> 3)) - 127 - 7;
}

// 16 sizes z -> the sum of (z - scale * round(t))^2 over even and over odd ones, in f16. `clipped`: z, or less where t
// is above 7; `magic`: a number whose neighbours are as far away as t's steps are wide.
__device__ inline unsigned quick_error(const unsigned (&z)[8], const unsigned (&clipped)[8],
                                       const unsigned (&magic)[8], const Row& row, int i) {
  const unsigned inverse = row.inverse[i], scale = row.scale[i];
  unsigned total = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const unsigned rounded = half2_sub(half2_fma(clipped[k], inverse, magic[k]), magic[k]);
    const unsigned difference = half2_fma(rounded, scale, z[k]);
    total = half2_fma(difference, difference, total);
  }
  return total;
}

__device__ inline unsigned both_sums(unsigned a, unsigned b) {
  return half2_add(bytes(a, b, 0x5410), bytes(a, b, 0x7632));
}

// The largest error sum of a candidate that may still have the least.
__device__ inline float error_limit(float least, const unsigned (&z)[8], float off) {
  unsigned squares = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) squares = half2_fma(z[k], z[k], squares);
  const float size = halves_sum(squares) * 1.006f, shift = 4.2f * off;
  const float moved = shift * (least + square_root(least * size) + off * size);
  return least * (1.0006f + kBoth * kRounding) + moved + kFloor;  // 2^-11 more for its own rounding to f16
}

// The candidates that may have the least error, as bits.
__device__ inline unsigned contenders(const unsigned (&z)[8], const Row& row) {
  unsigned floored[8], clipped[8], magic[8], error[kCandidates], pair[5];
#pragma unroll
  for (int k = 0; k < 8; ++k) floored[k] = half2_max(z[k], row.least), clipped[k] = half2_min(z[k], row.most);
#pragma unroll
  for (int i = 0; i < kCandidates; ++i) {
    if (i % 3 == 0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) magic[k] = half2_mul(floored[k], row.octave[i / 3]);
    }
    // Scales from `max`'s on keep t below 7.
    error[i] = i + kLeast < 0 ? quick_error(z, clipped, magic, row, i) : quick_error(z, z, magic, row, i);
  }
  pair[4] = both_sums(error[4], 0x7c007c00u);
  unsigned least = pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pair[i] = both_sums(error[i], error[i + 5]);
    least = half2_min(least, pair[i]);
  }
  const float limit = error_limit(fminf(half_float(least & 0xffff), half_float(least >> 16)), z, row.off);
  const unsigned most = half2_of(limit, limit);
  unsigned beyond = 0;
#pragma unroll
  for (int i = 0; i < 5; ++i) beyond = beyond >> 1 | (half2_sub(most, pair[i]) & 0x80008000u);
  return (~beyond >> 11 & 0x1f) | (~beyond >> 22 & 0x3e0);
}

// As `contenders`, of candidates `a` and `b` alone.
__device__ inline unsigned contenders_of_two(const unsigned (&z)[8], const Row& row, int a, int b) {
  float error[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int at = i ? b : a;
    unsigned magic[8];
#pragma unroll
    for (int k = 0; k < 8; ++k) magic[k] = half2_mul(half2_max(z[k], row.least), row.octave[i ? at / 3 : 0]);
    error[i] = halves_sum(quick_error(z, z, magic, row, at));
  }
  const float limit = error_limit(fminf(error[0], error[1]), z, row.off);
  return (error[0] <= limit ? 1u << a : 0) | (error[1] <= limit ? 1u << b : 0);
}

// 616 where t's steps are 0.5, 1232 and 2464 for 1 and 2.
__device__ inline unsigned magic_of(unsigned z, unsigned inverse, unsigned steps) {
  const unsigned octave = half2_mul(inverse, 0x02000200u);  // 2^-15
  return (half2_mul(z, octave) & 0x7c007c00u) | steps;
}

// Codes of 16 weights for the row's candidate i, which must fit.
__device__ inline uint2 quick_codes(const unsigned (&signs)[4], const unsigned (&z)[8], const Row& row, int i) {
  const unsigned inverse = row.inverse[i], first = row.first[i], second = row.second[i], steps = row.steps;
  const unsigned six = half2_mul(row.scale[i], 0xc600c600u);
  unsigned half[4];
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    unsigned code[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const unsigned size = half2_min(z[2 * k + j], six), magic = magic_of(size, inverse, steps);
      // The low byte counts steps from -48 on; `magic` >> 9 is 48 there, and two more for each doubling of the step.
      code[j] = half2_fma(half2_mul(size, first), second, magic) + (magic >> 9);
    }
    const unsigned four = bytes(code[0], code[1], 0x6420) | (signs[k] >> 4 & 0x08080808u);
    half[k] = four + (four >> 4);  // codes 0 and 1 in byte 0, 2 and 3 in byte 2
  }
  return make_uint2(bytes(half[0], half[1], 0x6420), bytes(half[2], half[3], 0x6420));
}

__device__ inline unsigned code_of(unsigned first, int i) { return min(first + i - 2, kMost); }

__device__ inline void load_pairs(unsigned (&pairs)[8], const u8* weight, unsigned block) {
  const uint4* from = reinterpret_cast<const uint4*>(weight) + 2ll * block;
  const uint4 a = from[0], b = from[1];
  const unsigned words[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
  for (int k = 0; k < 8; ++k) pairs[k] = words[k];
}

constexpr unsigned kExactly = ~0u;

// Finishes a block if f16 can tell its best scale, and gives 0. Or gives the candidates that may be the best as bits,
// and the first one's code << 16; or kExactly.
template <int kSearch>
__device__ unsigned quick_block(const unsigned (&sizes)[8], const unsigned (&signs)[4], unsigned top, uint2* codes,
                                u8* scales, unsigned block, const Row* rows, float outer, float six_outer,
                                float inverse_six_outer) {
  if (top == 0) {
    codes[block] = make_uint2(0, 0);
    scales[block] = 0x38;  // 1
    return 0;
  }
  const float amax = Bf16::low(max(top & 0xffff, top >> 16));
  const float scale = divide(amax, six_outer, inverse_six_outer);
  // Scales below 10's have candidates that are subnormal; far above 448 weights clip. NaN is neither.
  if (!(amax > 0x1p-80f && scale >= 1.2f * 0x1p-6f && scale <= 460.0f)) return kExactly;
  const unsigned first = normal_e4m3_code(fminf(scale, 448.0f));
  if (first < 10) return kExactly;

  unsigned z[8];
  scale_sizes(z, sizes, exponent_of(first, outer));
  const Row& row = rows[row_of(first)];
  unsigned mask = 1 << -kLeast;
  if constexpr (kSearch == kMse) mask = contenders(z, row);
  if constexpr (kSearch == kFourSix) {
    const unsigned second = normal_e4m3_code(fminf(divide(1.5f * amax, six_outer, inverse_six_outer), 448.0f));
    mask = contenders_of_two(z, row, -kLeast, static_cast<int>(second - first) - kLeast);
  }
  if (mask & row.unfit) return kExactly;
  if (mask & (mask - 1)) return first << 16 | mask;
  const int i = __ffs(mask) - 1;
  codes[block] = quick_codes(signs, z, row, i);
  scales[block] = code_of(first, i);
  return 0;
}

// Finishes a block whose best scale is one of several: their errors as the specification has them.
__device__ inline void contended_block(const u8* weight, uint2* codes, u8* scales, unsigned block, unsigned first,
                                       unsigned mask, const Row* rows, float outer, float inverse_outer) {
  unsigned pairs[8], sizes[8], signs[4], top, z[8];
  load_pairs(pairs, weight, block);
  take_apart(pairs, sizes, signs, top);
  scale_sizes(z, sizes, exponent_of(first, outer));
  const Row& row = rows[row_of(first)];
  const unsigned steps = row.steps;
  float y[16], least = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    y[2 * k] = divide(Bf16::low(sizes[k]), outer, inverse_outer);
    y[2 * k + 1] = divide(Bf16::high(sizes[k]), outer, inverse_outer);
  }
  int best = -1;
#pragma unroll 1
  for (; mask; mask &= mask - 1) {
    const int i = __ffs(mask) - 1;
    const unsigned inverse = row.inverse[i], first_factor = row.first[i], second = row.second[i];
    const float scale = e4m3_value(code_of(first, i));
    float total = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const unsigned magic = magic_of(z[k], inverse, steps), t = half2_mul(z[k], first_factor);
      const unsigned rounded = half2_min(half2_sub(half2_fma(t, second, magic), magic), 0x46004600u);
      // The products are exact.
      const float low = __fmaf_rn(half_float(rounded & 0xffff), scale, -y[2 * k]);
      const float high = __fmaf_rn(half_float(rounded >> 16), scale, -y[2 * k + 1]);
      const float squared = __fmul_rn(low, low);
      total = __fadd_rn(k ? __fadd_rn(total, squared) : squared, __fmul_rn(high, high));
    }
    // Of equals offset -2 comes after -1 to 2 and -1 after 0 and 1.
    if (best < 0 || total < least || (total == least && best < 2 && i < 5 - best)) best = i, least = total;
  }
  codes[block] = quick_codes(signs, z, row, best);
  scales[block] = code_of(first, best);
}

template <typename Input, int kSearch>
__device__ void search_exactly(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) {
  const float outer = *global_scale;
  const unsigned step = gridDim.x * kThreads[kSearch];
  for (unsigned block = blockIdx.x * kThreads[kSearch] + threadIdx.x; block < blocks; block += step) {
    exact_block<Input, kSearch>(weight, codes, scales, block, outer);
  }
}

template <int kSearch>
__device__ void search_quickly(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) {
  constexpr unsigned kWarps = kThreads[kSearch] / 32;
  __shared__ Row rows[kRows];
  __shared__ unsigned fits[8], taken;   // tiles taken by the thread block's warps
  __shared__ uint2 queues[kWarps][64];  // block, what quick_block gave
  const float outer = *global_scale;
  if (!usual(outer)) {
    search_exactly<Bf16, kSearch>(weight, global_scale, codes, scales, blocks);
    return;
  }
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, tiles = (blocks + 31) / 32;
  unsigned tile = warp * gridDim.x + blockIdx.x, next = tile + kWarps * gridDim.x, pairs[8];
  if (tile * 32 + lane < blocks) load_pairs(pairs, weight, tile * 32 + lane);
  if (threadIdx.x == 0) taken = 2 * kWarps;
  const float outer_mantissa = __uint_as_float((__float_as_uint(outer) & 0x7fffffu) | 0x3f800000u);
  if (threadIdx.x < kRows) rows[threadIdx.x].off = 0, rows[threadIdx.x].unfit = 0;
  if (threadIdx.x < 8) fits[threadIdx.x] = 0;
  __syncthreads();
  if (threadIdx.x < 8 * kTries) try_inverse(fits, threadIdx.x, outer_mantissa);
  __syncthreads();
  if (threadIdx.x < kRows * kCandidates) fill_row(rows, fits, threadIdx.x, outer_mantissa);
  __syncthreads();

  const float six_outer = __fmul_rn(6.0f, outer), inverse_six_outer = __fdiv_rn(1.0f, six_outer);
  const float inverse_outer = __fdiv_rn(1.0f, outer);
  uint2* queue = queues[warp];
  unsigned waiting = 0;
  while (tile < tiles) {
    const unsigned block = tile * 32 + lane;
    unsigned sizes[8], signs[4], top, left = 0, behind = 0;
    if (lane == 0) behind = atomicAdd(&taken, 1);
    take_apart(pairs, sizes, signs, top);
    if (next * 32 + lane < blocks) load_pairs(pairs, weight, next * 32 + lane);
    if (block < blocks) {
      left = quick_block<kSearch>(sizes, signs, top, codes, scales, block, rows, outer, six_outer, inverse_six_outer);
    }
    const unsigned lanes = __ballot_sync(~0u, left != 0);
    if (left) queue[waiting + __popc(lanes & ((1u << lane) - 1))] = make_uint2(block, left);
    waiting += __popc(lanes);
    const bool last = next >= tiles;
    __syncwarp();
    while (waiting >= 32 || (last && waiting)) {
      const unsigned now = min(waiting, 32u);
      waiting -= now;
      if (lane < now) {
        const uint2 item = queue[waiting + lane];
        if (kSearch == kMax || item.y == kExactly) {
          exact_block<Bf16, kSearch>(weight, codes, scales, item.x, outer);
        } else {
          contended_block(weight, codes, scales, item.x, item.y >> 16, item.y & 0xffff, rows, outer, inverse_outer);
        }
      }
      __syncwarp();
    }
    tile = next, next = __shfl_sync(~0u, behind, 0) * gridDim.x + blockIdx.x;
  }
}

// Sums of squared errors and of squared weights over kErrorBlocks blocks a thread, two f64 each thread block: squares
// as f32 has them, added up in one order whatever the GPU.
template <typename Input>
__device__ void error_sums(const u8* weight, const float* global_scale, const uint2* codes, const u8* scales,
                           double* sums, unsigned blocks) {
  __shared__ double shared[2][kErrorThreads / 32];
  const float outer = *global_scale;
  double error = 0, size = 0;
#pragma unroll 1
  for (int i = 0; i < kErrorBlocks; ++i) {
    const unsigned block = (blockIdx.x * kErrorBlocks + i) * kErrorThreads + threadIdx.x;
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
    for (int warp = 0; warp < kErrorThreads / 32; ++warp) total += shared[threadIdx.x][warp];
    sums[2 * blockIdx.x + threadIdx.x] = total;
  }
}

#define KERNEL(name, search, how)                                                                    \
  extern "C" __global__ void __launch_bounds__(kThreads[search], 1)                                  \
      name(const u8* weight, const float* global_scale, uint2* codes, u8* scales, unsigned blocks) { \
    how(weight, global_scale, codes, scales, blocks);                                                \
  }

KERNEL(smxx_nvfp4_search_bf16_max, kMax, (search_quickly<kMax>))
KERNEL(smxx_nvfp4_search_f16_max, kMax, (search_exactly<F16, kMax>))
KERNEL(smxx_nvfp4_search_f32_max, kMax, (search_exactly<F32, kMax>))
KERNEL(smxx_nvfp4_search_bf16_four_six, kFourSix, (search_quickly<kFourSix>))
KERNEL(smxx_nvfp4_search_f16_four_six, kFourSix, (search_exactly<F16, kFourSix>))
KERNEL(smxx_nvfp4_search_f32_four_six, kFourSix, (search_exactly<F32, kFourSix>))
KERNEL(smxx_nvfp4_search_bf16_mse, kMse, (search_quickly<kMse>))
KERNEL(smxx_nvfp4_search_f16_mse, kMse, (search_exactly<F16, kMse>))
KERNEL(smxx_nvfp4_search_f32_mse, kMse, (search_exactly<F32, kMse>))

#define ERROR(name, Input)                                                                                 \
  extern "C" __global__ void __launch_bounds__(kErrorThreads)                                                   \
      name(const u8* weight, const float* global_scale, const uint2* codes, const u8* scales, double* sums, \
           unsigned blocks) {                                                                              \
    error_sums<Input>(weight, global_scale, codes, scales, sums, blocks);                                  \
  }

ERROR(smxx_nvfp4_search_error_bf16, Bf16)
ERROR(smxx_nvfp4_search_error_f16, F16)
ERROR(smxx_nvfp4_search_error_f32, F32)
