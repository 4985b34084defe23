"""`--mtp`: the layers that draft, in NVFP4 too."""

from __future__ import annotations

import json

import pytest
import torch
from small_checkpoint import raw, read

from quantize import Settings, run
from quantize.kinds import kinds
from quantize.nvfp4 import main
from quantize.plan import make_plan
from quantize.verify import verify
from step_kernels.model.checkpoint import Checkpoint

LAYER = "model.layers.3."  # the small source's only one, a dense layer
HEAD = f"{LAYER}transformer.shared_head.output"
GROUPS = [[f"self_attn.{p}_proj" for p in "qkv"], ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
GROUPS += [["mlp.down_proj"]]
LINEARS = {f"{LAYER}{name}" for group in GROUPS for name in group}


@pytest.fixture(scope="module")
def drafts(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp") / "out"
    assert main([str(source), str(folder), "--mtp", "--device", "cpu"]) == 0
    return folder


def packed(tensors) -> set[str]:
    return {n.removesuffix(".weight") for n, t in tensors.items() if t.dtype == torch.uint8}


def test_mtp_layers_attention_and_mlp_are_added_and_all_else_is_the_same(source, converted, drafts):
    given, without, out = read(source), read(converted), read(drafts)
    assert packed(out) - packed(without) == LINEARS and packed(without) < packed(out)
    added = {f"{name}.{part}" for name in LINEARS for part in ("weight_scale", "weight_scale_2", "input_scale")}
    assert out.keys() - without.keys() == added and without.keys() < out.keys()
    same = without.keys() - {f"{name}.weight" for name in LINEARS}
    assert {f"{LAYER}eh_proj.weight", f"{LAYER}self_attn.g_proj.weight", f"{HEAD}.weight"} <= same
    assert all(raw(without[name]) == raw(out[name]) for name in same)
    for group in GROUPS:
        amax = torch.stack([given[f"{LAYER}{name}.weight"].float().abs().amax() for name in group]).amax()
        assert [raw(out[f"{LAYER}{name}.weight_scale_2"]) for name in group] == [raw(amax / 2688)] * len(group)


def test_heads_of_mtp_layers_go_with_lm_head_alone(source, tmp_path):
    for lm_head, wanted in ((False, set()), (True, {HEAD, "lm_head"})):
        settings = Settings(recipe="linears", lm_head=lm_head, mtp=True)
        assert run(source, tmp_path / str(lm_head), settings).problems == []
        found = packed(read(tmp_path / str(lm_head)))
        assert LINEARS < found and found & {HEAD, "lm_head", f"{LAYER}eh_proj"} == wanted


def test_verification_says_which_engine_cannot_draft_with_it(drafts, source):
    report = verify(drafts, source)
    assert report.problems == []
    assert [str(f) for f in report.findings.found] == [f"{LAYER}self_attn.q_proj: MTP layers are in NVFP4 (and 6 more)"]
    assert "SGLang builds them in BF16" in report.findings.found[0].effect
    for file, (section, name) in {
        "config.json": ("quantization_config", "ignore"),
        "hf_quant_config.json": ("quantization", "exclude_modules"),
    }.items():
        config = json.loads((drafts / file).read_text())
        config[section][name] += [f"{LAYER}*"]
        (drafts / file).write_text(json.dumps(config))
    wanted = f"{LAYER}mtp_block.self_attn.qkv_proj: is excluded, but NVFP4 in the files (by {LAYER}*)"
    assert wanted in verify(drafts).problems


def test_sizes_count_quantized_mtp_layers_apart_from_what_they_keep(source):
    found = {(k.name, k.precision): k for k in kinds(make_plan(Checkpoint(source), Settings(mtp=True)))}
    assert found["MTP layers", "NVFP4"].tensors == 7 and found["MTP layers", "NVFP4"].why == ""
    kept = sum(e.shape != () for n, e in Checkpoint(source).entries.items() if n.startswith(LAYER)) - 7
    assert found["MTP layers", "BF16"].tensors == kept
