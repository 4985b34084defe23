"""Loading: every format and name scheme, no more bytes than needed, and nothing accepted unread."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from step_kernels import nvfp4
from step_kernels.generate import BUNDLED
from step_kernels.model import CheckpointError, Step3p7, StepConfig, weights
from step_kernels.model.checkpoint import Checkpoint
from step_kernels.model.formats import FP8Channels, FP8Experts, FP8Weight, fp8_channels
from step_kernels.model.loading import Opened
from step_kernels.model.memory import Tapped
from step_kernels.model.weights import Weights
from step_kernels.nvfp4 import NVFP4Experts, NVFP4Weight
from step_kernels.testing import relative_error

CONFIG = StepConfig.read(BUNDLED)
MOE = [n for n, layer in enumerate(CONFIG.layers) if layer.moe]
EXPERTS = tuple(f"model.layers.{n}.moe.{p}_proj.weight" for n in MOE for p in ("gate", "up", "down"))


def bundled():
    return {n: t for file in sorted(BUNDLED.glob("*.safetensors")) for n, t in load_file(file).items()}


def write(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    shutil.copy(BUNDLED / "config.json", folder)
    if config:
        data = json.loads((folder / "config.json").read_text())
        config(data)
        (folder / "config.json").write_text(json.dumps(data))
    save_file(tensors, folder / "model.safetensors")
    return folder


def load(folder):
    return Step3p7.from_pretrained(folder, "cpu", torch.float32)


def logits(model):
    return model(torch.randint(13, CONFIG.vocab_size, (1, 60), generator=torch.Generator().manual_seed(0)))


def quantized(tensors, names):
    """Stacked NVFP4 of the named tensors, gate and up with global scales of their own; and what they decode to."""
    out, decoded = dict(tensors), dict(tensors)
    for name in names:
        w = tensors[name].float()
        outer = nvfp4.global_scale(w.abs().amax((-2, -1)))
        codes, scales = nvfp4.quantize(w, outer)
        module = name.removesuffix(".weight")
        out |= {f"{module}.weight": codes, f"{module}.weight_scale": scales, f"{module}.weight_scale_2": outer,
                f"{module}.input_scale": torch.ones(outer.shape)}  # fmt: skip
        decoded[name] = nvfp4.dequantize(codes, scales, outer)
    return out, decoded


@pytest.fixture(scope="module")
def wanted():
    return logits(load(BUNDLED))


def released(name):
    """The NVFP4 release's name, were its MTP layers not bare."""
    if name.startswith(("vision_model", "vit_large_projector")):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1)


def released_with_bare_mtp(name):
    return name if name.startswith(tuple(f"model.layers.{i}." for i in (8, 9, 10))) else released(name)


def language_model(name):
    return name if name.startswith("vi") else "language_model." + name


@pytest.mark.parametrize("rename", [released, released_with_bare_mtp, language_model])
def test_name_schemes_load_the_same_model(tmp_path, wanted, rename):
    folder = write(tmp_path / "m", {rename(n): t for n, t in bundled().items()})
    assert torch.equal(logits(load(folder)), wanted)
    assert len(load(folder).mtp) == 3


def test_nvfp4_experts_compute_what_their_decoded_weights_compute(tmp_path):
    packed, decoded = quantized(bundled(), EXPERTS)
    model = load(write(tmp_path / "packed", packed))
    assert all(isinstance(model.layers[n].ffn.experts, NVFP4Experts) for n in MOE)
    outer = model.layers[3].ffn.experts.gate_up.global_scale
    assert outer.shape == (32, 2) and not torch.equal(outer[:, 0], outer[:, 1])
    assert relative_error(logits(model), logits(load(write(tmp_path / "decoded", decoded)))) < 1e-6


def test_nvfp4_linears_compute_what_their_decoded_weights_compute(tmp_path):
    names = [n for n in bundled() if n.endswith("_proj.weight") and ".moe." not in n and ".layers." in n] + [
        "lm_head.weight"
    ]
    packed, decoded = quantized(bundled(), [*names, "lm_head.weight"])
    model = load(write(tmp_path / "packed", packed))
    assert isinstance(model.layers[0].attention.qkvg.weights[0], NVFP4Weight) and isinstance(model.lm_head, NVFP4Weight)
    assert relative_error(logits(model), logits(load(write(tmp_path / "decoded", decoded)))) < 1e-6


