// The routed experts for few tokens, prepared NVFP4 weights: gate_up with the clamped SwiGLU, down with the routing
// weight, and the sum of a token's experts; common/nvfp4_sm90_decode.cuh multiplies.
//
// A tile is up to kTokens routed (token, slot) pairs of an expert. Every block sorts all pairs itself, in shared memory
// (at most kMostPairs): a kernel of its own would cost a launch and the way through memory.
//
//   ids        7 2 7 0 | 2 7 ..        offset[e]  where expert e's pairs begin in `pair`
//   pair       3 | 1 4 | 0 2 5 | ..    by expert, in the order of the ids
//   tiles      (0, 0) (2, 1) (7, 3)    expert and first place; experts without a pair have none and cost nothing
//
// Bytes: 9/16 of a byte a weight of each expert that has a pair. Sums are in an order that only shapes and ids decide.
#include "common/nvfp4_sm90_decode.cuh"

constexpr int kFewPairs = 32;
constexpr int kAhead = 3;  // units of each group on their way while blocks do not wait: what waits is behind them

struct Routing {
  int* count;
  u16 *pair, *tile_expert, *tile_first, *tile_size;
  int* offset;

  __device__ explicit Routing(u8* shared, int most_pairs = kMostPairs)
      : count(reinterpret_cast<int*>(shared)),
        pair(reinterpret_cast<u16*>(shared + 16)),
        tile_expert(pair + most_pairs),
        tile_first(tile_expert + most_pairs),
        tile_size(tile_first + most_pairs),
        offset(reinterpret_cast<int*>(tile_size + most_pairs)) {}

  // The tables but `offset` from at most kFewPairs by one warp; others must meet it before they read them.
  template <class S>
  __device__ void sort_few(const int* ids, int pairs, int experts) const {
    const int p = threadIdx.x % 32, given = p < pairs ? __ldcg(ids + p) : -1;
    const int e = given >= 0 && given < experts ? given : kMostExperts;
    int place = 0, rank = 0, size = 0, tile = 0;
    constexpr int kAtOnce = 8;  // lanes without a pair are behind all experts
    for (int first = 0; first < pairs; first += kAtOnce) {
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) {
        const int other = __shfl_sync(0xFFFFFFFFu, e, first + q);
        place += other < e;
        rank += other == e && first + q < p;
        size += other == e;
      }
    }
    const bool local = e < kMostExperts, starts = local && rank % S::kTokens == 0;
    place += rank;
    const int start = starts ? place : 32;
    for (int first = 0; first < pairs; first += kAtOnce) {
#pragma unroll
      for (int q = 0; q < kAtOnce; ++q) tile += __shfl_sync(0xFFFFFFFFu, start, first + q) < place;
    }
    if (local) pair[place] = p;
    if (starts) {
      tile_expert[tile] = e;
      tile_first[tile] = place;
      tile_size[tile] = min(S::kTokens, size - rank);
    }
    const u32 all = __ballot_sync(0xFFFFFFFFu, starts);
    if (p == 0) *count = __popc(all);
  }
  __device__ int tiles() const { return *count; }

  // Fills the tables from ids [pairs], the whole block together. `scratch`: for each 32 neighbours among the pairs and
  // each expert, first how many of them are the expert's, then how many are in the 32s before.
  template <class S>
  __device__ void sort(const int* ids, int pairs, int experts, u8* scratch) const {
    constexpr int kEach = (kMostPairs + S::kThreads - 1) / S::kThreads;
    static_assert(2 * S::kThreads >= kMostExperts && 2 * kMostPairs / 32 * kMostExperts <= S::kRing);
    u16* counts = reinterpret_cast<u16*>(scratch);
    const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, neighbours = (pairs + 31) / 32;
    int e[kEach], rank[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int p = thread + i * S::kThreads, given = p < pairs ? ids[p] : -1;
      e[i] = given >= 0 && given < experts ? given : kMostExperts;  // others belong to another rank
    }
    for (int i = thread; i < neighbours * kMostExperts / 8; i += S::kThreads)
      reinterpret_cast<uint4*>(counts)[i] = make_uint4(0, 0, 0, 0);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const u32 same = __match_any_sync(0xFFFFFFFFu, e[i]);
      rank[i] = __popc(same & ((1u << lane) - 1));
      if (e[i] < kMostExperts && rank[i] == 0)
        counts[(thread + i * S::kThreads) / 32 * kMostExperts + e[i]] = __popc(same);
    }
    __syncthreads();
    u32 sizes = 0;  // of this thread's two experts, 16 bits each
    if (2 * thread < kMostExperts) {
      u32* both = reinterpret_cast<u32*>(counts) + thread;
      for (int i = 0; i < neighbours; ++i) {
        const u32 more = both[i * kMostExperts / 2];
        both[i * kMostExperts / 2] = sizes;
        sizes += more;
      }
    }
    const int size[2] = {static_cast<int>(sizes & 0xFFFF), static_cast<int>(sizes >> 16)};
    const auto tiles_of = [](int size) { return (size + S::kTokens - 1) / S::kTokens; };
    const u32 own = size[0] + size[1] + ((tiles_of(size[0]) + tiles_of(size[1])) << 16);
    u32 all = own;  // pairs, and tiles << 16, up to this thread's
    for (int step = 1; step < 32; step *= 2) {
      const u32 other = __shfl_up_sync(0xFFFFFFFFu, all, step);
      if (lane >= step) all += other;
    }
    u32* warps = reinterpret_cast<u32*>(tile_size);  // not in use yet
    if (lane == 31) warps[warp] = all;
    __syncthreads();
    for (int i = 0; i < warp; ++i) all += warps[i];
    __syncthreads();
    int place = (all - own) & 0xFFFF, tile = (all - own) >> 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * thread < kMostExperts) offset[2 * thread + i] = place;
      for (int first = 0; first < size[i]; first += S::kTokens, ++tile) {
        tile_expert[tile] = 2 * thread + i;
        tile_first[tile] = place + first;
        tile_size[tile] = min(S::kTokens, size[i] - first);
      }
      place += size[i];
    }
    if (thread == S::kThreads - 1) *count = tile;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int p = thread + i * S::kThreads;
      if (e[i] < kMostExperts) pair[offset[e[i]] + counts[p / 32 * kMostExperts + e[i]] + rank[i]] = p;
    }
    __syncthreads();
  }
};

