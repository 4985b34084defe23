// Around the routed experts' two products, which are sm90_nvfp4_prefill.cu's and sm90_nvfp4_prefill_few.cu's:
// count (of many tokens), sort, gather, gate_up, down, combine.
//
//   ids [tokens, top_k]   count    counts [blocks, experts]: a block's pairs of each expert
//                         sort     position [tokens, top_k]: the pair's row in sorted order, and the table of tiles
//   x [tokens, hidden]    gather   sorted x [rows, hidden]: an expert's rows follow each other, padded to whole tiles
//   sorted parts          combine  out [tokens, hidden]
//
// An expert's tokens are split evenly over as few tiles as the largest size allows, and each takes the smallest size
// that holds its share. An expert without tokens has no tile. No pass waits for the host.
#include "common/nvfp4_sm90.cuh"
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
// the first writes the tiles. A block's rows of an expert are in no particular order: a row's result does not depend
// on its place.
extern "C" __global__ void __launch_bounds__(kSortThreads) sm90_nvfp4_moe_prefill_sort(
    const int* ids,     // [pairs]
    const int* counts,  // [blocks, experts], or null for one block
    int* position,      // [pairs]: row of the sorted x, -1 for an expert that is not here
    int4* tiles,        // {expert, first row, tokens, 0}
    int* tile_count, int pairs, int experts, int size0, int size1, int size2, int size3) {  // sizes ascend
  __shared__ int s_count[kSortThreads];
  __shared__ u64 s_sum[kSortThreads / 32];
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

  const int count = (tokens + size3 - 1) / size3;
  const int each = count ? (tokens + count - 1) / count : 0;
  const int size = each <= size0 ? size0 : each <= size1 ? size1 : each <= size2 ? size2 : size3;
  const u64 own = static_cast<u64>(count) << 32 | static_cast<unsigned>(count * size);  // tiles, rows
  u64 sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const u64 left = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += left;
  }
  if (lane == 31) s_sum[warp] = sum;
  __syncthreads();
  for (int i = 0; i < warp; ++i) sum += s_sum[i];
  const int first_tile = static_cast<int>((sum - own) >> 32), first_row = static_cast<int>(sum - own);
  if (blockIdx.x == 0) {
    if (thread == kSortThreads - 1) *tile_count = static_cast<int>(sum >> 32);
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

// out[token] = sum over its slots, in their order, of weight * the pair's row; in f32, rounded once.
extern "C" __global__ void __launch_bounds__(256) sm90_nvfp4_moe_prefill_combine(
    const uint4* sorted,   // bf16 [rows, hidden]
    const float* weights,  // [tokens, top_k]
    const int* position, uint4* out, int hidden, int top_k) {
  const int units = hidden / 8;
  weights += static_cast<long long>(blockIdx.x) * top_k;
  position += static_cast<long long>(blockIdx.x) * top_k;
  for (int unit = threadIdx.x; unit < units; unit += 256) {
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
}