def test_fp8_block_scaled_experts_compute_what_their_decoded_weights_compute(tmp_path, wanted):
    tensors = bundled()
    fp8, decoded = dict(tensors), dict(tensors)
    for name in EXPERTS:
        w = tensors[name].float()
        long = -1 if "down" not in name else -2  # 192: a block of 128 and one of 64; the other side's 64 are one
        scale = torch.cat([block.abs().amax((-2, -1), keepdim=True) for block in w.split(128, long)], long) / 448
        spread = scale.repeat_interleave(128, long).narrow(long, 0, CONFIG.hidden_size)
        fp8[name] = (w / spread).to(torch.float8_e4m3fn)
        fp8[f"{name}_scale_inv"] = scale
        decoded[name] = fp8[name].float() * spread
    model = load(write(tmp_path / "fp8", fp8))
    assert all(isinstance(model.layers[n].ffn.experts, FP8Experts) for n in MOE)
    assert relative_error(logits(model), logits(load(write(tmp_path / "decoded", decoded)))) < 1e-6
    assert 1e-4 < relative_error(logits(model), wanted) < 0.3


def test_fp8_blocks_are_128_square():
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    w = FP8Weight(torch.ones(130, 200).to(torch.float8_e4m3fn), scales).dequantize(torch.float32)
    assert [w[0, 0], w[127, 128], w[128, 127], w[129, 199]] == [1, 2, 3, 4]


def test_kv_scales_load_as_zero_dimensional_or_not_at_all(tmp_path):
    tensors = bundled()
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    tensors["model.layers.1.self_attn.v_proj.v_scale"] = torch.tensor([0.25])
    attention = load(write(tmp_path / "m", tensors)).layers[1].attention
    assert (attention.k_scale.item(), attention.v_scale.item(), attention.k_scale.dim()) == (0.5, 0.25, 0)
    assert load(BUNDLED).layers[1].attention.k_scale.item() == 1.0


def quantized_experts(folder):
    return write(folder, quantized(bundled(), EXPERTS)[0])


def fields(experts):
    return [getattr(w, name) for w in (experts.gate_up, experts.down) for name in ("codes", "scales", "global_scale")]


