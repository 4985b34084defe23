"""NVFP4 checkpoints in transformers: what our own model computes, from the same bytes in memory."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_checkpoint import read
from test_model import tokens, typical_error

from quantize import Settings, run
from step_kernels import nvfp4
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.testing import relative_error

pytest.importorskip("transformers.models.step3p7", reason="needs transformers >= 5.17", exc_type=ImportError)
from transformers import AutoModelForImageTextToText, Step3p7ForConditionalGeneration  # noqa: E402
from transformers.quantizers import auto  # noqa: E402

from step_kernels.integrations import transformers as integration  # noqa: E402

CONFIG = StepConfig.read(BUNDLED)
IMAGE, TRUNK = CONFIG.image_token_id, CONFIG.num_layers
MOE = [n for n, layer in enumerate(CONFIG.layers) if layer.moe]
EXPERTS = "model.layers.4.moe."


def load(folder, dtype=torch.float32, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The bundled model with NVFP4 experts, under its own names, under the release's, and with more in NVFP4."""
    root = tmp_path_factory.mktemp("transformers")
    for names in ("source", "released"):
        assert run(BUNDLED, root / names, Settings(names=names)).problems == []
    linears(root / "source", root / "linears")
    chosen = {"model.layers.0.mlp.gate_proj.weight": "nvfp4", "model.layers.1.self_attn.q_proj.weight": "source"}
    fp8 = Settings(names="released", rest="fp8", lm_head=True)
    assert run(BUNDLED, root / "fp8", fp8, precisions=chosen).problems == []
    return {f.name: f for f in root.iterdir()}


def rewrite(source: Path, target: Path, change, ignore=None) -> Path:
    """A copy of a checkpoint with its tensors and its ignore list changed."""
    tensors, config = read(source), json.loads((source / "config.json").read_text())
    change(tensors)
    if ignore is not None:
        config["quantization_config"]["ignore"] = ignore
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_text(json.dumps(config))
    return target


def linears(source: Path, target: Path) -> Path:
    """Text linears in NVFP4 except layer 1's; layer 3's experts in BF16; layer 4's up unlike its gate in scale."""
    plain = read(BUNDLED)

    def change(tensors):
        for name, weight in list(tensors.items()):
            parts = name.split(".")
            mtp = parts[1] == "layers" and int(parts[2]) >= TRUNK
            if ".layers.3.moe." in name and "_proj." in name:
                del tensors[name]
            elif (".layers." in name or "lm_head" in name) and not mtp and ".layers.1." not in name:
                if weight.dim() == 2 and "moe.gate" not in name:
                    outer = nvfp4.global_scale(weight.float().abs().amax())
                    tensors[name], tensors[f"{name}_scale"] = nvfp4.quantize(weight.float(), outer)
                    tensors[f"{name}_scale_2"] = outer
        tensors.update({n: t for n, t in plain.items() if ".layers.3.moe." in n})
        tensors[f"{EXPERTS}up_proj.weight_scale_2"] *= 3

    ignore = ["model.layers.1.*", "*.moe.gate", "model.layers.3.moe.*_proj", "vision_model*", "vit_large_projector"]
    return rewrite(source, target, change, ignore)


@pytest.fixture(scope="module")
def pairs(folders):
    """(transformers' model, ours) of each checkpoint, in f32."""
    return {n: (load(f), Step3p7.from_pretrained(f, "cpu", torch.float32)) for n, f in folders.items()}


