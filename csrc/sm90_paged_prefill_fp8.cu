// Attention of many new tokens a request over a paged e4m3 cache with all products in FP8: a mode that its caller asks
// for (step_kernels/fp8_attention.py), as it rounds queries and probabilities to e4m3. Otherwise as the exact one, which
// serves windows in this mode too, being faster there.
//
//   S = q K^T   A = q, e4m3 times a power of two a row, registers; B = keys as they lie
//   O = P V     A = P, e4m3, registers; B = values transposed, [128 of d, then 8 rows of ones][keys]
//
// FP8 operands are K-major: producers transpose values, pairs of bytes by ldmatrix and stmatrix, the bytes of a pair by
// two permutations. Keys lie in the order in which the registers of S become those of P: of 16 keys, thread t of a quad
// has 2 t, 2 t + 1, 8 + 2 t, 9 + 2 t one after the other.
//
// The matrix unit's sums are short (about 14 bits), so those of a tile begin at zero and are added in f32: half of d at
// a time, for registers. The rows of ones give the sum of P as it was rounded: a key that has all the weight then gives
// its value back exactly, and no thread adds up probabilities.
#include "common/paged_sm90_prefill.cuh"

template <int kKeys, bool kSplit = false>
struct Shape : Layout<kKeys, false, kSplit, (kDim + 8) * 128> {
  // Probabilities are kept times 2^7 relative to a power of two, the next above the maximum when it was taken. They may
  // rise to 2^8.8: e4m3 ends at 448. It rounds to zero below 2^-10: keys of 2^-17 of the largest weight are lost.
  static constexpr float kLift = 7.0f;
  static constexpr float kMostRise = 1.8f;
};

__device__ inline u32 four_e4m3(float a, float b, float c, float d) {
  u32 r;
  asm("{ .reg .b16 l, h; cvt.rn.satfinite.e4m3x2.f32 l, %2, %1; cvt.rn.satfinite.e4m3x2.f32 h, %4, %3;"
      " mov.b32 %0, {l, h}; }"
      : "=r"(r)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return r;
}

// Four 8 x 8 matrices of pairs of bytes, each lane's row at its address; transposed on their way to registers.
__device__ inline void load_transposed(u32 at, u32 (&w)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
               : "r"(at)
               : "memory");
}
__device__ inline void store_matrices(u32 at, const u32 (&w)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(w[0]), "r"(w[1]),
               "r"(w[2]), "r"(w[3])
               : "memory");
}

// ---- products ----

#define WGMMA_128(list) \
  WGMMA(128, "32", "e4m3.e4m3", "", list, 64, 65, 66, 67, 68, 69, R16(0), R16(16), R16(32), R16(48))
#define WGMMA_72(list) WGMMA(72, "32", "e4m3.e4m3", "", list, 36, 37, 38, 39, 40, 41, R16(0), R16(16), R4(32))
#define WGMMA_64(list) WGMMA(64, "32", "e4m3.e4m3", "", list, 32, 33, 34, 35, 36, 37, R16(0), R16(16))

// Scores: columns are keys. Outputs: columns are d, 64 of them and 8 ones, or 64.
template <bool kAdd>
__device__ inline void multiply_keys(float (&d)[64], const u32* a, u64 columns) {
  WGMMA_128(D0 D1 D2 D3 D4);
}
template <bool kWithOnes, bool kAdd>
__device__ inline void multiply_values(float (&d)[36], const u32* a, u64 columns) {
  if constexpr (kWithOnes) WGMMA_72(D0 D1 ",%32,%33,%34,%35");
  else WGMMA_64(D0 D1);
}

// ---- four warps make operands of what has landed ----

// Row n of the operand is d = 16 (n / 16) + 2 (n % 8) + n % 16 / 8, so that rows of a matrix lie in different banks;
// the last eight are ones. Keys outside [low, high) become zeros: a probability of zero does not undo a NaN.
template <class S>
__device__ inline void make_values(u32 landed, u32 values, int thread, int low, int high) {
  const int warp = thread / 32, lane = thread % 32, row = lane % 8, key = 2 * (lane % 4);
  const bool has_hidden = low > 0 || high < S::kKeys;
  const auto shown = [&](int at) { return at >= low && at < high; };
  const u32 turned = (lane / 16 ^ row) << 4;
  const u32 to = values + (32 * warp + lane / 8 % 2 * 8 + row) * 128;
#pragma unroll
  for (int block = 0; block < S::kKeys / 32; ++block) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // 16 of d
      u32 pairs[4], w[4];          // pairs of d: keys 2 t, 2 t + 1 of eight after eight
      load_transposed(landed + (32 * block + lane) * 128 + ((2 * warp + i ^ row) << 4), pairs);
      if (has_hidden) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = 32 * block + 8 * j + key;
          pairs[j] &= (shown(at) ? 0xFFFFu : 0) | (shown(at + 1) ? 0xFFFF0000u : 0);
        }
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        w[2 * j] = __byte_perm(pairs[2 * j], pairs[2 * j + 1], 0x6420);
        w[2 * j + 1] = __byte_perm(pairs[2 * j], pairs[2 * j + 1], 0x7531);
      }
      store_matrices(to + i * 16 * 128 + (turned ^ block << 5), w);
    }
  }
  constexpr u32 kOnes = 0x38383838;
  if (thread < 64) store_shared(values + kDim * 128 + thread * 16, make_uint4(kOnes, kOnes, kOnes, kOnes));
}

