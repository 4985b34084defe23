// Attention of a few new tokens a request over few keys (a window, a short context) of a paged e4m3 cache.
//
// Arithmetic and what lies how in shared memory are csrc/sm90_paged_attention.cu's, the order of the work is not. That
// kernel's long lines of tiles need large blocks; here a row, a request's keys for one kv head, has some ten tiles of
// 64 keys, and what counts is the way from a launch to its end. So blocks are small, several to a multiprocessor.
//
// Few rows: kCluster blocks share a row and nothing else (Shape):
//
//   block 0   | tile 0 | tile 4 | tile 8 |     each asks for all its tiles at once, multiplies all keys by q, takes one
//   block 1   | tile 1 | tile 5 |              maximum of all its scores, then multiplies the values;
//   block 2   | tile 2 | tile 6 |              then every block gets all blocks' sums of some of the columns (queries)
//   block 3   | tile 3 | tile 7 |              through the cluster's shared memory, adds them in order and writes out
//
// A block: a warpgroup that computes, and a warp that asks the copy engine for tiles; a tile has its own barriers and
// is used once. When keys and q are used up, the probabilities take their place, and behind these the blocks' sums.
//
// Many rows: a block has one for itself, and one warpgroup or two; four fill a multiprocessor (Stream). A block's
// warpgroups take the tiles in turn, kStep at a time: one wait, one maximum, one exchange for 128 keys. Each has a ring
// of its own and no warp that fills it: at the two points of a step where all four warps have met, keys and then values
// are used up, and each warp asks for 16 positions of what is to come in their place.
//
// A row is as many of a request's new tokens as columns hold; of the further ones blocks beside these (z) have rows.
//
// Before the kernel ahead has ended, lengths and page table are read and nothing else; but L2 is told what will be,
// which harms nothing where it changes still: queries, and a cluster's tiles. Blocks of clusters that start later find
// theirs in L2 too: a block also names those of the request `ahead` requests on.
#include "common/paged_sm90_decode.cuh"

// Shared memory of rows that clusters share.
template <int kColumns_, int kCluster_, int kTiles_, int kBlocks_>
struct Shape {
  static constexpr int kColumns = kColumns_;  // queries of a row: tokens x heads of the group, padded
  static constexpr int kCluster = kCluster_;
  static constexpr int kTiles = kTiles_;    // of a block at most
  static constexpr int kMostTiles = kCluster * kTiles;
  static constexpr int kBlocks = kBlocks_;  // of a multiprocessor, by shared memory
  static constexpr int kParts = kCluster;   // of a row's sums
  static constexpr int kWarps = 4;          // that compute
  static constexpr int kMine = kColumns / kCluster;  // columns that a block finishes: c % kCluster is its rank
  static constexpr int kTileBytes = kKeys * kDim;    // of keys or of values
  static constexpr int kPlane = kColumns * kDim;     // bytes of q's hi or lo
  static constexpr int kWeights = kColumns * kKeys;  // bytes of the hi or lo of a tile's probabilities
  static constexpr int kQ = kTiles * kTileBytes;     // behind the keys
  // In the place of keys and q: probabilities, then [blocks][kMine] of each block's sums.
  static constexpr int kSums = kTiles * 2 * kWeights;
  static constexpr int kTotals = kSums + kColumns * kPitch * 4;  // [4 warps] {total, maximum of the block}
  static constexpr int kReceivedBytes = kColumns * (kDim * 4 + 32);
  static constexpr int kSumsEnd = kTotals + kColumns * 32;
  static constexpr int kUsedTwice = kSumsEnd > kQ + 2 * kPlane ? kSumsEnd : kQ + 2 * kPlane;
  // The last values come when keys are used up, in the place of their own tile's keys: three blocks fit, not two.
  static constexpr int kEarly = kColumns <= 16 && kTiles == 5 ? 3 : kTiles;
  static_assert(kEarly == kTiles || kSumsEnd <= kEarly * kTileBytes);
  static constexpr int kV = (kUsedTwice + 1023) / 1024 * 1024;
  static constexpr int kFactors = kV + kEarly * kTileBytes;  // [columns] {of scores, of outputs}
  static constexpr int kMaxima = kFactors + kColumns * 8;    // [columns][4 warps]
  static constexpr int kBarriers = kMaxima + kColumns * 16;
  static constexpr int kBytes = kBarriers + (2 * kTiles + 1) * 8;
  static_assert(kBlocks * (kBytes + 1024 + 1024) <= 228 * 1024);  // 1024 to align, 1024 of the system's own
  static_assert(kTiles * 4 <= 32);  // pages of 16: a lane has a tile's quarter
  static __device__ constexpr int values(int tile) { return tile * kTileBytes + (tile < kEarly ? kV : 0); }
  static __device__ constexpr int sums(int part) { return kSums + part * kMine * kPitch * 4; }
  static __device__ constexpr int totals(int part) { return kTotals + part * kMine * 32; }
};

