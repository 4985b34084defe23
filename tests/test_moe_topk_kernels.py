"""moe_topk's kernels against the reference: Triton's in the interpreter too, both as the op on a GPU."""

import math
import threading

import pytest
import torch

import step_kernels as sk
from step_kernels import registry

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the Triton kernel runs in the interpreter on the CPU
BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])


def random_inputs(tokens, experts, device=DEVICE):
    generator = torch.Generator().manual_seed(tokens * 1000 + experts)
    logits = torch.randn(tokens, experts, generator=generator) * 2
    return logits.to(device), (torch.randn(experts, generator=generator) * 0.1).to(device)


def test_cuda_kernel_refuses_more_experts_and_choices_than_it_has_registers_for():
    pytest.importorskip("cuda.bindings")
    refused = "takes at most 512 experts and top 32, got 513 and 8"
    assert refused in registry.table("moe_topk", torch.zeros(1, 513), torch.zeros(513), 8, 3.0, capability=90)
    refused = "takes at most 512 experts and top 32, got 288 and 33"
    assert refused in registry.table("moe_topk", torch.zeros(1, 288), torch.zeros(288), 33, 3.0, capability=90)


def test_triton_kernel_stands_between_cuda_and_the_reference_and_refuses_more_than_1024_experts():
    def rows(experts):
        arguments = torch.zeros(1, experts), torch.zeros(experts), 8, 3.0
        return [line.split(None, 1) for line in registry.table("moe_topk", *arguments, capability=80).splitlines()[1:]]

    pytest.importorskip("triton")
    assert [name for name, _ in rows(1024)] == ["cuda", "triton", "reference"]
    assert rows(1024)[1][1] == "serves"
    assert rows(1025)[1][1] == "takes at most 1024 experts, got 1025" and rows(1025)[2][1] == "serves"


def assert_equals_reference(got, logits, bias, top_k):
    weights, ids = got
    wanted_weights, wanted_ids = sk.moe_topk.reference(logits, bias, top_k, 3.0)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted_weights, rtol=2e-6, atol=1e-30, equal_nan=True)


def assert_kernel_equals_reference(backend, logits, bias, top_k):
    with sk.force(backend):
        assert_equals_reference(sk.moe_topk(logits, bias, top_k, 3.0), logits, bias, top_k)


def with_ties_nan_and_infinities(logits):
    logits = (logits * 2).round() / 2  # some ten different values among 288: ties everywhere
    logits[1::4, ::7] = math.nan
    logits[2::4, ::5] = -math.inf
    logits[3::4, ::3] = math.inf
    return logits


def triton_launch(*arguments):
    pytest.importorskip("triton")
    from step_kernels.triton.moe_topk import launch

    return launch(*arguments)


@pytest.mark.parametrize("experts, top_k", [(288, 8), (1, 1), (31, 31), (129, 4), (600, 40)])
def test_triton_kernel_selects_the_ids_of_the_reference(experts, top_k):
    logits, bias = random_inputs(3, experts, DEVICE)
    assert_equals_reference(triton_launch(logits, bias, top_k, 3.0), logits, bias, top_k)


def test_triton_kernel_selects_every_one_of_1024_experts_once():
    logits, bias = random_inputs(1, 1024, DEVICE)
    ids = triton_launch(logits, bias, 1024, 3.0)[1]
    assert torch.equal(ids, sk.moe_topk.reference(logits, bias, 1024, 3.0)[1])


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, in the interpreter
def test_triton_kernel_ranks_ties_nan_and_infinities_as_the_reference():
    logits, bias = random_inputs(4, 288, DEVICE)
    logits = with_ties_nan_and_infinities(logits)
    assert_equals_reference(triton_launch(logits, 0 * bias, 8, 3.0), logits, 0 * bias, 8)
    bias[::2], bias[1::4] = -math.inf, math.nan
    logits[0] = math.nan
    assert_equals_reference(triton_launch(logits, bias, 100, 3.0), logits, bias, 100)


def test_triton_kernel_reads_strided_logits_and_bias_and_no_tokens():
    logits, bias = random_inputs(6, 80, DEVICE)
    for rows, deltas in ((logits[::2, 5:69], bias[5:69]), (logits[:, ::2], bias[::2]), (logits.t()[:, :6], bias[:6])):
        assert_equals_reference(triton_launch(rows, deltas, 4, 3.0), rows, deltas, 4)
    weights, ids = triton_launch(logits[:0], bias, 4, 3.0)
    assert weights.shape == ids.shape == (0, 4) and ids.dtype == torch.int32


