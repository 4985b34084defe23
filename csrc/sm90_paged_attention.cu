// Attention of a few new tokens a request over a paged cache, at the speed of the memory, with the accuracy of bf16.
//
// An e4m3 cache: both products run on the FP8 tensor cores with keys and values as they lie in the cache. What
// multiplies them is split in two: q = 2^e (hi + lo), hi in e4m3 and lo in e5m2, which is exact (csrc/README.md), and
// the probabilities likewise, as good as bf16. Scores are S^T = K q^T and outputs O^T = V^T P^T, so that 64 keys or 64
// of the head's 128 values fill the matrix instruction's rows and the few queries are its columns:
//
//   S^T  A = 64 keys x 32 of d from shared memory, swizzled as the copy engine leaves them; B = q, K-major, no swizzle
//   O^T  A = 64 of d x 32 keys from registers: ldmatrix.trans moves pairs of d, a byte permutation parts them; B = P
//
// FP8 operands want neighbours in k: the thread that has the scores of keys g and g + 8 of 16 makes them bytes 2g and
// 2g + 1 of P's 16, and the rows that ldmatrix takes follow that order. The tensor core's sums are short, so every tile
// of 64 keys has its own, relative to its own maximum, and tiles are added in f32.
// A bf16 cache: the same with bf16 operands, nothing split, and values read by the matrix instruction as they lie.
// An e4m3 cache and more than 16 queries: scores as above, then P in f16 and values expanded to it (attend_wide).
//
// Work is a line of tiles, row after row, a row being a request's keys for one kv head; blocks take equal shares:
//
//   line      | request 0, head 0: tile 0 1 2 .. | request 0, head 1: 0 1 2 .. | ...
//   block b   |               ^ begin ................... ^ end |
//
// A block: warpgroups 0 .. kGroups - 1 take its tiles in turn and add up where a row ends; one warp more asks the copy
// engine for tiles, kStages ahead; three split the q of the next row meanwhile. Of a row that blocks share, the one
// with its first tile adds the others' parts in their order as they come: a part has come when its slot in `partial` is
// no longer absent. Blocks take shares from the line's end backwards, so they wait only for blocks that started before
// them. Lengths are read on the device: every block sums up the requests before its share.
#include "common/paged_sm90_decode.cuh"

constexpr int kQueryWarps = 3;
// Probabilities in f16 begin at 2^kProbabilityExponent and end at 2^16: maxima may rise by this (log2) unheeded.
constexpr float kMostRise = 7.0f;

template <int kColumns_, bool kBf16_>
struct Shape {
  static constexpr bool kBf16 = kBf16_;  // the cache's type, else e4m3
  static constexpr int kTileBytes = kKeys * kDim * (kBf16 ? 2 : 1);  // of keys or of values
  static constexpr int kColumns = kColumns_;  // queries of a row: tokens x heads of the group, padded
  static constexpr bool kIsWide = kColumns > 16 && !kBf16;  // values and probabilities are multiplied in f16
  static constexpr int kGroups = kColumns <= 16 ? 3 : 2;
  static constexpr int kStages =
      kIsWide ? 10 : (kColumns == 8 ? 12 : kColumns == 16 ? 11 : 9) / (kBf16 ? 2 : 1);
  static constexpr int kThreads = (kGroups + 1) * kWarpgroup;
  static constexpr int kPlane = kColumns * kDim;     // bytes of q's hi or lo; with bf16 both are q
  static constexpr int kWeights = kColumns * kKeys * (kIsWide ? 2 : 1);  // bytes of probabilities: hi or lo, or in f16
  static constexpr int kQ = kStages * 2 * kTileBytes;
  static constexpr int kP = kQ + 2 * 2 * kPlane;
  static constexpr int kSums = kIsWide ? kP : kP + kGroups * 2 * kWeights;  // in the place of probabilities, if wide
  static constexpr int kMaxima = kSums + kGroups * kColumns * kPitch * 4;  // [groups][columns][4 warps]
  static constexpr int kTotals = kMaxima + kGroups * kColumns * 16;        // [groups][columns][4 warps]
  static constexpr int kHighest = kTotals + kGroups * kColumns * 16;       // [groups][columns]
  static constexpr int kFactors = kHighest + kGroups * kColumns * 4;       // [2][columns] {of scores, of outputs}
  static constexpr int kRequests = kFactors + 2 * kColumns * 8;
  static constexpr int kScan = kRequests + (kMostRequests + 2) * 16;
  static constexpr int kShare = kMostRequests + 7;  // behind 17 words of kScan, in the 16 bytes of a request
  static constexpr int kBarriers = kScan + 128;
  static constexpr int kBytes = kBarriers + (3 * kStages + 4) * 8;
  static_assert(kBytes + 1024 <= 227 * 1024 && kGroups * 2 * kWeights <= kMaxima - kP);
};

// Sums that another block waits for; kAbsent's bits, which no sum has, until they come.
constexpr u32 kAbsent = 0xFFFFFFFF;
__device__ inline void publish(float* to, float2 v) {
  asm volatile("st.relaxed.gpu.global.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(v.x), "f"(v.y) : "memory");
}
__device__ inline float2 published(const float* from) {
  float2 v;
  asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "l"(from) : "memory");
  return v;
}
__device__ inline bool is_absent(float2 v) {
  return __float_as_uint(v.x) == kAbsent || __float_as_uint(v.y) == kAbsent;
}

// Two f32 as f16, and four e4m3 as two pairs of f16, exactly.
__device__ inline u32 pair_f16(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ inline void expand(u32 bytes, u32& first, u32& second) {
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %2; cvt.rn.f16x2.e4m3x2 %0, l; cvt.rn.f16x2.e4m3x2 %1, h; }"
      : "=r"(first), "=r"(second)
      : "r"(bytes));
}
// Meets, and says whether any of the threads came with true.
__device__ inline bool meet_any(int id, int threads, bool mine) {
  u32 any;
  asm volatile(
      "{ .reg .pred p, q; setp.ne.u32 q, %3, 0; bar.red.or.pred p, %1, %2, q; selp.u32 %0, 1, 0, p; }"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<u32>(mine))
      : "memory");
  return any;
}

