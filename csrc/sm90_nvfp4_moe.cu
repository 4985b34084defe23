// The routed experts for few tokens, prepared NVFP4 weights: gate_up with the clamped SwiGLU, down with the routing
// weight, and the sum of a token's experts; common/nvfp4_sm90_decode.cuh multiplies.
//
// A tile is up to kTokens routed (token, slot) pairs of one expert. Every block sorts all pairs itself, in shared memory
// (at most kMostPairs): a kernel of its own would cost a launch and the way through memory.
//
//   ids        7 2 7 0 | 2 7 ..        offset[e]  where expert e's pairs begin in `pair`
//   pair       3 | 1 4 | 0 2 5 | ..    by expert, in the order of the ids
//   tiles      (0, 0) (2, 1) (7, 3)    expert and first place; experts without a pair have none and cost nothing
//
// Bytes: 9/16 of a byte a weight of each expert that has a pair. Sums are in an order that only shapes and ids decide.
#include "common/nvfp4_sm90_decode.cuh"

struct Routing {
  int *offset, *id;
  u16 *pair, *tile_expert, *tile_first, *tile_size;

  __device__ explicit Routing(u8* shared)
      : offset(reinterpret_cast<int*>(shared)),
        id(offset + kMostExperts + 4),
        pair(reinterpret_cast<u16*>(id + kMostPairs)),
        tile_expert(pair + kMostPairs),
        tile_first(tile_expert + kMostPairs),
        tile_size(tile_first + kMostPairs) {}

