"""x times a bf16 or an FP8 weight at the shapes of Step-3.7-Flash: q, k, v and gates of full and of sliding layers,
what follows attention in them, the share expert, the dense MLP, the vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import step_kernels as sk

# In bf16 84, 118, 67, 101, 21, 10, 185, 92 and 1056 MB.
SHAPES = (
    (10304, 4096), (14432, 4096), (4096, 8192), (4096, 12288), (2560, 4096), (4096, 1280), (22528, 4096),
    (4096, 11264), (128896, 4096),
)  # fmt: skip
VOCABULARY = 128896  # whose logits are f32
CASES = {
    f"{name}{m}: {n}x{k}": (m, n, k, name != "")
    for name, tokens in (("", (1, 8, 64)), ("fp8 ", (1, 8, 64)))
    for n, k in SHAPES
    for m in tokens
}


def inputs(case: tuple[int, int, int, bool]) -> tuple:
    """The op's arguments: x, the weight or its codes and scale, the output's type."""
    m, n, k, fp8 = case
    out_dtype = torch.float32 if n == VOCABULARY else None
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    if not fp8:
        return x, torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5, out_dtype
    codes = torch.empty(n, k, device="cuda", dtype=torch.float8_e4m3fn)
    for part in codes.split(8192):
        part.copy_(torch.randn(part.shape, device="cuda").mul_(100))  # the largest of a row is about 400
    return x, codes, torch.full((n,), 0.01 * k**-0.5, device="cuda"), out_dtype


def work(case: tuple[int, int, int, bool]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: weight, x and the output."""
    m, n, k, fp8 = case
    weight = n * k + 4 * n if fp8 else 2 * n * k
    return weight + 2 * m * k + m * n * (4 if n == VOCABULARY else 2), 2 * m * n * k


def contenders() -> dict:
    """The ops."""
    return {"ours": lambda *arguments: (sk.linear if len(arguments) == 3 else sk.fp8_linear)(*arguments)}


def peers(case: tuple[int, int, int, bool], x: torch.Tensor, *weight) -> dict:
    """cuBLAS in bf16, whose outputs are bf16 too."""
    return {"cuBLAS bf16": lambda: (F.linear, (x, _bf16(*weight)))}


def _bf16(weight: torch.Tensor, *scale) -> torch.Tensor:
    weight = weight.bfloat16()
    return weight if len(scale) < 2 else weight * scale[0].bfloat16()[:, None]


def exact(case: tuple[int, int, int, bool], x: torch.Tensor, weight: torch.Tensor, *scale) -> tuple:
    """All of x's rows, and their product in float64."""
    product = torch.cat([x.double() @ part.double().mT for part in weight.split(8192)], 1)
    return torch.arange(len(x), device=x.device), product * scale[0].double() if len(scale) == 2 else product
