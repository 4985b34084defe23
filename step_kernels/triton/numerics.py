"""Rounding to and from the narrow formats with integer operations: the same bits in the interpreter and on GPUs;
and the sigmoid that routing shares with torch to the bit.

Triton's interpreter (3.6) truncates f32 to bf16 and neither rounds nor saturates f32 to e4m3, so kernels use
these instead of `.to`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in f32, with the bits that torch gives on a GPU: CUDA's expf and an IEEE division."""
    if INTERPRETED:  # which has no libdevice
        return tl.div_rn(1.0, 1.0 + tl.exp(-x))
    else:
        return tl.div_rn(1.0, 1.0 + libdevice.exp(-x))


@triton.jit
def to_bf16(x):
    """f32 -> bf16, ties to even; NaN stays NaN."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(x != x, 0x7FC0, rounded)  # the carry would turn a NaN's bits into -0
        return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(tl.bfloat16)  # one instruction for two values, where the lines above take ten


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """f32 -> bf16, f16 or f32, ties to even."""
    if dtype == tl.bfloat16:
        return to_bf16(x)
    else:
        return x.to(dtype)


@triton.jit
def to_e4m3_bits(x):
    """f32 -> i32 e4m3 code, ties to even, beyond 448 saturating; NaN becomes 0x7F with its sign."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x43E00000)  # 448.0; magnitudes order as integers
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)  # exponent bias 127 -> 7
    # Below 2^-6 e4m3 steps by 2^-9, which is f32's own step at 2^14: the sum rounds, its low bits are the code.
    small = magnitude.to(tl.float32, bitcast=True)
    subnormal = (small + 16384.0).to(tl.int32, bitcast=True) & 0xF
    code = tl.where(small < 0.015625, subnormal, normal)
    return tl.where(x != x, 0x7F, code) | sign


@triton.jit
def from_e4m3_bits(code):
    """i32 e4m3 code 0-255 -> f32; 0x7F and 0xFF are NaN."""
    exponent = (code >> 3) & 15
    mantissa = code & 7
    normal = ((exponent + 120) << 23) | (mantissa << 20)
    subnormal = (mantissa.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(exponent == 0, subnormal, normal)
    bits = tl.where((code & 0x7F) == 0x7F, 0x7FC00000, bits)
    return (bits | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)  # -x is 0 - x in Triton: no -0


@triton.jit
def to_e2m1(x):
    """f32 -> i32 code 0-15, ties to the even code, beyond 6 saturating; NaN becomes 7, as in nvfp4.e2m1_encode."""
    a = tl.abs(x)
    # Each tie lies between code c and c + 1 and belongs to the even one. NaN fails no negated comparison.
    code = tl.where(a <= 0.25, 0, 1) + tl.where(a < 0.75, 0, 1) + tl.where(a <= 1.25, 0, 1)
    code += tl.where(a < 1.75, 0, 1) + tl.where(a <= 2.5, 0, 1) + tl.where(a < 3.5, 0, 1)
    code += tl.where(a <= 5.0, 0, 1)
    return code | tl.where(x < 0, 8, 0)


@triton.jit
def from_e2m1(code):
    """i32 code 0-15 -> f32."""
    exponent = (code >> 1) & 3
    mantissa = code & 1
    normal = ((exponent + 126) << 23) | (mantissa << 22)
    bits = tl.where(exponent == 0, mantissa * 0x3F000000, normal)  # 0 or 0.5
    return (bits | ((code & 8) << 28)).to(tl.float32, bitcast=True)
