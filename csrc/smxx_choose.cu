// The next token of each row of logits: the best, or the best of a temperature's scores and counted Gumbel noise.
//
// Tile: a block goes through a part of a row, span values, thread t through values t, t + 256, t + 512 and so on:
//
//   row 0  | part 0 | part 1 | .. | part n - 1 |     a part's best -> partial[row, part], as (key, id)
//   row 1  | ..
//
// Few rows are cut into many parts, many rows into few. A second kernel, dependent on the first, takes the best of a
// row's parts, a warp a row, and leaves it where the next step finds it.
// A key orders scores as torch.argmax does: NaN above all, -0 as 0; among equal keys the lowest id wins.
// Bytes: 4 a logit, once. The noise is worked out where it is used, in 90 instructions a value.
// Waiting: for the kernel ahead before anything is read; a block's warps meet once, at the end.
#include "common/dependent_launch.cuh"
#include "common/warp.cuh"

using u32 = unsigned;
using i64 = long long;

constexpr int kThreads = 256;  // the launcher's THREADS
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kAhead = 4;      // loads in flight; kThreads times so many are the launcher's QUANTUM
constexpr float kLeastTemperature = 1e-6f;
constexpr u32 kNothing = 0;    // below the key of every score, -inf included

__device__ inline u32 sort_key(float x) {
  const u32 bits = __float_as_uint(x);
  if (isnan(x)) return 0xffffffffu;
  if (bits == 0x80000000u) return bits;  // -0, which equals 0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Wellons's lowbias32.
__device__ inline u32 hash(u32 x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ x >> 16;
}

// Every step rounded as torch rounds it; the logarithms are within an ulp of the CPU's.
__device__ inline float gumbel(u32 bits) {
  const float uniform = fminf(__fmul_rn(__fadd_rn(__uint2float_rn(bits), 0.5f), 0x1p-32f), 1.0f - 0x1p-24f);
  return -logf(-log1pf(-uniform));
}

struct Best {
  u32 key, id;
};

// The highest key of a warp and the lowest id that has it, in every lane.
__device__ inline Best best_of_warp(Best mine) {
  const u32 key = __reduce_max_sync(kAllLanes, mine.key);
  return {key, __reduce_min_sync(kAllLanes, mine.key == key ? mine.id : 0xffffffffu)};
}

template <bool kDraws>
__device__ void choose_part(const float* logits,       // [rows, vocab], rows row_stride apart
                            const i64* requests,       // [rows], a row's place in the next two
                            const float* temperature,  // 0: the best
                            const i64* key,            // 32 bits
                            const int* positions,      // [rows]
                            const float* least,        // [rows] or none: what lies below is not chosen
                            uint2* partial,            // [rows, parts]
                            i64 row_stride, int vocab, int span) {
  __shared__ Best s_best[kWarps];
  const int row = blockIdx.x, part = blockIdx.y, lane = threadIdx.x % kWarpSize;
  const int begin = part * span, end = min(vocab, begin + span), first = begin + threadIdx.x;
  logits += row * row_stride;
  wait_for_previous_kernel();
  let_next_kernel_start();

  float scale = 1.0f, lowest = 0.0f;
  u32 word = 0;
  bool draws = false;
  if (kDraws) {
    const i64 request = requests[row];
    const int position = positions[row];
    lowest = least ? least[row] : __uint_as_float(0xff800000u);
    const float degree = temperature[request];
    word = static_cast<u32>(key[request]);
    draws = degree > 0.0f;
    if (draws) scale = __frcp_rn(fmaxf(degree, kLeastTemperature));
    word = hash(word ^ static_cast<u32>(position));
  }
  float best = __uint_as_float(0xff800000u);  // -inf, and then the first id is the lowest that has it
  int id = first;
  for (int at = first; at < end; at += kAhead * kThreads) {
    float score[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) score[i] = at + i * kThreads < end ? logits[at + i * kThreads] : best;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      const int token = at + i * kThreads;
      if (kDraws && draws) {
        const float noise = gumbel(hash(hash(token + 1) ^ word));
        const float drawn = __fadd_rn(__fmul_rn(score[i], scale), noise);
        score[i] = score[i] < lowest ? __uint_as_float(0xff800000u) : drawn;
      }
      if (token < end && best == best && !(score[i] <= best)) best = score[i], id = token;
    }
  }
  Best mine = best_of_warp({first < end ? sort_key(best) : kNothing, static_cast<u32>(id)});
  if (lane == 0) s_best[threadIdx.x / kWarpSize] = mine;
  __syncthreads();
  if (threadIdx.x >= kWarpSize) return;
  mine = best_of_warp(lane < kWarps ? s_best[lane] : Best{kNothing, 0xffffffffu});
  if (lane == 0) partial[static_cast<i64>(row) * gridDim.y + part] = make_uint2(mine.key, mine.id);
}

extern "C" __global__ void __launch_bounds__(kThreads, 6) smxx_choose_best(
    const float* logits, const i64* requests, const float* temperature, const i64* key, const int* positions,
    const float* least, uint2* partial, i64 row_stride, int vocab, int span) {
  choose_part<false>(logits, requests, temperature, key, positions, least, partial, row_stride, vocab, span);
}

extern "C" __global__ void __launch_bounds__(kThreads, 4) smxx_choose_drawn(
    const float* logits, const i64* requests, const float* temperature, const i64* key, const int* positions,
    const float* least, uint2* partial, i64 row_stride, int vocab, int span) {
  choose_part<true>(logits, requests, temperature, key, positions, least, partial, row_stride, vocab, span);
}

extern "C" __global__ void __launch_bounds__(kWarpSize) smxx_choose_of_parts(
    const uint2* partial,  // [rows, parts]
    const int* positions,  // [rows]
    const i64* targets,    // [rows] or none: where the next two get a row's token and position
    i64* chosen,           // [rows]
    i64* token, int* position, int parts) {
  const int row = blockIdx.x, lane = threadIdx.x;
  partial += static_cast<i64>(row) * parts;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int at = positions[row];
  const i64 target = targets ? targets[row] : 0;
  Best best = {kNothing, 0xffffffffu};
#pragma unroll 4
  for (int part = lane; part < parts; part += kWarpSize) {
    const uint2 other = partial[part];
    if (other.x > best.key) best = {other.x, other.y};  // ids rise from part to part
  }
  best = best_of_warp(best);
  if (lane != 0) return;
  chosen[row] = best.id;
  if (targets) token[target] = best.id, position[target] = at;
}
