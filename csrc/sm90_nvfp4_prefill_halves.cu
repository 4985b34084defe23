// NVFP4 weights x tiles of 8 to 48 tokens on Hopper's FP8 tensor cores: the routed experts' two products, and dense
// ones split over k where rows are few. To expand a weight to bf16 takes 4.3 instructions. Here it takes 2.1 with its
// scale, and each token a sixteenth.
//
// x comes in halves (sm90_nvfp4_moe_prefill_halves): x = 2^e (hi + lo), both e4m3, e the row's. A mask makes codes FP8.
// A k32 step has a scale block of 16 k twice, once against hi and once against lo; its sum of 32 products is scaled in
// f32:
//
//   A  rows g and g + 8: codes of 16 k | the same codes        B  a token: hi of these k | lo of these k
//
// One CTA an SM owns 256 rows x a tile of tokens, as in sm90_nvfp4_prefill_few.cu. Steps are of 256 k:
//
//   warpgroup 0     copies: x [tokens / 8][4 chunks][8 tokens][128 bytes], codes and scales of 4 x 64 rows
//   warpgroup 1-4   64 rows each: codes and scales from shared memory, wgmma, sums times scales
//
// 256 rows x 64 k are 4 warps of 80 instructions at 8 tokens, 98 at 16, 118 at 24, 136 at 32, 150 at 40, 168 at 48, and
// arrive from memory in 490 clocks. Split over k, the sums go to `partial` as they lie in registers, and
// sm90_nvfp4_prefill_few_sum adds them in order.

#include "common/nvfp4_sm90_prefill_few.cuh"

constexpr int kStep = 4;  // chunks of 64 k
constexpr int kStepCodes = kStep * kTileCodes, kStepScales = kStep * kTileScales;
constexpr int kGroup = 8;                         // tokens whose x lies together
constexpr int kGroupBytes = kStep * kGroup * 128;  // of a step

template <int kMost>
struct Shape {
  static constexpr int kSteps = kMost == 32 ? 4 : 3;
  static constexpr int kCodes = kMost / kGroup * kGroupBytes, kScales = kCodes + kBlocks * kStepCodes;
  static constexpr int kBytes = kScales + kBlocks * kStepScales;  // of a step
  static constexpr int kStaging = kMost * 128;                    // bytes of a warpgroup's output
};

// ---- wgmma: D[64 rows, tokens] = A[64, 32] in registers * B[32, tokens] in shared memory ----

#define LIST8 "%0,%1,%2,%3"
#define LIST16 LIST8 ",%4,%5,%6,%7"
#define LIST24 LIST16 ",%8,%9,%10,%11"
#define LIST32 LIST24 ",%12,%13,%14,%15"
#define LIST40 LIST32 ",%16,%17,%18,%19"
#define LIST48 LIST40 ",%20,%21,%22,%23"
#define SUMS8 R4(0)
#define SUMS16 SUMS8, R4(4)
#define SUMS24 SUMS16, R4(8)
#define SUMS32 SUMS24, R4(12)
#define SUMS40 SUMS32, R4(16)
#define SUMS48 SUMS40, R4(20)

template <int kTokens>
struct Product;

#define MULTIPLY_AS(type, tokens, list, a0, a1, a2, a3, b, ...)                                                        \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, 0, 0;\nwgmma.mma_async.sync.aligned.m64n" #tokens                 \
               "k32.f32." type ".e4m3 {" list "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, %" #b ", add, 1, 1;\n}"       \
               : __VA_ARGS__                                                                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(x))
#define MULTIPLY(tokens, list, a0, a1, a2, a3, b, ...)                                                                 \
  template <>                                                                                                          \
  struct Product<tokens> {                                                                                             \
    template <bool kFirst>                                                                                             \
    static __device__ __forceinline__ void run(float* d, const unsigned* a, u64 x) {                                   \
      if constexpr (kFirst)                                                                                            \
        MULTIPLY_AS("e5m2", tokens, list, a0, a1, a2, a3, b, __VA_ARGS__);                                             \
      else                                                                                                             \
        MULTIPLY_AS("e4m3", tokens, list, a0, a1, a2, a3, b, __VA_ARGS__);                                             \
    }                                                                                                                  \
  };
