"""Other projects' decoders on every code under every block scale: the same bits as ours."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from step_kernels import nvfp4

CODES = nvfp4.pack(torch.arange(16, dtype=torch.uint8).repeat(126, 1))  # all 16 under all positive e4m3 scales
SCALES = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn)[:, None]
GLOBAL = [torch.tensor(v) for v in (2.0**-7, 3.1415e-5, 0.37)]


def functions(package: str, file: str, names: set[str], known: dict, inside: str | None = None) -> dict:
    """These functions of an installed package's file, run with `known` in place of its imports."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        pytest.skip(f"needs the files of the {package} package")
    path = Path(list(found.submodule_search_locations)[0]) / file
    body = ast.parse(path.read_text()).body
    if inside:
        body = next(node for node in body if isinstance(node, ast.ClassDef) and node.name == inside).body
    chosen = [node for node in body if isinstance(node, ast.FunctionDef) and node.name in names]
    assert len(chosen) == len(names), f"{path} has not all of {sorted(names)}"
    exec(compile(ast.Module(chosen, []), str(path), "exec"), known)
    return known


def bits(t: Tensor) -> list[int]:
    return t.contiguous().view(torch.int32).flatten().tolist()


@pytest.mark.parametrize("scale", GLOBAL)
def test_modelopt_decodes_the_same_bits_but_for_the_sign_of_zero(scale):
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    tensor = modelopt(torch.Size((126, 16)), torch.float32, CODES)
    got = tensor.dequantize(scale=SCALES, double_scale=scale, block_sizes={-1: 16}, dtype=torch.float32)
    assert bits(got) == bits(nvfp4.dequantize(CODES, SCALES, scale) + 0.0)  # its -0 is 0


@pytest.mark.parametrize("scale", GLOBAL)
def test_compressed_tensors_decodes_the_same_bits_but_for_its_scales_in_bfloat16(scale):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.entrypoints.convert.converters.modelopt_nvfp4 import ModelOptNvfp4Converter
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.quant_scheme import NVFP4

    tensors = {"m.weight": CODES, "m.weight_scale": SCALES, "m.weight_scale_2": scale, "m.input_scale": scale}
    converted = ModelOptNvfp4Converter(targets=["re:.*"]).process(tensors)
    assert torch.equal(converted["m.weight_packed"], CODES) and converted["m.weight_global_scale"] == 1 / scale
    module = {name.removeprefix("m."): t for name, t in converted.items()}
    got = NVFP4PackedCompressor.decompress(module, QuantizationScheme(targets=["Linear"], **NVFP4))["weight"]
    rounded = (SCALES.float() / (1 / scale)).bfloat16().float()  # block scale times global scale, as it keeps them
    values = nvfp4.e2m1_decode(nvfp4.unpack(CODES))
    assert got.dtype == torch.bfloat16 and torch.equal(got, (values * rounded).bfloat16())
    ours = nvfp4.dequantize(CODES, SCALES, scale)
    if scale == 2.0**-7:  # nothing is rounded then
        assert torch.equal(got.float(), ours)
    torch.testing.assert_close(got.float(), ours, rtol=2**-7, atol=0)  # two roundings to 8 bits


@pytest.mark.parametrize("scale", GLOBAL)
def test_vllm_decodes_the_same_bits(scale):
    known = {
        "torch": torch,
        "kE2M1ToFloat_handle": SimpleNamespace(val=torch.tensor(nvfp4.E2M1)),
        "current_platform": SimpleNamespace(is_cuda_alike=lambda: False),
    }
    file = "model_executor/layers/quantization/utils/nvfp4_emulation_utils.py"
    decode = functions("vllm", file, {"break_fp4_bytes", "dequantize_to_dtype"}, known)["dequantize_to_dtype"]
    ours = nvfp4.dequantize(CODES, SCALES, scale)
    assert bits(decode(CODES, SCALES, scale, torch.float32, swizzle=False)) == bits(ours)
    scales = torch.stack([scale, scale / 3])
    stack = decode(CODES.repeat(2, 1, 1), SCALES.repeat(2, 1, 1), scales, torch.float32, swizzle=False)
    assert bits(stack) == bits(nvfp4.dequantize(CODES.repeat(2, 1, 1), SCALES.repeat(2, 1, 1), scales))


@pytest.mark.parametrize("scale", GLOBAL)
def test_sglang_decodes_the_same_bits(scale):
    file, of = "srt/layers/quantization/modelopt_quant.py", "ModelOptNvFp4EmbeddingMethod"
    decode = functions("sglang", file, {"embedding"}, {"torch": torch}, of)["embedding"]
    method = SimpleNamespace(quant_config=SimpleNamespace(group_size=16), params_dtype=torch.float32)
    table = torch.tensor(nvfp4.E2M1)
    layer = SimpleNamespace(weight=CODES, weight_scale=SCALES, weight_scale_2=scale, e2m1_lut=table)
    assert bits(decode(method, layer, torch.arange(126))) == bits(nvfp4.dequantize(CODES, SCALES, scale))
