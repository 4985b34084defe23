"""The model card of a conversion: README.md beside its weights, the same bytes on every run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import step_kernels

from .errors import Errors, decibel
from .formats import COMPRESSED
from .kinds import Kind, kinds
from .layout import FP8, layer_number
from .plan import Plan, Settings

CARD, SOURCE_CARD = "README.md", "SOURCE_README.md"
_LICENSE = re.compile(r"(?im)^\W*(licen[cs]e\w*\W*:.*)$")
_DEFAULTS = Settings()


def page(plan: Plan, errors: Errors) -> bytes:
    """The card, in Markdown. `errors`: of all weights, those that an earlier run converted among them."""
    given, source = plan.checkpoint.folder / CARD, plan.checkpoint.folder.resolve().name
    text = given.read_text(encoding="utf-8", errors="replace") if given.is_file() else ""
    head = _front_matter(text)
    parts = ["---", *head, "tags:", "- nvfp4", "---", "", f"# {source} in NVFP4", "", *_about(plan, source), ""]
    parts += ["## How it was made", "", *_settings(plan), "", "## Sizes", "", *_sizes(kinds(plan)), ""]
    parts += [
        "## Error of the weights",
        "",
        *_errors(errors, FP8 in plan.precisions.values()),
        "",
        "## Serving",
        "",
        *_serving(plan),
    ]
    if text:
        found = _LICENSE.search(text)
        parts += ["", "## The source", "", f"Its card is [{SOURCE_CARD}]({SOURCE_CARD})."]
        parts += [f"On the licence it says: “{found[1].strip()}”"] if found else []
    return ("\n".join(parts) + "\n").encode()


def _front_matter(text: str) -> list[str]:
    """The lines about the licence in a card's front matter."""
    matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    return re.findall(r"(?m)^(license\w*:[^\r\n]*)", matter[1]) if matter else []


def _about(plan: Plan, source: str) -> list[str]:
    fp8 = FP8 in plan.precisions.values()
    others = ["Linear layers in FP8 have 8-bit codes (e4m3) with a 32-bit scale a row."] if fp8 else []
    layout = "compressed-tensors, experts one by one" if plan.settings.format == COMPRESSED else "modelopt, stacked"
    return [
        f"The weights of `{source}`, converted by step-kernels {step_kernels.__version__} to NVFP4: 4-bit codes (e2m1)",
        "in blocks of 16 with an 8-bit scale (e4m3) each, and a 32-bit scale a matrix; layout of",
        f"{layout}. Tensors that are not in NVFP4{' or FP8' * fp8} have the source's bytes.",
        *others,
    ]


def _settings(plan: Plan) -> list[str]:
    settings = plan.settings
    what = "the routed experts" if settings.recipe == "experts" else "all linear layers of the trunk but the router"
    if settings.recipe == "mixed":
        what += f", each in NVFP4, FP8 or as it was, by what that changes, in at most {settings.bits:g} bits a weight"
    what += ", and in FP8 the trunk's other linear layers but the router" * (settings.rest == FP8)
    what += ", lm_head" * settings.lm_head + ", the MTP layers' attention and MLP" * settings.mtp
    search = {"max": "amax / 6 of a block", "four-six": "the better of amax / 6 and amax / 4"}
    search |= {"mse": "least squared error of nine scales", "hessian": "least error of outputs, in blocks of 16 inputs"}
    search |= {"gptq": "least error of outputs, codes by GPTQ"}
    rows = [("recipe", f"`{settings.recipe}`: {what}"), ("search", f"`{settings.search}`: {search[settings.search]}")]
    if plan.tokens is None:
        rows.append(("calibration", "none: input scales are 1.0"))
    else:
        rows.append(("calibration", f"`{Path(settings.calibration).name}`, {plan.tokens.numel():,} tokens"))
    scales = "" if settings.kv_cache == "none" else f", scales {settings.kv_scales.replace('cast', '1.0')}"
    rows.append(("KV cache", ("as the engine has it" if settings.kv_cache == "none" else "FP8") + scales))
    options = [f" --{k.replace('_', '-')}" + (f" {v}" if v is not True else "") for k, v in _changed(plan)]
    table = [f"| {name} | {value} |" for name, value in rows]
    return ["| | |", "| --- | --- |", *table, "", f"`python -m quantize.nvfp4 SRC DST{''.join(options)}`"]