// ---- two warpgroups: products and softmax of 64 rows each ----

// q as A: 32 of d after 32, thread t has d = 4 t .. 4 t + 3 and 16 further. Rounded after a multiplication by a power
// of two that brings the row's largest into [2^7, 2^8); what undoes it is in the scores' factors.
template <class S>
__device__ inline void load_queries(const Attention& a, const Item& item, int row, int t, float score_factor,
                                    u32 (&q)[4][4], float (&factors)[2]) {
  u32 pairs[2][16];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = min(item.first + row + 8 * r, item.rows - 1), token = at / a.group;
    const int head = item.head * a.group + at - token * a.group;
    const u16* from = a.q + (item.token + token) * a.q_token + head * a.q_head + t * 4;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      pairs[r][2 * i] = load_pair(from + 16 * i);
      pairs[r][2 * i + 1] = load_pair(from + 16 * i + 2);
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) largest = max(largest, max(pairs[r][i] & 0x7FFF, pairs[r][i] >> 16 & 0x7FFF));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const u32 e = max(largest >> 7, 7u);
    float up = __uint_as_float((261 - e) << 23);  // 2^(134 - e)
    const float factor = fabsf(score_factor) * __uint_as_float((e - 7) << 23);
    factors[r] = fmaxf(factor, 0x1p-100f);        // hidden keys' -infinity times zero would be NaN
    if (e == 255) up = __uint_as_float(0x7FC00000);  // infinity or NaN somewhere: the row's whole result is NaN
    if (score_factor < 0.0f) up = -up;  // the maximum is taken before the factor
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const u32 x = pairs[r][2 * i], y = pairs[r][2 * i + 1];
      q[i / 2][i % 2 * 2 + r] =
          four_e4m3(low_bf16(x) * up, high_bf16(x) * up, low_bf16(y) * up, high_bf16(y) * up);
    }
  }
}

// A thread has 4 of each 16 of d, one after the other (make_values).
template <class S>
__device__ inline void write_outputs(const Attention& a, const Item& item, int row, int t, const float (&out)[64],
                                     const float (&shift)[2], const float (&total)[2]) {
  const float v_scale = v_scale_of<S>(a, item.head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float from_zero = shift[r] == kLowest ? 0.0f : shift[r];
    if constexpr (S::kSplit) {
      if (item.slot >= 0) {
        float* to = a.partial + (static_cast<i64>(item.slot) * kRows + row + 8 * r) * kPitch;
        if (t == 0)
          *reinterpret_cast<float2*>(to + kDim) = make_float2(total[r] == 0.0f ? shift[r] : from_zero, total[r]);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float* v = out + 8 * i + 2 * r;
          reinterpret_cast<float4*>(to)[4 * i + t] = make_float4(v[0], v[4], v[1], v[5]);
        }
        continue;
      }
    }
    const int at = item.first + row + 8 * r, in_request = token_of(a, item, row + 8 * r);
    const int token = item.token + in_request, head = item.head * a.group + at - in_request * a.group;
    const i64 query = static_cast<i64>(token) * a.kv_heads * a.group + head;
    const bool is_row = at < item.rows;
    const int last = a.kv_heads * a.group - 1;  // heads end before rows of the last item do
    const float scale = output_scale<S>(a, token, min(head, last), v_scale, from_zero, total[r], is_row && t == 0);
    if (!is_row) continue;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float* v = out + 8 * i + 2 * r;
      reinterpret_cast<uint2*>(a.out + query * kDim)[4 * i + t] =
          make_uint2(pair_bf16(v[0] * scale, v[4] * scale), pair_bf16(v[1] * scale, v[5] * scale));
    }
  }
}

