"""How far the stored weights are from the source's, by samples, beside what the data-free searches would give."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels import nvfp4
from step_kernels.model.checkpoint import Checkpoint

from . import fp8
from .checks import State
from .contents import read_rows
from .errors import decibel
from .formats import Channels, Stored
from .layout import layer_number, projection_name

_MATRICES, _ELEMENTS = 8, 1 << 18  # of each weight: matrices (or parts of a linear), and weights in each
# Of e4m3: a code is at most 1/16 off, and what is subnormal at most 2^-10 of 448, far less of a row's amax.
_FP8_BOUND = 2.0**-8

_COLUMNS = ("stored", *nvfp4.SEARCHES)


@dataclass
class Measured:
    """Of each projection's samples the sums of squared size (`power`) and squared errors, and the worst sample."""

    sums: dict[str, dict[str, float]] = field(default_factory=dict)
    worst: dict[str, tuple[float, str]] = field(default_factory=dict)
    elements: int = 0

    def add(self, weight: str, place: str, sums: dict[str, float]) -> None:
        """A sample of a weight."""
        projection, layer = projection_name(weight), layer_number(weight)
        projection += "" if nvfp4.SEARCHES[-1] in sums else " FP8"
        total = self.sums.setdefault(projection, dict.fromkeys(sums, 0.0))
        for name, value in sums.items():
            total[name] += value
        relative = _ratio(sums, "stored")
        if not relative <= self.worst.get(projection, (-1.0, ""))[0]:
            self.worst[projection] = relative, f"{place}" if layer is None else f"layer {layer} {place}"

    def table(self) -> list[str]:
        """A line a projection: relative MSE as stored, and what the data-free searches give on the same weights."""
        if not self.sums:
            return []
        width = max(23, *(len(projection) for projection in self.sums))
        lines = [
            f"{'relative MSE of samples':<{width}}" + "".join(f"{name:>10}" for name in _COLUMNS) + "  stored at worst"
        ]
        for projection, sums in self.sums.items():
            numbers = "".join(f"{_ratio(sums, name):10.6f}" if name in sums else f"{'-':>10}" for name in _COLUMNS)
            worst, where = self.worst[projection]
            lines.append(
                f"{projection:<{width}}{numbers}  {worst:.6f} {where}, {decibel(_ratio(sums, 'stored')):.2f} dB"
            )
        return lines


def error(state: State, bound: float, quiet: bool | None) -> Measured:
    """(e) Against the source: no sample's relative MSE above `bound` (or what FP8 can err), and no weight's above what
    scales by amax would give."""
    measured, found = Measured(), state.findings
    if state.source is None:
        found.skipped["e"] = "no --source to compare with"
        return measured
    held = state.model.quantized | state.model.channels
    for weight, parts in tqdm(held.items(), desc="measuring", disable=quiet, leave=False):
        taken, channels = [], weight in state.model.channels
        for at, (owner, matrix, label) in samples(owners(parts)):
            x, scale = _source_rows(state, owner, matrix, at), None if channels else _outer(state, owner, matrix)
            if x is None:
                found.fail("e", f"is not in the source as {list(parts[0].shape)}", weight)
                break
            if not set(owner.names[:2]) <= state.sound.keys() or (scale is None and not channels):
                continue
            sums = _fp8_sums(state, owner, at, x) if channels else _sums(state, owner, matrix, at, x, scale)
            taken.append((label or f"row {at}", sums))
            measured.add(weight, taken[-1][0], sums)
            measured.elements += x.numel()
        _judge(state, parts[0].names[0], taken, min(bound, _FP8_BOUND) if channels else bound)
    found.done["e"] = f"at most {bound:.4f} in every sample, {measured.elements / 1e6:.1f} M weights in all"
    return measured


def _sums(state: State, stored: Stored, matrix: int, at: int, x: Tensor, scale: Tensor) -> dict[str, float]:
    """A sample's squared size, and squared error as decoded and as each search would leave it."""
    from .matrices import quantize_piece

    sums = _stored_sums(x, _decoded(state, stored, matrix, at, scale))
    return sums | {search: quantize_piece(x, scale, search)[2][0].item() for search in nvfp4.SEARCHES}


def _fp8_sums(state: State, channels: Channels, at: int, x: Tensor) -> dict[str, float]:
    """The same of a sample in FP8."""
    codes = sample_rows(state.contents, channels, channels.names[0], 0, at).float()
    scales = state.contents.read(channels.names[1]).reshape(-1, 1)[at : at + len(codes)].float()
    return _stored_sums(x, codes * scales) | {"max": fp8.quantize(x)[2][0].item()}


def _stored_sums(x: Tensor, decoded: Tensor) -> dict[str, float]:
    x = x.float()
    return {name: t.square().sum(dtype=torch.float64).item() for name, t in (("power", x), ("stored", decoded - x))}


