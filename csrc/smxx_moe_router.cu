// MoE router: logits = x W^T to f32's accuracy, then each token's choice as smxx_moe_topk.cu makes it.
//
// Tile: a block owns 16 experts x 512 of k for all tokens, a warp 64 of these k:
//
//               k 0     512    1024 ..                     k 0      64     128  ..  448
//   experts 0-15  | block | block | ..        a block      | warp 0 | warp 1 | .. | warp 7 |
//          16-31  | ..                        a lane's weights: 8 k in a row, twice, of 2 experts
//
// A weight is cut into three bf16 parts of 8 bits whose sum it is, all 24 bits of it, so that tensor cores multiply it
// with bf16 x exactly: every logit is a sum of exact products, over 64 k in the accumulators of the three parts, beyond
// in IEEE additions in a fixed order. An infinite x gives NaN: it meets parts that are zero.
// Bytes: 4 * experts * hidden, in registers before the kernel ahead ends; x comes from L2 once a 16 experts. More than
// 64 tokens are 64 in each of gridDim.z.
// Waiting: one token is one launch. The grid's last block chooses, when it has polled the other blocks' sums, each
// absent until it comes, and leaves them absent: it waits only for blocks that started before it. For more tokens a
// second kernel, dependent on the first, chooses, a block a token: were they blocks of the first, each would wait for
// later ones, which find no place on a GPU that waiting blocks fill.
#include "common/dependent_launch.cuh"
#include "common/moe_topk.cuh"

using u32 = unsigned;

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kExperts = 16;              // of a block
constexpr int kWarpK = 64;
constexpr int kBlockK = kWarps * kWarpK;  // the launcher's BLOCK_K
constexpr int kParts = 3;
constexpr int kSteps = kWarpK / 16;       // MMAs of 16 k
constexpr int kPitch = kExperts + 4;      // floats of a token's sums: the stores of a warp differ in bank
#if __CUDA_ARCH__ >= 1200
constexpr int kTogether = 2;              // tiles of 8 tokens in flight: what 128 registers hold
#else
constexpr int kTogether = 4;
#endif
constexpr int kBatch = 8;                 // sums of an expert in flight

// Constant while the model runs, so it may be read before the kernel ahead ends. Not ld.global.nc: ptxas 13.0 moves
// that behind griddepcontrol.wait.
__device__ inline float4 load_weights(const float* from) {
  float4 w;
  asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(w.x), "=f"(w.y), "=f"(w.z), "=f"(w.w) : "l"(from));
  return w;
}

// No sum has kAbsent's bits: the NaN that arithmetic makes is another.
constexpr u32 kAbsent = 0xFFFFFFFF;
__device__ inline void publish(float* to, float sum) {
  asm volatile("st.relaxed.gpu.global.f32 [%0], %1;" ::"l"(to), "f"(sum) : "memory");
}
__device__ inline float published(const float* from) {
  float sum;
  asm volatile("ld.relaxed.gpu.global.f32 %0, [%1];" : "=f"(sum) : "l"(from) : "memory");
  return sum;
}

// Adds 16 experts x 16 k times 16 k x 8 tokens.
__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ inline u32 upper_halves(float low, float high) {
  return __byte_perm(__float_as_uint(low), __float_as_uint(high), 0x7632);
}
__device__ inline float below_upper_half(float x) { return x - __uint_as_float(__float_as_uint(x) & 0xffff0000u); }

template <int kTiles>  // tokens / 8 of a blockIdx.z
__device__ void sum_products(const unsigned short* x,  // bf16 [tokens, hidden], rows x_stride apart, 16-byte aligned
                             const float* weight,      // [experts, hidden], hidden a multiple of 64
                             float* partial,           // [splits of k, tokens, experts]
                             long long x_stride, int tokens, int experts, int hidden) {
  __shared__ float s_sum[kWarps][8 * kTiles][kPitch];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int row = lane / 4, column = 8 * (lane % 4);  // of the weights; MMA takes any order of k that both factors have
  const int split = blockIdx.x, first_expert = blockIdx.y * kExperts, first_token = blockIdx.z * 8 * kTiles;
  const int k = split * kBlockK + warp * kWarpK + column;
  const bool inside = k < hidden;  // the same for a warp

  float4 loaded[kSteps][2];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int expert = first_expert + row + 8 * half;
      const long long at = static_cast<long long>(expert) * hidden + k + 32 * (step / 2) + 4 * (step % 2);
      loaded[step][half] = inside && expert < experts ? load_weights(weight + at) : make_float4(0, 0, 0, 0);
    }
  }
  u32 a[kParts][kSteps][4];
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float4& w = loaded[step][half];
        a[part][step][half] = upper_halves(w.x, w.y);
        a[part][step][half + 2] = upper_halves(w.z, w.w);
        w.x = below_upper_half(w.x), w.y = below_upper_half(w.y);
        w.z = below_upper_half(w.z), w.w = below_upper_half(w.w);
      }
    }
  }

  wait_for_previous_kernel();
  let_next_kernel_start();
  x += (first_token + row) * x_stride + k;
  const int rows = inside ? tokens - first_token - row : 0;  // of x, from this lane's first
#pragma unroll kTogether
  for (int tile = 0; tile < kTiles; ++tile, x += 8 * x_stride) {
    uint4 b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // From L2: with programmatic launch L1 could hold what was there before the kernel that wrote x.
      b[i] = 8 * tile < rows ? __ldcg(reinterpret_cast<const uint4*>(x) + 4 * i) : make_uint4(0, 0, 0, 0);
    }
    float total[4] = {};