// Shared memory of a block that has rows for itself.
template <int kColumns_, int kGroups_>
struct Stream {
  static constexpr int kColumns = kColumns_;
  static constexpr int kGroups = kGroups_;  // warpgroups
  static constexpr int kCluster = 1, kParts = kGroups, kWarps = kGroups * 4, kMine = kColumns;
  static constexpr int kBlocks = 4 / kGroups;             // of a multiprocessor
  static constexpr int kStep = kColumns <= 16 ? 2 : 1;    // tiles at a time: keys of each, then values of each
  static constexpr int kPlaces = kColumns == 32 || kColumns == 16 && kGroups == 1 ? 5 : 6;  // of a ring
  static constexpr int kMostTiles = 16;                   // of a row
  static constexpr int kTileBytes = kKeys * kDim;
  static constexpr int kPlane = kColumns * kDim;
  static constexpr int kWeights = kColumns * kKeys;
  static constexpr int kRing = kPlaces * kTileBytes;      // of a warpgroup; after its last tile, its sums and totals
  static constexpr int kQ = kGroups * kRing;
  static constexpr int kP = kQ + 2 * kPlane;                               // [groups][kStep][hi, lo]
  static constexpr int kMaxima = kP + kGroups * kStep * 2 * kWeights;      // [groups][columns][4 warps]; then totals
  static constexpr int kFactors = kMaxima + kGroups * kColumns * 16;       // [columns] {of scores, of outputs}
  static constexpr int kBarriers = kFactors + kColumns * 8;                // [groups][kPlaces]
  static constexpr int kBytes = kBarriers + kGroups * kPlaces * 8;
  static_assert(2 * kStep <= kPlaces && kColumns * (kPitch * 4 + 32) <= kRing);
  static_assert(kBlocks * (kBytes + 1024 + 1024) <= 228 * 1024);
  static __device__ constexpr int sums(int part) { return part * kRing; }
  static __device__ constexpr int totals(int part) { return part * kRing + kColumns * kPitch * 4; }
};

constexpr int kThreads = kWarpgroup + kWarpSize;
constexpr int kKeysUsed = 2;  // barrier 0 is the block's, 1 the warpgroup's

struct Attention {
  const u16* q;          // bf16, rows of 128 that begin at multiples of 8 bytes
  const float *k_scale, *v_scale;
  const int* table;      // [requests, pages]
  const int* lengths;    // [requests]
  const int* starts;     // [requests + 1]
  const u16* gate;       // bf16 or null
  u16* out;              // bf16 [tokens, kv_heads * group, 128]
  float* lse;            // [tokens, kv_heads * group] or null
  int q_token, q_head, gate_token, gate_head;
  i64 table_request;
  int k_scale_head, v_scale_head;
  int requests, tokens;  // tokens past starts[requests] get zeros
  // group_inverse: 2^16 / group, rounded up; box_shift: of the positions, 16 to 64, that a copy brings
  int kv_heads, group, group_inverse, row_tokens, page_shift, box_shift, window;
  int ahead;             // requests, of clusters; the first so many name their own tiles to L2, none where it is 0
  float score_scale;     // softmax_scale * log2(e)
};

// As `meet`, without waiting.
__device__ inline void arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- clusters ----

// Orders nothing: show_barriers has shown the barriers, and what was read before lies in registers. (With .release the
// thread would wait for its last store to global memory.)
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The address of the same place in a block of the cluster.
__device__ inline u32 address_in(u32 address, int block) {
  u32 r;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(address), "r"(block));
  return r;
}
// Stores that the barrier, of the block they go to, counts.
__device__ inline void send(u32 to, float2 x, u32 barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(to),
               "f"(x.x), "f"(x.y), "r"(barrier)
               : "memory");
}
// As barrier_wait, for what other blocks of the cluster sent.
__device__ inline void cluster_barrier_wait(u32 barrier, u32 parity) {
  u32 done = 0;
  for (int tries = 0; !done; ++tries) {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;"
        " selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    if (tries > kMostTries) fail();
  }
}
__device__ inline void name_box_to_l2(const TensorMap* map, int position, int head, int page) {
  asm volatile("cp.async.bulk.prefetch.tensor.4d.L2.global [%0, {%1, %2, %3, %4}];" ::"l"(map), "r"(0),
               "r"(position), "r"(head), "r"(page)
               : "memory");
}
__device__ inline void name_line_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- rows ----

__device__ inline i64 at(int index, int stride) { return static_cast<i64>(index) * stride; }
__device__ inline int token_of(const Attention& a, int column) { return column * a.group_inverse >> 16; }

struct Request {
  int index, length, start, count;  // start: its first token's row of q; count: its new tokens
};
__device__ inline Request request_at(const Attention& a, int index) {
  Request r;
  r.index = index;
  r.length = __ldcg(a.lengths + index);
  r.start = __ldcg(a.starts + index);
  r.count = __ldcg(a.starts + index + 1) - r.start;
  return r;
}

// row_tokens of a request's new tokens and the keys that they see.
struct Row {
  int first_tile, tiles;
  int key_first, key_stop;      // keys that any of the tokens sees
  int position, token, tokens;  // of the first token: its position, its row of q; how many there are
};
template <class S>
__device__ inline Row row_of(const Attention& a, const Request& r, int chunk) {
  const int before = chunk * a.row_tokens;
  Row row;
  row.tokens = min(a.row_tokens, r.count - before);
  row.token = r.start + before;
  row.position = r.length - r.count + before;
  row.key_first = max(0, row.position - a.window + 1);
  row.key_stop = max(row.position + row.tokens, 0);
  row.first_tile = row.key_first / kKeys;
  row.tiles = min(max((row.key_stop + kKeys - 1) / kKeys - row.first_tile, 0), S::kMostTiles);
  return row;
}

template <class S>
struct Barriers {
  u32 base;
  __device__ u32 keys(int tile) const { return base + tile * 8; }
  __device__ u32 values(int tile) const { return base + (S::kTiles + tile) * 8; }
  __device__ u32 received() const { return base + 2 * S::kTiles * 8; }
};

// ---- one warp: tiles from memory ----

// What a lane asks for: a tile's positions of one page.
struct Piece {
  int tile, at, page, position;  // at: rows into the tile
  bool needed;
};
template <class S>
__device__ inline Piece piece_of(const Attention& a, const Request& r, const Row& row, int rank) {
  const int lane = threadIdx.x % 32;
  Piece p;
  p.tile = lane >> (6 - a.box_shift);
  p.at = lane << a.box_shift & (kKeys - 1);
  const int tile = rank + p.tile * S::kCluster, key = (row.first_tile + tile) * kKeys + p.at;
  p.needed = p.tile < S::kTiles && tile < row.tiles && key < row.key_stop && key + (1 << a.box_shift) > row.key_first;
  p.page = p.needed ? __ldcg(a.table + r.index * a.table_request + (key >> a.page_shift)) : 0;
  p.position = key & ((1 << a.page_shift) - 1);
  return p;
}

