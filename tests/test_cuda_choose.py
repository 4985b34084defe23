"""What lies around the trunk in a decode step, choose and decode_inputs: rules on the CPU, kernels on a GPU."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.model.sampling import Sampling

gpu = pytest.mark.gpu
NAN, INF = math.nan, math.inf
TEMPERATURES = [0.0, 1.0, 0.5, 1e-30, 2.0, 0.3]
SIZES = [(1, 128896), (8, 128896), (128, 128896), (3, 5001), (9, 1023), (130, 37), (1, 1), (2000, 1025)]


def random_logits(rows, vocab, device="cuda"):
    """With ties, as those of a bf16 head have."""
    generator = torch.Generator().manual_seed(rows + vocab)
    return torch.randn(rows, vocab, generator=generator).mul(3).bfloat16().float().to(device)


def odd_logits(rows, vocab):
    """Name and logits, where order is not that of the bits, and where memory is not that of a contiguous tensor."""
    x = random_logits(rows, vocab)
    yield "random", x
    yield "all equal", torch.zeros_like(x)
    yield "-0 before 0", torch.zeros_like(x).index_fill_(1, torch.tensor([0], device="cuda"), -0.0)
    yield "all -inf", torch.full_like(x, -INF)
    yield "all nan", torch.full_like(x, NAN)
    some = x.clone()
    some[:, vocab // 2 :] = INF
    yield "inf", some
    some = some.clone()
    some[::2, vocab // 3 :: 2] = -NAN
    yield "nan after inf", some
    yield "rows apart", random_logits(rows, vocab + 7)[:, 3:-4]
    if rows < 200:
        yield "columns together", random_logits(vocab, rows).T


def requests_of(rows, device="cuda"):
    """Positions i32 and requests [rows], temperature and key [6]."""
    generator = torch.Generator().manual_seed(rows)
    positions = torch.randint(0, 1 << 20, (rows,), generator=generator, dtype=torch.int32)
    keys = torch.tensor([Sampling(seed=5).key(r) for r in range(6)])
    return [
        t.to(device)
        for t in (positions, torch.randint(0, 6, (rows,), generator=generator), torch.tensor(TEMPERATURES), keys)
    ]


def step_inputs(rows, columns, hidden=4096, dtype=torch.bfloat16, device="cuda", groups=2, requests=7, page_size=16):
    generator = torch.Generator().manual_seed(rows + columns)

    def integers(low, high, *shape, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype).to(device)

    token, position = (
        integers(0, n, requests + 1).to(t) for n, t in ((50, torch.int64), (columns * page_size, torch.int32))
    )
    padding = integers(0, 2, rows) * -(1 << 30)
    tables = integers(-1, 1000, groups, requests, columns, dtype=torch.int32)
    embeddings = torch.randn(50, hidden, generator=generator).to(device, dtype)
    return token, position, integers(0, requests, rows), padding, tables, page_size, embeddings


def assert_same(got, wanted):
    for name, one, other in zip(("hidden", "positions", "lengths", "slots", "tables"), got, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name


def test_targets_get_the_tokens_and_their_positions_and_nothing_else_changes():
    logits, (positions, requests, temperature, key) = random_logits(3, 500, "cpu"), requests_of(3, "cpu")
    token, position = torch.full((6,), -7), torch.full((6,), -7, dtype=torch.int32)
    targets = torch.tensor([4, 0, 3])
    chosen = sk.choose(logits, positions, requests, temperature, key, None, targets, token, position)
    assert token[targets].equal(chosen) and position[targets].equal(positions)
    assert token[[1, 2, 5]].tolist() == position[[1, 2, 5]].tolist() == [-7] * 3


def test_logits_below_the_least_are_not_chosen_and_equal_ones_are():
    logits = torch.tensor([[3.0, 2.0, 1.0, 2.0, 0.0]]).expand(3000, -1)
    one, rows = torch.ones(3000), torch.arange(3000)
    drawn = sk.choose(logits, rows, rows, 9 * one, 77 + 0 * rows, 2 * one)
    assert drawn.unique().tolist() == [0, 1, 3]


def test_slots_and_tables_of_a_step_are_those_of_its_requests():
    tables = torch.tensor([[[5, 2, 7], [1, 0, 3]], [[9, 8, -1], [4, 6, -1]]], dtype=torch.int32)
    position = torch.tensor([9, 4, 0], dtype=torch.int32)
    embeddings, source = torch.arange(40.0).view(10, 4), torch.tensor([1, 0])
    fed = (torch.tensor([6, 3, 0]), position, source, torch.tensor([0, -(1 << 30)]), tables, 4, embeddings)
    hidden, positions, lengths, slots, rows = sk.decode_inputs(*fed)
    assert hidden.tolist() == embeddings[[3, 6]].tolist()
    assert positions.tolist() == [4, 9] and lengths.tolist() == [5, 10]
    assert slots.tolist() == [[0 * 4 + 0, 7 * 4 + 1 - (1 << 30)], [6 * 4, -4 + 1 - (1 << 30)]]
    assert rows.tolist() == tables[:, [1, 0]].tolist()


@pytest.mark.parametrize("rows", [1, 2, 8, 64, 128, 5000])
@pytest.mark.parametrize("vocab", [1, 1023, 128896])
def test_parts_hold_a_row_once_and_no_more_blocks_than_run_at_once(rows, vocab):
    kernel = importlib.import_module("step_kernels.cuda.choose")
    span, parts = kernel.shape(rows, vocab, 792)
    assert (parts - 1) * span < vocab <= parts * span and span % kernel.QUANTUM == 0
    assert rows * parts <= max(rows, 792)
    assert kernel.shape(1, 128896, 792)[1] == 126  # a quantum each


def test_kernels_take_f32_logits_and_embeddings_in_words_of_16_bytes():
    pytest.importorskip("cuda.bindings")

    def row(op, *arguments):
        return registry.table(op, *arguments, capability=90).splitlines()[1].split(None, 1)

    logits, (positions, requests, *_) = random_logits(2, 9, "cpu"), requests_of(2, "cpu")
    assert row("choose", logits, positions, requests) == ["cuda", "serves"]
    assert row("choose", logits.double(), positions, requests)[1] == "takes float32, got logits in float64"
    assert row("decode_inputs", *step_inputs(2, 3, 72, device="cpu")) == ["cuda", "serves"]
    refused = row("decode_inputs", *step_inputs(2, 3, 60, device="cpu"))[1]
    assert (
        refused == "takes embeddings in whole words of 16 bytes, got 60 of 2 bytes, strides (60, 1), 0 bytes past one"
    )


@pytest.mark.parametrize(
    "vocab, rows, keys, message",
    [
        (0, 2, 4, "logits: got 0 tokens to choose from"),
        (5, 3, 4, "positions: got shape"),
        (5, 2, 3, "key: got shape"),
    ],
)
def test_bad_arguments_are_named(vocab, rows, keys, message):
    positions, requests = torch.zeros(rows).int(), torch.zeros(2).long()
    with pytest.raises(ValueError, match=message):
        sk.choose(torch.zeros(2, vocab), positions, requests, torch.ones(4), torch.ones(keys).long())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
def test_opcheck_passes(device):
    logits, how = random_logits(3, 50, device), requests_of(3, device)
    fed = torch.tensor([4, 0, 3], device=device), *torch.zeros(2, 6, dtype=torch.int64, device=device)
    fed = *fed[:2], fed[2].int()
    torch.library.opcheck(torch.ops.step_kernels.choose.default, (logits, *how, logits[:, 0].clone(), *fed))
    torch.library.opcheck(torch.ops.step_kernels.decode_inputs.default, step_inputs(3, 5, 64, device=device))


@gpu
@pytest.mark.parametrize("rows, vocab", SIZES)
def test_the_best_is_the_references(rows, vocab):
    positions, requests, _, _ = requests_of(rows)
    for name, logits in odd_logits(rows, vocab):
        with sk.force("cuda"):
            got = sk.choose(logits, positions, requests)
        assert torch.equal(got, sk.choose.reference(logits, positions, requests)), name


@gpu
@pytest.mark.parametrize("rows, vocab", SIZES)
def test_draws_are_the_references_but_for_a_logarithms_last_bit(rows, vocab):
    how = requests_of(rows)
    for name, logits in odd_logits(rows, vocab):
        least = logits.nan_to_num().median(-1).values
        least[::2] = -INF
        for bound in (None, least):
            with sk.force("cuda"):
                got = sk.choose(logits, *how, bound)
            differ = (got != sk.choose.reference(logits, *how, bound)).sum().item()
            assert differ <= (0 if name.startswith("all -inf") or name == "all nan" else rows // 50), (name, differ)


@gpu
@pytest.mark.parametrize("drawn", [False, True])
def test_a_row_chooses_the_same_among_any_number_and_every_time(drawn):
    logits, (positions, requests, *how) = random_logits(128, 128896), requests_of(128)
    how = how if drawn else []
    wanted = sk.choose(logits, positions, requests, *how)
    for rows in (1, 5, 8, 64):
        assert torch.equal(sk.choose(logits[:rows], positions[:rows], requests[:rows], *how), wanted[:rows])
    for _ in range(20):
        assert torch.equal(sk.choose(logits, positions, requests, *how), wanted)


@gpu
@pytest.mark.parametrize("rows", [1, 7, 128])
def test_kernels_leave_tokens_at_their_targets_alone(rows):
    logits, how = random_logits(rows, 3001), requests_of(rows)
    token, position = torch.full((300,), -7, device="cuda"), torch.full((300,), -7, dtype=torch.int32, device="cuda")
    targets = torch.randperm(300, generator=torch.Generator().manual_seed(0))[:rows].cuda()
    with sk.force("cuda"):
        chosen = sk.choose(logits, *how, None, targets, token, position)
    others = torch.ones(300, dtype=torch.bool, device="cuda").index_fill_(0, targets, False)
    assert torch.equal(token[targets], chosen) and torch.equal(position[targets], how[0])
    assert (token[others] == -7).all() and (position[others] == -7).all()


@gpu
def test_a_draw_of_any_vocabulary_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5], device="cuda")
    rows = torch.arange(20000, device="cuda")
    one, many = torch.ones(20000, device="cuda"), logits.expand(20000, -1).contiguous()
    with sk.force("cuda"):
        drawn = sk.choose(many, rows, rows, one, 77 + 0 * rows)
    shares = drawn.bincount(minlength=5) / 20000
    assert (shares - logits.softmax(-1)).abs().max() < 0.015  # four standard deviations are 0.014


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "rows, columns, hidden", [(1, 4096, 4096), (128, 33, 4096), (5, 1, 8), (3, 1029, 72), (300, 64, 384)]
)
def test_a_steps_inputs_are_the_references(rows, columns, hidden, dtype):
    arguments = step_inputs(rows, columns, hidden, dtype)
    with sk.force("cuda"):
        got = sk.decode_inputs(*arguments)
    assert_same(got, sk.decode_inputs.reference(*arguments))


@gpu
def test_no_rows_give_no_tokens_and_no_inputs():
    with sk.force("cuda"):
        assert sk.choose(random_logits(0, 50), *requests_of(0)).shape == (0,)
        assert [t.numel() for t in sk.decode_inputs(*step_inputs(0, 5))] == [0] * 5


@gpu
@pytest.mark.parametrize("rows", [1, 8, 128])
@pytest.mark.parametrize("drawn", [False, True])
def test_replays_of_a_step_feed_each_other_as_reference_steps_do(rows, drawn):
    """Each kernel is the dependent of the one ahead, and the first of a replay reads what the last one left."""
    token, position, _, padding, tables, page_size, embeddings = step_inputs(1, 64, requests=rows)
    source = torch.arange(rows, device="cuda")
    padding, head = padding.expand(rows).contiguous(), random_logits(50, 4096).bfloat16() / 30
    position.fill_(3)
    _, requests, temperature, key = requests_of(rows)
    norm = torch.zeros(4096, device="cuda", dtype=torch.bfloat16)

    def step(token, position, inputs, choose):
        fed = inputs(token, position, source, padding, tables, page_size, embeddings)
        logits = torch.mm(sk.rms_norm(fed[0], norm, 1e-5), head.mT, out_dtype=torch.float32)
        how = (temperature, key, None) if drawn else (None,) * 3
        return choose(logits, fed[2], requests, *how, source, token, position), *fed

    step(token.clone(), position.clone(), sk.decode_inputs, sk.choose)
    torch.cuda.synchronize()
    plain = token.clone(), position.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(token, position, sk.decode_inputs, sk.choose)
    seen = []
    for _ in range(40):
        graph.replay()
        wanted = step(*plain, sk.decode_inputs.reference, sk.choose.reference)
        assert torch.equal(out[0], wanted[0]) and torch.equal(token, plain[0]) and torch.equal(position, plain[1])
        assert_same(out[1:], wanted[1:])
        seen += out[0].tolist()
    assert position[0] == 43 and len(set(seen)) > 3
