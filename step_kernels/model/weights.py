"""Where a model's parameters come from: a checkpoint in BF16, FP8 or NVFP4, or a seed.

Modules ask for what they need by name and shape and get it on the model's device, ready for its kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..nvfp4 import BLOCK, NVFP4Experts, NVFP4Weight
from ..ops import nvfp4_moe, nvfp4_prepare, prepares
from ..ops.nvfp4_moe import moe_loop
from ..prepared import PreparedWeight
from .checkpoint import Checkpoint, CheckpointError

FP8_BLOCK = 128  # rows and columns that share a weight_scale_inv in the FP8 release


@dataclass(frozen=True)
class FP8Weight:
    """e4m3 [experts, n, k] with f32 scales [experts, ceil(n / 128), ceil(k / 128)], multiplied."""

    codes: Tensor
    scales: Tensor

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """[..., n, k] in `dtype`."""
        n, k = self.codes.shape[-2:]
        scales = self.scales.repeat_interleave(FP8_BLOCK, -2)[..., :n, :].repeat_interleave(FP8_BLOCK, -1)[..., :k]
        return (self.codes.float() * scales).to(dtype)


@dataclass(frozen=True)
class DenseExperts:
    """gate_up [experts, 2 * inner, hidden] (gate rows first), down [experts, hidden, inner]."""

    gate_up: Tensor
    down: Tensor

    def expert(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return self.gate_up[e].to(dtype), self.down[e].to(dtype)


@dataclass(frozen=True)
class FP8Experts:
    """The FP8 release's experts, kept at a byte a weight."""

    gate: FP8Weight
    up: FP8Weight
    down: FP8Weight

    def expert(self, e: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        gate, up, down = (FP8Weight(w.codes[e], w.scales[e]).dequantize(dtype) for w in (self.gate, self.up, self.down))
        return torch.cat((gate, up)), down


def routed_sum(x: Tensor, weights: Tensor, ids: Tensor, experts, limit: float | None) -> Tensor:
    """nvfp4_moe for experts in any of the formats."""
    if isinstance(experts, NVFP4Experts):
        return nvfp4_moe(x, weights, ids, experts, limit)
    compute = torch.promote_types(x.dtype, torch.float32)
    count = (experts.gate_up if isinstance(experts, DenseExperts) else experts.gate.codes).shape[0]
    return moe_loop(x, weights, ids, limit, count=count, expert=lambda e: experts.expert(e, compute))


def kernel_layout(weight, device: torch.device, dtype: torch.dtype):
    """An NVFP4 weight or experts as the device's kernels for `dtype` read them: prepared, or as they are."""
    return nvfp4_prepare(weight) if dtype == torch.bfloat16 and prepares(device) else weight


class Weights:
    """A checkpoint's parameters. `finish` fails where the model left one of them unread."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: bool = False):
        self.checkpoint, self.device, self.dtype = checkpoint, device, dtype
        self.unread = set(checkpoint.entries)
        self.bar = None
        if progress:
            from tqdm import tqdm

            total = sum(e.end - e.begin for e in checkpoint.entries.values())
            self.bar = tqdm(desc="loading", total=total, unit="B", unit_scale=True, delay=2, disable=None, leave=False)

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> Tensor:
        """The tensor in the compute dtype; with `keep`, in f32 (what must not be rounded to bf16)."""
        self._expect(name, shape, (torch.bfloat16, torch.float16, torch.float32))
        return self._read(name).to(self.device, torch.float32 if keep else self.dtype)

    def scalar(self, name: str, default: float) -> Tensor:
        """An f32 scale, stored as [] or [1]; the default where the checkpoint has none."""
        if name not in self.checkpoint:
            return torch.tensor(default, device=self.device)
        value = self._read(name)
        if value.numel() != 1 or not value.float().item() > 0:
            raise CheckpointError(f"{self._where(name)}: got {value.tolist()}, wanted one positive scale")
        return value.float().reshape(()).to(self.device)

    def linear(self, module: str, out: int, inner: int) -> Tensor | NVFP4Weight | PreparedWeight:
        """The [out, inner] weight of a linear layer, in the compute dtype or as NVFP4, in the kernels' layout."""
        name = f"{module}.weight"
        if not self._is_nvfp4(name):
            return self.tensor(name, (out, inner))
        self._expect_nvfp4(module, (out, inner), ())
        codes, scales, outer = (self._read(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2"))
        parts = codes, scales, self._positive(module, outer).reshape(())
        return self._prepared(NVFP4Weight(*(t.to(self.device) for t in parts)), module)

    def experts(self, module: str, count: int, inner: int, hidden: int):
        """The stacked experts `module`.{gate,up,down}_proj, read one expert at a time."""
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        first = f"{module}.gate_proj.weight"
        stored = self.checkpoint.entry(first).dtype
        if stored == torch.uint8:
            for projection, shape in shapes.items():
                self._expect_nvfp4(f"{module}.{projection}", shape, (count,))
            return self._nvfp4_experts(module)
        for projection, shape in shapes.items():
            wanted = (stored,) if stored == torch.float8_e4m3fn else (torch.bfloat16, torch.float16, torch.float32)
            self._expect(f"{module}.{projection}.weight", (count, *shape), wanted)
        if stored == torch.float8_e4m3fn:
            return FP8Experts(*(self._fp8(f"{module}.{p}", (count, *shape)) for p, shape in shapes.items()))
        gate_up = self._stack(f"{module}.gate_proj.weight", f"{module}.up_proj.weight").to(self.dtype)
        return DenseExperts(gate_up, self._stack(f"{module}.down_proj.weight").to(self.dtype))

    def finish(self) -> None:
        """Fail if the checkpoint holds tensors that no module asked for."""
        if self.bar is not None:
            self.bar.close()
        if self.unread:
            names = sorted(self.unread)
            raise CheckpointError(f"{self._where(names[0])}: {len(names)} tensors have no place in the model")

    def _nvfp4_experts(self, module: str) -> NVFP4Experts:
        def part(suffix: str, *projections: str) -> Tensor:
            return self._stack(*(f"{module}.{p}.{suffix}" for p in projections))

        def outer(projection: str) -> Tensor:
            return self._positive(f"{module}.{projection}", self._read(f"{module}.{projection}.weight_scale_2"))

        pair, down = ("gate_proj", "up_proj"), ("down_proj",)
        gate_up = NVFP4Weight(
            part("weight", *pair),
            part("weight_scale", *pair),
            torch.stack([outer(p) for p in pair], 1).to(self.device),
        )
        down = NVFP4Weight(part("weight", *down), part("weight_scale", *down), outer(*down).to(self.device))
        return self._prepared(NVFP4Experts(gate_up, down), module)

    def _prepared(self, weight, module: str):
        try:
            return kernel_layout(weight, self.device, self.dtype)
        except ValueError as e:
            raise CheckpointError(f"{self._where(module)}: {e}") from None

    def _fp8(self, module: str, shape: tuple[int, ...]) -> FP8Weight:
        blocks = tuple(-(-n // FP8_BLOCK) for n in shape[1:])
        scales = f"{module}.weight_scale_inv"
        self._expect(scales, (shape[0], *blocks), (torch.float32,))
        return FP8Weight(self._stack(f"{module}.weight"), self._read(scales).to(self.device))

    def _stack(self, *names: str) -> Tensor:
        """The tensors joined along their rows (dimension 1), on the device, read expert by expert."""
        entries = [self.checkpoint.entry(name) for name in names]
        experts, rows, *rest = entries[0].shape
        out = torch.empty((experts, rows * len(names), *rest), dtype=entries[0].dtype, device=self.device)
        for e in range(experts):
            for i, name in enumerate(names):
                out[e, i * rows : (i + 1) * rows] = self._read(name, e, e + 1)[0].to(self.device)
        return out

    def _read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        self.unread.discard(name)
        tensor = self.checkpoint.read(name, begin, end)
        if self.bar is not None:
            self.bar.update(tensor.numel() * tensor.itemsize)
        return tensor

    def _is_nvfp4(self, name: str) -> bool:
        return self.checkpoint.entry(name).dtype == torch.uint8

    def _expect_nvfp4(self, module: str, shape: tuple[int, int], lead: tuple[int, ...]) -> None:
        n, k = shape
        self._expect(f"{module}.weight", (*lead, n, k // 2), (torch.uint8,))
        self._expect(f"{module}.weight_scale", (*lead, n, k // BLOCK), (torch.float8_e4m3fn,))
        scale = self.checkpoint.entry(f"{module}.weight_scale_2")
        if scale.shape != lead and not (not lead and scale.shape == (1,)):
            raise CheckpointError(f"{self._where(scale.stored_name)}: got {list(scale.shape)}, wanted {list(lead)}")
        self.unread.discard(f"{module}.input_scale")  # for engines that quantize activations

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        entry = self.checkpoint.entry(name)
        if entry.shape != tuple(shape) or entry.dtype not in dtypes:
            got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(f"{self._where(name)}: got {got}, wanted {wanted} {list(shape)}")

    def _positive(self, module: str, scale: Tensor) -> Tensor:
        if not ((scale > 0) & scale.isfinite()).all():
            raise CheckpointError(f"{self._where(f'{module}.weight_scale_2')}: holds a zero, negative or NaN scale")
        return scale.float()

    def _where(self, name: str) -> str:
        entry = self.checkpoint.entries.get(name)
        return f"{entry.file}: {entry.stored_name}" if entry else f"{self.checkpoint.folder}: {name}"


class RandomWeights:
    """Parameters from a seed, made on the device; with `nvfp4` the experts and linears that a release quantizes."""

    def __init__(self, device: torch.device, dtype: torch.dtype, nvfp4: bool = True, seed: int = 0):
        self.device, self.dtype, self.nvfp4 = device, dtype, nvfp4
        self.generator = torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> Tensor:
        """Gaussian, of the size that keeps activations near 1: fan-in scaling for matrices, 0.1 for vectors."""
        fan_in = 100 if len(shape) == 1 else shape[-1] if len(shape) == 3 else torch.Size(shape[1:]).numel()
        x = torch.empty(shape, dtype=torch.float32 if keep else self.dtype, device=self.device)
        x.normal_(0, 1.0 if "embed" in name else fan_in**-0.5, generator=self.generator)
        return x.add_(1) if ".ln_" in name and name.endswith("weight") else x  # a LayerNorm's is no delta

    def scalar(self, name: str, default: float) -> Tensor:
        return torch.tensor(default, device=self.device)

    def linear(self, module: str, out: int, inner: int) -> Tensor:
        return self.tensor(f"{module}.weight", (out, inner))

    def experts(self, module: str, count: int, inner: int, hidden: int):
        if not self.nvfp4:
            gate, up = (self.tensor(f"{module}.{p}.weight", (count, inner, hidden)) for p in ("gate_proj", "up_proj"))
            return DenseExperts(
                torch.cat((gate, up), 1), self.tensor(f"{module}.down_proj.weight", (count, hidden, inner))
            )
        experts = NVFP4Experts(self._codes(count, 2 * inner, hidden, parts=2), self._codes(count, hidden, inner))
        return kernel_layout(experts, self.device, self.dtype)

    def finish(self) -> None:
        pass

    def _codes(self, count: int, n: int, k: int, parts: int = 1) -> NVFP4Weight:
        codes = torch.empty((count, n, k // 2), dtype=torch.uint8, device=self.device)
        codes.random_(0, 256, generator=self.generator)
        scales = torch.empty((count, n, k // BLOCK), dtype=torch.uint8, device=self.device)
        scales.random_(0x38, 0x40, generator=self.generator)  # e4m3 1.0 to 1.875
        # uniform codes have an rms of 2.93, these scales one of 1.46
        outer = torch.full((count, parts) if parts > 1 else (count,), k**-0.5 / (2.93 * 1.46), device=self.device)
        return NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), outer)
