"""`--rest fp8`: linears beside the experts as e4m3 with a scale a row, their bytes, files and the model they make."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import TEXT, contents, raw, read, tensors_of, write_source
from test_model import tokens
from test_quantize_resume import Killed, killed_at
from test_verify import edit_json, f32, overwrite

import quantize.matrices
from quantize import Settings, UsageError, fp8, run
from quantize.engines import Excludes, modules
from quantize.estimate import actions, estimate
from quantize.kinds import kinds
from quantize.layout import recipe_precisions, weight_groups
from quantize.nvfp4 import main
from quantize.plan import make_plan, resolve_source
from quantize.verify import verify
from step_kernels import nvfp4
from step_kernels.model import Step3p7
from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError
from step_kernels.model.formats import FP8Channels
from step_kernels.nvfp4 import NVFP4Weight
from step_kernels.testing import relative_error

REST = Settings(rest="fp8")
EVERYTHING = Settings(rest="fp8", lm_head=True, mtp=True)
# Layer 0 is dense, 1 and 2 have experts, 3 is the MTP layer.
TRUNK = {
    f"model.layers.{i}.{module}.{projection}_proj.weight"
    for i, mlp in enumerate(("mlp", "share_expert", "share_expert"))
    for module, projections in (("self_attn", "qkvo"), (mlp, ("gate", "up", "down")))
    for projection in projections
}
DRAFTS = {name.replace("layers.0", "layers.3") for name in TRUNK if "layers.0." in name}
HEADS = {"lm_head.weight", "model.layers.3.transformer.shared_head.output.weight"}
OUT = "model.layers.1.self_attn.o_proj.weight"
FORMS = ("modelopt", "compressed-tensors")
# Every code but the two NaN, by what it decodes to.
CODES = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F], dtype=torch.uint8)
VALUES = CODES.view(torch.float8_e4m3fn).double()


@pytest.fixture(scope="module")
def rest(source, tmp_path_factory):
    """The small source with all that can be in FP8, by format."""
    root = tmp_path_factory.mktemp("fp8")
    for form in FORMS:
        assert run(source, root / form, Settings(rest="fp8", format=form)).problems == []
    return root


@pytest.fixture
def copy(rest, tmp_path):
    return shutil.copytree(rest / "modelopt", tmp_path / "copy")


def by_hand(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales: each number compared with all that e4m3 has, of two as near the even code."""
    w = weight.float().numpy()
    amax = np.abs(w).max(1)
    scale = np.where(amax == 0, np.float32(1), amax / np.float32(448)).astype(np.float32)
    ratio = torch.from_numpy((w / scale[:, None]).clip(-448, 448)).double()
    distance = (ratio[..., None] - VALUES).abs()
    same_sign = (CODES >= 128) == torch.signbit(ratio)[..., None]
    distance = torch.where(same_sign, distance * 2 + 0.0, torch.inf)
    near = distance == distance.amin(-1, keepdim=True)
    even = near & (CODES % 2 == 0)
    return CODES[torch.where(even.any(-1), even.int().argmax(-1), near.int().argmax(-1))], torch.from_numpy(scale)


def in_fp8(tensors) -> set[str]:
    return {n for n, t in tensors.items() if t.dtype == torch.float8_e4m3fn and f"{n}_scale" in tensors}


@pytest.mark.parametrize("form", FORMS)
def test_linears_are_stored_as_rounding_by_hand_gives_them_and_all_else_as_without(form, source, converted, rest):
    given, out = read(source), read(rest / form)
    assert in_fp8(out) == TRUNK and len(TRUNK) == 21
    for name in TRUNK:
        codes, scale = by_hand(given[name])
        assert raw(out[name]) == raw(codes)
        wanted = scale if form == "modelopt" else scale[:, None]
        found = out[f"{name}_scale"]
        assert (found.dtype, found.shape, raw(found)) == (torch.float32, wanted.shape, raw(wanted))
    if form == "modelopt":
        plain = read(converted)
        assert out.keys() - plain.keys() == {f"{name}_scale" for name in TRUNK} and plain.keys() < out.keys()
        assert all(raw(plain[name]) == raw(out[name]) for name in plain.keys() - TRUNK)


