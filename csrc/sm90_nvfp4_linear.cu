// out = x W^T for a prepared NVFP4 weight [n, k] and few bf16 rows of x; common/nvfp4_sm90_decode.cuh does the work.
//
// Bytes: 9/16 of a byte a weight, once for every kTokens rows of x.
#include "common/nvfp4_sm90_decode.cuh"

constexpr int kPrefetchedUnits = 16;

template <class S>
struct Linear {
  const float* global_scale;
  const u16* x;
  u16* out;
  i64 x_stride;
  int m, n, k, row_blocks, part_rows;

  __device__ int columns_of(int row) const { return row < row_blocks ? 0 : row / row_blocks; }
  __device__ int rows_end(int set) const { return (set + 1) * row_blocks; }
  __device__ Place place(int row, int unit) const { return {row - columns_of(row) * row_blocks, unit}; }
  __device__ void wait_for_activations() const { let_next_kernel_start(); }
  __device__ int tokens(int set) const { return min(S::kTokens, m - set * S::kTokens); }
  __device__ Source source(int set, int token, int unit) const {
    return {x + (set * S::kTokens + token) * x_stride + unit * kUnitK, k - unit * kUnitK, 1.0f};
  }
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    const int set = columns_of(row), at = (row - set * row_blocks) * kTileRows + pair_row(pair);
    u16* to = out + static_cast<i64>(set * S::kTokens + token) * n + at;
    if (at < n) to[0] = to_bf16(a * kRange * global_scale[at / part_rows]);
    if (at + 8 < n) to[8] = to_bf16(b * kRange * global_scale[(at + 8) / part_rows]);
  }
};

template <int kTokens>
__device__ inline void linear(const u8* codes,            // [row blocks, chunks, 2048]
                              const u8* scales,           // [row blocks, chunks, 256]
                              const float* global_scale,  // [n / part_rows]
                              const u16* x,               // bf16 [m, k], rows x_stride apart, each at 16 bytes
                              u16* out,                   // bf16 [m, n]
                              float* partial, int* counters, i64 x_stride, int m, int n, int k, int part_rows) {
  using S = Shape<kTokens>;
  extern __shared__ __align__(128) u8 s_all[];
  const int row_blocks = (n + kTileRows - 1) / kTileRows, rows = row_blocks * ((m + kTokens - 1) / kTokens);
  // The weights have been there since they were prepared, but only what L2 fetches may be read before the wait.
  if (threadIdx.x == 0) {
    const int chunks = chunks_of(k), units = units_of(k);
    const i64 total = static_cast<i64>(row_blocks) * units, first = total * blockIdx.x / gridDim.x;
    const i64 count = min(total * (blockIdx.x + 1) / gridDim.x - first, static_cast<i64>(kPrefetchedUnits));
    const i64 from = first / units * chunks + first % units * kUnitChunks, to = first + count;
    const i64 tiles = to / units * chunks + to % units * kUnitChunks - from;
    if (tiles > 0) {
      prefetch_l2(codes + from * kTileCodes, static_cast<u32>(tiles) * kTileCodes);
      prefetch_l2(scales + from * kTileScales, static_cast<u32>(tiles) * kTileScales);
    }
  }
  wait_for_previous_kernel();
  const Linear<S> task{global_scale, x, out, x_stride, m, n, k, row_blocks, part_rows};
  decode<S>(task, s_all, codes, scales, rows, units_of(k), chunks_of(k), false, partial, counters);
}

#define VARIANT(tokens)                                                                                          \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, 1) sm90_nvfp4_linear_t##tokens(          \
      const u8* codes, const u8* scales, const float* global_scale, const u16* x, u16* out, float* partial,      \
      int* counters, i64 x_stride, int m, int n, int k, int part_rows) {                                         \
    linear<tokens>(codes, scales, global_scale, x, out, partial, counters, x_stride, m, n, k, part_rows);        \
  }

VARIANT(2)
VARIANT(4)
VARIANT(8)
