"""What the precisions of linears cost: the bundled model's KL by bits a weight, as --bits chooses them and otherwise.

python -m bench.mixed calibration.txt
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

import torch

import quantize
from quantize.layout import FP8, NVFP4, PRECISIONS
from quantize.plan import BUNDLED, NVFP4_BITS, Plan, make_plan, resolve_source
from quantize.sensitivity import mixed, more_bits
from step_kernels.cli import Parser
from step_kernels.model import CheckpointError, Step3p7
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import Checkpoint

from .accuracy import against, encoded, heldout, ratio
from .quality import compare, read_text

BITS, EQUAL = (4.6, 4.75, 5.0, 5.25, 6.0), 5.0  # budgets, and the one that precisions at random have
ENDS, RANDOM = ("all source", "all nvfp4"), 3  # what has no choice, and how many are chosen at random
NATS = 1.5  # of KL that a unit of damage adds, by text of the training corpus


def rivals(damages: dict, options: dict, room: float) -> dict[str, dict[str, str]]:
    """Precisions chosen without measuring; those at random are FP8 where that fits in `room` bits beyond NVFP4's."""
    found = {f"all {precision}": dict.fromkeys(damages, precision) for precision in reversed(PRECISIONS)}
    found["attention fp8"] = {leader: FP8 if ".self_attn." in leader else NVFP4 for leader in damages}
    found["layers 0, 1, 7 fp8"] = {leader: FP8 if leader.split(".")[2] in "017" else NVFP4 for leader in damages}
    for seed in range(RANDOM):
        chosen, left, order = dict.fromkeys(damages, NVFP4), room, list(damages)
        random.Random(seed).shuffle(order)
        for leader in order:
            if options[leader][FP8] <= left:
                chosen, left = chosen | {leader: FP8}, left - options[leader][FP8]
        found[f"random {seed}"] = chosen
    return found


def report(calibration: str, documents: int | None) -> None:
    """Prints Markdown, each line when it is known."""
    source, cpu = resolve_source(BUNDLED), torch.device("cpu")

    def plan(bits: float, damages: dict | None = None) -> Plan:
        settings = quantize.Settings(recipe="mixed", bits=bits, calibration=calibration)
        return mixed(make_plan(Checkpoint(source), settings), cpu, True, damages)

    def bits(precisions: dict[str, str]) -> float:
        return NVFP4_BITS + sum(options[leader][how] for leader, how in precisions.items()) / weights

    damages = plan(EQUAL).damages
    options, weights = more_bits(make_plan(Checkpoint(source), quantize.Settings("linears")))
    reference = Step3p7.from_pretrained(source, cpu, torch.float32)
    tokens = encoded(Chat(source, reference.config), reference.config, heldout(documents)[0])
    hidden, texts = read_text(reference, "model", tokens), {}
    rows = rivals(damages, options, (EQUAL - NVFP4_BITS) * weights)
    pairs = {name: EQUAL if "random" in name else round(bits(rows[name]), 3) for name in rows if name not in ENDS}
    for budget in sorted({*BITS, *pairs.values()}):
        precisions = plan(budget, damages).precisions
        rows[f"--bits {budget}"] = {leader: precisions[leader] for leader in damages}
    print("| precisions | bits a weight | expected KL | mean KL |\n| --- | ---: | ---: | ---: |")
    for name, precisions in rows.items():
        with tempfile.TemporaryDirectory() as folder:
            quantize.run(source, Path(folder) / "out", precisions=precisions, verify=False)
            model = Step3p7.from_pretrained(Path(folder) / "out", cpu, torch.float32)
        texts[name] = text = compare(tokens, (reference, hidden), (model, read_text(model, "model", tokens)))
        kl = ratio(text.kl_sums, text.counts)
        damage = sum(damages[leader][how] for leader, how in precisions.items())
        expected = texts["all source"].kl_sums.sum() / text.counts.sum() + NATS * damage
        low, high = kl["interval"]
        print(
            f"| {name} | {bits(precisions):.3f} | {expected:.4f} | {kl['value']:.4f} [{low:.4f}, {high:.4f}] |",
            flush=True,
        )
    for name, budget in pairs.items():
        found = against(texts[f"--bits {budget}"], texts[name])["ratio"]
        low, high = found["interval"]
        print(f"--bits {budget} against {name}: KL times {found['value']:.3f} [{low:.3f}, {high:.3f}]")


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.mixed", description=__doc__.splitlines()[0])
    parser.add_argument("calibration", metavar="FILE", help="a text, as quantize.nvfp4 --calibration takes it")
    parser.add_argument("--documents", type=int, metavar="N", help="only the first of the held-out documents")
    options = parser.parse_args(arguments)
    if options.documents is not None and options.documents < 1:
        parser.error(f"--documents: got {options.documents}, wanted at least 1")
    try:
        report(options.calibration, options.documents)
    except (CheckpointError, quantize.UsageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
