"""What a checkpoint's scales must be: positive numbers, and one global scale for what engines hold in one matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels import nvfp4
from step_kernels.model.checkpoint import read_piece

from .checks import State, places
from .findings import size
from .formats import Channels, Stored
from .measure import misread_error, owners, sample_rows, samples

_POSITIVE = "scales are not positive numbers"
_INPUT = "vLLM divides by it: NaN or empty answers"
_GATES = "vLLM and, but for its TRT-LLM kernels, SGLang read up with gate's scale; TensorRT-LLM both with the larger"
_LARGEST = "vLLM and SGLang read all with the largest"


def scales(state: State, quick: bool, bar: tqdm) -> None:
    """(b) No scale that is zero, negative or NaN; gate and up, and q, k and v, with one global scale."""
    found, outer, blocks_read, blocks = state.findings, {}, 0, 0
    for weight, parts in state.model.quantized.items():
        most = max(1 << 14, (1 << 20) // len(parts))  # bytes of each with `quick`
        for stored in parts:
            name = stored.names[1]
            if name in state.sound:
                blocks += state.sound[name].end - state.sound[name].begin
                blocks_read += _blocks(state, stored, quick, most, bar)
        outer[weight] = _scalars(state, parts, 2, "")
        inputs = _scalars(state, parts, 3, _INPUT)
        if inputs is not None and state.claims.weights_only:
            found.note("b", "is there, though activations stay in BF16", parts[0].names[3])
    for group in state.model.groups:
        _same(state, group, outer)
    rows = sum(_rows(state, channels, bar) for (channels,) in state.model.channels.values())
    _cache_scales(state)
    count = sum(len(s) for s in outer.values() if s is not None)
    share = "all" if blocks_read == blocks else size(blocks_read)
    found.done["b"] = f"{count:,} global scales, {share} of {size(blocks)} of block scales"
    found.done["b"] += f", {rows:,} scales of rows in FP8" if rows else ""


def _blocks(state: State, stored: Stored, quick: bool, most: int, bar: tqdm) -> int:
    """Looks at a weight's block scales; gives the bytes read."""
    entry, bad, total = state.sound[stored.names[1]], {}, 0
    per_matrix = math.prod(stored.shape[-2:]) // nvfp4.BLOCK
    for piece in places(entry, quick, most):
        codes = read_piece(piece)
        total += len(codes)
        bar.update(len(codes))
        low, high = codes.aminmax()
        if low > 0 and high < 0x7F:
            continue
        at = ((codes == 0) | (codes >= 0x7F)).nonzero().flatten() + (piece.begin - entry.begin)
        for matrix, count in zip(*(t.tolist() for t in (at // per_matrix).unique(return_counts=True))):
            bad[matrix] = bad.get(matrix, 0) + count
    if bad:
        labels = dict(stored.matrices())
        which = f"{labels[min(bad)]}: {bad[min(bad)]}".removeprefix(": ")
        which += f", and {len(bad) - 1} more experts" if len(bad) > 1 else ""
        effect = "a zero erases 16 weights, NaN spreads to every token, engines differ on negative ones"
        state.findings.fail("b", "block scales are zero, negative or NaN", stored.names[1], which, effect)
    return total


def _rows(state: State, channels: Channels, bar: tqdm) -> int:
    """Looks at all row scales of a linear in FP8 and at the codes of sampled rows; gives how many scales there are."""
    if not set(channels.names) <= state.sound.keys():
        return 0
    codes, scales = channels.names
    values = state.contents.read(scales).reshape(-1)
    bar.update(values.nbytes)
    bad = int((~(torch.isfinite(values) & (values > 0))).sum())
    if bad:
        effect = "an output that is 0, negated or NaN for every token"
        state.findings.fail("b", _POSITIVE, scales, f"{bad} of {len(values)} rows", effect)
    parts = [sample_rows(state.contents, channels, codes, 0, at) for at, _ in samples(owners([channels]))]
    top = torch.cat([part.view(torch.uint8) & 0x7F for part in parts]).amax(-1)
    if (top == 0x7F).any():
        state.findings.fail("b", "codes are NaN", codes, f"{int((top == 0x7F).sum())} of {len(top)} rows read")
    low = (top != 0) & (top < 0x7E)
    if low.any():
        effect = "no row's amax / 448 is its scale: coarser than need be, or scales and codes do not belong together"
        state.findings.note("b", "rows have no code of 448", codes, f"{int(low.sum())} of {len(top)} read", effect)
    return len(values)


def _scalars(state: State, parts: list[Stored], kind: int, effect: str) -> Tensor | None:
    """The global (2) or input (3) scales of a weight, f32 [matrices] as they multiply; None where any is missing."""
    if any(s.names[kind] not in state.sound for s in parts):
        return None
    values = torch.cat([state.contents.read(s.names[kind]).reshape(-1).float() for s in parts])
    found = owners(parts)
    bad = (~(torch.isfinite(values) & (values > 0))).nonzero().flatten().tolist()
    if bad:
        stored, _, label = found[bad[0]]
        detail = f"{label}: {values[bad[0]]}".removeprefix(": ")
        detail += f", and {len(bad) - 1} more experts" if len(bad) > 1 else ""
        state.findings.fail("b", _POSITIVE, stored.names[kind], detail, effect)
    return 1 / values if parts[0].inverse else values


def _same(state: State, group: tuple[str, ...], outer: dict[str, Tensor | None]) -> None:
    """One global scale for weights that engines hold in one matrix; if not, what it costs."""
    if any(outer[weight] is None for weight in group):
        return
    experts = ".moe." in group[0]
    used = outer[group[0]] if experts else torch.stack([outer[w] for w in group]).amax(0)
    for weight in group:
        own, parts = outer[weight], state.model.quantized[weight]
        ratio = used / own
        usable = (ratio > 0) & torch.isfinite(ratio)  # others are said already
        wrong = ((used != own) & usable).nonzero().flatten()
        if not len(wrong):
            continue
        low, high = (r.item() for r in ratio[wrong].aminmax())
        worst = wrong[(ratio[wrong] - 1).abs().argmax()].item()
        owner, matrix, label = owners(parts)[worst]
        costs = misread_error(state, owner, matrix, own[worst], used[worst])
        count = f"{len(wrong)} of {len(own)} experts, " if experts else ""
        detail = f"{count}ratio {low:.3g} to {high:.3g}" if low != high else f"{count}ratio {low:.3g}"
        detail += f"; {label} misread: relative MSE {costs}".replace("  ", " ")
        whose = f"{group[0].split('.')[-2]}'s" if experts else "the largest it is computed with"
        state.findings.fail("b", f"differs from {whose}", owner.names[2], detail, _GATES if experts else _LARGEST)


def _cache_scales(state: State) -> None:
    """k_scale and v_scale of the KV cache: both or none of a layer, positive, and best 1."""
    found, trunk = state.findings, state.model.config.num_layers
    names = [[f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for p in "kv"] for i in range(trunk)]
    there = [[name for name in pair if name in state.contents] for pair in names]
    if state.claims.cache and not any(there):
        found.note("b", "k_scale and v_scale are in no layer", "KV cache", effect="vLLM and SGLang take 1.0")
    if not state.claims.cache and any(there):
        found.note("b", "k_scale and v_scale are there", "KV cache", effect="unused: no config asks for an FP8 cache")
    for mine, pair in zip(there, names):
        if any(there) and len(mine) < 2:
            lacking = next(name for name in pair if name not in mine)
            found.fail("b", "is missing", lacking, effect="vLLM takes the other of k and v for it, or 1.0 for both")
        for name in (n for n in mine if n in state.sound):
            value = state.contents.read(name).float().item()
            if not 0 < value < math.inf:
                found.fail("b", _POSITIVE, name, str(value), "vLLM stops or stores NaN in the cache")
            elif value != 1:
                found.note("b", "KV scale is not 1", name, f"{value:.4g}", "vLLM uses it, SGLang takes 1.0")