def _ratio(sums: dict[str, float], name: str) -> float:
    return sums[name] / sums["power"] if sums["power"] else float(sums[name] > 0)


def _judge(state: State, name: str, samples: list[tuple[str, dict[str, float]]], bound: float) -> None:
    above = [(place, sums) for place, sums in samples if not _ratio(sums, "stored") <= bound]
    whole = {key: math.fsum(sums[key] for _, sums in samples) for key in ("power", "stored", "max")}
    if above:
        place, sums = max(above, key=lambda a: (math.isnan(_ratio(a[1], "stored")), _ratio(a[1], "stored")))
        detail = f"{place}: {_ratio(sums, 'stored'):.4f}, max gives {_ratio(sums, 'max'):.4f}"
        detail += f"; {len(above)} of {len(samples)} samples" if len(above) > 1 else ""
        effect = "codes, scales or source do not belong together, or GPTQ chose the codes (then --bound .03)"
        state.findings.fail("e", f"relative MSE is above {bound:.4f}", name, detail, effect)
    elif whole["stored"] > whole["max"] * 1.001:
        detail = f"{_ratio(whole, 'stored'):.6f}, max gives {_ratio(whole, 'max'):.6f}"
        effect = "right after a calibrated search (hessian, gptq); otherwise the block scales are badly chosen"
        state.findings.note("e", "errs more than max would", name, detail, effect)


def samples(held: list) -> list[tuple[int, tuple]]:
    """What to measure of a weight: the first row, and the matrix; spread over the experts, or over a linear's rows."""
    n, k = held[0][0].shape[-2:]
    spare, last = n - _rows(n, k), _MATRICES - 1
    if len(held) == 1:
        count = min(_MATRICES, -(-n // _rows(n, k)))
        return [(spare * i // max(1, count - 1), held[0]) for i in range(count)]
    chosen = sorted({i * (len(held) - 1) // last for i in range(_MATRICES)})
    return [(spare * i // max(1, len(chosen) - 1), held[expert]) for i, expert in enumerate(chosen)]


def _rows(n: int, k: int) -> int:
    return min(n, max(1, _ELEMENTS // k))


def sample_rows(checkpoint: Checkpoint, held: Stored | Channels, name: str, matrix: int, at: int) -> Tensor:
    """The rows of a sample from row `at` on, of a tensor with the weight's rows."""
    return read_rows(checkpoint, name, matrix, at, at + _rows(*held.shape[-2:]))


def _source_rows(state: State, stored: Stored, matrix: int, at: int) -> Tensor | None:
    """The sample's rows in the source, or None where it has no such weight."""
    if state.source is None:
        return None
    entry, shape = state.source.entries.get(stored.weight), stored.shape
    experts = entry is not None and len(entry.shape) == 3
    if entry is None or entry.shape[-2:] != shape[-2:] or not entry.dtype.is_floating_point:
        return None
    which = stored.expert if stored.expert is not None else matrix
    if experts and which >= entry.shape[0]:
        return None
    return sample_rows(state.source, stored, stored.weight, which, at)


def _outer(state: State, stored: Stored, matrix: int) -> Tensor | None:
    """The matrix's global scale, or None where it is missing or unusable."""
    if stored.names[2] not in state.sound:
        return None
    value = state.contents.read(stored.names[2]).reshape(-1)[matrix].float()
    value = 1 / value if stored.inverse else value
    return value if torch.isfinite(value) and value > 0 else None


def _decoded(state: State, stored: Stored, matrix: int, at: int, scale: Tensor) -> Tensor:
    """The sample's rows as the files have them, read with `scale`."""
    codes, blocks = (sample_rows(state.contents, stored, name, matrix, at) for name in stored.names[:2])
    return nvfp4.dequantize(codes, blocks, scale)


def _relative(decoded: Tensor, x: Tensor) -> float:
    x = x.float()
    return ((decoded - x).square().sum(dtype=torch.float64) / x.square().sum(dtype=torch.float64)).item()


def owners(parts: list[Stored]) -> list[tuple[Stored, int, str]]:
    """Of each matrix of a weight: what stores it, its place there, and its name in messages."""
    return [(stored, matrix, label) for stored in parts for matrix, label in stored.matrices()]


def misread_error(state: State, stored: Stored, matrix: int, own: Tensor, used: Tensor) -> str:
    """Relative MSE of a matrix read with another's scale, against the source or, without one, its own decoding."""
    x = _source_rows(state, stored, matrix, 0)
    if x is None or not {stored.names[0], stored.names[1]} <= state.sound.keys():
        return f"{(used / own - 1).square().item():.4f} against itself"
    wrong, right = (_relative(_decoded(state, stored, matrix, 0, scale), x) for scale in (used, own))
    return f"{wrong:.4f} instead of {right:.4f}"
