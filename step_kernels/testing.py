"""What tests and benches share: random inputs and the accuracy rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .prepared import TILE


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


def sample_arguments(op: str, dtype: torch.dtype, prepared: bool = False) -> tuple:
    """Arguments of an op at Step-3.7-Flash's shapes, eight tokens, meta tensors for support tables; NVFP4 weights in
    checkpoint layout or `prepared`."""

    def of(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weight(*shape: int, outer: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        codes, scales, kind = (*shape[:-1], shape[-1] // 2), (*shape[:-1], shape[-1] // 16), torch.float8_e4m3fn
        if prepared and op in ("nvfp4_linear", "nvfp4_moe"):
            tiles = *shape[:-2], shape[-2] // TILE, shape[-1] // TILE
            codes, scales, kind = (*tiles, 2048), (*tiles, 256), torch.uint8
        return of(*codes, dtype=torch.uint8), of(*scales, dtype=kind), of(*outer, dtype=torch.float32)

    def fp8(n: int, k: int) -> tuple[Tensor, Tensor]:
        return of(n, k, dtype=torch.float8_e4m3fn), of(n, dtype=torch.float32)

    def i32(*shape: int) -> Tensor:
        return of(*shape, dtype=torch.int32)

    def f32(*shape: int) -> Tensor:
        return of(*shape, dtype=torch.float32)

    tokens, hidden, scale = 8, 4096, of(dtype=torch.float32)
    q, kv = of(tokens, 64, 128), of(tokens, 8, 128)
    pages = of(64, 8, 64, 128, dtype=torch.float8_e4m3fn)
    cache = (pages, pages, scale, scale)
    norm, frequencies = (of(128), of(128), 1e-5), of(32, dtype=torch.float32)
    experts = (*weight(288, 2560, hidden, outer=(288, 2)), *weight(288, hidden, 1280, outer=(288,)))
    routing = of(tokens, 8, dtype=torch.float32), i32(tokens, 8)
    vocab, rows = 128896, of(tokens, dtype=torch.int64)
    return {
        "moe_router": (of(tokens, hidden), of(288, hidden, dtype=torch.float32), of(288, dtype=torch.float32), 8, 3.0),
        "moe_topk": (of(tokens, 288, dtype=torch.float32), of(288, dtype=torch.float32), 8, 3.0),
        "swiglu": (of(tokens, 2560), 7.0),
        "rms_norm": (of(tokens, hidden), of(hidden), 1e-5),
        "add_rms_norm": (of(tokens, hidden), of(tokens, hidden), of(hidden), 1e-5),
        "nvfp4_quantize": (of(tokens, hidden), scale),
        "nvfp4_search": (of(tokens, hidden), scale, "mse"),
        "nvfp4_error": (of(tokens, hidden), *weight(tokens, hidden)),
        "nvfp4_gptq": (f32(2560, 128), f32(128, 128), f32(2560, 128), f32(2560, 128), of(2560, 8, dtype=torch.uint8)),
        "nvfp4_dequantize": (*weight(hidden, hidden), dtype),
        "linear": (of(tokens, hidden), of(8192, hidden)),
        "linear_swiglu": (of(tokens, hidden), of(2560, hidden), 16.0),
        "fp8_linear": (of(tokens, hidden), *fp8(8192, hidden)),
        "fp8_linear_swiglu": (of(tokens, hidden), *fp8(2560, hidden), 16.0),
        "nvfp4_linear": (of(tokens, hidden), *weight(8192, hidden)),
        "nvfp4_moe": (of(tokens, hidden), *routing, *experts, 7.0),
        "kv_append": (q, kv, kv, *norm, frequencies, i32(tokens), i32(tokens), *cache),
        "choose": (of(tokens, vocab, dtype=torch.float32), i32(tokens), rows),
        "decode_inputs": (rows, i32(tokens), rows, rows, i32(2, tokens, 64), 64, of(vocab, hidden)),
        "paged_attention": (q, *cache, i32(tokens, 64), i32(tokens), i32(tokens + 1), 512, of(tokens, 64)),
        "paged_attention_lse": (q, *cache, i32(tokens, 64), i32(tokens), i32(tokens + 1), 512, of(tokens, 64)),
    }[op]


def _is_plain_float(a) -> bool:
    return isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16, torch.float32)
