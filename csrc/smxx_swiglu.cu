// Clamped SwiGLU of bf16 rows, gate first: min(silu(gate), limit) * clamp(up, -limit, limit), rounded once at the end.
//
// Tile: a thread makes 8 outputs of a row from 16 bytes of gate and 16 of up; the threads go through the rows in order.
// Bytes: 6 an output.
// Waiting: for the kernel ahead only.
#include "common/bf16.cuh"
#include "common/dependent_launch.cuh"

using u16 = unsigned short;

constexpr int kChunk = 8;      // values
constexpr int kThreads = 256;  // the launcher's THREADS

// Both are within 2^-22 of the result, and bf16 keeps 2^-9.
__device__ inline float exp2_approximate(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}
__device__ inline float reciprocal_approximate(float x) {
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// NaN, unlike with fminf and fmaxf, stays NaN.
__device__ inline float at_most(float x, float limit) {
  asm("min.NaN.f32 %0, %0, %1;" : "+f"(x) : "f"(limit));
  return x;
}
__device__ inline float within(float x, float limit) {
  asm("min.NaN.f32 %0, %0, %1;\n\tmax.NaN.f32 %0, %0, %2;" : "+f"(x) : "f"(limit), "f"(-limit));
  return x;
}

extern "C" __global__ void __launch_bounds__(kThreads) smxx_swiglu(
    const u16* gate_up,   // [rows, 2 n], rows row_stride apart
    u16* out,             // [rows, n]
    long long row_stride, unsigned chunks /* of all rows */, unsigned row_chunks, float limit) {
  const unsigned chunk = blockIdx.x * kThreads + threadIdx.x;
  if (chunk >= chunks) return;
  const unsigned row = chunk / row_chunks, column = (chunk - row * row_chunks) * kChunk;
  gate_up += row * row_stride + column;
  wait_for_previous_kernel();
  let_next_kernel_start();

  float gate[kChunk], up[kChunk];
  const uint4 gates = *reinterpret_cast<const uint4*>(gate_up);
  const uint4 ups = *reinterpret_cast<const uint4*>(gate_up + kChunk * row_chunks);
  eight_floats(gate, gates);
  eight_floats(up, ups);
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const float silu = gate[i] * reciprocal_approximate(1.0f + exp2_approximate(-0x1.715476p+0f * gate[i]));
    gate[i] = at_most(silu, limit) * within(up[i], limit);
  }
  *reinterpret_cast<uint4*>(out + static_cast<long long>(chunk) * kChunk) = eight_bf16(gate);
}