def test_triton_kernel_writes_its_outputs_and_nothing_beside_them():
    pytest.importorskip("triton")
    from step_kernels.triton.moe_topk import _moe_topk_kernel, tile

    logits, bias = random_inputs(3, 40, DEVICE)
    weights = torch.full((5, 5), -7.0, device=DEVICE)
    ids = torch.full((5, 5), -7, dtype=torch.int32, device=DEVICE)
    block, choices, warps = tile(40, 5)
    constants = {"TOP_K": 5, "BLOCK": block, "CHOICES": choices, "num_warps": warps}
    _moe_topk_kernel[(3,)](logits, bias, weights[1:], ids[1:], 40, 40, 3.0, **constants)
    assert_equals_reference((weights[1:4], ids[1:4]), logits, bias, 5)
    assert all((out[0] == -7).all() and (out[4] == -7).all() for out in (weights, ids))


@pytest.mark.gpu
@BACKENDS
@pytest.mark.parametrize("tokens", [0, 1, 3, 64, 1025])
@pytest.mark.parametrize("experts, top_k", [(288, 8), (1, 1), (31, 31), (32, 32), (129, 4), (257, 1), (512, 32)])
def test_kernels_select_the_ids_of_the_reference(experts, top_k, tokens, backend):
    assert_kernel_equals_reference(backend, *random_inputs(tokens, experts, "cuda"), top_k)


@pytest.mark.gpu
def test_triton_kernel_selects_the_references_ids_among_scores_of_every_size():
    # Sigmoids from 1 down to subnormal ones and 0, in rows where neighbours often differ by one bit.
    order = torch.randperm(16 * 1024, generator=torch.Generator().manual_seed(0))
    for low, high in ((-100, 20), (-1, 1), (10, 17), (-90, -85)):
        logits = torch.linspace(low, high, 16 * 1024)[order].view(16, 1024).cuda()
        assert_kernel_equals_reference("triton", logits, torch.zeros(1024, device="cuda"), 1024)


@pytest.mark.gpu
@BACKENDS
def test_kernels_rank_ties_nan_and_infinities_as_the_reference(backend):
    logits, bias = random_inputs(64, 288, "cuda")
    logits = with_ties_nan_and_infinities(logits)
    assert_kernel_equals_reference(backend, logits, torch.zeros_like(bias), 8)
    bias[::2], bias[1::4] = -math.inf, math.nan
    logits[0] = math.nan
    assert_kernel_equals_reference(backend, logits, bias, 32)


@pytest.mark.gpu
@BACKENDS
def test_kernels_read_strided_logits_and_bias(backend):
    logits, bias = random_inputs(37, 600, "cuda")
    assert_kernel_equals_reference(backend, logits[::2, 5:293], bias[5:293], 8)  # rows 1200 apart
    assert_kernel_equals_reference(backend, logits[:, ::2], bias[::2], 8)  # columns 2 apart
    assert_kernel_equals_reference(backend, logits.t()[:37, :37], bias[:37], 8)


@pytest.mark.gpu
@BACKENDS
def test_op_on_the_gpu_keeps_the_rules_of_torch_library(backend):
    logits, bias = random_inputs(3, 288, "cuda")
    with sk.force(backend):
        torch.library.opcheck(torch.ops.step_kernels.moe_topk.default, (logits, bias, 8, 3.0))


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
@BACKENDS
def test_kernels_give_the_same_bits_on_every_run(backend):
    logits, bias = random_inputs(1025, 288, "cuda")
    with sk.force(backend):
        first = sk.moe_topk(logits, bias, 8, 3.0)
        for _ in range(5):
            assert all(map(torch.equal, sk.moe_topk(logits, bias, 8, 3.0), first))


@pytest.mark.gpu
@BACKENDS
def test_a_cuda_graph_replays_the_kernels_on_new_logits(backend):
    logits, bias = random_inputs(64, 288, "cuda")
    with sk.force(backend):
        sk.moe_topk(logits, bias, 8, 3.0)  # loads it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sk.moe_topk(logits, bias, 8, 3.0)
    logits.copy_(logits.flip(1))
    graph.replay()
    assert_equals_reference(out, logits, bias, 8)


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
