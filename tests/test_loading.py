"""Loading: threads that read ahead give the bytes that reading in turn gives, and stop when anything fails; copies in
the kernels' layout; and synthetic weights."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import BUNDLED, CONFIG, EXPERTS, bundled, quantized, write

from bench.release import released_config
from quantize import Settings, run
from quantize.layout import expert_shapes, tensor_shapes
from step_kernels import nvfp4
from step_kernels.model import CheckpointError, Step3p7, formats, loading, prepared_copy, weights
from step_kernels.model.checkpoint import Checkpoint, pieces, read_piece
from step_kernels.model.formats import DenseExperts, FP8Channels
from step_kernels.model.loading import Opened, ReadAhead
from step_kernels.model.memory import Tapped, tally
from step_kernels.model.prepared_copy import FILE, METADATA
from step_kernels.model.synthetic import RandomWeights, zipf_bias
from step_kernels.model.weights import Weights
from step_kernels.nvfp4 import NVFP4Experts, NVFP4Weight
from step_kernels.ops import moe_topk
from step_kernels.prepare import main
from step_kernels.prepared import PreparedWeight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The bundled model, every second expert stack's neighbours apart in the file, with NVFP4 experts and linears."""
    linears = [n for n in bundled() if n.endswith("o_proj.weight") and n.startswith("model.layers.")]
    return write(tmp_path_factory.mktemp("loading") / "packed", quantized(bundled(), [*EXPERTS, *linears])[0])


@pytest.fixture
def small(monkeypatch):
    """Pieces of 50,000 bytes in three buffers: the bundled model is some three hundred."""
    monkeypatch.setattr(weights, "PIECE", 50_000)
    monkeypatch.setattr(loading, "PIECE", 50_000)
    monkeypatch.setattr(loading, "BUFFERS", 3)
    monkeypatch.setattr(weights, "_AT_ONCE", 200_000)


def flat(name, value):
    """(name, bytes) of each tensor in a parameter."""
    if isinstance(value, torch.Tensor):
        return {
            name: (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        }
    found = {}
    for field in dataclasses.fields(value):
        part = getattr(value, field.name)
        is_data = isinstance(part, torch.Tensor) or dataclasses.is_dataclass(part)
        found |= flat(f"{name}/{field.name}", part) if is_data else {f"{name}/{field.name}": part}
    return found


def parameters(source, config, depths):
    """Every tensor that the model's modules were given."""
    found = {}

    def tap(name, value):
        found.update(flat(name, value))
        return value

    Step3p7(config, Tapped(source, tap), depths)
    return found


def loaded(folder, device=CPU, dtype=torch.bfloat16, fp8=False):
    opened = Opened(Step3p7, folder, dtype, fp8)
    with opened.weights(device) as source:
        return parameters(source, opened.config, opened.depths)


def reading_threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("checkpoint")]


@pytest.mark.parametrize("fp8", [False, True])
def test_reading_ahead_gives_the_bytes_of_reading_in_turn(packed, small, fp8):
    checkpoint = Checkpoint(packed)
    in_turn = parameters(Weights(checkpoint, CPU, torch.bfloat16, fp8=fp8), CONFIG, CONFIG.num_mtp)
    assert loaded(packed, fp8=fp8) == in_turn and len(in_turn) > 250


def test_what_is_loaded_is_what_the_file_holds(packed, small):
    found, stored = loaded(packed), load_file(packed / "model.safetensors")
    for name in ("model.embed_tokens.weight", "vision_model.conv1.weight", "model.layers.10.eh_proj.weight"):
        assert found[name] == flat(name, stored[name])[name]
    name = "model.layers.5.moe"
    gate, up = (stored[f"{name}.{p}_proj.weight"] for p in ("gate", "up"))
    assert found[f"{name}/gate_up/codes"] == flat("", torch.cat((gate, up), 1))[""]
    name = "model.layers.2.self_attn.o_proj.weight"
    assert found[f"{name}/codes"] == flat("", stored[name])[""]
    assert found[f"{name}/scales"] == flat("", stored[f"{name}_scale"])[""]


