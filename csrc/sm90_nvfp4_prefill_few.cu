// NVFP4 weights x bf16 activations for tiles of up to 128 tokens on Hopper, where reading and expanding the weights is
// what takes the time: dense products, split over k where rows are few, and the routed experts' two.
//
// One CTA an SM owns 256 rows x up to 64, 96 or 128 tokens; each of its four consumer warpgroups 64 of the rows. x and
// the weights come through shared memory in steps of 128 k, three to five of them (55 to 92 KB of weights an SM, where
// latency x bandwidth is 27). Four warps a scheduler hide each other's latencies: with the two of
// sm90_nvfp4_prefill.cu, whose weights wait in registers, 128 rows x 64 k took at least 600 clocks for 294 issue slots
// of a scheduler. Here 256 rows x 64 k are 4 warps of 139 instructions (4.3 a weight): 556 slots, 544 clocks of the ALU.
//
//   warpgroup 0     copies: x [tokens][64 k] twice, swizzled by 128 bytes; codes and scales of 4 x 64 rows x 128 k
//   warpgroup 1-4   16 bytes of codes and 8 of scales a thread and 64 k, from shared memory to bf16 fragments; wgmma
//
// Split over k, the sums go to `partial` as they lie in registers, and sm90_nvfp4_prefill_few_sum adds them in order.

#include "common/nvfp4_sm90_prefill_few.cuh"

constexpr int kStep = 2;  // chunks of 64 k
constexpr int kStepCodes = kStep * kTileCodes, kStepScales = kStep * kTileScales;

template <int kMost>
struct Shape {
  static constexpr int kSteps = kMost == 64 ? 5 : kMost == 96 ? 4 : 3;
  static constexpr int kSets = kMost == 64 ? 2 : 1;  // of fragments; ptxas has no registers for two of the others
  static constexpr int kX = kMost * kTileK * 2;  // bytes of a chunk's x
  static constexpr int kCodes = kStep * kX, kScales = kCodes + kBlocks * kStepCodes;
  static constexpr int kBytes = kScales + kBlocks * kStepScales;  // of a step
  static constexpr int kStaging = kMost * 128;                    // bytes of a warpgroup's output
};

__device__ __forceinline__ void copy_box(unsigned to, const TensorMap* map, int k, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

template <int kMost>
struct Consumer {
  using S = Shape<kMost>;
  const Work& work;
  const Weight& weight;
  const TensorMap* out;
  float limit;
  unsigned stages, full, empty, staging;
  int group, thread;  // warpgroup 0 to 3, thread in it
  unsigned parity;
  int step;  // of kSteps in shared memory, the next

  __device__ __forceinline__ void release(int before) {
    __syncwarp();  // one lane speaks for the warp's loads of codes and scales
    if (thread % 32 == 0) barrier_arrive(empty + 8 * before);
  }

  template <int kTokens, bool kPaired>
  __device__ __forceinline__ void run(const Tile& tile, int steps) {
    constexpr int kSets = S::kSets;
    float d[kTokens / 2];
#pragma unroll
    for (float& v : d) v = 0.0f;
    unsigned a[kSets][4][4];
    int before = 0;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const unsigned at = stages + step * S::kBytes;
      const unsigned codes = at + S::kCodes + group * kStepCodes + thread * 16;
      const unsigned scales = at + S::kScales + group * kStepScales + thread / 4 * 8;
      barrier_wait(full + 8 * step, parity);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const Weights weights = load_shared(codes + i * kTileCodes, scales + i * kTileScales);
        if (kSets == 1) wgmma_wait<0>();
        if (kSets == 1 && i == 0 && s > 0) release(before);
        expand(weights, a[i % kSets]);
        wgmma_fence();
        const u64 x = tile_descriptor(at + i * S::kX);
#pragma unroll
        for (int q = 0; q < 4; ++q) Wgmma<kTokens>::run(d, a[i % kSets][q], x + 2 * q);
        wgmma_commit();
        if (kSets == 2) wgmma_wait<1>();
        if (kSets == 2 && i == 0 && s > 0) release(before);
      }
      before = step;
      step = step + 1 == S::kSteps ? 0 : step + 1;
      parity ^= step == 0;
    }
    wgmma_wait<0>();
#pragma unroll
    for (float& v : d) asm volatile("" : "+f"(v)::"memory");  // nothing reads the sums before this
    if (steps > 0) release(before);
    const int block = tile.row_tile * kBlocks + group;
    if (!kPaired && work.partial) {
      const int units = work.token_tiles * work.tile_tokens / kBox;
      const long long unit = tile.split * units + tile.first / kBox;
      float4* to = work.partial + (unit * weight.blocks + block) * 512 + thread_anew();
      if (block < weight.blocks) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j)
          to[(static_cast<long long>(j / 4) * weight.blocks * 4 + j % 4) * 128] =
              make_float4(d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]);
      }
    } else {
      write_tile<kTokens, kPaired>(d, weight, out, tile.expert, block, tile.first, limit, staging, 1 + group);
    }
  }
};

