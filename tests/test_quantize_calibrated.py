"""Conversions with calibration data: the searches that need it, input scales, cache scales, stopped and resumed."""

import hashlib

import numpy as np
import pytest
import torch
from small_checkpoint import read
from test_model import tokens

from quantize import Settings, run
from quantize.calibration import Calibration, read_tokens
from quantize.convert import STATE
from quantize.hessian import gptq, local_gptq
from quantize.nvfp4 import main
from quantize.plan import UsageError
from quantize.shards import Shard
from step_kernels import nvfp4
from step_kernels.generate import BUNDLED
from step_kernels.model import StepConfig
from step_kernels.model.checkpoint import Checkpoint, CheckpointError

CONFIG = StepConfig.read(BUNDLED)
MOE = [i for i, layer in enumerate(CONFIG.layers) if layer.moe]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(file, tokens(2, 80).numpy())
    return file


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """Folders by search, with every calibrated scale."""
    root, folders = tmp_path_factory.mktemp("calibrated"), {}
    for search in ("hessian", "gptq", "mse"):
        settings = Settings(search=search, calibration=data, kv_scales="calibrated")
        assert run(BUNDLED, root / search, settings).problems == []
        folders[search] = root / search
    return folders


@pytest.fixture(scope="module")
def inputs(data):
    """Of the last mixture: gate_up's and down's inputs, and the largest key and value of its layer."""
    last = max(i for i in MOE if i < CONFIG.num_layers)
    leaders = {f"model.layers.{last}.moe.{part}_proj.weight" for part in ("gate", "down")}
    ids = read_tokens(data, BUNDLED, CONFIG)
    for index, found, peaks in Calibration(Checkpoint(BUNDLED), CONFIG, ids, torch.device("cpu"), "gptq").layers(
        leaders
    ):
        if index == last:
            return last, found, peaks


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("part", ["gate", "down"])
def test_gptq_writes_what_gptq_gives_for_the_layers_inputs(made, inputs, part):
    last, found, _ = inputs
    name, ours, source = f"model.layers.{last}.moe.{part}_proj.weight", read(made["gptq"]), read(BUNDLED)
    scale = ours[f"{name}_scale_2"]
    codes, blocks = gptq(source[name], scale, found[name].hessians(0, CONFIG.num_experts))
    wanted, got = (nvfp4.dequantize(*t, scale) for t in ((codes, blocks), (ours[name], ours[f"{name}_scale"])))
    assert (wanted == got).float().mean() > 0.999  # near ties may fall to either side in batches of another size
    assert not torch.equal(got, nvfp4.dequantize(read(made["mse"])[name], read(made["mse"])[f"{name}_scale"], scale))


def test_hessian_writes_what_local_hessians_give(made, inputs):
    last, found, _ = inputs
    name, ours, source = f"model.layers.{last}.moe.down_proj.weight", read(made["hessian"]), read(BUNDLED)
    whole, scale = found[name].hessians(0, CONFIG.num_experts), ours[f"{name}_scale_2"]
    blocks = torch.stack([whole[:, i : i + 16, i : i + 16] for i in range(0, whole.shape[-1], 16)], 1)
    wanted = nvfp4.dequantize(*local_gptq(source[name], scale, blocks), scale)
    assert (wanted == nvfp4.dequantize(ours[name], ours[f"{name}_scale"], scale)).float().mean() > 0.999


def test_input_scales_reach_twice_the_largest_input(made, inputs):
    last, found, _ = inputs
    for search, folder in made.items():
        ours = read(folder)
        for leader, projections in (("gate", ("gate", "up")), ("down", ("down",))):
            wanted = 2 * found[f"model.layers.{last}.moe.{leader}_proj.weight"].amax / 2688
            for part in projections:
                scale = ours[f"model.layers.{last}.moe.{part}_proj.input_scale"]
                assert scale.shape == (CONFIG.num_experts,) and torch.allclose(scale, wanted.expand_as(scale)), search
        drafts = [t for name, t in ours.items() if name.endswith("input_scale") and ".layers.8." in name]
        assert all((t == 1).all() for t in drafts)  # no tokens reach the MTP layers


def test_cache_scales_reach_the_largest_key_and_value(made, inputs):
    last, _, peaks = inputs
    ours = read(made["gptq"])
    for letter, peak in zip("kv", peaks):
        scale = ours[f"model.layers.{last}.self_attn.{letter}_proj.{letter}_scale"]
        assert scale.shape == () and torch.allclose(scale, peak / 448)


def test_without_hessians_calibration_changes_no_code(made, tmp_path):
    assert run(BUNDLED, tmp_path / "plain").problems == []
    plain = read(tmp_path / "plain")
    for name, tensor in read(made["mse"]).items():
        if not name.endswith(("input_scale", "k_scale", "v_scale")):
            assert torch.equal(tensor.view(torch.uint8), plain[name].view(torch.uint8)), name


@pytest.mark.parametrize("finished", [1, 2])
def test_a_stopped_conversion_ends_with_the_same_bytes(made, data, tmp_path, monkeypatch, finished):
    finish, done = Shard.finish, []

    def stop(self):
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(self)
        finish(self)

    settings = Settings(search="gptq", calibration=data, kv_scales="calibrated")
    monkeypatch.setattr(Shard, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        run(BUNDLED, tmp_path / "m", settings)
    assert (tmp_path / "m" / STATE).exists()
    monkeypatch.setattr(Shard, "finish", finish)
    assert run(BUNDLED, tmp_path / "m", settings, resume=True).problems == []
    assert digests(tmp_path / "m") == digests(made["gptq"])


def test_other_calibration_data_is_another_conversion(made, data, tmp_path, monkeypatch):
    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Shard, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        run(BUNDLED, tmp_path / "m", Settings(search="gptq", calibration=data))
    np.save(tmp_path / "other.npy", np.arange(13, 60))
    with pytest.raises(UsageError, match="begun with other settings"):
        run(BUNDLED, tmp_path / "m", Settings(search="gptq", calibration=tmp_path / "other.npy"), resume=True)


def test_a_hessian_that_cannot_be_factored_is_one_line(data, tmp_path, monkeypatch):
    monkeypatch.setattr("quantize.hessian.DAMPING", -2.0)
    with pytest.raises(CheckpointError, match=r"moe\.\w+_proj\.weight: its inputs' Hessian cannot be factored"):
        run(BUNDLED, tmp_path / "m", Settings(search="gptq", calibration=data))


@pytest.mark.parametrize("search", ["hessian", "gptq"])
def test_searches_by_hessians_ask_for_calibration_data(search, tmp_path, capsys):
    assert main(["bundled", str(tmp_path / "m"), "--search", search]) == 2
    assert (
        capsys.readouterr().err
        == f"error: search: {search} needs to know the weights' inputs, wanted calibration data\n"
    )


def test_calibrated_cache_scales_ask_for_calibration_data():
    with pytest.raises(UsageError, match="kv_scales: got calibrated, wanted calibration data"):
        Settings(kv_scales="calibrated")


def test_unreadable_calibration_data_is_one_line_before_any_work(tmp_path):
    with pytest.raises(CheckpointError, match="missing.txt: not readable as calibration data"):
        run(BUNDLED, tmp_path / "m", Settings(calibration=tmp_path / "missing.txt"))
    assert not (tmp_path / "m").exists()
