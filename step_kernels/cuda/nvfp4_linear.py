"""nvfp4_linear with a weight in the prepared layout (prepared.py): csrc/sm90_nvfp4_linear.cu or, for many tokens,
sm90_nvfp4_prefill.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import nvfp4_prefill
from .driver import Kernel

MOST_TOKENS = 16  # to decode; from 9 on every 8 read the weight again, which costs as much as the prefill kernel's tile
SHARED_BYTES = 227 * 1024  # all that a block can have: one block on each multiprocessor
THREADS = {2: 512, 4: 384, 8: 384}
# By the tokens that share a read of the weight: 2 of them take two MMA columns a scale block each, more take one.
VARIANTS = {
    t: Kernel("sm90_nvfp4_linear", f"sm90_nvfp4_linear_t{t}", "PPPPPPPqiiii", SHARED_BYTES, dependent=True)
    for t in THREADS
}
_STREAMS = 64  # that may compute at a time without sharing counters


def refuse(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int | None = None) -> str | None:
    """Why the kernel does not take the op's arguments, or None."""
    if scales.dtype != torch.uint8:
        return "takes a prepared weight, got one in checkpoint layout"
    if x.dtype != torch.bfloat16:
        return f"takes bfloat16, got {str(x.dtype).removeprefix('torch.')}"


def launch(x: Tensor, codes: Tensor, scales: Tensor, global_scale: Tensor, n: int | None = None) -> Tensor:
    """bf16 [..., k]; u8 [r, c, 2048] and [r, c, 256], f32 [] or [parts] -> bf16 [..., n], contiguous; n <= 64 r."""
    n, k = n or 64 * codes.shape[0], x.shape[-1]
    m = x.numel() // max(1, k)
    if m > MOST_TOKENS:
        return nvfp4_prefill.linear(x, codes.contiguous(), scales.contiguous(), global_scale, n).contiguous()
    out = x.new_empty(*x.shape[:-1], n)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    x, tokens = rows(x.reshape(-1, k)), variant(m)
    blocks = multiprocessors(x.device.index)
    arguments = (codes.contiguous(), scales.contiguous(), global_scale.contiguous(), x, out)
    shape = (x.stride(0), m, n, k, n // max(1, global_scale.numel()))
    VARIANTS[tokens].launch(
        (blocks, 1, 1), THREADS[tokens], *arguments, partials(x, blocks, tokens), counters(x.device), *shape
    )
    return out


def variant(tokens: int) -> int:
    """The smallest variant that takes this many tokens in one read of the weight, or the largest."""
    return min((t for t in THREADS if t >= tokens), default=max(THREADS))


def rows(x: Tensor) -> Tensor:
    """x [m, k] with rows that 8-byte loads can read; a copy where a row begins elsewhere, even if they are in a row."""
    aligned = x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.data_ptr() % 8 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def partials(x: Tensor, blocks: int, tokens: int) -> Tensor:
    """Room for the sums of each block's first and last 64 rows, which other blocks may share."""
    return x.new_empty(blocks, 2, tokens, 64, dtype=torch.float32)


def counters(device: torch.device) -> Tensor:
    """i32 [256] of this stream's own, zero; a kernel that counts in them leaves zeros."""
    pool, taken = _pool(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _pool(device: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its zeros would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("nvfp4 kernels: call one on this GPU before capturing a CUDA graph")
    pool = torch.zeros(_STREAMS, 256, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return pool, {}
