"""The routed experts of Step-3.7-Flash: 288 of 4096 x 1280, each token to 8, uniformly or by Zipf's law."""

from __future__ import annotations

from functools import cache

import torch

import step_kernels as sk
from step_kernels.model.formats import kernel_layout
from step_kernels.nvfp4 import NVFP4Experts, NVFP4Weight
from step_kernels.ops.nvfp4_moe import _nvfp4_moe

from .nvfp4_linear import PEERS as PEERS
from .nvfp4_linear import fields, humming, random_weight

EXPERTS, HIDDEN, INNER, TOP_K, LIMIT = 288, 4096, 1280, 8, 7.0
TOKENS = (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)
CASES = {f"{tokens} tokens": (tokens, False) for tokens in TOKENS}
CASES |= {f"{tokens} tokens zipf": (tokens, True) for tokens in (1, 4, 16, 64, 256, 1024, 4096, 8192)}


def _ids(tokens: int, zipf: bool) -> torch.Tensor:
    """i32 [tokens, 8], a token's distinct, the same in every call; by Zipf expert e is drawn in proportion to 1 / e."""
    noise = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    odds = 1 / torch.arange(1.0, EXPERTS + 1) if zipf else torch.ones(EXPERTS)
    return (odds.log() - noise.log().neg().log()).topk(TOP_K).indices.int()  # Gumbel's trick


@cache
def _experts() -> NVFP4Experts:
    gate_up = random_weight(EXPERTS, 2 * INNER, HIDDEN, outer=(EXPERTS, 2))
    return NVFP4Experts(gate_up, random_weight(EXPERTS, HIDDEN, INNER, outer=(EXPERTS,)))


@cache
def _ready() -> NVFP4Experts:
    return kernel_layout(_experts(), torch.device("cuda"), torch.bfloat16)


def inputs(case: tuple[int, bool]) -> tuple:
    """The op's arguments; the experts in the prepared layout where this GPU has one."""
    tokens, _ = case
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(tokens, TOP_K, device="cuda")
    return x, weights, _ids(*case).cuda(), *fields(_ready().gate_up), *fields(_ready().down), LIMIT


def work(case: tuple[int, bool]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: the experts that some token chose, 9 bits in 16; x and the output."""
    tokens, touched = case[0], len(_ids(*case).unique())
    return touched * 3 * HIDDEN * INNER * 9 // 16 + 4 * tokens * HIDDEN, 6 * tokens * TOP_K * HIDDEN * INNER


def _dense(weight: NVFP4Weight) -> torch.Tensor:
    out = torch.empty(weight.shape, dtype=torch.bfloat16, device="cuda")
    for e in range(len(out)):
        out[e] = weight[e].dequantize(torch.bfloat16)
    return out


@cache
def _bf16() -> tuple[torch.Tensor, torch.Tensor]:
    """The same experts in bf16, 9 GB."""
    return _dense(_experts().gate_up), _dense(_experts().down)


def _grouped(x, weights, ids, gate_up, down):
    keys, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(EXPERTS, device=x.device, dtype=torch.int32), right=True).int()
    both = torch._grouped_mm(x[order // TOP_K], gate_up.mT, offs=ends)
    parts = torch._grouped_mm(sk.swiglu(both, LIMIT), down.mT, offs=ends)
    weighted = (parts * weights.flatten()[order, None]).to(parts.dtype)
    return torch.empty_like(parts).index_copy_(0, order, weighted).view(*ids.shape, HIDDEN).sum(1)


def contenders() -> dict:
    """The op; its peers have experts of their own."""
    return {"ours": _nvfp4_moe}


@cache
def _for_humming() -> tuple:
    return humming().prepared_experts(_experts())


def peers(case: tuple[int, bool], x, weights, ids, *experts) -> dict:
    """Who, and what prepares call and arguments: torch's grouped products in bf16, Triton, humming less its sorting."""
    tokens, raw = (x, weights, ids), (*fields(_experts().gate_up), *fields(_experts().down), LIMIT)
    return {
        "torch grouped bf16": lambda: (_grouped, (*tokens, *_bf16())),
        "triton": lambda: (_nvfp4_moe, (*tokens, *raw)),
        "humming, sorted before": lambda: humming().moe(*tokens, _for_humming(), LIMIT),
    }


def compile_peers() -> None:
    """Compile humming's kernels, all at once."""
    shapes = (2 * INNER, HIDDEN), (HIDDEN, INNER)
    humming().compile_ahead((tokens * TOP_K, *shape, EXPERTS) for tokens in TOKENS for shape in shapes)


def exact(case: tuple[int, bool], x, weights, ids, *experts) -> tuple[torch.Tensor, torch.Tensor]:
    """Up to 32 of x's tokens, and their routed sums in float64."""
    rows = torch.linspace(0, len(x) - 1, min(32, len(x)), device=x.device).long()
    raw = (*fields(_experts().gate_up), *fields(_experts().down), LIMIT)
    return rows, _nvfp4_moe.reference(x[rows].double(), weights[rows], ids[rows], *raw)
