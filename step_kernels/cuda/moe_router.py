"""Launchers of csrc/smxx_moe_router.cu and, for many tokens on Hopper, sm90_moe_router.cu; what neither takes goes
through a product and moe_topk."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import moe_topk
from .driver import Kernel
from .nvfp4_prefill import TILE_K, _copyable, tensor_map
from .rms_norm import aligned

MOST_TOKENS = 16384  # 8192 took 315 us on an H200, in f32 by cuBLAS and moe_topk 574
FEWEST_OF_MANY = 1537  # 1025 take 44 us by the kernels for fewer and 56 here (a gate in bf16), 2048 84 and 57
BLOCK_EXPERTS, BLOCK_K, THREADS = 16, 512, 256
# By the tokens of a grid's layer and by the most experts; 288 are Step's.
SUM = {
    8 * tiles: Kernel("smxx_moe_router", f"smxx_moe_router_sum_t{tiles}", "PPPqiii", dependent=True)
    for tiles in (1, 2, 4, 8)
}
CHOOSE, ONE = (
    {
        32 * items: Kernel("smxx_moe_router", f"smxx_moe_router_{part}_i{items}", types, dependent=True)
        for items in (9, 16)
    }
    for part, types in (("choose", "PPPPiiif"), ("one", "PPPPPPiiif"))
)
MANY_EXPERTS, MANY_CHUNKS, MANY_PARTS = 288, 256, 3  # the file's limits, and the bf16 parts of a weight
MANY_TOKENS, MANY_THREADS = 64, 384  # of a block, of which two are a cluster
SPLIT = Kernel("sm90_moe_router", "sm90_moe_router_split", "PPPii")
MANY = Kernel(
    "sm90_moe_router", "sm90_moe_router", "PPPPPiiiif" + 16 * "q",
    1024 + 5 * 2 * TILE_K * (MANY_TOKENS + MANY_EXPERTS),  # alignment and stages
)  # fmt: skip
_STREAMS = 64  # that may route one token at a time without sharing partial sums
_SUMS = 16384  # of a stream: Step's are 8 splits of hidden size 4096 times 288 experts
_ABSENT = -1  # no sum has these bits


def takes(tokens: int, experts: int, hidden: int) -> bool:
    """Whether the kernels serve these sizes, for x in bf16."""
    sums = -(-hidden // BLOCK_K) * experts
    return 0 < tokens <= MOST_TOKENS and hidden > 0 and hidden % 64 == 0 and (tokens > 1 or sums <= _SUMS)


def takes_many(tokens: int, experts: int, hidden: int) -> bool:
    """Whether Hopper's kernel for many tokens is for these sizes, for x in bf16."""
    chunks = hidden // TILE_K
    return (
        tokens >= FEWEST_OF_MANY and experts <= MANY_EXPERTS and hidden == chunks * TILE_K and 0 < chunks <= MANY_CHUNKS
    )


def launch(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """[tokens, hidden], f32 [experts, hidden], f32 [experts] -> weights f32 [tokens, top_k], ids i32 [tokens, top_k].

    The kernel reads `weight` while the one ahead of it in the stream still runs, so that one must not write it.
    """
    (tokens, hidden), experts = x.shape, weight.shape[0]
    many = takes_many(tokens, experts, hidden) and _hopper(x.device.index)
    if x.dtype != torch.bfloat16 or not (many or takes(tokens, experts, hidden)):
        return launch_apart(x, weight, bias, top_k, scale)
    weights = weight.new_empty(tokens, top_k)
    ids = weight.new_empty(tokens, top_k, dtype=torch.int32)
    x, weight, bias = aligned(x), aligned(weight.contiguous()), bias.contiguous()
    if many:
        x, chunks = _copyable(x), hidden // TILE_K
        parts = x.new_empty(chunks, MANY_PARTS, MANY_EXPERTS, TILE_K)
        counts = ids.new_empty(chunks)
        SPLIT.launch((chunks, 1, 1), MANY_EXPERTS, weight, parts, counts, experts, hidden)
        grid = 2 * -(-tokens // (2 * MANY_TOKENS)), 1, 1
        sizes = tokens, experts, chunks, top_k, scale
        MANY.launch(grid, MANY_THREADS, parts, counts, bias, weights, ids, *sizes, *tensor_map(x, TILE_K))
        return weights, ids
    splits, of_choice = -(-hidden // BLOCK_K), min(n for n in CHOOSE if n >= experts)
    grid = (splits, -(-experts // BLOCK_EXPERTS), 1)
    if tokens == 1:
        sizes = (experts, hidden, top_k, scale)
        ONE[of_choice].launch(grid, THREADS, x, weight, bias, weights, ids, _partials(x.device), *sizes)
        return weights, ids
    sums = weight.new_empty(splits, tokens, experts)
    layer = min((n for n in SUM if n >= tokens), default=max(SUM))
    grid = (*grid[:2], -(-tokens // layer))
    SUM[layer].launch(grid, THREADS, x, weight, sums, x.stride(0), tokens, experts, hidden)
    CHOOSE[of_choice].launch((tokens, 1, 1), THREADS, sums, bias, weights, ids, experts, splits, top_k, scale)
    return weights, ids


def launch_apart(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    """The same, x of any type, by torch's product and moe_topk's kernel."""
    return moe_topk.launch(x.float() @ weight.mT, bias, top_k, scale)


@functools.cache
def _hopper(device: int) -> bool:
    return torch.cuda.get_device_capability(device) == (9, 0)


def _partials(device: torch.device) -> Tensor:
    """i32 [_SUMS] of this stream's own, absent; the kernel leaves it so."""
    pool, taken = _pool(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    return pool[taken.setdefault(stream, len(taken) % _STREAMS)]


@functools.cache
def _pool(device: int) -> tuple[Tensor, dict[int, int]]:
    """Made before any stream uses it: a graph's capture must not be the first, or its filling would come at replay."""
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("moe_router: call it on this GPU before capturing a CUDA graph")
    pool = torch.full((_STREAMS, _SUMS), _ABSENT, dtype=torch.int32, device=f"cuda:{device}")
    torch.cuda.synchronize(device)
    return pool, {}
