"""x times a bf16 or e4m3 weight for up to 64 tokens, SwiGLU of it: csrc/sm90_linear.cu, csrc/sm90_fp8_linear.cu."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .driver import Kernel, multiprocessors
from .tensor_map import encode

MOST_TOKENS = 64
# More go to cuBLAS in bf16, faster on an H200: at 64 tokens a decode step of 6 layers took 2.81 ms here, 2.72 there.
# f32 outputs, which are the vocabulary's, stay: 64 tokens take 267 us, cuBLAS 293.
FAST_TOKENS = 8
# Of the same with SwiGLU, which costs a kernel behind cuBLAS: norm, gate and up, down of the share expert take 19.4 us
# at 16 tokens, as two ops 20.3, and 22.3 at 32, as two ops 20.7.
FAST_SWIGLU_TOKENS = 16
# More are taken by 64s in FP8: a time of 25 to 40 us, where to expand 10304x4096 and multiply it by cuBLAS takes 154.
MOST_FP8_TOKENS = 256
MOST_SUMS = 64 * 192  # that a block may leave to another
_PARAMETERS = "PPiiiif" + 32 * "q"  # the tensor maps are one parameter, of which the driver takes the first q's address
_ABSENT = -1  # no sum has these bits
_SPARE = 2  # sets of parts kept for streams that first compute while they are captured


@dataclass(frozen=True)
class Variant:
    """A kernel for up to `tokens`; a block takes units of rows x unit_k and has `stages` of them in flight. `paired`:
    half of a block's rows are gate's, half up's, and SwiGLU of their products comes out."""

    tokens: int
    rows: int
    unit_k: int
    stages: int
    fp8: bool = False
    paired: bool = False

    @functools.cached_property
    def kernel(self) -> Kernel:
        source = "sm90_fp8_linear" if self.fp8 else "sm90_linear"
        name = f"{source}{'_swiglu' * self.paired}_t{self.tokens}{'' if self.fp8 else f'_{self.stages}'}"
        parameters = "PP" * self.fp8 + _PARAMETERS
        return Kernel(source, name, parameters, self.shared_bytes, dependent=True)

    @property
    def shared_bytes(self) -> int:
        """Alignment, and of each stage weights, x as bf16, barriers, for FP8 factors of x."""
        weight, more = (self.rows, 1024 + 32) if self.fp8 else (2 * self.rows, 24)
        return 1024 + self.stages * (self.unit_k * (weight + 2 * self.tokens) + more)

    @property
    def threads(self) -> int:
        """Two a row multiply, two warps fetch, a warpgroup splits x for FP8 unless that was done before."""
        return 2 * self.rows + 64 + 128 * (self.fp8 and not self.split)

    @property
    def split(self) -> bool:
        """Whether x comes split: so many tokens' would take every block longer than their weights."""
        return self.fp8 and self.tokens > 8


BF16 = (Variant(8, 64, 128, 12), Variant(16, 128, 64, 12), Variant(32, 128, 64, 10), Variant(64, 128, 64, 9))
FP8 = (
    Variant(4, 64, 256, 10, True), Variant(8, 64, 256, 10, True), Variant(16, 128, 128, 10, True),
    Variant(32, 128, 128, 8, True), Variant(64, 192, 128, 5, True),
)  # fmt: skip
# The share expert's weights, 10 and 21 MB, are multiplied beside the routed experts', whose blocks want half of a
# multiprocessor's shared memory.
BESIDE, BESIDE_BYTES = Variant(8, 64, 128, 6), 32 << 20
SWIGLU = {
    variant: dataclasses.replace(variant, paired=True)
    for variant in (BESIDE, *BF16, *FP8)
    if variant.fp8 or variant.tokens <= FAST_SWIGLU_TOKENS
}
SPLIT = Kernel("sm90_fp8_linear", "sm90_fp8_linear_split", "PqPPiii", dependent=True)


