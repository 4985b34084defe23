// What the attentions of Hopper share: barriers and copies of pages.
#pragma once

#include "common/dependent_launch.cuh"
#include "common/warp.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned;
using u64 = unsigned long long;
using i64 = long long;

constexpr int kDim = 128;
constexpr int kWarpgroup = 128;
constexpr int kMostRequests = 256;
constexpr float kLowest = -1e30f;  // of maxima: what has no key weighs nothing, and nothing is infinite

struct alignas(64) TensorMap {
  char bytes[128];
};
struct Maps {
  TensorMap k, v;  // [pages, kv heads, page size, 128] in boxes of positions x 128 bytes; operands swizzled by these
};

__device__ inline u32 shared_address(const void* p) { return static_cast<u32>(__cvta_generic_to_shared(p)); }

// ---- barriers and copies ----

__device__ inline void barrier_init(u32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline bool barrier_passed(u32 barrier, u32 parity) {
  u32 done;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done;
}
__device__ inline void barrier_expect(u32 barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ inline void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void meet(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// What was stored to shared memory, to the copy engine and the matrix unit.
__device__ inline void show_to_engines() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ inline void show_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void copy_box(u32 to, const TensorMap* map, int d, int position, int head, int page, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(map), "r"(d), "r"(position), "r"(head), "r"(page), "r"(barrier)
      : "memory");
}
__device__ inline void prefetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// A wait of seconds is a fault: an error is worth more than a process that hangs. (With a trap ptxas would not use the
// registers that setmaxnreg brings.)
constexpr int kMostTries = 1 << 24;
__device__ inline void fail() { asm volatile("st.global.u32 [%0], %1;" ::"l"(0ull), "r"(0) : "memory"); }
__device__ inline void barrier_wait(u32 barrier, u32 parity) {
  for (int tries = 0; !barrier_passed(barrier, parity); ++tries)
    if (tries > kMostTries) fail();
}

// ---- arithmetic ----

__device__ inline float exp2_of(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ inline u32 pair_bf16(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

__device__ inline void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
