// The prepared NVFP4 layout of sm_90 (csrc/README.md) and how its bytes become tensor core operands.
//
// Tile: 64 rows x 64 k. Thread th of a warpgroup owns one uint4 of codes; warp = th / 32, g = th % 32 / 4, t = th % 4:
//
//   word j (0-3)   row warp * 16 + g + 8 * (j & 1)
//   byte b (0-3)   two codes of that row, at o = 2t + (b >> 1) + 8 * (b & 1) of a block of 16:
//                  first  k = 16 * (j >> 1) + o       bits {s 7, e1 3, e0 2, m 1}: an AND makes e5m2, value * 2^-14
//                  second k = 32 + 16 * (j >> 1) + o  bits {s 0, e1 6, e0 5, m 4}: four operations make e4m3, * 2^-6
//
// so that words 0-3 are an m64k32 FP8 fragment twice, or an m64k16 BF16 fragment four times in natural k order.
#pragma once

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kWarpgroup = 128;
constexpr int kTileRows = 64;
constexpr int kTileK = 64;
constexpr int kTileCodes = 2048;  // bytes
constexpr int kTileScales = 256;

// Unsigned e5m3 scale bytes: exponent + bias, 0 for a zero scale. The biases differ by what the halves' FP8 forms lack.
constexpr int kFirstBias = 18;
constexpr int kSecondBias = 10;

// (lut is the truth table of three inputs: 0xEA = (a & b) | c.)
__device__ inline u32 and_or(u32 a, u32 b, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}

__device__ inline u32 first_e5m2(u32 word) { return word & 0x8E8E8E8Eu; }
__device__ inline u32 second_e4m3(u32 word) {
  return and_or(word >> 2, 0x1C1C1C1Cu, (word << 7) & 0x80808080u);
}

// Byte j of a word of scales as f32: scale * 2^(bias - 127), exactly 0 for byte 0.
template <int j>
__device__ inline float scale_f32(u32 word) {
  constexpr int kMove = 20 - 8 * j;
  const u32 moved = kMove >= 0 ? word << (kMove & 31) : word >> (-kMove & 31);
  return __uint_as_float(moved & 0x0FF00000u);
}