MULTIPLY(8, LIST8, 4, 5, 6, 7, 8, SUMS8)
MULTIPLY(16, LIST16, 8, 9, 10, 11, 12, SUMS16)
MULTIPLY(24, LIST24, 12, 13, 14, 15, 16, SUMS24)
MULTIPLY(32, LIST32, 16, 17, 18, 19, 20, SUMS32)
MULTIPLY(40, LIST40, 20, 21, 22, 23, 24, SUMS40)
MULTIPLY(48, LIST48, 24, 25, 26, 27, 28, SUMS48)

// kGroupBytes from 8 tokens to the next 8, swizzle of 128 bytes
__device__ __forceinline__ u64 halves_descriptor(unsigned address) {
  return u64{(address & 0x3ffff) >> 4} | u64{1} << 16 | u64{kGroupBytes >> 4} << 32 | u64{1} << 62;
}

// ---- weights ----

__device__ __forceinline__ void clear_shared(unsigned at) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(at), "r"(0) : "memory");
}

// Scale block `block` (0 to 3) of a thread's two rows as FP8, twice.
__device__ __forceinline__ void expand(const Weights& weights, int block, unsigned (&a)[4]) {
  const unsigned low = block % 2 ? weights.codes.z : weights.codes.x;
  const unsigned high = block % 2 ? weights.codes.w : weights.codes.y;
  a[0] = a[2] = block < 2 ? first_e5m2(low) : second_e4m3(low);
  a[1] = a[3] = block < 2 ? first_e5m2(high) : second_e4m3(high);
}