def _changed(plan: Plan) -> list[tuple[str, object]]:
    """The settings that are not the default's; of a path the file's name, so that it depends on no folder."""
    found = [(name, value) for name, value in vars(plan.settings).items() if value != getattr(_DEFAULTS, name)]
    return [(name, Path(value).name if name == "calibration" else value) for name, value in found]


def _sizes(found: list[Kind]) -> list[str]:
    lines = ["| what | in | weights | source, MB | result, MB | bits a weight |", "| --- | --- | " + "---: | " * 4]
    whole = Kind("all", "", *(sum(getattr(k, n) for k in found) for n in ("tensors", "weights", "source", "result")))
    for kind in (*found, whole):
        bits = f"{8 * kind.result / kind.weights:.2f}" if kind.weights else ""
        sizes = f"{kind.source / 1e6:,.2f} | {kind.result / 1e6:,.2f}"
        lines.append(f"| {kind.name} | {kind.precision} | {kind.weights:,} | {sizes} | {bits} |")
    return [line.rstrip() for line in lines]


def _errors(errors: Errors, fp8: bool) -> list[str]:
    gaussian = "20.4 dB with `max` and 21.8 with `mse`" + ", in FP8 31.5" * fp8
    lines = [f"Against the source, over all layers; Gaussian weights give {gaussian}.", ""]
    lines += ["| projection | SQNR, dB | relative MSE | worst layer, dB |", "| --- | ---: | ---: | ---: |"]
    for projection in dict.fromkeys(p for _, p in errors.sums):
        keys = [key for key in errors.sums if key[1] == projection]
        relative, worst = errors.relative(keys), max(errors.relative([key]) for key in keys)
        numbers = f"{_decibel(relative)} | {relative:.4f} | {_decibel(worst)}"
        lines.append(f"| {projection} | {numbers} |")
    return lines


def _serving(plan: Plan) -> list[str]:
    settings, layers = plan.settings, len(plan.config.layers) - plan.config.num_layers
    drafts = any((layer_number(n) or 0) >= plan.config.num_layers for n in plan.checkpoint.entries)
    compressed, fp8 = settings.format == COMPRESSED, settings.kv_cache == "fp8"
    mixed = FP8 in plan.precisions.values()
    vllm = "vllm serve DST --tensor-parallel-size 4 --enable-expert-parallel --disable-cascade-attn"
    vllm += "" if compressed else " --quantization modelopt"
    vllm += " --kv-cache-dtype fp8" if fp8 else ""
    if drafts:
        vllm += f" --speculative-config '{json.dumps({'method': 'mtp', 'num_speculative_tokens': layers})}'"
    since = "0.33 (0.25 takes FP8 codes for weights)" if mixed and not compressed else "0.25" if mixed else "0.23"
    lines = [f"DST is this folder. vLLM, since {since}:", "", "```bash", vllm, "```"]
    if compressed:
        return [*lines, "", "SGLang, TensorRT-LLM and step-kernels read the modelopt layout, not this one."]
    own = f"python -m step_kernels.generate DST{' --mtp' if drafts else ''} --prompt 'What is this?' --stats"
    own = ["step-kernels:", "", "```bash", own, "```"]
    if mixed:
        return [*lines, "", *own, "", "SGLang 0.5.23 does not read FP8 with a scale a row beside NVFP4."]
    sglang = "sglang serve --model-path DST --tp 4 --ep 4 --quantization modelopt_fp4"
    sglang += " --moe-runner-backend flashinfer_trtllm --attention-backend trtllm_mha"
    sglang += " --kv-cache-dtype fp8_e4m3" if fp8 else ""
    lines += ["", "SGLang, on Blackwell:" if not settings.mtp else "SGLang, on Blackwell and without MTP:", ""]
    lines += ["```bash", sglang, "```"]
    if plan.config.vision:
        lines += ["", "TensorRT-LLM, since 1.3.0rc18:", ""]
        lines += ["```bash", "trtllm-serve DST --tp_size 4 --ep_size 4", "```"]
    return [*lines, "", *own]


def _decibel(relative: float) -> str:
    return "exact" if math.isinf(decibel(relative)) else f"{decibel(relative):.2f}"
