"""`--format compressed-tensors`: the same numbers as in modelopt's layout, as compressed-tensors' code reads them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_checkpoint import contents, raw, read, refused
from test_model import tokens
from test_quantize_resume import Killed, killed_at

from quantize import Settings, run
from quantize.estimate import estimate
from quantize.layout import projection_name
from quantize.nvfp4 import main
from quantize.verify import verify
from step_kernels import nvfp4
from step_kernels.model import Step3p7
from step_kernels.model.checkpoint import INDEX, CheckpointError

FORM = "compressed-tensors"
EVERYTHING = {"recipe": "linears", "lm_head": True, "mtp": True}


@pytest.fixture(scope="module")
def both(source, tmp_path_factory):
    """The same conversion, everything quantized, in modelopt's layout and in compressed-tensors'."""
    root = tmp_path_factory.mktemp("compressed")
    for form in ("modelopt", FORM):
        assert run(source, root / form, Settings(format=form, **EVERYTHING)).problems == []
    return root / "modelopt", root / FORM


def modules(tensors) -> dict[str, dict[str, torch.Tensor]]:
    """Quantized modules of modelopt's layout, experts unstacked: name in the other layout -> kind -> tensor."""
    found = {}
    for name in [n for n in tensors if f"{n}_scale_2" in tensors]:
        stem, _, kind = name.rpartition(".")
        parts = {k: tensors[f"{stem}.{k}"] for k in (kind, "weight_scale", "weight_scale_2", "input_scale")}
        if ".moe." in name:
            parent, _, projection = stem.rpartition(".")
            for e in range(len(tensors[name])):
                found[f"{parent}.experts.{e}.{projection}"] = {k: t[e] for k, t in parts.items()}
        else:
            found[stem] = parts
    return found


def test_each_expert_and_linear_has_modelopts_codes_and_block_scales_and_inverse_global_scales(both):
    plain, packed = map(read, both)
    found, seen = modules(plain), set()
    assert len(found) == 2 * 4 * 3 + 3 * 7 + 7 + 2
    for name, parts in found.items():
        wanted = {
            "weight_packed": parts["weight"],
            "weight_scale": parts["weight_scale"],
            "weight_global_scale": (1 / parts["weight_scale_2"]).reshape(1),
            "input_global_scale": torch.ones(1),
        }
        for kind, tensor in wanted.items():
            got = packed[f"{name}.{kind}"]
            assert (got.dtype, got.shape, raw(got)) == (tensor.dtype, tensor.shape, raw(tensor)), f"{name}.{kind}"
            seen.add(f"{name}.{kind}")
    rest = packed.keys() - seen
    quantized = tuple(name.removesuffix("weight") for name in plain if f"{name}_scale_2" in plain)
    scales = ("weight", "weight_scale", "weight_scale_2", "input_scale")
    assert rest == {n for n in plain if not (n.startswith(quantized) and n.endswith(scales))}
    assert all(raw(packed[name]) == raw(plain[name]) for name in rest)


def test_compressed_tensors_decodes_what_modelopts_layout_holds_rounded_once_to_bfloat16(both):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationConfig

    plain, packed = map(read, both)
    config = json.loads((both[1] / "config.json").read_text())["quantization_config"]
    (scheme,) = QuantizationConfig.model_validate(config).config_groups.values()
    for name, parts in modules(plain).items():
        stored = {k.removeprefix(f"{name}."): t for k, t in packed.items() if k.startswith(f"{name}.weight")}
        got = NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
        ours = nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        read_back = 1 / (1 / parts["weight_scale_2"])  # not always the scale itself
        assert abs(read_back - parts["weight_scale_2"]) <= parts["weight_scale_2"] * 2**-23
        scales = parts["weight_scale"].float() / stored["weight_global_scale"]
        values = nvfp4.e2m1_decode(nvfp4.unpack(parts["weight"]))
        assert torch.equal(got, (values * scales.repeat_interleave(16, 1)).bfloat16()), name
        torch.testing.assert_close(got.float(), ours, rtol=2**-8, atol=0)  # one rounding to 8 bits