// Its scales, of rows g and g + 8, times 2^(bias - 15). As halves: their conversion is not the ALU's work.
__device__ __forceinline__ float2 scales_of(const Weights& weights, int block) {
  const unsigned word = block % 2 ? weights.scales.y : weights.scales.x;
  const unsigned low = word << 7 & 0x7f807f80, high = word >> 1 & 0x7f807f80;
  float2 v;
  if (block < 2)
    asm("{\n.reg .b16 x, y, z;\nmov.b32 {x, z}, %2;\nmov.b32 {y, z}, %3;\n"
        "cvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(low), "r"(high));
  else
    asm("{\n.reg .b16 x, y, z;\nmov.b32 {z, x}, %2;\nmov.b32 {z, y}, %3;\n"
        "cvt.f32.f16 %0, x;\ncvt.f32.f16 %1, y;\n}"
        : "=f"(v.x), "=f"(v.y)
        : "r"(low), "r"(high));
  return v;
}

// ---- work ----

struct Halves {
  const u8* x;           // [ceil(chunks / kStep), groups, kGroupBytes]
  const float* factors;  // [groups * kGroup]: of hi + lo
  int groups;            // of kGroup rows of x
};

template <int kMost>
struct Consumer {
  using S = Shape<kMost>;
  const Work& work;
  const Halves& halves;
  const Weight& weight;
  const TensorMap* out;
  float limit;
  unsigned stages, full, empty, staging;
  int group, thread;  // warpgroup 0 to 3, thread in it
  unsigned parity;
  int step;  // of kSteps in shared memory, the next

  // Two sets of kAtOnce scale blocks: the tensor cores fill one while the other's sums are scaled.
  template <int kTokens>
  __device__ __forceinline__ void multiply_step(float* total, unsigned codes, unsigned scales, u64 x) {
    constexpr int kAtOnce = kTokens == 8 ? 4 : kTokens == 16 ? 2 : 1, kSums = kTokens / 2;
    float d[2][kAtOnce][kSums];
    unsigned a[2][kAtOnce][4];
    Weights weights[kStep];
    weights[0] = load_shared(codes, scales);
#pragma unroll
    for (int first = 0; first <= 4 * kStep; first += kAtOnce) {
      const int set = first / kAtOnce % 2, chunk = first / 4;
      if (first < 4 * kStep) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) expand(weights[chunk], first % 4 + i, a[set][i]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int block = first % 4 + i;
          const u64 at = x + chunk * (1024 >> 4) + block * (32 >> 4);
          if (block < 2)
            Product<kTokens>::template run<true>(d[set][i], a[set][i], at);
          else
            Product<kTokens>::template run<false>(d[set][i], a[set][i], at);
        }
        wgmma_commit();
        if (first % 4 + kAtOnce == 4 && chunk + 1 < kStep)
          weights[chunk + 1] = load_shared(codes + (chunk + 1) * kTileCodes, scales + (chunk + 1) * kTileScales);
      }
      if (first == 0) continue;
      if (first < 4 * kStep)
        wgmma_wait<1>();
      else
        wgmma_wait<0>();
      const int before = first - kAtOnce;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float* sums = d[1 - set][i];
#pragma unroll
        for (int j = 0; j < kSums; ++j) asm volatile("" : "+f"(sums[j])::"memory");  // not read before the wait
        const float2 scale = scales_of(weights[before / 4], before % 4 + i);
#pragma unroll
        for (int j = 0; j < kSums; ++j) total[j] = fmaf(j & 2 ? scale.y : scale.x, sums[j], total[j]);
      }
    }
  }

  template <int kTokens, bool kPaired>
  __device__ __forceinline__ void run(const Tile& tile, int steps) {
    constexpr int kAlign = kPaired ? 32 : 16, kStaged = (kTokens + kAlign - 1) / kAlign * kAlign;
    float total[kStaged / 2];  // what is beyond kTokens is staged and not written
#pragma unroll
    for (float& v : total) v = 0.0f;
#pragma unroll 1
    for (int s = 0; s < steps; ++s) {
      const unsigned at = __shfl_sync(kAllLanes, stages + step * S::kBytes, 0);  // uniform, as its descriptors
      barrier_wait(full + 8 * step, parity);
      multiply_step<kTokens>(total, at + S::kCodes + group * kStepCodes + thread * 16,
                             at + S::kScales + group * kStepScales + thread / 4 * 8, halves_descriptor(at));
      __syncwarp();
      if (thread % 32 == 0) barrier_arrive(empty + 8 * step);
      step = step + 1 == S::kSteps ? 0 : step + 1;
      parity ^= step == 0;
    }
    const int own = thread_anew(), block = tile.row_tile * kBlocks + group;
    const float2* factor = reinterpret_cast<const float2*>(halves.factors + tile.first) + own % 4;
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
      const float2 f = __ldcg(factor + 4 * j);
      total[4 * j] *= f.x;
      total[4 * j + 1] *= f.y;
      total[4 * j + 2] *= f.x;
      total[4 * j + 3] *= f.y;
    }
    if (!kPaired && work.partial) {
      if (block >= weight.blocks) return;
      const int boxes = (work.tile_tokens + kBox - 1) / kBox;
      const int first = (tile.split * work.token_tiles + tile.first / work.tile_tokens) * boxes;
      float4* to = work.partial + (static_cast<long long>(first) * weight.blocks + block) * 512 + own;
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j)
        to[(static_cast<long long>(j / 4) * weight.blocks * 4 + j % 4) * 128] =
            make_float4(total[4 * j], total[4 * j + 1], total[4 * j + 2], total[4 * j + 3]);
    } else {
      write<kTokens, kPaired, kStaged>(total, tile, block, own);
    }
  }

  // As write_tile, in boxes of 8 tokens.
  template <int kTokens, bool kPaired, int kStaged>
  __device__ __forceinline__ void write(float* total, const Tile& tile, int block, int own) {
    const int column = block * (kPaired ? 32 : 64);
    float2 factor = factors<kPaired>(weight, tile.expert, column + own / 32 * 16 + own % 32 / 4);
    undo_debt<kStaged>(total, factor.x, factor.y);
    if (own == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the tile before has been read
    warpgroup_sync(1 + group);
    stage<kStaged, kPaired>(total, factor.x, factor.y, limit, staging, own);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    warpgroup_sync(1 + group);
    if (own == 0 && column < weight.rows) {
#pragma unroll
      for (int i = 0; i < kTokens; i += kGroup)
        store_box(out, column, tile.first + i, staging + i * (kPaired ? 64 : 128));
      asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    }
  }
};

