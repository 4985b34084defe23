// RMS norm of bf16 rows with weight 1 + w, alone or of the sum of two or three tensors, which it also stores.
//
// Tile: a block owns a row at a time, a thread kChunks times 8 values of it, one load of 16 bytes each:
//
//   values  0-7  8-15  16-23  ..      8 T ..  8 T + 7 ..     (T threads)
//   thread   0     1     2    .. T-1 |   0        1   ..
//
// While a row of at most 4096 is worked on, the block's next is on its way. A sum is rounded to bf16 and then normed.
// Bytes: each element read and written once; the weight once a block.
// Waiting: the threads of a block meet once a row, where the squares of its warps are added up, in their order. Two
// places for those in turn: a warp that fills one again has passed the meeting after which all have read it.
#include "common/bf16.cuh"
#include "common/dependent_launch.cuh"
#include "common/warp.cuh"

using u16 = unsigned short;
using i64 = long long;

constexpr int kChunk = 8;       // values
constexpr int kMostWarps = 16;  // of a block

__device__ inline void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

template <int kTerms, int kChunks, bool kBf16Weight>
__device__ void rms_norm(const u16* x, const u16* residual, const u16* other,  // [rows, n], rows a stride apart
                         i64 x_stride, i64 residual_stride, i64 other_stride,
                         const void* weight,    // bf16 or f32 [n], n a multiple of 8
                         u16* out, u16* total,  // [rows, n]
                         int rows, int n, float eps) {
  constexpr bool kAhead = kChunks == 1;         // more rows than one do not fit the registers
  constexpr int kWords = kBf16Weight ? 1 : 2;   // of 16 bytes, of a chunk's weights
  __shared__ __align__(16) float s_squares[2][kMostWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const u16* const terms[3] = {x, residual, other};
  const i64 strides[3] = {x_stride, residual_stride, other_stride};
  int column[kChunks];
  const uint4* weights[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
    column[c] = kChunk * (c * blockDim.x + threadIdx.x);
    weights[c] = static_cast<const uint4*>(weight) + column[c] / kChunk * kWords;
    if (column[c] < n && threadIdx.x % (8 / kWords) == 0) prefetch_l2(weights[c]);  // once a line of 128 bytes
  }
  if (threadIdx.x < 2 * kMostWarps) s_squares[0][threadIdx.x] = 0.0f;  // of the warps that this block lacks
  __syncthreads();
  wait_for_previous_kernel();
  let_next_kernel_start();

  uint4 fetched[kTerms][kChunks];
  auto fetch = [&](int row) {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
#pragma unroll
      for (int t = 0; t < kTerms; ++t) {
        const u16* from = terms[t] + row * strides[t] + column[c];
        fetched[t][c] = column[c] < n ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
      }
    }
  };
  int row = blockIdx.x;
  fetch(row);
  uint4 packed[kChunks][kWords];
  if (kAhead && column[0] < n) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) packed[0][i] = weights[0][i];
  }

  for (int turn = 0; row < rows; turn ^= 1) {
    const i64 at = static_cast<i64>(row) * n;
    float value[kChunks][kChunk], squares = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      eight_floats(value[c], fetched[0][c]);
      if (kTerms > 1) {
#pragma unroll
        for (int t = 1; t < kTerms; ++t) {
          float term[kChunk];
          eight_floats(term, fetched[t][c]);
#pragma unroll
          for (int i = 0; i < kChunk; ++i) value[c][i] += term[i];
        }
        const uint4 rounded = eight_bf16(value[c]);
        if (column[c] < n) *reinterpret_cast<uint4*>(total + at + column[c]) = rounded;
        eight_floats(value[c], rounded);
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) squares = fmaf(value[c][i], value[c][i], squares);
    }
    row += gridDim.x;
    if (kAhead && row < rows) fetch(row);

    squares = warp_sum(squares);
    if (lane == 0) s_squares[turn][warp] = squares;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kMostWarps; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&s_squares[turn][i]);
      sum += (four.x + four.y) + (four.z + four.w);
    }
    const float scale = 1.0f / sqrtf(sum / n + eps);  // not rsqrtf, which is up to 2 ulp off for the whole row
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (column[c] >= n) continue;
      if (!kAhead) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) packed[c][i] = weights[c][i];
      }
      float factor[kChunk];
      if (kBf16Weight) {
        eight_floats(factor, packed[c][0]);
      } else {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
          const uint4& four = packed[c][i];
          factor[4 * i] = __uint_as_float(four.x), factor[4 * i + 1] = __uint_as_float(four.y);
          factor[4 * i + 2] = __uint_as_float(four.z), factor[4 * i + 3] = __uint_as_float(four.w);
        }
      }
#pragma unroll
      for (int i = 0; i < kChunk; ++i) value[c][i] = value[c][i] * scale * (1.0f + factor[i]);
      *reinterpret_cast<uint4*>(out + at + column[c]) = eight_bf16(value[c]);
    }
    if (!kAhead && row < rows) fetch(row);
  }
}

#define VARIANT(type, is_bf16, terms, chunks, blocks)                                                           \
  extern "C" __global__ void __launch_bounds__(kMostWarps* kWarpSize, blocks)                                   \
      smxx_rms_norm_##type##_##terms##_##chunks(                                                                \
          const u16* x, const u16* residual, const u16* other, i64 x_stride, i64 residual_stride,               \
          i64 other_stride, const void* weight, u16* out, u16* total, int rows, int n, float eps) {             \
    rms_norm<terms, chunks, is_bf16>(x, residual, other, x_stride, residual_stride, other_stride, weight, out,  \
                                     total, rows, n, eps);                                                      \
  }
#define VARIANTS(terms)                \
  VARIANT(bf16, true, terms, 1, 2)     \
  VARIANT(f32, false, terms, 1, 2)     \
  VARIANT(bf16, true, terms, 4, 1)     \
  VARIANT(f32, false, terms, 4, 1)

VARIANTS(1)
VARIANTS(2)
VARIANTS(3)