// ---- the work ----

struct Attention {
  const u16* q;          // bf16, rows of 128 that begin at multiples of 8 bytes
  const float *k_scale, *v_scale;
  const int* table;      // [requests, pages]
  const int* lengths;    // [requests]
  const int* starts;     // [requests + 1]
  const u16* gate;       // bf16 or null
  u16* out;              // bf16 [tokens, kv_heads * group, 128]
  float* lse;            // [tokens, kv_heads * group] or null
  float* partial;        // [blocks, columns * 132], absent before and after
  i64 q_token, q_head, table_request, gate_token, gate_head;
  int k_scale_head, v_scale_head;
  int requests, tokens;  // tokens past starts[requests] get zeros; -1 leaves them alone
  int kv_heads, group, row_tokens, page_shift, window, least;
  float score_scale;     // softmax_scale * log2(e)
};

// A row of the line: the keys of a request for row_tokens of its new tokens and one kv head.
struct Row {
  int request, begin, tiles;      // begin: its first tile's place in the line
  int first_tile;                 // of the request's
  int key_first, key_stop;        // keys that any of the tokens sees
  int position, token, tokens;    // of the first token: its position, its row of q; how many there are
  int head;
};

__device__ inline int first_key(const Attention& a, int position) { return max(0, position - a.window + 1); }

__device__ inline int tiles_of(const Attention& a, int length, int count) {
  return max(1, (length + kKeys - 1) / kKeys - first_key(a, length - count) / kKeys);
}

// requests: {first place in the line, length, row of q, new tokens}; `request` is at most the unit's and becomes it.
__device__ inline Row row_at(const Attention& a, const int4* requests, int& request, int unit) {
  while (unit >= requests[request + 1].x) ++request;
  const int4 r = requests[request];
  Row row;
  row.request = request;
  row.tiles = tiles_of(a, r.y, r.w);
  const int index = (unit - r.x) / row.tiles, chunk = index / a.kv_heads;
  row.begin = r.x + index * row.tiles;
  row.first_tile = first_key(a, r.y - r.w) / kKeys;
  row.head = index - chunk * a.kv_heads;
  row.tokens = min(a.row_tokens, r.w - chunk * a.row_tokens);
  row.token = r.z + chunk * a.row_tokens;
  row.position = r.y - r.w + chunk * a.row_tokens;
  row.key_first = first_key(a, row.position);
  row.key_stop = max(row.position + row.tokens, 0);
  return row;
}

struct Share {
  int size, me, begin, end;
};

// Next of the ring's stages, `step` on.
template <class S>
__device__ inline void advance(int& slot, u32& parity, int step) {
  slot += step;
  if (slot >= S::kStages) {
    slot -= S::kStages;
    parity ^= 1;
  }
}

template <class S>
struct Barriers {
  u32 base;
  __device__ u32 keys(int slot) const { return base + slot * 8; }
  __device__ u32 values(int slot) const { return base + (S::kStages + slot) * 8; }
  __device__ u32 empty(int slot) const { return base + (2 * S::kStages + slot) * 8; }
  __device__ u32 query(int buffer) const { return base + (3 * S::kStages + buffer) * 8; }
  __device__ u32 query_empty(int buffer) const { return base + (3 * S::kStages + 2 + buffer) * 8; }
};

// ---- one warp: tiles from memory ----

__device__ inline void ask_l2_for_box(const TensorMap* map, int d, int position, int head, int page) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(d), "r"(position),
               "r"(head), "r"(page)
               : "memory");
}

template <class S>
__device__ inline void copy_tiles(const Attention& a, const Maps& maps, u32 shared, const int4* requests, int request,
                                  const Share& share, const Barriers<S>& barriers) {
  const int lane = threadIdx.x % 32;
  const int box_shift = min(a.page_shift, 6), box = 1 << box_shift, pieces_shift = 6 - box_shift;  // pieces of a tile
  int slot = 0;
  u32 parity = 1;
  bool is_first = true;
  for (int unit = share.begin; unit < share.end;) {
    const Row row = row_at(a, requests, request, unit);
    const int stop = min(share.end, row.begin + row.tiles);
    const int* pages = a.table + row.request * a.table_request;
    while (unit < stop) {
      // Each lane has a piece of one of the next tiles and finds its page.
      const int count = min(stop - unit, 32 >> pieces_shift), mine = lane >> pieces_shift;
      const int piece = lane & ((1 << pieces_shift) - 1);
      const int key = (row.first_tile + unit - row.begin + mine) * kKeys + piece * box;
      const bool needed = mine < count && key < row.key_stop && key + box > row.key_first;
      const int page = needed ? __ldcg(pages + (key >> a.page_shift)) : 0;
      const u32 all_needed = __ballot_sync(kAllLanes, needed);
      if (is_first) {  // lengths and pages were there before the kernel just ahead, the newest keys and values were not
        if (needed && mine < S::kStages) {  // which may change in L2 still
          const int position = key & ((1 << a.page_shift) - 1);
#pragma unroll
          for (int half = 0; half < (S::kBf16 ? 2 : 1); ++half) {
            ask_l2_for_box(&maps.k, half * 64, position, row.head, page);
            ask_l2_for_box(&maps.v, half * 64, position, row.head, page);
          }
        }
        wait_for_previous_kernel();
        let_next_kernel_start();
        is_first = false;
      }
      for (int i = 0; i < count; ++i) {
        const u32 pieces = all_needed >> (i << pieces_shift) & ((1 << (1 << pieces_shift)) - 1);
        const int bytes = __popc(pieces) * box * (S::kTileBytes / kKeys);
        barrier_wait(barriers.empty(slot), parity);
        if (lane == 0) {
          barrier_expect(barriers.keys(slot), bytes);
          barrier_expect(barriers.values(slot), bytes);
        }
        __syncwarp();
        if (needed && mine == i) {
          const u32 to = shared + slot * 2 * S::kTileBytes + piece * box * 128;
          const int position = key & ((1 << a.page_shift) - 1);
#pragma unroll
          for (int half = 0; half < (S::kBf16 ? 2 : 1); ++half)  // 128 bytes of each of 64 rows, then the next 128
            copy_box(to + half * kKeys * 128, &maps.k, half * 64, position, row.head, page, barriers.keys(slot));
#pragma unroll
          for (int half = 0; half < (S::kBf16 ? 2 : 1); ++half)
            copy_box(to + S::kTileBytes + half * kKeys * 128, &maps.v, half * 64, position, row.head, page,
                     barriers.values(slot));
        }
        advance<S>(slot, parity, 1);
      }
      unit += count;
    }
  }
}

