"""The `linears` recipe: which weights become NVFP4, their bytes, and the model that they make."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import TEXT, contents, raw, read, refused, tensors_of, write_source
from test_quantize_resume import Killed, killed_at

import quantize.matrices
from quantize import Settings, UsageError, run
from quantize.nvfp4 import main
from quantize.plan import make_plan, resolve_source
from quantize.verify import verify
from step_kernels import nvfp4
from step_kernels.model import Step3p7
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError
from step_kernels.nvfp4 import NVFP4Weight
from step_kernels.testing import relative_error

LINEARS, WITH_HEAD = Settings(recipe="linears"), Settings(recipe="linears", lm_head=True)
WITH_DRAFTS = Settings(recipe="linears", lm_head=True, mtp=True)
ATTENTION, MLP = (("q_proj", "k_proj", "v_proj"), ("o_proj",)), (("gate_proj", "up_proj"), ("down_proj",))
# Layer 0 is dense, 1 and 2 have experts, 3 is the MTP layer.
GROUPS = [
    [f"model.layers.{i}.{module}.{projection}.weight" for projection in group]
    for i, mlp in enumerate(("mlp", "share_expert", "share_expert"))
    for module, groups in (("self_attn", ATTENTION), (mlp, MLP))
    for group in groups
]
NAMES = [name for group in GROUPS for name in group]
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def linears(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("linears") / "converted"
    assert run(source, folder, LINEARS).problems == []
    return folder


def is_expert(name: str) -> bool:
    return re.search(r"\.moe\.(gate|up|down)_proj\.", name) is not None


def test_linears_of_trunk_are_stored_with_scalar_scales_and_nothing_else_is_quantized(source, linears):
    given, out = read(source), read(linears)
    assert len(NAMES) == 21
    for name in NAMES:
        n, k = given[name].shape
        parts = [out[name], *(out[name.removesuffix("weight") + s] for s in ("weight_scale", "weight_scale_2"))]
        parts.append(out[name.removesuffix("weight") + "input_scale"])
        wanted = [(torch.uint8, (n, k // 2)), (torch.float8_e4m3fn, (n, k // 16))]
        assert [(t.dtype, t.shape) for t in parts] == [*wanted, (torch.float32, ()), (torch.float32, ())]
        assert parts[-1].item() == 1
    assert {n for n, t in out.items() if t.dtype == torch.uint8 and not is_expert(n)} == set(NAMES)


def test_one_global_scale_serves_q_k_v_and_another_gate_and_up_bit_for_bit(source, linears):
    given, out = read(source), read(linears)
    for group in GROUPS:
        amax = torch.stack([given[name].float().abs().amax() for name in group]).amax()
        assert [raw(out[f"{name}_scale_2"]) for name in group] == [raw(amax / 2688)] * len(group)


def test_tensors_left_alone_are_byte_equal_and_experts_are_the_experts_recipes(source, converted, linears):
    given, out, experts = read(source), read(linears), read(converted)
    alone = [n for n in given if n not in NAMES and not is_expert(n)]
    assert len(alone) == len(given) - 21 - 6
    assert {f"model.layers.{n}.weight" for n in ("1.moe.gate", "2.self_attn.g_proj", "3.eh_proj")} <= set(alone)
    assert {"lm_head.weight", "model.layers.3.self_attn.q_proj.weight"} <= set(alone)
    assert all(given[n].dtype == out[n].dtype and raw(given[n]) == raw(out[n]) for n in alone)
    same = [n for n in experts if n not in NAMES]  # the KV cache scales beside k and v among them
    assert all(raw(experts[n]) == raw(out[n]) for n in same)
    assert out.keys() - experts.keys() == {
        name.removesuffix("weight") + s for name in NAMES for s in ("weight_scale", "weight_scale_2", "input_scale")
    }
    before, after = (json.loads((f / INDEX).read_text())["weight_map"] for f in (source, linears))
    assert all(after[name] == file for name, file in before.items())


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_bytes_are_those_of_the_search_over_whole_weights_in_pieces_of_any_size(search, source, tmp_path, monkeypatch):
    settings = Settings(recipe="linears", search=search, lm_head=True)
    run(source, tmp_path / "whole", settings)
    monkeypatch.setattr(quantize.matrices, "FP8_BLOCK", 16)
    monkeypatch.setattr(quantize.matrices, "_PIECE", 1)  # 16 rows: q of 32 has two pieces, lm_head of 40 three
    assert run(source, tmp_path / "pieces", settings).problems == []
    assert contents(tmp_path / "pieces") == contents(tmp_path / "whole")
    given, out = read(source), read(tmp_path / "pieces")
    for name in (*NAMES, "lm_head.weight"):
        w, scale = given[name].float(), out[f"{name}_scale_2"]
        codes, scales = nvfp4.quantize(w, scale, nvfp4.search_scales(w, scale, search))
        assert raw(out[name]) == raw(codes) and raw(out[f"{name}_scale"]) == raw(scales)


def test_linears_bytes_equal_modelopts_quantizer_and_decoder(source, tmp_path):
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor").NVFP4QTensor
    run(source, tmp_path / "out", Settings(recipe="linears", search="max", lm_head=True))
    given, out = read(source), read(tmp_path / "out")
    for name in (*NAMES, "lm_head.weight"):
        codes, scales, scale = (out[f"{name}{s}"] for s in ("", "_scale", "_scale_2"))
        wanted, wanted_scales, _ = modelopt.quantize(given[name].clone(), 16, weights_scaling_factor_2=scale.clone())
        assert raw(scales) == raw(wanted_scales) and torch.equal(codes, wanted._quantized_data)
        tensor = modelopt(given[name].shape, torch.float32, codes)
        decoded = tensor.dequantize(scale=scales, double_scale=scale, block_sizes={-1: 16}, dtype=torch.float32)
        assert torch.equal(decoded, nvfp4.dequantize(codes, scales, scale))


@pytest.mark.parametrize("settings, suffix", [(LINEARS, ""), (Settings(rest="fp8"), " FP8")], ids=["nvfp4", "fp8"])
def test_linears_of_fp8_sources_become_what_their_dequantized_weights_do(tmp_path, monkeypatch, settings, suffix):
    monkeypatch.setattr(quantize.matrices, "_PIECE", 1)  # pieces of 128 rows: an intermediate size of 208 has two
    text = TEXT | {"intermediate_size": 208}
    tensors = tensors_of(text, seed=1)
    fp8, plain = dict(tensors), dict(tensors)
    for name in NAMES:
        n, k = tensors[name].shape
        inverse = torch.rand(-(-n // 128), -(-k // 128), generator=torch.Generator().manual_seed(n)) * 1e-3 + 1e-4
        fp8[name] = (tensors[name].float() * 1000).to(torch.float8_e4m3fn)
        fp8[f"{name}_scale_inv"] = inverse
        plain[name] = fp8[name].float() * inverse.repeat_interleave(128, 0)[:n].repeat_interleave(128, 1)[:, :k]
    quantization = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    fp8_source = write_source(tmp_path / "fp8", text | quantization, fp8)
    assert run(fp8_source, tmp_path / "a", settings).problems == []
    run(write_source(tmp_path / "plain", text, plain), tmp_path / "b", settings)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and all(raw(a[n]) == raw(b[n]) for n in a)
    report = verify(tmp_path / "a", fp8_source)
    assert report.problems == [] and report.measured.sums[f"mlp.up_proj{suffix}"]["stored"] > 0
    with pytest.raises(CheckpointError, match="no rule says|dtype F8_E4M3, wanted BF16"):
        run(fp8_source, tmp_path / "c")


def test_recipe_and_lm_head_change_the_conversions_digest(source, tmp_path, monkeypatch, capsys):
    plans = [make_plan(Checkpoint(source), settings) for settings in (Settings(), LINEARS, WITH_HEAD)]
    assert len({plan.digest for plan in plans}) == 3
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 4)
        run(source, tmp_path / "out", LINEARS)
    assert "other settings" in refused(capsys, 2, source, tmp_path / "out", "--resume")
    head = ("--recipe", "linears", "--lm-head")
    assert "other settings" in refused(capsys, 2, source, tmp_path / "out", "--resume", *head)


@pytest.mark.parametrize("function", ["replace", "pwrite"])
def test_linears_killed_anywhere_and_resumed_give_the_same_bytes(function, source, linears, tmp_path, monkeypatch):
    kills = 0
    monkeypatch.setattr(quantize.matrices, "FP8_BLOCK", 16)
    monkeypatch.setattr(quantize.matrices, "_PIECE", 1)
    for calls in (*range(0, 13, 2), 40, 80, 120, 160):
        folder = tmp_path / str(calls)
        with monkeypatch.context() as patch:
            killed_at(patch, function, calls)
            try:
                run(source, folder, LINEARS)
            except Killed:
                kills += 1
                assert not (folder / INDEX).exists()
        run(source, folder, LINEARS, resume=True)
        assert contents(folder) == contents(linears)
    assert kills >= 6


def test_rows_not_a_multiple_of_16_are_refused_by_tensor_but_no_trouble_to_experts(tmp_path):
    text = TEXT | {"share_expert_dim": 40}
    folder = write_source(tmp_path / "source", text, tensors_of(text))
    with pytest.raises(
        CheckpointError, match=r"1\.share_expert\.down_proj\.weight: rows of 40, wanted a multiple of 16"
    ):
        run(folder, tmp_path / "linears", LINEARS)
    assert not (tmp_path / "linears").exists()
    assert run(folder, tmp_path / "experts").problems == []


def test_nan_in_a_linear_is_named_without_an_expert(source, tmp_path):
    tensors = read(source)
    tensors[Q][3, 4] = float("nan")
    folder = write_source(tmp_path / "source", TEXT, tensors)
    with pytest.raises(CheckpointError, match=f"{re.escape(Q)}: holds NaN or infinity"):
        run(folder, tmp_path / "out", LINEARS)


def test_lm_head_is_quantized_and_taken_off_the_exclude_list_on_request_only(source, linears, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out"), "--recipe", "linears", "--lm-head"]) == 0
    tables = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("layer")]
    mlps = [[f"{module}.{p}_proj" for p in ("gate", "up", "down")] for module in ("mlp", "share_expert", "moe")]
    assert [table[1:-3] for table in tables] == [[f"self_attn.{p}_proj" for p in "qkvo"], *mlps, ["lm_head"]]
    before, after = read(linears), read(tmp_path / "out")
    assert before["lm_head.weight"].dtype == torch.bfloat16 and after["lm_head.weight"].dtype == torch.uint8
    assert after["lm_head.weight_scale_2"].shape == ()
    files = [json.loads((f / "hf_quant_config.json").read_text()) for f in (linears, tmp_path / "out")]
    without, with_head = (set(file["quantization"]["exclude_modules"]) for file in files)
    assert with_head < without and without - with_head == {"lm_head"}
    with pytest.raises(UsageError, match="lm_head: got it with recipe experts, wanted recipe linears"):
        Settings(lm_head=True)
    assert "lm_head" in refused(capsys, 2, source, tmp_path / "other", "--lm-head")


@pytest.mark.parametrize("settings", [LINEARS, WITH_HEAD, WITH_DRAFTS], ids=["linears", "lm_head", "mtp"])
def test_bundled_model_in_linears_computes_what_its_decoded_weights_compute(settings, tmp_path):
    assert run("bundled", tmp_path / "out", settings).problems == []
    out, plain = read(tmp_path / "out"), {}
    for name, tensor in out.items():
        if f"{name}_scale_2" in out:
            plain[name] = nvfp4.dequantize(tensor, out[f"{name}_scale"], out[f"{name}_scale_2"])
        elif not name.endswith(("weight_scale", "weight_scale_2", "input_scale")):
            plain[name] = tensor
    (tmp_path / "plain").mkdir()
    save_file(plain, tmp_path / "plain/model.safetensors")
    bundled = resolve_source("bundled")
    (tmp_path / "plain/config.json").write_text((bundled / "config.json").read_text())
    folders = (tmp_path / "out", tmp_path / "plain", bundled)
    packed, decoded, exact = (Step3p7.from_pretrained(f, "cpu", torch.float32) for f in folders)
    first, last = packed.layers[0], packed.layers[-1]
    linears = [
        first.attention.qkvg.weights[0],
        first.attention.o,
        first.ffn.down,
        last.attention.qkvg.weights[2],
        last.ffn.share.gate_up.weights[1],
        packed.lm_head,
    ]
    assert [isinstance(w, NVFP4Weight) for w in linears] == [True] * 5 + [settings.lm_head]
    drafts = [w for layer in packed.mtp for w in (layer.decoder.attention.o, layer.decoder.ffn.down, layer.head)]
    assert [isinstance(w, NVFP4Weight) for w in drafts] == [settings.mtp] * 9
    tokens = torch.randint(13, packed.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(4))
    assert relative_error(packed(tokens), decoded(tokens)) < 1e-6
    assert relative_error(packed(tokens), exact(tokens)) > 1e-3
    prompt = tokens[0].tolist()
    said = [list(m.generate(prompt, max_new_tokens=12, mtp=True)) for m in (packed, decoded)]
    assert len(said[0]) > 0 and said[0] == said[1]


@pytest.mark.gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_gpu_writes_the_linears_that_the_cpu_writes(search, source, tmp_path):
    for device in ("cpu", "cuda"):
        run(source, tmp_path / device, Settings(recipe="linears", search=search, lm_head=True), device=device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
