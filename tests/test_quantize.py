"""What the converter writes: bytes, layout, names and metadata."""

from __future__ import annotations

import json
import re

import pytest
import torch
from small_checkpoint import PROJECTIONS, TEXT, contents, raw, read, refused, tensors_of, write_source

from quantize import Settings, run
from quantize.layout import GROUPS, expert_shapes
from quantize.nvfp4 import main
from step_kernels import nvfp4
from step_kernels.model.checkpoint import INDEX
from step_kernels.model.config import StepConfig


def test_layout_is_the_released_stack_per_layer_and_projection(converted):
    out = read(converted)
    for layer in (1, 2):
        for projection in PROJECTIONS:
            n, k = (192, 144) if projection == "down_proj" else (144, 192)
            name = f"model.layers.{layer}.moe.{projection}"
            found = {
                s: (out[f"{name}.{s}"].dtype, tuple(out[f"{name}.{s}"].shape))
                for s in ("weight", "weight_scale", "weight_scale_2", "input_scale")
            }
            assert found == {
                "weight": (torch.uint8, (4, n, k // 2)),
                "weight_scale": (torch.float8_e4m3fn, (4, n, k // 16)),
                "weight_scale_2": (torch.float32, (4,)),
                "input_scale": (torch.float32, (4,)),
            }


def test_gate_and_up_share_max_of_both_over_2688_bit_for_bit(source, converted):
    given, out = read(source), read(converted)
    for layer in (1, 2):
        gate, up = (f"model.layers.{layer}.moe.{p}.weight" for p in GROUPS[0])
        amax = torch.maximum(*(given[n].float().abs().amax((1, 2)) for n in (gate, up)))
        assert torch.equal(out[f"{gate}_scale_2"], amax / 2688)
        assert torch.equal(out[f"{up}_scale_2"], amax / 2688)


def test_every_experts_input_scale_is_one_and_kv_scales_are_scalar_ones_in_the_trunk(converted):
    out = read(converted)
    inputs = [n for n in out if n.endswith("input_scale")]
    assert len(inputs) == 6 and all(torch.equal(out[n], torch.ones(4)) for n in inputs)
    caches = sorted(n for n in out if n.endswith(("k_scale", "v_scale")))
    assert caches == sorted(f"model.layers.{i}.self_attn.{p}_proj.{p}_scale" for i in range(3) for p in "kv")
    assert all(out[n].shape == () and out[n].item() == 1 and out[n].dtype == torch.float32 for n in caches)


def test_tensors_left_alone_are_byte_equal_and_in_the_shard_they_came_from(source, converted):
    given, out = read(source), read(converted)
    alone = [n for n in given if not re.search(r"moe\.(gate|up|down)_proj", n)]
    assert len(alone) == len(given) - 6
    assert all(given[n].dtype == out[n].dtype and raw(given[n]) == raw(out[n]) for n in alone)
    before, after = (json.loads((f / INDEX).read_text())["weight_map"] for f in (source, converted))
    assert all(after[name] == file for name, file in before.items())


def test_index_lists_every_tensor_and_the_bytes_of_data(converted):
    out, index = read(converted), json.loads((converted / INDEX).read_text())
    assert index["weight_map"].keys() == out.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in out.values())


def test_mse_search_errs_at_least_26_percent_less_than_max_on_gaussian_weights(source, tmp_path):
    errors = {s: run(source, tmp_path / s, Settings(search=s)).errors for s in ("max", "mse", "four-six")}
    assert errors["mse"].relative() <= 0.74 * errors["max"].relative()
    assert errors["four-six"].relative() <= 0.85 * errors["max"].relative()
    assert len(errors["mse"].sums) == 6  # two layers, three projections


def test_error_table_equals_the_error_of_the_written_bytes(source, tmp_path):
    table = run(source, tmp_path / "out").errors
    given, out = read(source), read(tmp_path / "out")
    for layer, projection in table.sums:
        name = f"model.layers.{layer}.{projection}.weight"
        w = given[name].double()
        q = nvfp4.dequantize(out[name], out[f"{name}_scale"], out[f"{name}_scale_2"]).double()
        wanted = ((q - w).square().sum() / w.square().sum()).item()
        assert table.relative([(layer, projection)]) == pytest.approx(wanted, rel=1e-5)


def test_bytes_equal_modelopts_quantizer_and_decoder(source, tmp_path):
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    run(source, tmp_path / "out", Settings(search="max"))
    given, out = read(source), read(tmp_path / "out")
    for projection in PROJECTIONS:
        name = f"model.layers.2.moe.{projection}.weight"
        for expert in range(4):
            codes, scales, scale = (out[f"{name}{s}"][expert] for s in ("", "_scale", "_scale_2"))
            wanted, wanted_scales, _ = modelopt.quantize(
                given[name][expert].clone(), 16, weights_scaling_factor_2=scale.clone()
            )
            assert raw(scales) == raw(wanted_scales)
            assert torch.equal(codes, wanted._quantized_data)
            tensor = modelopt((codes.shape[0], codes.shape[1] * 2), torch.float32, codes)
            decoded = tensor.dequantize(scale=scales, double_scale=scale, block_sizes={-1: 16}, dtype=torch.float32)
            assert torch.equal(decoded, nvfp4.dequantize(codes, scales, scale))


def test_two_runs_write_the_same_bytes(source, converted, tmp_path):
    run(source, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(converted)


def test_fp8_source_gives_the_bytes_of_its_dequantized_weights(tmp_path):
    tensors = tensors_of(TEXT, seed=1)
    fp8, plain = dict(tensors), dict(tensors)
    for name in expert_shapes(StepConfig.from_dict(TEXT)):
        weight, inverse = tensors[name].float(), torch.empty(4, 2, 2)
        codes, decoded = torch.empty_like(weight).to(torch.float8_e4m3fn), torch.empty_like(weight)
        for rows in (0, 1):
            for columns in (0, 1):
                block = (slice(None), *(slice(128 * i, 128 * i + 128) for i in (rows, columns)))
                scale = weight[block].abs().amax((1, 2)) / 448
                inverse[:, rows, columns] = scale
                part = (weight[block] / scale[:, None, None]).to(torch.float8_e4m3fn)
                codes.view(torch.uint8)[block] = part.view(torch.uint8)
                decoded[block] = part.float() * scale[:, None, None]
        fp8[name], fp8[f"{name}_scale_inv"], plain[name] = codes, inverse, decoded
    text = TEXT | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    assert run(write_source(tmp_path / "fp8", text, fp8), tmp_path / "a").problems == []
    run(write_source(tmp_path / "plain", TEXT, plain), tmp_path / "b")
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and all(raw(a[n]) == raw(b[n]) for n in a)
    assert json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]["quant_method"] == "modelopt"


def test_released_names_prefix_the_body_but_not_head_and_mtp(tmp_path):
    assert run("bundled", tmp_path / "out", Settings(names="released")).problems == []
    names = read(tmp_path / "out").keys()
    assert {"model.language_model.norm.weight", "lm_head.weight", "model.layers.8.eh_proj.weight"} <= names
    bare = {n for n in names if not n.startswith(("model.language_model.", "model.vi"))}
    assert all(n == "lm_head.weight" or re.match(r"model\.layers\.(8|9|10)\.", n) for n in bare)
    assert "model.language_model.layers.3.moe.up_proj.weight_scale_2" in names


def test_released_names_are_refused_for_a_model_of_text_alone(source, tmp_path, capsys):
    line = refused(capsys, 2, source, tmp_path / "out", "--names", "released")
    assert line.startswith(f"error: names: got released, but {source} is a model of text alone")
    assert not (tmp_path / "out").exists()


def test_bundled_checkpoint_converts_with_its_side_files_but_no_code(source, converted, tmp_path, capsys):
    assert main(["bundled", str(tmp_path / "out"), "--names", "released"]) == 0
    output = capsys.readouterr().out
    assert f"{tmp_path / 'out'}: verified" in output and "all" in output
    out = tmp_path / "out"
    assert (out / "tokenizer.json").exists() and (out / "config.json").exists()
    assert (converted / "tokenizer.json").read_text() == "{}" and not (converted / "modeling.py").exists()
    assert main([str(source), str(tmp_path / "again"), "--search", "max"]) == 0
    assert "not copied: modeling.py" in capsys.readouterr().out


def test_without_kv_cache_neither_scales_nor_metadata_mention_it(source, tmp_path):
    run(source, tmp_path / "out", Settings(kv_cache="none"))
    assert not [n for n in read(tmp_path / "out") if n.endswith(("k_scale", "v_scale"))]
    assert "kv_cache_scheme" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    quantization = json.loads((tmp_path / "out/hf_quant_config.json").read_text())["quantization"]
    assert quantization["kv_cache_quant_algo"] is None


# The real model, by shapes alone.


@pytest.mark.gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_gpu_writes_the_bytes_that_the_cpu_writes(source, tmp_path, search):
    for device in ("cpu", "cuda"):
        run(source, tmp_path / device, Settings(search=search), device=device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