// ---- three warps: q as columns ----

template <class S>
__device__ inline void split_queries(const Attention& a, u32 shared, const int4* requests, int request,
                                     const Share& share, const Barriers<S>& barriers, int warp) {
  // A way to memory and back.
  constexpr int kAtOnce = S::kColumns == 8 ? 3 : S::kColumns == 16 ? 6 : 11;
  const int lane = threadIdx.x % 32;
  int buffer = 0;
  u32 parity = 1;
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int unit = share.begin; unit < share.end;) {
    const Row row = row_at(a, requests, request, unit);
    unit = row.begin + row.tiles;
    const int columns = row.tokens * a.group;
    const float k_scale = S::kBf16 ? a.score_scale : __ldcg(a.k_scale + row.head * a.k_scale_head) * a.score_scale;
    const float v_scale = S::kBf16 ? 1.0f : __ldcg(a.v_scale + row.head * a.v_scale_head);
    // A lane's column: every third, and so the warp's.
    const int my_column = warp + lane * kQueryWarps;
    float shut = 1.0f, my_factor = k_scale;
    if (a.gate != nullptr && my_column < columns) {
      const int token = my_column / a.group, head = row.head * a.group + my_column - token * a.group;
      const u16* at = a.gate + (row.token + token) * a.gate_token + head * a.gate_head;
      shut = __fdividef(1.0f, 1.0f + __expf(-__uint_as_float(static_cast<u32>(__ldcg(at)) << 16)));
    }
    barrier_wait(barriers.query_empty(buffer), parity);
    const u32 planes = shared + S::kQ + buffer * 2 * S::kPlane;
    for (int first = 0; first * kQueryWarps < S::kColumns; first += kAtOnce) {
      uint2 raw[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int c = warp + (first + i) * kQueryWarps, token = c / a.group;
        raw[i] = make_uint2(0, 0);
        if (c < columns) {
          const int head = row.head * a.group + c - token * a.group;
          const u16* from = a.q + (row.token + token) * a.q_token + head * a.q_head;
          raw[i] = __ldcg(reinterpret_cast<const uint2*>(from) + lane);
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int c = warp + (first + i) * kQueryWarps;
        if (c >= S::kColumns) break;
        if constexpr (S::kBf16) {
          const u32 to = planes + lane / 2 * (S::kColumns * 16) + c * 16 + lane % 2 * 8;
          store_shared(to, raw[i].x);
          store_shared(to + 4, raw[i].y);
        } else {
          u32 high, low;
          const float down = split_query(raw[i], high, low);
          const u32 to = planes + lane / 4 * (S::kColumns * 16) + c * 16 + lane % 4 * 4;
          store_shared(to, high);
          store_shared(to + S::kPlane, low);
          if (lane == first + i) my_factor = down * k_scale;
        }
      }
    }
    if (my_column < S::kColumns)
      store_shared(shared + S::kFactors + (buffer * S::kColumns + my_column) * 8,
                   make_float2(my_factor, shut * v_scale));
    show_to_engines();
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.query(buffer));
    buffer ^= 1;
    parity ^= buffer == 0;
  }
}

// ---- warpgroups: products, softmax, sums ----

// Output of half a query: two values a lane, relative to 2^highest.
__device__ inline void finish(const Attention& a, const Row& row, int column, int at, float highest, float total,
                              float2 sum, float factor) {
  const int token = column / a.group;
  const int head = row.head * a.group + column - token * a.group;
  const i64 query = static_cast<i64>(row.token + token) * a.kv_heads * a.group + head;
  const float scale = total == 0.0f ? 0.0f : __fdividef(factor, total);
  *reinterpret_cast<u32*>(a.out + query * kDim + at) = pair_bf16(sum.x * scale, sum.y * scale);
  if (a.lse != nullptr && at == 0)
    a.lse[query] = (highest + log2f(total) - kProbabilityExponent) * 0.69314718f;  // without keys log2(0), -infinity
}