// 2^x without the unit for it, within 1.4e-4, and not below 2^-30; e4m3 has 4 bits and ends at 2^-10.
__device__ inline float exp2_by_polynomial(float x) {
  asm("max.NaN.f32 %0, %0, 0fC1F00000;" : "+f"(x));
  const float shifted = x + 0x1.8p23f, part = x - (shifted - 0x1.8p23f);  // of x, in [-0.5, 0.5]
  const float power = __uint_as_float((__float_as_uint(shifted) << 23) + 0x3F800000);
  return fmaf(fmaf(fmaf(0.0550288f, part, 0.2422588f), part, 0.6932532f), part, 0.9999513f) * power;
}

// Scores to probabilities * 2^kLift, relative to 2^shift; those are whole and rise only when they must. Returns whether
// they rose: sums so far are then to be multiplied by `before`.
template <class S>
__device__ inline bool soften(float (&s)[S::kKeys / 2], const float (&factor)[2], float (&shift)[2], float (&before)[2],
                              u32 (&p)[S::kKeys / 8]) {
  float top[2];  // of this thread's keys
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float some[4];  // one chain would wait for itself
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
      const float pair = fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
      some[j % 4] = j < 4 ? pair : fmaxf(some[j % 4], pair);
    }
    top[r] = fmaxf(fmaxf(some[0], some[1]), fmaxf(some[2], some[3])) * factor[r];
  }
  const bool rises = __any_sync(kAllLanes, top[0] - shift[0] > S::kMostRise || top[1] - shift[1] > S::kMostRise);
  if (rises) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], step));
      top[r] = fmaxf(ceilf(top[r]), shift[r]);
      before[r] = exp2_of(shift[r] - top[r]);
      shift[r] = top[r];
    }
  }
  float minus[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) minus[r] = S::kLift - (shift[r] == kLowest ? 0.0f : shift[r]);
#pragma unroll
  for (int i = 0; i < S::kKeys / 8; ++i) {
    const int r = i % 2, first = i / 2 * 8 + 2 * r;
    float x[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float exponent = fmaf(s[first + j / 2 * 4 + j % 2], factor[r], minus[r]);
      x[j] = (4 * i + j) % 8 == 7 ? exp2_by_polynomial(exponent) : exp2_of(exponent);
    }
    p[i] = four_e4m3(x[0], x[1], x[2], x[3]);
  }
  return rises;
}

// What the next product overwrites need not be kept until then.
template <int kValues>
__device__ inline void forget(float (&x)[kValues]) {
#pragma unroll
  for (int i = 0; i < kValues; ++i) asm volatile("" : "=f"(x[i]));
}