template <int kMost, bool kPaired, int... kTokens>
__device__ __forceinline__ void prefill(const Maps& maps, const Work& work, const Weight& weight, float limit) {
  using S = Shape<kMost>;
  extern __shared__ char s_bytes[];
  __shared__ u64 s_full[S::kSteps], s_empty[S::kSteps];
  const unsigned stages = (shared_address(s_bytes) + 1023) / 1024 * 1024;
  const unsigned full = shared_address(s_full), empty = shared_address(s_empty);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // uniform: else ptxas serialises wgmma
  if (threadIdx.x == 0) {
    for (int i = 0; i < S::kSteps; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, 4 * kBlocks);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  if (work.partial) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // the sum waits for the end
  const int count = work.count(), all_steps = (weight.chunks + kStep - 1) / kStep;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == 0) {
      unsigned parity = 1;  // a new barrier's: the stages are free
      int step = 0;
#pragma unroll 1
      for (int index = blockIdx.x; index < count; index += gridDim.x) {
        const Tile tile = tile_at(work, index);
        const int end = min(all_steps, (tile.split + 1) * work.steps);
#pragma unroll 1
        for (int s = tile.split * work.steps; s < end; ++s) {
          const unsigned at = stages + step * S::kBytes, barrier = full + 8 * step;
          barrier_wait(empty + 8 * step, parity);
          barrier_expect(barrier, kStep * tile.tokens * kTileK * 2 + kBlocks * (kStepCodes + kStepScales));
          const int chunk = s * kStep;
          const bool whole = chunk + kStep <= weight.chunks;  // else the last chunk twice, to meet x's zeros
#pragma unroll 1
          for (int b = 0; b < kBlocks; ++b) {
            // a block beyond the last computes that one again and is not written
            const int block = min(tile.row_tile * kBlocks + b, weight.blocks - 1);
            const long long row = static_cast<long long>(tile.expert) * weight.blocks + block;
            const long long from = row * weight.chunks + chunk;
            const unsigned codes = at + S::kCodes + b * kStepCodes, scales = at + S::kScales + b * kStepScales;
            copy_bytes(codes, weight.codes + from * 128, whole ? kStepCodes : kTileCodes, barrier);
            copy_bytes(scales, weight.scales + from * 32, whole ? kStepScales : kTileScales, barrier);
            if (!whole) {
              copy_bytes(codes + kTileCodes, weight.codes + from * 128, kTileCodes, barrier);
              copy_bytes(scales + kTileScales, weight.scales + from * 32, kTileScales, barrier);
            }
          }
#pragma unroll 1
          for (int row = 0; row < tile.tokens; row += kBox) {
            copy_box(at + row * kTileK * 2, &maps.x, chunk * kTileK, tile.first + row, barrier);
            copy_box(at + S::kX + row * kTileK * 2, &maps.x, (chunk + 1) * kTileK, tile.first + row, barrier);
          }
          step = step + 1 == S::kSteps ? 0 : step + 1;
          parity ^= step == 0;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;");
    const unsigned staging = stages + S::kSteps * S::kBytes + (group - 1) * S::kStaging;
    Consumer<kMost> consumer = {work, weight, &maps.out, limit, stages, full, empty, staging, group - 1,
                                static_cast<int>(threadIdx.x % 128), 0, 0};
#pragma unroll 1
    for (int index = blockIdx.x; index < count; index += gridDim.x) {
      const Tile tile = tile_at(work, index);
      const int steps = min(all_steps, (tile.split + 1) * work.steps) - tile.split * work.steps;
      const int tokens = __shfl_sync(kAllLanes, tile.tokens, 0);
      ((tokens == kTokens ? consumer.template run<kTokens, kPaired>(tile, steps) : void()), ...);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
  }
}

#define PRODUCT(name, most, paired, ...)                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                                        \
      name(const uint4* codes, const uint2* scales, const float* global_scale, const int4* tiles,                  \
           const int* tile_count, float4* partial, int token_tiles, int tile_tokens, int row_tiles, int splits,    \
           int steps, int blocks, int chunks, int parts, int rows, float limit, const __grid_constant__ Maps maps) { \
    const Work work = {tiles, tile_count, partial, token_tiles, tile_tokens, row_tiles, splits, steps};            \
    const Weight weight = {codes, scales, global_scale, blocks, chunks, parts, rows};                              \
    prefill<most, paired, __VA_ARGS__>(maps, work, weight, limit);                                                 \
  }

// By the largest tile. More sizes in a kernel and ptxas, short of registers, waits for every wgmma.
PRODUCT(sm90_nvfp4_prefill_few_plain_64, 64, false, 32, 64)
PRODUCT(sm90_nvfp4_prefill_few_plain_96, 96, false, 64, 96)
PRODUCT(sm90_nvfp4_prefill_few_plain_128, 128, false, 128)
PRODUCT(sm90_nvfp4_prefill_few_paired_64, 64, true, 32, 64)
PRODUCT(sm90_nvfp4_prefill_few_paired_96, 96, true, 64, 96)
PRODUCT(sm90_nvfp4_prefill_few_paired_128, 128, true, 128)

// out [tokens, stride] = global_scale * the splits' sums, added in their order. A block: 64 rows x 32 tokens.
extern "C" __global__ void __launch_bounds__(128) sm90_nvfp4_prefill_few_sum(
    const float4* partial, const float* global_scale, uint4* out, int splits, int tokens, int parts, int rows,
    int stride) {
  __shared__ __align__(1024) uint4 s_tile[kBox * 8];
  const int thread = threadIdx.x, block = blockIdx.x, blocks = gridDim.x;
  const long long each = static_cast<long long>(gridDim.y) * blocks * 512;
  partial += (static_cast<long long>(blockIdx.y) * blocks + block) * 512 + thread;
  float d[16] = {};
  asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll 4
  for (int split = 0; split < splits; ++split, partial += each) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float4 v = __ldcs(partial + j * 128);
      d[4 * j] += v.x;
      d[4 * j + 1] += v.y;
      d[4 * j + 2] += v.z;
      d[4 * j + 3] += v.w;
    }
  }
  const Weight weight = {nullptr, nullptr, global_scale, blocks, 0, parts, rows};
  float2 factor = factors<false>(weight, 0, block * 64 + thread / 32 * 16 + thread % 32 / 4);
  undo_debt<kBox>(d, factor.x, factor.y);
  stage<kBox, false>(d, factor.x, factor.y, 0.0f, shared_address(s_tile), thread);
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int token = i * 16 + thread / 8, unit = thread % 8, column = block * 8 + unit;
    const long long row = blockIdx.y * kBox + token;
    if (row < tokens && column < stride / 8) out[row * (stride / 8) + column] = s_tile[token * 8 + (unit ^ token % 8)];
  }
}