// A row's end: the warpgroups' sums, which lie in shared memory, and other blocks' parts; a warp takes half a column.
template <class S>
__device__ inline void end_row(const Attention& a, const Row& row, const Share& share, u32 shared, int buffer) {
  constexpr int kAtOnce = 16;  // a way to L2 and back: the parts of one request's row where 8 rows fill 132 blocks
  constexpr int kSlot = S::kColumns * (kDim + 4);
  const int lane = threadIdx.x % 32;
  const bool is_first = row.begin >= share.begin;
  const int last = is_first ? (row.begin + row.tiles - 1) / share.size : share.me;  // block that has a part
  for (int item = threadIdx.x / 32; item < row.tokens * a.group * 2; item += S::kGroups * 4) {
    const int c = item / 2, at = item % 2 * (kDim / 2) + lane * 2;
    float* const sums = a.partial + c * kDim + at;                  // of block 0
    float* const rest = a.partial + S::kColumns * kDim + item * 2;  // {highest, total}, one for each half
    float2 x[kAtOnce], part;  // every lane has sums of all parts, and the rest of one
    int other = share.me + 1;
    const auto ask = [&] {
      part = make_float2(kLowest, 0.0f);
      if (other + lane <= last && lane < kAtOnce) part = published(rest + (other + lane) * kSlot);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (other + i > last) break;
        x[i] = published(sums + (other + i) * kSlot);
      }
    };
    ask();

    float highest = kLowest, total = 0.0f;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int group = 0; group < S::kGroups; ++group) {
      const int column = group * S::kColumns + c;
      const float4 l = load_shared_4(shared + S::kTotals + column * 16);
      const float2 y = load_shared_2(shared + S::kSums + (column * kPitch + at) * 4);
      const float its_highest = load_shared_1(shared + S::kHighest + column * 4), top = fmaxf(highest, its_highest);
      const float mine = exp2_of(highest - top), its = exp2_of(its_highest - top);
      highest = top;
      total = total * mine + ((l.x + l.y) + (l.z + l.w)) * its;
      sum = make_float2(sum.x * mine + y.x * its, sum.y * mine + y.y * its);
    }
    if (!is_first) {
      publish(sums + share.me * kSlot, sum);
      if (lane == 0) publish(rest + share.me * kSlot, make_float2(highest, total));
      continue;
    }
    const float2 absent = make_float2(__uint_as_float(kAbsent), __uint_as_float(kAbsent));
    for (; other <= last; other += kAtOnce, ask()) {
      float* const my_rest = rest + (other + lane) * kSlot;
      for (int tries = 0; is_absent(part); ++tries) {
        part = published(my_rest);
        if (tries > kMostTries) fail();
      }
      if (other + lane <= last && lane < kAtOnce) *reinterpret_cast<float2*>(my_rest) = absent;
      float top = fmaxf(highest, part.x);
#pragma unroll
      for (int step = 1; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      const float mine = exp2_of(highest - top), its = exp2_of(part.x - top);
      highest = top;
      total = total * mine + warp_sum(part.y * its);
      sum = make_float2(sum.x * mine, sum.y * mine);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (other + i > last) break;
        float* const its_sums = sums + (other + i) * kSlot;
        for (int tries = 0; is_absent(x[i]); ++tries) {
          x[i] = published(its_sums);
          if (tries > kMostTries) fail();
        }
        const float weight = __shfl_sync(kAllLanes, its, i);
        sum = make_float2(sum.x + x[i].x * weight, sum.y + x[i].y * weight);
        *reinterpret_cast<float2*>(its_sums) = absent;
      }
    }
    finish(a, row, c, at, highest, total, sum, load_shared_2(shared + S::kFactors + (buffer * S::kColumns + c) * 8).y);
  }
}

// A row's end: sums of this warpgroup to shared memory, when those of the row before are used up, and on from there.
template <class S>
__device__ inline void leave_row(const Attention& a, const Row& row, const Share& share, u32 shared, int buffer,
                                 float (&out)[2][S::kColumns / 2], float (&highest)[S::kColumns / 4],
                                 float (&total)[S::kColumns / 4]) {
  constexpr int N = S::kColumns;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int group = threadIdx.x / kWarpgroup;
  meet(1 + S::kGroups, S::kGroups * kWarpgroup);
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int column = i / 2 * 8 + 2 * t + i % 2, at = group * N + column;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) total[i] += __shfl_xor_sync(kAllLanes, total[i], step);
    if (g == 0) {
      store_shared(shared + S::kTotals + (at * 4 + warp) * 4, total[i]);
      if (warp == 0) store_shared(shared + S::kHighest + at * 4, highest[i]);
    }
    const int n = i / 2 * 4 + i % 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32 sums = shared + S::kSums + (at * kPitch + half * 64 + warp * 16) * 4;
      if constexpr (S::kBf16) {
        store_shared(sums + g * 4, out[half][n]);
        store_shared(sums + g * 4 + 32, out[half][n + 2]);
      } else {
        store_shared(sums + g * 8, make_float2(out[half][n], out[half][n + 2]));
      }
    }
  }
  meet(1 + S::kGroups, S::kGroups * kWarpgroup);
  end_row<S>(a, row, share, shared, buffer);
  // Before the next row's probabilities come to the sums' place.
  if constexpr (S::kIsWide) meet(1 + S::kGroups, S::kGroups * kWarpgroup);
}