__device__ inline void name_to_l2(const Maps& maps, const Piece& p, int head) {
  if (p.needed) {
    name_box_to_l2(&maps.k, p.position, head, p.page);
    name_box_to_l2(&maps.v, p.position, head, p.page);
  }
}

template <class S>
__device__ inline void copy_tiles(const Attention& a, const Maps& maps, u32 shared, const Request& request, int head,
                                  int rank, const Barriers<S>& barriers) {
  const int lane = threadIdx.x % 32, pieces = kKeys >> a.box_shift;  // of a tile
  for (int chunk = blockIdx.z, turn = 0; chunk * a.row_tokens < request.count; chunk += gridDim.z, ++turn) {
    const Row row = row_of<S>(a, request, chunk);
    const Piece p = piece_of<S>(a, request, row, rank);
    if (turn > 0) __syncthreads();  // the chunk before is done with shared memory
    const u32 needed = __ballot_sync(kAllLanes, p.needed);
    if (S::kCluster > 1 && lane == 0) barrier_expect(barriers.received(), S::kReceivedBytes);
    if (lane < S::kTiles) {
      const u32 mine = needed >> (lane * pieces) & ((1 << pieces) - 1);
      barrier_expect(barriers.keys(lane), __popc(mine) * (kDim << a.box_shift));
      barrier_expect(barriers.values(lane), __popc(mine) * (kDim << a.box_shift));
    }
    if (turn == 0) {  // lengths and pages were there before the kernel just ahead, the newest keys and values were not
      if (request.index < a.ahead) name_to_l2(maps, p, head);
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    __syncwarp();
    if (p.needed) {
      const u32 to = shared + p.at * kDim;
      copy_box(to + p.tile * S::kTileBytes, &maps.k, 0, p.position, head, p.page, barriers.keys(p.tile));
      if (p.tile < S::kEarly)
        copy_box(to + S::values(p.tile), &maps.v, 0, p.position, head, p.page, barriers.values(p.tile));
    }
    __syncwarp();
    if constexpr (S::kCluster > 1) cluster_arrive();
    if (chunk == 0 && a.ahead > 0 && request.index + a.ahead < a.requests) {
      const Request its_request = request_at(a, request.index + a.ahead);
      if (its_request.count > 0) {
        const Row its_row = row_of<S>(a, its_request, 0);
        name_to_l2(maps, piece_of<S>(a, its_request, its_row, rank), head);
      }
      __syncwarp();
    }
    if constexpr (S::kEarly < S::kTiles) {
      meet(kKeysUsed, kThreads);
      if (p.needed && p.tile >= S::kEarly)
        copy_box(shared + p.at * kDim + S::values(p.tile), &maps.v, 0, p.position, head, p.page,
                 barriers.values(p.tile));
      __syncwarp();
    }
    if constexpr (S::kCluster > 1) cluster_wait();
  }
}

// Rows past the last request's, of one head and every `requests`-th token.
__device__ inline void clear_padding(const Attention& a, int filled, int request, int head) {
  const int heads = a.kv_heads * a.group, lane = threadIdx.x % 32;
  for (int token = filled + request; token < a.tokens; token += a.requests) {
    const i64 query = static_cast<i64>(token) * heads + head * a.group;
    for (int i = lane; i < a.group * kDim / 2; i += 32) *reinterpret_cast<u32*>(a.out + query * kDim + i * 2) = 0;
    if (a.lse != nullptr && lane < a.group) a.lse[query + lane] = -__int_as_float(0x7F800000);
  }
}

// ---- the warpgroup ----

// q as columns, and the factors of their scores and outputs. `ask` runs once the kernel ahead has ended.
template <class S, class F>
__device__ inline void split_queries(const Attention& a, const Row& row, int head, u32 shared, bool is_first, F ask) {
  constexpr int kAtOnce = (S::kColumns + S::kWarps - 1) / S::kWarps;  // a way to memory and back
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns = row.tokens * a.group;
  const auto offset_of = [&](int c, int token_stride, int head_stride) {
    const int token = token_of(a, c);
    return at(row.token + token, token_stride) + at((head - token) * a.group + c, head_stride);
  };
  const uint2* from[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const u16* query = a.q + offset_of(min(warp + S::kWarps * i, columns - 1), a.q_token, a.q_head);
    from[i] = reinterpret_cast<const uint2*>(query) + lane;
    name_line_to_l2(from[i]);
  }
  const int mine = min(warp + S::kWarps * min(lane, kAtOnce - 1), columns - 1);  // whose factors this lane works out
  const u16* const gate_from = a.gate == nullptr ? a.q : a.gate + offset_of(mine, a.gate_token, a.gate_head);
  const float* const k_scale_from = a.k_scale + head * a.k_scale_head;
  const float* const v_scale_from = a.v_scale + head * a.v_scale_head;
  name_line_to_l2(gate_from);
  name_line_to_l2(k_scale_from);
  name_line_to_l2(v_scale_from);
  if (is_first) {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  uint2 raw[kAtOnce];
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) raw[i] = __ldcg(from[i]);
  const float gate = __uint_as_float(static_cast<u32>(__ldcg(gate_from)) << 16);
  const float k_scale = __ldcg(k_scale_from) * a.score_scale, v_scale = __ldcg(v_scale_from);
  ask();
  float my_down = 0.0f;
#pragma unroll
  for (int i = 0; i < kAtOnce; ++i) {
    const int c = warp + S::kWarps * i;
    if (S::kWarps > S::kColumns && c >= S::kColumns) break;
    if (c >= columns) raw[i] = make_uint2(0, 0);
    u32 high, low;
    const float down = split_query(raw[i], high, low);
    if (lane == i) my_down = down;
    const u32 to = shared + S::kQ + lane / 4 * (S::kColumns * 16) + c * 16 + lane % 4 * 4;
    store_shared(to, high);
    store_shared(to + S::kPlane, low);
  }
  const float shut = a.gate == nullptr ? 1.0f : __fdividef(1.0f, 1.0f + __expf(-gate));
  const int its_column = warp + S::kWarps * lane;
  if (lane < kAtOnce && its_column < S::kColumns)
    store_shared(shared + S::kFactors + its_column * 8, make_float2(my_down * k_scale, shut * v_scale));
}

__device__ inline i64 query_of(const Attention& a, const Row& row, int head, int column) {
  const int token = token_of(a, column);
  return static_cast<i64>(row.token + token) * a.kv_heads * a.group + (head - token) * a.group + column;
}

// All parts' sums of this block's columns, in the parts' order; a warp takes half a column.
template <class S>
__device__ inline void finish(const Attention& a, const Row& row, int head, int rank, u32 shared) {
  const int lane = threadIdx.x % 32, columns = row.tokens * a.group;
#pragma unroll(S::kCluster == 1 ? 2 : 8)
  for (int item = threadIdx.x / 32; item < S::kMine * 2; item += S::kWarps) {
    const int index = item / 2, c = index * S::kCluster + rank, at = item % 2 * (kDim / 2) + lane * 2;
    if (c >= columns) break;
    float its_total[S::kParts], its_highest[S::kParts], highest = kLowest, total = 0.0f;
    float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const u32 totals = shared + S::totals(part) + index * 32;
      const float4 l = load_shared_4(totals), l_next = load_shared_4(totals + 16);
      its_total[part] = (l.x + l.z) + (l_next.x + l_next.z);
      its_highest[part] = l.y;
      highest = fmaxf(highest, l.y);
    }
#pragma unroll
    for (int part = 0; part < S::kParts; ++part) {
      const float2 y = load_shared_2(shared + S::sums(part) + (index * kPitch + at) * 4);
      const float weight = exp2_of(its_highest[part] - highest);
      total += its_total[part] * weight;
      sum = make_float2(sum.x + y.x * weight, sum.y + y.y * weight);
    }
    const i64 query = query_of(a, row, head, c);
    const float factor = load_shared_2(shared + S::kFactors + c * 8).y;
    const float scale = total == 0.0f ? 0.0f : __fdividef(factor, total);
    *reinterpret_cast<u32*>(a.out + query * kDim + at) = pair_bf16(sum.x * scale, sum.y * scale);
    if (a.lse != nullptr && at == 0)
      a.lse[query] = (highest + log2f(total) - kProbabilityExponent) * 0.69314718f;  // without keys -infinity
  }
}