def test_no_more_than_the_buffers_is_read_ahead(packed, small, monkeypatch):
    asked, ahead, lock = [0], [], threading.Lock()
    read = [0]

    def spy(piece, out=None):
        with lock:
            read[0] += piece.end - piece.begin
            ahead.append(read[0] - asked[0])
        return read_piece(piece, out)

    fetch = ReadAhead.fetch

    def asking(self, piece):
        with lock:
            asked[0] += piece.end - piece.begin
        return fetch(self, piece)

    monkeypatch.setattr(loading, "read_piece", spy)
    monkeypatch.setattr(ReadAhead, "fetch", asking)
    loaded(packed)
    assert read[0] == asked[0] > 50 * 50_000
    assert 50_000 < max(ahead) <= 3 * 50_000


def test_pieces_cover_a_tensor_and_rows_of_it_without_overlap():
    entry = Checkpoint(BUNDLED).entry("model.embed_tokens.weight")
    row = CONFIG.hidden_size * 2
    for rows, begin, end in ((None, entry.begin, entry.end), ((3, 90), entry.begin + 3 * row, entry.begin + 90 * row)):
        found = pieces(entry, 10_000, rows)
        assert [p.begin for p in found] == list(range(begin, end, 10_000))
        assert [p.end for p in found[:-1]] == [p.begin for p in found[1:]] and found[-1].end == end
    assert pieces(entry, 10, (4, 4)) == []