template <class S>
__device__ inline void attend(const Attention& a, u32 shared, const int4* requests, int request, const Share& share,
                              const Barriers<S>& barriers) {
  constexpr int N = S::kColumns, kBlocks = N / 8;  // of 8 columns; a thread has columns 8j + 2t and the next
  using Product = Wgmma<N>;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpgroup), 0);

  // ldmatrix: lane's row of values within 32 keys, and where this warp's 16 of d lie in it
  const int matrix = lane / 8, key_row = 16 * (matrix >> 1) + (lane & 6) + (matrix & 1) + 8 * (lane & 1);
  u32 value_at = S::kTileBytes + key_row * kDim + ((warp ^ (key_row & 7)) << 4);
  u32 p_planes = shared + S::kP + group * 2 * S::kWeights;
  u32 p_at = p_planes + (S::kBf16 ? 2 : 1) * warp * (N * 16) + 2 * t * 16 + 2 * g;
  u32 tops_at = shared + S::kMaxima + group * N * 16 + 2 * t * 16, my_maximum = tops_at + warp * 4;
  keep(value_at), keep(p_at), keep(my_maximum), keep(tops_at);

  int slot = group, mine = share.begin + group, buffer = 0;
  u32 parity = 0, query_parity = 0;

  for (int unit = share.begin; unit < share.end;) {
    const Row row = row_at(a, requests, request, unit);
    const int stop = min(share.end, row.begin + row.tiles);
    barrier_wait(barriers.query(buffer), query_parity);
    const u32 factors = shared + S::kFactors + (buffer * N + 2 * t) * 8;
    float out[2][N / 2], highest[N / 4], total[N / 4];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      highest[i] = kLowest;
      total[i] = 0.0f;
      out[0][2 * i] = out[0][2 * i + 1] = out[1][2 * i] = out[1][2 * i + 1] = 0.0f;
    }

    for (; mine < stop; mine += S::kGroups) {
      const int key0 = (row.first_tile + mine - row.begin) * kKeys;
      const int low = row.key_first - key0, high = row.key_stop - key0;  // keys of the tile that are seen
      const u32 tile = shared + slot * 2 * S::kTileBytes, keys = uniform(describe_keys(tile));
      const u32 q_columns = uniform(describe_columns<N>(shared + S::kQ + buffer * 2 * S::kPlane));
      // Where a slot goes from group to group its last tile may be another group's and still to come, when copies
      // overtake each other: one parity is that of this tile and of the one before the last.
      if constexpr (S::kStages % S::kGroups != 0) barrier_wait(barriers.empty(slot), parity ^ 1);
      barrier_wait(barriers.keys(slot), parity);
      if (low >= kKeys || high <= 0) {
        barrier_wait(barriers.values(slot), parity);
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.empty(slot));
        advance<S>(slot, parity, S::kGroups);
        continue;
      }

      float s[N / 2];
      wgmma_fence();
      if constexpr (S::kBf16) {
        Product::template bf16<false, false>(s, keys, q_columns);
#pragma unroll
        for (int i = 1; i < 8; ++i)
          Product::template bf16<false, true>(s, keys + i / 4 * (kKeys * 128 >> 4) + i % 4 * 2, q_columns + 2 * N * i);
      } else {  // the small halves first, while the sums are small
        Product::template shared<true, false>(s, keys, q_columns + (S::kPlane >> 4));
#pragma unroll
        for (int i = 1; i < 4; ++i)
          Product::template shared<true, true>(s, keys + 2 * i, q_columns + (S::kPlane >> 4) + 2 * N * i);
#pragma unroll
        for (int i = 0; i < 4; ++i) Product::template shared<false, true>(s, keys + 2 * i, q_columns + 2 * N * i);
      }
      wgmma_commit();

      barrier_wait(barriers.values(slot), parity);
      u32 v[2][2][4];
      const bool has_hidden = low > 0 || high < kKeys;  // what was not read or is not the request's may be NaN
      if constexpr (S::kBf16) {
        if (has_hidden && (thread / 2 < low || thread / 2 >= high)) {
#pragma unroll
          for (int i = 0; i < 16; ++i)
            store_shared(tile + S::kTileBytes + thread % 2 * kKeys * 128 + thread / 2 * 128 + i * 8, make_float2(0, 0));
        }
      } else {  // as fragments meanwhile
        load_values(v, tile + value_at);
        if (has_hidden) hide_values(v, t, low, high);
      }
      wgmma_wait(s);
      const u32 empty = barriers.empty(slot);
      if constexpr (!S::kBf16) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty);
      }
      advance<S>(slot, parity, S::kGroups);

#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float2 first = load_shared_2(factors + j * 64), second = load_shared_2(factors + j * 64 + 8);
        s[4 * j] *= first.x;
        s[4 * j + 1] *= second.x;
        s[4 * j + 2] *= first.x;
        s[4 * j + 3] *= second.x;
      }
      // Tiles that reach beyond what the first token sees, or that the last no longer sees whole.
      if (key0 + kKeys - 1 > row.position || key0 < row.position + row.tokens - a.window) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const int token = (8 * (i / 4) + 2 * t + i % 2) / a.group, key = key0 + 16 * warp + g + i / 2 % 2 * 8;
          const int behind = row.position + token - key;
          if (behind < 0 || behind >= a.window) s[i] = -__int_as_float(0x7F800000);
        }
      }

      // The tile's maxima: over the lanes of a warp, then over the warps.
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float top = fmaxf(s[4 * j + b], s[4 * j + 2 + b]);
#pragma unroll
          for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
          if (g == 0) store_shared(my_maximum + (8 * j + b) * 16, top);
        }
      }
      meet(1 + group, kWarpgroup);
      float mine_now[N / 4], before[N / 4];  // factors of this tile's sums and of those before
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        float minus[2];
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const float4 tops = load_shared_4(tops_at + (8 * j + b) * 16);
          const float top = fmaxf(fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)), kLowest);
          const int i = 2 * j + b;
          const float rise = top - highest[i], fall = exp2_of(-fabsf(rise));
          mine_now[i] = rise > 0.0f ? 1.0f : fall;
          before[i] = rise > 0.0f ? fall : 1.0f;
          highest[i] = fmaxf(highest[i], top);
          minus[b] = kProbabilityExponent - top;
        }
        float p[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) p[i] = exp2_of(s[4 * j + i] + minus[i % 2]);
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const int i = 2 * j + b;
          total[i] = total[i] * before[i] + (p[b] + p[2 + b]) * mine_now[i];
          if constexpr (S::kBf16) {
            const u32 pair = pair_bf16(p[b], p[2 + b]);
            store_shared(p_at + j * 128 + b * 16, static_cast<u16>(pair));
            store_shared(p_at + j * 128 + b * 16 + N * 16, static_cast<u16>(pair >> 16));
          } else {
            u16 hi, lo;
            split(p[b], p[2 + b], hi, lo);
            store_shared(p_at + j * 128 + b * 16, hi);
            store_shared(p_at + j * 128 + b * 16 + S::kWeights, lo);
          }
        }
      }
      show_to_engines();
      meet(1 + group, kWarpgroup);

      const u32 p_columns = uniform(describe_columns<N>(p_planes));
      constexpr int kTogether = N <= 16 ? 2 : 1;  // halves of d whose sums registers hold at a time
