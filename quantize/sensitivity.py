"""A precision for each group of linears: the least damage to the model that a number of bits a weight allows.

The damage of a group is the relative change of the residual stream behind its layer when it alone is quantized. On the
bundled model, beside NVFP4 experts, the KL that groups add is 1.5 times their damages' sum, whatever the layers (1.3 to
1.5 of each). The KL of one group quantized alone ranks them worse: where nothing else errs, small changes of early
layers flip routers far behind them, which the experts' own errors do anyway.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels import nvfp4
from step_kernels.model.attention import WholeSequences
from step_kernels.model.checkpoint import Checkpoint, CheckpointError
from step_kernels.model.config import StepConfig
from step_kernels.model.decoder import DecoderLayer
from step_kernels.model.formats import fp8_channels
from step_kernels.model.layers import RMSNorm, linear
from step_kernels.model.memory import Tapped
from step_kernels.model.weights import Weights

from .calibration import Calibration
from .layout import FP8, NVFP4, SOURCE, fp8_bytes, is_expert, layer_number, weight_groups
from .matrices import quantize_piece
from .plan import NVFP4_BITS, Plan, make_plan

SEQUENCES = 16  # of the calibration's, spread over them: 32,768 tokens
_HEAD = 32  # of these tokens one in 32 is read as logits: 0.5 GB of Step-3.7's in f32
_NOISE = 1e-3  # |noise|^2 / |hidden|^2 that lm_head's damage is compared with


def mixed(plan: Plan, device: torch.device, progress: bool = False, damages: dict | None = None) -> Plan:
    """The plan of the mixed recipe anew, with the precisions that do least damage within settings.bits a weight.

    `damages`: what measure gave, if it has been called.
    """
    checkpoint, config, settings = plan.checkpoint, plan.config, plan.settings
    options, weights = more_bits(plan)
    if not damages:
        groups = [group for group in weight_groups(config) if group[0] in options]
        damages = measure(checkpoint, config, groups, plan.tokens, device, settings.plain_search, progress)
    points = {leader: {p: (n, damages[leader][p]) for p, n in of.items()} for leader, of in options.items()}
    plan = make_plan(checkpoint, settings, choose(points, (settings.bits - NVFP4_BITS) * weights))
    plan.damages = damages
    return plan


def more_bits(plan: Plan) -> tuple[dict[str, dict[str, float]], int]:
    """What each precision takes beyond NVFP4's bits, by the first weight of each group that a plan has in NVFP4 and
    tokens reach, the routed experts aside; and how many weights these groups and the experts have.

    Scales of rows are counted, those of matrices not.
    """
    options, weights = {}, 0
    for group in weight_groups(plan.config):
        entries = [plan.checkpoint.entry(name) for name in group if plan.precisions[group[0]] == NVFP4]
        count = sum(math.prod(entry.shape) for entry in entries)
        if entries and is_expert(group[0]):
            weights += count
        elif entries and (layer_number(group[0]) or 0) < plan.config.num_layers:
            weights += count
            options[group[0]] = {
                NVFP4: 0.0,
                FP8: 8 * sum(fp8_bytes(entry.shape) for entry in entries) - NVFP4_BITS * count,
                SOURCE: 8 * sum(entry.end - entry.begin for entry in entries) - NVFP4_BITS * count,
            }
    return options, weights


@torch.inference_mode()
def measure(
    checkpoint: Checkpoint,
    config: StepConfig,
    groups: list[tuple[str, ...]],
    tokens: Tensor,
    device: torch.device,
    search: str,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """The damage of each precision by the first weight of each group, linears of the trunk or lm_head.

    Mean over tokens of |change|^2 / |hidden|^2 behind the layer; of lm_head what noise on the last hidden states would
    have to be for the same KL. `tokens` i64 [sequences, length]. One layer's weights are on the device at a time,
    hidden states in host memory.
    """
    run, found = Calibration(checkpoint, config, tokens[:: -(-len(tokens) // SEQUENCES)], device, search), {}
    for index in tqdm(range(config.num_layers), desc="measuring", disable=None if progress else True):
        found |= _layer(run, index, [g for g in groups if g[0].startswith(f"model.layers.{index}.")], search)
    if ("lm_head.weight",) in groups:
        found["lm_head.weight"] = _head(run, search)
    for leader, damages in found.items():
        if not all(math.isfinite(damage) for damage in damages.values()):
            raise CheckpointError(f"{leader}: calibration tokens reach it as NaN or infinity")
    return found


def choose(options: dict[str, dict[str, tuple[float, float]]], budget: float) -> dict[str, str]:
    """Group -> precision -> bits and damage, and how many bits all may have -> each group's precision.

    Steps along the lower convex hull of each group's points, those that gain most a bit first, as far as they fit: the
    sum of damages is above the least possible by less than the first step that did not fit would have gained.
    """
    steps, chosen = [], {}
    for group, points in options.items():
        hull = _hull(points)
        budget -= hull[0][0]
        chosen[group] = hull[0][2]
        steps += [(_rate(a, b), b[0] - a[0], group, b[2]) for a, b in zip(hull, hull[1:])]
    full: set[str] = set()  # groups whose next step did not fit
    for _, bits, group, precision in sorted(steps, key=lambda step: -step[0]):
        if bits > budget or group in full:
            full.add(group)
            continue
        budget -= bits
        chosen[group] = precision
    return chosen


def _hull(points: dict[str, tuple[float, float]]) -> list[tuple[float, float, str]]:
    """From the fewest bits to the least damage: bits, damage, precision."""
    hull: list[tuple[float, float, str]] = []
    for point in sorted((*point, precision) for precision, point in points.items()):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) <= _rate(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _rate(a: tuple, b: tuple) -> float:
    """Damage that each more bit saves."""
    return (a[1] - b[1]) / (b[0] - a[0])


def _layer(run: Calibration, index: int, groups: list[tuple[str, ...]], search: str) -> dict[str, dict[str, float]]:
    """Damages of a layer's groups; leaves the run's hidden states behind the layer."""
    weights, plain, changed, device = _Held(run.weights), {}, {}, run.weights.device

    def made(tap: Callable) -> DecoderLayer:
        return DecoderLayer(Tapped(weights, tap), index, run.config)

    layer = made(plain.setdefault)
    for group in groups:
        for precision, decoded in _DECODED.items():
            values = dict(zip(group, decoded([plain[name] for name in group], search)))
            changed[group[0], precision] = made(values.get)
    sums, tokens = dict.fromkeys(changed, 0.0), sum(map(len, run.hidden))
    for kept in run.hidden:
        hidden, context = kept.to(device), WholeSequences(len(kept) // run.length, run.length, device)
        normed, attended, out = _parts(layer, hidden, context)
        behind = hidden.float() + attended + out
        for (leader, precision), other in changed.items():
            if ".self_attn." in leader:
                _, other_attended, other_out = _parts(other, hidden, context)
                change = other_attended - attended + (other_out - out)
            else:  # the routed experts' share of the sum stays
                before, now = (getattr(ffn, "share", ffn)(normed).float() for ffn in (layer.ffn, other.ffn))
                change = now - before
            sums[leader, precision] += float((change.square().sum(-1) / behind.square().sum(-1)).sum())
        kept.copy_(behind.to(kept.dtype))
    return {
        group[0]: {SOURCE: 0.0} | {precision: sums[group[0], precision] / tokens for precision in _DECODED}
        for group in groups
    }


def _parts(layer: DecoderLayer, hidden: Tensor, context: WholeSequences) -> tuple[Tensor, Tensor, Tensor]:
    """What its MLP takes, and in f32 what its attention and its MLP add: in bf16 the sum would round a change off."""
    attended = layer.attention(layer.input_norm(hidden), context)
    normed, _ = layer.post_norm.of_sum(hidden, (attended,))
    out = layer.ffn(normed)
    out = sum(t.float() for t in out) if isinstance(out, tuple) else out.float()
    return normed, attended.float(), out


def _head(run: Calibration, search: str) -> dict[str, float]:
    config, hidden = run.config, torch.cat(run.hidden)[::_HEAD].to(run.weights.device)
    norm = RMSNorm(run.weights, "model.norm", config.hidden_size, config.rms_norm_eps)
    head = run.weights.linear("lm_head", config.vocab_size, config.hidden_size)

    def log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
        return linear(norm(hidden), head, torch.float32).log_softmax(-1)

    def divergence(q: Tensor) -> float:
        return float((wanted.exp() * (wanted - q)).sum(-1).mean())

    wanted = log_probabilities(hidden, head)
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden)
    noise *= math.sqrt(_NOISE) * hidden.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    unit = divergence(log_probabilities(hidden + noise, head)) / _NOISE
    found = {
        p: divergence(log_probabilities(hidden, *decoded([head], search))) / unit for p, decoded in _DECODED.items()
    }
    return {SOURCE: 0.0} | found


class _Held:
    """Weights that are read once, however many layers are made of them."""

    def __init__(self, weights: Weights):
        self.device, self.dtype = weights.device, weights.dtype
        for kind in ("tensor", "scalar", "linear", "experts"):
            setattr(self, kind, functools.cache(getattr(weights, kind)))


def _nvfp4(weights: list[Tensor], search: str) -> list[Tensor]:
    """Linears with one global scale, quantized and decoded."""
    scale = nvfp4.global_scale(torch.stack([w.abs().amax().float() for w in weights]).amax(), search)
    decoded = []
    for weight in weights:
        codes, blocks, _ = (t.to(weight.device) for t in quantize_piece(weight, scale, search))
        decoded.append(nvfp4.dequantize(codes, blocks.view(torch.float8_e4m3fn), scale, weight.dtype))
    return decoded


def _fp8(weights: list[Tensor], _search: str) -> list[Tensor]:
    return [fp8_channels(weight).dequantize(weight.dtype) for weight in weights]


_DECODED = {NVFP4: _nvfp4, FP8: _fp8}
