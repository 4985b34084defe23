"""Launcher of csrc/smxx_nvfp4_gptq.cu."""

from __future__ import annotations

from torch import Tensor

from .driver import Kernel

THREADS = 256
ROWS = 64  # of a thread block
MOST_COLUMNS = 128
KERNEL = Kernel("smxx_nvfp4_gptq", "smxx_nvfp4_gptq", "PqqqPqqqqPqqqPqqqPqqqiii")


def refuse(w: Tensor, factor: Tensor, products: Tensor, errors: Tensor, scales: Tensor) -> str | None:
    """Why the kernel does not take such tensors, or None."""
    if w.dim() > 4:
        return f"takes at most two dimensions before rows, got {w.dim() - 2}"
    if w.shape[-1] > MOST_COLUMNS:
        return f"takes at most {MOST_COLUMNS} columns, got {w.shape[-1]}"
    for name, tensor in (("w", w), ("products", products), ("errors", errors), ("scales", scales)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"takes neighbouring columns, got {name} with a stride of {tensor.stride(-1)}"


def launch(w: Tensor, factor: Tensor, products: Tensor, errors: Tensor, scales: Tensor) -> None:
    """As the op has them."""
    tensors = [t[(None,) * (4 - t.dim())] for t in (w, factor, products, errors, scales)]
    outer, inner, n, k = tensors[0].shape
    grid = outer * inner * -(-n // ROWS)
    if grid == 0 or k == 0:
        return
    arguments = []
    for i, tensor in enumerate(tensors):
        arguments += tensor, *tensor.stride()[: 4 if i == 1 else 3]  # only the factor's columns may lie apart
    KERNEL.launch((grid, 1, 1), THREADS, *arguments, inner, n, k)