#pragma unroll
      for (int half = 0; half < 2; half += kTogether) {
        float d[kTogether][N / 2];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          if constexpr (S::kBf16) {  // columns of A are keys: 16 of them are 2048 bytes
            const u32 values = keys + (S::kTileBytes + (half + i) * kKeys * 128 >> 4);
            Product::template bf16<true, false>(d[i], values, p_columns);
#pragma unroll
            for (int step = 1; step < 4; ++step)
              Product::template bf16<true, true>(d[i], values + step * (2048 >> 4), p_columns + 2 * N * step);
          } else {
            Product::template registers<true, false>(d[i], v[half + i][0], p_columns + (S::kWeights >> 4));
            Product::template registers<true, true>(d[i], v[half + i][1], p_columns + (S::kWeights >> 4) + 2 * N);
            Product::template registers<false, true>(d[i], v[half + i][0], p_columns);
            Product::template registers<false, true>(d[i], v[half + i][1], p_columns + 2 * N);
          }
        }
        wgmma_commit();
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
          wgmma_wait(d[i]);
#pragma unroll
          for (int n = 0; n < N / 2; ++n) {
            const int column = n / 4 * 2 + n % 2;
            out[half + i][n] = out[half + i][n] * before[column] + d[i][n] * mine_now[column];
          }
        }
      }
      if constexpr (S::kBf16) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty);
      }
    }

    leave_row<S>(a, row, share, shared, buffer, out, highest, total);
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.query_empty(buffer));
    buffer ^= 1;
    query_parity ^= buffer == 0;
    unit = stop;
  }
}

// The same for more columns than 16 over e4m3, where instructions, not the memory, would take the time. Probabilities
// and values in f16 need no splitting, their sums no adding up in f32. A maximum that a tile's own exceeds by no more
// than kMostRise stays as it is: most tiles take a vote in place of shuffles. A tile's scores are under way before the
// outputs of the one before.
template <class S>
__device__ inline void attend_wide(const Attention& a, u32 shared, const int4* requests, int request,
                                   int begin, int end, const Barriers<S>& barriers) {
  constexpr int N = S::kColumns, kBlocks = N / 8;  // of 8 columns; a thread has columns 8j + 2t and the next
  using Product = Wgmma<N>;
  const int thread = threadIdx.x % kWarpgroup, warp = thread / 32, lane = thread % 32, g = lane / 4, t = lane % 4;
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x / kWarpgroup), 0);

  const int matrix = lane / 8, key_row = 16 * (matrix >> 1) + (lane & 6) + (matrix & 1) + 8 * (lane & 1);
  u32 value_at = S::kTileBytes + key_row * kDim + ((warp ^ (key_row & 7)) << 4);
  const u32 p_tile = shared + S::kP + group * 2 * S::kWeights;
  // Keys g and g + 8 of 16 are where load_values has them: both in word g / 2 of the first 8 or, g odd, of the second.
  u32 p_at = p_tile + (2 * warp + (g & 1)) * (N * 16) + 2 * t * 16 + (g & 6) * 2;
  const u32 my_maximum = shared + S::kMaxima + group * N * 16 + 2 * t * 16 + warp * 4;
  constexpr int kToFactors = S::kTotals - S::kMaxima;  // of sums so far, where a row's totals will be
  keep(value_at), keep(p_at);

  int slot = group, mine = begin + group, rows = 0;
  u32 parity = 0, p_offset = 0;

  for (int unit = begin; unit < end;) {
    const Row row = row_at(a, requests, request, unit);
    const int stop = min(end, row.begin + row.tiles);
    const int buffer = rows & 1;
    barrier_wait(barriers.query(buffer), rows >> 1 & 1);
    const u32 factors = shared + S::kFactors + (buffer * N + 2 * t) * 8;
    const u32 q_columns = uniform(describe_columns<N>(shared + S::kQ + buffer * 2 * S::kPlane));
    float out[2][N / 2], total[N / 4];
    float minus[N / 4];   // kProbabilityExponent - the column's maximum; 0 before it has any
    bool is_new = true;   // some column has none
    float s[N / 2];
    u32 v[2][4][4];  // values in f16, [half of d][16 keys]
    int key0;
    u32 tile;
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      minus[i] = 0.0f;
      total[i] = 0.0f;
      out[0][2 * i] = out[0][2 * i + 1] = out[1][2 * i] = out[1][2 * i + 1] = 0.0f;
    }

    // On to the next tile of which a key is seen; whether there is one. Its keys have come.
    const auto find = [&] {
      for (; mine < stop; mine += S::kGroups) {
        if constexpr (S::kStages % S::kGroups != 0) barrier_wait(barriers.empty(slot), parity ^ 1);  // as in attend
        barrier_wait(barriers.keys(slot), parity);
        key0 = (row.first_tile + mine - row.begin) * kKeys;
        tile = shared + slot * 2 * S::kTileBytes;
        if (first_key(a, row.position) < key0 + kKeys && row.position + row.tokens > key0) return true;
        barrier_wait(barriers.values(slot), parity);
        __syncwarp();
        if (lane == 0) barrier_arrive(barriers.empty(slot));
        advance<S>(slot, parity, S::kGroups);
      }
      return false;
    };
    const auto ask_scores = [&] {  // the small halves first, while the sums are small
      const u32 keys = uniform(describe_keys(tile));
      wgmma_fence();
      Product::template shared<true, false>(s, keys, q_columns + (S::kPlane >> 4));
#pragma unroll
      for (int i = 1; i < 4; ++i)
        Product::template shared<true, true>(s, keys + 2 * i, q_columns + (S::kPlane >> 4) + 2 * N * i);
#pragma unroll
      for (int i = 0; i < 4; ++i) Product::template shared<false, true>(s, keys + 2 * i, q_columns + 2 * N * i);
      wgmma_commit();
    };
    const auto ask_outputs = [&] {
      const u32 p_columns = uniform(describe_columns<N>(p_tile + p_offset));
      wgmma_fence();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 4; ++i) Product::add_f16(out[half], v[half][i], p_columns + 2 * N * i);
      }
      wgmma_commit();
    };
    const auto wait_for_outputs = [&] {
      wgmma_wait(out[0]);
      wgmma_wait(out[1]);
    };
    // Between a tile's scores and its outputs, while those of the tile before may be under way.
    const auto weigh = [&] {
      float top = kLowest;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float4 scales = load_shared_4(factors + j * 64);  // and those of outputs
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          float &x = s[4 * j + b], &y = s[4 * j + 2 + b];
          x = fmaf(x, b == 0 ? scales.x : scales.z, minus[2 * j + b]);
          y = fmaf(y, b == 0 ? scales.x : scales.z, minus[2 * j + b]);
        }
      }
      // Tiles that reach beyond what the first token sees, or that the last no longer sees whole.
      if (key0 + kKeys - 1 > row.position || key0 < row.position + row.tokens - a.window) {
        const u32 behind = row.position - key0 - 16 * warp - g;
        u32 column = 2 * t, columns = a.group;
        keep(column), keep(columns);  // else tokens of columns were in registers all the time
        const u32 part = 65535 / columns + 1;  // of 2^16
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
          const u32 token = (column + 8 * (i / 4) + i % 2) * part >> 16;
          if (behind + token - i / 2 % 2 * 8 >= static_cast<u32>(a.window))  // a key ahead is 2^32 behind
            s[i] = -__int_as_float(0x7F800000);
        }
      }
