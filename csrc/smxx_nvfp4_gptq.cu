// Blocks of 16 weights rounded to NVFP4 one after the other, each by the scale and codes that leave the least of a
// quadratic loss: step_kernels/ops/nvfp4_gptq.py has the rules.
//
// Tile: a thread block takes 64 rows of up to 128 columns, four threads a row. Of a block of 16 each of the four rounds
// by 3 of the 12 scales, side by side for the sake of latency, 16 columns in registers; the best of 12 by shuffles.
// Outside of that a thread has every fourth column: products with the row's changes so far, errors, stores.
// Shared memory: the factor's 16 rows of this block, its 16 x 16 of ones on the diagonal, and the tile's changes.
// Arithmetic: as the specification's in every rounding, so that a block comes out alike whoever chooses it; only its
// products with earlier changes are summed by fused operations in an order of their own.
// Work: 12 scales x 16 columns x 31 instructions and 1,600 more a block, 36 bytes a column of memory: the instructions.
using u8 = unsigned char;

constexpr int kThreads = 256;  // the launcher's THREADS
constexpr int kWarps = kThreads / 32;
constexpr int kParts = 4;                  // threads a row
constexpr int kRows = kThreads / kParts;   // the launcher's ROWS
constexpr int kColumns = 128;              // the launcher's MOST_COLUMNS
constexpr int kBlock = 16;
constexpr int kOwn = kBlock / kParts;      // columns of a block that are a thread's
constexpr int kCandidates = 12;
constexpr int kSlots = kCandidates / kParts;
constexpr int kPitch = kColumns + 4;       // neighbouring rows lie four banks apart
constexpr int kMost = 0x7e;                // e4m3's 448; one more is NaN

// To the nearest e4m3 from 2^-9 to 448.
__device__ inline int e4m3_code(float scale) {
  if (scale < 0x1p-6f) return __float2int_rn(scale * 512.0f);  // subnormal
  const unsigned bits = __float_as_uint(scale);
  return static_cast<int>((bits + 0x7ffffu + (bits >> 20 & 1)) >> 20) - (120 << 3);
}

__device__ inline float e4m3_value(int code) {
  return code < 8 ? static_cast<float>(code) * 0x1p-9f : __uint_as_float((code + (120 << 3)) << 20);
}

// Scale code `i` in the order in which candidates win ties: offsets 0, -1, 1, -2, 2, -3, 3, -4, 4, 5, 6, 7.
__device__ inline int candidate(int first, int i) {
  const int offset = i > 8 ? i - 4 : i & 1 ? -(i + 1) / 2 : i / 2;
  return min(max(first + offset, 1), kMost);
}

// The nearest e2m1, ties to even. At 1.5 * 2^23 steps f32's own spacing is one step.
__device__ inline float e2m1_round(float x) {
  x = fminf(fmaxf(x, -6.0f), 6.0f);
  const float power = fmaxf(__uint_as_float(__float_as_uint(x) & 0x7f800000u), 1.0f);
  const float shift = __fmul_rn(power, 0.5f * 1.5f * 0x1p23f);
  return __fsub_rn(__fadd_rn(x, shift), shift);
}

