"""python -m bench.quantize FOLDER: a checkpoint of the release's shapes, made and converted, beside the disk's rates.

The disk's own rates are measured in the same run, by threads that only read, or only write, what the conversion does.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from quantize import Settings, UsageError, lanes, run
from quantize.layout import FP8_BLOCK, expert_shapes, inverse_scale_shape, tensor_shapes
from quantize.matrices import quantize_piece
from quantize.shards import Shard
from step_kernels import nvfp4
from step_kernels.cli import Parser
from step_kernels.model.checkpoint import CheckpointError
from step_kernels.model.config import StepConfig

from .release import released
from .run import machine

RELEASE = {False: 402e9, True: 212.5e9}  # bytes of Step-3.7-Flash in BF16, and with its experts in FP8
BLOCK = 16 << 20
THREADS = 8  # that read or write at a time when the disk is measured
MODELOPT = "modelopt.torch.quantization.qtensor.nvfp4_tensor"


def make_source(folder: Path, layers: int, experts: int, fp8: bool = False) -> int:
    """Writes `layers` MoE layers of the release after its three dense ones, embedding and head; gives the bytes.

    With `fp8` the experts are e4m3 with a scale for 128 x 128 weights, as in the FP8 release.
    """
    config = released(layers + 3)["text_config"] | {"moe_num_experts": experts, "num_nextn_predict_layers": 0}
    config["moe_top_k"] = min(config["moe_top_k"], experts)
    routed = expert_shapes(StepConfig.from_dict(config))
    shapes = tensor_shapes(StepConfig.from_dict(config)) | routed
    if fp8:
        config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, FP8_BLOCK]}
        shapes |= {f"{name}_scale_inv": inverse_scale_shape(shape) for name, shape in routed.items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    values = {
        "BF16": (noise * 0.02).bfloat16(),
        "F8_E4M3": (noise * 100).clamp(-448, 448).to(torch.float8_e4m3fn),
        "F32": noise[: 1 << 20].abs() * 2e-4,
    }
    values = {dtype: t.view(torch.uint8).numpy() for dtype, t in values.items()}
    total = 0
    for i in range(layers + 3):  # as the release: a shard a layer, the rest in the first
        names = [n for n in shapes if n.startswith(f"model.layers.{i}.") or (i == 0 and ".layers." not in n)]
        types = {name: (_dtype(name, fp8 and name in routed), shapes[name]) for name in names}
        shard = Shard(folder / f"model-{i:05}.safetensors", types, {"format": "pt"})
        for name in names:
            put, data = functools.partial(shard.write, name), values[types[name][0]]
            _in_blocks(_bytes(types[name]), lambda at, n, put=put, data=data: put(data[:n], at))
        shard.finish()
        total += shard.data_size
    return total


def read_rate(folder: Path) -> float:
    """Bytes a second of reading every shard, from no cache."""
    drop_caches(folder)
    size, seconds, views = 0, 0.0, [memoryview(bytearray(BLOCK)) for _ in range(THREADS)]
    for file in sorted(folder.glob("*.safetensors")):
        fd = os.open(file, os.O_RDONLY)
        length = os.fstat(fd).st_size
        seconds += _in_blocks(length, lambda at, n, fd=fd: os.preadv(fd, [views[at // BLOCK % THREADS][:n]], at))
        size += length
        os.close(fd)
    return size / seconds


def write_rate(folder: Path, size: int) -> float:
    """Bytes a second of writing a file, down to the disk."""
    file, data = folder / "rate", os.urandom(BLOCK)
    fd = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        seconds = _in_blocks(size, lambda at, n: os.pwrite(fd, data[:n], at))
        start = time.perf_counter()
        os.fsync(fd)
        return size / (seconds + time.perf_counter() - start)
    finally:
        os.close(fd)
        file.unlink()


def both_rate(source: Path, folder: Path, read: int, written: int) -> float:
    """Bytes a second of reading every shard, `read` bytes, while `written` are written beside."""
    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        for job in (pool.submit(read_rate, source), pool.submit(write_rate, folder, written)):
            job.result()
    return read / (time.perf_counter() - start)


def drop_caches(folder: Path) -> None:
    """Lets go of what memory holds of these files, which are on the disk."""
    for file in folder.iterdir():
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def search_rates(device: torch.device) -> dict[str, float]:
    """Bytes of bf16 a second that each search, and modelopt, quantizes of an expert already in the device's memory."""
    x = (torch.randn(1280, 4096, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16().to(device)
    outer = nvfp4.global_scale(x.abs().amax())
    calls: dict[str, Callable] = {s: lambda s=s: quantize_piece(x, outer, s) for s in nvfp4.SEARCHES}
    try:
        modelopt = importlib.import_module(MODELOPT).NVFP4QTensor
        calls["modelopt max"] = lambda: modelopt.quantize(x, 16, weights_scaling_factor_2=outer)[
            0
        ]._quantized_data.cpu()
    except ImportError as problem:
        print(f"modelopt: not measured, {problem}")
    rates, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # as a lane has it
    for name, call in calls.items():
        call()
        start, times = time.perf_counter(), 0
        while times < 3 or time.perf_counter() - start < 0.5:
            call()
            times += 1
        rates[name] = x.nbytes * times / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    return rates


def _in_blocks(size: int, call: Callable[[int, int], object]) -> float:
    """Calls call(offset, bytes) for each block of `size` bytes, in threads; gives the seconds."""
    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda at: call(at, min(BLOCK, size - at)), range(0, size, BLOCK)))
    return time.perf_counter() - start


