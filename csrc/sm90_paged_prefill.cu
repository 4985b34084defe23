// Attention of many new tokens a request over a paged cache, at the speed of the tensor cores, as accurate as in bf16.
//
// A block takes 128 rows at a time, a row being a (token, query head) of one kv head: a group's heads share every
// key, and rows follow each other across tokens, so no row is padding for any group. Two warpgroups of 64 rows each
// hold q, the running sums and the probabilities in registers; keys and values are B, in shared memory:
//
//   S = q K^T   A = q, registers; B = keys [keys][128 of d], K-major
//   O = P V     A = P, registers; B = values [keys][128 of d], MN-major: as they lie
//
// An e4m3 cache: keys are multiplied as they lie, by q in two halves, e4m3 + e5m2, which are as good as bf16 and cost
// together what one product in 16 bits costs. Values are expanded to f16, which is exact, and P in f16 has three bits
// more than in bf16. A bf16 cache is multiplied as it is, with q and P in bf16.
//
//   producer warpgroup   copy engine -> keys (4 tiles), e4m3 values (4) -> f16, swizzled for the matrix unit (3)
//   consumer warpgroups  S of the next tile and O of this one in one go, then softmax while the other one's go runs;
//                        the next tile may be the next item's first: its q comes while the last softmax runs
//
// Keys that stayed bytes matter: with both expanded, copies and expansion move as much through shared memory as the
// matrix unit has time for, 128 bytes a clock (measured: 601 TFLOP/s in place of 665).
//
// Rows wait in a line of items (request, then its tiles of 128 rows from the last, which has most keys, then kv heads);
#include "common/paged_sm90_prefill.cuh"

template <int kKeys, bool kBf16, bool kSplit = false>
struct Shape : Layout<kKeys, kBf16, kSplit, kKeys * kDim * 2> {
  static constexpr float kLift = 8.0f;      // probabilities are kept times 2^8, up to 2^15: f16 ends at 65504
  static constexpr float kMostRise = 7.0f;  // of a maximum, log2, before sums are scaled anew
};

__device__ inline void store_pair(float* to, float x, float y) { *reinterpret_cast<float2*>(to) = make_float2(x, y); }

// ---- arithmetic ----

__device__ inline u32 pair_f16(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Four e4m3 as two pairs of f16, exactly. Halves by mov: the conversion takes either half of a register as it is.
__device__ inline void expand(u32 w, u32& first, u32& second) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(first), "=r"(second)
      : "r"(w));
}
__device__ inline u32 pair_e5m2(float low, float high) {
  u16 r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
}
__device__ inline float2 from_pair_e4m3(u32 pair) {
  float2 v;
  asm("{ .reg .b32 h; .reg .b16 x, y; cvt.rn.f16x2.e4m3x2 h, %2; mov.b32 {x, y}, h;"
      " cvt.f32.f16 %0, x; cvt.f32.f16 %1, y; }"
      : "=f"(v.x), "=f"(v.y)
      : "h"(static_cast<u16>(pair)));
  return v;
}
// Both halves of two values, x = hi + lo.
__device__ inline void split(float x, float y, u32& hi, u32& lo) {
  hi = pair_e4m3(x, y);
  const float2 h = from_pair_e4m3(hi);
  lo = pair_e5m2(x - h.x, y - h.y);
}

// Four words in each of four neighbouring lanes: lane t's word i becomes lane i's word t.
__device__ inline void transpose(u32 (&w)[4], int t) {
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int low = step == 1 ? 2 * i : i, high = low + step;
      const u32 got = __shfl_xor_sync(kAllLanes, t & step ? w[low] : w[high], step);
      w[low] = t & step ? got : w[low];
      w[high] = t & step ? w[high] : got;
    }
  }
}
#define WGMMA_128(k, types, transposed) \
  WGMMA(128, k, types, transposed, D0 D1 D2 D3 D4, 64, 65, 66, 67, 68, 69, R16(0), R16(16), R16(32), R16(48))
#define WGMMA_112(k, types, transposed) \
  WGMMA(112, k, types, transposed, D0 D1 D2 D3, 56, 57, 58, 59, 60, 61, R16(0), R16(16), R16(32), R8(48))

