"""The checker on layouts that the converter does not write: experts one by one, compressed-tensors, text alone."""

import json

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import TEXT, read, tensors_of, write_source
from test_verify import edit_json, edit_shard, f32, fault, overwrite, printed

from quantize import run
from quantize.contents import read_rows
from quantize.layout import inverse_scale_shape
from quantize.matrices import read_piece
from quantize.verify import verify
from step_kernels.model.checkpoint import INDEX, Checkpoint

EXPERT = "model.layers.2.moe.experts.3."
COMPRESSED = {"weight": "weight_packed", "weight_scale_2": "weight_global_scale", "input_scale": "input_global_scale"}


def rewrite(folder, tensors) -> None:
    """One file with these tensors, and its index, in place of what the folder held."""
    for file in folder.glob("*.safetensors"):
        file.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    (folder / INDEX).write_text(json.dumps(index))


def unstacked(tensors) -> dict[str, torch.Tensor]:
    """Every routed expert under its own name."""
    found = {}
    for name, tensor in tensors.items():
        at, _, rest = name.partition(".moe.")
        if "_proj." in rest:
            found |= {f"{at}.moe.experts.{e}.{rest}": t.clone() for e, t in enumerate(tensor)}
        else:
            found[name] = tensor
    return found


def compressed(folder) -> None:
    """Rewrites a checkpoint of modelopt's as llm-compressor would have written it."""
    found = {}
    for name, tensor in unstacked(read(folder)).items():
        stem, _, kind = name.rpartition(".")
        if ".moe.experts." in name:
            new = COMPRESSED.get(kind, kind)
            found[f"{stem}.{new}"] = (1 / tensor).view(1) if new.endswith("global_scale") else tensor
        elif not kind.endswith(("k_scale", "v_scale")):
            found[name] = tensor
    rewrite(folder, found)
    number = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"weights": number, "input_activations": number | {"dynamic": "local"}, "targets": ["Linear"]}
    quantization = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}
    ignore = ["lm_head", r"re:.*self_attn.*", r"re:.*share_expert.*", r"re:.*\.mlp\..*", r"re:.*moe\.gate$"]
    ignore += [r"re:.*layers\.3\..*"]
    quantization |= {"config_groups": {"group_0": group}, "ignore": ignore}
    edit_json(folder / "config.json", lambda d: d.update(quantization_config=quantization))
    (folder / "hf_quant_config.json").unlink()


@pytest.fixture
def copy(converted, tmp_path):
    import shutil

    return shutil.copytree(converted, tmp_path / "copy")


def test_experts_one_by_one_are_read_by_vllm_alone(copy, source, capsys):
    stacked = verify(copy, source)
    rewrite(copy, unstacked(read(copy)))
    report = verify(copy, source)
    assert report.problems == [] and report.measured.sums == stacked.measured.sums
    line, engines = fault(printed(capsys, 0, copy), "stores experts one by one")
    assert line.startswith("unusual g") and engines.startswith("-> vLLM loads that; SGLang stops")
    overwrite(copy, f"{EXPERT}up_proj.weight_scale", 7, b"\x00")
    assert verify(copy).problems == [
        f"{EXPERT}up_proj.weight_scale: block scales are zero, negative or NaN (expert 3: 1)"
    ]


def test_compressed_tensors_checkpoint_is_recognised_and_checked(copy, source, capsys):
    stacked = verify(copy, source)
    compressed(copy)
    report = verify(copy, source)
    assert report.problems == []
    for projection, sums in report.measured.sums.items():
        assert sums["stored"] == pytest.approx(stacked.measured.sums[projection]["stored"], rel=1e-5)  # 1 / (1 / scale)
    lines = printed(capsys, 0, copy, "--source", source)
    assert lines[3] == "d  excludes  ok           6 patterns by compressed-tensors' rule on the tensors' own names"
    assert "layout: compressed-tensors, per expert; unusual: 1" in lines[5]


def test_faults_of_a_compressed_tensors_checkpoint_are_named(copy):
    compressed(copy)
    up, down = f"{EXPERT}up_proj.", f"{EXPERT}down_proj."
    scale = Checkpoint(copy).read(f"{up}weight_global_scale").item()
    overwrite(copy, f"{up}weight_global_scale", 0, f32(2 * scale))
    overwrite(copy, f"{down}input_global_scale", 0, f32(0.0))
    edit_json(copy / "config.json", lambda d: d["quantization_config"]["ignore"].remove("lm_head"))
    assert sorted(verify(copy).problems) == [
        "lm_head: is not excluded, but not in NVFP4 in the files",
        f"{down}input_global_scale: scales are not positive numbers (expert 3: 0.0)",
        f"{up}weight_global_scale: differs from gate_proj's "
        "(1 of 4 experts, ratio 2; expert 3 misread: relative MSE 1.0000 against itself)",
    ]
    edit_shard(copy, up + "weight_packed", lambda t: t.pop(f"{up}weight_packed"))
    edit_json(copy / INDEX, lambda d: d["weight_map"].pop(f"{up}weight_packed"))
    assert f"{up}weight_packed: is missing" in verify(copy).problems
    edit_json(copy / "config.json", lambda d: d["quantization_config"].update(quant_method="modelopt"))
    wanted = "config.json: quant_method is modelopt, but the tensors are those of compressed-tensors"
    assert wanted in verify(copy).problems


def test_text_model_under_the_multimodal_releases_names_is_loaded_by_nobody(copy, capsys):
    assert verify(copy).problems == []
    tensors = {n.replace("model.", "model.language_model.", 1): t for n, t in read(copy).items()}
    rewrite(copy, tensors)
    line, engines = fault(printed(capsys, 1, copy), "is spelt as no engine spells it")
    spelt = sum(n.startswith("model.language_model.") for n in tensors)
    assert line.endswith(f", {spelt} times:") and engines == "-> vLLM skips it without a word"


def test_samples_of_an_fp8_source_are_what_the_converter_read(tmp_path):
    text = TEXT | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    tensors, generator = tensors_of(TEXT), torch.Generator().manual_seed(3)
    experts = [n for n, t in tensors.items() if t.dim() == 3]
    for name in experts:
        tensors[f"{name}_scale_inv"] = torch.rand(inverse_scale_shape(tensors[name].shape), generator=generator) + 0.5
        tensors[name] = (tensors[name].float() * 100).to(torch.float8_e4m3fn)
    source = write_source(tmp_path / "source", text, tensors)
    for name in experts:
        whole, _ = read_piece(Checkpoint(source), name, 2, 3)
        for begin, end in ((0, 100), (100, 140), (130, 144), (0, len(whole))):
            assert torch.equal(read_rows(Checkpoint(source), name, 2, begin, end), whole[begin:end])
    errors = run(source, tmp_path / "out").errors
    report = verify(tmp_path / "out", source)
    assert report.findings.found == []
    for projection, sums in report.measured.sums.items():
        keys = [key for key in errors.sums if key[1] == projection]
        assert sums["stored"] / sums["power"] == pytest.approx(errors.relative(keys), rel=1e-9)