def cannot(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None, most: int = MOST_TOKENS) -> str | None:
    """Why the kernel does not take linear's arguments, or None."""
    if x.dtype != torch.bfloat16 or out_dtype not in (None, torch.bfloat16, torch.float32):
        return f"takes bfloat16 to bfloat16 or float32, got {_name(x.dtype)} to {_name(out_dtype or x.dtype)}"
    if x.numel() > most * x.shape[-1]:
        return f"takes at most {most} tokens, got {x.numel() // x.shape[-1]}"
    if weight.shape[1] * weight.itemsize % 16 or not _copyable(weight):
        return f"takes rows at multiples of 16 bytes, got k = {x.shape[-1]}, weight strides {list(weight.stride())}"


def refuse(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> str | None:
    """Why the kernel does not take linear's arguments or leaves them to cuBLAS, or None."""
    tokens = x.numel() // max(1, x.shape[-1])
    if out_dtype != torch.float32 and tokens > FAST_TOKENS:
        return f"is the faster up to {FAST_TOKENS} tokens, got {tokens}"
    return cannot(x, weight, out_dtype)


def refuse_fp8(x: Tensor, codes: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> str | None:
    """Why the kernel does not take fp8_linear's arguments, or None."""
    return cannot(x, codes, out_dtype, MOST_FP8_TOKENS)


def refuse_swiglu(x: Tensor, weight: Tensor, limit: float | None = None) -> str | None:
    """Why the kernel does not take linear_swiglu's arguments or leaves them to cuBLAS, or None."""
    tokens = x.numel() // max(1, x.shape[-1])
    if tokens > FAST_SWIGLU_TOKENS:
        return f"is the faster up to {FAST_SWIGLU_TOKENS} tokens, got {tokens}"
    return _cannot_pair(weight) or cannot(x, weight)


def refuse_fp8_swiglu(x: Tensor, codes: Tensor, scale: Tensor, limit: float | None = None) -> str | None:
    """Why the kernel does not take fp8_linear_swiglu's arguments, or None."""
    return _cannot_pair(codes) or refuse_fp8(x, codes, scale)


def _cannot_pair(weight: Tensor) -> str | None:
    if weight.shape[0] % 16:
        return f"takes gate and up of 8 rows or a multiple, got {weight.shape[0] // 2}"


def launch(x: Tensor, weight: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """bf16 [..., k] of up to 64 rows, bf16 [n, k] -> bf16 or f32 [..., n]; k a multiple of 8."""
    return _launch(BF16, x, weight, (), out_dtype)


def launch_swiglu(x: Tensor, weight: Tensor, limit: float | None = None) -> Tensor:
    """bf16 [..., k] of up to 64 rows, bf16 [2n, k], gate first -> bf16 [..., n]; k and n multiples of 8."""
    return _launch(BF16, x, weight, (), None, (limit,))


def launch_fp8(x: Tensor, codes: Tensor, scale: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """bf16 [..., k], e4m3 [n, k], f32 [n] -> bf16 or f32 [..., n]; k a multiple of 16."""
    return _launch_fp8(x, codes, scale, out_dtype)


def launch_fp8_swiglu(x: Tensor, codes: Tensor, scale: Tensor, limit: float | None = None) -> Tensor:
    """bf16 [..., k], e4m3 [2n, k], f32 [2n], gate first -> bf16 [..., n]; k a multiple of 16, n of 8."""
    return _launch_fp8(x, codes, scale, None, (limit,))


def _launch_fp8(x, codes, scale, *options) -> Tensor:
    scale, rows = scale.contiguous(), x.reshape(-1, x.shape[-1])
    if len(rows) <= MOST_TOKENS:
        return _launch(FP8, x, codes, (scale,), *options)
    parts = [_launch(FP8, part, codes, (scale,), *options) for part in rows.split(MOST_TOKENS)]
    return torch.cat(parts).view(*x.shape[:-1], -1)


def _launch(variants, x, weight, scale, out_dtype, swiglu=()) -> Tensor:
    """`swiglu` is empty for the product itself, (limit,) for SwiGLU of its halves."""
    n, k = weight.shape
    out = x.new_empty(*x.shape[:-1], n // 2 if swiglu else n, dtype=out_dtype or x.dtype)
    if out.numel() == 0 or k == 0:
        return out.zero_()
    x = x.reshape(-1, k)
    x = x if _copyable(x) else x.clone(memory_format=torch.contiguous_format)
    variant = next(v for v in variants if v.tokens >= len(x))
    variant = BESIDE if variant is BF16[0] and weight.nbytes <= BESIDE_BYTES else variant
    variant = SWIGLU[variant] if swiglu else variant
    units = -(-k // variant.unit_k)  # of a row of them
    blocks = min(multiprocessors(x.device.index), -(-n // variant.rows) * units)
    limit = swiglu[0] if swiglu and swiglu[0] is not None else math.inf
    shape, x_columns, swizzled, factor = (len(x), n, units, int(out.dtype == torch.float32), limit), 64, True, ()
    if variant.split:
        x, *factor = _split(x, variant.tokens)
        x_columns = 128
    elif variant.fp8:  # x to be split is not swizzled
        x_columns, swizzled, factor = variant.unit_k, False, (0,)
    maps = (
        *tensor_map(*_layout(weight), 128 // weight.itemsize, variant.rows, True, variant.paired),
        *tensor_map(*_layout(x), x_columns, variant.tokens, swizzled),
    )
    variant.kernel.launch((blocks, 1, 1), variant.threads, *scale, *factor, out, parts(x.device), *shape, *maps)
    return out


def _split(x: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """bf16 [m, k] -> x in two, u8 [2 tokens, k], and f32 factors of 128 k [ceil(k / 128), tokens]."""
    m, k = x.shape
    units = -(-k // 128)
    codes, factors = x.new_empty(2 * tokens, k, dtype=torch.uint8), x.new_empty(units, tokens, dtype=torch.float32)
    SPLIT.launch((-(-m * units // 8), 1, 1), 128, x, x.stride(0), codes, factors, m, k, tokens)
    return codes, factors


def parts(device: torch.device) -> Tensor:
    """i32 [multiprocessors, MOST_SUMS] of this stream's own, absent; a kernel that keeps sums there leaves it so."""
    taken, spare = _pool(device.index)
    stream = torch.cuda.current_stream(device).cuda_stream
    new = stream not in taken
    if (new or len(spare) < _SPARE) and not torch.cuda.is_current_stream_capturing():
        shape = (multiprocessors(device.index), MOST_SUMS)
        while len(spare) < _SPARE + new:
            spare.append(torch.full(shape, _ABSENT, dtype=torch.int32, device=device))
        torch.cuda.synchronize(device)  # whichever stream takes them
    if new:
        if not spare:
            raise RuntimeError("linear: call it on this GPU outside of captures before capturing on another new stream")
        taken[stream] = spare.pop()
    return taken[stream]


@functools.cache
def _pool(device: int) -> tuple[dict[int, Tensor], list[Tensor]]:
    return {}, []


def _copyable(x: Tensor) -> bool:
    """Whether the copy engine can go through x [m, k]: rows without overlap, each at a multiple of 16 bytes."""
    apart = x.stride(0) >= x.shape[1] and x.stride(0) * x.itemsize % 16 == 0
    return x.stride(1) == 1 and apart and x.data_ptr() % 16 == 0


def _layout(x: Tensor) -> tuple[int, int, int, int, int]:
    return x.data_ptr(), *x.shape, x.stride(0) * x.itemsize, x.itemsize


@functools.lru_cache(4096)
def tensor_map(
    address: int, rows: int, columns: int, stride: int, itemsize: int, box_columns: int, box_rows: int, swizzled: bool,
    paired: bool = False,
) -> tuple[int, ...]:  # fmt: skip
    """How the copy engine goes through [rows, columns] of bf16 or bytes, `stride` bytes a row: zeros outside. `paired`:
    as [rows / 16, 2, 8, columns], 8 rows of the first half and 8 of the second in turn."""
    sizes, strides, box = (columns, rows), (stride,), (box_columns, box_rows)
    if paired:
        sizes, strides = (columns, 8, 2, rows // 16), (stride, rows // 2 * stride, 8 * stride)
        box = (box_columns, 8, 2, box_rows // 16)
    return encode(address, itemsize, sizes, strides, box, 128 * swizzled)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
