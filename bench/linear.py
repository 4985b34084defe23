"""x times a bf16 or an FP8 weight at the shapes of Step-3.7-Flash: q, k, v and gates of full and of sliding layers,
what follows attention in them, the share expert, the dense MLP, the vocabulary; SwiGLU of gate and up."""

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
GATE_UP, LIMIT = ((2560, 4096), (22528, 4096)), 16.0
CASES = {
    f"{'fp8 ' * fp8}{'swiglu ' * swiglu}{m}: {n}x{k}": (m, n, k, fp8, swiglu)
    for swiglu in (False, True)
    for fp8 in (False, True)
    for n, k in (GATE_UP if swiglu else SHAPES)
    for m in (1, 8, 64)
}


def inputs(case: tuple[int, int, int, bool, bool]) -> tuple:
    """The op's arguments: x, the weight or its codes and scale, the output's type or SwiGLU's limit."""
    m, n, k, fp8, swiglu = case
    option = LIMIT if swiglu else torch.float32 if n == VOCABULARY else None
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    if not fp8:
        return x, torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * k**-0.5, option
    codes = torch.empty(n, k, device="cuda", dtype=torch.float8_e4m3fn)
    for part in codes.split(8192):
        part.copy_(torch.randn(part.shape, device="cuda").mul_(100))  # the largest of a row is about 400
    return x, codes, torch.full((n,), 0.01 * k**-0.5, device="cuda"), option


def work(case: tuple[int, int, int, bool, bool]) -> tuple[int, int]:
    """Bytes that must move and matrix FLOP: weight, x and the output."""
    m, n, k, fp8, swiglu = case
    weight = n * k + 4 * n if fp8 else 2 * n * k
    return weight + 2 * m * k + m * n * (4 if n == VOCABULARY else 1 if swiglu else 2), 2 * m * n * k


def contenders() -> dict:
    """The ops."""
    return {"ours": _ours}


def _ours(*arguments) -> torch.Tensor:
    swiglu, fp8 = isinstance(arguments[-1], float), len(arguments) == 4
    op = (sk.fp8_linear_swiglu if fp8 else sk.linear_swiglu) if swiglu else (sk.fp8_linear if fp8 else sk.linear)
    return op(*arguments)


def peers(case: tuple[int, int, int, bool, bool], x: torch.Tensor, *weight) -> dict:
    """cuBLAS in bf16, whose outputs are bf16 too, and the op swiglu behind it."""
    call = (lambda x, weight: sk.swiglu(F.linear(x, weight), LIMIT)) if case[-1] else F.linear
    return {"cuBLAS bf16": lambda: (call, (x, _bf16(*weight)))}


def _bf16(weight: torch.Tensor, *scale) -> torch.Tensor:
    weight = weight.bfloat16()
    return weight if len(scale) < 2 else weight * scale[0].bfloat16()[:, None]


def exact(case: tuple[int, int, int, bool, bool], x: torch.Tensor, weight: torch.Tensor, *scale) -> tuple:
    """All of x's rows, and their product, or SwiGLU of it, in float64."""
    product = torch.cat([x.double() @ part.double().mT for part in weight.split(8192)], 1)
    product = product * scale[0].double() if len(scale) == 2 else product
    return torch.arange(len(x), device=x.device), sk.swiglu.reference(product, LIMIT) if case[-1] else product
