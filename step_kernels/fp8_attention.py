"""Attention with all products in FP8: queries and probabilities rounded to e4m3, for Hopper's FP8 tensor cores over an
e4m3 cache. Faster for many tokens that see all keys and less accurate, so only on request.

On Gaussian data outputs move by 3.9 % of their size: 2.8 % by the rounding of queries, 2.6 % by that of probabilities.
The former grows with the scores. A key of less than 2^-17 of its query's largest weight may count for nothing.
Kernels that do so refuse every call unless the environment has STEP_KERNELS_FP8_ATTENTION=1.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

LIFT = 7  # probabilities are rounded times 2^7, relative to a power of two above the largest


def refuse() -> str | None:
    """Why an FP8 kernel may not serve: nobody allowed it to round queries and probabilities to FP8."""
    if os.environ.get("STEP_KERNELS_FP8_ATTENTION") != "1":
        return "rounds queries and probabilities to FP8; STEP_KERNELS_FP8_ATTENTION=1 allows that"


def round_queries(q: Tensor) -> Tensor:
    """[..., d] float -> the same times e4m3's rounding, f32 (f64 for f64): a power of two a row brings the largest into
    [2^7, 2^8), and is at most 2^127. A row with an infinity or a NaN becomes NaN."""
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    largest = q.abs().amax(-1, keepdim=True)
    clamped = largest.clamp(min=2.0**-120)
    mantissa, _ = torch.frexp(clamped)  # in [0.5, 1)
    scale = clamped / mantissa * 2.0**-8  # exact, as a power function need not be
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (q / scale).to(torch.float8_e4m3fn).to(q.dtype) * scale


def weigh(scores: Tensor) -> tuple[Tensor, Tensor]:
    """[..., keys] float, -inf where hidden -> probabilities of e4m3's precision, and the log of their sum before that.

    The sum is of rounded ones: a single key that matters has all the weight. Rows of no key become zeros.
    """
    if scores.shape[-1] == 0:  # has no maximum
        return scores, scores.new_full(scores.shape[:-1], -torch.inf)
    exponents = scores * math.log2(math.e)
    shift = exponents.amax(-1, keepdim=True).ceil()
    shift = torch.where(shift == -torch.inf, 0.0, shift)
    rounded = (exponents - shift + LIFT).exp2().to(torch.float8_e4m3fn).to(scores.dtype)
    total = rounded.sum(-1, keepdim=True)
    return rounded / torch.where(total == 0, 1.0, total), (total.log2() + shift - LIFT).squeeze(-1) * math.log(2)