def test_all_bf16_numbers_round_as_by_hand():
    every = torch.arange(1 << 16, dtype=torch.int32).short().view(torch.bfloat16)
    every = every[every.isfinite()]
    every = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))][: 400 * 160].reshape(400, 160)
    every[7], every[8, 1:] = 0, 0
    every = torch.where((every.float().abs() < 1e-15) | (every.float().abs() > 1e15), 0, every).bfloat16()
    codes, scale, sums = fp8.quantize(every)
    wanted, outer = by_hand(every)
    assert raw(codes) == raw(wanted) and raw(scale) == raw(outer) and scale[7] == 1
    decoded = codes.double() * scale.double()[:, None]
    exact = [(decoded - every.double()).square().sum(), every.double().square().sum()]
    torch.testing.assert_close(sums, torch.stack(exact), rtol=1e-6, atol=0)


def test_heads_and_mtp_layers_are_in_fp8_on_request_alone_and_without_rest_in_nvfp4(source, tmp_path, capsys):
    assert main([str(source), str(tmp_path / "out"), "--rest", "fp8", "--lm-head", "--mtp", "--device", "cpu"]) == 0
    assert in_fp8(read(tmp_path / "out")) == TRUNK | DRAFTS | HEADS
    for settings, wanted in (
        (REST, TRUNK),
        (Settings(rest="fp8", mtp=True), TRUNK | DRAFTS),
        (Settings(rest="fp8", lm_head=True), TRUNK | {"lm_head.weight"}),
        (Settings(mtp=True), set()),
    ):
        plan = make_plan(Checkpoint(source), settings)
        assert {w for g in plan.groups if g.precision == "fp8" for w in g.weights} == wanted
    with pytest.raises(UsageError, match="rest: got fp8 with recipe linears, which leaves nothing to it"):
        Settings(recipe="linears", rest="fp8")
    assert "invalid choice: 'int8'" in refused_by_parser(capsys, str(source), str(tmp_path / "b"), "--rest", "int8")


def refused_by_parser(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit):
        main(list(arguments))
    return capsys.readouterr().err


def test_precisions_by_group_take_the_place_of_the_recipes(source, tmp_path):
    chosen = {
        "model.layers.0.self_attn.q_proj.weight": "fp8",
        "model.layers.0.mlp.down_proj.weight": "nvfp4",
        "model.layers.2.share_expert.gate_proj.weight": "fp8",
        "model.layers.3.mlp.gate_proj.weight": "nvfp4",
        "lm_head.weight": "fp8",
    }
    out, plain = tmp_path / "out", tmp_path / "plain"
    assert run(source, out, precisions=chosen).problems == []
    found = read(out)
    wanted = {f"model.layers.0.self_attn.{p}_proj.weight" for p in "qkv"} | {"lm_head.weight"}
    wanted |= {f"model.layers.2.share_expert.{p}_proj.weight" for p in ("gate", "up")}
    assert in_fp8(found) == wanted
    packed = {n for n, t in found.items() if t.dtype == torch.uint8 and ".moe." not in n}
    assert packed == {"model.layers.0.mlp.down_proj.weight"} | {
        f"model.layers.3.mlp.{p}_proj.weight" for p in ("gate", "up")
    }
    run(source, plain)
    assert all(raw(t) == raw(found[n]) for n, t in read(plain).items() if n not in wanted | packed)
    plan = make_plan(Checkpoint(source), Settings(), chosen)
    assert plan.digest != make_plan(Checkpoint(source), Settings()).digest
    reasons = {k.name: k.why for k in kinds(plan) if k.why}
    assert reasons["attention"] == reasons["share expert"] == "chosen to stay"
    for wrong in ({"model.layers.0.self_attn.k_proj.weight": "fp8"}, {"lm_head.weight": "int8"}):
        with pytest.raises(UsageError, match="precisions: got .* as .*, wanted the first weight of a group"):
            make_plan(Checkpoint(source), Settings(), wrong)
    with pytest.raises(UsageError, match="precisions: got model.layers.1.moe.gate_proj.weight as fp8"):
        make_plan(Checkpoint(source), Settings(), {"model.layers.1.moe.gate_proj.weight": "fp8"})