def test_config_is_the_nvfp4_preset_of_compressed_tensors_and_the_only_file_about_it(both):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import NVFP4

    stored = json.loads((both[1] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    (scheme,) = config.config_groups.values()
    wanted = {k: v.model_dump(exclude={"observer", "observer_kwargs"}) for k, v in NVFP4.items()}
    assert {k: getattr(scheme, k).model_dump(exclude={"observer", "observer_kwargs"}) for k in wanted} == wanted
    assert config.format == scheme.format == "nvfp4-pack-quantized" and config.kv_cache_scheme.num_bits == 8
    assert not (both[1] / "hf_quant_config.json").exists() and (both[0] / "hf_quant_config.json").exists()


@pytest.mark.parametrize("settings", [{}, {"mtp": True}, {"recipe": "linears"}, EVERYTHING], ids=str)
def test_ignore_list_leaves_out_exactly_what_is_not_quantized(settings, source, tmp_path):
    match_name = pytest.importorskip("compressed_tensors.utils.match").match_name
    assert run(source, tmp_path / "out", Settings(format=FORM, kv_cache="none", **settings)).problems == []
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"] is None
    packed = read(tmp_path / "out")
    linears = {n.rpartition(".")[0] for n, t in packed.items() if t.dim() == 2 and n.endswith(("weight", "_packed"))}
    for prefix in ("", "language_model."):  # vLLM's names have one
        left = {name for name in linears if any(match_name(prefix + name, p) for p in config["ignore"])}
        assert linears - left == {n.removesuffix(".weight_packed") for n in packed if n.endswith("_packed")}


def test_killed_anywhere_and_resumed_gives_the_same_bytes(source, both, tmp_path, monkeypatch):
    kills = 0
    for calls in (0, 1, 3, 8, 30, 90, 200):
        with monkeypatch.context() as patch:
            killed_at(patch, "pwrite", calls)
            try:
                run(source, tmp_path / str(calls), Settings(format=FORM, **EVERYTHING))
            except Killed:
                kills += 1
                assert not (tmp_path / str(calls) / INDEX).exists()
        run(source, tmp_path / str(calls), Settings(format=FORM, **EVERYTHING), resume=True)
        assert contents(tmp_path / str(calls)) == contents(both[1])
    assert kills >= 5


def test_another_format_is_another_conversion(source, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        killed_at(patch, "replace", 2)
        with pytest.raises(Killed):
            run(source, tmp_path / "out", Settings(format=FORM))
    assert "was begun with other settings" in refused(capsys, 2, source, tmp_path / "out", "--resume")


def test_command_line_writes_errors_and_sizes_as_dry_run_says(source, tmp_path, capsys):
    target, settings = tmp_path / "out", Settings(format=FORM)
    _, cost = estimate(source, target, settings)
    wanted = run(source, tmp_path / "modelopt").errors
    summary = run(source, target, settings)
    assert cost.written == summary.bytes_out == sum(f.stat().st_size for f in target.glob("*.safetensors"))
    assert summary.errors.sums == wanted.sums
    assert main([str(source), str(tmp_path / "again"), "--format", FORM, "--device", "cpu"]) == 0
    assert "verified" in capsys.readouterr().out and contents(tmp_path / "again") == contents(target)


def test_own_model_says_that_it_wants_modelopts_layout(tmp_path):
    run("bundled", tmp_path / "out", Settings(format=FORM), verify=False)
    with pytest.raises(CheckpointError, match="out: holds compressed-tensors' layout, wanted BF16, FP8 or modelopt's"):
        Step3p7.from_pretrained(tmp_path / "out", "cpu", torch.float32)


def test_calibrated_searches_write_the_same_numbers_in_both_formats(tmp_path):
    np.save(tmp_path / "ids.npy", tokens(2, 80).numpy())
    for form in ("modelopt", FORM):
        settings = Settings(search="hessian", calibration=tmp_path / "ids.npy", kv_scales="calibrated", format=form)
        assert run("bundled", tmp_path / form, settings).problems == []
    plain, packed = (read(tmp_path / form) for form in ("modelopt", FORM))
    found = modules(plain)
    assert len({float(parts["input_scale"]) for parts in found.values()}) > 4
    for name, parts in found.items():
        assert raw(packed[f"{name}.weight_packed"]) == raw(parts["weight"])
        assert raw(packed[f"{name}.weight_scale"]) == raw(parts["weight_scale"])
        assert raw(packed[f"{name}.input_global_scale"]) == raw(1 / parts["input_scale"])
    caches = [n for n in plain if n.endswith(("k_scale", "v_scale"))]
    assert len(caches) == 16 and all(raw(plain[n]) == raw(packed[n]) for n in caches)
    assert any(plain[n] != 1 for n in caches)


def test_verify_measures_what_it_measures_of_modelopts_layout(source, both):
    ours, theirs = (verify(folder, source) for folder in both)
    for projection, sums in ours.measured.sums.items():
        assert theirs.measured.sums[projection]["stored"] == pytest.approx(sums["stored"], rel=1e-5)
    assert set(ours.measured.sums) == set(map(projection_name, MEASURED))
    notes = [f.what for f in theirs.findings.found]
    assert notes == ["stores experts one by one", "MTP layers are in NVFP4"]


MEASURED = [f"model.layers.1.{part}.{p}_proj.weight" for part in ("moe", "share_expert", "mlp") for p in ("gate", "up")]
MEASURED += [f"model.layers.1.{part}.down_proj.weight" for part in ("moe", "share_expert", "mlp")]
MEASURED += [f"model.layers.1.self_attn.{p}_proj.weight" for p in "qkvo"]
MEASURED += ["lm_head.weight", "model.layers.3.transformer.shared_head.output.weight"]
