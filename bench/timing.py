"""Times on the GPU: CUDA graph replays between events, inputs rotated so that they come from memory, not from L2."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

REPLAYS = 50
LONGEST = 0.2  # seconds of replays; at least 10 are made however long one takes
MOST_COPIES = 256  # a one-token case would need thousands to leave L2, where a decode step finds its input anyway


class NoGPU(Exception):
    """There is no GPU to measure on."""


def require_gpu() -> None:
    """Raise NoGPU, with a line that says what was found, unless torch sees a GPU."""
    if not torch.cuda.is_available():
        raise NoGPU(f"benches need a CUDA device; torch {torch.__version__} finds none")


def copies(arguments: tuple) -> list[tuple]:
    """The arguments, and clones of their tensors until all together are twice the L2 cache (60 MB on an H200)."""
    size = sum(a.nbytes for a in arguments if isinstance(a, Tensor))
    wanted = 2 * torch.cuda.get_device_properties(arguments[0].device).L2_cache_size
    count = min(MOST_COPIES, max(2, -(-wanted // size)))
    clones = [tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments) for _ in range(count - 1)]
    return [arguments, *clones]


def measure(call: Callable, inputs: list[tuple]) -> tuple[float, float]:
    """Median µs of one call and the spread, (90th - 10th percentile) / median, over replays of all `inputs`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, loads, tunes
            call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = [call(*arguments) for arguments in inputs]  # kept: freed ones would share, and stay in L2
    del outputs
    times = []
    for replay in range(REPLAYS + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 3:
            times.append(start.elapsed_time(end) * 1000 / len(inputs))
        if len(times) >= 10 and sum(times) * len(inputs) > LONGEST * 1e6:
            break
    low, median, high = torch.tensor(times).quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
    return median, (high - low) / median


@cache
def memory_ceiling() -> float:
    """Bytes a second: the faster of reading 1 GB (a sum) and copying it (bytes read plus written)."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    read, _ = measure(torch.sum, [(source,)] * 4)
    copy, _ = measure(target.copy_, [(source,)] * 4)
    return max(source.nbytes / read, 2 * source.nbytes / copy) * 1e6


@cache
def matrix_ceiling() -> float:
    """FLOP a second of a bf16 product of 8192 x 8192 matrices of random values."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    microseconds, _ = measure(torch.mm, [(a, b)] * 4)
    return 2 * 8192**3 / microseconds * 1e6
