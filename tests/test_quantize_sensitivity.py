"""The mixed recipe's precisions: damages are the model's own, and no choice within the bits does much less."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from small_checkpoint import contents, read
from test_model import tokens
from test_quantize_resume import Killed, killed_at

from bench.mixed import main, rivals
from quantize import Settings, UsageError, run
from quantize.charts import precisions
from quantize.figures import Figures
from quantize.layout import is_expert, layer_number, weight_groups
from quantize.plan import make_plan
from quantize.sensitivity import choose, measure, mixed, more_bits
from step_kernels import nvfp4
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.model.attention import WholeSequences
from step_kernels.model.checkpoint import Checkpoint
from step_kernels.model.formats import fp8_channels

CONFIG, CPU, IDS = StepConfig.read(BUNDLED), torch.device("cpu"), tokens(2, 96)
GROUPS = [
    group
    for group in weight_groups(CONFIG)
    if not is_expert(group[0]) and (layer_number(group[0]) or 0) < CONFIG.num_layers
]


@pytest.fixture(scope="module")
def damages():
    return measure(Checkpoint(BUNDLED), CONFIG, GROUPS, IDS, CPU, "mse")


def random_options(generator: torch.Generator) -> dict:
    """Six groups; now and then more bits do more damage."""
    sizes = (torch.rand(6, generator=generator) * 100 + 1).tolist()
    harm = (torch.rand(6, 2, generator=generator) ** 4).tolist()
    return {
        str(i): {"nvfp4": (4.5 * n, a), "fp8": (8.1 * n, b / 5), "source": (16 * n, 0.0)}
        for i, (n, (a, b)) in enumerate(zip(sizes, harm))
    }


def test_the_least_damage_within_the_bits_is_found_but_for_less_than_one_step():
    generator, exact = torch.Generator().manual_seed(0), 0
    for _ in range(60):
        options = random_options(generator)
        least, most = (sum(points[p][0] for points in options.values()) for p in ("nvfp4", "source"))
        budget = least + float(torch.rand((), generator=generator)) * (most - least)

        def sums(precisions, options=options) -> tuple[float, float]:
            return tuple(map(sum, zip(*(options[group][p] for group, p in zip(options, precisions)))))

        every = (sums(precisions) for precisions in itertools.product(("nvfp4", "fp8", "source"), repeat=6))
        best = min(damage for bits, damage in every if bits <= budget)
        bits, damage = sums(choose(options, budget).values())
        assert bits <= budget and damage < best + max(points["nvfp4"][1] for points in options.values())
        exact += damage < best + 1e-12
    assert exact >= 30


@pytest.mark.parametrize("precision", ["nvfp4", "source"])
def test_bits_for_one_precision_of_all_groups_give_it_to_all(precision):
    options = random_options(torch.Generator().manual_seed(1))
    budget = sum(points[precision][0] for points in options.values())
    assert set(choose(options, budget).values()) == {precision}


def test_a_precision_that_harms_more_than_a_smaller_one_is_never_chosen():
    options = {"a": {"nvfp4": (45.0, 0.1), "fp8": (80.0, 0.2), "source": (160.0, 0.0)}}
    assert choose(options, 100.0) == {"a": "nvfp4"}
    assert choose(options, 160.0) == {"a": "source"}


@torch.inference_mode()
@pytest.mark.parametrize("layer", [1, 4])  # dense, routed
def test_damage_is_the_relative_change_of_the_stream_behind_the_layer(layer, damages):
    model = Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)
    context, x, addends = WholeSequences(*IDS.shape, CPU), model.embed(IDS).flatten(0, 1), ()
    for before in model.layers[:layer]:
        x, addends = before(x, addends, context)
    changed = model.layers[layer]

    def behind() -> torch.Tensor:
        out, more = changed(x, addends, context)
        return sum(more, out)

    plain = behind()
    weight = changed.attention.o
    scale = nvfp4.global_scale(weight.abs().amax(), "mse")
    codes, blocks = nvfp4.quantize(weight, scale, nvfp4.search_scales(weight, scale, "mse"))
    found = damages[f"model.layers.{layer}.self_attn.o_proj.weight"]
    for precision, decoded in (
        ("nvfp4", nvfp4.dequantize(codes, blocks, scale)),
        ("fp8", fp8_channels(weight).dequantize()),
    ):
        changed.attention.o = decoded
        wanted = ((behind() - plain).square().sum(-1) / plain.square().sum(-1)).mean().item()
        assert found[precision] == pytest.approx(wanted, rel=1e-3)
    assert found["source"] == 0 and found["nvfp4"] > 2 * found["fp8"] > 0


@torch.inference_mode()
def test_lm_heads_damage_is_the_noise_that_makes_the_same_divergence(damages):
    model = Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)
    hidden = model.trunk(model.embed(IDS).flatten(0, 1), WholeSequences(*IDS.shape, CPU))
    plain, found = model.logits(hidden).log_softmax(-1), damages["lm_head.weight"]

    def divergence(hidden: torch.Tensor) -> float:
        return float((plain.exp() * (plain - model.logits(hidden).log_softmax(-1))).sum(-1).mean())

    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    noise *= hidden.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    alike = divergence(hidden + found["fp8"] ** 0.5 * noise)
    model.lm_head = fp8_channels(model.lm_head).dequantize()
    assert divergence(hidden) == pytest.approx(alike, rel=0.4)  # six tokens are read as logits


@pytest.fixture(scope="module")
def ids(tmp_path_factory):
    file = tmp_path_factory.mktemp("calibration") / "ids.npy"
    np.save(file, IDS.numpy())
    return file


def mix(ids, bits: float, **options) -> Settings:
    return Settings(recipe="mixed", bits=bits, calibration=ids, search="max", **options)


def test_a_budget_in_bits_a_weight_is_kept_and_used(damages, ids):
    harm = []
    for bits in (4.5, 5.0, 5.5, 16.0):
        plan = mixed(make_plan(Checkpoint(BUNDLED), mix(ids, bits, lm_head=True, mtp=True)), CPU, damages=damages)
        stored = count = 0
        for group in weight_groups(CONFIG):
            precision = plan.precisions[group[0]]
            if group[0] in damages or is_expert(group[0]):
                for n, *shape in (plan.checkpoint.entry(name).shape for name in group):
                    per_weight = {"nvfp4": 4.5, "fp8": 8 + 32 / shape[-1], "source": 16}[precision]
                    stored, count = stored + per_weight * n * math.prod(shape), count + n * math.prod(shape)
            else:  # of MTP layers, which no token reaches
                assert precision == "nvfp4"
        assert stored / count <= bits and (bits == 16.0 or stored / count > bits - 0.05)
        harm.append(sum(damages[group][plan.precisions[group]] for group in damages))
    assert harm == sorted(harm, reverse=True) and harm[-1] == 0


def test_a_result_has_the_measured_choice_and_a_resumed_run_does_not_measure_again(ids, tmp_path, monkeypatch):
    settings, wanted = mix(ids, 5.0), mixed(make_plan(Checkpoint(BUNDLED), mix(ids, 5.0)), CPU)
    assert run(BUNDLED, tmp_path / "whole", settings).problems == []
    out = read(tmp_path / "whole")
    dtypes = {"nvfp4": torch.uint8, "fp8": torch.float8_e4m3fn, "source": torch.bfloat16}
    for group in weight_groups(CONFIG):
        assert {out[name].dtype for name in group} == {dtypes[wanted.precisions[group[0]]]}
    assert {wanted.precisions[group] for group in wanted.damages} >= {"nvfp4", "fp8"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, "replace", 3)
        run(BUNDLED, tmp_path / "stopped", settings)
    monkeypatch.setattr("quantize.sensitivity.measure", None)
    assert run(BUNDLED, tmp_path / "stopped", settings, resume=True).problems == []
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    with pytest.raises(TypeError):
        run(BUNDLED, tmp_path / "new", settings)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"recipe": "mixed", "calibration": "x"},
            "bits: got None with recipe mixed, wanted a number with recipe mixed alone",
        ),
        ({"bits": 4.6}, "bits: got 4.6 with recipe experts, wanted a number with recipe mixed alone"),
        ({"recipe": "mixed", "bits": 4.6}, "recipe: mixed measures what precisions cost, wanted calibration data"),
        ({"recipe": "mixed", "bits": 4.4, "calibration": "x"}, "bits: got 4.4, wanted at least 4.5"),
        ({"recipe": "mixed", "bits": math.nan, "calibration": "x"}, "bits: got nan, wanted at least 4.5"),
        ({"recipe": "mixed", "bits": 4.6, "calibration": "x", "rest": "fp8"}, "rest: got fp8 with recipe mixed"),
    ],
)
def test_a_mixed_recipe_needs_bits_that_suffice_and_data_to_measure_with(options, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        Settings(**options)


def test_the_report_adds_up_what_was_chosen_and_what_else_could_have_been(damages):
    pytest.importorskip("matplotlib")
    chosen = {group: ("nvfp4", "fp8", "source")[i % 3] for i, group in enumerate(damages)}
    text = precisions(Figures(precisions=chosen, damages=damages))
    for how in (chosen, dict.fromkeys(damages, "nvfp4"), dict.fromkeys(damages, "fp8")):
        assert f"{sum(damages[group][precision] for group, precision in how.items()):.2e}" in text
    assert precisions(Figures(precisions=chosen)) == ""


def test_precisions_at_random_fill_the_room_that_the_measured_ones_have(damages):
    options, weights = more_bits(make_plan(Checkpoint(BUNDLED), Settings("linears")))
    room = 0.4 * weights
    for name, chosen in rivals({leader: damages[leader] for leader in options}, options, room).items():
        more = sum(options[leader][precision] for leader, precision in chosen.items())
        if "random" in name:
            left = [options[leader]["fp8"] for leader, precision in chosen.items() if precision == "nvfp4"]
            assert more <= room < more + min(left)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--documents", "-3"], "--documents: got -3, wanted at least 1"),
        (["nowhere.txt"], "nowhere.txt: not readable"),
    ],
)
def test_unusable_arguments_of_the_bench_are_one_line(capsys, arguments, message):
    try:
        status = main(arguments)
    except SystemExit as stop:
        status = stop.code
    text = capsys.readouterr().err
    assert status and text.startswith(f"error: {message}") and text.count("\n") == 1