// Scores: columns are keys, K-major; 32 of d in bytes, A's high or low half, or 16 of d in bf16.
template <bool kLow, bool kAdd>
__device__ inline void multiply_bytes(float (&d)[64], const u32* a, u64 columns) {
  if constexpr (kLow) WGMMA_128("32", "e5m2.e4m3", "");
  else WGMMA_128("32", "e4m3.e4m3", "");
}
template <bool kLow, bool kAdd>
__device__ inline void multiply_bytes(float (&d)[56], const u32* a, u64 columns) {
  if constexpr (kLow) WGMMA_112("32", "e5m2.e4m3", "");
  else WGMMA_112("32", "e4m3.e4m3", "");
}
template <bool kAdd>
__device__ inline void multiply_keys(float (&d)[64], const u32* a, u64 columns) {
  WGMMA_128("16", "bf16.bf16", ", 0");
}
template <bool kAdd>
__device__ inline void multiply_keys(float (&d)[56], const u32* a, u64 columns) {
  WGMMA_112("16", "bf16.bf16", ", 0");
}
// Outputs: columns are d, k is keys.
template <bool kBf16>
__device__ inline void multiply_values(float (&d)[64], const u32* a, u64 columns, bool kAdd) {
  if constexpr (kBf16) WGMMA_128("16", "bf16.bf16", ", 1");
  else WGMMA_128("16", "f16.f16", ", 1");
}

// ---- four warps make operands of what has landed ----


// e4m3 to f16: eight lanes take a row, 16 bytes each. Of d = 16 c + 8 h + j, half h of the operand has j of lane c:
// stores of a row go to all banks. Rows outside [low, high) become zeros: a probability of zero does not undo a NaN.
template <class S>
__device__ inline void expand_tile(u32 from, u32 to, int thread, int low, int high) {
  constexpr int kTurns = S::kKeys / 16, kAtOnce = 4;
  const int row = thread / 8, lane = thread % 8;
  from += row * 128 + lane * 16;
  to += row * 128 + ((lane ^ (row & 7)) << 4);
  const bool has_hidden = low > 0 || high < S::kKeys;
#pragma unroll
  for (int first = 0; first < kTurns; first += kAtOnce) {
    uint4 bytes[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      if (first + i < kTurns) bytes[i] = load_shared_4(from + (first + i) * 16 * 128);
    if (has_hidden) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int at = row + (first + i) * 16;
        if (at < low || at >= high) bytes[i] = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i >= kTurns) break;
      uint4 even, odd;
      expand(bytes[i].x, even.x, even.y);
      expand(bytes[i].y, even.z, even.w);
      expand(bytes[i].z, odd.x, odd.y);
      expand(bytes[i].w, odd.z, odd.w);
      store_shared(to + (first + i) * 16 * 128, even);
      store_shared(to + (first + i) * 16 * 128 + S::kKeys * 128, odd);
    }
  }
}

// bf16 lands as an operand: only the zeros are missing.
template <class S>
__device__ inline void clear_rows(u32 values, int thread, int low, int high) {
  if ((low > 0 || high < S::kKeys) && thread < S::kKeys && (thread < low || thread >= high)) {
#pragma unroll
    for (int i = 0; i < 16; ++i)
      store_shared(values + i / 8 * S::kKeys * 128 + thread * 128 + i % 8 * 16, make_uint4(0, 0, 0, 0));
    show_to_engines();
  }
}

template <class S>
__device__ inline void make_values(u32 landed, u32 values, int thread, int low, int high) {
  if constexpr (S::kBf16) clear_rows<S>(values, thread, low, high);
  else expand_tile<S>(landed, values, thread, low, high);
}

// ---- two warpgroups: products and softmax of 64 rows each ----