def test_a_piece_out_of_turn_is_read_on_the_spot(tmp_path):
    save_file({"w": torch.arange(100, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    (tmp_path / "config.json").write_text("{}")
    first, second, third = pieces(Checkpoint(tmp_path).entry("w"), 40)
    with ReadAhead([first, second, third], CPU) as ahead:
        assert [int(ahead.fetch(p)[0]) for p in (third, first, third, second)] == [80, 0, 80, 40]
        assert ahead.fetch(third).tolist() == list(range(80, 100))
        assert int(ahead.fetch(first)[0]) == 0  # after the end too


def test_a_file_cut_off_while_it_is_read_is_named_and_no_thread_stays(packed, small, tmp_path):
    folder = write(tmp_path / "m", load_file(packed / "model.safetensors"))
    opened = Opened(Step3p7, folder, torch.bfloat16)
    file = folder / "model.safetensors"
    inside = [
        e for e in opened.checkpoint.entries.values() if e.begin > file.stat().st_size // 2 and e.end > e.begin + 9
    ]
    cut = min(inside, key=lambda e: e.begin)
    os.truncate(file, cut.begin + 1)
    with pytest.raises(CheckpointError, match="model.safetensors: .*: the file ends early") as error:
        with opened.weights(CPU) as source:
            Step3p7(opened.config, source, opened.depths)
    lost = {e.stored_name for e in opened.checkpoint.entries.values() if e.end > cut.begin + 1}
    assert str(error.value).split(": ")[1] in lost and reading_threads() == []


def test_an_interrupt_ends_the_readers_within_their_piece(packed, small, monkeypatch):
    read, lock = [], threading.Lock()

    def slow(piece, out=None):
        time.sleep(0.02)
        with lock:
            read.append(piece)
        return read_piece(piece, out)

    monkeypatch.setattr(loading, "read_piece", slow)
    opened, seen = Opened(Step3p7, packed, torch.bfloat16), []

    def interrupt(name, value):
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return value

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        with opened.weights(CPU) as source:
            Step3p7(opened.config, Tapped(source, interrupt), opened.depths)
    assert reading_threads() == [] and time.monotonic() - start < 2
    assert len(read) < len(opened.pieces) / 4


def test_what_is_missing_or_misshapen_or_left_over_is_told_before_a_byte_is_read(packed, tmp_path, monkeypatch):
    tensors = load_file(packed / "model.safetensors")
    for module in (loading, weights):
        monkeypatch.setattr(module, "read_piece", lambda *a: pytest.fail("bytes were read"))
    lost = "vision_model.vit_downsampler2.bias"  # the last but one to be asked for
    for change, message in (
        ({lost: None}, f"tensor {lost} is missing"),
        ({lost: torch.zeros(3)}, f"{lost}: got float32 .3., wanted"),
        ({"more": torch.zeros(1)}, "more: 1 tensors have no place in the model"),
    ):
        folder = write(tmp_path / message[:9], {n: t for n, t in (tensors | change).items() if t is not None})
        with pytest.raises(CheckpointError, match=message):
            Step3p7.from_pretrained(folder, "cpu")


# Prepared copies: Hopper's layout is plain torch too, so that the CPU can stand in for the GPU.


@pytest.fixture
def hopper(monkeypatch):
    for module in (formats, prepared_copy):
        monkeypatch.setattr(module, "prepares", lambda device: device.type == "cpu")


@pytest.fixture
def copied(packed, hopper, tmp_path):
    Step3p7.save_prepared(packed, tmp_path / "copy", "cpu")
    return tmp_path / "copy"


@pytest.mark.parametrize("fp8", [False, True])
def test_a_prepared_copy_loads_to_the_bytes_that_preparing_gives(packed, hopper, tmp_path, monkeypatch, fp8):
    Step3p7.save_prepared(packed, tmp_path / "copy", "cpu", fp8=fp8)
    wanted = loaded(packed, fp8=fp8)
    assert any(type(v) is torch.Size for v in wanted.values())  # it has prepared weights
    monkeypatch.setattr(formats, "nvfp4_prepare", lambda weight: pytest.fail("prepared again"))
    monkeypatch.setattr(weights, "fp8_channels", lambda weight: pytest.fail("made FP8 again"))
    assert loaded(tmp_path / "copy") == wanted


def test_fp8_of_a_checkpoint_is_planned_loaded_and_copied_as_it_is(hopper, tmp_path, monkeypatch):
    assert run("bundled", tmp_path / "fp8", Settings(rest="fp8", lm_head=True)).problems == []
    monkeypatch.setattr(weights, "fp8_channels", lambda weight: pytest.fail("made FP8 again"))
    opened = Opened(Step3p7, tmp_path / "fp8", torch.bfloat16)
    vocab, hidden = opened.config.vocab_size, opened.config.hidden_size
    assert opened.plan().weights["lm_head"] == vocab * hidden + 4 * vocab
    wanted, stored = loaded(tmp_path / "fp8"), Checkpoint(tmp_path / "fp8")
    name = "model.layers.2.self_attn.o_proj.weight"
    for part, tensor in (("codes", name), ("scale", f"{name}_scale")):
        assert flat(f"{name}/{part}", stored.read(tensor)).items() <= wanted.items()
    Step3p7.save_prepared(tmp_path / "fp8", tmp_path / "copy", "cpu")
    assert loaded(tmp_path / "copy") == wanted


def test_a_prepared_copy_is_one_safetensors_file_and_what_lay_beside(packed, copied):
    tensors = load_file(copied / FILE)
    assert tensors["model.layers.3.moe.gate_up_proj.codes"].shape == (32, 2, 3, 2048)
    assert sorted(f.name for f in copied.iterdir()) == ["config.json", FILE]
    assert Checkpoint(copied).metadata == {FILE: METADATA}
    assert Step3p7.plan(copied).weights == Step3p7.plan(packed).weights


def relabelled(copy, **metadata):
    """The copy with its header's metadata changed in place."""
    file = copy / FILE
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] |= metadata
    data[8 : 8 + length] = json.dumps(header).encode().ljust(length)
    file.write_bytes(data)
    return copy


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"step_kernels.prepared": "2"}, "got step_kernels.prepared 2, wanted 1: prepare the original again"),
        ({"step_kernels.layout": "sm_100"}, "got step_kernels.layout sm_100, wanted sm_90: prepare the original again"),
    ],
)
def test_a_copy_of_another_version_or_layout_is_refused(copied, metadata, message):
    with pytest.raises(CheckpointError) as error:
        Step3p7.from_pretrained(relabelled(copied, **metadata), "cpu")
    assert str(error.value) == f"{copied / FILE}: {message}"


