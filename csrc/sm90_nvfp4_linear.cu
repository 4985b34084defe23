// out = x W^T for a prepared NVFP4 weight [n, k] and few bf16 rows of x; common/nvfp4_sm90_decode.cuh does the work.
//
// Bytes: 9/16 of a byte a weight, once.
#include "common/nvfp4_sm90_decode.cuh"

template <class S>
struct Linear {
  static constexpr int kEarly = 1;
  const float* global_scale;
  float first_scale;
  const u16* x;
  u16* out;
  i64 x_stride;
  int m, n, k, part_rows;

  __device__ int columns_of(int) const { return 0; }
  __device__ int rows_end(int) const { return (n + kTileRows - 1) / kTileRows; }
  __device__ Place place(int row, int unit) const { return {row, unit}; }
  // The weights and scales have been there since they were prepared. The next kernel starts after the wait, so that it
  // may rely on the same.
  __device__ void wait_for_activations() const {
    wait_for_previous_kernel();
    let_next_kernel_start();
  }
  __device__ void fetched_all() const {}
  __device__ int tokens(int) const { return m; }
  __device__ Source source(int, int token, int unit) const {
    return {x + token * x_stride + unit * kUnitK, k - unit * kUnitK, 1.0f};
  }
  __device__ float scale(int at) const { return at < part_rows ? first_scale : global_scale[at / part_rows]; }
  __device__ void finish(int row, int token, int pair, float a, float b) const {
    const int at = row * kTileRows + pair_row(pair);
    u16* to = out + static_cast<i64>(token) * n + at;
    if (at < n) to[0] = to_bf16(a * kRange * scale(at));
    if (at + 8 < n) to[8] = to_bf16(b * kRange * scale(at + 8));
  }
};

template <int kTokens>
__device__ inline void linear(const u8* codes,            // [row blocks, chunks, 2048]
                              const u8* scales,           // [row blocks, chunks, 256]
                              const float* global_scale,  // [n / part_rows]
                              const u16* x,               // bf16 [m <= kTokens, k], rows x_stride apart, each at 16 bytes
                              u16* out,                   // bf16 [m, n]
                              float* partial, i64 x_stride, int m, int n, int k, int part_rows) {
  using S = Shape<kTokens>;
  extern __shared__ __align__(128) u8 s_all[];
  const Linear<S> task{global_scale, __ldcg(global_scale), x, out, x_stride, m, n, k, part_rows};
  decode<S>(task, s_all, codes, scales, task.rows_end(0), units_of(k), chunks_of(k), partial);
}

#define VARIANT(tokens)                                                                                        \
  extern "C" __global__ void __launch_bounds__(Shape<tokens>::kThreads, Shape<tokens>::kBlocks)                \
      sm90_nvfp4_linear_t##tokens(const u8* codes, const u8* scales, const float* global_scale, const u16* x,  \
                                  u16* out, float* partial, i64 x_stride, int m, int n, int k, int part_rows) { \
    linear<tokens>(codes, scales, global_scale, x, out, partial, x_stride, m, n, k, part_rows);                \
  }

VARIANT(2)
VARIANT(4)
VARIANT(8)
