// Clamped SwiGLU of bf16 rows, gate first: min(silu(gate), limit) * clamp(up, -limit, limit), rounded once at the end.
//
// Tile: a thread makes 8 outputs of a row from 16 bytes of gate and 16 of up; the threads go through the rows in order.
// Bytes: 6 an output.
// Waiting: for the kernel ahead only.
#include "common/bf16.cuh"
#include "common/dependent_launch.cuh"
#include "common/swiglu.cuh"

using u16 = unsigned short;

constexpr int kChunk = 8;      // values
constexpr int kThreads = 256;  // the launcher's THREADS

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
  for (int i = 0; i < kChunk; ++i) gate[i] = swiglu(gate[i], up[i], limit);
  *reinterpret_cast<uint4*>(out + static_cast<long long>(chunk) * kChunk) = eight_bf16(gate);
}