def test_a_copy_is_refused_where_kernels_want_another_layout(copied, monkeypatch):
    with pytest.raises(CheckpointError, match="prepared for bfloat16 on sm_90, got float32 on cpu: load the original"):
        Step3p7.from_pretrained(copied, "cpu", torch.float32)
    monkeypatch.setattr(prepared_copy, "prepares", lambda device: False)
    with pytest.raises(CheckpointError, match="prepared for bfloat16 on sm_90, got bfloat16 on cpu: load the original"):
        Step3p7.from_pretrained(copied, "cpu")


def test_a_copy_that_fails_midway_leaves_nothing_behind(packed, hopper, tmp_path, monkeypatch):
    write_one, written = prepared_copy.Copy._write, []

    def fail(self, name, tensor):
        written.append(name)
        if len(written) == 40:
            raise OSError(28, "No space left on device")
        return write_one(self, name, tensor)

    monkeypatch.setattr(prepared_copy.Copy, "_write", fail)
    with pytest.raises(OSError, match="No space left"):
        Step3p7.save_prepared(packed, tmp_path / "copy", "cpu")
    assert list(tmp_path.iterdir()) == [] and reading_threads() == []


def test_prepare_command_errors_are_one_line(packed, tmp_path, hopper, capsys):
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([packed, tmp_path / "there"], f"{tmp_path / 'there'}: is there already, wanted a folder to be made"),
        ([tmp_path / "nowhere", tmp_path / "out"], "nowhere: not a folder"),
        ([BUNDLED, tmp_path / "out"], "model.layers.3.moe: got DenseExperts, wanted experts in NVFP4"),
    ):
        assert main([*map(str, arguments), "--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert main([str(packed), str(tmp_path / "out"), "--device", "cuda:99"]) == 1
    assert "device: got cuda:99" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["there"]


def test_preparing_for_a_device_whose_kernels_take_checkpoints_is_refused(packed, tmp_path):
    with pytest.raises(ValueError, match="device: got cpu, wanted a Hopper GPU, and cuda-bindings installed"):
        Step3p7.save_prepared(packed, tmp_path / "copy", "cpu")


# Synthetic weights


def random_kinds(**options):
    kinds = {}

    def see(name, value):
        kinds[name] = type(value), tuple(value.shape) if hasattr(value, "shape") else ()
        return value

    source = RandomWeights(CPU, torch.bfloat16, config=CONFIG, **options)
    Step3p7(CONFIG, Tapped(source, see), CONFIG.num_mtp)
    return kinds


def test_recipes_quantize_what_they_say_in_the_models_shapes():
    shapes = tensor_shapes(CONFIG)
    linears = {n for n in shapes if n.endswith(("_proj.weight", ".output.weight", "lm_head.weight"))}
    linears = {n for n in linears if n.startswith(("model.", "lm_head"))}
    trunk = {n for n in linears if not n.startswith(("lm_head", *(f"model.layers.{i}." for i in (8, 9, 10))))}
    for options, kind, wanted in (
        ({}, NVFP4Weight, set()),
        ({"recipe": "linears"}, NVFP4Weight, {n for n in trunk if "g_proj" not in n}),
        (
            {"recipe": "linears", "lm_head": True},
            NVFP4Weight,
            {n for n in trunk if "g_proj" not in n} | {"lm_head.weight"},
        ),
        ({"recipe": "fp8"}, FP8Channels, linears),
    ):
        kinds = random_kinds(**options)
        assert {n for n, (k, _) in kinds.items() if k is kind} == wanted, options
        assert {n: shape for n, (_, shape) in kinds.items() if n in shapes} == shapes
        assert all(kinds[f"model.layers.{i}.moe"][0] is NVFP4Experts for i in range(3, 8))
    assert random_kinds(nvfp4=False)["model.layers.3.moe"][0] is DenseExperts


def test_random_experts_are_as_large_as_gaussian_weights_and_differ():
    experts = RandomWeights(CPU, torch.float32).experts("", 40, 64, 512)  # more than are made at once
    gate_up, down = (w.dequantize() for w in (experts.gate_up, experts.down))
    assert gate_up.shape == (40, 128, 512) and down.shape == (40, 512, 64)
    assert gate_up.square().mean((1, 2)).mul(512).sqrt().tolist() == pytest.approx([1] * 40, abs=0.05)
    assert down.square().mean((1, 2)).mul(64).sqrt().tolist() == pytest.approx([1] * 40, abs=0.05)
    assert len({w.codes[e].numpy().tobytes() for w in (experts.gate_up,) for e in range(40)}) == 40
    codes = nvfp4.unpack(experts.down.codes).flatten().bincount(minlength=16) / experts.down.codes.numel() / 2
    assert codes.tolist() == pytest.approx([1 / 16] * 16, abs=0.002)


def popularity(bias, tokens=20_000):
    logits = torch.randn(tokens, len(bias), generator=torch.Generator().manual_seed(0))
    _, ids = moe_topk(logits, bias, 8, 3.0)
    return ids.flatten().long().bincount(minlength=len(bias)) / tokens


def test_zipf_routers_choose_the_rth_expert_a_share_of_one_in_r():
    share = popularity(zipf_bias(288, 8))
    assert share[0] == pytest.approx(0.95, abs=0.02)
    for rank in (2, 4, 8, 16, 32, 64, 128):
        near = torch.arange(rank, rank + rank // 8 + 1)
        # 0.95 + 1.345 * (1/2 + ... + 1/288) = 8
        assert share[near - 1].mean().item() == pytest.approx((1.345 / near).mean().item(), rel=0.15), rank


def test_balanced_routers_have_no_bias_and_zipf_ones_a_shuffled_bias_a_layer():
    config = released_config(6)
    balanced, zipf = (RandomWeights(CPU, torch.bfloat16, config=config, router=r) for r in ("balanced", "zipf"))
    assert not balanced.tensor("model.layers.3.moe.router_bias", (288,), keep=True).any()
    first, second = (zipf.tensor(f"model.layers.{i}.moe.router_bias", (288,), keep=True) for i in (3, 4))
    assert first.dtype == torch.float32 and not first.equal(second)
    assert first.sort().values.equal(second.sort().values) and first.sort().values.equal(
        zipf_bias(288, 8).sort().values
    )
    share = popularity(torch.zeros(288))
    assert share.min() > 0.8 * 8 / 288 and share.max() < 1.2 * 8 / 288


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "all"}, "recipe: got 'all', wanted one of experts, linears, fp8"),
        ({"router": "flat"}, "router: got 'flat', wanted one of balanced, zipf"),
        ({"lm_head": True}, "lm_head: got it with recipe experts, wanted recipe linears"),
    ],
)
def test_unknown_recipes_and_routers_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        Step3p7.random(CONFIG, "cpu", **options)
    assert str(error.value) == message