template <int kMost, bool kPaired, int... kTokens>
__device__ __forceinline__ void prefill(const TensorMap* out, const Work& work, const Halves& halves, const Weight& weight,
                                        float limit) {
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
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (weight.chunks % kStep) {  // scales beyond the last chunk's are never written and must not be infinite
    constexpr int kUnits = kBlocks * kStepScales / 16;
    for (int i = threadIdx.x; i < S::kSteps * kUnits; i += kThreads)
      clear_shared(stages + i / kUnits * S::kBytes + S::kScales + i % kUnits * 16);
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  if (work.partial) asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // the sum waits for the end
  const int count = work.count(), all_steps = (weight.chunks + kStep - 1) / kStep;

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 32;");
    if (threadIdx.x == 0) {
      // The first steps' weights, and the table of tiles, do not wait for the kernel that splits x.
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
        unsigned parity = 1;  // a new barrier's: the stages are free
        int step = 0, done = 0;
        if (pass == 1) asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll 1
        for (int index = blockIdx.x; index < count && (pass || done < S::kSteps); index += gridDim.x) {
          const Tile tile = tile_at(work, index);
          const int end = min(all_steps, (tile.split + 1) * work.steps);
          const int x_bytes = tile.tokens / kGroup * kGroupBytes;
#pragma unroll 1
          for (int s = tile.split * work.steps; s < end && (pass || done < S::kSteps); ++s, ++done) {
            const unsigned at = stages + step * S::kBytes, barrier = full + 8 * step;
            if (pass == 0 || done >= S::kSteps) {
              // beyond the last chunk x is zero, any byte is a finite code, and scales are those of tiles before or 0
              const int chunk = s * kStep, here = min(kStep, weight.chunks - chunk);
              barrier_wait(empty + 8 * step, parity);
              barrier_expect(barrier, x_bytes + kBlocks * here * (kTileCodes + kTileScales));
#pragma unroll 1
              for (int b = 0; b < kBlocks; ++b) {
                // a block beyond the last computes that one again and is not written
                const int block = min(tile.row_tile * kBlocks + b, weight.blocks - 1);
                const long long row = static_cast<long long>(tile.expert) * weight.blocks + block;
                const long long from = row * weight.chunks + chunk;
                copy_bytes(at + S::kCodes + b * kStepCodes, weight.codes + from * 128, here * kTileCodes, barrier);
                copy_bytes(at + S::kScales + b * kStepScales, weight.scales + from * 32, here * kTileScales, barrier);
              }
            }
            if (pass == 1) {
              const long long place = static_cast<long long>(s) * halves.groups + tile.first / kGroup;
              copy_bytes(at, halves.x + place * kGroupBytes, x_bytes, barrier);
            }
            step = step + 1 == S::kSteps ? 0 : step + 1;
            parity ^= step == 0;
          }
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 112;\ngriddepcontrol.wait;" ::: "memory");
    const unsigned staging = stages + S::kSteps * S::kBytes + (group - 1) * S::kStaging;
    Consumer<kMost> consumer = {work, halves, weight, out, limit, stages, full, empty, staging, group - 1,
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

#define PRODUCT(name, most, paired, ...)                                                                               \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                                                            \
      name(const uint4* codes, const uint2* scales, const float* global_scale, const int4* tiles,                      \
           const int* tile_count, float4* partial, const u8* x, const float* factors, int groups, int token_tiles,     \
           int tile_tokens, int row_tiles, int splits, int steps, int blocks, int chunks, int parts, int rows,         \
           float limit, const __grid_constant__ TensorMap out) {                                                       \
    const Work work = {tiles, tile_count, partial, token_tiles, tile_tokens, row_tiles, splits, steps};                \
    const Halves halves = {x, factors, groups};                                                                        \
    const Weight weight = {codes, scales, global_scale, blocks, chunks, parts, rows};                                  \
    prefill<most, paired, __VA_ARGS__>(&out, work, halves, weight, limit);                                             \
  }

PRODUCT(sm90_nvfp4_prefill_halves_plain_32, 32, false, 8, 16, 24, 32)
PRODUCT(sm90_nvfp4_prefill_halves_plain_48, 48, false, 24, 32, 40, 48)
PRODUCT(sm90_nvfp4_prefill_halves_paired_32, 32, true, 8, 16, 24, 32)
PRODUCT(sm90_nvfp4_prefill_halves_paired_48, 48, true, 24, 32, 40, 48)
