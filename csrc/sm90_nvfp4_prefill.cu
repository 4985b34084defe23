// NVFP4 weights x bf16 activations for many tokens on Hopper: dense products and the routed experts' two.
//
//   out[token, row] = global_scale * sum over k of x[token, k] * code[row, k] * block_scale[row, k / 16]
//
// A pair of CTAs (a cluster) owns 256 rows x up to 256 tokens; a CTA its half of the rows, a warpgroup 64 of those:
//
//                          tokens (n of wgmma, 32 to 256)
//                        +---------------------------------+
//   CTA 0  warpgroup 1   | 64 rows: codes in registers     |     x: [tokens][64 k] in shared memory, swizzled by 128
//          warpgroup 2   | 64 rows    become bf16 A        |     bytes, kStages deep. Each CTA of the cluster brings
//   CTA 1  warpgroup 1   | 64 rows                         |     every other 32 tokens and multicasts them to both.
//          warpgroup 2   | 64 rows                         |
//                        +---------------------------------+
//
// Warpgroup 0 only issues the copies. A consumer thread loads its 32 codes and 8 scales of a 64 x 64 weight tile (the
// layout is made so that they are its wgmma fragments) four chunks of 64 k ahead, multiplies code by scale in bf16,
// which is exact (2 + 4 significant bits), and issues four wgmma while those of the chunk before still run: 128
// instructions a chunk (4.0 a weight, 2.5 of them the expansion), 256 issue slots of a scheduler for every 1024 clocks
// of tensor core at 256 tokens. The outputs go through shared memory transposed; the copy engine writes them out.
// Waiting: full[stage] on the copies' bytes; empty[stage] on every consumer warp of both CTAs; warpgroup 2 starts two
// chunks after warpgroup 1, so that the tensor cores have work while either stores.
//
// Tiles of fewer tokens are sm90_nvfp4_prefill_few.cu's where that is faster (step_kernels/cuda/nvfp4_prefill_plan.py).
// For the experts see sm90_nvfp4_moe_prefill.cu: it makes the table of tiles. An expert's tokens are split evenly into
// tiles of a multiple of 16, so that 257 tokens cost 2 * 144 and not 512. Which tiles exist is decided on the device.

#include "common/nvfp4_sm90_prefill_many.cuh"

constexpr int kLeastTokens = 32, kTokenStep = 16;  // of a tile, which is at most kMostTokens; of an output's copy
constexpr int kSmallTile = 96;  // tokens up to which weights are prefetched into L2

// d += a chunk's products for the first `tokens` of x, kLow to kHigh. One array for all sizes and a branch around the
// products alone: with a loop a size, ptxas gives up on overlapping wgmma when their sizes add up to about 640.
template <int kLow, int kHigh>
__device__ __forceinline__ void multiply_chunk(int tokens, float (&d)[kMostTokens / 2], const unsigned (&a)[4][4],
                                               u64 x) {
  if constexpr (kLow == kHigh) {
    wgmma_fence();
#pragma unroll
    for (int q = 0; q < 4; ++q) Wgmma<kLow>::run(d, a[q], x + 2 * q);
    wgmma_commit();  // here: behind the branch, it would be a second group
  } else {
    constexpr int kMiddle = (kLow + kHigh) / 2 / kTokenStep * kTokenStep;
    if (tokens <= kMiddle)
      multiply_chunk<kLow, kMiddle>(tokens, d, a, x);
    else
      multiply_chunk<kMiddle + kTokenStep, kHigh>(tokens, d, a, x);
  }
}

struct Consumer {
  const Work& work;
  const Weight& weight;
  const TensorMap* out;
  float limit;
  unsigned stages, full, empty, staging;
  int group, thread, cta;  // warpgroup 0 or 1, thread in it
  unsigned parity;
  bool leads;  // has not let the other warpgroup start yet
  Weights ahead[kStages];

  // Weight tile i of four, `left` of which exist; beyond them the last one again, to meet x's zeros.
  __device__ __forceinline__ void load(int first, int left, int i) {
    const long long at = first + min(i, left - 1);
    ahead[i].codes = load_once(weight.codes + at * 128 + thread);
    ahead[i].scales = load_once(weight.scales + at * 32 + thread / 4);
  }

  __device__ __forceinline__ void release(int stage) {
    if (thread % 32 < kCluster) barrier_arrive(empty + 8 * stage, thread % 32);
  }

