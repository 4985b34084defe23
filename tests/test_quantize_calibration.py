"""Calibration: each weight's inputs are those of the model itself, whatever the batches."""

import copy
import shutil

import numpy as np
import pytest
import torch
from test_model import tokens

from quantize import calibration
from quantize.calibration import Calibration, read_tokens
from quantize.hessian import BLOCK, products
from quantize.inputs import Inputs
from quantize.plan import Settings, make_plan
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.model.attention import WholeSequences
from step_kernels.model.checkpoint import Checkpoint, CheckpointError
from step_kernels.ops import moe_router

CONFIG, CPU = StepConfig.read(BUNDLED), torch.device("cpu")
LEADERS = {group.weights[0] for group in make_plan(Checkpoint(BUNDLED), Settings(recipe="linears")).groups}
IDS = tokens(2, 96)  # beyond the window of 64


def calibrated(ids, search="gptq", leaders=LEADERS):
    run = Calibration(Checkpoint(BUNDLED), CONFIG, ids, CPU, search)
    found, peaks = {}, []
    for _, inputs, peak in run.layers(leaders):
        found |= {name: copy.copy(one) for name, one in inputs.items()}  # sums are let go of
        peaks.append(peak)
    return run, found, torch.stack(peaks)


@pytest.fixture(scope="module")
def all_inputs():
    return calibrated(IDS)


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


@torch.inference_mode()
def test_hidden_states_are_the_models(model, all_inputs):
    wanted = model.trunk(model.embed(IDS).flatten(0, 1), WholeSequences(*IDS.shape, CPU))
    assert torch.equal(torch.cat(all_inputs[0].hidden), wanted)


@torch.inference_mode()
def test_sums_are_of_the_inputs_that_the_model_multiplies(model, all_inputs):
    _, inputs, peaks = all_inputs
    assert set(inputs) == LEADERS
    layer, x = model.layers[0], model.embed(IDS).flatten(0, 1)
    normed = layer.input_norm(x)
    assert torch.allclose(inputs["model.layers.0.self_attn.q_proj.weight"].sums[0], products(normed), rtol=1e-4)
    h = x + layer.attention(normed, WholeSequences(*IDS.shape, CPU))
    normed = layer.post_norm(h)
    gate = inputs["model.layers.0.mlp.gate_proj.weight"]
    assert torch.allclose(gate.sums[0], products(normed), rtol=1e-3, atol=1e-3)
    assert gate.amax == normed.abs().amax() and gate.tokens == IDS.numel()
    v = layer.attention.qkvg(layer.input_norm(x))[2]
    assert peaks[0, 1] == v.abs().amax()


@torch.inference_mode()
def test_an_expert_counts_the_tokens_that_the_router_sends_it(model, all_inputs):
    first = next(i for i, layer in enumerate(CONFIG.layers) if layer.moe)
    x, addends, context = model.embed(IDS).flatten(0, 1), (), WholeSequences(*IDS.shape, CPU)
    for layer in model.layers[:first]:
        x, addends = layer(x, addends, context)
    layer = model.layers[first]
    normed, x = layer.input_norm.of_sum(x, addends)
    normed, _ = layer.post_norm.of_sum(x, (layer.attention(normed, context),))
    _, ids = moe_router(normed, layer.ffn.gate, layer.ffn.bias, CONFIG.top_k, CONFIG.router_scale)
    name = f"model.layers.{first}.moe"
    gate_up, down = (all_inputs[1][f"{name}.{p}_proj.weight"] for p in ("gate", "down"))
    wanted = ids.flatten().bincount(minlength=CONFIG.num_experts).float()
    assert torch.equal(gate_up.tokens, wanted) and torch.equal(down.tokens, wanted)
    busiest = int(wanted.argmax())
    mine = normed[(ids == busiest).any(1)]
    assert torch.allclose(gate_up.sums[busiest], products(mine), rtol=1e-3, atol=1e-3)