def _dtype(name: str, fp8: bool) -> str:
    return "F8_E4M3" if fp8 else "F32" if name.endswith(("router_bias", "_scale_inv")) else "BF16"


def _bytes(tensor: tuple[str, tuple[int, ...]]) -> int:
    return torch.Size(tensor[1]).numel() * {"F32": 4, "BF16": 2, "F8_E4M3": 1}[tensor[0]]


def measure(options: argparse.Namespace, device: torch.device) -> dict:
    """Makes the source, measures the disk, converts, and prints it all; rates in bytes a second."""
    source, target = options.folder / "source", options.folder / "target"
    result = {name: getattr(options, name) for name in ("layers", "experts", "fp8", "search", "device")}
    result["one lane"] = search_rates(device)
    for name, rate in result["one lane"].items():
        print(f"{name}, one lane on {device}: {rate / 1e9:.3f} GB/s of bf16", flush=True)
    size = make_source(source, options.layers, options.experts, options.fp8)
    reading = read_rate(source)
    print(f"source of {size / 1e9:.2f} GB; disk reads {reading / 1e9:.2f} GB/s", flush=True)
    writing = write_rate(options.folder, size // 4)
    print(f"disk writes {writing / 1e9:.2f} GB/s", flush=True)
    drop_caches(source)
    cpu = time.process_time()
    done = run(source, target, Settings(search=options.search), device=options.device, verify=False)
    cpu = time.process_time() - cpu
    into, out = done.bytes_in / done.seconds, done.bytes_out / done.seconds
    both = both_rate(source, options.folder, size, done.bytes_out)
    print(
        f"{options.search} on {options.device}: {done.seconds:.1f} s, reads {into / 1e9:.2f} GB/s "
        f"({into / reading:.0%} of the disk's, {into / both:.0%} of what it reads while it writes as much), "
        f"writes {out / 1e9:.2f} GB/s ({out / writing:.0%}), {cpu / done.bytes_in * 1e9:.2f} CPU seconds a GB; "
        f"relative MSE {done.errors.relative():.6f}"
    )
    print(
        f"peak memory {done.host_peak / 1e9:.2f} GB, of a GPU {done.gpu_peak / 1e9:.2f} GB; "
        f"{RELEASE[options.fp8] / 1e9:.1f} GB at this rate: {RELEASE[options.fp8] / into:.0f} s"
    )
    return result | {
        "source bytes": size,
        "disk": {"reads": reading, "writes": writing, "reads while writing": both},
        "seconds": done.seconds,
        "cpu seconds": cpu,
        "reads": into,
        "writes": out,
        "host peak": done.host_peak,
        "gpu peak": done.gpu_peak,
        "relative mse": done.errors.relative(),
    }


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.quantize",
        description="Make a checkpoint of the release's shapes in FOLDER, convert it, and set that beside the disk.",
        epilog="example: python -m bench.quantize /mnt/disk/bench --layers 2 --device cuda",
    )
    parser.add_argument("folder", type=Path, help="a new folder; 1.5 times the source's size, and gone afterwards")
    parser.add_argument("--layers", type=int, default=2, help="MoE layers, 9.06 GB each (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=288, help="experts of each (default: %(default)s)")
    parser.add_argument("--fp8", action="store_true", help="experts in FP8, as the FP8 release has them")
    parser.add_argument("--search", choices=nvfp4.SEARCHES, default="mse", help="(default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="as quantize.nvfp4's")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    options = parser.parse_args(arguments)
    try:
        device = lanes.devices(options.device)[0]
        options.folder.mkdir(parents=True)  # what goes away afterwards is this run's own
    except UsageError as e:
        parser.error(str(e))
    except OSError as e:
        parser.error(f"folder: {options.folder}: {e.strerror}, wanted a new folder")
    try:
        result = {"machine": machine(), **measure(options, device)}
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n")
    except (CheckpointError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