@pytest.mark.parametrize("at_once", [1, 3 * 64 * 192 * 9 // 16 * 5, 1 << 30], ids=["1 expert", "5 experts", "all"])
def test_experts_are_gate_above_up_and_down_however_many_are_read_at_once(tmp_path, monkeypatch, at_once):
    monkeypatch.setattr(weights, "_AT_ONCE", at_once)
    stored = load_file(quantized_experts(tmp_path / "m") / "model.safetensors")
    found = Weights(Checkpoint(tmp_path / "m"), torch.device("cpu"), torch.float32).experts(
        "model.layers.3.moe", 32, 64, 192
    )
    gate, up, down = (f"model.layers.3.moe.{p}_proj.weight" for p in ("gate", "up", "down"))
    for suffix, got, alone in zip(("", "_scale", "_scale_2"), fields(found)[:3], fields(found)[3:]):
        pair = [stored[name + suffix] for name in (gate, up)]
        joined = torch.stack(pair, 1) if suffix == "_scale_2" else torch.cat([t.view(torch.uint8) for t in pair], 1)
        assert got.view(torch.uint8).equal(joined.view(torch.uint8))
        assert alone.view(torch.uint8).equal(stored[down + suffix].view(torch.uint8))


def test_no_more_than_some_experts_are_on_their_way_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "_AT_ONCE", 3 * 64 * 192 * 9 // 16 * 5)
    shapes, prepare = [], weights.kernel_layout

    def spy(weight, device, dtype):
        if isinstance(weight, NVFP4Experts):
            shapes.append(tuple(weight.gate_up.codes.shape))
        return prepare(weight, device, dtype)

    monkeypatch.setattr(weights, "kernel_layout", spy)
    checkpoint = Checkpoint(quantized_experts(tmp_path / "m"))
    Weights(checkpoint, torch.device("cpu"), torch.float32).experts("model.layers.3.moe", 32, 64, 192)
    assert shapes == [(5, 128, 96)] * 6 + [(2, 128, 96)]


def test_plain_experts_are_joined_whatever_is_read_at_once(monkeypatch):
    name = "model.layers.3.moe"
    stored = bundled()
    for at_once in (1, 3 * 64 * 192 * 2, 1 << 30):
        monkeypatch.setattr(weights, "_AT_ONCE", at_once)
        found = Weights(Checkpoint(BUNDLED), torch.device("cpu"), torch.bfloat16).experts(name, 32, 64, 192)
        pair = [stored[f"{name}.{p}_proj.weight"] for p in ("gate", "up")]
        assert found.gate_up.equal(torch.cat(pair, 1)) and found.down.equal(stored[f"{name}.down_proj.weight"])


def test_fp8_channels_keep_a_rows_largest_value_and_zeros():
    w = torch.tensor([[448.0, 1.0, -7.3], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.125], [3e-5, -3e-5, 1e-6]])
    found = fp8_channels(w.bfloat16())
    assert found.codes.float().tolist()[:3] == [[448, 1, -7.5], [0, 0, 0], [-448, 224, 112]]
    assert found.scale[:3].tolist() == [1, 1, pytest.approx(0.5 / 448)] and found.shape == w.shape
    big = torch.randn(5000, 40, generator=torch.Generator().manual_seed(0)).bfloat16()  # more rows than at once
    found = fp8_channels(big)
    assert found.scale.equal(big.float().abs().amax(1) / torch.tensor(448.0))
    error = (found.dequantize() - big.float()).abs()
    assert (error <= big.float().abs() / 16 + found.scale[:, None] / 1024 * 1.01).all()  # half of 2^-3; of a subnormal


def test_fp8_makes_every_linear_of_the_language_model_channels_and_nothing_else():
    kinds = {}

    def see(name, value):
        kinds.setdefault(type(value), set()).add(name)
        return value

    Opened(lambda config, source, depths: Step3p7(config, Tapped(source, see), depths), BUNDLED, torch.bfloat16, True)
    linears = [n for n in bundled() if n.endswith(("_proj.weight", ".shared_head.output.weight", "lm_head.weight"))]
    assert kinds[FP8Channels] == {n for n in linears if n.startswith(("model.", "lm_head")) and ".moe." not in n}
    stored = bundled()["model.layers.1.self_attn.q_proj.weight"]
    source = Weights(Checkpoint(BUNDLED), torch.device("cpu"), torch.bfloat16, fp8=True)
    found = source.linear("model.layers.1.self_attn.q_proj", *stored.shape)
    assert found.codes.view(torch.uint8).equal(fp8_channels(stored).codes.view(torch.uint8))


def change(name, make):
    return lambda tensors: tensors.update({name: make(tensors[name])})


OUTER = "model.layers.3.moe.gate_proj.weight_scale_2"
KV = "model.layers.0.self_attn.k_proj.k_scale"


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: t.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (lambda t: t.pop(OUTER), f"tensor {OUTER} is missing"),
        (change("model.norm.weight", lambda t: t[:-1].clone()), "model.norm.weight: got bfloat16 [191], wanted"),
        (change("lm_head.weight", lambda t: t.int()), "lm_head.weight: got int32 [2048, 192], wanted bfloat16"),
        (change(EXPERTS[0], lambda t: t[:, :, :-1].clone()), "gate_proj.weight: got uint8 [32, 64, 95], wanted uint8"),
        (change(OUTER, torch.zeros_like), "holds a zero, negative or NaN scale"),
        (change(OUTER, lambda t: t[:1]), "got [1], wanted [32]"),
        (lambda t: t.update({KV: torch.tensor(-1.0)}), "wanted one positive scale"),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path, damage, message):
    packed, _ = quantized(bundled(), EXPERTS)
    damage(packed)
    with pytest.raises(CheckpointError) as error:
        load(write(tmp_path / "m", packed))
    assert message in str(error.value)


def test_config_without_a_needed_field_is_refused_by_name(tmp_path):
    folder = write(tmp_path / "m", bundled(), lambda c: c["text_config"].pop("hidden_size"))
    with pytest.raises(CheckpointError, match="text_config.hidden_size is missing, wanted a positive integer"):
        load(folder)


def test_python_in_a_checkpoint_is_not_run(tmp_path):
    folder = write(tmp_path / "m", bundled(), lambda c: c.update(auto_map={"AutoModel": "evil.Model"}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_land_on_the_device_asked_for():
    source = Weights(Checkpoint(BUNDLED), torch.device("meta"), torch.bfloat16)
    assert source.tensor("model.norm.weight", (CONFIG.hidden_size,)).device.type == "meta"
