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
    const int p = threadIdx.x % 32, given = p < pairs ? ids[p] : -1;
    const int e = given >= 0 && given < experts ? given : kMostExperts;
    int place = 0, rank = 0, size = 0, tile = 0;
    for (int q = 0; q < pairs; ++q) {
      const int other = __shfl_sync(0xFFFFFFFFu, e, q);
      place += other < e;
      rank += other == e && q < p;
      size += other == e;
    }
    const bool local = e < kMostExperts, starts = local && rank % S::kTokens == 0;
    place += rank;
    for (int q = 0; q < pairs; ++q) tile += __shfl_sync(0xFFFFFFFFu, starts ? place : 32, q) < place;
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
  Routing routing;
  int row_blocks;

  __device__ int columns_of(int row) const { return row / row_blocks; }
  __device__ int rows_end(int set) const { return (set + 1) * row_blocks; }
  __device__ int tokens(int set) const { return routing.tile_size[set]; }
  __device__ Place place(int row, int unit) const {
    const int tile = row / row_blocks;
    return {static_cast<i64>(routing.tile_expert[tile]) * row_blocks + (row - tile * row_blocks), unit};
  }
  __device__ int pair_of(int tile, int token) const { return routing.pair[routing.tile_first[tile] + token]; }
};

// One product over the k of all tiles, one after the other.
template <class S>
struct ExpertsInARow : Experts<S> {
  int units;  // of an expert

  __device__ int columns_of(int) const { return 0; }
  __device__ int rows_end(int) const { return 0x7FFF; }
  __device__ Place place(int row, int unit) const {
    const int tile = unit / units;
    return {static_cast<i64>(this->routing.tile_expert[tile]) * this->row_blocks + row, unit - tile * units};
  }
};

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
  __device__ u16 swiglu(int tile, float gate, float up) const {
    const float* scale = global_scale + this->routing.tile_expert[tile] * parts;
    gate = gate * kRange * scale[0];
    up = up * kRange * scale[parts - 1];
    gate = gate / (1.0f + expf(-gate));
    gate = gate > limit ? limit : gate;  // as torch's clamp, NaN passes
    up = up > limit ? limit : up < -limit ? -limit : up;
    return to_bf16(gate * up);
  }
  __device__ void store(int row, int tile, int p, int pair, u16 value) const {
    inner[static_cast<i64>(p) * (this->row_blocks * 32) + (row - tile * this->row_blocks) * 32 + pair] = value;
  }
  __device__ void finish(int row, int token, int pair, float gate, float up) const {
    const int tile = row / this->row_blocks;
    store(row, tile, this->pair_of(tile, token), pair, swiglu(tile, gate, up));
  }
};

// All tokens are columns for every expert, whether they chose it or not.
template <class S>
struct GateUpFew : GateUp<S> {
  int m;

  __device__ void fetched_all() const {
    const int rows = chunks_of(this->k), inner = 32 * this->row_blocks, units = units_of(inner);
    fetch_ahead<S>(ExpertsInARow<S>{{this->routing, rows}, units}, this->down_codes, this->down_scales, rows,
                   this->routing.tiles() * units, chunks_of(inner));
  }
  __device__ int columns_of(int) const { return 0; }
  __device__ int rows_end(int) const { return 0x7FFF; }
  __device__ int tokens(int) const { return m; }
  __device__ Source source(int, int token, int unit) const {
    return {this->x + token * this->x_stride + unit * kUnitK, this->k - unit * kUnitK, 1.0f};
  }
  __device__ void finish(int row, int token, int pair, float gate, float up) const {
    const int tile = row / this->row_blocks, size = this->routing.tile_size[tile];
    const u16 value = this->swiglu(tile, gate, up);
    for (int i = 0; i < size; ++i) {
      const int p = this->pair_of(tile, i);
      if (p / this->top_k == token) this->store(row, tile, p, pair, value);
    }
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

// A token's sum over its experts is the row's own.
template <class S>
struct DownFew : ExpertsInARow<S> {
  static constexpr int kEarly = 1;
  const float *global_scale, *weights;
  const u16* inner;
  u16* out;
  int n, k, top_k, m;

  __device__ int tokens(int) const { return m; }
  __device__ void fetched_all() const {}
  __device__ void wait_for_activations() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ Source source(int, int token, int unit) const {
    const int tile = unit / this->units, at = (unit - tile * this->units) * kUnitK;
    Source source{inner, 0, 0.0f};  // zeros where the token did not choose the expert
    for (int i = 0; i < this->routing.tile_size[tile]; ++i) {
      const int p = this->pair_of(tile, i);
      if (p / top_k == token)
        source = {inner + static_cast<i64>(p) * k + at, k - at, source.scale + weights[p]};
    }
    source.scale *= global_scale[this->routing.tile_expert[tile]];
    return source;
  }
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    const int at = row * kTileRows + pair_row(pair);
    u16* to = out + static_cast<i64>(token) * n + at;
    if (at < n) to[0] = to_bf16(a * kRange);
    if (at + 8 < n) to[8] = to_bf16(b * kRange);
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

// One or two tokens and at most kFewPairs: no third kernel. Each group sorts for itself and fetches without waiting for
// others.
extern "C" __global__ void __launch_bounds__(Shape<2>::kThreads, Shape<2>::kBlocks) sm90_nvfp4_moe_gate_up_few(
    const u8* codes, const u8* scales, const float* global_scale, const u16* x, const int* ids, u16* inner,
    float* partial, i64 x_stride, int pairs, int top_k, int experts, int row_blocks, int k, int parts, float limit,
    const u8* down_codes, const u8* down_scales) {
  using S = Shape<2>;
  extern __shared__ __align__(128) u8 s_all[];
  const int group = threadIdx.x / kWarpgroup;
  const Routing routing(s_all + S::kRouting + group * (16 + 8 * kFewPairs), kFewPairs);
  wait_for_previous_kernel();
  if (threadIdx.x % kWarpgroup < 32) routing.sort_few<S>(ids, pairs, experts);
  meet_group(group);
  const GateUpFew<S> task{{{routing, row_blocks}, global_scale, x, inner, x_stride, k, top_k, parts, limit, down_codes,
                           down_scales}, pairs / top_k};
  decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units_of(k), chunks_of(k), partial);
}

extern "C" __global__ void __launch_bounds__(Shape<2>::kThreads, Shape<2>::kBlocks) sm90_nvfp4_moe_down_few(
    const u8* codes, const u8* scales, const float* global_scale, const u16* inner, const int* ids,
    const float* weights, u16* out /* bf16 [tokens, n] */, float* partial, int pairs, int top_k,
    int experts, int n, int k) {
  using S = Shape<2>;
  extern __shared__ __align__(128) u8 s_all[];
  const Routing routing(s_all + S::kRouting, kFewPairs);
  if (threadIdx.x < 32) routing.sort_few<S>(ids, pairs, experts);
  __syncthreads();
  const int row_blocks = (n + kTileRows - 1) / kTileRows, tiles = routing.tiles();
  const DownFew<S> task{
      {{routing, row_blocks}, units_of(k)}, global_scale, weights, inner, out, n, k, top_k, pairs / top_k};
  if (tiles == 0) {  // no expert of this rank
    wait_for_previous_kernel();
    for (int i = blockIdx.x * S::kThreads + threadIdx.x; i < task.m * n; i += gridDim.x * S::kThreads) out[i] = 0;
  }
  decode<S>(task, s_all, codes, scales, tiles == 0 ? 0 : row_blocks, tiles * units_of(k), chunks_of(k), partial);
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
