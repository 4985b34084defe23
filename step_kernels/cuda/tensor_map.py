"""How Hopper's copy engine goes through a tensor: the 128 bytes that a kernel takes as a parameter."""

from __future__ import annotations

import ctypes
import functools

_PLAIN, _PROMOTE_256, _ZEROS = 0, 3, 0  # values of cuda.h's enums: no interleaving, L2 lines by 256 bytes, 0 outside
_TYPES = {1: 0, 2: 9}  # u8 and bf16
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # bytes of a row


def encode(
    address: int, itemsize: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> tuple[int, ...]:
    """16 words for bytes or bf16 at `address`: `sizes` and a copy's `box`, the innermost dimension first; `strides` in
    bytes, of all but that one; `swizzle`: by rows of 0, 32, 64 or 128 bytes. RuntimeError where the driver refuses."""
    rank, space = len(sizes), (ctypes.c_uint64 * 24)()
    at = -(-ctypes.addressof(space) // 64) * 64  # the driver takes maps at multiples of 64 bytes alone
    error = _libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), _TYPES[itemsize], rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*sizes),
        (ctypes.c_uint64 * (rank - 1))(*strides), (ctypes.c_uint32 * rank)(*box), (ctypes.c_uint32 * rank)(*[1] * rank),
        _PLAIN, SWIZZLES[swizzle], _PROMOTE_256, _ZEROS,
    )  # fmt: skip
    if error:
        raise RuntimeError(f"cuTensorMapEncodeTiled: error {error} for {sizes} of {itemsize} bytes, strides {strides}")
    return tuple((ctypes.c_int64 * 16).from_address(at))


@functools.cache
def _libcuda():
    return ctypes.CDLL("libcuda.so.1")