def test_batches_change_no_sum(monkeypatch, all_inputs):
    monkeypatch.setitem(calibration._AT_ONCE, "cpu", 96)
    _, inputs, peaks = calibrated(IDS)
    for name, wanted in all_inputs[1].items():
        assert torch.allclose(inputs[name].sums, wanted.sums, rtol=1e-3, atol=1e-3 * wanted.sums.abs().max())
        assert torch.equal(inputs[name].tokens, wanted.tokens)


def test_local_sums_are_the_blocks_of_the_whole_ones(all_inputs):
    leaders = {name for name in LEADERS if ".layers.4." in name}
    _, inputs, _ = calibrated(IDS, "hessian", leaders)
    assert set(inputs) == leaders
    for name, local in inputs.items():
        whole = all_inputs[1][name].sums
        for b in range(whole.shape[-1] // BLOCK):
            part = slice(BLOCK * b, BLOCK * (b + 1))
            assert torch.allclose(local.sums[:, b], whole[:, part, part], rtol=1e-3, atol=1e-3)


def test_searches_without_hessians_only_learn_the_largest_input():
    _, inputs, _ = calibrated(IDS[:, :8], "mse")
    assert all(i.sums is None and i.amax > 0 for i in inputs.values())


def test_an_expert_without_tokens_gets_the_mean_hessian():
    inputs, x = Inputs(32, "gptq", 3, CPU), torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    inputs.add(x[:30], 0)
    inputs.add(x[30:], 2)
    inputs.add(x[:0], 1)
    assert torch.allclose(inputs.hessians(1, 2)[0], products(x) / 50, rtol=1e-4, atol=1e-5)


def test_activations_that_overflow_are_named(tmp_path):
    shutil.copytree(BUNDLED, tmp_path / "m")
    from safetensors.torch import load_file, save_file

    file = next(
        f for f in (tmp_path / "m").glob("*.safetensors") if "model.layers.0.input_layernorm.weight" in load_file(f)
    )
    tensors = load_file(file)
    tensors["model.layers.0.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})
    run = Calibration(Checkpoint(tmp_path / "m"), CONFIG, IDS[:, :8], CPU, "mse")
    with pytest.raises(CheckpointError, match=r"model.layers.0.*: calibration tokens reach it as NaN"):
        list(run.layers(LEADERS))


def test_text_and_flat_ids_are_cut_into_sequences_and_rows_of_ids_stay_apart(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("A lock is held by one thread. " * 400, encoding="utf-8")
    ids = read_tokens(text, BUNDLED, CONFIG)
    assert ids.shape[1] == 2048 and len(ids) >= 1 and ids.dtype == torch.int64
    for shape, wanted in (((100,), (1, 100)), ((4, 25), (4, 25)), ((2, 2, 25), (1, 100))):
        np.save(tmp_path / "b.npy", np.arange(13, 113, dtype=np.int32).reshape(shape))
        assert torch.equal(read_tokens(tmp_path / "b.npy", BUNDLED, CONFIG), torch.arange(13, 113).view(wanted))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b"", "got no tokens"),
        ("latin.txt", b"\xe4\xf6", "not readable as calibration data"),
        ("floats.npy", np.ones(3), "not readable as calibration data"),
        ("objects.npy", np.array([{}], dtype=object), "not readable as calibration data"),
        ("text.npy", b"hello", "not readable as calibration data"),
        ("large.npy", np.array([CONFIG.vocab_size]), f"got token id {CONFIG.vocab_size}"),
        ("negative.npy", np.array([3, -1]), "got token id -1"),
    ],
)
def test_unusable_calibration_data_is_one_line(tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        np.save(tmp_path / name, content, allow_pickle=True)
    with pytest.raises(CheckpointError, match=message) as error:
        read_tokens(tmp_path / name, BUNDLED, CONFIG)
    assert "\n" not in str(error.value) and name in str(error.value)