#pragma unroll
      for (int i = 0; i < N / 2; ++i) top = fmaxf(top, s[i]);

      const bool has_risen = meet_any(1 + group, kWarpgroup, is_new || top > kProbabilityExponent + kMostRise);
      if (has_risen) {
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            float most = fmaxf(s[4 * j + b], s[4 * j + 2 + b]);
#pragma unroll
            for (int step = 4; step < 32; step *= 2) most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
            if (g == 0) store_shared(my_maximum + (8 * j + b) * 16, most);
          }
        }
        meet(1 + group, kWarpgroup);
        is_new = false;
#pragma unroll
        for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
          for (int b = 0; b < 2; ++b) {
            const int i = 2 * j + b;
            const float4 tops = load_shared_4(my_maximum - warp * 4 + (8 * j + b) * 16);
            const float most = fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w));
            const bool is_first = minus[i] == 0.0f;
            const bool rises = most > (is_first ? kLowest : kProbabilityExponent + kMostRise);
            const float rise = rises ? most - kProbabilityExponent : 0.0f;
            const float before = is_first ? 1.0f : exp2_of(-rise);  // of sums so far; none are zero
            if (g == 0) store_shared(my_maximum + kToFactors + (8 * j + b) * 16, before);
            if (rises) minus[i] = minus[i] == rise ? 1e-30f : minus[i] - rise;
            s[4 * j + b] -= rise;
            s[4 * j + 2 + b] -= rise;
            total[i] *= before;
            is_new |= minus[i] == 0.0f;
          }
        }
      }

      p_offset = S::kWeights - p_offset;
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
#pragma unroll
        for (int b = 0; b < 2; ++b) {
          const float x = exp2_of(s[4 * j + b]), y = exp2_of(s[4 * j + 2 + b]);
          total[2 * j + b] += x + y;
          store_shared(p_at + p_offset + j * 128 + b * 16, pair_f16(x, y));
        }
      }
      show_to_engines();
      wait_for_outputs();
      if (has_risen) {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
          const float before = load_shared_1(my_maximum + kToFactors + (i / 2 * 8 + i % 2) * 16);
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            out[half][i / 2 * 4 + i % 2] *= before;
            out[half][i / 2 * 4 + i % 2 + 2] *= before;
          }
        }
      }
      barrier_wait(barriers.values(slot), parity);
      u32 bytes[2][2][4];
      load_values(bytes, tile + value_at);
      const int low = first_key(a, row.position) - key0, high = row.position + row.tokens - key0;  // keys that are seen
      if (low > 0 || high < kKeys) hide_values(bytes, t, low, high);     // the others may be NaN
      __syncwarp();
      if (lane == 0) barrier_arrive(barriers.empty(slot));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 8; ++i) expand(bytes[half][i / 4][i % 4], v[half][i / 2][i % 2], v[half][i / 2][2 + i % 2]);
      }
      meet(1 + group, kWarpgroup);
      advance<S>(slot, parity, S::kGroups);
      mine += S::kGroups;
    };

    if (find()) {
      ask_scores();
      wgmma_wait(s);
      weigh();
      while (find()) {
        ask_scores();
        ask_outputs();
        wgmma_wait<1>(s);
        weigh();
      }
      ask_outputs();
      wait_for_outputs();
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i) minus[i] = minus[i] == 0.0f ? kLowest : kProbabilityExponent - minus[i];
    // Looked up again, not in registers all the time.
    const Share share = *reinterpret_cast<const Share*>(requests + S::kShare);
    leave_row<S>(a, row_at(a, requests, request, unit), share, shared, buffer, out, minus, total);
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.query_empty(buffer));
    ++rows;
    unit = stop;
  }
}

