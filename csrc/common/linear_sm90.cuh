// A weight [n, k], row-major, times up to 64 rows of x on Hopper, but for the products: who reads what, where sums go.
//
// Work is a line of units (kRows rows x kUnitK k), row after row of them; each block takes an equal share of it, one
// block a multiprocessor, through a ring of stages that one thread keeps full. The weights of a block's first stages
// are asked for before the kernel ahead has ended. A block lets the next kernel start when it has asked for its last
// unit: memory is busy with the next weights while this kernel's last sums are added. Only as many are under way as
// keep the memory busy, for what comes last, x, waits behind them. Of a row that blocks share, the one with its first
// unit adds the others' parts in order, as common/nvfp4_sm90_decode.cuh does.
//
// T: what a kernel's tile is.
//   kColumns, kRows, kStages
//   kX, kXBytes, kUnitBytes  bytes of a stage's weights, which lie first, of x's copies, of the stage
//   kInFlight                stages of weights that are asked for together
//   kMath                    threads that multiply, the first of the block's
//   kFetcher, kFetcherX      the threads that ask for weights and for x
//   kConverters              threads that x passes through before it is multiplied, or 0
//   kScaled                  whether rows have a scale
//   kPaired                  whether the first half of the rows is gate, the second up, and out their SwiGLU
//   kAtOnce                  others' parts asked for together
//   copy_weights(maps, stage, row, unit, barrier), copy_x(maps, problem, stage, unit, barrier)
#pragma once
#include "common/nvfp4_sm90_decode.cuh"
#include "common/swiglu.cuh"

struct alignas(64) TensorMap {
  char bytes[128];
};
struct Maps {
  TensorMap weight;  // [n, k] in boxes of kRows x 128 bytes, swizzled by these, zeros outside; with kPaired
                     // [n / 16, 2, 8, k], 8 rows of gate, 8 of up and so on: a thread has the sums of both
  TensorMap x;       // [m, k] in boxes of as many tokens as fit, zeros outside
};

struct Problem {
  int m, n, units;     // n: rows of the weight, units: of 64 k or more of these
  bool wide;           // out is f32, not bf16
  float limit;         // of SwiGLU
  void* out;           // [m, n], with SwiGLU [m, n / 2]
  float4* partial;     // [blocks, kColumns / 8, kMath], absent before and after
  const float* scale;  // [n] or null
  const float* factor;  // of x where it comes converted, or null
};

// ---- copies and barriers ----

__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ inline void make_barrier(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// What threads have written to shared memory, to the copy engine and the tensor cores.
__device__ inline void show_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void copy_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
               ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory");
}

template <class T>
__device__ inline void copy_weight_box(u32 to, const TensorMap* map, int column, int row, u32 barrier) {
  if constexpr (T::kPaired)
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3, %3, %4}], [%5];"
                 ::"r"(to), "l"(map), "r"(column), "r"(0), "r"(row * (T::kRows / 16)), "r"(barrier) : "memory");
  else copy_box(to, map, column, row * T::kRows, barrier);
}

// ---- products ----