#pragma unroll
    for (int part = kParts - 1; part >= 0; --part) {  // the smallest first
      float sum[4] = {};
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        const uint4& four = b[step / 2];
        mma(sum, a[part][step], step % 2 ? four.z : four.x, step % 2 ? four.w : four.y);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += sum[i];
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) s_sum[warp][8 * tile + lane % 4 * 2 + i % 2][row + i / 2 * 8] = total[i];
  }
  __syncthreads();
  const int count = min(tokens - first_token, 8 * kTiles) * kExperts;
  partial += (split * tokens + first_token) * experts + first_expert;
#pragma unroll 1
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int token = i / kExperts, expert = i % kExperts;
    float sum = s_sum[0][token][expert];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += s_sum[other][token][expert];
    if (first_expert + expert < experts) publish(partial + token * experts + expert, sum);
  }
}

// kPolling: the sums may still be absent, and are left so.
template <int kItems, bool kPolling>  // most experts / 32
__device__ void sum_and_choose(float* partial,     // [splits, tokens, experts]
                               const float* bias,  // [experts]
                               float* weights,     // [tokens, top_k]
                               int* ids,           // [tokens, top_k], top_k <= 32
                               int token, int tokens, int experts, int splits, int top_k, float scale) {
  constexpr int kOwn = (kItems * kWarpSize + kThreads - 1) / kThreads;  // experts of a thread
  __shared__ float s_score[kItems * kWarpSize];
  __shared__ u32 s_key[kItems * kWarpSize];
  const int lane = threadIdx.x % kWarpSize, pitch = tokens * experts;
  float logit[kOwn] = {}, shift[kOwn];
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int expert = own * kThreads + threadIdx.x;
    shift[own] = expert < experts ? bias[expert] : 0.0f;
  }
#pragma unroll 1
  for (int first = 0; first < splits; first += kBatch) {
    float* const from = partial + first * pitch + token * experts + threadIdx.x;
    float sum[kOwn][kBatch];
    bool all_came;
    do {
      all_came = true;
#pragma unroll
      for (int own = 0; own < kOwn; ++own) {
        const bool there = own * kThreads + threadIdx.x < experts;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {  // all in flight before the first is looked at
          sum[own][i] = there && first + i < splits ? published(from + own * kThreads + i * pitch) : 0.0f;
        }
      }
      if (kPolling) {
#pragma unroll
        for (int own = 0; own < kOwn; ++own) {
#pragma unroll
          for (int i = 0; i < kBatch; ++i) all_came &= __float_as_uint(sum[own][i]) != kAbsent;
        }
      }
    } while (!all_came);
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const bool there = own * kThreads + threadIdx.x < experts;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        logit[own] += sum[own][i];
        if (kPolling && there && first + i < splits) {
          publish(from + own * kThreads + i * pitch, __uint_as_float(kAbsent));
        }
      }
    }
  }
#pragma unroll
  for (int own = 0; own < kOwn; ++own) {
    const int expert = own * kThreads + threadIdx.x;
    if (expert < kItems * kWarpSize) {
      const float score = sigmoid(logit[own]);
      s_score[expert] = score;
      s_key[expert] = expert < experts ? sort_key(score + shift[own]) : kStruckOut;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarpSize) {
    u32 key[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) key[i] = s_key[i * kWarpSize + lane];
    const int chosen = choose(key, top_k);
    store_choices(s_score[chosen], chosen, top_k, scale, weights + token * top_k, ids + token * top_k);
  }
}

#define SUM_PRODUCTS(tiles)                                                                              \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) smxx_moe_router_sum_t##tiles(                \
      const unsigned short* x, const float* weight, float* partial, long long x_stride, int tokens,      \
      int experts, int hidden) {                                                                         \
    sum_products<tiles>(x, weight, partial, x_stride, tokens, experts, hidden);                          \
  }
SUM_PRODUCTS(1)
SUM_PRODUCTS(2)
SUM_PRODUCTS(4)
SUM_PRODUCTS(8)

#define CHOOSE(items)                                                                                           \
  extern "C" __global__ void __launch_bounds__(kThreads) smxx_moe_router_choose_i##items(                       \
      float* partial, const float* bias, float* weights, int* ids, int experts, int splits, int top_k,          \
      float scale) {                                                                                            \
    wait_for_previous_kernel();                                                                                 \
    let_next_kernel_start();                                                                                    \
    sum_and_choose<items, false>(partial, bias, weights, ids, blockIdx.x, gridDim.x, experts, splits, top_k,    \
                                 scale);                                                                        \
  }                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kThreads, 2) smxx_moe_router_one_i##items(                       \
      const unsigned short* x, const float* weight, const float* bias, float* weights, int* ids, float* absent, \
      int experts, int hidden, int top_k, float scale) {                                                        \
    sum_products<1>(x, weight, absent, hidden, 1, experts, hidden);                                             \
    if (blockIdx.x != gridDim.x - 1 || blockIdx.y != gridDim.y - 1) return;                                     \
    sum_and_choose<items, true>(absent, bias, weights, ids, 0, 1, experts, gridDim.x, top_k, scale);            \
  }
CHOOSE(9)
CHOOSE(16)