// Rows are tiles' blocks of 64, tile by tile; a tile's pairs are a set of columns.
template <class S>
struct Experts {
  static constexpr bool kArriving = false;
  Routing routing;
  int row_blocks;

  __device__ bool arriving() const { return false; }
  __device__ int columns_of(int row) const { return row / row_blocks; }
  __device__ int rows_end(int set) const { return (set + 1) * row_blocks; }
  __device__ int tokens(int set) const { return routing.tile_size[set]; }
  __device__ Place place(int row, int unit) const {
    const int tile = row / row_blocks;
    return {routing.tile_expert[tile] * row_blocks + (row - tile * row_blocks), unit};
  }
  __device__ int pair_of(int tile, int token) const { return routing.pair[routing.tile_first[tile] + token]; }
};

__device__ inline u16 clamped_swiglu(float gate, float up, float limit) {
  gate = gate / (1.0f + expf(-gate));
  gate = gate > limit ? limit : gate;  // as torch's clamp, NaN passes
  up = up > limit ? limit : up < -limit ? -limit : up;
  return to_bf16(gate * up);
}

template <class S>
struct GateUp : Experts<S> {
  static constexpr int kEarly = 0;
  const float* global_scale;
  const u16* x;
  u16* inner;
  i64 x_stride;
  int k, top_k, parts;
  float limit;
  const u8 *down_codes, *down_scales;  // [experts, blocks of k, chunks of this->row_blocks * 32, ..]