template <class S>
__device__ inline void attend(const Attention& a, const Row& row, int head, int rank, u32 shared,
                              const Barriers<S>& barriers, int turn) {
  constexpr int N = S::kColumns, kColumnBlocks = N / 8;  // of 8 columns; a thread has columns 8j + 2t and the next
  using Product = Wgmma<N>;
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int count = (row.tiles - rank + S::kCluster - 1) / S::kCluster;  // tiles of this block
  const auto key_of = [&](int i) { return (row.first_tile + rank + i * S::kCluster) * kKeys; };

  const u32 parity = turn & 1, local = shared & 0xFFFFFF;  // above lies the block's rank: none of a descriptor's
  split_queries<S>(a, row, head, shared, turn == 0, [] {});
  show_to_engines();
  meet(1, kWarpgroup);

  float s[S::kTiles][N / 2], factor[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) factor[i] = load_shared_1(shared + S::kFactors + (i / 2 * 8 + 2 * t + i % 2) * 8);
  const u32 q_columns = uniform(describe_columns<N>(local + S::kQ));
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) {
    if (i >= count) {
#pragma unroll
      for (int n = 0; n < N / 2; ++n) s[i][n] = -__int_as_float(0x7F800000);
      continue;
    }
    const u32 keys = uniform(describe_keys(local + i * S::kTileBytes));
    barrier_wait(barriers.keys(i), parity);
    wgmma_fence();  // the small halves first, while the sums are small
    Product::template shared<true, false>(s[i], keys, q_columns + (S::kPlane >> 4));
#pragma unroll
    for (int k = 1; k < 4; ++k)
      Product::template shared<true, true>(s[i], keys + 2 * k, q_columns + (S::kPlane >> 4) + 2 * N * k);
#pragma unroll
    for (int k = 0; k < 4; ++k) Product::template shared<false, true>(s[i], keys + 2 * k, q_columns + 2 * N * k);
    wgmma_commit();
    wgmma_wait(s[i]);
#pragma unroll
    for (int n = 0; n < N / 2; ++n) s[i][n] *= factor[n / 4 * 2 + n % 2];
    // Tiles that reach beyond what the first token sees, or that the last no longer sees whole.
    const int key0 = key_of(i);
    if (key0 + kKeys - 1 > row.position || key0 < row.position + row.tokens - a.window) {
#pragma unroll
      for (int n = 0; n < N / 2; ++n) {
        const int token = token_of(a, 8 * (n / 4) + 2 * t + n % 2), key = key0 + 16 * warp + g + n / 2 % 2 * 8;
        const int behind = row.position + token - key;
        if (behind < 0 || behind >= a.window) s[i][n] = -__int_as_float(0x7F800000);
      }
    }
  }

  // Maxima over the tiles, the lanes of a warp, then the warps.
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      float top = fmaxf(s[0][4 * j + b], s[0][4 * j + 2 + b]);
#pragma unroll
      for (int i = 1; i < S::kTiles; ++i) top = fmaxf(top, fmaxf(s[i][4 * j + b], s[i][4 * j + 2 + b]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(kAllLanes, top, step));
      if (g == 0) store_shared(shared + S::kMaxima + (8 * j + 2 * t + b) * 16 + warp * 4, top);
    }
  }
  meet(1, kWarpgroup);  // nobody needs keys and q any more
  if constexpr (S::kEarly < S::kTiles) arrive(kKeysUsed, kThreads);
  if constexpr (S::kCluster > 1) cluster_arrive();

  float highest[N / 4], total[N / 4];
  const u32 p_at = shared + warp * (N * 16) + 2 * t * 16 + 2 * g;
