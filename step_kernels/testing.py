"""What tests and benches share: random inputs and the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def relative_error(out: Tensor, wanted: Tensor) -> float:
    """|out - wanted| / |wanted| in float64; 0 for two empty or two zero tensors, inf where only one is finite."""
    out, wanted = out.double().cpu(), wanted.double().cpu()
    if not torch.equal(out.isfinite(), wanted.isfinite()):
        return float("inf")
    difference = (out - wanted)[wanted.isfinite()].norm().item()
    size = wanted[wanted.isfinite()].norm().item()
    return difference / size if size else difference


def assert_close_to_reference(kernel: Callable, reference: Callable, *args) -> None:
    """A kernel errs at most twice as much as its reference in the same types, plus its output's rounding.

    Errors are against the reference evaluated on float64 copies of the floating-point inputs; float8 and
    integer inputs, which have no float64 form, stay as they are.
    """
    wanted = reference(*(a.double() if _is_plain_float(a) else a for a in args))
    out = kernel(*args)
    assert out.dtype == args[0].dtype and out.shape == wanted.shape
    allowed = 2 * relative_error(reference(*args), wanted) + torch.finfo(out.dtype).eps / 2
    got = relative_error(out, wanted)
    assert got <= allowed, f"relative error {got:.3e}, allowed {allowed:.3e}"


def nvfp4_weight(*shape: int, device: str = "cpu", seed: int = 0, parts: int | None = None):
    """A random NVFP4Weight of `shape` [..., n, k] as quantizing Gaussian weights leaves it."""
    from . import nvfp4

    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator)
    rows = w.unflatten(-2, (parts, -1)) if parts else w
    scale = nvfp4.global_scale(rows.abs().amax((-2, -1)))
    codes, scales = nvfp4.quantize(rows, scale)
    if parts:
        codes, scales = codes.flatten(-3, -2), scales.flatten(-3, -2)
    return nvfp4.NVFP4Weight(codes.to(device), scales.to(device), scale.to(device))


def _is_plain_float(a) -> bool:
    return isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16, torch.float32)