# On the GPU, at the released widths


def two_layers():
    """Two MoE layers, one full and one sliding, at the released widths; a small vocabulary and no vision."""
    config = released_config(4)
    layers = tuple(dataclasses.replace(layer, moe=True) for layer in config.layers[:2])
    return dataclasses.replace(config, num_layers=2, num_mtp=0, layers=layers, vocab_size=4096, vision=None)


def write_checkpoint(folder, config):
    """A synthetic NVFP4 checkpoint, a file a layer."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files, generator = {}, torch.Generator("cuda").manual_seed(0)

    def put(name, tensor):
        layer = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        files.setdefault(layer, {})[name] = tensor.cpu()

    for name, shape in tensor_shapes(config).items():
        keep = torch.float32 if name.endswith("router_bias") else torch.bfloat16
        put(name, torch.empty(shape, device="cuda", dtype=keep).normal_(0, 0.02, generator=generator))
    for name, (experts, n, k) in expert_shapes(config).items():
        codes = torch.empty(experts, n, k // 2, dtype=torch.uint8, device="cuda")
        put(name, codes.random_(0, 256, generator=generator))
        scales = torch.empty(experts, n, k // 16, dtype=torch.uint8, device="cuda").random_(
            0x30, 0x40, generator=generator
        )
        put(f"{name}_scale", scales.view(torch.float8_e4m3fn))
        put(f"{name}_scale_2", torch.rand(experts, device="cuda", generator=generator) + 0.5)
    for layer, tensors in files.items():
        save_file(tensors, folder / f"{layer}.safetensors")
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "m", two_layers())


def peak_beyond(make):
    """What make() gives, its bytes on the device, and the peak of the device's memory beyond those."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    made = make()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before[0]
    return made, held, torch.cuda.max_memory_reserved() - before[1] - held


