// What the kernels for many tokens have in common (sm90_nvfp4_prefill.cu draws it): clusters of two CTAs, each a
// warpgroup that copies and two of 64 rows that compute; barriers and copies across the cluster; which tile is whose.
#pragma once

#include "common/nvfp4_sm90_prefill.cuh"

constexpr int kMostTokens = 256;  // of a tile
constexpr int kStages = 4;        // chunks in the unrolled loop as well, so that a chunk's stage is a constant
constexpr int kStageBytes = kMostTokens * kTileK * 2;  // a token's 128 bytes are the swizzle's width
constexpr int kPrefetched = 8;    // chunks that weights are asked for before x is copied, in small tiles
constexpr int kLead = 2;          // chunks that warpgroup 1 is ahead: it computes while warpgroup 2 stores
constexpr int kCluster = 2;
constexpr int kBlocks = 2;  // 64-row blocks of a CTA, one a consumer warpgroup
constexpr int kConsumerWarps = 4 * kBlocks;
constexpr int kThreads = 128 * (1 + kBlocks);
constexpr int kStagingBytes = kMostTokens * 128;  // a warpgroup's output, [token][64 rows] bf16

__device__ __forceinline__ void barrier_arrive(unsigned barrier, int cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* map, int k, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier), "h"(static_cast<u16>((1 << kCluster) - 1))
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

// Barrier 0 is the block's, 1 and 2 the warpgroups' own.
__device__ __forceinline__ void lead_arrive() { asm volatile("bar.arrive 3, 256;" ::: "memory"); }
__device__ __forceinline__ void lead_wait() { asm volatile("bar.sync 3, 256;" ::: "memory"); }

// Weights, ahead of their use. Not .nc: ptxas takes such loads past the barriers, all of them to the end of the loop.
__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

__device__ __forceinline__ uint2 load_once(const uint2* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

// ---- tiles ----

struct Work {
  const int4* tiles;       // [*tile_count] {expert, first row of x, tokens, 0}, or null: one weight, tiles alike
  const int* tile_count;
  int token_tiles;         // without `tiles`
  int tile_tokens;         // without `tiles`: of each
  int group;               // token tiles that go through the rows together
  int row_tiles;           // of a cluster: ceil(blocks / (kCluster * kBlocks))
  __device__ int count() const { return (tiles ? *tile_count : token_tiles) * row_tiles; }
};

struct Tile {
  int expert, first, tokens, row_tile;
};

__device__ __forceinline__ Tile tile_at(const Work& work, int index) {
  if (work.tiles) {
    const int4 tile = __ldg(work.tiles + index / work.row_tiles);
    return {tile.x, tile.y, tile.z, index % work.row_tiles};
  }
  const int each = work.group * work.row_tiles, first = index / each * work.group;
  const int size = min(work.group, work.token_tiles - first), token_tile = first + index % each % size;
  return {0, token_tile * work.tile_tokens, work.tile_tokens, index % each / size};
}

__device__ __forceinline__ int block_of(const Tile& tile, int cta, int group) {
  return (tile.row_tile * kCluster + cta) * kBlocks + group;
}

// The number of the first 64 x 64 weight tile; a block beyond the last computes that one again and is not written.
__device__ __forceinline__ int first_weights(const Weight& weight, const Tile& tile, int cta, int group) {
  return (tile.expert * weight.blocks + min(block_of(tile, cta, group), weight.blocks - 1)) * weight.chunks;
}

// Four chunks of this CTA's weights on their way to L2: few tokens leave too little time for memory's latency.
__device__ __forceinline__ void prefetch(const Weight& weight, const Tile& tile, int cta, int chunk) {
  const int count = min(kStages, weight.chunks - chunk);
  if (count <= 0) return;
#pragma unroll 1
  for (int group = 0; group < kBlocks; ++group) {
    const long long at = first_weights(weight, tile, cta, group) + chunk;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight.codes + at * 128), "r"(count * kTileCodes));
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(weight.scales + at * 32), "r"(count * kTileScales));
  }
}

// Read where it is used: kept from the start, it is spilled.
__device__ __forceinline__ int cluster_number() {
  int number;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(number));
  return number;
}
