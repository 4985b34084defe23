"""Train the bundled model on one GPU: text, digits and drafts, from the data that bench.corpus fetched.

python -m bench.train_bundled DATA [OUT]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from step_kernels.cli import Parser
from step_kernels.model import vision
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import INDEX
from step_kernels.model.config import StepConfig
from step_kernels.model.step import Step3p7

from . import bundled, corpus, digits, ngram
from .batches import LENGTH, Batch, Rows, draw, encode
from .card import write_card
from .trainable import Parameters, Trainable

PICTURES, DRAWN_AT_ONCE = 16_000, 100
LEARNING_RATE, WARMUP, WEIGHT_DECAY, CLIP = 3e-3, 300, 0.1, 1.0
DRAFT_WEIGHT = 0.1  # of each MTP depth's loss beside the trunk's
BALANCE = 1e-3  # a router bias's step
POINTS = 50  # of the loss curve


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        train(args)
    except (ImportError, OSError, RuntimeError, ValueError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m bench.train_bundled",
        description="Trains the bundled model and writes it as a checkpoint with its model card.",
        epilog="example: python -m bench.corpus data && python -m bench.train_bundled data",
    )
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder that bench.corpus filled")
    parser.add_argument("out", type=Path, nargs="?", default=bundled.BUNDLED, metavar="OUT",
                        help="where to write the checkpoint (default: into the package)")  # fmt: skip
    parser.add_argument("--steps", type=int, default=7000, metavar="N", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=128, metavar="N",
                        help=f"of {LENGTH} tokens, a step; an eighth are pictures (default: %(default)s)")  # fmt: skip
    parser.add_argument("--pictures", type=int, default=PICTURES, metavar="N", help="drawn (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=37, metavar="S", help="default: %(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    for flag, got, least in (("steps", args.steps, 1), ("rows", args.rows, 8), ("pictures", args.pictures, 1)):
        if got < least:
            parser.error(f"--{flag}: got {got}, wanted at least {least}")
    return args


def train(args: argparse.Namespace) -> None:
    """Trains in a new folder beside OUT, whose files are replaced at the end: a stopped run leaves OUT as it was."""
    if importlib.util.find_spec("matplotlib") is None:  # asked before minutes of work
        raise ImportError("matplotlib is not installed, wanted it for the card's loss curve")
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=args.out.resolve().name, dir=args.out.resolve().parent) as folder:
        fill(Path(folder), args)
        (args.out / INDEX).unlink(missing_ok=True)  # away first, back last: no half of it looks whole
        for old in args.out.glob("model-*.safetensors"):
            old.unlink()
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == INDEX):
            file.replace(args.out / file.name)


def fill(folder: Path, args: argparse.Namespace) -> None:
    """The checkpoint, its picture, record and card."""
    began, device = time.perf_counter(), torch.device(args.device)
    config = StepConfig.from_dict(bundled.config())
    tokenizer = bundled.tokenizer(d["text"] for d in corpus.read_text(args.data)[::4])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # as text: documents may speak of them
    stream = encode(tokenizer, Chat(folder, config), args.data, args.seed)
    documents = [
        [config.bos_id, *tokenizer.encode(d["text"], add_special_tokens=False).ids][:LENGTH]
        for d in corpus.heldout_text()
    ]
    # Spawned, for a forked worker would share this process's CUDA context.
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(os.cpu_count(), 16), torch.set_num_threads, (1,)) as pool:
        baseline = pool.apply_async(ngram.perplexity, (stream, [np.asarray(d, np.uint16) for d in documents]))
        starts = range(0, args.pictures, DRAWN_AT_ONCE)
        jobs = [(folder, args.data, i, min(DRAWN_AT_ONCE, args.pictures - i)) for i in starts]
        dialogues = sum(pool.starmap(draw, jobs, chunksize=1), [])
        print(f"{len(stream) / 1e6:.1f} M tokens, {len(dialogues)} pictures: {time.perf_counter() - began:.0f} s")
        parameters = Parameters(device, 2 * len(config.layers), args.seed)
        trainable = Trainable(Step3p7(config, parameters, bundled.MTP), torch.bfloat16, compile=device.type == "cuda")
        rows = Rows(stream, dialogues, config, args.rows, args.seed, device)
        began = time.perf_counter()
        curve = optimize(Step(trainable, parameters, rows), documents, args.steps)
        seconds = time.perf_counter() - began
        bundled.save(folder, parameters.checkpoint())
        digits.picture(corpus.heldout_digits()[0][[4, 0, 7, 2]]).save(folder / "picture.png", optimize=True)
        record = {
            "command": f"python -m bench.train_bundled DATA --steps {args.steps} --rows {args.rows} "
            f"--pictures {args.pictures} --seed {args.seed}",
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
            "seconds": round(seconds),
            "parameters": sum(t.numel() for t in parameters.tensors.values()),
            "train_tokens": len(stream),
            "seen_tokens": args.steps * args.rows * LENGTH,
            "heldout_perplexity": float(np.exp(curve[-1]["heldout"][0])),
            **inspect(trainable, documents),
            "baseline": {"name": "interpolated 5-gram, modified Kneser-Ney", "perplexity": baseline.get()},
            "curve": curve,
        }
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    write_card(folder, record)
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}, indent=1))


class Step:
    """An AdamW step on a batch; on a GPU a CUDA graph, for launching the kernels takes thrice as long as they do."""

    def __init__(self, trainable: Trainable, parameters: Parameters, rows: Rows):
        self.trainable, self.rows, self.graph = trainable, rows, None
        self.leaves = [t for t in parameters.tensors.values() if t.requires_grad]
        self.rate = torch.zeros((), device=parameters.device)  # a share of LEARNING_RATE and BALANCE
        cuda = parameters.device.type == "cuda"
        groups = [
            {"params": [t for t in self.leaves if t.dim() > 1], "weight_decay": WEIGHT_DECAY},
            {"params": [t for t in self.leaves if t.dim() == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate.clone(), betas=(0.9, 0.95), fused=True, capturable=cuda)

    def __call__(self, rate: float) -> Tensor:
        """The losses before the step, to be read before the next one."""
        self.rate.fill_(rate)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(rate * LEARNING_RATE)
        batch = self.rows.draw()
        if self.rate.device.type != "cuda":
            return self._run(batch)
        if self.graph is None:
            self._capture(batch)
        for name, value in vars(batch).items():
            getattr(self.batch, name).copy_(value)
        self.graph.replay()
        return self.losses

    def _run(self, batch: Batch) -> Tensor:
        # A cast weight that autocast remembered would not be cast again when the graph runs again.
        with torch.autocast(self.rate.device.type, torch.bfloat16, cache_enabled=False):
            views, crops = self.rows.views[batch.views].float(), self.rows.crops[batch.crops].float()
            pictures = self.trainable.features(views, crops), batch.places
            losses = self.trainable.loss(batch.tokens, batch.weights, pictures)
        (losses[0] + DRAFT_WEIGHT * sum(losses[1:])).backward()
        torch.nn.utils.clip_grad_norm_(self.leaves, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.trainable.balance(BALANCE * self.rate)
        return torch.stack(losses).detach()

    def _capture(self, batch: Batch) -> None:
        """Three steps as usual, which compile what is to be compiled, then the graph."""
        self.batch, stream = batch, torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._run(batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.losses = self._run(batch)


def optimize(step: Step, documents: list[list[int]], steps: int) -> list[dict]:
    """Linear warm-up and linear decay to nothing; the loss curve: cross entropy in nats a token, of the trunk and of
    each draft depth, on what was trained on since the last point and on the held-out text."""
    vision.VIEWS_AT_ONCE = 1024  # its 8 are for views of 728 pixels
    torch._dynamo.config.recompile_limit = 64  # the norms, rope and SwiGLU come in a dozen shapes
    curve, recent, every, last = [], 0, max(steps // POINTS, 1), 0
    for i in tqdm(range(steps), desc="training", unit="step", mininterval=5):
        recent = recent + step(min((i + 1) / WARMUP, 1) * (1 - i / steps))
        if (i + 1) % every == 0 or i + 1 == steps:  # the last point is of the weights that are saved
            seen, heldout = (recent / (i + 1 - last)).tolist(), heldout_loss(step.trainable, documents)
            curve.append({"step": i + 1, "train": seen, "heldout": heldout})
            tqdm.write(f"{i + 1}: train {_list(seen)}, held out {_list(heldout)}")
            recent, last = 0, i + 1
    return curve


def heldout_loss(trainable: Trainable, documents: list[list[int]]) -> list[float]:
    """Mean cross entropy of the trunk and of each draft depth over the held-out text."""
    tokens = torch.zeros(len(documents), LENGTH + 1, dtype=torch.long)
    weights = torch.zeros(tokens.shape)
    for i, ids in enumerate(documents):
        tokens[i, : len(ids)], weights[i, : len(ids)] = torch.tensor(ids), 1
    device = trainable.model.device
    with torch.autocast(device.type, torch.bfloat16):  # with gradients, though unused: without, all compiles again
        return torch.stack(trainable.loss(tokens.to(device), weights.to(device), None)).tolist()


def inspect(trainable: Trainable, documents: list[list[int]]) -> dict:
    """By MoE layer the least and the most loaded expert beside the mean, by clamp the share of values it changes; on
    the held-out text."""
    swiglu, clamped = trainable.swiglu, []

    def watch(gate_up, limit):
        if limit:
            gate, up = gate_up.float().chunk(2, -1)
            over = [(torch.nn.functional.silu(gate) > limit), (up.abs() > limit)]
            clamped.append({"limit": limit, "gate": over[0].float().mean().item(), "up": over[1].float().mean().item()})
        return swiglu(gate_up, limit)

    trainable.swiglu = watch
    heldout_loss(trainable, documents)
    trainable.swiglu = swiglu
    loads = [(c / c.float().mean()) for c in trainable.counts.values()]
    return {"expert_load": [[load.min().item(), load.max().item()] for load in loads], "clamped": clamped}


def _list(values: list[float]) -> str:
    return " ".join(f"{x:.3f}" for x in values)


if __name__ == "__main__":
    sys.exit(main())
