"""The checker: a sound checkpoint passes; each single fault is found, named, and said what engines make of it."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_checkpoint import read

from quantize import run
from quantize.plan import resolve_source
from quantize.verify import main, verify
from step_kernels import nvfp4
from step_kernels.model.checkpoint import INDEX, Checkpoint

GATE = "model.layers.3.moe.gate_proj.weight"
UP = "model.layers.3.moe.up_proj.weight"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify") / "converted"
    return folder, run("bundled", folder, verify=False).errors


@pytest.fixture
def copy(converted, tmp_path):
    return shutil.copytree(converted[0], tmp_path / "copy")


def overwrite(folder, name: str, at: int, data: bytes) -> None:
    """Puts `data` at byte `at` of a tensor, in place."""
    entry = Checkpoint(folder).entry(name)
    with entry.file.open("r+b") as f:
        f.seek(entry.begin + at)
        f.write(data)


def f32(value: float) -> bytes:
    return torch.tensor(value).numpy().tobytes()


def edit_json(file, edit) -> None:
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def edit_shard(folder, name: str, edit) -> None:
    """Rewrites the shard that holds `name` after `edit` of its tensors."""
    file = Checkpoint(folder).entry(name).file
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def total_bytes(folder) -> int:
    return sum(e.end - e.begin for e in Checkpoint(folder).entries.values())


def drop(folder, names: list[str]) -> None:
    """Takes tensors out of the files and the index."""
    edit_json(folder / INDEX, lambda d: [d["weight_map"].pop(name) for name in names])
    for name in names:
        edit_shard(folder, name, lambda t, name=name: t.pop(name))
    edit_json(folder / INDEX, lambda d: d["metadata"].update(total_size=total_bytes(folder)))


def printed(capsys, status: int, *arguments: object) -> list[str]:
    """What the command prints on stdout, which exits with `status` and says nothing on stderr."""
    assert main([str(a) for a in arguments]) == status
    output = capsys.readouterr()
    assert output.err == ""
    return output.out.splitlines()


def fault(lines: list[str], what: str) -> tuple[str, str]:
    """The one group of findings that begins so, and the line on what engines do."""
    (at,) = [i for i, line in enumerate(lines) if line[11:].startswith(what)]
    after = next(line for line in (*lines[at + 1 :], "") if not line.startswith("           ") or "->" in line)
    return lines[at], after.strip() if "->" in after else ""


def test_sound_checkpoint_prints_a_line_a_check(converted, capsys):
    folder, _ = converted
    tensors, size = len(Checkpoint(folder).entries), total_bytes(folder) / 1e6
    assert printed(capsys, 0, folder) == [
        f"a  headers   ok           {tensors} tensors, {size:.2f} MB in 4 files, and index",
        "b  scales    ok           480 global scales, all of 0.37 MB of block scales",
        "c  copies    not checked  no --source to compare with",
        "d  excludes  ok           49 patterns on 64 modules of vLLM and 38 modules of SGLang",
        "e  error     not checked  no --source to compare with",
        "g  loaders   ok           config files, names; layout: modelopt, stacked",
        "f, h, i, j   not checked  decoders, logits, resuming and memory are properties of programs, not of files",
        "",
        f"{folder}: verified",
    ]


def test_measured_errors_are_the_converters_and_beside_those_of_other_searches(converted, capsys):
    folder, errors = converted
    report = verify(folder, "bundled")
    assert report.problems == [] and report.findings.found == []
    for projection, sums in report.measured.sums.items():
        keys = [key for key in errors.sums if key[1] == projection]
        stored, best, top = (sums[name] / sums["power"] for name in ("stored", "mse", "max"))
        assert len(keys) == 5 and stored == pytest.approx(errors.relative(keys), rel=0.02)  # 8 of 32 experts
        assert stored == best and 1.3 < top / stored < 1.4  # 1.35 dB
    assert list(report.measured.sums) == ["moe.gate_proj", "moe.up_proj", "moe.down_proj"]
    lines = printed(capsys, 0, folder, "--source", "bundled")
    assert lines[4].startswith("e  error     ok           at most 0.0100 in every sample, ")
    table = [line.split() for line in lines if line.startswith("moe.")]
    assert [row[0] for row in table] == list(report.measured.sums)
    assert all(float(row[1]) == float(row[2]) < float(row[4]) < float(row[3]) for row in table)  # mse < four-six < max


@pytest.mark.parametrize(
    ("name", "at", "data", "what", "detail", "effect"),
    [
        (f"{GATE}_scale", 5, b"\x00", "block scales are", "(expert 0: 1)", "a zero erases"),
        (f"{GATE}_scale", 5, b"\x7f\xff\x85", "block scales are", "(expert 0: 3)", "NaN spreads"),
        (f"{GATE}_scale", 64 * 12 * 7, b"\x80", "block scales are", "(expert 7: 1)", "NaN spreads"),
        (f"{GATE}_scale_2", 8, f32(float("nan")), "scales are not positive", "(expert 2: nan)", ""),
        (f"{GATE}_scale_2", 8, f32(0.0), "scales are not positive", "(expert 2: 0.0)", ""),
        (f"{GATE[:-6]}input_scale", 12, f32(0.0), "scales are not positive", "(expert 3: 0.0)", "vLLM divides by it"),
        ("model.layers.0.self_attn.k_proj.k_scale", 0, f32(float("inf")), "scales are not positive", "(inf)", "vLLM"),
    ],
)
def test_bad_scale_is_named_with_its_expert(name, at, data, what, detail, effect, copy, capsys):
    overwrite(copy, name, at, data)
    lines = printed(capsys, 1, copy)
    line, engines = fault(lines, what)
    assert line.startswith("FAILED  b") and line.endswith(f": {name} {detail}") and effect in engines
    assert next(row for row in lines if row.startswith("b  scales ")).split()[2] == "FAILED"


def test_up_with_another_global_scale_says_what_reading_it_with_gates_costs(copy, capsys):
    scale = Checkpoint(copy).read(f"{UP}_scale_2")
    overwrite(copy, f"{UP}_scale_2", 4, f32(scale[1].item() / 1.31))
    line, engines = fault(printed(capsys, 1, copy), "differs from gate_proj's")
    ratio = "1 of 32 experts, ratio 1.31; expert 1 misread: relative MSE"
    assert line.endswith(f": {UP}_scale_2 ({ratio} 0.0961 against itself)")  # 0.31 squared
    assert engines.startswith("-> vLLM and, but for its TRT-LLM kernels, SGLang read up with gate's scale")
    # Against the source: with a scale 1.31 times too small it is wrong by itself, and read with gate's it is right.
    line, _ = fault(printed(capsys, 1, copy, "--source", "bundled"), "differs from gate_proj's")
    wrong, right = (float(n) for n in re.search(r"MSE (\S+) instead of (\S+)\)", line).groups())
    assert wrong == pytest.approx(0.0066, abs=0.0005) and right == pytest.approx((1 - 1 / 1.31) ** 2, rel=0.15)


def test_pairs_that_do_not_share_their_scale_give_the_published_loss(copy):
    """Each by its own rule, as modelopt writes them: up misread at a ratio of 1.31 loses 0.107 instead of 0.009."""
    given = Checkpoint(resolve_source("bundled")).read(UP, 4, 5)[0].float()
    own = nvfp4.global_scale(given.abs().amax())
    codes, blocks = nvfp4.quantize(given, own)
    for name, data in ((UP, codes), (f"{UP}_scale", blocks)):
        overwrite(copy, name, 4 * data.numel(), data.view(torch.uint8).numpy().tobytes())
    for name, value in ((UP, own), (GATE, own * 1.31)):
        overwrite(copy, f"{name}_scale_2", 16, f32(value.item()))
    problem = next(p for p in verify(copy, "bundled", errors=False).problems if "differs" in p)
    wrong, right = (float(n) for n in re.search(r"MSE (\S+) instead of (\S+)\)", problem).groups())
    assert right == pytest.approx(0.0090, abs=0.0005) and wrong == pytest.approx(0.107, abs=0.005)


def test_one_bit_of_a_tensor_left_alone_is_seen_against_the_source_only(copy):
    overwrite(copy, "vision_model.conv1.weight", 100, b"\x55")
    assert verify(copy).problems == []
    (problem,) = verify(copy, "bundled", errors=False).problems
    assert problem == "vision_model.conv1.weight: bytes differ from the source's"


def test_quick_reads_four_places_of_large_tensors(copy, monkeypatch):
    name = "model.embed_tokens.weight"  # 786,432 bytes, of which 262,144 are read
    overwrite(copy, name, 786_431, b"\x55")
    assert verify(copy, "bundled", errors=False, quick=True).problems == [f"{name}: bytes differ from the source's"]
    overwrite(copy, name, 786_431, read(resolve_source("bundled"))[name].view(torch.uint8)[-1, -1:].numpy().tobytes())
    overwrite(copy, name, 100_000, b"\x55\x55\x55")
    assert verify(copy, "bundled", errors=False, quick=True).problems == []
    assert len(verify(copy, "bundled", errors=False).problems) == 1


def test_codes_of_another_expert_are_above_the_bound(copy, capsys):
    codes = Checkpoint(copy).read(GATE, 1, 2)
    overwrite(copy, GATE, 0, codes.numpy().tobytes())
    line, engines = fault(printed(capsys, 1, copy, "--source", "bundled"), "relative MSE is above 0.0100")
    relative, best = (float(n) for n in re.search(r"expert 0: (\S+), max gives (\S+)\)", line).groups())
    assert relative > 1 and best == pytest.approx(0.0090, abs=0.0003) and "do not belong together" in engines
    assert verify(copy, "bundled", bound=100.0).problems == []


def test_block_scales_worse_than_max_are_unusual_but_no_failure(copy, capsys):
    blocks = Checkpoint(copy).read(f"{GATE}_scale").view(torch.uint8)
    given = Checkpoint(resolve_source("bundled")).read(GATE).float()
    scale = Checkpoint(copy).read(f"{GATE}_scale_2")
    worse = (nvfp4.search_scales(given, scale, "max").view(torch.uint8) - 1).view(torch.float8_e4m3fn)
    codes, _ = nvfp4.quantize(given, scale, worse)
    assert worse.shape == blocks.shape
    overwrite(copy, GATE, 0, codes.numpy().tobytes())
    overwrite(copy, f"{GATE}_scale", 0, worse.view(torch.uint8).numpy().tobytes())
    lines = printed(capsys, 0, copy, "--source", "bundled", "--bound", "0.02")
    line, engines = fault(lines, "errs more than max would")
    assert line.startswith(f"unusual e  errs more than max would: {GATE} (0.0") and "calibrated" in engines
    assert next(row for row in lines if row.startswith("e  error ")).endswith("; unusual: 1")


def test_source_that_is_itself_quantized_is_reported(copy, tmp_path):
    source = tmp_path / "source"
    run("bundled", source)
    problems = verify(copy, source).problems
    assert f"{GATE}: is not in the source as [32, 64, 192]" in problems and len(problems) == 15


def test_kv_scales_missing_or_not_one_are_told_apart(copy, capsys):
    k, v = (f"model.layers.2.self_attn.{p}_proj.{p}_scale" for p in "kv")
    overwrite(copy, k, 0, f32(0.5))
    line, engines = fault(printed(capsys, 0, copy), "KV scale is not 1")
    assert line == f"unusual b  KV scale is not 1: {k} (0.5)" and engines.endswith("SGLang takes 1.0")
    edit_shard(copy, v, lambda t: t.pop(v))
    edit_json(copy / INDEX, lambda d: d["weight_map"].pop(v))
    assert f"{v}: is missing" in verify(copy).problems


def test_alike_faults_are_told_once_with_three_names_or_on_request_all(copy, capsys):
    for layer in (3, 5, 7, 4, 6):
        overwrite(copy, f"model.layers.{layer}.moe.down_proj.weight_scale_2", 0, bytes(128))
    names = [f"model.layers.{i}.moe.down_proj.weight_scale_2 (expert 0: 0.0, and 31 more experts)" for i in range(3, 8)]
    for arguments, wanted in (((), [*names[:3], "and 2 more"]), (("--all",), names)):
        lines = printed(capsys, 1, copy, *arguments)
        at = lines.index("FAILED  b  scales are not positive numbers, 5 times:")
        assert lines[at + 1 :] == [*(f"           {name}" for name in wanted), "", f"{copy}: 5 problems"]
