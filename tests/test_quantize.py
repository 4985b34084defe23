"""The converter: a small model of the released schema, written here, its gate and up in different shards."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantize.shards
from quantize import Settings, UsageError, run
from quantize.layout import GROUPS, expert_shapes, tensor_shapes
from quantize.modelopt import is_excluded, released_name
from quantize.nvfp4 import main
from quantize.plan import make_plan
from step_kernels import nvfp4
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError, Entry
from step_kernels.model.config import StepConfig

PROJECTIONS = [p for group in GROUPS for p in group]
# 192 and 144 are multiples of 16 but not of FP8's 128.
TEXT = {
    "model_type": "step3p5",
    "hidden_size": 192,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 1,
    "vocab_size": 40,
    "max_position_embeddings": 64,
    "num_attention_heads": 2,
    "num_attention_groups": 1,
    "head_dim": 16,
    "layer_types": ["full_attention"] * 4,
    "moe_layers_enum": "1,2",
    "moe_num_experts": 4,
    "moe_top_k": 2,
    "moe_intermediate_size": 144,
    "share_expert_dim": 32,
    "moe_router_scaling_factor": 3.0,
}


def tensors_of(text: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    generator, config = torch.Generator().manual_seed(seed), StepConfig.from_dict(text)
    shapes = tensor_shapes(config) | expert_shapes(config)
    tensors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
    return {name: t if name.endswith("router_bias") else t.bfloat16() for name, t in tensors.items()}


def write_source(folder: Path, text: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """Four shards: gate in the second, up in the third, down in the fourth, the rest in turn."""
    folder.mkdir()
    shards = [{} for _ in range(4)]
    for i, (name, t) in enumerate(tensors.items()):
        place = next((n for n, p in enumerate(PROJECTIONS, 1) if f".moe.{p}." in name), i % 4)
        shards[place][name] = t
    files = [f"model-{i:05}-of-00004.safetensors" for i in range(1, 5)]
    for file, shard in zip(files, shards):
        save_file(shard, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, shard in zip(files, shards) for name in shard if "scale_inv" not in name}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(text))
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def raw(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("quantize") / "source", TEXT, tensors_of(TEXT))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit('never to be run')")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "converted"
    assert run(source, folder).problems == []
    return folder


def refused(capsys, status: int, *arguments: str) -> str:
    """The one line on stderr of a command that must fail with `status`."""
    assert main([str(a) for a in arguments]) == status
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "Traceback" not in text, text
    return text


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
        name = f"model.layers.{layer}.moe.{projection}.weight"
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


def test_released_names_prefix_the_body_but_not_head_and_mtp(source, tmp_path):
    run(source, tmp_path / "out", Settings(names="released"))
    names = read(tmp_path / "out").keys()
    assert {"model.language_model.norm.weight", "lm_head.weight", "model.layers.3.eh_proj.weight"} <= names
    bare = {n for n in names if not n.startswith("model.language_model.")}
    assert all(n == "lm_head.weight" or n.startswith("model.layers.3.") for n in bare)
    assert "model.language_model.layers.2.moe.up_proj.weight_scale_2" in names


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


def real_plan(names: str):
    full, sliding = "full_attention", "sliding_attention"
    text = TEXT | {
        "hidden_size": 4096,
        "intermediate_size": 11264,
        "num_hidden_layers": 45,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128896,
        "num_attention_heads": 64,
        "num_attention_groups": 8,
        "head_dim": 128,
        "layer_types": [full if i % 4 == 0 else sliding for i in range(48)],
        "sliding_window": 512,
        "attention_other_setting": {"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        "moe_layers_enum": ",".join(map(str, range(3, 45))),
        "moe_num_experts": 288,
        "moe_top_k": 8,
        "moe_intermediate_size": 1280,
        "share_expert_dim": 1280,
    }
    vision = {"image_size": 728, "patch_size": 14, "width": 1536, "layers": 47, "heads": 16}
    config = {"model_type": "step3p7", "image_token_id": 128001, "text_config": text, "vision_config": vision}
    parsed = StepConfig.from_dict(config)
    entries = {}
    for name, shape in (tensor_shapes(parsed) | expert_shapes(parsed)).items():
        dtype = torch.float32 if name.endswith("router_bias") else torch.bfloat16
        entries[name] = Entry(name, Path("model.safetensors"), dtype, shape, 0, 0)
    checkpoint = Checkpoint.__new__(Checkpoint)
    checkpoint.folder, checkpoint.config, checkpoint.entries = Path("real"), config, entries
    return make_plan(checkpoint, Settings(names=names)), entries


def elements(tensors) -> dict[str, int]:
    counts = {}
    for dtype, shape in tensors:
        counts[dtype] = counts.get(dtype, 0) + int(torch.Size(shape).numel())
    return counts


def test_real_plan_has_the_released_tensor_and_element_counts():
    plan, entries = real_plan("released")
    assert len(entries) == 1471
    assert elements((e.dtype, e.shape) for e in entries.values()) == {
        torch.bfloat16: 201_365_304_064,
        torch.float32: 12_096,
    }
    (shard,) = plan.shards.values()
    assert len(shard) == 1939
    assert elements(shard.values()) == {
        "U8": 95_126_814_720,
        "F8_E4M3": 11_890_851_840,
        "BF16": 11_111_674_624,
        "F32": 84_672 + 90,
    }
    assert shard["model.language_model.layers.44.moe.down_proj.weight_scale"] == ("F8_E4M3", (288, 4096, 80))


def released_ignore() -> list[str]:
    body = "model.language_model.layers"
    moe = [f"{body}.{i}.{p}" for i in range(3, 45) for p in ("moe.gate", "self_attn*", "share_expert*")]
    mtp = [f"{prefix}.{i}.*" for prefix in (body, "model.layers") for i in (45, 46, 47)]
    vision = ["model.vision_model*", "model.vit_large_projector"]
    return ["lm_head", f"{body}.0*", f"{body}.1.*", f"{body}.2.*", *moe, *vision, *mtp]


def test_exclude_list_holds_the_releases_138_patterns():
    plan, _ = real_plan("source")
    released = released_ignore()
    assert len(released) == 138
    # Two are spelt otherwise here: a dot behind every layer number, and what lies below the projector too.
    respelt = {"model.language_model.layers.0*": "model.language_model.layers.0.*"}
    respelt["model.vit_large_projector"] = "model.vit_large_projector*"
    assert {respelt.get(p, p) for p in released} <= set(plan.patterns)


@pytest.mark.parametrize("names", ["source", "released"])
def test_engines_matcher_excludes_every_linear_but_no_expert(names):
    plan, entries = real_plan(names)
    linears = [n for n, e in entries.items() if len(e.shape) == 2 and n.endswith("weight") and "embed_tokens" not in n]
    spell = (lambda n: n) if names == "source" else (lambda n: released_name(n, plan.config))
    modules = [re.sub(r"[._]weight$", "", spell(n)) for n in linears]
    assert len(modules) == 1 + 45 * 5 + 3 * 3 + 42 * 4 + 3 * (5 + 3 + 2) + 47 * 4 + 1
    assert [m for m in modules if not is_excluded(m, plan.patterns)] == []
    experts = [spell(f"model.layers.{i}.moe.experts") for i in range(3, 45)]
    assert [m for m in experts if is_excluded(m, plan.patterns)] == []
    # By globs alone, as TensorRT-LLM matches, the stacked tensors' own module names are not excluded either.
    stacks = [spell(f"model.layers.{i}.moe.{p}") for i in range(3, 45) for p in PROJECTIONS]
    assert [m for m in stacks if any(fnmatchcase(m, p) for p in plan.patterns)] == []


def test_matcher_takes_an_undotted_layer_number_for_ten_layers():
    modules = [f"model.layers.{i}.moe.experts" for i in range(20)]
    assert [is_excluded(m, ["model.layers.1*"]) for m in modules] == [i == 1 or i >= 10 for i in range(20)]
    assert [is_excluded(m, ["model.layers.1.*"]) for m in modules] == [i == 1 for i in range(20)]


# Interruption.


class Killed(BaseException):
    pass


def killed_at(monkeypatch, function: str, calls: int):
    """Makes os.`function` raise from its call number `calls` on, as if the process had died there."""
    original, count = getattr(os, function), iter(range(10**9))

    def die(*args, **kwargs):
        if next(count) >= calls:
            raise Killed
        return original(*args, **kwargs)

    monkeypatch.setattr(quantize.shards.os, function, die)


@pytest.mark.parametrize("function", ["replace", "pwrite", "fsync"])
def test_killed_anywhere_and_resumed_gives_the_same_bytes(function, source, converted, tmp_path, monkeypatch):
    kills = 0
    for calls in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 30, 60, 90, 120):
        folder = tmp_path / str(calls)
        with monkeypatch.context() as patch:
            killed_at(patch, function, calls)
            try:
                run(source, folder)
            except Killed:
                kills += 1
                assert not (folder / INDEX).exists()
        for whole in folder.glob("*.safetensors"):
            assert whole.read_bytes() == (converted / whole.name).read_bytes()
        errors = run(source, folder, resume=True).errors
        assert contents(folder) == contents(converted)
        assert errors.sums.keys() in ({(i, p) for i in (1, 2) for p in PROJECTIONS}, set())
    assert kills >= 9


def test_process_killed_by_sigkill_resumes_to_the_same_bytes(source, converted, tmp_path):
    for i, delay in enumerate((0.0, 0.02, 0.08)):
        folder = tmp_path / str(i)
        command = [sys.executable, "-m", "quantize.nvfp4", str(source), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not folder.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert main([str(source), str(folder), "--resume"]) == 0
        assert contents(folder) == contents(converted)


def test_resumed_run_keeps_whole_shards_and_their_errors(source, tmp_path, monkeypatch):
    wanted = run(source, tmp_path / "whole").errors
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 6)  # state, then state and shard thrice: the third shard is not renamed
        run(source, tmp_path / "out")
    kept = {f.name: f.stat().st_ino for f in (tmp_path / "out").glob("*.safetensors")}
    assert sorted(kept) == ["model-00001-of-00004.safetensors", "model-00002-of-00004.safetensors"]
    summary = run(source, tmp_path / "out", resume=True)
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in kept.items())
    assert summary.errors.sums == wanted.sums


def test_resume_with_other_settings_or_source_is_refused(source, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 4)
        run(source, tmp_path / "out")
    other = write_source(tmp_path / "other", TEXT | {"max_position_embeddings": 128}, tensors_of(TEXT))
    assert "other settings" in refused(capsys, 2, source, tmp_path / "out", "--resume", "--search", "max")
    assert "another source" in refused(capsys, 2, other, tmp_path / "out", "--resume")
    assert main([str(source), str(tmp_path / "out"), "--resume"]) == 0
    assert "no stopped conversion" in refused(capsys, 2, source, tmp_path / "out", "--resume", "--search", "max")


def test_interrupt_says_how_to_go_on(source, tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize.shards.os, "pwrite", interrupt)
    line = refused(capsys, 130, source, tmp_path / "out")
    assert line == f"interrupted; to go on: python -m quantize.nvfp4 {source} {tmp_path / 'out'} --resume\n"


def test_index_is_renamed_last_after_both_metadata_files(source, tmp_path, monkeypatch):
    order, replace = [], os.replace
    monkeypatch.setattr(quantize.shards.os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    run(source, tmp_path / "out")
    assert order[-3:] == ["hf_quant_config.json", "config.json", INDEX]
    assert set(order[:-3]) >= {f.name for f in source.glob("*.safetensors")}


def test_memory_stays_within_a_few_slices_on_a_300_mb_model(tmp_path):
    text = TEXT | {
        "hidden_size": 1024,
        "moe_intermediate_size": 512,
        "moe_num_experts": 64,
        "vocab_size": 25_000,
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 0,
        "layer_types": ["full_attention"],
        "moe_layers_enum": [0],
    }
    shapes = expert_shapes(StepConfig.from_dict(text)) | tensor_shapes(StepConfig.from_dict(text))
    row = (torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    tensors = {n: row.repeat(-(-torch.Size(s).numel() // len(row)))[: torch.Size(s).numel()] for n, s in shapes.items()}
    folder = write_source(tmp_path / "source", text, {n: t.reshape(shapes[n]) for n, t in tensors.items()})
    assert sum(f.stat().st_size for f in folder.iterdir()) > 290e6
    # VmHWM, unlike ru_maxrss, starts anew with the process.
    code = """if True:
        import re, sys
        from quantize import Settings, run
        peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
        before = peak()
        assert not run(sys.argv[1], sys.argv[2], Settings(search="max")).problems
        print(peak() - before)"""
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc to read the peak from")
    out = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "out")], capture_output=True, text=True, check=True
    )
    assert int(out.stdout) < 100 * 1024  # kB


# Bad input.


def edited(source: Path, folder: Path, edit) -> Path:
    """The source with `edit` applied to its tensors."""
    tensors = read(source)
    edit(tensors)
    return write_source(folder, TEXT, tensors)


GATE = "model.layers.1.moe.gate_proj.weight"


def poison(value: float):
    def edit(tensors):
        tensors[GATE][2, 3, 4] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "wanted"),
    [
        (lambda t: t.update({"model.layers.1.moe.extra": torch.ones(2)}), "model.layers.1.moe.extra: no rule"),
        (lambda t: t.pop(GATE), f"tensor {GATE} is missing"),
        (lambda t: t.pop("model.layers.0.self_attn.g_proj.weight"), "self_attn.g_proj.weight is missing"),
        (lambda t: t.pop("model.layers.3.enorm.weight"), "model.layers.3.enorm.weight is missing"),
        (lambda t: t.update({GATE: t[GATE][:, :-1].clone()}), "shape [4, 143, 192], wanted [4, 144, 192]"),
        (lambda t: t.update({GATE: t[GATE].to(torch.int32)}), f"{GATE}: dtype I32, wanted BF16 or F16 or F32"),
        (lambda t: t.update({GATE: t[GATE].to(torch.float8_e4m3fn)}), f"{GATE}_scale_inv is missing"),
        (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.uint8)}), "lm_head.weight: dtype U8"),
        (lambda t: t.update({f"{GATE}_scale_inv": torch.ones(4, 2, 2)}), "wanted F8_E4M3 with it"),
        (poison(float("nan")), f"{GATE}: expert 2 holds NaN or infinity"),
        (poison(float("-inf")), f"{GATE}: expert 2 holds NaN or infinity"),
    ],
)
def test_bad_tensor_is_named_in_one_line_and_no_final_file_is_left_broken(edit, wanted, source, tmp_path, capsys):
    bad = edited(source, tmp_path / "bad", edit)
    assert wanted in refused(capsys, 1, bad, tmp_path / "out")
    out = tmp_path / "out"
    assert not (out / INDEX).exists() and not (out / "config.json").exists()
    for file in out.glob("*.safetensors"):
        assert len(load_file(file)) > 0


def test_mtp_layers_may_be_absent_as_a_whole(source, tmp_path):
    def drop(tensors):
        for name in [n for n in tensors if n.startswith("model.layers.3.")]:
            del tensors[name]

    assert run(edited(source, tmp_path / "trunk", drop), tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"hidden_size": None}, "hidden_size is None"),
        ({"moe_num_experts": 5}, "shape [4, "),
        ({"moe_intermediate_size": 136}, "moe_intermediate_size is 136, wanted a multiple of 16"),
        ({"moe_layers_enum": ""}, "moe_layers_enum names no layer"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "already quantized"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "already quantized"),
    ],
)
def test_bad_config_is_refused_by_field(config, wanted, tmp_path, capsys):
    bad = write_source(tmp_path / "bad", TEXT | config, tensors_of(TEXT))
    assert wanted in refused(capsys, 1, bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_files_are_named(source, tmp_path, capsys):
    shard = "model-00003-of-00004.safetensors"
    for i, break_it in enumerate(
        (
            lambda f: f.unlink(),
            lambda f: f.write_bytes(f.read_bytes()[:-1]),
            lambda f: f.write_bytes(b"\xff" * 64),
            lambda f: f.write_bytes(b""),
        )
    ):
        bad = write_source(tmp_path / f"bad{i}", TEXT, tensors_of(TEXT))
        break_it(bad / shard)
        assert shard in refused(capsys, 1, bad, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    assert "config.json: not found" in refused(capsys, 1, tmp_path, tmp_path / "out")
    assert "not a folder" in refused(capsys, 1, tmp_path / "none", tmp_path / "out")


def test_targets_that_cannot_be_meant_exit_with_2(source, converted, tmp_path, capsys):
    before = contents(converted)
    assert "--resume" in refused(capsys, 2, source, converted)
    assert "is the source too" in refused(capsys, 2, source, source)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    assert "no stopped conversion" in refused(capsys, 2, source, tmp_path / "mine", "--resume")
    (tmp_path / "download").mkdir()
    (tmp_path / "download/film.part").write_text("keep")
    assert main([str(source), str(tmp_path / "download"), "--resume"]) == 0
    assert (tmp_path / "download/film.part").read_text() == "keep"
    assert contents(converted) == before and contents(tmp_path / "mine") == {"notes.txt": b"keep"}
    if not torch.cuda.is_available():
        assert "no GPU" in refused(capsys, 2, source, tmp_path / "out", "--device", "cuda")


def test_target_that_cannot_be_written_is_one_line(source, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in refused(capsys, 1, source, tmp_path / "file/out")
    assert "wanted a folder" in refused(capsys, 1, source, tmp_path / "file")


def test_full_disk_is_one_line_and_resumable(source, converted, tmp_path, monkeypatch, capsys):
    pwrite, calls = os.pwrite, iter(range(10**9))

    def full(*args):
        if next(calls) > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(quantize.shards.os, "pwrite", full)
        assert "No space left on device; to go on:" in refused(capsys, 1, source, tmp_path / "out")
    assert main([str(source), str(tmp_path / "out"), "--resume"]) == 0
    assert contents(tmp_path / "out") == contents(converted)


def test_too_small_a_disk_is_refused_before_any_shard(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "1,000 bytes are free, wanted" in refused(capsys, 1, source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_refused_result_has_no_index(source, tmp_path, monkeypatch, capsys):
    def zero(x, *_):
        return torch.zeros(x.shape[0], x.shape[1] // 16, dtype=torch.float8_e4m3fn)

    monkeypatch.setattr(nvfp4, "search_scales", zero)
    assert main([str(source), str(tmp_path / "out")]) == 1
    assert "block scales are zero, negative or NaN" in capsys.readouterr().err
    assert not (tmp_path / "out" / INDEX).exists()


def test_unknown_search_is_refused_by_command_and_function(capsys):
    with pytest.raises(UsageError, match="search: got 'best', wanted one of mse, max, four-six"):
        Settings(search="best")
    with pytest.raises(SystemExit) as leaving:
        main(["bundled", "out", "--search", "best"])
    line = capsys.readouterr().err
    assert leaving.value.code == 2 and line.startswith("error: argument --search: ") and line.count("\n") == 1


def test_source_that_shrinks_while_being_read_is_an_error(source, tmp_path):
    folder = write_source(tmp_path / "source", TEXT, tensors_of(TEXT))
    checkpoint = Checkpoint(folder)
    entry = checkpoint.entry("lm_head.weight")
    os.truncate(entry.file, entry.begin + 10)
    with pytest.raises(CheckpointError, match="lm_head.weight: the file ends at byte"):
        list(quantize.shards.read_chunks(entry))


@pytest.mark.gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_gpu_writes_the_bytes_that_the_cpu_writes(source, tmp_path, search):
    for device in ("cpu", "cuda"):
        run(source, tmp_path / device, Settings(search=search), device=device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