  __device__ void wait_for_activations() const { let_next_kernel_start(); }
  __device__ void fetched_all() const {
    const int rows = chunks_of(k), inner = 32 * this->row_blocks;
    fetch_ahead<S>(Experts<S>{this->routing, rows}, down_codes, down_scales, this->routing.tiles() * rows,
                   units_of(inner), chunks_of(inner));
  }
  __device__ Source source(int set, int token, int unit) const {
    return {x + this->pair_of(set, token) / top_k * x_stride + unit * kUnitK, k - unit * kUnitK, 1.0f};
  }
  __device__ void finish(int row, int token, int pair, float gate, float up) const {
    const int tile = row / this->row_blocks;
    const i64 p = this->pair_of(tile, token);
    const float* scale = global_scale + this->routing.tile_expert[tile] * parts;
    inner[p * (this->row_blocks * 32) + (row - tile * this->row_blocks) * 32 + pair] =
        clamped_swiglu(gate * kRange * scale[0], up * kRange * scale[parts - 1], limit);
  }
};

// Routing weights and global scales go into the columns' factors.
template <class S>
struct Down : Experts<S> {
  static constexpr int kEarly = 1;
  const float *global_scale, *weights;
  const u16* inner;
  float* parts;
  int n, k;

  __device__ void fetched_all() const {}
  __device__ void wait_for_activations() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ Source source(int set, int token, int unit) const {
    const int p = this->pair_of(set, token);
    return {inner + static_cast<i64>(p) * k + unit * kUnitK, k - unit * kUnitK,
            weights[p] * global_scale[this->routing.tile_expert[set]]};
  }
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    const int tile = row / this->row_blocks, p = this->pair_of(tile, token);
    const int at = (row - tile * this->row_blocks) * kTileRows + pair_row(pair);
    float* to = parts + static_cast<i64>(p) * n + at;
    if (at < n) to[0] = a * kRange;
    if (at + 8 < n) to[8] = b * kRange;
  }
};

#define VARIANT(tokens)                                                                                              \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, Shape<tokens>::kBlocks)                      \
      sm90_nvfp4_moe_gate_up_t##tokens(                                                                              \
      const u8* codes,            /* [experts, row_blocks, chunks, 2048], gate and up rows paired */                 \
      const u8* scales,           /* [experts, row_blocks, chunks, 256] */                                           \
      const float* global_scale,  /* [experts, parts] */                                                             \
      const u16* x,               /* bf16 [tokens, k], rows x_stride apart, each at 8 bytes */                       \
      const int* ids,             /* [pairs] = [tokens, top_k] */                                                    \
      u16* inner,                 /* bf16 [pairs, 32 * row_blocks] */                                                \
      float* partial, i64 x_stride, int pairs, int top_k, int experts, int row_blocks, int k,                        \
      int parts, float limit, const u8* down_codes, const u8* down_scales) {                                         \
    using S = Shape<tokens>;                                                                                         \
    extern __shared__ __align__(128) u8 s_all[];                                                                     \
    const Routing routing(s_all + S::kRouting);                                                                      \
    wait_for_previous_kernel();                                                                                      \
    routing.sort<S>(ids, pairs, experts, s_all);                                                                     \
    const GateUp<S> task{{routing, row_blocks}, global_scale, x, inner, x_stride, k, top_k, parts, limit,            \
                         down_codes, down_scales};                                                                   \
    decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units_of(k), chunks_of(k), partial);         \
  }                                                                                                                  \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, Shape<tokens>::kBlocks)                      \
      sm90_nvfp4_moe_down_t##tokens(                                                                                 \
      const u8* codes, const u8* scales,                                                                             \
      const float* global_scale,  /* [experts] */                                                                    \
      const u16* inner,           /* bf16 [pairs, k] */                                                              \
      const int* ids,             /* known before gate_up began, which let this kernel start after its own wait */   \
      const float* weights,       /* [pairs] */                                                                      \
      float* parts,               /* [pairs, n] */                                                                   \
      float* partial, int pairs, int experts, int n, int k) {                                                        \
    using S = Shape<tokens>;                                                                                         \
    extern __shared__ __align__(128) u8 s_all[];                                                                     \
    const Routing routing(s_all + S::kRouting);                                                                      \
    routing.sort<S>(ids, pairs, experts, s_all);                                                                     \
    const int row_blocks = (n + kTileRows - 1) / kTileRows;                                                          \
    const Down<S> task{{routing, row_blocks}, global_scale, weights, inner, parts, n, k};                            \
    decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units_of(k), chunks_of(k), partial);         \
  }

