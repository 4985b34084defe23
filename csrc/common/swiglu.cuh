// Step's clamped SwiGLU in f32: min(silu(gate), limit) * clamp(up, -limit, limit); an infinite limit does not clamp.
#pragma once

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

__device__ inline float swiglu(float gate, float up, float limit) {
  const float silu = gate * reciprocal_approximate(1.0f + exp2_approximate(-0x1.715476p+0f * gate));
  return at_most(silu, limit) * within(up, limit);
}
