"""x times an NVFP4 weight at the shapes of Step-3.7-Flash: q, o, k, the dense MLP, the share expert, the vocabulary."""

from __future__ import annotations

import itertools
from functools import cache

import torch
import torch.nn.functional as F

from step_kernels.model.weights import RandomWeights
from step_kernels.ops.nvfp4_linear import _nvfp4_linear
from step_kernels.prepared import TILE
from step_kernels.testing import relative_error

SHAPES = (
    (4096, 4096), (8192, 4096), (12288, 4096), (4096, 8192), (4096, 12288), (1024, 4096), (11264, 4096), (4096, 11264),
    (1280, 4096), (4096, 1280), (128896, 4096),
)  # fmt: skip
TOKENS = (1, 8, 16, 64, 256, 1024, 8192)
CASES = {f"{m}: {n}x{k}": (m, n, k) for n, k in SHAPES for m in TOKENS if m < 8192 or n < 128896}
_turn = itertools.count()


def inputs(case: tuple[int, int, int]) -> tuple:
    """The op's arguments, random codes; in the prepared layout where this GPU has one."""
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
    """bf16 weights, together twice the L2 cache: the op's arguments hold none of a peer's."""
    count = max(2, -(-torch.cuda.get_device_properties().L2_cache_size // (n * k)))
    return [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(count)]


def _bf16(x, codes, scales, global_scale):
    rows = codes.shape[0] * (TILE if codes.dim() == 3 else 1)  # row tiles where the weight is prepared
    weights = _dense(rows, x.shape[1])
    return F.linear(x, weights[next(_turn) % len(weights)])


def contenders() -> dict:
    """The op first, then its peer: the product with a weight that is bf16 already."""
    return {"ours": _nvfp4_linear, "torch bf16": _bf16}


def error(x, *weight) -> float:
    """Relative error against float64."""
    rows = slice(0, 256)  # of a prompt's tokens
    return relative_error(_nvfp4_linear(x, *weight)[rows], _nvfp4_linear.reference(x[rows].double(), *weight))