VARIANT(2)
VARIANT(4)
VARIANT(8)

// One or two tokens and at most kFewPairs: gate_up and down in one kernel whose rings run on from the units of one to
// those of the other, so that memory is busy while the blocks exchange what lies between. All tokens are columns for
// every expert, whether they chose it or not; down is one product over the k of all tiles in a row: no third kernel.
//
//   line 1   tile 0: row 0 units 0 1 .. | row 1 .. | tile 1: ..          a block's share, then one of
//   line 2   row 0: tile 0's units | tile 1's | ..   | row 1: ..
//
// The blocks wait for each other, so all must run at once: a cooperative launch. There is no barrier: gate_up's results
// are kAbsent until they come, in one of two buffers that take turns; a launch makes the other one absent again. Parts,
// results and the loads that look for them queue behind the weights on their way, so those are few until a block waits.

// Of a token and a tile the pair, -1 where the token did not choose the expert, and its weight times the global scale.
struct Chosen {
  int pair;
  float weight;
};

// A group's, in shared memory for want of registers. Has the ring come to down? The slot to be filled next, and how
// many empty ones may be filled before one is used.
struct FeedFew : Feed {
  bool down;
  int to, empty;
};

// What a block keeps of its tiles.
struct Few {
  Chosen chosen[kFewPairs][2];
  float gate_scale[kFewPairs], up_scale[kFewPairs], down_scale[kFewPairs], weight[kFewPairs];
  int turn;
  FeedFew feeds[Shape<2, true>::kGroups];
};

// Either line: one copy of the code, which down finds in the instruction cache.
template <class S>
struct ExpertsFew {
  static constexpr bool kArriving = true;
  Routing routing;
  const Few& few;
  const u16* x;
  u32* inners;  // two of bf16 [pairs, inner_size], two a word, `most` words apart
  u16* out;
  i64 x_stride;
  int most, hidden, inner_size, m;
  float limit;
  bool down;

  __device__ u32* inner() const { return inners + few.turn * most; }
  __device__ int k() const { return down ? inner_size : hidden; }
  __device__ int rows() const { return down ? chunks_of(hidden) : routing.tiles() * (inner_size / 32); }
  __device__ int units() const { return (down ? routing.tiles() : 1) * units_of(k()); }
  __device__ Share share() const { return share_of<S>(rows() * units()); }
  __device__ bool arriving() const { return down; }
  __device__ int columns_of(int) const { return 0; }
  __device__ int rows_end(int) const { return rows(); }
  __device__ int tokens(int) const { return m; }
  __device__ void fetched_all() const {}
  __device__ Place place(int row, int unit) const {
    const int each = down ? units_of(inner_size) : inner_size / 32;  // units or rows of a tile
    const int at = down ? unit : row, tile = at / each, within = at - tile * each, e = routing.tile_expert[tile];
    if (down) return {e * chunks_of(hidden) + row, within};
    return {e * each + within, unit};
  }
  __device__ Source source(int, int token, int unit) const {
    if (!down) return {x + token * x_stride + unit * kUnitK, hidden - unit * kUnitK, 1.0f};
    const int each = units_of(inner_size), tile = unit / each, at = (unit - tile * each) * kUnitK;
    const Chosen from = few.chosen[tile][token];
    if (from.pair < 0) return {nullptr, 0, 0.0f};  // zeros
    return {reinterpret_cast<const u16*>(inner()) + from.pair * inner_size + at, inner_size - at, from.weight};
  }
  // A token's sum over its experts is down's row itself.
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    a *= kRange, b *= kRange;
    if (down) {
      const int at = row * kTileRows + pair_row(pair);
      u16* to = out + static_cast<i64>(token) * hidden + at;
      if (at < hidden) to[0] = to_bf16(a);
      if (at + 8 < hidden) to[8] = to_bf16(b);
      return;
    }
    const int each = inner_size / 32, tile = row / each, p = few.chosen[tile][token].pair;
    const u32 value = clamped_swiglu(a * few.gate_scale[tile], b * few.up_scale[tile], limit);
    const u32 word = value | __shfl_down_sync(0xFFFFFFFFu, value, 1) << 16;
    if (p >= 0 && pair % 2 == 0)
      publish_word(inner() + p * (inner_size / 2) + (row - tile * each) * 16 + pair / 2, word);
  }
};

