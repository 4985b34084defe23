"""moe_topk: the reference against hand-worked numbers and a plain-Python router, the CUDA kernel against it."""

import math
import threading

import pytest
import torch

import step_kernels as sk
from step_kernels import registry

LN3 = math.log(3.0)  # sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4, sigmoid(0) = 1/2


def route(logits, bias, top_k, scale=1.0):
    """One token given as lists; weights and ids as lists."""
    weights, ids = sk.moe_topk(torch.tensor([logits]), torch.tensor(bias), top_k, scale)
    return weights[0].tolist(), ids[0].tolist()


def random_inputs(tokens, experts, device="cpu"):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    return logits.to(device), (torch.randn(experts, generator=generator) * 0.1).to(device)


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


def test_cuda_kernel_refuses_more_experts_and_choices_than_it_has_registers_for():
    pytest.importorskip("cuda.bindings")
    refused = "takes at most 512 experts and top 32, got 513 and 8"
    assert refused in registry.table("moe_topk", torch.zeros(1, 513), torch.zeros(513), 8, 3.0, capability=90)
    refused = "takes at most 512 experts and top 32, got 288 and 33"
    assert refused in registry.table("moe_topk", torch.zeros(1, 288), torch.zeros(288), 33, 3.0, capability=90)


def assert_kernel_equals_reference(logits, bias, top_k, scale=3.0):
    with sk.force("cuda"):
        weights, ids = sk.moe_topk(logits, bias, top_k, scale)
    wanted_weights, wanted_ids = sk.moe_topk.reference(logits, bias, top_k, scale)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 1025])
@pytest.mark.parametrize("experts, top_k", [(288, 8), (1, 1), (31, 31), (32, 32), (129, 4), (257, 1), (512, 32)])
def test_cuda_kernel_selects_the_ids_of_the_reference(tokens, experts, top_k):
    assert_kernel_equals_reference(*random_inputs(tokens, experts, "cuda"), top_k)


@pytest.mark.gpu
def test_cuda_kernel_ranks_ties_nan_and_infinities_as_the_reference():
    logits, bias = random_inputs(64, 288, "cuda")
    logits = (logits * 2).round() / 2  # some ten different values among 288: ties everywhere
    logits[1::4, ::7] = math.nan
    logits[2::4, ::5] = -math.inf
    logits[3::4, ::3] = math.inf
    assert_kernel_equals_reference(logits, torch.zeros_like(bias), 8)
    bias[::2], bias[1::4] = -math.inf, math.nan
    logits[0] = math.nan
    assert_kernel_equals_reference(logits, bias, 32)


@pytest.mark.gpu
def test_cuda_kernel_reads_strided_logits_and_bias():
    logits, bias = random_inputs(37, 600, "cuda")
    assert_kernel_equals_reference(logits[::2, 5:293], bias[5:293], 8)  # rows 1200 apart
    assert_kernel_equals_reference(logits[:, ::2], bias[::2], 8)  # columns 2 apart
    assert_kernel_equals_reference(logits.t()[:37, :37], bias[:37], 8)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 5])
def test_cuda_kernel_writes_its_outputs_and_nothing_beside_them(tokens):
    from step_kernels.cuda.moe_topk import VARIANTS

    logits, bias = random_inputs(tokens, 288, "cuda")
    weights = torch.full((tokens + 8, 8), -7.0, device="cuda")
    ids = torch.full((tokens + 8, 8), -7, dtype=torch.int32, device="cuda")
    VARIANTS[288].launch((2, 1, 1), 128, logits, bias, weights[4:], ids[4:], 288, tokens, 288, 8, 3.0)
    for out, wanted in zip((weights, ids), sk.moe_topk.reference(logits, bias, 8, 3.0)):
        torch.testing.assert_close(out[4:-4], wanted, rtol=2e-6, atol=0)
        assert (out[:4] == -7).all() and (out[-4:] == -7).all()


@pytest.mark.gpu
def test_cuda_kernel_gives_the_same_bits_on_every_run():
    logits, bias = random_inputs(1025, 288, "cuda")
    first = sk.moe_topk(logits, bias, 8, 3.0)
    for _ in range(5):
        assert all(map(torch.equal, sk.moe_topk(logits, bias, 8, 3.0), first))


@pytest.mark.gpu
def test_a_cuda_graph_replays_the_kernel_on_new_logits():
    logits, bias = random_inputs(64, 288, "cuda")
    sk.moe_topk(logits, bias, 8, 3.0)  # loads it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        weights, ids = sk.moe_topk(logits, bias, 8, 3.0)
    logits.copy_(logits.flip(1))
    graph.replay()
    wanted_weights, wanted_ids = sk.moe_topk.reference(logits, bias, 8, 3.0)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=2e-6, atol=0)


@pytest.mark.gpu
def test_kernel_waits_for_the_stream_it_is_called_on():
    logits, bias = random_inputs(64, 288, "cuda")
    wanted = sk.moe_topk(logits, bias, 8, 3.0)[1]
    late = torch.zeros_like(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # about 10 ms: on another stream the kernel would read the zeros
        late.copy_(logits)
        ids = sk.moe_topk(late, bias, 8, 3.0)[1]
    side.synchronize()
    assert torch.equal(ids, wanted)


@pytest.mark.gpu
def test_a_thread_that_never_called_cuda_can_launch():
    logits, bias = random_inputs(4, 288, "cuda")
    wanted = sk.moe_topk(logits, bias, 8, 3.0)[1]
    results = []
    thread = threading.Thread(target=lambda: results.append(sk.moe_topk(logits, bias, 8, 3.0)[1]))
    thread.start()
    thread.join()
    assert torch.equal(results[0], wanted)


@pytest.mark.gpu
def test_registry_serves_cuda_tensors_by_the_cuda_kernel():
    logits, bias = random_inputs(4, 288, "cuda")
    assert registry.table("moe_topk", logits, bias, 8, 3.0).splitlines()[1].split() == ["cuda", "serves"]