// x / d as IEEE has it where d is an e4m3 and r = 1 / d: true of every mantissa of x, while nothing leaves f32's range.
__device__ inline float divide(float x, float d, float r) {
  const float q = __fmul_rn(x, r);
  return __fmaf_rn(__fmaf_rn(-q, d, x), r, q);
}

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    smxx_nvfp4_gptq(const float* w, long long w_outer, long long w_inner, long long w_row, const float* factor,
                    long long factor_outer, long long factor_inner, long long factor_row, long long factor_column,
                    const float* products, long long products_outer, long long products_inner, long long products_row,
                    float* errors, long long errors_outer, long long errors_inner, long long errors_row, u8* scales,
                    long long scales_outer, long long scales_inner, long long scales_row, int inner, int n, int k) {
  __shared__ float4 changes4[kRows][kPitch / 4];  // of this block of 16 its products until there are changes
  __shared__ float4 rows4[kBlock][kPitch / 4];
  __shared__ float4 upper4[kBlock][kBlock / 4];  // on the diagonal the factor's own
  __shared__ float4 values4[kRows][kBlock / 4 + 1];
  __shared__ float inverse[kBlock];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, part = threadIdx.x % kParts, own = threadIdx.x / kParts;
  const int tiles = (n + kRows - 1) / kRows, tile = blockIdx.x % tiles, matrix = blockIdx.x / tiles;
  const long long outer_index = matrix / inner, inner_index = matrix % inner;
  const bool inside = tile * kRows + own < n;
  const long long row = min(tile * kRows + own, n - 1);
  w += outer_index * w_outer + inner_index * w_inner + row * w_row;
  factor += outer_index * factor_outer + inner_index * factor_inner;
  products += outer_index * products_outer + inner_index * products_inner + row * products_row;
  errors += outer_index * errors_outer + inner_index * errors_inner + row * errors_row;
  scales += outer_index * scales_outer + inner_index * scales_inner + row * scales_row;
  float* changes = reinterpret_cast<float*>(changes4[own]);
  float* values = reinterpret_cast<float*>(values4[own]);

  for (int base = 0; base < k; base += kBlock) {
    for (int j = warp; j < kBlock; j += kWarps) {
      float* to = reinterpret_cast<float*>(rows4[j]);
      for (int c = lane; c < base + kBlock; c += 32) to[c] = factor[(base + j) * factor_row + c * factor_column];
    }
    float from[kOwn], now[kOwn], product[kOwn];
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int j = part + kParts * m;
      from[m] = w[base + j];
      now[m] = __fadd_rn(from[m], errors[base + j]);
      product[m] = products[base + j];
    }
    const int old = scales[base / kBlock];
    __syncthreads();  // the rows are there, and the block before is done with its 16 x 16
    {
      const int i = threadIdx.x / kBlock, j = threadIdx.x % kBlock;
      const float* line = reinterpret_cast<const float*>(rows4[j]);
      const float over = __fdiv_rn(1.0f, line[base + j]);
      reinterpret_cast<float*>(upper4[i])[j] = i == j ? line[base + j] : __fmul_rn(line[base + i], over);
      if (i == j) inverse[j] = over;
    }
    for (int c = 0; c < base / 4; ++c) {
      const float4 change = changes4[own][c];
#pragma unroll
      for (int m = 0; m < kOwn; ++m) {
        const float4 by = rows4[part + kParts * m][c];
        product[m] += change.x * by.x + change.y * by.y + change.z * by.z + change.w * by.w;
      }
    }
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      changes[base + part + kParts * m] = product[m];
      values[part + kParts * m] = now[m];
    }
    __syncthreads();

    float wanted[kBlock], before = 0, amax = 0;
    {
      float move[kBlock];
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        const float x = changes[base + j];
        before = __fadd_rn(before, __fmul_rn(x, x));
        move[j] = __fmul_rn(x, inverse[j]);
      }
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        const float* line = reinterpret_cast<const float*>(upper4[i]);
#pragma unroll
        for (int j = i + 1; j < kBlock; ++j) move[j] = __fsub_rn(move[j], __fmul_rn(move[i], line[j]));
        wanted[i] = __fsub_rn(values[i], move[i]);
        amax = fmaxf(amax, fabsf(wanted[i]));
      }
    }
    __syncwarp();  // the row's values are read

    const float least = amax == 0 ? 1.0f : __fdiv_rn(amax, 6.0f);
    const int first = e4m3_code(fminf(fmaxf(least, 0x1p-9f), 448.0f));
    float scale[kSlots], over[kSlots], loss[kSlots], x[kSlots][kBlock];
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      scale[s] = e4m3_value(candidate(first, part + kParts * s));
      over[s] = __fdiv_rn(1.0f, scale[s]);
      loss[s] = 0;
#pragma unroll
      for (int j = 0; j < kBlock; ++j) x[s][j] = wanted[j];
    }
#pragma unroll
    for (int i = 0; i < kBlock; ++i) {
      const float* line = reinterpret_cast<const float*>(upper4[i]);
#pragma unroll
      for (int s = 0; s < kSlots; ++s) {
        const float value = __fmul_rn(e2m1_round(divide(x[s][i], scale[s], over[s])), scale[s]);
        const float rest = __fmul_rn(__fsub_rn(x[s][i], value), line[i]);
        loss[s] = __fadd_rn(loss[s], __fmul_rn(rest, rest));
        const float moved = __fsub_rn(wanted[i], value);
#pragma unroll
        for (int j = i + 1; j < kBlock; ++j) x[s][j] = __fadd_rn(x[s][j], __fmul_rn(moved, line[j]));
        x[s][i] = value;
      }
    }

    int slot = 0;
    float after = loss[0];
#pragma unroll
    for (int s = 1; s < kSlots; ++s) {
      if (loss[s] < after) after = loss[s], slot = s;
    }
    int rank = part + kParts * slot;
#pragma unroll
    for (int mask = 1; mask < kParts; mask *= 2) {
      const float loss_there = __shfl_xor_sync(~0u, after, mask);
      const int rank_there = __shfl_xor_sync(~0u, rank, mask);
      if (loss_there < after || (loss_there == after && rank_there < rank)) after = loss_there, rank = rank_there;
    }
    if (rank % kParts == part) {
#pragma unroll
      for (int j = 0; j < kBlock; ++j) {
        values[j] = rank < kParts ? x[0][j] : rank < 2 * kParts ? x[1][j] : x[2][j];
      }
    }
    __syncwarp();
    const bool better = old == 0 || after < before;
#pragma unroll
    for (int m = 0; m < kOwn; ++m) {
      const int j = part + kParts * m;
      const float value = values[j];
      changes[base + j] = better ? __fsub_rn(value, now[m]) : 0.0f;
      if (better && inside) errors[base + j] = __fsub_rn(value, from[m]);
    }
    if (better && inside && part == 0) scales[base / kBlock] = static_cast<u8>(candidate(first, rank));
    __syncwarp();
  }
}
