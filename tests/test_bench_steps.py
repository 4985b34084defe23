"""bench.steps: the bytes and FLOP that a step is held against, what rounds of drafts give, and that none runs out of
cache; on a GPU the start from a checkpoint."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from bench import e2e, steps
from bench.release import released_config
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, moe


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


def of(layers: int) -> SimpleNamespace:
    return SimpleNamespace(config=released_config(layers))


def test_a_token_reads_24576_bytes_of_the_full_layers_cache_a_position_and_a_window_of_the_sliding_ones():
    model = of(45)
    read = [steps.positions_bytes(model, length) for length in (1, 512, 513, 1000)]
    assert read == [45 * 2048, 512 * 45 * 2048, 512 * 45 * 2048 + 24576, 512 * 45 * 2048 + 488 * 24576]


def test_flops_of_a_prompt_equal_a_loop_over_its_tokens_and_pairs():
    config, total = released_config(5), 0
    for layer in config.layers[:5]:
        weights = 4096 * 128 * (2 * layer.heads + 2 * 8) + 4096 * layer.heads
        weights += 4096 * (3 * 1280 * 9 + 288) if layer.moe else 3 * 4096 * 11264
        for position in range(700):
            seen = min(position + 1, layer.window or 700)
            total += 2 * weights + 2 * 2 * seen * layer.heads * 128
    assert steps.prefill_flops(of(5), 700) == total


def test_a_modules_size_is_that_of_its_tensors_and_of_its_parts(model):
    attention = model.layers[0].attention
    wanted = sum(x.nbytes for x in vars(attention).values() if isinstance(x, torch.Tensor))
    wanted += sum(weight.nbytes for weight in attention.qkvg.weights)
    assert steps.size(attention) == wanted and steps.size([attention, attention]) == 2 * wanted


def test_experts_are_counted_once_a_layer_however_many_tokens_choose_them(model, monkeypatch):
    monkeypatch.setattr(moe, "routed_sum", lambda x, weights, ids, *rest: x)
    with steps.experts_counted() as counts:
        for ids in ([[3, 1], [1, 3], [7, 3]], [[0, 5]]):
            moe.routed_sum(torch.zeros(len(ids), 4), None, torch.tensor(ids))
    assert counts == [3, 2]


def test_rounds_are_repaid_by_as_many_drafts_as_they_take_steps_more():
    found = steps.gain(8, 3, step_ms=10.0, round_ms=20.0)
    assert found["steps"] == 2 and found["repaid_by"] == 1 and found["tokens_s"] == [400, 800, 1200, 1600]
    assert found["tokens_s"][1] == 8 / 10.0 * 1e3  # as plain steps


@pytest.mark.parametrize("all_kept", [False, True])
def test_rounds_stay_within_their_cache_even_if_every_draft_is_kept(model, monkeypatch, all_kept):
    made, caches, settled = [], steps.filled_cache, []

    class Decoder(steps.Decoder):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

        def step(self, requests, repeated):
            before = self.position.clone()
            super().step(requests, repeated)
            if all_kept:
                self.position[:-1] = before[:-1] + 4

    def filled(*arguments):
        settled.append(arguments)
        return caches(*arguments)

    monkeypatch.setattr(steps, "Decoder", Decoder)
    monkeypatch.setattr(steps, "filled_cache", filled)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert steps.round_of_drafts(model, 2, 70) > 0
    (_, batch, length, depths, room), *_ = settled
    assert (batch, length, depths) == (2, 70, 3)
    positions = made[0].position[:2]
    assert ((70 + 23 <= positions) & (positions + depths < 70 + room)).all() and len(made[0].drafts.layers) == 3


def test_a_table_of_drafts_has_the_plain_rate_and_one_for_each_number_of_drafts_kept(monkeypatch, capsys):
    monkeypatch.setattr(e2e, "round_of_drafts", lambda model, batch, length: 9.0 if batch == 1 else None)
    plain = {"1 x 1024": {"ms": 5.0}, "8 x 1024": {"ms": 9.3}}
    cases = e2e._drafts(SimpleNamespace(mtp=[None] * 3), plain)
    assert list(cases) == ["1 x 1024"] and cases["1 x 1024"]["repaid_by"] == pytest.approx(0.8)
    head, line = capsys.readouterr().out.splitlines()
    assert line.split() == ["1", "1024", "9.000", "1.80", "200", "111", "222", "333", "444", "0.80"]
    ends = [head.index(word) + len(word) for word in ("plain", "0 kept", "1 kept", "2 kept", "3 kept", "repaid by")]
    assert ends == [i for i, (a, b) in enumerate(itertools.pairwise(line + " "), 1) if (a != " ") > (b != " ")][4:]


@pytest.mark.gpu
def test_a_start_is_timed_from_nothing_to_weights_to_a_token_to_a_step():
    model, found = steps.start(BUNDLED)
    assert 0 < found["load_s"] < found["first_token_s"] < found["step_s"] < 60
    assert found["bytes"] == sum(file.stat().st_size for file in BUNDLED.glob("*.safetensors"))
    assert found["device_bytes"] >= steps.size([model.layers, model.mtp]) and found["host_bytes"] >= 0


@pytest.mark.gpu
def test_a_prefills_peak_is_beside_weights_and_cache():
    model = Step3p7.random(released_config(4), "cuda")
    found = steps.prefill(model, 4096, 2048)
    hidden = 2048 * 4096 * 2  # bytes of a chunk's hidden states
    assert 2 * hidden < found["peak_bytes"] < 2 << 30 and 0 < found["tokens_s"] < 2 * found["floor_tokens_s"]