// q as A. A bf16 cache: 16 of d after 16, thread t has d = 2 t, 2 t + 1 and 8 further. An e4m3 one: 32 of d after 32,
// first the high halves, then the low ones; thread t has d = 4 t .. 4 t + 3 and 16 further. Before the split
// q[i / 2][i % 2 * 2 + r] has 4 i, 4 i + 1 and q[4 + i / 2][..] the next two.
template <class S>
__device__ inline void ask_queries(const Attention& a, const Item& item, int row, int t, u32 (&q)[8][4]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int at = min(item.first + row + 8 * r, item.rows - 1), token = at / a.group;
    const int head = item.head * a.group + at - token * a.group;
    const u16* from = a.q + (item.token + token) * a.q_token + head * a.q_head + t * (S::kBf16 ? 2 : 4);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if constexpr (S::kBf16) {
        q[i][r] = load_pair(from + 16 * i);
        q[i][2 + r] = load_pair(from + 16 * i + 8);
      } else {
        q[i / 2][i % 2 * 2 + r] = load_pair(from + 16 * i);
        q[4 + i / 2][i % 2 * 2 + r] = load_pair(from + 16 * i + 2);
      }
    }
  }
}
// What `ask_queries` loads as the tensor core takes it; factors of scores.
template <class S>
__device__ inline void take_queries(const Attention& a, float score_factor, u32 (&q)[8][4], float (&factors)[2]) {
  const bool is_negative = score_factor < 0.0f;  // the maximum is taken before the factor
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float factor = fabsf(score_factor);
    if constexpr (S::kBf16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        q[i][r] ^= is_negative ? 0x80008000u : 0;
        q[i][2 + r] ^= is_negative ? 0x80008000u : 0;
      }
    } else {
      u32 largest = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const u32 pair = q[4 * half + i / 2][i % 2 * 2 + r];
          largest = max(largest, max(pair & 0x7FFF, pair >> 16 & 0x7FFF));
        }
      }
#pragma unroll
      for (int step = 1; step < 4; step *= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
      const u32 e = max(largest >> 7, 7u);
      float up = __uint_as_float((261 - e) << 23);  // 2^(134 - e): the largest value lands in [2^7, 2^8)
      factor *= __uint_as_float((e - 7) << 23);
      if (e == 255) up = __uint_as_float(0x7FC00000);  // infinity or NaN somewhere: the row's whole result is NaN
      if (is_negative) up = -up;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        u32 &first = q[i / 2][i % 2 * 2 + r], &second = q[4 + i / 2][i % 2 * 2 + r], high[2], low[2];
        split(low_bf16(first) * up, high_bf16(first) * up, high[0], low[0]);
        split(low_bf16(second) * up, high_bf16(second) * up, high[1], low[1]);
        first = high[0] | high[1] << 16;
        second = low[0] | low[1] << 16;
      }
    }
    factors[r] = fmaxf(factor, 0x1p-100f);  // hidden keys' -infinity times zero would be NaN
  }
}

template <class S>
__device__ inline void write_outputs(const Attention& a, const Item& item, int row, int t, const float (&out)[64],
                                     const float (&factor)[2], const float (&highest)[2], const float (&total)[2]) {
  const float v_scale = v_scale_of<S>(a, item.head);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = total[r];
#pragma unroll
    for (int step = 1; step < 4; step *= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const float shift = highest[r] == kLowest ? 0.0f : highest[r] * factor[r];
    if constexpr (S::kSplit) {
      if (item.slot >= 0) {
        float* to = a.partial + (static_cast<i64>(item.slot) * kRows + row + 8 * r) * kPitch;
        if (t == 0) store_pair(to + kDim, highest[r] == kLowest && sum == 0.0f ? kLowest : shift, sum);
#pragma unroll
        for (int j = 0; j < 16; ++j)  // expanded values' columns are d in another order (expand_tile)
          store_pair(to + 2 * t + (S::kBf16 ? 8 * j : 16 * (j % 8) + j / 8 * 8), out[4 * j + 2 * r],
                     out[4 * j + 2 * r + 1]);
        continue;
      }
    }
    const int at = item.first + row + 8 * r, in_request = token_of(a, item, row + 8 * r);
    const int token = item.token + in_request, head = item.head * a.group + at - in_request * a.group;
    const i64 query = static_cast<i64>(token) * a.kv_heads * a.group + head;
    const bool is_row = at < item.rows;
    const int last = a.kv_heads * a.group - 1;  // heads end before rows of the last item do
    const float scale = output_scale<S>(a, token, min(head, last), v_scale, shift, sum, is_row && t == 0);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 w[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // columns of 8: 64 of d, then the other 64
        const float* v = out + 4 * (8 * (j & 1) + 2 * i + (j >> 1)) + 2 * r;
        w[j] = pair_bf16(v[0] * scale, v[1] * scale);
      }
      transpose(w, t);
      // Lane t has 16 bytes of expanded values' d too.
      const int unit = S::kBf16 ? 8 * (t & 1) + 2 * i + (t >> 1) : 4 * i + t;
      if (is_row) reinterpret_cast<uint4*>(a.out + query * kDim)[unit] = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

// Scores to probabilities * 2^kLift, relative to maxima that rise only when they must. Returns whether they rose: sums
// so far are then to be multiplied by `before`.
template <class S>
__device__ inline bool soften(float (&s)[S::kKeys / 2], const float (&factor)[2], float (&highest)[2],
                              float (&total)[2], float (&before)[2]) {
  float top[2];  // of this thread's keys
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float some[4];  // one chain would wait for itself
#pragma unroll
    for (int j = 0; j < S::kKeys / 8; ++j) {
      const float pair = fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]);
      some[j % 4] = j < 4 ? pair : fmaxf(some[j % 4], pair);
    }
    top[r] = fmaxf(fmaxf(some[0], some[1]), fmaxf(some[2], some[3]));
  }
  const bool rises = __any_sync(kAllLanes, (top[0] - highest[0]) * factor[0] > S::kMostRise ||
                                               (top[1] - highest[1]) * factor[1] > S::kMostRise);
  if (rises) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int step = 1; step < 4; step *= 2) top[r] = fmaxf(top[r], __shfl_xor_sync(kAllLanes, top[r], step));
      top[r] = fmaxf(top[r], highest[r]);
      before[r] = exp2_of((highest[r] - top[r]) * factor[r]);
      highest[r] = top[r];
      total[r] *= before[r];
    }
  }
  float minus[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) minus[r] = S::kLift - (highest[r] == kLowest ? 0.0f : highest[r] * factor[r]);