#pragma unroll
  for (int j = 0; j < kColumnBlocks; ++j) {
#pragma unroll
    for (int b = 0; b < 2; ++b) {
      const float4 tops = load_shared_4(shared + S::kMaxima + (8 * j + 2 * t + b) * 16);
      const float top = fmaxf(fmaxf(fmaxf(tops.x, tops.y), fmaxf(tops.z, tops.w)), kLowest);
      highest[2 * j + b] = top;
      total[2 * j + b] = 0.0f;
#pragma unroll
      for (int i = 0; i < S::kTiles; ++i) {
        if (i >= count) break;
        const float p = exp2_of(s[i][4 * j + b] + (kProbabilityExponent - top));
        const float its_next = exp2_of(s[i][4 * j + 2 + b] + (kProbabilityExponent - top));
        total[2 * j + b] += p + its_next;
        u16 hi, lo;
        split(p, its_next, hi, lo);
        const u32 to = p_at + i * 2 * S::kWeights + j * 128 + b * 16;
        store_shared(to, hi);
        store_shared(to + S::kWeights, lo);
      }
    }
  }
  const int row_of_values = 16 * (lane / 16) + (lane & 6) + (lane / 8 & 1) + 8 * (lane & 1);  // that ldmatrix takes
  const u32 v_at = shared + row_of_values * kDim + ((warp ^ (row_of_values & 7)) << 4);
  u32 v[2][2][4];
  const auto get_values = [&](int i) {
    barrier_wait(barriers.values(i), parity);
    load_values(v, v_at + S::values(i));
    const int low = row.key_first - key_of(i), high = row.key_stop - key_of(i);  // keys of the tile that are seen
    if (low > 0 || high < kKeys) hide_values(v, t, low, high);
  };
  if (count > 0) get_values(0);
  show_to_engines();
  meet(1, kWarpgroup);

  constexpr int kTogether = N == 8 || N == 16 && S::kBlocks <= 3 ? 2 : 1;  // halves of d whose sums registers hold
  float out[2][N / 2];
#pragma unroll
  for (int n = 0; n < N / 2; ++n) out[0][n] = out[1][n] = 0.0f;
#pragma unroll
  for (int i = 0; i < S::kTiles; ++i) {
    if (i >= count) break;
    if (i > 0) get_values(i);
    const u32 p_columns = uniform(describe_columns<N>(local + i * 2 * S::kWeights));
#pragma unroll
    for (int half = 0; half < 2; half += kTogether) {
      float d[kTogether][N / 2];
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        Product::template registers<true, false>(d[k], v[half + k][0], p_columns + (S::kWeights >> 4));
        Product::template registers<true, true>(d[k], v[half + k][1], p_columns + (S::kWeights >> 4) + 2 * N);
        Product::template registers<false, true>(d[k], v[half + k][0], p_columns);
        Product::template registers<false, true>(d[k], v[half + k][1], p_columns + 2 * N);
      }
      wgmma_commit();
      if (i == 0 && half == 0) {  // meanwhile
#pragma unroll
        for (int c = 0; c < N / 4; ++c) {
#pragma unroll
          for (int step = 4; step < 32; step *= 2) total[c] += __shfl_xor_sync(kAllLanes, total[c], step);
        }
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
        wgmma_wait(d[k]);
#pragma unroll
        for (int n = 0; n < N / 2; ++n) out[half + k][n] += d[k][n];
      }
    }
  }

  // Each column's sums to the block that finishes it, once that block is through with its keys.
  float my_total = 0.0f, my_highest = 0.0f;  // of the column that this lane sends
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    if (g == i) my_total = total[i], my_highest = highest[i];
  }
  const auto slot_of = [&](int column) { return rank * S::kMine + column / S::kCluster; };
  const auto store = [&](int column, u32 at, float2 x) {
    if constexpr (S::kCluster > 1) {
      const int block = column % S::kCluster;
      send(address_in(shared, block) + at, x, address_in(barriers.received(), block));
    } else {
      store_shared(shared + at, x);
    }
  };
  if constexpr (S::kCluster > 1) cluster_wait();
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    const int column = i / 2 * 8 + 2 * t + i % 2, n = i / 2 * 4 + i % 2;
    const u32 sums = S::kSums + (slot_of(column) * kPitch + warp * 16 + 2 * g) * 4;
    store(column, sums, make_float2(out[0][n], out[0][n + 2]));
    store(column, sums + 64 * 4, make_float2(out[1][n], out[1][n + 2]));
  }
  const int column = g / 2 * 8 + 2 * t + g % 2;
  if (g < N / 4) store(column, S::kTotals + (slot_of(column) * 4 + warp) * 8, make_float2(my_total, my_highest));
  if constexpr (S::kCluster > 1) cluster_barrier_wait(barriers.received(), parity);
  else meet(1, kWarpgroup);
  finish<S>(a, row, head, rank, shared);
}

