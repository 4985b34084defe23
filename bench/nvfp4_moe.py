"""The routed experts of Step-3.7-Flash: 288 of 4096 x 1280, each token to 8, uniformly or by Zipf's law."""

from __future__ import annotations

from functools import cache

import torch

import step_kernels as sk
from step_kernels.model.weights import DenseExperts, RandomWeights
from step_kernels.ops.nvfp4_moe import _nvfp4_moe
from step_kernels.testing import relative_error

EXPERTS, HIDDEN, INNER, TOP_K, LIMIT = 288, 4096, 1280, 8, 7.0
UNIFORM = {f"{tokens} tokens": (tokens, False) for tokens in (1, 2, 4, 8, 16, 32, 64, 256, 1024, 4096, 8192)}
CASES = UNIFORM | {f"{tokens} tokens zipf": (tokens, True) for tokens in (4, 16, 64, 256, 1024, 8192)}


def _ids(tokens: int, zipf: bool) -> torch.Tensor:
    """i32 [tokens, 8], a token's distinct, the same in every call; by Zipf expert e is drawn in proportion to 1 / e."""
    noise = torch.rand(tokens, EXPERTS, generator=torch.Generator().manual_seed(tokens))
    odds = 1 / torch.arange(1.0, EXPERTS + 1) if zipf else torch.ones(EXPERTS)
    return (odds.log() - noise.log().neg().log()).topk(TOP_K).indices.int()  # Gumbel's trick


def inputs(case: tuple[int, bool]) -> tuple:
    """The op's arguments, random codes; in the prepared layout where this GPU has one."""
    tokens, zipf = case
    experts = RandomWeights(torch.device("cuda"), torch.bfloat16).experts("", EXPERTS, INNER, HIDDEN)
    tensors = (getattr(w, f) for w in (experts.gate_up, experts.down) for f in ("codes", "scales", "global_scale"))
    x = torch.randn(tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    return x, torch.rand(tokens, TOP_K, device="cuda"), _ids(tokens, zipf).cuda(), *tensors, LIMIT


def work(case: tuple[int, bool]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: the experts that some token chose, 9 bits in 16; x and the output."""
    tokens, touched = case[0], len(_ids(*case).unique())
    return touched * 3 * HIDDEN * INNER * 9 // 16 + 4 * tokens * HIDDEN, 6 * tokens * TOP_K * HIDDEN * INNER


@cache
def _dense() -> DenseExperts:
    """The same experts in bf16, 9 GB."""
    return RandomWeights(torch.device("cuda"), torch.bfloat16, nvfp4=False).experts("", EXPERTS, INNER, HIDDEN)


def _grouped(x, weights, ids, *args):
    dense = _dense()
    keys, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(keys, torch.arange(EXPERTS, device=x.device, dtype=torch.int32), right=True).int()
    both = torch._grouped_mm(x[order // TOP_K], dense.gate_up.mT, offs=ends)
    down = torch._grouped_mm(sk.swiglu(both, LIMIT), dense.down.mT, offs=ends)
    parts = torch.empty_like(down).index_copy_(0, order, (down * weights.flatten()[order, None]).to(down.dtype))
    return parts.view(*ids.shape, HIDDEN).sum(1)


def contenders() -> dict:
    """The op first, then its peer: torch's grouped products with experts that are bf16 already."""
    return {"ours": _nvfp4_moe, "torch grouped bf16": _grouped}


def error(x, weights, ids, *experts) -> float:
    """Relative error against float64, of the first tokens."""
    x, weights, ids = x[:256], weights[:256], ids[:256]
    return relative_error(
        _nvfp4_moe(x, weights, ids, *experts), _nvfp4_moe.reference(x.double(), weights, ids, *experts)
    )