#pragma unroll
  for (int i = 0; i < S::kKeys / 2; ++i) {
    const int r = i / 2 % 2;
    s[i] = exp2_of(fmaf(s[i], factor[r], minus[r]));
    total[r] += s[i];
  }
  return rises;
}

template <class S>
__device__ inline void attend(const Attention& a, u32 shared, const Barriers<S>& barriers) {
  constexpr int kSteps = S::kKeys / 16;
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32, t = lane % 4;
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpgroup) - 1, 0);
  const int row = group * 64 + thread / 32 * 16 + lane / 4;
  if (group == 1) announce(1, 2 * kWarpgroup);  // the first go is the first warpgroup's

  Announced<S> announced;
  int slot = 0, key_slot = 0;
  u32 parity = 0, key_parity = 0;
  const auto pack = [](const float(&s)[S::kKeys / 2], u32(&p)[S::kKeys / 4]) {
#pragma unroll
    for (int i = 0; i < S::kKeys / 4; ++i)
      p[i] = S::kBf16 ? pair_bf16(s[2 * i], s[2 * i + 1]) : pair_f16(s[2 * i], s[2 * i + 1]);
  };
  const auto ask_scores = [&](float(&s)[S::kKeys / 2], const u32(&q)[8][4], int at) {
    const u32 keys = uniform(shared + S::kKeysAt + at * S::kKeyBytes);
    if constexpr (S::kBf16) {
      multiply_keys<false>(s, q[0], descriptor<16>(keys));
#pragma unroll
      for (int i = 1; i < 8; ++i)
        multiply_keys<true>(s, q[i], descriptor<16>(keys + i / 4 * S::kKeys * 128 + i % 4 * 32));
    } else {  // the low halves first, while the sums are small
      multiply_bytes<true, false>(s, q[4], descriptor<16>(keys));
#pragma unroll
      for (int i = 1; i < 4; ++i) multiply_bytes<true, true>(s, q[4 + i], descriptor<16>(keys + i * 32));
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply_bytes<false, true>(s, q[i], descriptor<16>(keys + i * 32));
    }
    wgmma_commit();
  };
  const auto ask_outputs = [&](float(&out)[64], const u32(&p)[S::kKeys / 4], int at, bool adds) {
    const u32 values = uniform(shared + at * S::kBytes);
#pragma unroll
    for (int i = 0; i < kSteps; ++i)
      multiply_values<S::kBf16>(out, p + 4 * i, descriptor<S::kKeys * 128>(values + i * 2048), adds || i > 0);
    wgmma_commit();
  };

  u32 q[8][4], p[S::kKeys / 4];
  float s[S::kKeys / 2], out[64], factor[2], next_factor[2], highest[2], total[2], before[2];
  int position[2], base, low, high, tiles;
  bool are_more = false, is_fresh = true;  // fresh: `out` has nothing of this item yet
  const auto ask_item = [&] {  // its q goes where that of the last tile's has been
    const Item item = announced.next(shared, barriers);
    are_more = item.tiles > 0;
    if (are_more) ask_queries<S>(a, item, row, t, q);
  };
  const auto take_item = [&] {
    float score_factor = a.score_scale;
    if constexpr (!S::kBf16) score_factor *= __ldg(a.k_scale + announced.last(shared).head * a.k_scale_head);
    take_queries<S>(a, score_factor, q, next_factor);
  };
  const auto begin_item = [&] {
    const Item item = announced.last(shared);
    tiles = item.tiles;
    base = item.base;
    low = item.low;
    high = item.high;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      position[r] = item.position + token_of(a, item, row + 8 * r);
      factor[r] = next_factor[r];
      highest[r] = kLowest;
      total[r] = 0.0f;
      before[r] = 1.0f;
    }
    is_fresh = true;
  };

  ask_item();
  if (!are_more) return;
  take_item();
  barrier_wait(barriers.landed_keys(key_slot), key_parity);
  wgmma_fence();
  ask_scores(s, q, key_slot);
  wgmma_wait<0>(s);
  begin_item();
  for (int done = -1;;) {
    // Under way are the scores of the next tile, this item's or the next one's, and outputs of the one before.
    wgmma_wait<1>(s);
#pragma unroll
    for (int i = 0; i < 8; ++i) hold(q[i]);
    if (lane == 0) barrier_arrive(barriers.empty_keys(key_slot));
    advance<S::kLanding>(key_slot, key_parity);
    if (tiles == 0) {
      wgmma_wait<0>(out);
      hold(p);
      write_outputs<S>(a, announced.last(shared, 1), row, t, out, factor, highest, total);
      begin_item();
    }
    if (--tiles == 0) ask_item();
    const int key0 = base + tiles * S::kKeys;
    if (key0 + S::kKeys - 1 > low || key0 <= high - a.window) hide<S>(s, position, key0 + 2 * t, a.window);
    const bool rises = soften<S>(s, factor, highest, total, before);
    settle(s);
    const bool is_last = tiles == 0 && !are_more;
    // Here, not where it is needed: ptxas puts softmax off behind the wait for the outputs but for a branch between.
    if (!is_last) barrier_wait(barriers.landed_keys(key_slot), key_parity);
    wgmma_wait<0>(out);
    hold(p);
    if (lane == 0 && done >= 0) barrier_arrive(barriers.empty_values(done));
    pack(s, p);
    if (rises && !is_fresh) {
#pragma unroll
      for (int i = 0; i < 64; ++i) out[i] *= before[i / 2 % 2];
    }
    if (is_last) break;
    if (tiles == 0) take_item();

    meet(1 + group, 2 * kWarpgroup);
    wgmma_fence();
    ask_scores(s, q, key_slot);
    barrier_wait(barriers.full_values(slot), parity);
    wgmma_fence();
    ask_outputs(out, p, slot, !is_fresh);
    announce(2 - group, 2 * kWarpgroup);
    done = slot;
    is_fresh = false;
    advance<S::kReady>(slot, parity);
  }
  barrier_wait(barriers.full_values(slot), parity);
  wgmma_fence();
  ask_outputs(out, p, slot, !is_fresh);
  wgmma_wait<0>(out);
  hold(p);
  write_outputs<S>(a, announced.last(shared, 1), row, t, out, factor, highest, total);
}

#define KERNELS(type, bf16)                                                              \
  KERNEL(type##_128, paged_prefill<Shape<128, bf16>>(a, maps, s_all))                    \
  KERNEL(type##_112, paged_prefill<Shape<112, bf16>>(a, maps, s_all))                    \
  KERNEL(type##_split, paged_prefill<Shape<128, bf16, true>>(a, maps, s_all))            \
  KERNEL(type##_combine, combine<Shape<128, bf16, true>>(a))

KERNELS(e4m3, false)
KERNELS(bf16, true)