  // The same tables from at most 32 pairs by one warp; the block must meet before it reads them.
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
    if (p == 0) offset[kMostExperts + 1] = __popc(all);
  }
  __device__ int tiles() const { return offset[kMostExperts + 1]; }

  // Fills the tables from ids [pairs], the whole block together.
  template <class S>
  __device__ void sort(const int* ids, int pairs, int experts) const {
    for (int e = threadIdx.x; e <= experts; e += S::kThreads) offset[e] = 0;
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += S::kThreads) {
      const int e = ids[p];
      const bool local = e >= 0 && e < experts;  // others belong to another rank
      id[p] = local ? e : -1;
      if (local) atomicAdd(offset + e, 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // each lane a range of experts
      const int lane = threadIdx.x, each = (experts + 31) / 32, from = lane * each, to = min(from + each, experts);
      int count = 0, tiles = 0;
      for (int e = from; e < to; ++e) {
        count += offset[e];
        tiles += (offset[e] + S::kTokens - 1) / S::kTokens;
      }
      int place = count, tile = tiles;
      for (int step = 1; step < 32; step *= 2) {
        const int c = __shfl_up_sync(0xFFFFFFFFu, place, step), t = __shfl_up_sync(0xFFFFFFFFu, tile, step);
        if (lane >= step) {
          place += c;
          tile += t;
        }
      }
      if (lane == 31) {
        offset[experts] = place;
        offset[kMostExperts + 1] = tile;
      }
      place -= count;
      tile -= tiles;
      for (int e = from; e < to; ++e) {
        const int size = offset[e];
        offset[e] = place;
        for (int i = 0; i < size; i += S::kTokens, ++tile) {
          tile_expert[tile] = e;
          tile_first[tile] = place + i;
          tile_size[tile] = min(S::kTokens, size - i);
        }
        place += size;
      }
    }
    __syncthreads();
    for (int p = threadIdx.x; p < pairs; p += S::kThreads) {
      if (id[p] < 0) continue;
      int before = 0;
      for (int i = 0; i < p; ++i) before += id[i] == id[p];
      pair[offset[id[p]] + before] = p;
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

template <class S>
struct GateUp : Experts<S> {
  const float* global_scale;
  const u16* x;
  u16* inner;
  i64 x_stride;
  int k, top_k, parts;
  float limit;

  __device__ void wait_for_activations() const { let_next_kernel_start(); }
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

// All tokens are columns for every expert, whether they chose it or not: built once, before the ids are sorted.
template <class S>
struct GateUpFew : GateUp<S> {
  int m;

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

template <class S>
struct Down : Experts<S> {
  const float *global_scale, *weights;
  const u16* inner;
  float* parts;
  int n, k;

  __device__ void wait_for_activations() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ Source source(int set, int token, int unit) const {
    return {inner + static_cast<i64>(this->pair_of(set, token)) * k + unit * kUnitK, k - unit * kUnitK, 1.0f};
  }
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    const int tile = row / this->row_blocks, p = this->pair_of(tile, token);
    const int at = (row - tile * this->row_blocks) * kTileRows + pair_row(pair);
    const float scale = global_scale[this->routing.tile_expert[tile]], weight = weights[p];
    float* to = parts + static_cast<i64>(p) * n + at;
    if (at < n) to[0] = a * kRange * scale * weight;
    if (at + 8 < n) to[8] = b * kRange * scale * weight;
  }
};

// One product over the k of all tiles, one after the other: a token's sum over its experts is the row's own. Routing
// weights and global scales go into the columns' factors.
template <class S>
struct DownFew : Experts<S> {
  const float *global_scale, *weights;
  const u16* inner;
  u16* out;
  int n, k, top_k, m;

  __device__ int columns_of(int) const { return 0; }
  __device__ int rows_end(int) const { return 0x7FFF; }
  __device__ int tokens(int) const { return m; }
  __device__ void wait_for_activations() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ Place place(int row, int unit) const {
    const int units = units_of(k), tile = unit / units;
    return {static_cast<i64>(this->routing.tile_expert[tile]) * this->row_blocks + row, unit - tile * units};
  }
  __device__ Source source(int, int token, int unit) const {
    const int units = units_of(k), tile = unit / units, at = (unit - tile * units) * kUnitK;
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

#define VARIANT(tokens)                                                                                            \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, 1) sm90_nvfp4_moe_gate_up_t##tokens(       \
      const u8* codes,            /* [experts, row_blocks, chunks, 2048], gate and up rows paired */               \
      const u8* scales,           /* [experts, row_blocks, chunks, 256] */                                         \
      const float* global_scale,  /* [experts, parts] */                                                           \
      const u16* x,               /* bf16 [tokens, k], rows x_stride apart, each at 8 bytes */                     \
      const int* ids,             /* [pairs] = [tokens, top_k] */                                                  \
      u16* inner,                 /* bf16 [pairs, 32 * row_blocks] */                                              \
      float* partial, int* counters, i64 x_stride, int pairs, int top_k, int experts, int row_blocks, int k,       \
      int parts, float limit) {                                                                                    \
    using S = Shape<tokens>;                                                                                       \
    extern __shared__ __align__(128) u8 s_all[];                                                                   \
    const Routing routing(s_all + S::kRouting + 16);                                                               \
    wait_for_previous_kernel();                                                                                    \
    routing.sort<S>(ids, pairs, experts);                                                                          \
    const GateUp<S> task{{routing, row_blocks}, global_scale, x, inner, x_stride, k, top_k, parts, limit};         \
    decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units_of(k), chunks_of(k), false, partial, \
              counters);                                                                                           \
  }                                                                                                                \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, 1) sm90_nvfp4_moe_down_t##tokens(          \
      const u8* codes, const u8* scales,                                                                           \
      const float* global_scale,  /* [experts] */                                                                  \
      const u16* inner,           /* bf16 [pairs, k] */                                                            \
      const int* ids,             /* known before gate_up began, which let this kernel start after its own wait */ \
      const float* weights,       /* [pairs] */                                                                    \
      float* parts,               /* [pairs, n] */                                                                 \
      float* partial, int* counters, int pairs, int experts, int n, int k) {                                       \
    using S = Shape<tokens>;                                                                                       \
    extern __shared__ __align__(128) u8 s_all[];                                                                   \
    const Routing routing(s_all + S::kRouting + 16);                                                               \
    routing.sort<S>(ids, pairs, experts);                                                                          \
    const int row_blocks = (n + kTileRows - 1) / kTileRows;                                                        \
    const Down<S> task{{routing, row_blocks}, global_scale, weights, inner, parts, n, k};                          \
    decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units_of(k), chunks_of(k), false, partial, \
              counters);                                                                                           \
  }

