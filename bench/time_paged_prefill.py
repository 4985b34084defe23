"""Times of sm90's paged_prefill kernel, TFLOP/s of the visible keys alone; run from the repository's root on an H200.

python time_prefill.py [e4m3|bf16] [name ...]; medians of 10 calls in a CUDA graph each, then the error of sampled tokens.
"""

import math
import sys

import torch

import step_kernels as sk
from step_kernels.cuda.paged_prefill import launch

CASES = {  # new tokens, length, heads, window
    "8k": (8192, 8192, 64, None), "8k96": (8192, 8192, 96, None), "2k128k": (2048, 131072, 64, None),
    "2k128k96": (2048, 131072, 96, None), "window8k": (8192, 8192, 96, 512), "window2k128k": (2048, 131072, 96, 512),
    "512of32k": (512, 32768, 64, None), "1k": (1024, 1024, 64, None),
}  # fmt: skip
cache = torch.bfloat16 if "bf16" in sys.argv else torch.float8_e4m3fn
names = [a for a in sys.argv[1:] if a in CASES] or CASES
page = 64
for name in names:
    new, length, heads, window = CASES[name]
    torch.manual_seed(0)
    pages = length // page + 7
    k, v = (torch.randn(pages, 8, page, 128, device="cuda").to(cache) for _ in range(2))
    table = torch.randperm(pages, device="cuda")[None, : length // page].int()
    q = torch.randn(new, heads, 128, device="cuda").bfloat16()
    one = torch.ones((), device="cuda")
    lengths, starts = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([length], [0, new]))
    arguments = (q, k, v, one, one, table, lengths, starts, window)
    seen = (min(p + 1, window or p + 1) for p in range(length - new, length))
    flops = 4 * 128 * heads * sum(seen)
    for keys in (None, 128, 112):
        out = launch(*arguments, keys=keys)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = launch(*arguments, keys=keys)
        graph.replay()
        times = []
        for _ in range(10):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end))
        ms = sorted(times)[5]
        errors = []
        for token in (0, new // 2, new - 1):
            position = length - new + token
            first = 0 if window is None else max(0, position - window + 1)
            at = torch.arange(first, position + 1, device="cuda")
            keys64, values = (x[table[0, at // page].long(), :, at % page].double() for x in (k, v))
            scores = torch.einsum("ngd,knd->ngk", q[token].double().view(8, -1, 128), keys64) / math.sqrt(128)
            wanted = torch.einsum("ngk,knd->ngd", scores.softmax(-1), values).flatten(0, 1)
            errors.append(((out[token].double() - wanted).norm() / wanted.norm()).item())
        print(f"{name:>12} keys {keys or 'auto'}: {ms:8.3f} ms {flops / ms / 1e9:6.0f} TFLOP/s, errors {max(errors):.1e}",
              f"(best {flops / min(times) / 1e9:.0f}, worst {flops / max(times) / 1e9:.0f})", flush=True)  # fmt: skip
