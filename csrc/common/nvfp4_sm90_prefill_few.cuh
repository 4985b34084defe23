// What the kernels share whose weights come through shared memory (few, halves): their work and a thread's weights.
#pragma once

#include "common/nvfp4_sm90_prefill.cuh"

constexpr int kBlocks = 4;  // 64-row blocks of a CTA, one a consumer warpgroup
constexpr int kThreads = 128 * (1 + kBlocks);

__device__ __forceinline__ Weights load_shared(unsigned codes, unsigned scales) {
  Weights w;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(w.codes.x), "=r"(w.codes.y), "=r"(w.codes.z), "=r"(w.codes.w)
               : "r"(codes));
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(w.scales.x), "=r"(w.scales.y) : "r"(scales));
  return w;
}

struct Work {
  const int4* tiles;      // [*tile_count] {expert, first row of x, tokens, 0}, or null: one weight, tiles alike
  const int* tile_count;
  float4* partial;        // [splits, token_tiles, ceil(tile_tokens / 32), blocks, 4, 128], or null: not split
  int token_tiles;        // without `tiles`
  int tile_tokens;        // without `tiles`: of each
  int row_tiles;          // ceil(blocks / kBlocks)
  int splits, steps;      // of kStep chunks, of a split
  __device__ int count() const { return (tiles ? *tile_count : token_tiles * splits) * row_tiles; }
};

struct Tile {
  int expert, first, tokens, row_tile, split;
};

// Neighbours share x with `tiles` and the weights without: what is read at the same time is read from memory once.
__device__ __forceinline__ Tile tile_at(const Work& work, int index) {
  if (work.tiles) {
    const int4 tile = __ldg(work.tiles + index / work.row_tiles);
    return {tile.x, tile.y, tile.z, index % work.row_tiles, 0};
  }
  const int rest = index / work.token_tiles, token_tile = index % work.token_tiles;
  return {0, token_tile * work.tile_tokens, work.tile_tokens, rest % work.row_tiles, rest / work.row_tiles};
}
