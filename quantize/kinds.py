"""A plan's tensors sorted by what they are for: how many bytes each kind has, and why some stay as they were."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from step_kernels.model.checkpoint import DTYPES, Entry, canonical

from .layout import FP8, NVFP4, fp8_bytes, layer_number, nvfp4_bytes
from .plan import Plan

_LEFT = "left"  # by the recipe, or by what was chosen in its place
# Kind, what its canonical names hold, and what keeps it in the source's precision.
_RULES = (
    ("vision", r"vision_model|vit_large_projector", "engines build it unquantized"),
    ("routed experts", r"\.moe\.(gate|up|down)_proj\.", ""),
    ("share expert", r"\.share_expert\.", _LEFT),
    ("dense MLP", r"\.mlp\.", _LEFT),
    ("attention's g_proj", r"\.self_attn\.g_proj\.", "engines build it unquantized; small"),
    ("attention", r"\.self_attn\.[qkvo]_proj\.", _LEFT),
    ("router", r"\.moe\.", "small; it chooses the experts"),
    ("embedding", r"embed_tokens", "rows are looked up, not multiplied"),
    ("lm_head", r"lm_head", "only on request"),
    ("norms and others", r"", "small vectors"),
)
_MTP = ("MTP layers", "only drafts; the release keeps them")
_MTP_REST = ("MTP layers", "engines build eh_proj unquantized; heads as lm_head")
_SCALES = ("input and KV cache scales", "factors that engines ask for")


@dataclass(frozen=True)
class Kind:
    """Tensors of one kind and precision: how many, their weights, bytes in the source and in the result.

    `why`: what keeps them in the source's precision, '' for those in NVFP4 or FP8.
    """

    name: str
    precision: str
    tensors: int
    weights: int
    source: int
    result: int
    why: str = ""


def kinds(plan: Plan) -> list[Kind]:
    """All of the source's tensors, and the scalars that are added; `result` adds up to the bytes of the output's."""
    sums: dict[tuple[str, str, str], list[int]] = {}
    left = f"not in recipe {plan.settings.recipe}" if plan.is_by_recipe else "chosen to stay"

    def count(name: str, precision: str, why: str, *numbers: int) -> None:
        row = sums.setdefault((name, precision, why), [0, 0, 0, 0])
        sums[name, precision, why] = [a + b for a, b in zip(row, numbers)]

    for group in plan.groups:
        for weight in group.weights:
            entry, inverse = plan.checkpoint.entry(weight), f"{weight}_scale_inv"
            source = _size(entry) + (_size(plan.checkpoint.entry(inverse)) if inverse in plan.checkpoint else 0)
            precision, result = {NVFP4: ("NVFP4", nvfp4_bytes), FP8: ("FP8", fp8_bytes)}[group.precision]
            count(_kind(plan, weight)[0], precision, "", 1, math.prod(entry.shape), source, result(entry.shape))
    names = {dtype: name for name, dtype in DTYPES.items()}
    for entry, _, _ in plan.copies:
        name, why = _kind(plan, canonical(entry.stored_name))
        why = left if why == _LEFT else why
        count(name, names[entry.dtype], why, 1, math.prod(entry.shape), _size(entry), _size(entry))
    scalars = sum(math.prod(plan.shards[c.file][c.name][1]) for c in plan.constants)
    count(_SCALES[0], "F32", _SCALES[1], len(plan.constants), 0, 0, 4 * scalars)
    found = [Kind(name, precision, *row, why) for (name, precision, why), row in sums.items()]
    return sorted(found, key=lambda kind: (kind.name == _SCALES[0], bool(kind.why), -kind.source))


def _kind(plan: Plan, name: str) -> tuple[str, str]:
    """A canonical name's kind, and what keeps it as it was."""
    layer = layer_number(name)
    if layer is not None and layer >= plan.config.num_layers:
        return _MTP_REST if plan.settings.mtp else _MTP
    return next((kind, why) for kind, pattern, why in _RULES if re.search(pattern, name))


def _size(entry: Entry) -> int:
    return entry.end - entry.begin
