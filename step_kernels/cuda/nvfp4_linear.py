"""nvfp4_linear with a weight in the prepared layout (prepared.py): csrc/sm90_nvfp4_linear.cu or, for many tokens,
sm90_nvfp4_prefill.cu."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import nvfp4_prefill
from .driver import Kernel, multiprocessors

# To decode. The prefill kernels read the weight once for more: 8192 x 4096 at 16 tokens takes 15.7 us, not 17.3.
MOST_TOKENS = 8
# By the tokens that share a read of the weight: 2 of them take two MMA columns a scale block each, more take one.
THREADS = {2: 256, 4: 256, 8: 384}
BLOCKS = {2: 2, 4: 2, 8: 1}  # on a multiprocessor, which has 228 KB of shared memory less 1 KB a block
SHARED_BYTES = {t: 227 * 1024 if blocks == 1 else 113 * 1024 for t, blocks in BLOCKS.items()}
IN_FLIGHT = {2: 8, 4: 4, 8: 9}  # units of 64 rows x 256 k that a block fetches before it has used one
VARIANTS = {
    t: Kernel("sm90_nvfp4_linear", f"sm90_nvfp4_linear_t{t}", "PPPPPPqiiii", SHARED_BYTES[t], dependent=True)
    for t in THREADS
}
_STREAMS = 64  # that may compute at a time without sharing partial sums
_ABSENT = -1  # no sum has these bits


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
    arguments = (codes.contiguous(), scales.contiguous(), global_scale.contiguous(), x, out, partials(x.device))
    shape = (x.stride(0), m, n, k, n // max(1, global_scale.numel()))
    count = blocks(x.device, tokens, codes.shape[0] * -(-k // 256))
    VARIANTS[tokens].launch((count, 1, 1), THREADS[tokens], *arguments, *shape)
    return out


def variant(tokens: int) -> int:
    """The smallest variant that takes this many tokens in one read of the weight, or the largest."""
    return min((t for t in THREADS if t >= tokens), default=max(THREADS))


def rows(x: Tensor) -> Tensor:
    """x [m, k] with rows that 8-byte loads can read; a copy where a row begins elsewhere, even if they are in a row."""
    aligned = x.stride(1) == 1 and x.stride(0) % 4 == 0 and x.data_ptr() % 8 == 0
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def blocks(device: torch.device, tokens: int, units: int | None = None) -> int:
    """As many as run at once; one a multiprocessor if it has all units in flight and so leaves the next kernel room."""
    count = multiprocessors(device.index)
    return count if units is not None and units <= count * IN_FLIGHT[tokens] else count * BLOCKS[tokens]


def partials(device: torch.device) -> Tensor:
    """i32 [512 a multiprocessor] of this stream's own, absent; a kernel that keeps sums there leaves it so."""
    pool, taken = _pool(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def _pool(device: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its filling would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("nvfp4 kernels: call one on this GPU before capturing a CUDA graph")
    size = 64 * max(t * count for t, count in BLOCKS.items()) * multiprocessors(device)
    pool = torch.full((_STREAMS, size), _ABSENT, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return pool, {}