template <class S>
__device__ inline void paged_attention_window(const Attention& a, const Maps& maps, u8* all) {
  const u32 shared = shared_address(all) + (-shared_address(all) & 1023);
  const Barriers<S> barriers{shared + S::kBarriers};
  const int warp = uniform(threadIdx.x / 32), rank = blockIdx.x % S::kCluster, head = blockIdx.x / S::kCluster;
  const Request request = request_at(a, blockIdx.y);
  const bool is_idle = static_cast<int>(blockIdx.z) * a.row_tokens >= request.count;
  if (threadIdx.x == kWarpgroup) {
    for (int i = 0; i < 2 * S::kTiles + 1; ++i) barrier_init(barriers.base + i * 8, 1);
    show_barriers();
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }
  __syncthreads();
  if (warp == kWarpgroup / 32) {
    copy_tiles<S>(a, maps, shared, request, head, rank, barriers);
    if (is_idle) wait_for_previous_kernel();
    if (rank == 0 && blockIdx.z == 0) clear_padding(a, __ldcg(a.starts + a.requests), request.index, head);
    return;
  }
  if (is_idle) wait_for_previous_kernel();
  for (int chunk = blockIdx.z, turn = 0; chunk * a.row_tokens < request.count; chunk += gridDim.z, ++turn) {
    if (turn > 0) {
      show_to_engines();
      __syncthreads();
    }
    attend<S>(a, row_of<S>(a, request, chunk), head, rank, shared, barriers, turn);
  }
}

// ---- a block with rows for itself ----

// Of a warpgroup; a constant names each barrier, or ptxas would give every block all 16.
template <int kGroups>
__device__ inline void meet_own(int group) {
#pragma unroll
  for (int i = 0; i < kGroups; ++i)
    if (group == i) meet(1 + i, kWarpgroup);
}

// The place in a warpgroup's ring that is next.
struct Next {
  int place;
  u32 parity;
};

template <class S>
__device__ inline void attend_alone(const Attention& a, const Maps& maps, const Row& row, u32 shared, Next& next,
                                    int filled, bool is_first) {
  constexpr int N = S::kColumns, T = S::kStep;  // a thread has columns 8j + 2t and the next
  using Product = Wgmma<N>;
  const int request = blockIdx.y, head = blockIdx.x;
  const int all_warps = uniform(threadIdx.x / 32), group = all_warps / 4, warp = all_warps % 4;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int count = (row.tiles - group + S::kGroups - 1) / S::kGroups;  // tiles of this warpgroup
  const int units = (count + T - 1) / T * 2 * T;  // tiles of keys and of values, in the order of their use
  const auto key_of = [&](int i) { return (row.first_tile + group + i * S::kGroups) * kKeys; };
  const u32 ring = shared + group * S::kRing, barriers = shared + S::kBarriers + group * S::kPlaces * 8;

  // A lane's tile: its positions that this warp asks for.
  const int box = 1 << a.box_shift, my_key = key_of(lane) + warp * box;
  const bool is_needed =
      lane < count && warp * box < kKeys && my_key < row.key_stop && my_key + box > row.key_first;
  const int page = is_needed ? __ldcg(a.table + request * a.table_request + (my_key >> a.page_shift)) : 0;
  const int position = my_key & ((1 << a.page_shift) - 1);
  const auto ask = [&](int unit, int place) {
    if (unit < units && lane == unit / (2 * T) * T + unit % T) {
      const u32 barrier = barriers + place * 8;
      barrier_expect(barrier, is_needed ? box * kDim : 0);
      if (is_needed)
        copy_box(ring + place * S::kTileBytes + warp * box * kDim, unit / T % 2 == 0 ? &maps.k : &maps.v, 0, position,
                 head, page, barrier);
    }
    __syncwarp();
  };
  const auto place_of = [&](int later) {
    return next.place + later >= S::kPlaces ? next.place + later - S::kPlaces : next.place + later;
  };
  const auto wait_for = [&](int later) {
    barrier_wait(barriers + place_of(later) * 8, next.parity ^ (next.place + later >= S::kPlaces));
  };

  split_queries<S>(a, row, head, shared, is_first, [&] {
#pragma unroll
    for (int i = 0; i < S::kPlaces; ++i) ask(i, place_of(i));
  });
  if (is_first && all_warps == 0 && blockIdx.z == 0) clear_padding(a, filled, request, head);
  show_to_engines();
  __syncthreads();

  float out[2][N / 2], highest[N / 4], total[N / 4];
#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
    highest[i] = kLowest;
    total[i] = 0.0f;
    out[0][2 * i] = out[0][2 * i + 1] = out[1][2 * i] = out[1][2 * i + 1] = 0.0f;
  }
  const u32 local = shared & 0xFFFFFF, q_columns = uniform(describe_columns<N>(local + S::kQ));
  const u32 p_planes = S::kP + group * T * 2 * S::kWeights;
  const u32 p_columns = uniform(describe_columns<N>(local + p_planes));
  const u32 p_at = shared + p_planes + warp * (N * 16) + 2 * t * 16 + 2 * g;
  const u32 tops_at = shared + S::kMaxima + group * N * 16 + 2 * t * 16;
  const int row_of_values = 16 * (lane / 16) + (lane & 6) + (lane / 8 & 1) + 8 * (lane & 1);  // that ldmatrix takes
  const u32 v_at = ring + row_of_values * kDim + ((warp ^ (row_of_values & 7)) << 4);

