"""From a checkpoint folder to a model: a look through its headers, the plan of its memory, then reading ahead.

A model asks for its parameters one after the other. Built once on the meta device it asks for all of them without a
byte read, so that what is missing or misshapen is known, and the order: threads then read ahead in that order.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from .cache import CHUNK
from .checkpoint import Checkpoint, Piece, read_piece
from .config import StepConfig
from .memory import Plan, Tapped, tally
from .prepared_copy import PreparedCopy
from .weights import PIECE, Weights

BUFFERS = 8  # of PIECE bytes, pinned for a GPU: 512 MB of host memory in all; a thread each


class ReadAhead:
    """`fetch` for Weights: pieces of files, read by threads into a ring of buffers in the order given.

    A piece asked for out of turn is read on the spot. A reader's error is raised where its piece is asked for.
    """

    def __init__(self, pieces: list[Piece], device: torch.device):
        self.device, self.at = device, 0
        self.batches = _batches(pieces)
        size = max((sum(p.end - p.begin for p in batch) for batch in self.batches), default=0)
        pin = device.type == "cuda"
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pin) for _ in self.batches[:BUFFERS]]
        self.pool = ThreadPoolExecutor(max(len(self.buffers), 1), "checkpoint")
        self.reads: deque[Future] = deque()
        self.next: deque[tuple[Piece, Tensor]] = deque()
        self.closed = False

    def __enter__(self) -> ReadAhead:
        for batch, buffer in zip(self.batches, self.buffers):
            self.reads.append(self.pool.submit(self._read, batch, buffer, None))
        return self

    def __exit__(self, *exception) -> None:
        self.closed = True  # what is being read ends with its piece
        self.pool.shutdown(cancel_futures=True)

    def fetch(self, piece: Piece) -> Tensor:
        """u8 [bytes] on the CPU, overwritten after the next call."""
        if not self.next and self.reads:
            self._turn()
        return self.next.popleft()[1] if self.next and self.next[0][0] == piece else read_piece(piece)

    def _turn(self) -> None:
        """Give the buffer whose pieces have been fetched to the next read, and take the oldest read's pieces."""
        later = self.at - 1 + len(self.buffers)
        if 0 < self.at and later < len(self.batches):
            copied = None
            if self.device.type == "cuda":
                copied = torch.cuda.current_stream(self.device).record_event()
            buffer = self.buffers[(self.at - 1) % len(self.buffers)]
            self.reads.append(self.pool.submit(self._read, self.batches[later], buffer, copied))
        self.next.extend(self.reads.popleft().result())
        self.at += 1

    def _read(self, batch: list[Piece], buffer: Tensor, copied: torch.cuda.Event | None) -> list[tuple[Piece, Tensor]]:
        if copied is not None:
            copied.synchronize()
        read, at = [], 0
        for piece in batch:
            if not self.closed:
                size = piece.end - piece.begin
                read.append((piece, read_piece(piece, buffer[at : at + size])))
                at += size
        return read


class Opened:
    """A checkpoint and its model's class: config, the bytes that its weights will take by kind, the reads to come."""

    def __init__(self, model: type, path: str | os.PathLike, dtype: torch.dtype, fp8: bool = False):
        self.model, self.dtype, self.fp8 = model, dtype, fp8
        self.checkpoint = Checkpoint(path)
        self.config = StepConfig.from_dict(self.checkpoint.config, str(self.checkpoint.folder / "config.json"))
        drafts = f"model.layers.{self.config.num_layers}.enorm.weight" in self.checkpoint
        self.depths = self.config.num_mtp if drafts else 0
        self.kind = PreparedCopy if PreparedCopy.made(self.checkpoint) else Weights
        self.pieces: list[Piece] = []
        self.sizes: Counter = Counter()

        def fetch(piece: Piece) -> Tensor:
            self.pieces.append(piece)
            return torch.empty(piece.end - piece.begin, dtype=torch.uint8, device="meta")

        weights = self.kind(self.checkpoint, torch.device("meta"), dtype, fp8=fp8, fetch=fetch)
        model(self.config, Tapped(weights, tally(self.config, self.sizes)), self.depths)

    def plan(self, requests: int = 1, context: int | None = None) -> Plan:
        """The plan for this many requests of this many tokens each; by default for no more than a prefill step."""
        context = min(CHUNK, self.config.max_positions) if context is None else context
        return Plan(self.config, dict(self.sizes), self.depths, requests, context)

    @contextlib.contextmanager
    def weights(self, device: torch.device, progress: bool = False) -> Iterator[Weights]:
        """The parameters, read ahead while the model is built from them."""
        with ReadAhead(self.pieces, device) as ahead:
            weights = self.kind(self.checkpoint, device, self.dtype, progress, fp8=self.fp8, fetch=ahead.fetch)
            try:
                yield weights
            finally:
                weights.close()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()


def _batches(pieces: list[Piece]) -> list[list[Piece]]:
    """The pieces in their order, as many together as a buffer holds."""
    batches, room = [], 0
    for piece in pieces:
        size = piece.end - piece.begin
        if size > room:
            batches.append([])
            room = PIECE
        batches[-1].append(piece)
        room -= size
    return batches