// Both operands lie K-major, 8 rows of 128 bytes after another, swizzled (PTX ISA, "Matrix-Descriptor").
__device__ inline u64 tile_descriptor(u32 address) {
  return u64{address >> 4} | u64{1} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ inline void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
template <int kCount>
__device__ inline void settle(float (&d)[kCount]) {  // what follows reads d after the wait
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

#define R4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define R16(i) R4(i), R4(i + 4), R4(i + 8), R4(i + 12)
#define D8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define D16 D8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define D32 D16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"

// ---- the line ----

struct Line {
  int blocks, share, longer, me, begin, end, units;
  template <class T>
  __device__ static Line of(const Problem& problem) {
    const int total = (problem.n + T::kRows - 1) / T::kRows * problem.units, blocks = static_cast<int>(gridDim.x);
    // A block waits for those behind it in the line: the hardware starts them first.
    Line line{blocks, total / blocks, total % blocks, blocks - 1 - static_cast<int>(blockIdx.x), 0, 0, problem.units};
    line.begin = line.begin_of(line.me);
    line.end = line.begin_of(line.me + 1);
    return line;
  }
  __device__ int begin_of(int block) const { return block * share + min(block, longer); }
};

template <class T>
struct Ring {
  u32 stages, filled, has_x, used, ready;  // the last only where x is converted
  __device__ explicit Ring(u8* s_all) {
    stages = (shared_address(s_all) + 1023) & ~1023u;
    filled = stages + T::kStages * T::kUnitBytes;
    has_x = filled + 8 * T::kStages;
    used = has_x + 8 * T::kStages;
    ready = used + 8 * T::kStages;
  }
};

__device__ inline void next_unit(const Line& line, int& row, int& unit) {
  if (++unit == line.units) unit = 0, ++row;
}

template <class T>
__device__ inline void make_barriers(const Maps& maps, const Ring<T>& ring) {
  prefetch_map(&maps.weight);
  prefetch_map(&maps.x);
  for (int i = 0; i < T::kStages; ++i) {
    make_barrier(ring.filled + 8 * i, 1);
    make_barrier(ring.has_x + 8 * i, 1);
    make_barrier(ring.used + 8 * i, T::kMath / 32);
    if (T::kConverters) make_barrier(ring.ready + 8 * i, T::kConverters / 32);
  }
  show_to_engines();
}

// Nobody writes weights: they are asked for whether or not the kernel ahead has ended.
template <class T>
__device__ inline void fetch_weights(const Maps& maps, const Ring<T>& ring, const Line& line) {
  const int units = line.end - line.begin;
  int row = line.begin / line.units, unit = line.begin - row * line.units;
  int stage = 0, landed = 0;
  u32 parity = 1, landed_parity = 0;
  for (int i = 0; i < units; ++i, next_unit(line, row, unit)) {
    const u32 filled = ring.filled + 8 * stage;
    if (i >= T::kStages) wait_for_copies(ring.used + 8 * stage, parity);
    if (i >= T::kInFlight) {
      wait_for_copies(ring.filled + 8 * landed, landed_parity);
      if (++landed == T::kStages) landed = 0, landed_parity ^= 1;
    }
    expect_copies(filled, T::kX);
    T::copy_weights(maps, ring.stages + stage * T::kUnitBytes, row, unit, filled);
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
}

template <class T>
__device__ inline void fetch_x(const Maps& maps, const Problem& problem, const Ring<T>& ring, const Line& line) {
  const int units = line.end - line.begin;
  int unit = line.begin % line.units, stage = 0;
  u32 parity = 1;
  for (int i = 0; i < units; ++i) {
    const u32 has_x = ring.has_x + 8 * stage;
    if (i >= T::kStages) wait_for_copies(ring.used + 8 * stage, parity);
    expect_copies(has_x, T::kXBytes);
    T::copy_x(maps, problem, ring.stages + stage * T::kUnitBytes, unit, has_x);
    if (++unit == line.units) unit = 0;
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
}

// ---- sums ----

// Four sums that another block waits for; kAbsent's bits, which no sum has, until they come.
__device__ inline void publish_4(float4* to, const float4& v) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1, %2, %3, %4};"
               ::"l"(to), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
}
__device__ inline float4 published_4(const float4* from) {
  float4 v;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "l"(from) : "memory");
  return v;
}
__device__ inline bool absent_4(const float4& v) {
  return absent(make_float2(v.x, v.y)) || absent(make_float2(v.z, v.w));
}

// The thread's number, read anew: what follows from it takes no registers in the main loops.
__device__ inline int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// The rows of the weight that thread (group, warp, g, t) sums up for a token.
struct Pair {
  int first, second;
};
template <class T>
__device__ inline Pair rows_of(const Problem& problem, int row, int thread) {
  const int warp = thread / 32, g = thread % 32 / 4;  // a warpgroup has 64 rows
  const int first = T::kPaired ? row * (T::kRows / 2) + warp * 8 + g : row * T::kRows + warp * 16 + g;
  return {first, first + (T::kPaired ? problem.n / 2 : 8)};
}

struct Scales {
  float first, second;
};
__device__ inline float load_scale(const float* from) {  // here, not where the compiler would like it
  float scale;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scale) : "l"(from));
  return scale;
}
// Of the thread's rows. They come from memory, so they are asked for before the row's products, not after the last.
template <class T>
__device__ inline Scales scales_of(const Problem& problem, int row) {
  if (!T::kScaled) return {1.0f, 1.0f};
  const Pair rows = rows_of<T>(problem, row, static_cast<int>(threadIdx.x));
  return {load_scale(problem.scale + min(rows.first, problem.n - 1)),
          load_scale(problem.scale + min(rows.second, problem.n - 1))};
}

