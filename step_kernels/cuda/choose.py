"""Launchers of csrc/smxx_choose.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from .driver import Kernel, multiprocessors

_ARGUMENTS = "P" * 7 + "qii"
BEST, DRAWN = (Kernel("smxx_choose", f"smxx_choose_{how}", _ARGUMENTS, dependent=True) for how in ("best", "drawn"))
OF_PARTS = Kernel("smxx_choose", "smxx_choose_of_parts", "PPPPPPi", dependent=True)
THREADS, QUANTUM = 256, 1024  # threads of a block, values that they have in flight
BLOCKS = {BEST: 6, DRAWN: 4}  # that a multiprocessor has registers for
_NONE = 0  # a null pointer


def refuse(
    logits: Tensor, positions: Tensor, requests: Tensor, temperature: Tensor | None = None, key: Tensor | None = None,
    least: Tensor | None = None, targets: Tensor | None = None, token: Tensor | None = None,
    position: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Why the kernels do not take the op's arguments, or None."""
    if logits.dtype != torch.float32:
        return f"takes float32, got logits in {str(logits.dtype).removeprefix('torch.')}"
    if token is not None and not (token.is_contiguous() and position.is_contiguous()):
        return f"writes contiguous tensors, got token and position with strides {token.stride()}, {position.stride()}"


def launch(
    logits: Tensor, positions: Tensor, requests: Tensor, temperature: Tensor | None = None, key: Tensor | None = None,
    least: Tensor | None = None, targets: Tensor | None = None, token: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As ops.choose."""
    rows, vocab = logits.shape
    chosen = requests.new_empty(rows)
    if rows == 0:
        return chosen
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    kernel = BEST if temperature is None else DRAWN
    span, parts = shape(rows, vocab, BLOCKS[kernel] * multiprocessors(logits.device.index))
    partial = logits.new_empty(rows, parts, 2)
    positions = positions.int().contiguous()
    how = [_NONE if t is None else t.contiguous() for t in (requests, temperature, key)]
    least = _NONE if least is None else least.contiguous()
    kernel.launch((rows, parts, 1), THREADS, logits, *how, positions, least, partial, logits.stride(0), vocab, span)
    left = [_NONE] * 3 if targets is None else [targets.contiguous(), token, position]
    OF_PARTS.launch((rows, 1, 1), 32, partial, positions, left[0], chosen, *left[1:], parts)
    return chosen


def shape(rows: int, vocab: int, blocks: int) -> tuple[int, int]:
    """Values of a part and parts of a row: no more parts than there are `blocks` at a time, nor than quanta."""
    quanta = -(-vocab // QUANTUM)
    each = -(-quanta // max(1, blocks // rows))
    return each * QUANTUM, -(-quanta // each)