extern "C" __global__ void __launch_bounds__(Shape<2, true>::kThreads, Shape<2, true>::kBlocks) sm90_nvfp4_moe_few(
    const u8* codes, const u8* scales, const float* global_scale,                 // gate_up's, as above
    const u8* down_codes, const u8* down_scales, const float* down_global_scale,  // down's
    const u16* x, const int* ids, const float* weights,
    u16* out,        // bf16 [tokens, k]
    float* partial,  // [2, blocks, 2, 64]
    u32* inners,     // [2, most]: the one whose turn it is absent before, the other one after
    u32* turns,      // [blocks], all the same
    i64 x_stride, int most, int m, int top_k, int experts, int row_blocks, int k, int parts, float limit) {
  using S = Shape<2, true>;
  extern __shared__ __align__(128) u8 s_all[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x / kWarpgroup), 0);
  const bool fetches = threadIdx.x % kWarpgroup == 0, keeps = warp == S::kThreads / 32 - 1;
  const Routing routing(s_all + S::kRouting, kFewPairs);
  Few& few = *reinterpret_cast<Few*>(s_all + S::kRouting + 16 + 8 * kFewPairs);
  static_assert(16 + 8 * kFewPairs + sizeof(Few) <= S::kBytes - S::kRouting);
  Ring<S> ring(s_all, group);
  if (fetches) ring.make_barriers();
  wait_for_previous_kernel();
  let_next_kernel_start();

  // What can be asked for now goes ahead of the weights, behind which each load would take 2 us or more.
  const int pairs = m * top_k, units = units_of(k);
  const bool whole = units <= S::kWindow;
  Batch<S> batch;
  static_assert(Batch<S>::kAtOnce * Batch<S>::kWarps >= S::kTokens * S::kWindow);
  if (whole)
    batch.load(warp, m, units, [&](int token, int unit) {
      return Source{x + token * x_stride + unit * kUnitK, k - unit * kUnitK, 1.0f};
    }, false, [] {});
  const u32 turn = __ldcg(turns + blockIdx.x);
  const float weight = keeps && lane < pairs ? __ldcg(weights + lane) : 0.0f;
  if (warp == 0) routing.sort_few<S>(ids, pairs, experts);
  __syncthreads();

  if (threadIdx.x == 0) turns[blockIdx.x] = turn + 1;
  ExpertsFew<S> task{routing, few, x, inners, out, x_stride, most, k, 32 * row_blocks, m, limit, false};
  FeedFew& feed = few.feeds[group];
  const auto find_next = [&] {
    ExpertsFew<S> ahead = task;
    if (!feed.down && feed.next >= feed.end) {
      feed.down = ahead.down = true;
      const Share share = ahead.share();
      feed.next = share.begin + group, feed.end = share.end;
    }
    ahead.down = feed.down;
    if (feed.next < feed.end) feed.find(ahead, ahead.units(), chunks_of(ahead.k()));
  };
  const auto fetch = [&] {
    feed.fetch(ring, feed.to, feed.down ? down_codes : codes, feed.down ? down_scales : scales, find_next);
    feed.to = feed.to == (S::kDepth - 1) * S::kSlotBytes ? 0 : feed.to + S::kSlotBytes;
  };
  // One unit for each time that a load has come back through the same queues.
  const auto idle = [&] {
    if (!fetches || feed.empty == 0) return;
    --feed.empty;
    fetch();
  };
  if (fetches) {
    const Share share = task.share();
    feed.next = share.begin + group, feed.end = share.end;
    feed.down = false, feed.to = 0, feed.empty = S::kDepth - kAhead;
    find_next();
#pragma unroll 1  // instructions come from memory, too
    for (int i = 0; i < kAhead; ++i) fetch();
  }
  const int tiles = routing.tiles();
  float gate_scale = 0.0f, up_scale = 0.0f, down_scale = 0.0f;
  if (keeps && lane < tiles) {
    const int e = routing.tile_expert[lane];
    gate_scale = __ldcg(global_scale + e * parts);
    up_scale = __ldcg(global_scale + e * parts + parts - 1);
    down_scale = __ldcg(down_global_scale + e);
  }
  if (whole) batch.build(s_all, threadIdx.x / 32, units);
  uint4* other = reinterpret_cast<uint4*>(inners + (turn + 1) % 2 * most);
  for (int i = blockIdx.x * S::kThreads + threadIdx.x; i < most / 4; i += gridDim.x * S::kThreads)
    other[i] = make_uint4(kAbsent, kAbsent, kAbsent, kAbsent);
  if (keeps) {
    if (lane == 0) few.turn = turn % 2;
    few.gate_scale[lane] = gate_scale;
    few.up_scale[lane] = up_scale;
    few.down_scale[lane] = down_scale;
    few.weight[lane] = weight;
    __syncwarp();
    for (int i = lane; i < tiles * m; i += 32) {
      const int tile = i / m, token = i % m;
      Chosen all{-1, 0.0f};
      for (int q = 0; q < routing.tile_size[tile]; ++q) {
        const int p = routing.pair[routing.tile_first[tile] + q];
        if (p / top_k == token) all = {p, all.weight + few.weight[p]};
      }
      few.chosen[tile][token] = {all.pair, all.weight * few.down_scale[tile]};
    }
  }
  if (tiles == 0)  // no expert of this rank
    for (int i = blockIdx.x * S::kThreads + threadIdx.x; i < m * k; i += gridDim.x * S::kThreads) out[i] = 0;
  __syncthreads();
