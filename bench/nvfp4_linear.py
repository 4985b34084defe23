"""x times an NVFP4 weight at the shapes of Step-3.7-Flash: q, o, k, the dense MLP and the vocabulary's head."""

from __future__ import annotations

import itertools
from functools import cache

import torch
import torch.nn.functional as F

from step_kernels.model.weights import RandomWeights
from step_kernels.ops.nvfp4_linear import _nvfp4_linear
from step_kernels.testing import relative_error

SHAPES = ((8192, 4096), (4096, 8192), (1024, 4096), (11264, 4096), (4096, 11264), (128896, 4096))
CASES = {f"{m}: {n}x{k}": (m, n, k) for n, k in SHAPES for m in (1, 64, 1024)}
_turn = itertools.count()


def inputs(case: tuple[int, int, int]) -> tuple:
    """The op's arguments, random codes."""
    m, n, k = case
    weight = RandomWeights(torch.device("cuda"), torch.bfloat16).experts("", 1, k, n).down[0]
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    return x, weight.codes, weight.scales, weight.global_scale


def work(case: tuple[int, int, int]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: codes, a scale for 16 of them, x and the output in bf16."""
    m, n, k = case
    return n * k // 2 + n * k // 16 + 2 * m * (n + k), 2 * m * n * k


@cache
def _dense(n: int, k: int) -> list[torch.Tensor]:
    """bf16 weights, together twice the L2 cache: the op's arguments hold none, and they must not come from L2."""
    wanted = 2 * torch.cuda.get_device_properties().L2_cache_size
    return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(max(2, -(-wanted // (2 * n * k))))]


def _bf16(x, codes, scales, global_scale):
    pool = _dense(codes.shape[0], x.shape[1])
    return F.linear(x, pool[next(_turn) % len(pool)])


def contenders() -> dict:
    """The op first, then its peer: the product with a weight that is bf16 already."""
    return {"ours": _nvfp4_linear, "torch bf16": _bf16}


def error(x, *weight) -> float:
    """Relative error against float64."""
    return relative_error(_nvfp4_linear(x, *weight), _nvfp4_linear.reference(x.double(), *weight))
