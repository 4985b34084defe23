"""What a conversion notes of its weights for the report.

Everything noted is a sum, so pieces, threads, processes and the parts of a stopped conversion simply add up.
"""

from __future__ import annotations

import base64
import threading
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from step_kernels.nvfp4 import BLOCK, E2M1_MAX, candidate_scales

from .kinds import Kind

# Offsets from the code of amax / 6 to the chosen one; the two outermost take what lies beyond. No search goes that far.
OFFSETS = range(-8, 9)
CODES, COUNTS = 128, 128 + len(OFFSETS) + 4
_SAMPLE = 1 << 18  # weights of a piece that are looked at: 1.1 ms an expert, beside the 46 of its search for `mse`
_MAGNITUDES = 0x7777777777777777  # the codes of a block without their signs
_ABOVE = 1 + 2.0**-20  # rounded down, 6 * scale would count a matrix's largest weight as beyond it


@torch.no_grad()
def tally(weight: Tensor, codes: Tensor, blocks: Tensor, scale: Tensor) -> Tensor:
    """[n, k] and its quantized form, on any devices -> i64 [COUNTS] on the host, for `Weight.add`.

    `codes` u8 [n, k/2], `blocks` e4m3 or u8 [n, k/16], `scale` f32 []. Scale codes and blocks that are zero throughout
    are counted among all blocks; what needs the weights themselves in evenly spaced rows.
    """
    blocks = blocks.view(torch.uint8)
    step = -(-weight.numel() // _SAMPLE)
    x, chosen, scale = weight[::step].cpu().float().abs().view(-1, BLOCK), blocks[::step].cpu().reshape(-1), scale.cpu()
    top = x
    for half in (8, 4, 2, 1):  # 3 times as fast as amax(-1)
        top = torch.maximum(top[:, :half], top[:, half:])
    first = candidate_scales(top[:, 0], scale, "max")[0].view(torch.uint8)
    offset = (chosen.int() - first.int()).clamp_(OFFSETS[0], OFFSETS[-1]).sub_(OFFSETS[0])
    largest = (chosen.view(torch.float8_e4m3fn).float() * scale * (E2M1_MAX * _ABOVE))[:, None]
    zero = (codes.cpu().reshape(-1).view(torch.int64) & _MAGNITUDES) == 0
    return torch.cat(
        (
            torch.bincount(blocks.cpu().reshape(-1), minlength=CODES),
            torch.bincount(offset, minlength=len(OFFSETS)),
            torch.tensor([zero.sum(), x.numel(), (x > largest).sum(), (x > largest * (7 / 6)).sum()]),
        )
    )


@dataclass
class Weight:
    """Sums over one weight, of its matrices (the experts of a stack, or one): numpy, of a part or of the whole.

    `errors` f64 [matrices, 2]: squared error and squared size; `scales` f64 [matrices]: weight_scale_2; `counts` i64
    [COUNTS]: of `tally`; `tokens` i64 [matrices] and `outputs` f64 [matrices, 2], squared error and size of the
    products with the calibration's inputs: 0 throughout where nothing was calibrated.
    """

    errors: np.ndarray
    scales: np.ndarray
    counts: np.ndarray
    tokens: np.ndarray
    outputs: np.ndarray
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def zeros(cls, matrices: int) -> Weight:
        """Nothing noted yet."""
        shapes = {"errors": (matrices, 2), "scales": matrices, "counts": COUNTS, "tokens": matrices}
        return cls(**{name: np.zeros(shapes.get(name, (matrices, 2)), dtype) for name, dtype in _DTYPES.items()})

    def add(self, matrix: int, sums: Tensor, scale: Tensor, counts: Tensor) -> None:
        """Adds a piece of a matrix: f64 [2] squared error and size, global scale f32 [], and its tally."""
        sums, scale = sums.cpu().numpy(), float(scale)
        with self.lock:  # lanes work on different matrices of one weight
            self.errors[matrix] += sums
            self.scales[matrix] = scale
            self.counts += counts.numpy()

    def add_tokens(self, tokens: Tensor) -> None:
        """Adds how many tokens calibrated each matrix, f32 [matrices]."""
        with self.lock:
            self.tokens += tokens.cpu().numpy().astype(np.int64)

    def add_outputs(self, matrix: int, sums: Tensor) -> None:
        """Adds a piece's f64 [2]: squared error and size of its products with the calibration's inputs."""
        sums = sums.cpu().numpy()
        with self.lock:
            self.outputs[matrix] += sums

    def merge(self, other: Weight) -> None:
        """Adds what was noted elsewhere of the same weight, each matrix in one of both places."""
        with self.lock:
            for name in _DTYPES:
                mine = getattr(self, name)
                mine += getattr(other, name)

    def state(self) -> dict[str, str | int]:
        """For JSON, exactly, in 11 KB for 288 experts."""
        noted = {name: getattr(self, name) for name in _DTYPES}
        state = {name: base64.b64encode(a.tobytes()).decode() for name, a in noted.items() if a.any()}
        return state | {"matrices": len(self.scales)}

    @classmethod
    def from_state(cls, state: dict[str, str | int]) -> Weight:
        """What `state` gave."""
        weight = cls.zeros(state["matrices"])
        for name, dtype in _DTYPES.items():
            if name in state:
                mine = getattr(weight, name)
                mine += np.frombuffer(base64.b64decode(state[name]), dtype).reshape(mine.shape)
        return weight

    @property
    def codes(self) -> np.ndarray:
        """i64 [128]: blocks by the code of their scale."""
        return self.counts[:CODES]

    @property
    def offsets(self) -> np.ndarray:
        """i64 [len(OFFSETS)]: blocks of the sample by offset."""
        return self.counts[CODES : CODES + len(OFFSETS)]

    @property
    def sqnr(self) -> np.ndarray:
        """f64 [matrices] in dB; NaN where a matrix is all zero or was not noted, inf without any error."""
        return _decibel(self.errors)

    @property
    def output_sqnr(self) -> np.ndarray:
        """Likewise of its outputs."""
        return _decibel(self.outputs)

    @property
    def zero_blocks(self) -> int:
        """Blocks whose codes are all 0."""
        return int(self.counts[-4])

    @property
    def sampled(self) -> int:
        """Weights of the sample."""
        return int(self.counts[-3])

    @property
    def above(self) -> tuple[int, int]:
        """Of the sample those beyond 6 and 7 times their block's scale. Above 7 clipping costs more than rounding."""
        return int(self.counts[-2]), int(self.counts[-1])


def _decibel(sums: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return -10 * np.log10(sums[:, 0] / sums[:, 1])


def layer_order(layer: int | None) -> int:
    """lm_head, which has no layer, comes last."""
    return 1 << 30 if layer is None else layer


_DTYPES = {"errors": "<f8", "scales": "<f8", "counts": "<i8", "tokens": "<i8", "outputs": "<f8"}


@dataclass
class Figures:
    """All that a report shows. `weights`: by layer (None: lm_head) and projection; `about`: lines of the heading.

    `precisions`, `damages`: the plan's. `problems`: the verification's, None where it was not done. `bytes_in`,
    `bytes_out`, `seconds` are of this run, and `done_before` says that an earlier one did a part. Peaks are bytes.
    """

    weights: dict[tuple[int | None, str], Weight] = field(default_factory=dict)
    title: str = ""
    about: dict[str, str] = field(default_factory=dict)
    kinds: list[Kind] = field(default_factory=list)
    precisions: dict[str, str] = field(default_factory=dict)
    damages: dict[str, dict[str, float]] = field(default_factory=dict)
    problems: list[str] | None = None
    bytes_in: int = 0
    bytes_out: int = 0
    seconds: float = 0.0
    verify_seconds: float = 0.0
    host_peak: int = 0
    gpu_peak: int = 0
    done_before: bool = False
