// MoE router for many tokens on Hopper: logits = x W^T to f32's accuracy, then each token's choice as smxx_moe_topk.cu
// makes it, in one kernel behind one that lays out W.
//
//                 experts 0-143    144-287
//               +----------------+----------------+
//   64 tokens   |  warpgroup 1   |  warpgroup 2   |   of a CTA; warpgroup 0 only issues the copies. x and W come as
//               +----------------+----------------+   [row][64 k], swizzled by 128 bytes, kStages deep; the two CTAs of
//                                                     a cluster bring half of W each and multicast it to both.
//
// A weight is cut into three bf16 parts of 8 bits whose sum it is. Where all weights of a chunk of 64 k are bf16
// already, as the release stores them, only the first part is multiplied. Every logit is a sum of exact products: over
// 64 k in the tensor core, whose accumulator cuts bits off (over all 4096 k it would err ten times as much), beyond in
// IEEE additions in a fixed order.
// Waiting: full[stage] on the copies' bytes; empty[stage] on every consumer warp of both CTAs.
#include "common/moe_topk.cuh"
#include "common/nvfp4_sm90_prefill.cuh"

constexpr int kExperts = 288;  // at most; W is padded to them with zeros
constexpr int kParts = 3;
constexpr int kChunks = 256;  // of 64 k, at most
constexpr int kTokens = 64;   // of a CTA
constexpr int kCluster = 2;
constexpr int kConsumers = 2;  // warpgroups
constexpr int kConsumerWarps = 4 * kConsumers;
constexpr int kThreads = 128 * (1 + kConsumers);
constexpr int kOwn = kExperts / kConsumers;  // experts of a warpgroup
constexpr int kTogether = 8;  // chunks that are summed by themselves: a third less rounding error than all in a row
constexpr int kStages = 5;
constexpr int kRowBytes = kTileK * 2;
constexpr int kStageBytes = (kTokens + kExperts) * kRowBytes;
constexpr int kHalf = kExperts / kCluster * kRowBytes;  // of a part, that a CTA brings
constexpr int kPitch = kExperts + 8;  // floats of a token's logits: the stores of half a warp differ in bank
constexpr int kItems = kExperts / kWarpSize;

// ---- W ----

__device__ inline u32 upper_halves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ inline float below_upper_half(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

// A block has 64 k of all experts; a thread eight times 8 k of one.
extern "C" __global__ void __launch_bounds__(kExperts) sm90_moe_router_split(
    const float* weight,  // [experts, hidden], 16-byte aligned
    uint4* parts,         // bf16 [hidden / 64, kParts, kExperts, 64] as it lies in shared memory
    int* part_counts,     // [hidden / 64]: parts that are not zero, 1 or kParts; the others are not written
    int experts, int hidden) {
  constexpr int kUnits = kTileK / 8;
  parts += blockIdx.x * (kParts * kExperts * kUnits);
  weight += blockIdx.x * kTileK;
  u32 rest = 0;
  float4 loaded[kUnits][2];
#pragma unroll
  for (int i = 0; i < kUnits; ++i) {
    const int unit = i * kExperts + threadIdx.x, row = unit / kUnits;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* from = weight + static_cast<long long>(row) * hidden + unit % kUnits * 8 + 4 * half;
      loaded[i][half] = row < experts ? __ldg(reinterpret_cast<const float4*>(from)) : make_float4(0, 0, 0, 0);
      const float4& w = loaded[i][half];
      rest |= __float_as_uint(w.x) | __float_as_uint(w.y) | __float_as_uint(w.z) | __float_as_uint(w.w);
    }
  }
  const int count = __syncthreads_or(rest & 0xffff) ? kParts : 1;
  if (threadIdx.x == 0) part_counts[blockIdx.x] = count;
  for (int part = 0; part < count; ++part) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const int unit = i * kExperts + threadIdx.x, row = unit / kUnits;
      float4 &a = loaded[i][0], &b = loaded[i][1];
      parts[(part * kExperts + row) * kUnits + (unit % kUnits ^ row % 8)] =
          make_uint4(upper_halves(a.x, a.y), upper_halves(a.z, a.w), upper_halves(b.x, b.y), upper_halves(b.z, b.w));
      a.x = below_upper_half(a.x), a.y = below_upper_half(a.y);
      a.z = below_upper_half(a.z), a.w = below_upper_half(a.w);
      b.x = below_upper_half(b.x), b.y = below_upper_half(b.y);
      b.z = below_upper_half(b.z), b.w = below_upper_half(b.w);
    }
  }
}

// ---- products ----

__device__ __forceinline__ void arrive_at(unsigned barrier, int cta) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

// kBox tokens x 64 k of x to this CTA; zeros beyond the last token.
__device__ __forceinline__ void copy_x(unsigned to, const TensorMap* map, int k, int row, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(map), "r"(k), "r"(row), "r"(barrier)
      : "memory");
}

// To the same place of both CTAs, and their bytes to both's barrier.
__device__ __forceinline__ void copy_to_both(unsigned to, const void* from, int bytes, unsigned barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "h"(static_cast<u16>((1 << kCluster) - 1))
      : "memory");
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// D[64 tokens, 144 experts] (+)= A[64, 16] * B[16, 144], both K-major in shared memory.
__device__ __forceinline__ void multiply(float (&d)[kOwn / 2], u64 x, u64 w, int add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %74, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n144k16.f32.bf16.bf16 {" D0 D1 D2 D3
      ",%64,%65,%66,%67,%68,%69,%70,%71}, %72, %73, add, 1, 1, 0, 0;\n}"
      : R16(0), R16(16), R16(32), R16(48), R4(64), R4(68)
      : "l"(x), "l"(w), "r"(add));
}