__device__ inline float rounded(float x) { return __uint_as_float(static_cast<u32>(to_bf16(x)) << 16); }

__device__ inline void store(const Problem& problem, i64 at, float sum) {
  if (problem.wide) static_cast<float*>(problem.out)[at] = sum;
  else static_cast<u16*>(problem.out)[at] = to_bf16(sum);
}

// The end of a row, or of the block's share of it. Thread (group, warp, g, t) has two rows of tokens 8 j + 2 t and the
// next in d[4 j ..], the first row's two first. SwiGLU is of products rounded to bf16, as linear and swiglu make it.
template <class T>
__device__ inline void finish(float (&d)[T::kColumns / 2], const Problem& problem, const Line& line, int row,
                              const Scales& scales) {
  const int thread = thread_anew(), token0 = thread % 4 * 2;
  const int row_begin = row * line.units, row_end = row_begin + line.units;
  const auto slot = [&](int block, int i) {
    return problem.partial + (static_cast<i64>(block) * (T::kColumns / 8) + i) * T::kMath + thread;
  };
  if (row_begin < line.begin) {
#pragma unroll
    for (int i = 0; i < T::kColumns / 8; ++i)
      if (token0 + 8 * i < problem.m)
        publish_4(slot(line.me, i), make_float4(d[4 * i], d[4 * i + 1], d[4 * i + 2], d[4 * i + 3]));
    return;
  }
  const auto has_part = [&](int block) { return block < line.blocks && line.begin_of(block) < row_end; };
  for (int other = line.me + 1; has_part(other); other += T::kAtOnce) {
    float4 part[T::kAtOnce][T::kColumns / 8] = {};  // undefined, they would take registers in the main loop
#pragma unroll
    for (int q = 0; q < T::kAtOnce; ++q)
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i)
        if (has_part(other + q) && token0 + 8 * i < problem.m) part[q][i] = published_4(slot(other + q, i));
#pragma unroll
    for (int q = 0; q < T::kAtOnce; ++q)
#pragma unroll
      for (int i = 0; i < T::kColumns / 8; ++i) {
        if (!has_part(other + q) || token0 + 8 * i >= problem.m) continue;
        float4& v = part[q][i];
        while (absent_4(v)) v = published_4(slot(other + q, i));
        d[4 * i] += v.x, d[4 * i + 1] += v.y, d[4 * i + 2] += v.z, d[4 * i + 3] += v.w;
        const float none = __uint_as_float(kAbsent);
        *slot(other + q, i) = make_float4(none, none, none, none);
      }
  }
  const Pair rows = rows_of<T>(problem, row, thread);
#pragma unroll
  for (int i = 0; i < T::kColumns / 4; ++i) {
    const int token = token0 + i / 2 * 8 + i % 2;
    if (token >= problem.m) continue;
    const float a = d[i / 2 * 4 + i % 2] * scales.first, b = d[i / 2 * 4 + i % 2 + 2] * scales.second;
    if constexpr (T::kPaired) {
      if (rows.first >= problem.n / 2) continue;
      u16* to = static_cast<u16*>(problem.out) + static_cast<i64>(token) * (problem.n / 2);
      to[rows.first] = to_bf16(swiglu(rounded(a), rounded(b), problem.limit));
    } else {
      const i64 at = static_cast<i64>(token) * problem.n;
      if (rows.first < problem.n) store(problem, at + rows.first, a);
      if (rows.second < problem.n) store(problem, at + rows.second, b);
    }
  }
}