def prompt(crops: list[int]):
    """120 tokens with images of so many crops; the arguments of transformers' model and of ours."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(crops), 3, 168, 168, generator=generator)
    patches = torch.randn(sum(crops), 3, 112, 112, generator=generator) if sum(crops) else None
    ids, at = tokens(1, 120), 3
    for n in crops:
        ids[0, at : at + 4 * n + 9] = IMAGE
        at += 4 * n + 9 + 5
    if not crops:
        return ids, {}, {}
    theirs = {"pixel_values": images, "pixel_values_local": patches, "num_local_patches": crops}
    return ids, theirs, {"pixel_values": images, "patch_pixel_values": patches, "num_patches": crops}


CASES = pytest.mark.parametrize("crops", [[], [0], [3, 2]], ids=["text", "image", "two images"])


@torch.no_grad()
@CASES
@pytest.mark.parametrize("folder", ["source", "released", "linears", "fp8"])
def test_logits_equal_our_model(pairs, folder, crops):
    theirs, ours = pairs[folder]
    ids, images, our_images = prompt(crops)
    assert relative_error(theirs(input_ids=ids, **images).logits, ours(ids, **our_images)) < 1e-5


@CASES
@pytest.mark.parametrize("folder", ["source", "released"])
def test_greedy_tokens_equal_our_model(pairs, folder, crops):
    theirs, ours = pairs[folder]
    ids, images, our_images = prompt(crops)
    out = theirs.generate(ids, max_new_tokens=32, do_sample=False, eos_token_id=None, pad_token_id=1, **images)
    options = dict(max_new_tokens=32, kv_cache="model", stop_ids=(), images=[our_images] if crops else None)
    assert out[0, 120:].tolist() == list(ours.generate(ids[0].tolist(), **options))


@pytest.mark.parametrize("folder", ["source", "released", "linears"])
def test_every_tensor_has_its_place(folders, folder):
    _, info = load(folders[folder], output_loading_info=True)
    assert {key: list(value) for key, value in info.items() if value} == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_are_held_once_as_the_checkpoints_bytes(folders, dtype):
    model, stored = load(folders["source"], dtype), read(folders["source"])
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert {t.device.type for t in tensors.values()} == {"cpu"}
    held = {n.rsplit(".", 1)[1]: t for n, t in tensors.items() if ".layers.4.mlp.experts." in n}
    for scale in ("", "_scale", "_scale_2"):
        gate, up, down = (stored[f"{EXPERTS}{p}_proj.weight{scale}"] for p in ("gate", "up", "down"))
        pair = torch.stack((gate, up), 1) if scale == "_scale_2" else torch.cat((gate, up), 1)
        for name, wanted in (("gate_up_proj", pair), ("down_proj", down)):
            got = held.pop(name + scale)
            assert got.dtype == wanted.dtype
            assert torch.equal(got.float(), wanted.float())
    assert held == {}
    assert stored[f"{EXPERTS}up_proj.weight"].dtype == torch.uint8
    drafts = tuple(f"model.layers.{n}." for n in range(TRUNK, len(CONFIG.layers)))
    used = {n: t for n, t in stored.items() if not n.startswith(drafts)}
    floats = sum(t.numel() for t in used.values() if t.dtype == torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == floats


def test_dtype_is_that_of_all_but_router_and_nvfp4(folders):
    for dtype in (torch.float32, torch.bfloat16):
        model = load(folders["linears"], dtype)
        odd = {n for n, p in model.named_parameters() if p.dtype != dtype and not n.endswith(".mlp.gate.weight")}
        assert odd == set()
        assert {m.weight.dtype for n, m in model.named_modules() if n.endswith(".mlp.gate")} == {torch.float32}
        biases = [b for n, b in model.named_buffers() if n.endswith("correction_bias")]
        stored = read(folders["linears"])
        assert all(
            torch.equal(b, stored[f"model.layers.{i}.moe.router_bias"]) for i, b in zip(MOE, biases, strict=True)
        )


@torch.no_grad()
@CASES
def test_bfloat16_errs_no_more_than_twice_as_much_as_our_model(folders, pairs, crops):
    ids, images, our_images = prompt(crops)
    wanted = pairs["source"][1](ids, **our_images)
    ours = Step3p7.from_pretrained(folders["source"], "cpu", torch.bfloat16)(ids, **our_images)
    theirs = load(folders["source"], torch.bfloat16)(input_ids=ids, **images).logits
    assert theirs.dtype == torch.bfloat16
    got, allowed = typical_error(theirs, wanted), 2 * typical_error(ours, wanted)
    assert got <= allowed, f"relative error {got:.3e}, allowed {allowed:.3e}"


@torch.no_grad()
def test_clamps_are_the_layers_own(pairs):
    model, ids = pairs["source"][0], tokens(1, 120)
    experts = [layer.mlp.experts for layer in model.model.language_model.layers[3:]]
    assert [e.limit for e in experts] == [None, None, None, 2.0, 2.0]
    clamped = model(input_ids=ids).logits
    experts[3].limit = experts[4].limit = None
    try:
        assert relative_error(model(input_ids=ids).logits, clamped) > 1e-4
    finally:
        experts[3].limit = experts[4].limit = 2.0


@torch.no_grad()
@pytest.mark.parametrize("names", ["source", "released"])
@pytest.mark.parametrize("spelling", ["source", "released"])
def test_ignore_list_holds_in_either_spelling(folders, pairs, tmp_path, names, spelling):
    written = json.loads((folders[names] / "config.json").read_text())["quantization_config"]["ignore"]
    foreign = ("model.language_model.", "model.vi") if spelling == "source" else ("model.layers.", "vi")
    ignore = [p for p in written if not p.startswith(foreign)]
    assert len(ignore) < len(written)
    model = load(rewrite(folders[names], tmp_path / "out", lambda tensors: None, ignore))
    ids = tokens(1, 40)
    assert relative_error(model(input_ids=ids).logits, pairs[names][1](ids)) < 1e-5


@pytest.mark.parametrize(
    ("module", "pattern", "ignored"),
    [
        ("lm_head", "lm_head", True),
        ("model.language_model.layers.0.mlp.gate_proj", "model.language_model.layers.0*", True),
        ("model.language_model.layers.10.mlp.gate_proj", "model.language_model.layers.1.*", False),
        ("model.language_model.layers.3.self_attn.q_proj", "model.layers.3.self_attn*", True),
        ("model.language_model.layers.3.self_attn.q_proj", "model.layers.3.self_attn", True),
        ("model.language_model.layers.3.mlp.shared_experts.up_proj", "*.layers.3.share_expert*", True),
        ("model.language_model.layers.3.mlp.experts", "model.language_model.layers.3.moe.gate", False),
        ("model.language_model.layers.3.mlp.experts", "model.layers.3.moe.*_proj", True),
        ("model.language_model.layers.3.mlp.experts", "model.layers.3.moe", True),
        ("model.vision_model.layers.0.mlp.fc1", "vision_model*", True),
        ("model.multi_modal_projector", "model.vit_large_projector", True),
        ("model.multi_modal_projector", "vit_large_projector*", True),
    ],
)  # fmt: skip
def test_ignore_patterns_match_checkpoint_names(module, pattern, ignored):
    assert integration._is_ignored(module, integration._matcher([pattern])) == ignored
    assert not integration._is_ignored(module, integration._matcher([]))


@pytest.mark.parametrize("part", ["weight", "weight_scale", "weight_scale_2"])
@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("model.layers.4.moe.gate_proj", r"layers\.4\.mlp\.experts: gate_proj"),
        ("model.layers.4.moe.up_proj", r"layers\.4\.mlp\.experts: up_proj"),
        ("model.layers.5.moe.down_proj", r"layers\.5\.mlp\.experts: down_proj"),
        ("model.layers.0.mlp.up_proj", r"layers\.0\.mlp\.up_proj"),
        ("model.layers.3.share_expert.up_proj", r"layers\.3\.mlp\.shared_experts\.up_proj"),
    ],
)
def test_missing_tensor_is_an_error(folders, tmp_path, module, part, message):
    folder = rewrite(folders["linears"], tmp_path / "out", lambda tensors: tensors.pop(f"{module}.{part}"))
    with pytest.raises(ValueError, match=f"{message}: has no {part} in "):
        load(folder)


@pytest.mark.parametrize(
    "tensor", [f"{EXPERTS}down_proj.weight_scale", f"{EXPERTS}up_proj.weight_scale_2", "lm_head.weight_scale"]
)
def test_scale_of_another_shape_is_an_error(folders, tmp_path, tensor):
    def change(tensors):
        tensors[tensor] = tensors[tensor][..., :-1].clone()

    with pytest.raises((ValueError, RuntimeError)):
        load(rewrite(folders["linears"], tmp_path / "out", change))


@pytest.mark.parametrize("ignore", ["model.layers.0.mlp*", "model.layers.4.moe*"])
def test_codes_in_an_ignored_module_are_an_error(folders, tmp_path, ignore):
    written = json.loads((folders["linears"] / "config.json").read_text())["quantization_config"]["ignore"]
    folder = rewrite(folders["linears"], tmp_path / "out", lambda tensors: None, [*written, ignore])
    with pytest.raises((ValueError, RuntimeError), match="mismatched|wanted"):
        load(folder)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_unusable_scale_is_an_error(folders, tmp_path, value):
    def change(tensors):
        tensors[f"{EXPERTS}up_proj.weight_scale_2"][2] = value

    with pytest.raises(ValueError, match=r"layers\.4\.mlp\.experts\.gate_up_proj_scale_2: holds a"):
        load(rewrite(folders["source"], tmp_path / "out", change))


def test_fp8_stays_a_byte_a_weight_and_lacks_neither_tensor_nor_scale(folders, pairs, tmp_path):
    stored, model = read(folders["fp8"]), pairs["fp8"][0]
    ours = {n: m for n, m in model.named_modules() if isinstance(m, integration.FP8Linear)}
    trunk = [n for n in stored if f"{n}_scale" in stored and f"{n}_scale_2" not in stored]
    assert len(ours) == len(trunk) == TRUNK * 7 + 1 - 2 - 3  # gate and up, and q, k and v, are otherwise
    held = model.get_submodule("model.language_model.layers.4.mlp.shared_experts.up_proj")
    name = "model.language_model.layers.4.share_expert.up_proj.weight"
    assert held.weight.view(torch.uint8).equal(stored[name].view(torch.uint8)) and held.weight_scale.equal(
        stored[f"{name}_scale"]
    )
    name = "model.language_model.layers.2.self_attn.o_proj.weight_scale"
    for change, message in (
        (lambda t: t.pop(name), r"layers\.2\.self_attn\.o_proj: has no weight_scale in .*, wanted FP8 by its config"),
        (lambda t: t[name].zero_(), r"layers\.2\.self_attn\.o_proj\.weight_scale: holds a zero"),
    ):
        with pytest.raises(ValueError, match=message):
            load(rewrite(folders["fp8"], tmp_path / str(len(message)), change))


def test_transformers_alone_cannot_load_it(folders, monkeypatch):
    monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "modelopt")
    monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "modelopt")
    with pytest.raises(RuntimeError, match="mismatched"):
        load(folders["source"])


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match="got quant_algo FP8, wanted NVFP4"):
        integration.ModelOptConfig(quant_algo="FP8")
    with pytest.raises(ValueError, match="got quant_algo MXFP8, wanted NVFP4"):
        layers = {"a": {"quant_algo": "NVFP4"}, "b": {"quant_algo": "MXFP8"}}
        integration.ModelOptConfig(quant_algo="MIXED_PRECISION", quantized_layers=layers)
    for layers in ({"a": "NVFP4"}, {"a": {}}, {"a": {"quant_algo": ["NVFP4"]}}, ["a"]):
        with pytest.raises(ValueError, match="quantized_layers: got no quant_algo of a module"):
            integration.ModelOptConfig(quant_algo="MIXED_PRECISION", quantized_layers=layers)


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_map_changes_nothing(folders, pairs, device_map):
    pytest.importorskip("accelerate")
    model, ids = load(folders["source"], device_map=device_map), tokens(1, 40)
    assert relative_error(model(input_ids=ids.to(model.device)).logits, pairs["source"][1](ids)) < 1e-5


@pytest.fixture
def hopper(monkeypatch):
    """As if the CPU had kernels for prepared weights."""
    monkeypatch.setattr(integration, "prepares", lambda device: True)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def nvfp4_modules(model) -> dict:
    return {n: m for n, m in model.named_modules() if isinstance(m, integration._NVFP4Module)}


@torch.no_grad()
@pytest.mark.parametrize("device_map", [None, "cpu"])
def test_weights_laid_out_for_a_gpus_kernels_compute_the_same_bits(folders, monkeypatch, device_map):
    if device_map:
        pytest.importorskip("accelerate")
    plain, ids = load(folders["linears"], torch.bfloat16, device_map=device_map), tokens(1, 40)
    monkeypatch.setattr(integration, "prepares", lambda device: True)
    model = load(folders["linears"], torch.bfloat16, device_map=device_map)
    assert {m._is_prepared() for m in nvfp4_modules(plain).values()} == {False}
    assert {m._is_prepared() for m in nvfp4_modules(model).values()} == {True}
    assert {type(m).__name__ for m in nvfp4_modules(model).values()} == {"NVFP4Linear", "NVFP4RoutedExperts"}
    assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert {m._is_prepared() for m in nvfp4_modules(load(folders["linears"])).values()} == {False}  # in f32


def test_state_dicts_hold_the_checkpoints_layout_whatever_lies_in_memory(folders, hopper, tmp_path):
    model, plain = load(folders["linears"], torch.bfloat16), load(folders["linears"])
    stored, wanted = model.state_dict(), plain.state_dict()
    assert stored.keys() == wanted.keys()
    mine = {f"{n}.{part}" for n, m in nvfp4_modules(model).items() for part, _ in m.named_buffers()}
    assert len(mine) > 60 and all(torch.equal(as_bytes(stored[n]), as_bytes(wanted[n])) for n in mine)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)
    (experts, *_) = (m for m in nvfp4_modules(model).values() if isinstance(m, integration.NVFP4RoutedExperts))
    before, codes = experts.gate_up_proj.clone(), experts.state_dict()
    experts.load_state_dict({n: t.clone().zero_() if n == "gate_up_proj" else t for n, t in codes.items()})
    assert experts._is_prepared() and not experts.gate_up_proj.any()
    experts.load_state_dict(codes)
    assert experts._is_prepared() and torch.equal(experts.gate_up_proj, before)


def test_weights_follow_the_device_they_are_moved_to(folders, monkeypatch):
    model, plain = load(folders["source"], torch.bfloat16), load(folders["source"], torch.bfloat16)
    for ready in (True, False):
        monkeypatch.setattr(integration, "prepares", lambda device, ready=ready: ready)
        model.to("cpu")
        assert {m._is_prepared() for m in nvfp4_modules(model).values()} == {ready}
    for (name, got), wanted in zip(model.named_buffers(), plain.buffers()):
        assert torch.equal(as_bytes(got), as_bytes(wanted)), name


def test_a_negative_block_scale_is_named_by_its_module(folders, hopper, tmp_path):
    def change(tensors):
        tensors[f"{EXPERTS}down_proj.weight_scale"].view(torch.uint8)[0, 0, 0] |= 0x80

    with pytest.raises(ValueError, match=r"layers\.4\.mlp\.experts: weight\.scales: got a negative"):
        load(rewrite(folders["source"], tmp_path / "out", change), torch.bfloat16)


def test_saving_is_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match="not serializable"):
        pairs["source"][0].save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["transformers", "transformers.models.step3p7", "transformers.core_model_loading"])
def test_missing_or_old_transformers_is_one_line(module):
    code = f"import sys\nsys.modules[{module!r}] = None\nimport step_kernels.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ImportError: step_kernels.integrations.transformers: wanted transformers >= 5.17, got: ")
    assert module in line


@torch.no_grad()
def test_a_dense_checkpoint_is_loaded_as_before():
    """Importing the module changes nothing for checkpoints that name no quantization."""
    model = load(BUNDLED)
    assert type(model) is Step3p7ForConditionalGeneration
    ids = tokens(1, 60)
    assert (
        relative_error(model(input_ids=ids).logits, Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)(ids)) < 1e-5
    )


@pytest.mark.gpu
@torch.no_grad()
@CASES
@pytest.mark.parametrize("folder", ["source", "linears", "fp8"])
def test_gpu_errs_in_bfloat16_no_more_than_twice_as_much_as_the_cpu(folders, pairs, folder, crops):
    ids, images, _ = prompt(crops)
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in images.items()}
    wanted = pairs[folder][0](input_ids=ids, **images).logits
    cpu = load(folders[folder], torch.bfloat16)(input_ids=ids, **images).logits
    model = load(folders[folder], torch.bfloat16).cuda()
    ready = {m._is_prepared() for m in nvfp4_modules(model).values()}
    assert ready == {integration.prepares(torch.device("cuda", 0))}
    out = model(input_ids=ids.cuda(), **moved).logits
    got, allowed = typical_error(out, wanted), 2 * typical_error(cpu, wanted)
    assert out.isfinite().all()
    assert got <= allowed, f"relative error {got:.3e}, allowed {allowed:.3e}"
    options = dict(max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=1)
    new = model.generate(ids.cuda(), **options, **moved)[0, 120:]
    # the best token but for a near tie: within two of bf16's steps there, 8 bits below the power of two above
    best = out[0, -1].max().item()
    assert best - out[0, -1, new[0]].item() <= 2 * 2.0 ** (math.frexp(best)[1] - 8)
    assert new.tolist() == model.generate(ids.cuda(), **options, **moved)[0, 120:].tolist()
    assert len(new) == 24


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
def test_gpu_loads_directly(folders, pairs, device_map):
    pytest.importorskip("accelerate")
    model, ids = load(folders["source"], device_map=device_map), tokens(1, 60)
    held = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert held == {"cuda"}
    # CPU and GPU sum in other orders, and the GPU's f32 products may use other tilings: 1e-4, not 1e-5
    error = relative_error(model(input_ids=ids.cuda()).logits, pairs["source"][1](ids))
    assert error < 1e-4, f"relative error {error:.3e}"
