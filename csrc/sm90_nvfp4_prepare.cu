// NVFP4 between the checkpoint's layout and the prepared one of common/nvfp4_sm90.cuh, exactly in both directions.
//
// Tile: one block moves 64 rows x 64 k through shared memory; row i of the picture is 32 bytes of codes:
//
//   thread 2i | 2i + 1     <- 16 bytes each of the checkpoint's row
//   thread th              <- 16 bytes each of the prepared tile
//
// Bytes: 9/16 a weight read and written. Waiting: the block meets once, between reading and writing.
#include "common/nvfp4_sm90.cuh"

// The checkpoint's row of a tile's row, or -1. Paired: gate row g and up row g share a thread.
__device__ inline int source_row(int block, int row, int n, bool paired) {
  if (!paired) return block * kTileRows + row < n ? block * kTileRows + row : -1;
  const int inner = n / 2, at = block * 32 + row / 16 * 8 + row % 8;
  return at < inner ? row / 8 % 2 * inner + at : -1;
}

__device__ inline int bias_of(int k16) { return k16 < 2 ? kFirstBias : kSecondBias; }  // k16: block of 16 k's in its tile

// e4m3 0 to 0x7E -> e5m3 with the bias: subnormals become normal.
__device__ inline u32 to_e5m3(u32 scale, int bias) {
  if (scale >= 8) return scale + (bias - 7) * 8;
  if (scale == 0) return 0;
  const int top = 31 - __clz(scale);
  return (bias - 9 + top) << 3 | (scale << (3 - top) & 7);
}
__device__ inline u32 to_e4m3(u32 scale, int bias) {
  if (scale == 0) return 0;
  const int exponent = static_cast<int>(scale >> 3) - bias;
  return exponent >= -6 ? scale - (bias - 7) * 8 : (8 | (scale & 7)) >> (-6 - exponent);
}

__device__ inline u32 to_byte(u32 first, u32 second) {
  return (first & 8) << 4 | (first & 7) << 1 | (second & 8) >> 3 | (second & 7) << 4;
}
__device__ inline u32 first_of(u32 byte) { return (byte >> 4 & 8) | (byte >> 1 & 7); }
__device__ inline u32 second_of(u32 byte) { return (byte & 1) << 3 | (byte >> 4 & 7); }

// Where the scale of a row's block k16 lies in a prepared tile.
__device__ inline int scale_at(int row, int k16) {
  return row / 16 * 64 + row % 8 * 8 + k16 % 2 * 4 + k16 / 2 * 2 + row / 8 % 2;
}

extern "C" __global__ void __launch_bounds__(kWarpgroup) sm90_nvfp4_prepare_pack(
    const u8* codes,   // [experts, n, k / 2]
    const u8* scales,  // e4m3 [experts, n, k / 16]
    u8* packed,        // [experts, blocks, chunks, 2048]
    u8* packed_scales, // [experts, blocks, chunks, 256]
    int blocks, int chunks, int n, int k, int paired) {
  __shared__ __align__(16) u8 s_rows[kTileRows][32];
  const i64 tile = blockIdx.x;
  const int chunk = tile % chunks, block = tile / chunks % blocks, thread = threadIdx.x;
  const i64 expert = tile / chunks / blocks;
  for (int half = 0; half < 2; ++half) {  // 8 bytes: k need not be a multiple of 32
    const int row = source_row(block, thread / 2, n, paired), byte = chunk * 32 + thread % 2 * 16 + half * 8;
    const bool inside = row >= 0 && byte < k / 2;
    const uint2 v = inside ? *reinterpret_cast<const uint2*>(codes + (expert * n + row) * (k / 2) + byte) : make_uint2(0, 0);
    *reinterpret_cast<uint2*>(&s_rows[thread / 2][thread % 2 * 16 + half * 8]) = v;
  }
  for (int i = thread; i < kTileScales; i += kWarpgroup) {
    const int row = source_row(block, i / 4, n, paired), k16 = i % 4, at = chunk * 4 + k16;
    const u32 scale = row >= 0 && at < k / 16 ? scales[(expert * n + row) * (k / 16) + at] : 0;
    packed_scales[tile * kTileScales + scale_at(i / 4, k16)] = to_e5m3(scale, bias_of(k16));
  }
  __syncthreads();
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  u32 words[4];
  for (int j = 0; j < 4; ++j) {
    const u8* from = &s_rows[warp * 16 + g + 8 * (j & 1)][8 * (j >> 1) + t];
    const u32 a = from[0], b = from[4], c = from[16], d = from[20];  // first k 2t and 2t + 8, then 32 further on
    words[j] = to_byte(a & 15, c & 15) | to_byte(b & 15, d & 15) << 8 | to_byte(a >> 4, c >> 4) << 16 |
               to_byte(b >> 4, d >> 4) << 24;
  }
  reinterpret_cast<uint4*>(packed)[tile * kWarpgroup + thread] = make_uint4(words[0], words[1], words[2], words[3]);
}

extern "C" __global__ void __launch_bounds__(kWarpgroup) sm90_nvfp4_prepare_unpack(
    const u8* packed, const u8* packed_scales, u8* codes, u8* scales, int blocks, int chunks, int n, int k, int paired) {
  __shared__ __align__(16) u8 s_rows[kTileRows][32];
  const i64 tile = blockIdx.x;
  const int chunk = tile % chunks, block = tile / chunks % blocks, thread = threadIdx.x;
  const i64 expert = tile / chunks / blocks;
  const uint4 v = reinterpret_cast<const uint4*>(packed)[tile * kWarpgroup + thread];
  const u32 words[4] = {v.x, v.y, v.z, v.w};
  const int warp = thread / 32, g = thread % 32 / 4, t = thread % 4;
  for (int j = 0; j < 4; ++j) {
    u8* to = &s_rows[warp * 16 + g + 8 * (j & 1)][8 * (j >> 1) + t];
    for (int b = 0; b < 2; ++b) {
      const u32 low = words[j] >> (8 * b) & 255, high = words[j] >> (16 + 8 * b) & 255;
      to[4 * b] = first_of(low) | first_of(high) << 4;
      to[16 + 4 * b] = second_of(low) | second_of(high) << 4;
    }
  }
  for (int i = thread; i < kTileScales; i += kWarpgroup) {
    const int row = source_row(block, i / 4, n, paired), k16 = i % 4, at = chunk * 4 + k16;
    if (row >= 0 && at < k / 16)
      scales[(expert * n + row) * (k / 16) + at] =
          to_e4m3(packed_scales[tile * kTileScales + scale_at(i / 4, k16)], bias_of(k16));
  }
  __syncthreads();
  for (int half = 0; half < 2; ++half) {
    const int row = source_row(block, thread / 2, n, paired), byte = chunk * 32 + thread % 2 * 16 + half * 8;
    if (row >= 0 && byte < k / 2)
      *reinterpret_cast<uint2*>(codes + (expert * n + row) * (k / 2) + byte) =
          *reinterpret_cast<const uint2*>(&s_rows[thread / 2][thread % 2 * 16 + half * 8]);
  }
}