#pragma unroll 1
  for (int unit = 0; unit < units; unit += 2 * T) {
    float s[T][N / 2];
#pragma unroll
    for (int r = 0; r < T; ++r) wait_for(r);
    wgmma_fence();
#pragma unroll
    for (int r = 0; r < T; ++r) {  // the small halves first, while the sums are small
      const u32 keys = uniform(describe_keys((ring & 0xFFFFFF) + place_of(r) * S::kTileBytes));
      Product::template shared<true, false>(s[r], keys, q_columns + (S::kPlane >> 4));
#pragma unroll
      for (int k = 1; k < 4; ++k)
        Product::template shared<true, true>(s[r], keys + 2 * k, q_columns + (S::kPlane >> 4) + 2 * N * k);
#pragma unroll
      for (int k = 0; k < 4; ++k) Product::template shared<false, true>(s[r], keys + 2 * k, q_columns + 2 * N * k);
    }
    wgmma_commit();
    float factor[N / 4];  // meanwhile
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
      factor[i] = load_shared_1(shared + S::kFactors + (i / 2 * 8 + 2 * t + i % 2) * 8);
#pragma unroll
    for (int r = 0; r < T; ++r) wgmma_wait(s[r]);

#pragma unroll
    for (int r = 0; r < T; ++r) {
#pragma unroll
      for (int n = 0; n < N / 2; ++n) s[r][n] *= factor[n / 4 * 2 + n % 2];
      // Tiles that reach beyond what the first token sees, or that the last no longer sees whole, or past the row.
      const int key0 = key_of(unit / 2 + r);
      if (key0 + kKeys - 1 > row.position || key0 < row.position + row.tokens - a.window) {
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
          const int token = token_of(a, 8 * (n / 4) + 2 * t + n % 2), key = key0 + 16 * warp + g + n / 2 % 2 * 8;
          const int behind = row.position + token - key;
          if (behind < 0 || behind >= a.window) s[r][n] = -__int_as_float(0x7F800000);
        }
      }
    }
    float tops[N / 4];  // over the lanes of a warp, then the warps
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int n = i / 2 * 4 + i % 2;
      tops[i] = fmaxf(s[0][n], s[0][n + 2]);
#pragma unroll
      for (int r = 1; r < T; ++r) tops[i] = fmaxf(tops[i], fmaxf(s[r][n], s[r][n + 2]));
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) tops[i] = fmaxf(tops[i], __shfl_xor_sync(kAllLanes, tops[i], step));
    }
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
      if (g == 0) store_shared(tops_at + (i / 2 * 8 + i % 2) * 16 + warp * 4, tops[i]);
    meet_own<S::kGroups>(group);  // keys are used up
#pragma unroll
    for (int r = 0; r < T; ++r) ask(unit + S::kPlaces + r, place_of(r));

    float before[N / 4];  // factor of the sums so far
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const float4 all = load_shared_4(tops_at + (i / 2 * 8 + i % 2) * 16);
      const float top = fmaxf(fmaxf(fmaxf(all.x, all.y), fmaxf(all.z, all.w)), highest[i]);
      before[i] = exp2_of(highest[i] - top);
      highest[i] = top;
      total[i] *= before[i];
    }
    if constexpr (N > 16) {  // now, for want of registers
#pragma unroll
      for (int n = 0; n < N / 2; ++n) out[0][n] *= before[n / 4 * 2 + n % 2], out[1][n] *= before[n / 4 * 2 + n % 2];
    }
#pragma unroll
    for (int r = 0; r < T; ++r) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) {
        const int n = i / 2 * 4 + i % 2;
        const float minus = kProbabilityExponent - highest[i];
        const float p = exp2_of(s[r][n] + minus), its_next = exp2_of(s[r][n + 2] + minus);
        total[i] += p + its_next;
        u16 hi, lo;
        split(p, its_next, hi, lo);
        const u32 to = p_at + r * 2 * S::kWeights + i / 2 * 128 + i % 2 * 16;
        store_shared(to, hi);
        store_shared(to + S::kWeights, lo);
      }
    }
    u32 v[T][2][2][4];
#pragma unroll
    for (int r = 0; r < T; ++r) {
      wait_for(T + r);
      load_values(v[r], v_at + place_of(T + r) * S::kTileBytes);
      const int key0 = key_of(unit / 2 + r), low = row.key_first - key0, high = row.key_stop - key0;
      if (low > 0 || high < kKeys) hide_values(v[r], t, low, high);
    }
    show_to_engines();
    meet_own<S::kGroups>(group);  // so are values

    constexpr int kTogether = N <= 16 ? 2 : 1;  // halves of d whose sums registers hold
#pragma unroll
    for (int half = 0; half < 2; half += kTogether) {
      float d[T][kTogether][N / 2];
      wgmma_fence();
#pragma unroll
      for (int r = 0; r < T; ++r) {
        const u32 columns = p_columns + r * (2 * S::kWeights >> 4);
#pragma unroll
        for (int k = 0; k < kTogether; ++k) {
          Product::template registers<true, false>(d[r][k], v[r][half + k][0], columns + (S::kWeights >> 4));
          Product::template registers<true, true>(d[r][k], v[r][half + k][1], columns + (S::kWeights >> 4) + 2 * N);
          Product::template registers<false, true>(d[r][k], v[r][half + k][0], columns);
          Product::template registers<false, true>(d[r][k], v[r][half + k][1], columns + 2 * N);
        }
      }
      wgmma_commit();
      if (half == 0) {
#pragma unroll
        for (int r = 0; r < T; ++r) ask(unit + S::kPlaces + T + r, place_of(T + r));
      }
#pragma unroll
      for (int r = 0; r < T; ++r) {
#pragma unroll
        for (int k = 0; k < kTogether; ++k) wgmma_wait(d[r][k]);
      }
#pragma unroll
      for (int k = 0; k < kTogether; ++k) {
#pragma unroll
        for (int n = 0; n < N / 2; ++n) {
          float& sum = out[half + k][n];
          sum = (N <= 16 ? sum * before[n / 4 * 2 + n % 2] : sum) + d[0][k][n];
          if constexpr (T == 2) sum += d[1][k][n];
        }
      }
    }
    next.place += 2 * T;
    if (next.place >= S::kPlaces) {
      next.place -= S::kPlaces;
      next.parity ^= 1;
    }
  }

