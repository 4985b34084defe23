"""humming-kernels, until now the fastest NVFP4 on Hopper: W4A16 as vLLM 0.33 calls it, tiles of humming's own choice.

Its experts need the tokens sorted into tiles of one expert, which vLLM has a kernel for: here that is not timed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from step_kernels.nvfp4 import NVFP4Experts, NVFP4Weight

os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")  # or importing it starts processes
if nvcc := shutil.which("nvcc"):  # NVRTC of pip's wheels does not find its builtins in humming's subprocess
    os.environ.setdefault("HUMMING_COMPILER", "nvcc")
    os.environ.setdefault("CUDA_PATH", str(Path(nvcc).resolve().parents[1]))

from humming.config import LayerConfig  # noqa: E402
from humming.forward import humming_forward, may_process_input  # noqa: E402
from humming.kernel.humming import HummingKernel  # noqa: E402
from humming.schema import BaseWeightSchema, HummingInputSchema  # noqa: E402
from humming.testing.data import generate_moe_tensors  # noqa: E402
from humming.transform import prepare_layer_config, transform_humming_tensors  # noqa: E402
from humming.tune import get_heuristics_config  # noqa: E402

_SWIGLU = "fminf(a / (1.f + expf(-a)), {limit}f) * fmaxf(fminf(b, {limit}f), -{limit}f)"  # gate and up are a and b


def linear(x: Tensor, weight: NVFP4Weight) -> tuple:
    """A call and its arguments: x [m, k] times the [n, k] weight."""
    config, tensors = _prepared(weight)
    options = _options(config, len(x), "dense")

    def call(x, codes, scales, global_scale):
        return _product(config, x, (codes, scales, global_scale), options)

    return call, (x, *tensors)


def moe(x: Tensor, weights: Tensor, ids: Tensor, experts: tuple, limit: float) -> tuple:
    """A call and its arguments: the routed sum, with `experts` as `prepared_experts` returns them."""
    (first, gate_up), (second, down) = experts
    pairs, top_k = ids.numel(), ids.shape[1]
    options = [_options(config, pairs, "indexed") for config in (first, second)]
    tiles = [_tiles(ids, first.num_experts, _tuning(config, pairs, "indexed")) for config in (first, second)]
    activation = {"activation_type": "binary_split", "activation_impl": _SWIGLU.format(limit=limit)}

    def call(x, weights, *tensors):
        gate_up, down, tiles_up, tiles_down = (tensors[i : i + 3] for i in (0, 3, 6, 9))
        both = _product(first, x, gate_up, options[0], tiles_up, top_k, pairs)
        inner, *_ = may_process_input(second, both, **activation)
        parts = _product(second, inner, down, options[1], tiles_down, 1, pairs)
        out = torch.empty_like(x)
        grid = (len(x), triton.cdiv(x.shape[1], 1024))
        _weighted_sum_kernel[grid](parts, weights, out, x.shape[1], TOP_K=top_k, BLOCK=1024)
        return out

    return call, (x, weights, *gate_up, *down, *tiles[0], *tiles[1])


def prepared_experts(experts: NVFP4Experts) -> tuple:
    """Each product's config and tensors in humming's layout."""
    return _prepared(experts.gate_up), _prepared(experts.down)


def compile_ahead(cases: Iterable[tuple[int, int, int, int]]) -> int:
    """Compile, at once, the products of (rows, n, k, experts or 0); how many kernels there are."""
    jobs = set()
    for rows, n, k, experts in cases:
        kind, config = "indexed" if experts else "dense", _config(n, k, experts)
        jobs.add((config.to_str(), *_options(config, rows, kind).values()))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: HummingKernel.prepare_kernels(*job, 0), jobs))
    return len(jobs)


@triton.jit
def _weighted_sum_kernel(parts_ptr, weights_ptr, out_ptr, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        part = tl.load(parts_ptr + pair * columns + column, mask=column < columns, other=0.0)
        total += part.to(tl.float32) * tl.load(weights_ptr + pair)
    tl.store(out_ptr + token * columns + column, total.to(out_ptr.dtype.element_ty), mask=column < columns)


def _config(n: int, k: int, experts: int) -> LayerConfig:
    schema = BaseWeightSchema.from_config({"quant_method": "modelopt", "quant_algo": "nvfp4"})
    return prepare_layer_config(
        n,
        k,
        schema.to_humming_schema(torch.bfloat16),
        HummingInputSchema(),
        num_experts=experts,
        pad_n_to_multiple=256,  # both as vLLM
        pad_k_to_multiple=128,
        torch_dtype=torch.bfloat16,
    )


def _prepared(weight: NVFP4Weight) -> tuple[LayerConfig, tuple[Tensor, Tensor, Tensor]]:
    *lead, n, k = weight.shape
    experts = lead[0] if lead else 0
    scale = weight.global_scale.reshape(experts or 1, -1)
    if (scale != scale[:, :1]).any():
        raise ValueError("weight.global_scale: got gate and up apart, wanted one a matrix")
    config = _config(n, k, experts)
    given = {"weight": weight.codes.view(torch.int32), "weight_scale": weight.scales}
    out = transform_humming_tensors(config, given | {"weight_scale_2": scale[:, 0].contiguous()})
    return config, (out["weight"], out["weight_scale"], out["weight_scale_2"])


def _tuning(config: LayerConfig, rows: int, kind: str) -> dict:
    return get_heuristics_config(config, shape_m=rows, gemm_type=kind)


def _options(config: LayerConfig, rows: int, kind: str) -> dict[str, str]:
    tuning = json.dumps(_tuning(config, rows, kind))
    return {"compute_config": json.dumps({"gemm_type": kind}), "tuning_config": tuning}


def _tiles(ids: Tensor, experts: int, tuning: dict) -> tuple[Tensor, Tensor, Tensor]:
    return generate_moe_tensors(ids, experts, "indexed", tuning["block_shape"][0])[2:]


def _product(config, x, weight, options, tiles=(None, None, None), top_k=1, pairs=0) -> Tensor:
    codes, scales, global_scale = weight
    names = ("sorted_ids", "expert_ids", "num_tokens_padded")
    return humming_forward(
        config,
        x,
        codes,
        weight_scale=scales,
        weight_scale_2=global_scale,
        locks=_locks(),
        top_k=top_k,
        valid_shape_m=pairs,
        **dict(zip(names, tiles)),
        **options,
    )


@cache
def _locks() -> Tensor:
    """What its blocks that share a sum wait on; zeros between kernels."""
    return torch.zeros(1 << 14, dtype=torch.int32, device="cuda")