@pytest.mark.parametrize("engine", ["vLLM", "SGLang"])
def test_engines_leave_out_exactly_the_groups_that_stay_as_they_are(engine, source):
    config = make_plan(Checkpoint(source), Settings()).config
    leaders = [group[0] for group in weight_groups(config) if ".moe." not in group[0]]
    pick = np.random.default_rng(0)
    for _ in range(20):  # in NVFP4 or as they are: what SGLang reads too
        chosen = {leader: str(pick.choice(["nvfp4", "source"])) for leader in leaders}
        plan = make_plan(Checkpoint(source), Settings(), chosen)
        held = {w for group in plan.groups for w in group.weights}
        rules = Excludes(engine, plan.patterns, False)
        for module in modules(engine, config):
            assert rules.leaves_out(module) == (not held & {*module.weights}), (module.name, chosen)


def test_a_checkpoint_without_fp8_says_nothing_of_several_precisions(source, converted, tmp_path):
    config = json.loads((converted / "config.json").read_text())["quantization_config"]
    other = json.loads((converted / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_algo"] == other["quant_algo"] == "NVFP4"
    assert config["config_groups"].keys() == {"group_0"} and config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert "quantized_layers" not in {*config, *other}
    assert recipe_precisions(make_plan(Checkpoint(source), Settings()).config, "experts", "source", False, False) == (
        make_plan(Checkpoint(source), Settings()).precisions
    )


def test_both_config_files_name_every_modules_algorithm_as_modelopts_converter_would(rest):
    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config").convert_hf_quant_config_format
    config = json.loads((rest / "modelopt" / "config.json").read_text())["quantization_config"]
    other = json.loads((rest / "modelopt" / "hf_quant_config.json").read_text())
    layers = other["quantization"]["quantized_layers"]
    assert config == convert(other)
    stored = {n.removesuffix(".weight"): how for n in TRUNK for how in ({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},)}
    names = [f"{p}_proj" for p in ("gate", "up", "down")] + ["experts"]  # the last is vLLM's
    stored |= {f"model.layers.{i}.moe.{n}": {"quant_algo": "NVFP4", "group_size": 16} for i in (1, 2) for n in names}
    assert layers == stored


def test_compressed_tensors_takes_the_second_group_for_its_fp8_preset_and_decodes_codes_times_scales(rest):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.quant_scheme import FP8_DYNAMIC
    from compressed_tensors.utils.match import match_name

    given = json.loads((rest / FORMS[1] / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(given)
    nvfp4_group, scheme = config.config_groups.values()
    told = {"observer", "observer_kwargs"}
    for part, wanted in FP8_DYNAMIC.items():
        assert getattr(scheme, part).model_dump(exclude=told) == wanted.model_dump(exclude=told)
    assert (config.format, scheme.format) == ("mixed-precision", "float-quantized")
    assert nvfp4_group.targets == ["Linear"] and nvfp4_group.format == "nvfp4-pack-quantized"
    out, linears = read(rest / FORMS[1]), set()
    for name in in_fp8(out):
        stored = {"weight": out[name], "weight_scale": out[f"{name}_scale"]}
        decoded = FloatQuantizationCompressor.decompress(stored, scheme)["weight"]
        assert torch.equal(decoded, (out[name].float() * out[f"{name}_scale"]).to(decoded.dtype))
    for stem in {n.rpartition(".")[0] for n, t in out.items() if t.dim() == 2}:
        linears |= {stem} if any(match_name(f"language_model.{stem}", target) for target in scheme.targets) else set()
    assert linears == {name.removesuffix(".weight") for name in TRUNK}


def test_pieces_of_any_size_and_stopped_runs_give_the_same_bytes(source, rest, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize.matrices, "FP8_BLOCK", 16)
    monkeypatch.setattr(quantize.matrices, "_PIECE", 1)  # 16 rows
    kills = 0
    for function, calls in (("replace", 3), ("pwrite", 20), ("pwrite", 60), ("pwrite", 140)):
        folder = tmp_path / f"{function}{calls}"
        with monkeypatch.context() as patch:
            killed_at(patch, function, calls)
            try:
                run(source, folder, REST)
            except Killed:
                kills += 1
                assert not (folder / INDEX).exists()
        run(source, folder, REST, resume=True)
        assert contents(folder) == contents(rest / "modelopt")
    assert kills >= 3


def test_rows_of_zeros_are_exact_and_rows_too_small_for_a_scale_are_refused_by_name(tmp_path):
    tensors = tensors_of(TEXT)
    tensors[OUT][5] = 0
    source = write_source(tmp_path / "zeros", TEXT, tensors)
    assert run(source, tmp_path / "out", REST).problems == []
    out = read(tmp_path / "out")
    assert out[f"{OUT}_scale"][5] == 1 and not out[OUT][5].float().any()
    tensors[OUT] = tensors[OUT].float()
    tensors[OUT][5, 0] = 1e-43
    tiny = write_source(tmp_path / "tiny", TEXT, tensors)
    with pytest.raises(CheckpointError, match=f"{OUT}: row 5: weights are too small"):
        run(tiny, tmp_path / "b", REST)
    tensors[OUT][5, 0] = torch.inf
    with pytest.raises(CheckpointError, match=f"{OUT}: holds NaN or infinity"):
        run(write_source(tmp_path / "inf", TEXT, tensors), tmp_path / "c", REST)


@pytest.mark.parametrize("form", FORMS)
def test_sound_rows_have_no_problem_and_their_errors_are_the_converters(form, source, rest, tmp_path):
    summary = run(source, tmp_path / "out", Settings(rest="fp8", format=form), verify=False)
    report = verify(rest / form, source)
    assert report.problems == []
    for projection in ("self_attn.q_proj", "mlp.down_proj", "share_expert.up_proj"):
        sums = report.measured.sums[f"{projection} FP8"]
        assert sums["stored"] == sums["max"]
        stored, keys = sums["stored"] / sums["power"], [k for k in summary.errors.sums if k[1] == projection]
        assert stored == pytest.approx(summary.errors.relative(keys), rel=1e-9) and 5e-4 < stored < 8e-4
    lines = report.measured.table()
    (line,) = (line for line in lines if line.startswith("self_attn.q_proj FP8"))
    assert line.split()[3] == "-" and lines[0].index("stored") + 6 == line.index(line.split()[2]) + 8
    notes = [f.effect for f in report.findings.found if "FP8" in str(f)]
    assert len(notes) == (form == "modelopt") and all("SGLang" in note for note in notes)
    assert "1,600 scales of rows in FP8" in report.findings.done["b"]


@pytest.mark.parametrize(
    ("name", "at", "data", "wanted"),
    [
        (f"{OUT}_scale", 12, f32(0.0), f"{OUT}_scale: scales are not positive numbers (1 of 192 rows)"),
        (f"{OUT}_scale", 12, f32(float("nan")), f"{OUT}_scale: scales are not positive numbers (1 of 192 rows)"),
        (OUT, 33, b"\xff", f"{OUT}: codes are NaN (1 of 192 rows read)"),
        (f"{OUT}_scale", 12, f32(0.01), f"{OUT}: relative MSE is above 0.0039"),
    ],
    ids=["zero", "nan", "code", "wrong"],
)
def test_a_damaged_row_is_named(name, at, data, wanted, copy, source):
    overwrite(copy, name, at, data)
    assert any(p.startswith(wanted) for p in verify(copy, source).problems)


def test_a_scale_a_little_off_and_rows_without_448_are_unusual(copy, source):
    codes, scales = read(copy)[OUT].view(torch.uint8), read(copy)[f"{OUT}_scale"]
    overwrite(copy, f"{OUT}_scale", 0, (scales * 1.02).numpy().tobytes())
    report = verify(copy, source)
    assert report.problems == [] and any(
        str(f).startswith(f"{OUT}: errs more than max would") for f in report.findings.found
    )
    overwrite(copy, OUT, 0, bytes(32))  # a row of zeros has none either
    overwrite(copy, OUT, 32, (codes[1] - (codes[1] & 0x7F).clamp(max=8)).numpy().tobytes())
    assert f"{OUT}: rows have no code of 448 (1 of 192 read)" in map(str, verify(copy).findings.found)


def test_config_files_that_do_not_say_what_the_files_hold_are_told(copy):
    module = "model.layers.1.self_attn.o_proj"

    def change(section, name):
        def edit(config):
            config[section]["quantized_layers"].pop(module)
            config[section]["quantized_layers"]["model.layers.1.mlp.down_proj"] = {"quant_algo": "NVFP4"}
            config[section][name].append("model.layers.2.share_expert*")

        return edit

    edit_json(copy / "config.json", change("quantization_config", "ignore"))
    problems = verify(copy).problems
    assert f"{module}: is nothing by quantized_layers, but FP8_PER_CHANNEL_PER_TOKEN in the files" in problems
    wanted = "model.layers.2.moe.share_expert.down_proj: is excluded, but FP8 in the files"
    assert any(p.startswith(wanted) for p in problems)
    assert "hf_quant_config.json: quantized_layers differs from config.json's" in problems
    edit_json(copy / "config.json", lambda c: c["quantization_config"].update(quant_algo="NVFP4"))
    assert "config.json: quant_algo is NVFP4, wanted MIXED_PRECISION" in verify(copy).problems


def test_compressed_tensors_groups_are_held_against_the_files(rest, tmp_path):
    copy = shutil.copytree(rest / "compressed-tensors", tmp_path / "copy")
    edit_json(copy / "config.json", lambda c: c["quantization_config"]["config_groups"]["group_1"]["targets"].pop())
    wanted = "model.layers.2.self_attn.q_proj: is in a config group of other bits, but FP8 in the files"
    assert wanted in verify(copy).problems
    edit_json(copy / "config.json", lambda c: c["quantization_config"].update(format="nvfp4-pack-quantized"))
    assert "config.json: format is nvfp4-pack-quantized, wanted mixed-precision" in verify(copy).problems


def test_dry_run_and_sizes_count_a_byte_a_weight_and_a_scale_a_row(source, rest, tmp_path, capsys):
    plan, cost = estimate(source, tmp_path / "out", REST)
    assert cost.written == pytest.approx(
        sum(f.stat().st_size for f in (rest / "modelopt").glob("*.safetensors")), rel=1e-3
    )
    assert cost.quantized == 6 * 4 * 192 * 144 * 2  # what is searched for: the experts
    (found,) = (a for a in actions(plan) if a.name == OUT)
    assert (found.what, found.read, found.written) == ("fp8", 2 * 192 * 32, 192 * 32 + 4 * 192)
    sizes = {(k.name, k.precision): k for k in kinds(plan)}
    assert sizes["dense MLP", "FP8"].result == 3 * 64 * 192 + 4 * (64 + 64 + 192)
    assert not any(k.precision == "BF16" and k.name in ("attention", "share expert", "dense MLP") for k in kinds(plan))
    index = json.loads((rest / "modelopt" / INDEX).read_text())["metadata"]["total_size"]
    assert sum(k.result for k in kinds(plan)) == index
    assert main([str(source), str(tmp_path / "out"), "--dry-run", "--rest", "fp8", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert (
        "\nfp8             3 " in text
        and f"{8 * index / sum(k.weights for k in kinds(plan)):.2f} bits a weight" in text
    )


def test_the_card_tells_of_fp8_and_names_only_engines_that_read_it(rest):
    text = (rest / "modelopt" / "README.md").read_text()
    assert "and in FP8 the trunk's other linear layers" in text and "--rest fp8`" in text
    assert "vLLM, since 0.33" in text and "python -m step_kernels.generate" in text
    assert "sglang serve" not in text and "trtllm-serve" not in text
    text = (rest / "compressed-tensors" / "README.md").read_text()
    assert "vLLM, since 0.25" in text and text.count("```bash") == 1


def test_calibration_leaves_fp8_as_it_is_without_it(tmp_path):
    np.save(tmp_path / "ids.npy", tokens(2, 40).numpy())
    settings = Settings(rest="fp8", search="hessian", calibration=tmp_path / "ids.npy")
    assert run("bundled", tmp_path / "a", settings).problems == []
    run("bundled", tmp_path / "b", REST, verify=False)
    a, b = read(tmp_path / "a"), read(tmp_path / "b")
    assert a.keys() == b.keys() and len(in_fp8(a)) > 40
    assert all(raw(a[n]) == raw(b[n]) and raw(a[f"{n}_scale"]) == raw(b[f"{n}_scale"]) for n in in_fp8(a))


def decode(folder, target) -> None:
    """Writes the bundled model with a checkpoint's weights decoded to f32."""
    out, plain = read(folder), {}
    for name, tensor in out.items():
        if f"{name}_scale_2" in out:
            plain[name] = nvfp4.dequantize(tensor, out[f"{name}_scale"], out[f"{name}_scale_2"])
        elif name in in_fp8(out):
            plain[name] = tensor.float() * out[f"{name}_scale"][:, None]
        elif not name.endswith(("weight_scale", "weight_scale_2", "input_scale")):
            plain[name] = tensor
    target.mkdir()
    save_file(plain, target / "model.safetensors")
    (target / "config.json").write_text((resolve_source("bundled") / "config.json").read_text())


@pytest.mark.parametrize("precisions", [None, {"model.layers.0.mlp.gate_proj.weight": "nvfp4"}], ids=["fp8", "mixed"])
def test_bundled_model_in_fp8_computes_what_its_decoded_weights_compute(precisions, tmp_path):
    assert run("bundled", tmp_path / "out", EVERYTHING, precisions=precisions).problems == []
    decode(tmp_path / "out", tmp_path / "plain")
    bundled = resolve_source("bundled")
    folders = (tmp_path / "out", tmp_path / "plain", bundled)
    stored, decoded, exact = (Step3p7.from_pretrained(f, "cpu", torch.float32) for f in folders)
    first, last = stored.layers[0], stored.layers[-1]
    linears = [first.attention.qkvg.weights[0], first.attention.o, first.ffn.down, last.ffn.share.gate_up.weights[0]]
    linears += [stored.lm_head, *(w for layer in stored.mtp for w in (layer.decoder.attention.o, layer.head))]
    assert all(isinstance(weight, FP8Channels) for weight in linears)
    gate_up = {type(weight) for weight in first.ffn.gate_up.weights}
    assert gate_up == {NVFP4Weight if precisions else FP8Channels}
    ids = torch.randint(13, stored.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(4))
    assert relative_error(stored(ids), decoded(ids)) < 1e-6
    assert relative_error(stored(ids), exact(ids)) > 1e-3
    said = [list(m.generate(ids[0].tolist(), max_new_tokens=12, mtp=True)) for m in (stored, decoded)]
    assert len(said[0]) > 0 and said[0] == said[1]


@pytest.mark.gpu
def test_gpu_writes_the_rows_that_the_cpu_writes(source, tmp_path):
    for device in ("cpu", "cuda"):
        run(source, tmp_path / device, EVERYTHING, device=device)
    assert contents(tmp_path / "cpu") == contents(tmp_path / "cuda")
    rows = torch.randn(4096, 2048, generator=torch.Generator().manual_seed(0)).mul(0.02).bfloat16()
    ours, theirs = fp8.quantize(rows), fp8.quantize(rows.cuda())
    assert raw(ours[0]) == raw(theirs[0]) and raw(ours[1]) == raw(theirs[1])


@pytest.mark.gpu
def test_gpu_errs_in_bfloat16_no_more_than_twice_as_much_as_with_decoded_weights(tmp_path):
    run("bundled", tmp_path / "out", EVERYTHING, verify=False)
    decode(tmp_path / "out", tmp_path / "plain")
    exact = Step3p7.from_pretrained(tmp_path / "plain", "cpu", torch.float32)
    ids = torch.randint(13, exact.config.vocab_size, (1, 60), generator=torch.Generator().manual_seed(4))
    wanted, errors = exact(ids), []
    for name in ("out", "plain"):
        model = Step3p7.from_pretrained(tmp_path / name, "cuda")
        errors.append(relative_error(model(ids.cuda()).cpu().float(), wanted))
    assert errors[0] < 2 * errors[1] < 0.2, errors
