"""Threads that each take one matrix from the source to the target: read, to the GPU, quantize, back, write.

Within a lane one step follows the other; the overlap is between lanes, and so is the bound on memory: what one matrix
needs, times the lanes. A lane has its device and, on a GPU, a stream of its own.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from .plan import UsageError

_GPU_LANES = 12  # a GPU: enough reads and writes at a time for a fast disk
_HOST_BYTES = 1 << 30  # what all lanes together may hold in host memory
_LANE_BYTES = 32 << 20  # of it what a lane takes beside its matrix: tables, temporaries, its stack
_lane = threading.local()


def devices(names: str) -> list[torch.device]:
    """`cpu`, `cuda` (every visible GPU) or a list such as `cuda:0,cuda:1`; UsageError for GPUs that are not there."""
    there = torch.cuda.device_count()
    if names == "cpu":
        return [torch.device("cpu")]
    if not re.fullmatch(r"cuda(:\d+(,cuda:\d+)*)?", names):
        raise UsageError(f"device: got {names}, wanted cpu, cuda or a list such as cuda:0,cuda:1")
    numbers = [int(n) for n in re.findall(r"\d+", names)] or list(range(max(there, 1)))
    if max(numbers) >= there:
        raise UsageError(f"device: got {names}, but torch finds {there or 'no'} GPU{'s' * (there > 1)} here")
    return [torch.device("cuda", n) for n in dict.fromkeys(numbers)]


def device() -> torch.device:
    """This thread's device."""
    return getattr(_lane, "device", torch.device("cpu"))


def buffers(*sizes: int) -> list[torch.Tensor]:
    """Host memory of this lane, u8, one part after the other in the same place at each call; pinned for a GPU.

    Kept: allocated anew, matrices of many sizes would leave holes in the heap of each thread, 80 MB a lane.
    """
    if getattr(_lane, "buffer", None) is None or len(_lane.buffer) < sum(sizes):
        _lane.buffer = None
        _lane.buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=device().type == "cuda")
    return list(_lane.buffer[: sum(sizes)].split(sizes))


def count(devices: list[torch.device], matrix_bytes: int) -> int:
    """How many lanes to run on these devices, when one matrix needs that much host memory."""
    wanted = _GPU_LANES * len(devices) if devices[0].type == "cuda" else _cores() + 1
    return max(1, min(wanted, _HOST_BYTES // (matrix_bytes + _LANE_BYTES)))


def host_peak() -> int:
    """The most bytes of memory that this process has held."""
    with contextlib.suppress(OSError):  # Linux; ru_maxrss would begin with the parent process's
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def gpu_peak(devices: list[torch.device]) -> int:
    """The most bytes that torch has held of any of these GPUs."""
    return max((torch.cuda.max_memory_reserved(d) for d in devices if d.type == "cuda"), default=0)


class Lanes:
    """A pool of `number` lanes, spread over `devices`. Leaving it drops what has not begun and waits for the rest."""

    def __init__(self, devices: list[torch.device], number: int):
        places = queue.SimpleQueue()
        for i in range(number):
            places.put(devices[i % len(devices)])
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(number, "lane", _begin, (places,))

    def __enter__(self) -> Lanes:
        return self

    def __exit__(self, *exception) -> None:
        self.pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self.threads)

    def submit(self, job, *arguments) -> Future:
        """Runs job(*arguments) on the next free lane; jobs begin in the order of their submission."""
        return self.pool.submit(job, *arguments)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin(places: queue.SimpleQueue) -> None:
    _lane.device = places.get()
    torch.set_num_threads(1)  # lanes are the parallelism
    if _lane.device.type == "cuda":
        torch.cuda.set_device(_lane.device)
        torch.cuda.set_stream(torch.cuda.Stream(_lane.device))