extern "C" __global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kThreads, 1) sm90_moe_router(
    const char* parts, const int* part_counts,  // of sm90_moe_router_split
    const float* bias,                          // [experts]
    float* weights,                             // [tokens, top_k]
    int* ids,                                   // [tokens, top_k], top_k <= 32
    int tokens, int experts, int chunks, int top_k, float scale,
    const __grid_constant__ TensorMap x) {  // bf16 [tokens, hidden] in boxes of kBox x 64, swizzled by 128 bytes
  extern __shared__ char s_bytes[];
  __shared__ u64 s_full[kStages], s_empty[kStages];
  __shared__ int s_count[kChunks];
  char* const aligned_bytes = s_bytes + (1024 - shared_address(s_bytes) % 1024) % 1024;
  const unsigned stages = shared_address(aligned_bytes);
  const unsigned full = shared_address(s_full), empty = shared_address(s_empty);
  const int group = __shfl_sync(kAllLanes, threadIdx.x / kWarpgroup, 0);  // uniform: else ptxas serialises wgmma
  const int cta = blockIdx.x % kCluster, first_token = blockIdx.x * kTokens;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      barrier_init(full + 8 * i, 1);
      barrier_init(empty + 8 * i, kConsumerWarps * kCluster);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  for (int i = threadIdx.x; i < chunks; i += kThreads) s_count[i] = part_counts[i];
  __syncthreads();
  cluster_sync();

  if (group == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (threadIdx.x == 0) {
      int stage = 0;
      unsigned parity = 1;  // a new barrier's: the stages are free
#pragma unroll 1
      for (int chunk = 0; chunk < chunks; ++chunk) {
#pragma unroll 1
        for (int part = s_count[chunk] - 1; part >= 0; --part) {  // the smallest first
          const unsigned to = stages + stage * kStageBytes, barrier = full + 8 * stage;
          const char* from = parts + static_cast<long long>(chunk * kParts + part) * (kExperts * kRowBytes);
          barrier_wait(empty + 8 * stage, parity);
          barrier_expect(barrier, kStageBytes);
          copy_to_both(to + kTokens * kRowBytes + cta * kHalf, from + cta * kHalf, kHalf, barrier);
#pragma unroll
          for (int row = 0; row < kTokens; row += kBox)
            copy_x(to + row * kRowBytes, &x, chunk * kTileK, first_token + row, barrier);
          if (++stage == kStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const int thread = threadIdx.x % kWarpgroup, warp = thread / kWarpSize, lane = thread % kWarpSize;
    const int own = (group - 1) * kOwn;  // the first of this warpgroup's experts
    float total[kOwn / 2], part_total[kOwn / 2], sum[kOwn / 2];
#pragma unroll
    for (int i = 0; i < kOwn / 2; ++i) total[i] = part_total[i] = 0.0f;
    int stage = 0;
    unsigned parity = 0;
#pragma unroll 1
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int count = __shfl_sync(kAllLanes, s_count[chunk], 0);
#pragma unroll 1
      for (int part = 0; part < count; ++part) {
        barrier_wait(full + 8 * stage, parity);
        const u64 a = tile_descriptor(stages + stage * kStageBytes);
        const u64 b = tile_descriptor(stages + stage * kStageBytes + (kTokens + own) * kRowBytes);
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < kTileK / 16; ++q) multiply(sum, a + 2 * q, b + 2 * q, part + q);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (float& v : sum) asm volatile("" : "+f"(v)::"memory");  // nothing reads the sums before this
        if (lane < kCluster) arrive_at(empty + 8 * stage, lane);
        if (++stage == kStages) stage = 0, parity ^= 1;
      }
#pragma unroll
      for (int i = 0; i < kOwn / 2; ++i) part_total[i] += sum[i];
      if (chunk % kTogether == kTogether - 1 || chunk == chunks - 1) {
#pragma unroll
        for (int i = 0; i < kOwn / 2; ++i) total[i] += part_total[i], part_total[i] = 0.0f;
      }
    }

    // The logits take the stages' place, then a warp chooses for every eighth token.
    float* const s_logit = reinterpret_cast<float*>(aligned_bytes);
    consumers_sync();
#pragma unroll
    for (int i = 0; i < kOwn / 2; i += 2) {
      const int token = 16 * warp + lane / 4 + i / 2 % 2 * 8, expert = own + i / 4 * 8 + 2 * (lane % 4);
      *reinterpret_cast<float2*>(s_logit + token * kPitch + expert) = make_float2(total[i], total[i + 1]);
    }
    consumers_sync();
    float shift[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = i * kWarpSize + lane;
      shift[i] = expert < experts ? bias[expert] : 0.0f;
    }
#pragma unroll 1
    for (int own_token = (group - 1) * 4 + warp; own_token < kTokens; own_token += kConsumerWarps) {
      const int token = first_token + own_token;
      if (token >= tokens) break;
      float* const row = s_logit + own_token * kPitch;
      u32 key[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int expert = i * kWarpSize + lane;
        const float score = sigmoid(row[expert]);
        row[expert] = score;
        key[i] = expert < experts ? sort_key(score + shift[i]) : kStruckOut;
      }
      __syncwarp();
      const int chosen = choose(key, top_k);
      const long long at = static_cast<long long>(token) * top_k;
      store_choices(row[chosen], chosen, top_k, scale, weights + at, ids + at);
    }
  }
  __syncwarp();
  cluster_sync();  // the other CTA may still arrive here
}
