"""moe_topk: the reference against hand-worked numbers and a plain-Python router; opcheck, errors."""

import math

import pytest
import torch

import step_kernels as sk

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, sigmoid(0) = 1/2


def route(logits, bias, top_k, scale=1.0):
    """One token given as lists; weights and ids as lists."""
    weights, ids = sk.moe_topk(torch.tensor([logits]), torch.tensor(bias), top_k, scale)
    return weights[0].tolist(), ids[0].tolist()


def random_inputs(tokens, experts):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    return torch.randn(tokens, experts, generator=generator) * 2, torch.randn(experts, generator=generator) * 0.1


def plain_router(logits, bias, top_k, scale):
    """The same in Python floats, one token at a time; scores in f32 so that near ties fall the same way."""
    scores = logits.sigmoid()
    ranks = (scores + bias).tolist()
    all_weights, all_ids = [], []
    for row, rank in zip(scores.tolist(), ranks):
        ids = sorted(range(len(row)), key=lambda e: (-rank[e], e))[:top_k]
        total = sum(row[e] for e in ids)
        all_weights.append([row[e] / total * scale for e in ids])
        all_ids.append(ids)
    return torch.tensor(all_weights), torch.tensor(all_ids, dtype=torch.int32)


def test_weights_are_the_selected_scores_over_their_sum():
    weights, ids = route([0.0, LN3, -LN3], [0.0, 0.0, 0.0], 2)
    assert ids == [1, 0]
    assert weights == pytest.approx([0.6, 0.4], rel=1e-6)  # 3/4 and 1/2 over 5/4


def test_bias_selects_but_does_not_weigh():
    weights, ids = route([0.0, LN3, -LN3], [0.0, 0.0, 1.0], 2)
    assert ids == [2, 1]  # 1/4 + 1 before 3/4
    assert weights == pytest.approx([0.25, 0.75], rel=1e-6)


def test_scale_multiplies_the_normalised_weights():
    weights, _ = route([0.0, LN3, -LN3], [0.0, 0.0, 0.0], 2, scale=3.0)
    assert weights == pytest.approx([1.8, 1.2], rel=1e-6)


def test_topk_breaks_ties_by_lowest_index():
    assert route([0.5] * 40, [0.0] * 40, 5)[1] == [0, 1, 2, 3, 4]
    assert route([0.0, LN3, 0.0, LN3], [0.0] * 4, 3)[1] == [1, 3, 0]
    assert route([1000.0, 2000.0, 50.0], [0.0] * 3, 3)[1] == [0, 1, 2]  # three sigmoids that are exactly 1


def test_nan_ranks_last_beside_minus_infinity():
    nan, inf = math.nan, math.inf
    assert route([nan, 0.0, LN3, -LN3], [0.0] * 4, 3)[1] == [2, 1, 3]
    assert route([0.0, nan, 0.0, LN3], [-inf, 0.0, -inf, 0.0], 4)[1] == [3, 0, 1, 2]
    weights, ids = route([nan, LN3], [0.0, 0.0], 2)
    assert ids == [1, 0] and all(map(math.isnan, weights))


def test_every_expert_may_be_selected():
    weights, ids = route([0.0, LN3, -LN3], [0.0] * 3, 3)
    assert ids == [1, 0, 2]
    assert weights == pytest.approx([0.5, 1 / 3, 1 / 6], rel=1e-6)


def test_a_score_of_zero_gives_weight_zero_and_not_nan():
    assert route([-1000.0, -1000.0], [0.0, 0.0], 1) == ([0.0], [0])


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 288, 8), (33, 288, 8), (5, 7, 7), (3, 1, 1)])
def test_reference_routes_as_plain_python_does(tokens, experts, top_k):
    logits, bias = random_inputs(tokens, experts)
    weights, ids = sk.moe_topk(logits, bias, top_k, 3.0)
    wanted_weights, wanted_ids = plain_router(logits, bias, top_k, 3.0)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=1e-6, atol=0)
    assert weights.sum(1).tolist() == pytest.approx([3.0] * tokens, rel=1e-6)


def test_no_tokens_give_empty_outputs_of_the_right_types():
    weights, ids = sk.moe_topk(torch.empty(0, 288), torch.zeros(288), 8, 3.0)
    assert (weights.shape, weights.dtype) == ((0, 8), torch.float32)
    assert (ids.shape, ids.dtype) == ((0, 8), torch.int32)


def test_op_keeps_the_rules_of_torch_library():
    logits, bias = random_inputs(3, 288)
    for rows in (logits, torch.empty(0, 288), logits[:, ::2]):
        torch.library.opcheck(torch.ops.step_kernels.moe_topk.default, (rows, bias[: rows.shape[1]], 8, 3.0))


def test_torch_compile_takes_the_op_without_a_graph_break():
    logits, bias = random_inputs(3, 288)
    compiled = torch.compile(lambda x: sk.moe_topk(x * 2, bias, 8, 3.0), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(logits), sk.moe_topk(logits * 2, bias, 8, 3.0)):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "logits, bias, top_k, error, message",
    [
        (torch.zeros(2, 4).half(), torch.zeros(4), 2, TypeError, "logits: got float16, wanted float32"),
        (torch.zeros(4), torch.zeros(4), 2, ValueError, "logits: got shape [4], wanted [any, any]"),
        (torch.zeros(2, 4), torch.zeros(5), 2, ValueError, "bias: got shape [5], wanted [4]"),
        (torch.zeros(2, 4), torch.zeros(4).bfloat16(), 2, TypeError, "bias: got bfloat16, wanted float32"),
        (torch.zeros(2, 4), torch.zeros(4), 5, ValueError, "top_k: got 5, wanted 1 to 4"),
        (torch.zeros(2, 4), torch.zeros(4), 0, ValueError, "top_k: got 0, wanted 1 to 4"),
    ],
)
def test_wrong_arguments_are_named_with_what_came_and_what_was_wanted(logits, bias, top_k, error, message):
    with pytest.raises(error) as caught:
        sk.moe_topk(logits, bias, top_k, 3.0)
    assert message in str(caught.value) and "\n" not in str(caught.value)
