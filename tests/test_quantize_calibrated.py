"""Conversions with calibration data: the searches that need it, input scales, cache scales, stopped and resumed."""

import copy
import hashlib

import numpy as np
import pytest
import torch
from small_checkpoint import read
from test_model import tokens

from quantize import Settings, lanes, run
from quantize.calibration import Calibration, read_tokens
from quantize.convert import STATE
from quantize.hessian import gptq, local_gptq
from quantize.inputs import Inputs, Shared
from quantize.nvfp4 import main
from quantize.plan import UsageError
from quantize.shards import Shard
from quantize.verify import BOUND, verify
from step_kernels import nvfp4
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.model.attention import WholeSequences
from step_kernels.model.checkpoint import CheckpointError

CONFIG = StepConfig.read(BUNDLED)
MOE = [i for i, layer in enumerate(CONFIG.layers) if layer.moe]


@pytest.fixture(scope="module", autouse=True)
def small():
    """One order of columns; with four gptq takes 20 s for the bundled model. An expert's tokens in several parts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.hessian.STARTS", 1)
        patch.setattr("quantize.inputs._VISITS", 8)  # of 1 to 58
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(file, tokens(2, 80).numpy())
    return file


class Watched(Calibration):
    """Keeps what it gave."""

    runs = {}

    def layers(self, *arguments):
        self.runs[self.search], self.found, self.peaks = self, {}, {}
        for index, inputs, peaks in super().layers(*arguments):
            self.peaks[index] = peaks
            self.found |= {name: copy.copy(found) for name, found in inputs.items()}  # sums are let go of
            yield index, inputs, peaks


@pytest.fixture(scope="module")
def made(tmp_path_factory, data):
    """Folders by search, with every calibrated scale; Watched.runs has how they came about."""
    root, folders = tmp_path_factory.mktemp("calibrated"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quantize.convert.Calibration", Watched)
        for search in ("hessian", "gptq", "mse"):
            settings = Settings(search=search, calibration=data, kv_scales="calibrated")
            assert run(BUNDLED, root / search, settings).problems == []
            folders[search] = root / search
    return folders


FIRST, LAST = min(MOE), max(i for i in MOE if i < CONFIG.num_layers)


def weight(layer, part):
    return f"model.layers.{layer}.moe.{part}_proj.weight"


def decoded(tensors, name):
    return nvfp4.dequantize(tensors[name], tensors[f"{name}_scale"], tensors[f"{name}_scale_2"])


def digests(folder):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def test_gptq_writes_what_gptq_gives_for_the_layers_inputs(made):
    """In the first mixture, whose inputs no quantized layer has moved."""
    name, ours, source = weight(FIRST, "gate"), read(made["gptq"]), read(BUNDLED)
    scale, found = ours[f"{name}_scale_2"], Watched.runs["gptq"].found[name]
    assert not found.moved.any()
    wanted = nvfp4.dequantize(*gptq(source[name], scale, found.hessians(0, CONFIG.num_experts)), scale)
    assert (wanted == decoded(ours, name)).float().mean() > 0.999  # near ties may fall to either side in other batches
    assert not torch.equal(wanted, decoded(read(made["mse"]), name))


def test_hessian_writes_what_local_hessians_give(made):
    name, ours, source = weight(LAST, "down"), read(made["hessian"]), read(BUNDLED)
    scale, blocks = ours[f"{name}_scale_2"], Watched.runs["hessian"].found[name].hessians(0, CONFIG.num_experts)
    wanted = nvfp4.dequantize(*local_gptq(source[name], scale, blocks), scale)
    assert (wanted == decoded(ours, name)).float().mean() > 0.999


def hidden(folder, ids):
    """The trunk's, as the checkpoint makes them."""
    model = Step3p7.from_pretrained(folder, "cpu", torch.float32)
    with torch.inference_mode():
        return model.trunk(model.embed(ids).flatten(0, 1), WholeSequences(*ids.shape, torch.device("cpu")))


def test_gptq_sees_what_the_quantized_layers_make_of_the_tokens(made, data):
    ids, run = read_tokens(data, BUNDLED, CONFIG), Watched.runs["gptq"]
    source, ours = hidden(BUNDLED, ids), hidden(made["gptq"], ids)
    assert torch.equal(torch.cat(run.hidden), source)
    assert torch.allclose(torch.cat(run.quantized), ours, rtol=1e-4, atol=1e-4)
    assert (ours - source).norm() > 0.02 * source.norm()


def test_weights_make_up_for_what_was_quantized_before_them(made, data, tmp_path, monkeypatch):
    """Experts that only round their own err more in the model's hidden states."""
    for kind in (Inputs, Shared):
        monkeypatch.setattr(kind, "wanted", lambda self, begin, end, weight, hessians: weight)
    run(BUNDLED, tmp_path / "alone", Settings(search="gptq", calibration=data), verify=False)
    ids = read_tokens(data, BUNDLED, CONFIG)
    source, ours, alone = (hidden(folder, ids) for folder in (BUNDLED, made["gptq"], tmp_path / "alone"))
    assert (ours - source).norm() < 0.9 * (alone - source).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "search, devices, bound",
    [("gptq", ["cuda:0"], 1.25), ("hessian", ["cuda:0"], 1.1), ("hessian", ["cuda:0", "cpu"], 1.1)],
)
def test_gpu_errs_little_more_than_the_cpu(made, data, tmp_path, monkeypatch, search, devices, bound):
    """Its tokens are in bfloat16, which costs gptq 7 %; not to make up for what was quantized before costs 85 %."""
    monkeypatch.setattr(lanes, "devices", lambda names: [torch.device(name) for name in devices])
    settings = Settings(search=search, calibration=data, kv_scales="calibrated")
    assert run(BUNDLED, tmp_path / "gpu", settings, device="cuda").problems == []
    ids = read_tokens(data, BUNDLED, CONFIG)
    source, cpu, gpu = (hidden(folder, ids) for folder in (BUNDLED, made[search], tmp_path / "gpu"))
    assert (gpu - source).norm() < bound * (cpu - source).norm()


def test_verify_allows_gptq_what_it_departs_from_the_weights_and_no_more(made):
    assert verify(made["gptq"], BUNDLED).problems == []
    above = verify(made["gptq"], BUNDLED, bound=BOUND).problems
    assert above and all("relative MSE is above 0.0100" in problem for problem in above)
    assert verify(made["hessian"], BUNDLED).findings.done["e"].startswith("at most 0.0100")


def test_input_scales_reach_twice_the_largest_input(made):
    for search, folder in made.items():
        ours, found = read(folder), Watched.runs[search].found
        for leader, projections in (("gate", ("gate", "up")), ("down", ("down",))):
            wanted = 2 * found[weight(LAST, leader)].amax / 2688
            for part in projections:
                scale = ours[f"model.layers.{LAST}.moe.{part}_proj.input_scale"]
                assert scale.shape == (CONFIG.num_experts,) and torch.allclose(scale, wanted.expand_as(scale)), search
        drafts = [t for name, t in ours.items() if name.endswith("input_scale") and ".layers.8." in name]
        assert all((t == 1).all() for t in drafts)  # no tokens reach the MTP layers


def test_cache_scales_reach_the_largest_key_and_value(made):
    for search, folder in made.items():
        ours = read(folder)
        for letter, peak in zip("kv", Watched.runs[search].peaks[LAST]):
            scale = ours[f"model.layers.{LAST}.self_attn.{letter}_proj.{letter}_scale"]
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