#pragma unroll 1
  for (int line = 0; line < 2; ++line) {
    task.down = line == 1;
    take_rows<S>(task, s_all, group, ring, task.share(), task.units(), partial, line * gridDim.x, whole && line == 0,
                 fetch, [](bool) {}, idle);
  }
}

__device__ inline u32 packed_bf16(float low, float high) { return to_bf16(low) | static_cast<u32>(to_bf16(high)) << 16; }

// out[token] = the sum of its pairs' rows of parts, in the order of the slots; other ranks' pairs have none.
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_sum(const float* parts,  // [tokens, top_k, n]
                                                                     const int* ids,      // [tokens, top_k]
                                                                     u16* out,            // bf16 [tokens, n]
                                                                     int top_k, int experts, int n) {
  const int at = (blockIdx.x * 256 + threadIdx.x) * 4;
  const i64 token = blockIdx.y;
  constexpr int kAtOnce = 8;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int first = 0; first < top_k; first += kAtOnce) {
    bool local[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {  // known before gate_up began
      const int e = first + i < top_k ? ids[token * top_k + first + i] : -1;
      local[i] = at < n && e >= 0 && e < experts;
    }
    if (first == 0) {
      wait_for_previous_kernel();
      let_next_kernel_start();
    }
    float4 v[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
      v[i] = local[i] ? __ldcg(reinterpret_cast<const float4*>(parts + (token * top_k + first + i) * n + at))
                      : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      total.x += v[i].x;
      total.y += v[i].y;
      total.z += v[i].z;
      total.w += v[i].w;
    }
  }
  if (at >= n) return;
  const uint2 packed = make_uint2(packed_bf16(total.x, total.y), packed_bf16(total.z, total.w));
  *reinterpret_cast<uint2*>(out + token * n + at) = packed;
}
