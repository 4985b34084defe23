"""Exclude lists and tensor names such as people write, to compare our reading of them with engines' own."""

from __future__ import annotations

import random

from quantize.engines import SplitModule, modules
from step_kernels.model.checkpoint import canonical


def some_patterns(config, plan_patterns: list[str], generator: random.Random) -> list[str]:
    """Two to four patterns: of the plan's list, or made of engines' names, cut, starred, split, of another prefix."""
    names = [m.name for engine in ("vLLM", "SGLang") for m in modules(engine, config)]
    found = generator.sample(plan_patterns, 1)
    for name in generator.sample(names, generator.randrange(1, 4)):
        parts = name.split(".")
        end = len(parts) - generator.choice([0, 0, 0, 1, 1, 2])
        cut = ".".join(parts[generator.choice([0, 0, 0, 1, 2]) : max(end, 1)]) or name
        cut = cut.replace("qkv_proj", generator.choice(["q_proj", "k_proj", "qkv_proj"]))
        cut = cut.replace("gate_up_proj", generator.choice(["gate_proj", "gate_up_proj"]))
        cut = cut.replace(
            "language_model.model", generator.choice(["language_model.model", "model.language_model", "model"])
        )
        cut = cut.replace(".moe.share_expert", generator.choice([".moe.share_expert", ".share_expert"]))
        found.append(generator.choice(["", "", "", "*", "*."]) + cut + generator.choice(["", "", "*", ".*", "."]))
    return found


def spellings(names: list[str]) -> list[tuple[str, str]]:
    """Tensors of the trunk and the vision encoder under every prefix met or feared: (as stored, canonical)."""
    prefixes = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")
    found = [(f"{prefix}{name}", name) for name in names for prefix in prefixes]
    found += [
        (f"{p}{name.removeprefix('model.')}", name) for name in names for p in prefixes if name.startswith("model.")
    ]
    return list(dict.fromkeys((stored, name) for stored, name in found if canonical(stored) == name))


def answer(excludes, *arguments) -> bool | str:
    """Whether a module is excluded, or that the rule refuses to say."""
    try:
        return excludes(*arguments)
    except (SplitModule, ValueError):
        return "split"