template <class S>
__device__ inline void paged_attention(const Attention& a, const Maps& maps, u8* all) {
  u8* aligned = all + (-shared_address(all) & 1023);
  const u32 shared = shared_address(aligned);
  const Barriers<S> barriers{shared + S::kBarriers};
  int4* requests = reinterpret_cast<int4*>(aligned + S::kRequests);
  int* scan = reinterpret_cast<int*>(aligned + S::kScan);  // 16 warps' tiles, then the share's first request
  const int thread = threadIdx.x, lane = thread % 32, warp = __shfl_sync(kAllLanes, thread / 32, 0);
  constexpr int kConsumers = S::kGroups * 4;  // warps

  if (thread == 0) {
    for (int i = 0; i < S::kStages; ++i) {
      barrier_init(barriers.keys(i), 1);
      barrier_init(barriers.values(i), 1);
      barrier_init(barriers.empty(i), 4);
    }
    for (int i = 0; i < 2; ++i) {
      barrier_init(barriers.query(i), kQueryWarps);
      barrier_init(barriers.query_empty(i), kConsumers);
    }
    show_barriers();
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }

  // A thread's request; one more has the rows past the last one's, and no keys.
  int4 mine = make_int4(0, 0, 0, 0);
  if (thread < a.requests) {
    mine.y = __ldcg(a.lengths + thread);
    mine.z = __ldcg(a.starts + thread);
    mine.w = __ldcg(a.starts + thread + 1) - mine.z;
  } else if (thread == a.requests && a.tokens >= 0) {
    mine.z = __ldcg(a.starts + thread);
    mine.w = a.tokens - mine.z;
  }
  const int first_length = __ldcg(a.lengths), first_count = __ldcg(a.starts + 1) - __ldcg(a.starts);
  const int rows = mine.w > 0 ? (mine.w + a.row_tokens - 1) / a.row_tokens * a.kv_heads : 0;
  const int tiles = rows > 0 ? rows * tiles_of(a, mine.y, mine.w) : 0;
  int until = tiles;  // those of the warp's requests up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, until, step);
    if (lane >= step) until += before;
  }
  static_assert(S::kThreads <= 512 && S::kThreads >= kMostRequests + 2);
  if (lane == 31) scan[warp] = until;
  const int row_tiles = tiles_of(a, first_length, first_count);  // of all rows, where they are as long as the first
  const bool alike = __syncthreads_and(tiles == rows * row_tiles);
  int all_tiles = 0;
  for (int i = 0; i < S::kThreads / 32; ++i) {
    if (i == warp) mine.x = all_tiles + until - tiles;
    all_tiles += scan[i];
  }
  if (thread < kMostRequests + 2) requests[thread] = mine;
  Share share;
  share.size = max((all_tiles + static_cast<int>(gridDim.x) - 1) / static_cast<int>(gridDim.x), a.least);
  // Whole rows save waiting for others' parts, which takes as long as two or three tiles.
  const int whole = (share.size + row_tiles - 1) / row_tiles * row_tiles;
  if (alike && whole - share.size <= 2) share.size = whole;
  share.me = (all_tiles + share.size - 1) / share.size - 1 - static_cast<int>(blockIdx.x);
  share.begin = share.me * share.size;
  share.end = min(share.begin + share.size, all_tiles);
  if (share.me >= 0 && mine.x <= share.begin && share.begin < mine.x + tiles) scan[16] = thread;
  if (thread == 0) *reinterpret_cast<Share*>(requests + S::kShare) = share;
  __syncthreads();
  if (share.me < 0) {
    wait_for_previous_kernel();  // a kernel that has ended vouches for those before it
    return;
  }
  const int request = scan[16];

  if (warp >= kConsumers) {
    if constexpr (S::kIsWide) asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (warp == kConsumers) copy_tiles<S>(a, maps, shared, requests, request, share, barriers);
    else split_queries<S>(a, shared, requests, request, share, barriers, warp - kConsumers - 1);
    return;
  }
  if constexpr (S::kIsWide) asm volatile("setmaxnreg.inc.sync.aligned.u32 224;");
  wait_for_previous_kernel();
  let_next_kernel_start();
  if constexpr (S::kIsWide) attend_wide<S>(a, shared, requests, request, share.begin, share.end, barriers);
  else attend<S>(a, shared, requests, request, share, barriers);
}

#define VARIANT(columns, type, bf16)                                                                                   \
  extern "C" __global__ void __launch_bounds__(Shape<columns, bf16>::kThreads, 1)                                      \
      sm90_paged_attention_##type##_##columns(                                                                         \
          const u16* q, const float* k_scale, const float* v_scale, const int* table, const int* lengths,              \
          const int* starts, const u16* gate, u16* out, float* lse, float* partial, i64 q_token, i64 q_head,           \
          i64 table_request, i64 gate_token, i64 gate_head, int k_scale_head, int v_scale_head, int requests,          \
          int tokens, int kv_heads, int group, int row_tokens, int page_shift, int window, int least,                  \
          float score_scale, const __grid_constant__ Maps maps) {                                                      \
    extern __shared__ __align__(1024) u8 s_all[];                                                                      \
    const Attention a{q, k_scale, v_scale, table, lengths, starts, gate, out, lse, partial, q_token, q_head,           \
                      table_request, gate_token, gate_head, k_scale_head, v_scale_head, requests, tokens, kv_heads,    \
                      group, row_tokens, page_shift, window, least, score_scale};                                      \
    paged_attention<Shape<columns, bf16>>(a, maps, s_all);                                                             \
  }

VARIANT(8, e4m3, false)
VARIANT(16, e4m3, false)
VARIANT(32, e4m3, false)
VARIANT(8, bf16, true)
VARIANT(16, bf16, true)
VARIANT(32, bf16, true)
