"""Quality on held-out data: what NVFP4 weights and an FP8 KV cache cost in text, digit reading and kept drafts.

python -m bench.accuracy --json accuracy.json
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import quantize
from quantize.plan import BUNDLED, CALIBRATED, resolve_source
from step_kernels.cli import Parser, close_quietly
from step_kernels.model import CheckpointError, Step3p7
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import read_json
from step_kernels.model.config import StepConfig
from step_kernels.nvfp4 import SEARCHES

from . import corpus
from .accuracy_report import LEVELS, SOURCE, plot, report
from .corpus.documents import rank
from .quality import Text, compare, count_drafts, read_digits, read_text
from .run import machine

LENGTH = 512  # tokens of a document, the first one included
STRIP = 4  # digits of a picture with crops
DRAWS = 2000  # of the bootstrap
CALIBRATION = 2048  # documents of the training text for the searches that need some: 1.05 M tokens


def heldout(documents: int | None) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Texts, digits u8 [n, 8, 8] and labels u8 [n]: all, or the first documents and as large a share of the digits."""
    try:
        texts, (images, labels) = [line["text"] for line in corpus.heldout_text()], corpus.heldout_digits()
    except (EOFError, KeyError, OSError, ValueError, zipfile.BadZipFile) as e:
        raise CheckpointError(f"{corpus.HELDOUT}: holds no usable held-out data: {e}") from None
    pictures = -(-len(labels) * (documents or len(texts)) // len(texts))
    return texts[:documents], images[:pictures], labels[:pictures]


def encoded(chat: Chat, config: StepConfig, texts: list[str]) -> list[list[int]]:
    """Documents as tokens, LENGTH at most."""
    chat.tokenizer.encode_special_tokens = True  # as text: documents may speak of them
    ids = (chat.tokenizer.encode(text, add_special_tokens=False).ids for text in texts)
    return [[config.bos_id, *of][: min(LENGTH, config.max_positions)] for of in ids]


def variants() -> dict[str, quantize.Settings]:
    """What is measured beside the source: each search for the experts, then the linears too with `mse`."""
    searches = sorted(SEARCHES, key=lambda search: search != "max")
    found = {f"NVFP4 experts, {search}": quantize.Settings(search=search) for search in searches}
    return found | {"NVFP4 linears, mse": quantize.Settings(recipe="linears", search="mse")}


def calibrated(data: Path, chat: Chat, config: StepConfig, file: Path) -> dict[str, quantize.Settings]:
    """Each search by the inputs of the first training documents of LENGTH tokens, by hash; no held-out one is there."""
    texts = (d["text"] for d in sorted(corpus.read_text(data), key=lambda document: rank(document["name"])))
    rows = ([config.bos_id, *chat.tokenizer.encode(text, add_special_tokens=False).ids] for text in texts)
    rows = itertools.islice((row[:LENGTH] for row in rows if len(row) >= LENGTH), CALIBRATION)
    np.save(file, np.array(list(rows)))
    return {f"NVFP4 experts, {search}": quantize.Settings(search=search, calibration=file) for search in CALIBRATED}


def resampled(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """sum(sums) / sum(counts) in each bootstrap draw of the units; equal numbers of units have equal draws."""
    picks = np.random.default_rng(0).integers(0, len(counts), (DRAWS, len(counts)))
    return sums[picks].sum(1) / counts[picks].sum(1)


def figure(value: float, draws: np.ndarray) -> dict:
    """A value and the middle 95 % of its draws."""
    return {"value": _short(value), "interval": [_short(x) for x in np.quantile(draws, (0.025, 0.975))]}


def ratio(sums: np.ndarray, counts: np.ndarray | None = None) -> dict:
    """A ratio of sums over units (without counts: a mean) and its interval."""
    counts = np.ones(len(sums)) if counts is None else counts
    return figure(sums.sum() / counts.sum(), resampled(sums, counts))


def against(text: Text, other: Text) -> dict:
    """Mean KL of one variant over another's; each draw takes the same documents for both."""
    (value, draws), (other_value, other_draws) = (
        (t.kl_sums.sum() / t.counts.sum(), resampled(t.kl_sums, t.counts)) for t in (text, other)
    )
    return {
        "ratio": figure(value / other_value, draws / other_draws),
        "difference": figure(value - other_value, draws - other_draws),
    }


def text_figures(text: Text) -> dict:
    tokens, surprise = np.concatenate(text.kl), ratio(text.surprise, text.counts)
    return {
        "perplexity": {
            "value": _short(np.exp(surprise["value"])),
            "interval": [_short(np.exp(x)) for x in surprise["interval"]],
        },
        "kl": {
            **ratio(text.kl_sums, text.counts),
            "median": _short(np.median(tokens)),
            "99 %": _short(np.quantile(tokens, 0.99)),
            "max": _short(tokens.max()),
            "quantiles": [_short(x) for x in np.quantile(tokens, LEVELS)],
        },
        "agreement": ratio(text.hits, text.counts),
    }


def _short(x: float) -> float:
    return float(f"{x:.6g}")


def task_figures(model: Step3p7, kv_cache: str, chat: Chat, tokens: list[list[int]], images, labels) -> dict:
    """Pictures read and drafts kept by depth; None and no depths where the checkpoint has no vision or MTP layers."""
    figures = {}
    for name, each in (("digits", 1), ("strips", STRIP)):
        able = model.vision is not None and len(labels) >= each
        figures[name] = ratio(read_digits(model, kv_cache, chat, images, labels, each)) if able else None
    offered, kept = count_drafts(model, kv_cache, tokens) if model.mtp else (np.empty((0, 0)),) * 2
    return figures | {"drafts": [ratio(k, o) for k, o in zip(kept.T, offered.T)]}


def measure(source: Path, device: torch.device, documents: int | None, data: Path | None = None) -> dict:
    """Every variant through either cache, as `--json` writes it; with `data` calibrated ones too."""
    texts, images, labels = heldout(documents)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    reference = Step3p7.from_pretrained(source, device, dtype)
    config, chat = reference.config, Chat(source, reference.config)
    tokens = encoded(chat, config, texts)
    record = source / "training.json"  # its baseline was measured on all documents
    baseline = read_json(record).get("baseline") if documents is None and record.exists() else None
    if baseline and not (isinstance(baseline, dict) and baseline.keys() >= {"name", "perplexity"}):
        raise CheckpointError(f"{record}: baseline: got {baseline!r}, wanted a name and a perplexity")
    rows, found, settings = [], {}, variants()
    with tempfile.TemporaryDirectory() as folder, tqdm(desc="measuring", disable=None, leave=False) as bar:
        if data is not None:
            settings |= calibrated(data, chat, config, Path(folder) / "calibration.npy")
        bar.reset(5 * len(settings) + 5)
        hidden = read_text(reference, "model", tokens)
        bar.update()
        for i, name in enumerate((SOURCE, *settings)):
            model = reference
            if name in settings:
                path = Path(folder) / str(i)
                quantize.run(source, path, settings[name], verify=False)
                bar.update()
                model = Step3p7.from_pretrained(path, device, dtype)
                shutil.rmtree(path)  # one result at a time: the big model's are 110 GB each
            for kv_cache in ("model", "fp8"):
                bar.set_postfix_str(f"{name}, {kv_cache}")
                text = compare(tokens, (reference, hidden), (model, read_text(model, kv_cache, tokens)))
                bar.update()
                tasks = task_figures(model, kv_cache, chat, tokens, images, labels)
                bar.update()
                rows.append({"weights": name, "kv_cache": kv_cache, **text_figures(text), **tasks})
                found[name, kv_cache] = text
    plain, *others = settings
    pairs = [(name, plain if settings[name].recipe == "experts" else "NVFP4 experts, mse") for name in others]
    return {
        **machine(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "dtype": str(dtype).removeprefix("torch."),
        "documents": len(tokens),
        "tokens": sum(len(ids) - 1 for ids in tokens),
        "digits": len(labels),
        "strip": STRIP,
        "rows": rows,
        "comparisons": [
            {"weights": a, "against": b, **against(found[a, "model"], found[b, "model"])} for a, b in pairs
        ],
        "baseline": baseline,
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m bench.accuracy",
        description=__doc__.splitlines()[0],
        epilog="example: python -m bench.accuracy --json accuracy.json --plot accuracy.svg",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, default=Path(BUNDLED), metavar="CHECKPOINT",
                        help="a folder in BF16 with a tokenizer.json (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="f32 compute on cpu, bfloat16 on a GPU (default here: %(default)s)")  # fmt: skip
    parser.add_argument("--calibration", type=Path, metavar="DATA",
                        help="measure hessian and gptq too, calibrated with the training text that `python -m "
                        "bench.corpus DATA` made")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there, as .svg or .png; needs matplotlib")
    parser.add_argument("--documents", type=int, metavar="N",
                        help="only the first N documents and as large a share of the digits")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        device = torch.device(options.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        parser.error(f"--device: got {options.device}, wanted cpu, cuda or cuda:N")
    options.device = device
    if options.documents is not None and options.documents < 1:
        parser.error(f"--documents: got {options.documents}, wanted at least 1")
    for flag, file in (("--json", options.json), ("--plot", options.plot)):
        if file and not file.absolute().parent.is_dir():
            parser.error(f"{flag}: {file.parent} is not a folder")
        if file and file.is_dir():
            parser.error(f"{flag}: got {file}, a folder, wanted a file")
    if options.plot and options.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot: got {options.plot}, wanted a name that ends in .svg or .png")
    return options


def _require_matplotlib() -> None:
    """Asked before minutes of work."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot: matplotlib is not installed; pip install matplotlib")


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        if options.plot:
            _require_matplotlib()
        result = measure(resolve_source(options.checkpoint), options.device, options.documents, options.calibration)
        print(report(result), flush=True)
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
        if options.plot:
            plot(result, options.plot)
    except BrokenPipeError:
        close_quietly()
        return 1
    except (CheckpointError, ImportError, OSError, RuntimeError, ValueError, quantize.UsageError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
