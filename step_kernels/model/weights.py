"""Where a model's parameters come from: a checkpoint in BF16, FP8 or NVFP4, or a seed.

Modules ask for what they need by name and shape and get it on the model's device, ready for its kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..nvfp4 import BLOCK, NVFP4Experts, NVFP4Weight
from ..ops import nvfp4_moe
from ..ops.nvfp4_moe import moe_loop
from ..prepared import PreparedWeight
from .checkpoint import Checkpoint, CheckpointError, Piece, pieces, read_piece
from .formats import (
    FP8_BLOCK,
    DenseExperts,
    FP8Channels,
    FP8Experts,
    FP8Weight,
    fp8_channels,
    gathered,
    kernel_layout,
)

PIECE = 64 << 20  # bytes read at once at most
# Bytes of experts on their way into the kernels' layout: 11 of Step-3.7's 288, whose gate and up then fill a PIECE.
_AT_ONCE = 96 << 20
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


def routed_sum(x: Tensor, weights: Tensor, ids: Tensor, experts, limit: float | None) -> Tensor:
    """nvfp4_moe for experts in any of the formats, or what experts that can be called make of it."""
    if callable(experts):
        return experts(x, weights, ids, limit)
    if isinstance(experts, NVFP4Experts):
        return nvfp4_moe(x, weights, ids, experts, limit)
    compute = torch.promote_types(x.dtype, torch.float32)
    count = (experts.gate_up if isinstance(experts, DenseExperts) else experts.gate.codes).shape[0]
    return moe_loop(x, weights, ids, limit, count=count, expert=lambda e: experts.expert(e, compute))


class Weights:
    """A checkpoint's parameters; with `fp8` its plain linears as FP8Channels. `fetch` gives the bytes of a piece on the
    CPU, to be copied before the next is fetched. `finish` fails where the model left a tensor unread."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        progress: bool = False,
        *,
        fp8: bool = False,
        fetch: Callable[[Piece], Tensor] = read_piece,
    ):
        self.checkpoint, self.device, self.dtype, self.fp8, self.fetch = checkpoint, device, dtype, fp8, fetch
        self.unread = set(checkpoint.entries)
        self.bar = None
        if progress:
            from tqdm import tqdm

            total = sum(e.end - e.begin for e in checkpoint.entries.values())
            self.bar = tqdm(desc="loading", total=total, unit="B", unit_scale=True, delay=2, disable=None, leave=False)

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> Tensor:
        """The tensor in the compute dtype; with `keep`, in f32 (what must not be rounded to bf16)."""
        self._expect(name, shape, _PLAIN)
        return self._read(name).to(torch.float32 if keep else self.dtype)

    def scalar(self, name: str, default: float) -> Tensor:
        """An f32 scale, stored as [] or [1]; the default where the checkpoint has none."""
        if name not in self.checkpoint:
            return torch.tensor(default, device=self.device)
        value = self._read(name)
        if value.numel() != 1 or not (value.is_meta or value.float().item() > 0):
            raise CheckpointError(f"{self._where(name)}: got {value.tolist()}, wanted one positive scale")
        return value.float().reshape(())

    def linear(self, module: str, out: int, inner: int) -> Tensor | NVFP4Weight | PreparedWeight | FP8Channels:
        """The [out, inner] weight of a linear layer, in the compute dtype, as FP8 or NVFP4, in the kernels' layout."""
        name, scale = f"{module}.weight", f"{module}.weight_scale"
        if self.checkpoint.entry(name).dtype == torch.float8_e4m3fn and scale in self.checkpoint:
            self._expect(name, (out, inner), (torch.float8_e4m3fn,))
            self._expect(scale, (out,), (torch.float32,))
            return FP8Channels(self._read(name), self._positive(scale, self._read(scale)))
        if not self._is_nvfp4(name):
            weight = self.tensor(name, (out, inner))
            return fp8_channels(weight) if self.fp8 else weight
        self._expect_nvfp4(module, (out, inner), ())
        codes, scales, outer = (self._read(f"{module}.{part}") for part in ("weight", "weight_scale", "weight_scale_2"))
        return self._prepared(
            NVFP4Weight(codes, scales, self._positive(f"{module}.weight_scale_2", outer).reshape(())), module
        )

    def experts(self, module: str, count: int, inner: int, hidden: int):
        """The stacked experts `module`.{gate,up,down}_proj, read some experts at a time."""
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
        stored = self.checkpoint.entry(f"{module}.gate_proj.weight").dtype
        if stored == torch.uint8:
            for projection, shape in shapes.items():
                self._expect_nvfp4(f"{module}.{projection}", shape, (count,))
            return self._nvfp4_experts(module, count, inner, hidden)
        for projection, shape in shapes.items():
            wanted = (stored,) if stored == torch.float8_e4m3fn else _PLAIN
            self._expect(f"{module}.{projection}.weight", (count, *shape), wanted)
        if stored == torch.float8_e4m3fn:
            return FP8Experts(*(self._fp8(f"{module}.{p}", (count, *shape)) for p, shape in shapes.items()))
        gate_up, down = ("gate_proj", "up_proj"), ("down_proj",)
        return DenseExperts(*(self._stack([f"{module}.{p}.weight" for p in part]) for part in (gate_up, down)))

    def finish(self) -> None:
        """Fail if the checkpoint holds tensors that no module asked for."""
        self.close()
        if self.unread:
            names = sorted(self.unread)
            raise CheckpointError(f"{self._where(names[0])}: {len(names)} tensors have no place in the model")

    def close(self) -> None:
        """Take the progress bar away."""
        if self.bar is not None:
            self.bar.close()

    def _nvfp4_experts(self, module: str, count: int, inner: int, hidden: int) -> NVFP4Experts:
        projections = ("gate_proj", "up_proj", "down_proj")
        names = {p: f"{module}.{p}.weight_scale_2" for p in projections}
        outer = {p: self._positive(name, self._read(name)) for p, name in names.items()}

        def part(begin: int, end: int) -> NVFP4Experts:
            def weight(*projections: str) -> tuple[Tensor, Tensor]:
                names = (f"{module}.{p}.weight" for p in projections)
                codes, scales = zip(*((self._read(n, begin, end), self._read(f"{n}_scale", begin, end)) for n in names))
                scales = torch.cat([s.view(torch.uint8) for s in scales], 1)
                return torch.cat(codes, 1), scales.view(torch.float8_e4m3fn)

            scales = torch.stack([outer[p][begin:end] for p in projections[:2]], 1)
            gate_up = NVFP4Weight(*weight(*projections[:2]), scales)
            down = NVFP4Weight(*weight(projections[2]), outer["down_proj"][begin:end])
            return self._prepared(NVFP4Experts(gate_up, down), module)

        return gathered(count, max(1, _AT_ONCE // (3 * inner * hidden * 9 // 16)), part)

    def _prepared(self, weight, module: str):
        try:
            return kernel_layout(weight, self.device, self.dtype)
        except ValueError as e:
            raise CheckpointError(f"{self._where(module)}: {e}") from None

    def _fp8(self, module: str, shape: tuple[int, ...]) -> FP8Weight:
        blocks = tuple(-(-n // FP8_BLOCK) for n in shape[1:])
        scales = f"{module}.weight_scale_inv"
        self._expect(scales, (shape[0], *blocks), (torch.float32,))
        return FP8Weight(self._read(f"{module}.weight"), self._read(scales))

    def _stack(self, names: list[str]) -> Tensor:
        """The tensors joined along their rows (dimension 1) in the compute dtype, some experts at a time."""
        entries = [self.checkpoint.entry(name) for name in names]
        experts, rows, *rest = entries[0].shape
        out = torch.empty((experts, rows * len(names), *rest), dtype=self.dtype, device=self.device)
        step = max(1, _AT_ONCE * experts // max(entries[0].end - entries[0].begin, 1))
        for begin in range(0, experts, step):
            end = min(begin + step, experts)
            for i, name in enumerate(names):
                out[begin:end, i * rows : (i + 1) * rows] = self._read(name, begin, end)
        return out

    def _read(self, name: str, *rows: int) -> Tensor:
        """The tensor as stored, on the device; with begin and end, that range of its first dimension alone."""
        entry = self.checkpoint.entry(name)
        self.unread.discard(name)
        shape = (rows[1] - rows[0], *entry.shape[1:]) if rows else entry.shape
        out = torch.empty(shape, dtype=entry.dtype, device=self.device)
        left = out.reshape(-1).view(torch.uint8)
        for piece in pieces(entry, PIECE, rows or None):
            size = piece.end - piece.begin
            left[:size].copy_(self.fetch(piece), non_blocking=True)
            left = left[size:]
            if self.bar is not None:
                self.bar.update(size)
        return out

    def _is_nvfp4(self, name: str) -> bool:
        return self.checkpoint.entry(name).dtype == torch.uint8

    def _expect_nvfp4(self, module: str, shape: tuple[int, int], lead: tuple[int, ...]) -> None:
        n, k = shape
        self._expect(f"{module}.weight", (*lead, n, k // 2), (torch.uint8,))
        self._expect(f"{module}.weight_scale", (*lead, n, k // BLOCK), (torch.float8_e4m3fn,))
        scale = self.checkpoint.entry(f"{module}.weight_scale_2")
        if scale.shape != lead and not (not lead and scale.shape == (1,)):
            raise CheckpointError(
                f"{self._where(f'{module}.weight_scale_2')}: got {list(scale.shape)}, wanted {list(lead)}"
            )
        self.unread.discard(f"{module}.input_scale")  # for engines that quantize activations

    def _expect(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
        entry = self.checkpoint.entry(name)
        if entry.shape != tuple(shape) or entry.dtype not in dtypes:
            got = f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"
            wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
            raise CheckpointError(f"{self._where(name)}: got {got}, wanted {wanted} {list(shape)}")

    def _positive(self, name: str, scale: Tensor) -> Tensor:
        if not (scale.is_meta or ((scale > 0) & scale.isfinite()).all()):
            raise CheckpointError(f"{self._where(name)}: holds a zero, negative or NaN scale")
        return scale.float()

    def _where(self, name: str) -> str:
        entry = self.checkpoint.entries.get(name)
        return f"{entry.file}: {entry.stored_name}" if entry else f"{self.checkpoint.folder}: {name}"