@pytest.fixture
def with_config(monkeypatch):
    config = two_layers()
    monkeypatch.setattr(loading.StepConfig, "from_dict", lambda data, source: config)


@pytest.mark.gpu
def test_loading_peaks_at_most_1_gb_above_the_model(wide, with_config):
    plan = Step3p7.plan(wide, context=2048)
    model, held, beyond = peak_beyond(lambda: Step3p7.from_pretrained(wide))
    print(f"held {held / 1e9:.3f} GB, planned {sum(plan.weights.values()) / 1e9:.3f}, peak beyond {beyond / 1e9:.3f}")
    assert isinstance(model.layers[0].ffn.experts.gate_up, PreparedWeight)
    assert 0 <= held - sum(plan.weights.values()) < 20_000_000
    assert beyond < 1_000_000_000


@pytest.mark.gpu
def test_loading_on_the_gpu_gives_what_preparing_a_layer_at_once_gives(wide, with_config):
    import step_kernels as sk

    found, stored = {}, load_file(wide / "1.safetensors", device="cuda")

    def keep(name, value):
        if name == "model.layers.1.moe" and value.gate_up.codes.is_cuda:
            found[name] = value
        return value

    opened = Opened(Step3p7, wide, torch.bfloat16)
    with opened.weights(torch.device("cuda")) as source:
        Step3p7(opened.config, Tapped(source, keep), opened.depths)

    def part(suffix, *names):
        tensors = [stored[f"model.layers.1.moe.{n}_proj.weight{suffix}"].view(torch.uint8) for n in names]
        return torch.cat(tensors, 1).view(torch.float8_e4m3fn if suffix else torch.uint8)

    outer = [stored[f"model.layers.1.moe.{n}_proj.weight_scale_2"] for n in ("gate", "up", "down")]
    gate_up = NVFP4Weight(part("", "gate", "up"), part("_scale", "gate", "up"), torch.stack(outer[:2], 1))
    wanted = sk.nvfp4_prepare(NVFP4Experts(gate_up, NVFP4Weight(part("", "down"), part("_scale", "down"), outer[2])))
    for name in ("codes", "scales", "global_scale"):
        for side in ("gate_up", "down"):
            got = getattr(getattr(found["model.layers.1.moe"], side), name)
            assert got.equal(getattr(getattr(wanted, side), name)), (side, name)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["experts", "linears", "fp8"])
def test_random_weights_of_real_widths_peak_at_most_1_gb_above_the_model(recipe):
    sizes, config = Counter(), two_layers()
    source = RandomWeights(torch.device("meta"), torch.bfloat16, config=config, recipe=recipe)
    Step3p7(config, Tapped(source, tally(config, sizes)), 0)
    model, held, beyond = peak_beyond(lambda: Step3p7.random(config, recipe=recipe))
    planned = sum(sizes.values())
    print(f"{recipe}: held {held / 1e9:.3f} GB, planned {planned / 1e9:.3f}, peak beyond {beyond / 1e9:.3f}")
    assert len(model.layers) == 2 and 0 <= held - planned < 20_000_000
    assert beyond < 1_000_000_000


@pytest.mark.gpu
def test_a_copy_prepared_on_the_gpu_loads_to_the_same_bytes(wide, with_config, tmp_path):
    Step3p7.save_prepared(wide, tmp_path / "copy")

    def digest(folder):
        found, opened = {}, Opened(Step3p7, folder, torch.bfloat16)

        def keep(name, value):
            if name.endswith(".moe"):
                for side in ("gate_up", "down"):
                    for part in ("codes", "scales", "global_scale"):
                        tensor = getattr(getattr(value, side), part)
                        total = tensor.view(torch.uint8).sum(dtype=torch.int64).item()
                        found[name, side, part] = total, tensor[::41].cpu().numpy().tobytes()
            return value

        with opened.weights(torch.device("cuda")) as source:
            Step3p7(opened.config, Tapped(source, keep), opened.depths)
        return found

    assert digest(tmp_path / "copy") == digest(wide)
