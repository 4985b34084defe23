// Around the routed experts' two products, which are sm90_nvfp4_prefill{,_few,_halves}.cu's: count (of many tokens),
// sort, gather, gate_up, down, combine; for _halves, `halves` gathers, and comes between gate_up and down as well.
//
//   ids [tokens, top_k]   count    counts [blocks, experts]: a block's pairs of each expert
//                         sort     position [tokens, top_k]: the pair's row in sorted order, and the table of tiles
//   x [tokens, hidden]    gather   sorted x [rows, hidden]: an expert's rows follow each other, padded to whole tiles
//   sorted parts          combine  out [tokens, hidden]
//
// An expert's tokens are split evenly over as few tiles as the largest size allows, and each takes the smallest size
// that holds its share. An expert without tokens has no tile. No pass waits for the host.
#include "common/nvfp4_sm90_decode.cuh"
#include "common/warp.cuh"

__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

constexpr int kSortThreads = 1024;  // and the most experts: each is one thread's

// A block's share of the pairs, in their order.
__device__ __forceinline__ int2 share(int pairs) {
  const int each = (pairs + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each;
  return make_int2(min(first, pairs), min(first + each, pairs));
}

__device__ __forceinline__ void count_shared(const int* ids, int2 range, int experts, int* s_count) {
  s_count[threadIdx.x] = 0;
  __syncthreads();
#pragma unroll 8
  for (int pair = range.x + threadIdx.x; pair < range.y; pair += kSortThreads) {
    const int id = __ldg(ids + pair);
    if (static_cast<unsigned>(id) < static_cast<unsigned>(experts)) atomicAdd(s_count + id, 1);
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(kSortThreads) sm90_nvfp4_moe_prefill_count(
    const int* ids,  // [pairs]
    int* counts,     // [blocks, experts]
    int pairs, int experts) {
  __shared__ int s_count[kSortThreads];
  count_shared(ids, share(pairs), experts, s_count);
  if (threadIdx.x < experts) counts[blockIdx.x * experts + threadIdx.x] = s_count[threadIdx.x];
}

// Every block works out where each expert's rows begin and, from the counts of the blocks before, its own among them;
// the first writes the tiles, largest first: the products' blocks take them in turns, and so get about the same. A
// block's rows of an expert are in no particular order: a row's result does not depend on its place.
extern "C" __global__ void __launch_bounds__(kSortThreads) sm90_nvfp4_moe_prefill_sort(
    const int* ids,     // [pairs]
    const int* counts,  // [blocks, experts], or null for one block
    int* position,      // [pairs]: row of the sorted x, -1 for an expert that is not here
    int4* tiles,        // {expert, first row, tokens, 0}
    int* tile_count, int pairs, int experts, u32 sizes) {  // bit i: a tile may have 8 * (i + 1) tokens
  __shared__ int s_count[kSortThreads];
  __shared__ u64 s_sum[kSortThreads / 32];
  __shared__ u32 s_tiles[kSortThreads];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int2 range = share(pairs);
  int tokens = 0, before = 0;
  if (counts) {
    if (thread < experts) {
#pragma unroll 8
      for (int block = 0; block < gridDim.x; ++block) {
        const int own = __ldg(counts + block * experts + thread);
        tokens += own;
        before += block < blockIdx.x ? own : 0;
      }
    }
  } else {
    count_shared(ids, range, experts, s_count);
    tokens = s_count[thread];
  }

  const int largest = 8 * (32 - __clz(sizes)), count = (tokens + largest - 1) / largest;
  const int eighth = count ? ((tokens + count - 1) / count - 1) / 8 : 0;  // of a tile's tokens, of the last
  const int size = 8 * (eighth + __ffs(sizes >> eighth));
  const u64 own = static_cast<u64>(count) << 32 | static_cast<unsigned>(count * size);  // tiles, rows
  u64 sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 left = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) s_sum[warp] = sum;
  constexpr int kCountBits = 22;
  s_tiles[thread] = size << kCountBits | count;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += s_sum[i];
  const int first_row = static_cast<int>(sum - own);
  if (blockIdx.x == 0) {
    if (thread == kSortThreads - 1) *tile_count = static_cast<int>(sum >> 32);
    int first_tile = 0;
    if (count) {
#pragma unroll 8
      for (int other = 0; other < experts; ++other) {
        const u32 its = s_tiles[other];
        const int its_size = its >> kCountBits;
        const bool ahead = its_size > size || its_size == size && other < thread;
        first_tile += ahead ? its & ((1 << kCountBits) - 1) : 0;
      }
    }
    for (int i = 0; i < count; ++i) tiles[first_tile + i] = make_int4(thread, first_row + i * size, size, 0);
  }
  s_count[thread] = first_row + before;  // from here on the expert's next free row of this block
  __syncthreads();

  constexpr int kAtOnce = 8;  // loads in flight a thread
  for (int start = range.x; start < range.y; start += kAtOnce * kSortThreads) {
    int id[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int pair = start + i * kSortThreads + thread;
      id[i] = pair < range.y ? __ldg(ids + pair) : -1;
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (start + i * kSortThreads >= range.y) break;
      const int pair = start + i * kSortThreads + thread;
      const bool here = static_cast<unsigned>(id[i]) < static_cast<unsigned>(experts);
      // one atomic for all lanes of an expert: when routing is at its worst, that is a warp
      const unsigned same = __match_any_sync(kAllLanes, here ? id[i] : -1);
      const int leader = __ffs(same) - 1;
      int row = 0;
      if (here && lane == leader) row = atomicAdd(s_count + id[i], __popc(same));
      row = __shfl_sync(kAllLanes, row, leader) + __popc(same & ((1u << lane) - 1));
      if (pair < range.y) position[pair] = here ? row : -1;
    }
  }
}

// A block copies its token's row to the places of all its pairs. Rows of padding stay as they are: their results are
// computed and never read.
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_prefill_gather(
    const uint4* x,  // bf16 [tokens, hidden], rows x_stride elements apart
    const int* position, uint4* sorted, long long x_stride, int hidden, int top_k) {
  const int units = hidden / 8;
  x += blockIdx.x * (x_stride / 8);
  position += static_cast<long long>(blockIdx.x) * top_k;
  for (int unit = threadIdx.x; unit < units; unit += 256) {
    const uint4 v = __ldg(x + unit);
#pragma unroll 8
    for (int slot = 0; slot < top_k; ++slot) {
      const int row = __ldg(position + slot);
      if (row >= 0) sorted[static_cast<long long>(row) * units + unit] = v;
    }
  }
}

// A block's row of x as sm90_nvfp4_prefill_halves.cu takes it, to the places of all its pairs: x = 2^e (hi + lo), both
// e4m3, the row's largest between 224 and 448. Exact down to 2^-9 of the largest, and within 2^-17 of it below.
//
//   halves [ceil(k / 256), groups, 4 chunks of 64 k, 8 rows, 128 bytes]: of each 16 k, hi and then lo, bytes in the
//   order of common/nvfp4_sm90.cuh's codes; a row's 16 bytes at i swizzled to i ^ row
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_prefill_halves(
    const u16* x,         // bf16 [rows, k], rows x_stride elements apart
    const int* position,  // [rows, top_k], or null: every row's place is its own
    uint4* halves,
    float* factors,  // [8 * groups]: 2^(e + 3), which leaves the products' sums the bf16 kernels' debt of 2^8
    long long x_stride, int k, int groups, int top_k) {
  __shared__ u32 s_largest[8];
  const int thread = threadIdx.x, threads = blockDim.x;
  asm volatile("griddepcontrol.launch_dependents;");  // the product fetches weights meanwhile
  x += blockIdx.x * x_stride;
  u32 largest = 0;
  for (int unit = thread; unit < k / 8; unit += threads) {
    const uint4 v = reinterpret_cast<const uint4*>(x)[unit];
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) largest = max(largest, max(words[i] & 0x7fff, words[i] >> 16 & 0x7fff));
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  if (thread % 32 == 0) s_largest[thread / 32] = largest;
  __syncthreads();
  for (int i = 0; i < threads / 32; ++i) largest = max(largest, s_largest[i]);
  // 31 / 128 carry into the exponent what is above 1.75 of its power of two: 448 is e4m3's end
  const int e = min(max((largest + 31) >> 7, 8u), 255u);
  const float up = __uint_as_float((262 - e) << 23);  // 2^(135 - e)
  const bool finite = largest < 0x7f80;
  const auto place = [&](int slot) { return position ? __ldg(position + blockIdx.x * top_k + slot) : blockIdx.x; };
  for (int slot = thread; slot < top_k; slot += threads) {
    const int row = place(slot);
    if (row >= 0) factors[row] = __uint_as_float((e - 5) << 23);
  }

  const int ends = (k + kUnitK - 1) / kUnitK * (kUnitK / 8);  // whole warps
  for (int unit = thread; unit < ends; unit += threads) {
    const int block = unit / 2, j = unit % 2;  // of 16 k; which half of their bytes
    uint2 low = make_uint2(0, 0), high = low;  // k 4j.. and 8 + 4j..
    if (block * 16 < k) {
      const uint2* from = reinterpret_cast<const uint2*>(x) + block * 4 + j;
      low = from[0];
      high = from[2];
    }
    const u32 words[4] = {low.x, low.y, high.x, high.y};
    u32 hi[2] = {0, 0}, lo[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // k 4j + i and that + 8 are neighbours
      const u32 a = words[i / 2] << (i % 2 ? 0 : 16), b = words[2 + i / 2] << (i % 2 ? 0 : 16);
      const float u = __uint_as_float(a & 0xffff0000u) * up, v = __uint_as_float(b & 0xffff0000u) * up;
      const u32 pair = pair_e4m3(u, v);
      float u_hi, v_hi;
      from_pair_e4m3(pair, u_hi, v_hi);
      hi[i / 2] |= pair << (i % 2 * 16);
      lo[i / 2] |= pair_e4m3(u - u_hi, v - v_hi) << (i % 2 * 16);
    }
    if (!finite) hi[0] = hi[1] = lo[0] = lo[1] = 0x7f7f7f7fu;  // NaN
    // Two threads have a block: one takes all of hi, the other all of lo.
    const u32 other0 = __shfl_xor_sync(kAllLanes, j ? hi[0] : lo[0], 1);
    const u32 other1 = __shfl_xor_sync(kAllLanes, j ? hi[1] : lo[1], 1);
    const uint4 own = j ? make_uint4(other0, other1, lo[0], lo[1]) : make_uint4(hi[0], hi[1], other0, other1);
    const long long step = static_cast<long long>(unit / 32) * groups;
#pragma unroll 8
    for (int slot = 0; slot < top_k; ++slot) {
      const int row = place(slot);
      if (row >= 0) halves[((step + row / 8) * 4 + unit / 8 % 4) * 64 + row % 8 * 8 + (unit % 8 ^ row % 8)] = own;
    }
  }
}

// out[token] = sum over its slots, in their order, of weight * the pair's row; in f32, rounded once.
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_prefill_combine(
    const uint4* sorted,   // bf16 [rows, hidden]
    const float* weights,  // [tokens, top_k]
    const int* position, uint4* out, int hidden, int top_k) {
  const int units = hidden / 8, unit = blockIdx.y * 256 + threadIdx.x;
  if (unit >= units) return;
  weights += static_cast<long long>(blockIdx.x) * top_k;
  position += static_cast<long long>(blockIdx.x) * top_k;
  float sum[8] = {};
#pragma unroll 8
  for (int slot = 0; slot < top_k; ++slot) {
    const int row = __ldg(position + slot);
    if (row < 0) continue;
    const float weight = __ldg(weights + slot);
    const uint4 v = __ldcs(sorted + static_cast<long long>(row) * units + unit);
    const unsigned words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum[2 * i] = fmaf(weight, __uint_as_float(words[i] << 16), sum[2 * i]);
      sum[2 * i + 1] = fmaf(weight, __uint_as_float(words[i] & 0xffff0000u), sum[2 * i + 1]);
    }
  }
  out[static_cast<long long>(blockIdx.x) * units + unit] =
      make_uint4(pack(sum[0], sum[1]), pack(sum[2], sum[3]), pack(sum[4], sum[5]), pack(sum[6], sum[7]));
}