VARIANT(2)
VARIANT(4)
VARIANT(8)

// One or two tokens and at most 32 pairs: no third kernel, and the first builds columns while a warp sorts.
extern "C" __global__ void __launch_bounds__(Shape<2>::kThreads, 1) sm90_nvfp4_moe_gate_up_few(
    const u8* codes, const u8* scales, const float* global_scale, const u16* x, const int* ids, u16* inner,
    float* partial, int* counters, i64 x_stride, int pairs, int top_k, int experts, int row_blocks, int k, int parts,
    float limit) {
  using S = Shape<2>;
  extern __shared__ __align__(128) u8 s_all[];
  const Routing routing(s_all + S::kRouting + 16);
  const GateUpFew<S> task{
      {{routing, row_blocks}, global_scale, x, inner, x_stride, k, top_k, parts, limit}, pairs / top_k};
  const int units = units_of(k), warp = threadIdx.x / 32;
  const bool build = units <= S::kWindow;
  wait_for_previous_kernel();
  if (warp == 0) {
    routing.sort_few<S>(ids, pairs, experts);
  } else if (build) {
    for (int i = warp - 1; i < units * task.m; i += S::kThreads / 32 - 1) {
      const int token = i / units, unit = i - token * units;
      build_columns<S>(s_all + unit * S::kUnitColumns,
                       reinterpret_cast<float*>(s_all + S::kFactors) + unit * S::kTokens + token,
                       task.source(0, token, unit), token);
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  decode<S>(task, s_all, codes, scales, routing.tiles() * row_blocks, units, chunks_of(k), build, partial, counters);
}

extern "C" __global__ void __launch_bounds__(Shape<2>::kThreads, 1) sm90_nvfp4_moe_down_few(
    const u8* codes, const u8* scales, const float* global_scale, const u16* inner, const int* ids,
    const float* weights, u16* out /* bf16 [tokens, n] */, float* partial, int* counters, int pairs, int top_k,
    int experts, int n, int k) {
  using S = Shape<2>;
  extern __shared__ __align__(128) u8 s_all[];
  const Routing routing(s_all + S::kRouting + 16);
  if (threadIdx.x < 32) routing.sort_few<S>(ids, pairs, experts);
  __syncthreads();
  const int row_blocks = (n + kTileRows - 1) / kTileRows, tiles = routing.tiles();
  const DownFew<S> task{{routing, row_blocks}, global_scale, weights, inner, out, n, k, top_k, pairs / top_k};
  if (tiles == 0) {  // no expert of this rank
    wait_for_previous_kernel();
    for (int i = blockIdx.x * S::kThreads + threadIdx.x; i < task.m * n; i += gridDim.x * S::kThreads) out[i] = 0;
  }
  decode<S>(task, s_all, codes, scales, tiles == 0 ? 0 : row_blocks, tiles * units_of(k), chunks_of(k), false, partial,
            counters);
}

__device__ inline u32 packed_bf16(float low, float high) { return to_bf16(low) | static_cast<u32>(to_bf16(high)) << 16; }

// out[token] = the sum of its pairs' rows of parts, in the order of the slots; other ranks' pairs have none.
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_sum(const float* parts,  // [tokens, top_k, n]
                                                                     const int* ids,      // [tokens, top_k]
                                                                     u16* out,            // bf16 [tokens, n]
                                                                     int top_k, int experts, int n) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int at = (blockIdx.x * 256 + threadIdx.x) * 4;
  const i64 token = blockIdx.y;
  if (at >= n) return;
  float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
  for (int slot = 0; slot < top_k; ++slot) {
    const int e = ids[token * top_k + slot];
    if (e < 0 || e >= experts) continue;
    const float4 v = *reinterpret_cast<const float4*>(parts + (token * top_k + slot) * n + at);
    total.x += v.x;
    total.y += v.y;
    total.z += v.z;
    total.w += v.w;
  }
  const uint2 packed = make_uint2(packed_bf16(total.x, total.y), packed_bf16(total.z, total.w));
  *reinterpret_cast<uint2*>(out + token * n + at) = packed;
}
