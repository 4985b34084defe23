"""What a profiler's timeline of kernels says beyond their sum."""

from __future__ import annotations

_BIG = ("linear", "gate_up", "down", "attention", "gemm", "nvjet")  # the last two are cuBLAS's
_SMALL = ("linear_split", "attention_window")


def is_big(kernel: str) -> bool:
    """Whether its name is that of a linear, of experts or of attention over more than a window."""
    return any(part in kernel for part in _BIG) and not any(part in kernel for part in _SMALL)


def between(kernels: list[tuple[str, float, float]]) -> float:
    """Of (name, start, end): the share of the time from the first start to the last end in which no big one runs.

    A kernel runs from its start, even if it only reads its weights until the kernel ahead has ended.
    """
    first, last = min(start for _, start, _ in kernels), max(end for _, _, end in kernels)
    idle, until = 0.0, first
    for name, start, end in sorted(kernels, key=lambda kernel: kernel[1]):
        if is_big(name):
            idle += max(0.0, start - until)
            until = max(until, end)
    return (idle + last - until) / (last - first)