template <class S>
__device__ inline void attend(const Attention& a, u32 shared, const Barriers<S>& barriers) {
  constexpr int kSteps = S::kKeys / 32;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32, t = lane % 4;
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpgroup) - 1, 0);
  const int row = group * 64 + thread / 32 * 16 + lane / 4;
  if (group == 1) announce(1, 2 * kWarpgroup);  // the first go is the first warpgroup's

  Announced<S> announced;
  int slot = 0, key_slot = 0;
  u32 parity = 0, key_parity = 0;
  u32 q[4][4], p[S::kKeys / 8], next_p[S::kKeys / 8];
  float s[S::kKeys / 2], out[64], part[36];  // part: of a tile, half of the outputs and the sum of P
  float factor[2], shift[2], total[2];
  int tiles, unmasked, unmasked_stop;  // tiles from one to the other have no key that is hidden from a row
  bool are_more = false;
  // Zero, which ptxas does not know: next_p | p & none keeps registers of p from being used for anything else until the
  // products that read them have been waited for (ptxas took some).
  const u32 none = static_cast<u32>(a.requests) >> 31;
  const auto ask_scores = [&] {
    const u32 keys = uniform(shared + S::kKeysAt + key_slot * S::kKeyBytes);
    forget(s);
    multiply_keys<false>(s, q[0], descriptor<16>(keys));
#pragma unroll
    for (int i = 1; i < 4; ++i) multiply_keys<true>(s, q[i], descriptor<16>(keys + i * 32));
    wgmma_commit();
  };
  const auto ask_first_half = [&] {
    const u32 values = uniform(shared + slot * S::kBytes);
    forget(part);
    multiply_values<false, false>(part, p, descriptor<16>(values));
#pragma unroll
    for (int i = 1; i < kSteps; ++i) multiply_values<false, true>(part, p + 4 * i, descriptor<16>(values + i * 32));
    wgmma_commit();
  };
  const auto ask_second_half = [&] {
    const u32 values = uniform(shared + slot * S::kBytes + 64 * 128);
    forget(part);
    multiply_values<true, false>(part, p, descriptor<16>(values));
#pragma unroll
    for (int i = 1; i < kSteps; ++i) multiply_values<true, true>(part, p + 4 * i, descriptor<16>(values + i * 32));
    wgmma_commit();
  };
  const auto add_first_half = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) out[i] += part[i];
  };
  const auto add_second_half = [&] {
#pragma unroll
    for (int i = 0; i < 32; ++i) out[32 + i] += part[i];
#pragma unroll
    for (int r = 0; r < 2; ++r) total[r] += part[32 + 2 * r];
  };
  const auto take_item = [&] {
    const Item item = announced.last(shared);
    const float score_factor = a.score_scale * __ldg(a.k_scale + item.head * a.k_scale_head);
    load_queries<S>(a, item, row, t, score_factor, q, factor);
  };
  const auto begin_item = [&] {
    const Item item = announced.last(shared);
    tiles = item.tiles;
    unmasked_stop = (item.low + 1 - item.base) / S::kKeys;
    unmasked = item.high < item.base + a.window ? 0 : (item.high - a.window - item.base) / S::kKeys + 1;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = kLowest;
      total[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 36; ++i) part[i] = 0.0f;
  };

  are_more = announced.next(shared, barriers).tiles > 0;
  if (!are_more) return;
  take_item();
  barrier_wait(barriers.landed_keys(key_slot), key_parity);
  wgmma_fence();
  ask_scores();
  wgmma_wait<0>(s);
  begin_item();
  for (int done = -1;;) {
    // Under way are scores of the next tile, this item's or the next one's, then half the outputs of the one before.
    wgmma_wait<1>(s);
#pragma unroll
    for (int i = 0; i < 4; ++i) hold(q[i]);
    if (lane == 0) barrier_arrive(barriers.empty_keys(key_slot));
    advance<S::kLanding>(key_slot, key_parity);
    if (tiles == 0) {
      wgmma_wait<0>(part);
      add_second_half();
      write_outputs<S>(a, announced.last(shared, 1), row, t, out, shift, total);
      begin_item();
    }
    if (--tiles == 0) are_more = announced.next(shared, barriers).tiles > 0;
    if (tiles < unmasked || tiles >= unmasked_stop) {
      const Item item = announced.last(shared, tiles == 0);
      const int position[2] = {item.position + token_of(a, item, row), item.position + token_of(a, item, row + 8)};
      hide<S>(s, position, item.base + tiles * S::kKeys + 2 * t, a.window);
    }
    float before[2];
    const bool rises = soften<S>(s, factor, shift, before, next_p);
    hold(next_p);  // has been computed here: the compiler would put that off behind the wait that follows
    const bool is_last = tiles == 0 && !are_more;
    if (tiles == 0 && are_more) take_item();
    // Here, not where it is needed: ptxas puts softmax off behind the wait for the outputs but for a branch between.
    if (!is_last) barrier_wait(barriers.landed_keys(key_slot), key_parity);
    wgmma_wait<0>(part);
    if (lane == 0 && done >= 0) barrier_arrive(barriers.empty_values(done));
    add_second_half();
#pragma unroll
    for (int i = 0; i < S::kKeys / 8; ++i) p[i] = next_p[i] | (p[i] & none);
    if (rises) {
#pragma unroll
      for (int i = 0; i < 64; ++i) out[i] *= before[i / 2 % 2];
#pragma unroll
      for (int r = 0; r < 2; ++r) total[r] *= before[r];
    }
    if (is_last) break;

    barrier_wait(barriers.full_values(slot), parity);
    meet(1 + group, 2 * kWarpgroup);
    wgmma_fence();
    ask_first_half();
    ask_scores();
    announce(2 - group, 2 * kWarpgroup);
    wgmma_wait<1>(part);
    add_first_half();
    wgmma_fence();
    ask_second_half();
    done = slot;
    advance<S::kReady>(slot, parity);
  }
  barrier_wait(barriers.full_values(slot), parity);
  wgmma_fence();
  ask_first_half();
  wgmma_wait<0>(part);
  add_first_half();
  wgmma_fence();
  ask_second_half();
  wgmma_wait<0>(part);
  add_second_half();
  write_outputs<S>(a, announced.last(shared, 1), row, t, out, shift, total);
}

KERNEL(fp8_128, paged_prefill<Shape<128>>(a, maps, s_all))
KERNEL(fp8_split, paged_prefill<Shape<128, true>>(a, maps, s_all))
KERNEL(fp8_combine, combine<Shape<128, true>>(a))