#pragma unroll
  for (int i = 0; i < N / 4; ++i) {
#pragma unroll
    for (int step = 4; step < 32; step *= 2) total[i] += __shfl_xor_sync(kAllLanes, total[i], step);
  }
  if constexpr (S::kGroups == 1) {  // straight to memory
#pragma unroll
    for (int i = 0; i < N / 4; ++i)
      if (g == 0) store_shared(tops_at + (i / 2 * 8 + i % 2) * 16 + warp * 4, total[i]);
    meet(1, kWarpgroup);
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = i / 2 * 8 + 2 * t + i % 2, n = i / 2 * 4 + i % 2;
      if (column >= row.tokens * a.group) continue;
      const float4 l = load_shared_4(tops_at + (i / 2 * 8 + i % 2) * 16);
      const float all = (l.x + l.y) + (l.z + l.w);
      const float scale =
          all == 0.0f ? 0.0f : __fdividef(load_shared_2(shared + S::kFactors + column * 8).y, all);
      const i64 query = query_of(a, row, head, column);
      u16* const to = a.out + query * kDim + warp * 16 + 2 * g;
      *reinterpret_cast<u32*>(to) = pair_bf16(out[0][n] * scale, out[0][n + 2] * scale);
      *reinterpret_cast<u32*>(to + 64) = pair_bf16(out[1][n] * scale, out[1][n + 2] * scale);
      if (a.lse != nullptr && warp == 0 && g == 0)
        a.lse[query] = (highest[i] + log2f(all) - kProbabilityExponent) * 0.69314718f;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const int column = i / 2 * 8 + 2 * t + i % 2, n = i / 2 * 4 + i % 2;
      const u32 to = shared + S::sums(group) + (column * kPitch + warp * 16 + 2 * g) * 4;
      store_shared(to, make_float2(out[0][n], out[0][n + 2]));
      store_shared(to + 64 * 4, make_float2(out[1][n], out[1][n + 2]));
      if (g == 0)
        store_shared(shared + S::totals(group) + (column * 4 + warp) * 8, make_float2(total[i], highest[i]));
    }
    __syncthreads();
    finish<S>(a, row, head, 0, shared);
  }
}

template <class S>
__device__ inline void paged_attention_rows(const Attention& a, const Maps& maps, u8* all) {
  const u32 shared = shared_address(all) + (-shared_address(all) & 1023);
  const Request request = request_at(a, blockIdx.y);
  const int filled = __ldcg(a.starts + a.requests);
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kGroups * S::kPlaces; ++i) barrier_init(shared + S::kBarriers + i * 8, 4);
    show_barriers();
    prefetch_map(&maps.k);
    prefetch_map(&maps.v);
  }
  __syncthreads();
  Next next{0, 0};
  if (static_cast<int>(blockIdx.z) * a.row_tokens >= request.count) {
    wait_for_previous_kernel();
    if (threadIdx.x < kWarpSize && blockIdx.z == 0) clear_padding(a, filled, request.index, blockIdx.x);
  }
  for (int chunk = blockIdx.z, turn = 0; chunk * a.row_tokens < request.count; chunk += gridDim.z, ++turn) {
    if (turn > 0) {
      show_to_engines();  // sums lay where tiles come
      __syncthreads();
    }
    attend_alone<S>(a, maps, row_of<S>(a, request, chunk), shared, next, filled, turn == 0);
  }
}

#define KERNEL(name, attributes, function)                                                                             \
  extern "C" __global__ void attributes sm90_paged_attention_##name(                                                   \
      const u16* q, const float* k_scale, const float* v_scale, const int* table, const int* lengths,                  \
      const int* starts, const u16* gate, u16* out, float* lse, int q_token, int q_head, int gate_token,               \
      int gate_head, i64 table_request, int k_scale_head, int v_scale_head, int requests, int tokens, int kv_heads,    \
      int group, int group_inverse, int row_tokens, int page_shift, int box_shift, int window, int ahead,              \
      float score_scale, const __grid_constant__ Maps maps) {                                                          \
    extern __shared__ __align__(1024) u8 s_all[];                                                                      \
    const Attention a{q, k_scale, v_scale, table, lengths, starts, gate, out, lse, q_token, q_head,                    \
                      gate_token, gate_head, table_request, k_scale_head, v_scale_head, requests, tokens, kv_heads,    \
                      group, group_inverse, row_tokens, page_shift, box_shift, window, ahead, score_scale};            \
    function(a, maps, s_all);                                                                                          \
  }
#define CLUSTER(columns, cluster, tiles, blocks)                                                                       \
  KERNEL(window_##columns##_##cluster, __cluster_dims__(cluster, 1, 1) __launch_bounds__(kThreads, blocks),            \
         (paged_attention_window<Shape<columns, cluster, tiles, blocks>>))
#define ROWS(columns, groups)                                                                                          \
  KERNEL(window_rows_##columns##_##groups, __launch_bounds__(groups* kWarpgroup, 4 / groups),                          \
         (paged_attention_rows<Stream<columns, groups>>))

CLUSTER(8, 2, 5, 3)
CLUSTER(8, 4, 3, 4)
CLUSTER(8, 8, 2, 4)
CLUSTER(16, 2, 5, 3)
CLUSTER(16, 4, 3, 4)
CLUSTER(16, 8, 2, 4)
CLUSTER(32, 2, 5, 2)
CLUSTER(32, 4, 3, 3)
CLUSTER(32, 8, 2, 3)
ROWS(8, 1)
ROWS(8, 2)
ROWS(16, 1)
ROWS(16, 2)
ROWS(32, 1)
ROWS(32, 2)