  // Leaves the first weight tiles of the next tile, from number `next` on, in `ahead`.
  template <bool kPaired>
  __device__ __forceinline__ void run(const Tile& tile, int tokens, int current, int next) {
    float d[kMostTokens / 2];  // cleared by hand: by wgmma's predicate, ptxas has it live through every other tile size
#pragma unroll
    for (float& v : d) v = 0.0f;
    unsigned a[2][4][4];
#pragma unroll 1
    for (int chunk = 0; chunk < weight.chunks; chunk += kStages) {
      const bool last = chunk + kStages >= weight.chunks;
      const int first = last ? next : current + chunk + kStages;
      const int left = weight.chunks - (last ? 0 : chunk + kStages);
#pragma unroll
      for (int i = 0; i < kStages; ++i) {
        expand(ahead[i], a[i % 2]);
        load(first, left, i);
        barrier_wait(full + 8 * i, parity);
        const u64 x = tile_descriptor(stages + i * kStageBytes);
        multiply_chunk<kLeastTokens, kMostTokens>(tokens, d, a[i % 2], x);
        wgmma_wait<1>();
        if (i > 0 || chunk > 0) release((i + kStages - 1) % kStages);
        if (i == kLead - 1 && leads) {
          lead_arrive();
          leads = false;
        }
      }
      parity ^= 1;
    }
    wgmma_wait<0>();
#pragma unroll
    for (float& v : d) asm volatile("" : "+f"(v)::"memory");  // nothing reads the sums before this
    release(kStages - 1);
    write_tile<kMostTokens, kPaired, kTokenStep>(d, weight, out, tile.expert, block_of(tile, cta, group), tile.first,
                                              limit, staging, 1 + group, tokens);
  }
};

template <bool kPaired>
__device__ __forceinline__ void prefill(const Maps& maps, const Work& work, const Weight& weight, float limit) {
  extern __shared__ char s_bytes[];
  __shared__ u64 s_full[kStages], s_empty[kStages];
  const unsigned stages = (shared_address(s_bytes) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(s_full), empty = shared_address(s_empty);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // uniform: else ptxas serialises wgmma
  const int cta = blockIdx.x % kCluster, clusters = gridDim.x / kCluster;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumerWarps * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_sync();
  const int count = work.count();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      unsigned parity = 1;  // a new barrier's: the stages are free
      const int padded = (weight.chunks + kStages - 1) / kStages * kStages;
      for (int index = cluster_number(); index < count; index += clusters) {
        const Tile tile = tile_at(work, index);
        for (int chunk = 0; chunk < weight.chunks; chunk += kStages) {
          if (tile.tokens <= kSmallTile) {
            const int later = chunk + kPrefetched;
            if (later < weight.chunks)
              prefetch(weight, tile, cta, later);
            else if (index + clusters < count)
              prefetch(weight, tile_at(work, index + clusters), cta, later - padded);
          }
#pragma unroll 1
          for (int i = 0; i < kStages; ++i) {
            barrier_wait(empty + 8 * i, parity);
            barrier_expect(full + 8 * i, (tile.tokens + kBox - 1) / kBox * kBox * kTileK * 2);
#pragma unroll 1
            for (int row = cta * kBox; row < tile.tokens; row += kCluster * kBox)
              copy_box(stages + i * kStageBytes + row * kTileK * 2, &maps.x, (chunk + i) * kTileK, tile.first + row,
                       full + 8 * i);
          }
          parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const unsigned staging = stages + kStages * kStageBytes + (group - 1) * kStagingBytes;
    Consumer consumer = {work, weight, &maps.out, limit, stages, full, empty, staging, group - 1,
                         static_cast<int>(threadIdx.x % 128), cta, 0, group == 1};
    int index = cluster_number();
    if (index < count) {
      Tile tile = tile_at(work, index);
      int current = first_weights(weight, tile, cta, group - 1);
#pragma unroll
      for (int i = 0; i < kStages; ++i) consumer.load(current, weight.chunks, i);
      if (group == 2) lead_wait();
      for (; index < count; index += clusters) {
        const Tile next_tile = tile_at(work, min(index + clusters, count - 1));
        const int next = first_weights(weight, next_tile, cta, group - 1);
        const int tokens = __shfl_sync(kAllLanes, tile.tokens, 0);
        consumer.run<kPaired>(tile, tokens, current, next);
        tile = next_tile;
        current = next;
      }
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
  __syncwarp();
  cluster_sync();  // the other CTA may still arrive here
}

#define PRODUCT(name, paired)                                                                                   \
  extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1)                    \
      name(const uint4* codes, const uint2* scales, const float* global_scale, const int4* tiles,              \
           const int* tile_count, int token_tiles, int tile_tokens, int group, int row_tiles, int blocks,       \
           int chunks, int parts, int rows, float limit, const __grid_constant__ Maps maps) {                   \
    const Work work = {tiles, tile_count, token_tiles, tile_tokens, group, row_tiles};                          \
    const Weight weight = {codes, scales, global_scale, blocks, chunks, parts, rows};                           \
    prefill<paired>(maps, work, weight, limit);                                                    \
  }

PRODUCT(sm90_nvfp4_prefill_plain_many, false)
PRODUCT(sm90_nvfp4_prefill_paired_many, true)
