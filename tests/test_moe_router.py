"""moe_router: the reference is moe_topk of f32 logits; on a GPU the fused kernel against float64."""

from __future__ import annotations

import re

import pytest
import torch

import step_kernels as sk
from step_kernels import registry

BF16 = torch.bfloat16
SCALE = 3.0
MARGIN = 1e-5  # between two experts' scores, below which f32 sums may order them otherwise


def inputs(tokens, experts=288, hidden=4096, dtype=BF16, device="cpu"):
    """x of size 1 and weights that give logits of size 1.3, as the release's."""
    generator = torch.Generator().manual_seed(1000 * tokens + experts + hidden)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    weight = torch.randn(experts, hidden, generator=generator) * 1.3 / hidden**0.5
    arguments = tuple(t.to(device) for t in (x, weight, torch.randn(experts, generator=generator) * 0.1))
    if device == "cuda":
        torch.cuda.synchronize()  # the kernel may read a weight before the kernel ahead of it has ended
    return arguments


def assert_routes(got, x, weight, bias, top_k, clear=0.5):
    """The ids of float64 where no two of the best scores are within MARGIN, for at least `clear` of all tokens."""
    weights, ids = got[0].double(), got[1].long()
    scores = (x.double() @ weight.double().mT).sigmoid()
    ranked, order = (scores + bias.double()).sort(dim=1, descending=True)
    best = ranked[:, : top_k + 1]
    certain = (best[:, :-1] - best[:, 1:] > MARGIN).all(1)
    assert certain.double().mean() >= clear
    assert torch.equal(ids[certain], order[certain, :top_k])
    assert (ids.sort(1).values.diff(dim=1) > 0).all()  # no expert twice
    chosen = (scores + bias.double()).gather(1, ids)
    torch.testing.assert_close(chosen, ranked[:, :top_k], rtol=0, atol=MARGIN)
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True) * SCALE, rtol=5e-6, atol=0)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32, torch.float64])
def test_reference_is_moe_topk_of_logits_in_f32(dtype):
    x, weight, bias = inputs(5, 33, 96, dtype)
    wanted = sk.moe_topk(x.float() @ weight.mT, bias, 4, SCALE)
    assert all(map(torch.equal, sk.moe_router(x, weight, bias, 4, SCALE), wanted))
    assert_routes(wanted, x, weight, bias, 4)


def test_logits_are_not_rounded_to_the_type_of_x():
    """Scores of 1 and 1 + 2^-12 are one number in bf16; the larger comes first in f32."""
    x = torch.ones(1, 64).to(BF16)
    weight = torch.full((2, 64), 1 / 64)
    weight[1, 0] += 2.0**-12
    assert sk.moe_router(x, weight, torch.zeros(2), 1, SCALE)[1].tolist() == [[1]]


def test_op_keeps_the_rules_of_torch_library():
    x, weight, bias = inputs(6, 12, 32)
    for rows in (x, x[:0], x[::2], torch.cat((x, x), 1)[:, 7:39]):
        torch.library.opcheck(torch.ops.step_kernels.moe_router.default, (rows, weight, bias, 3, SCALE))


BAD = [
    (r"x: got shape \[4\], wanted \[any, any\]", ValueError, (torch.zeros(4), torch.zeros(2, 4), torch.zeros(2), 1)),
    ("x: got int32", TypeError, (torch.zeros(1, 4).int(), torch.zeros(2, 4), torch.zeros(2), 1)),
    (r"weight: got shape \[2, 5\], wanted \[any, 4\]", ValueError,
     (torch.zeros(1, 4), torch.zeros(2, 5), torch.zeros(2), 1)),
    ("weight: got bfloat16, wanted float32", TypeError,
     (torch.zeros(1, 4), torch.zeros(2, 4).bfloat16(), torch.zeros(2), 1)),
    (r"bias: got shape \[3\], wanted \[2\]", ValueError, (torch.zeros(1, 4), torch.zeros(2, 4), torch.zeros(3), 1)),
    ("top_k: got 3, wanted 1 to 2", ValueError, (torch.zeros(1, 4), torch.zeros(2, 4), torch.zeros(2), 3)),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, arguments = case
    with pytest.raises(kind, match=message):
        sk.moe_router(*arguments, SCALE)


def test_cuda_serves_every_generation_and_refuses_what_moe_topk_refuses():
    pytest.importorskip("cuda.bindings")

    def first(experts, top_k, capability):
        x, weight, bias = torch.zeros(1, 8), torch.zeros(experts, 8), torch.zeros(experts)
        table = registry.table("moe_router", x, weight, bias, top_k, SCALE, capability=capability).splitlines()[1:]
        return next(line for line in table if "serves sm_" not in line).split(None, 1)

    for capability in (80, 89, 90, 100, 120):
        assert first(512, 32, capability) == ["cuda", "serves"]
        assert first(513, 8, capability) == ["cuda", "takes at most 512 experts and top 32, got 513 and 8"]
        assert first(288, 33, capability) == ["cuda", "takes at most 512 experts and top 32, got 288 and 33"]


def test_kernels_take_up_to_16384_tokens_and_whole_warps_of_k():
    from step_kernels.cuda.moe_router import takes

    assert [takes(tokens, 288, 4096) for tokens in (0, 1, 16384, 16385)] == [False, True, True, False]
    assert takes(1, 512, 16384) and not takes(1, 512, 16448)  # as many sums as a stream has room for
    assert takes(2, 288, 64) and not takes(2, 288, 96) and not takes(2, 288, 0)


def test_many_tokens_have_a_kernel_of_their_own_on_hopper():
    from step_kernels.cuda.moe_router import takes_many

    assert [takes_many(tokens, 288, 4096) for tokens in (1536, 1537, 100000)] == [False, True, True]
    assert takes_many(2000, 1, 64) and takes_many(2000, 288, 16384)
    assert not any(takes_many(2000, *sizes) for sizes in ((289, 4096), (288, 96), (288, 16448), (288, 0)))


def test_launchers_of_many_tokens_pack_the_parameters_of_their_kernels():
    from step_kernels.cuda.moe_router import MANY, SPLIT

    kinds = {"long long": "q", "int": "i", "float": "f", "TensorMap": 16 * "q"}
    for kernel in (SPLIT, MANY):
        text = re.sub(r"//[^\n]*", "", kernel.source.read_text())
        names = re.search(rf"\b{kernel.symbol}\((.*?)\)\s*\{{", text, re.DOTALL)[1].split(",")
        codes = ["P" if "*" in n else next(c for k, c in kinds.items() if re.search(rf"\b{k}\b", n)) for n in names]
        assert kernel._layout.format == "".join(codes)


gpu = pytest.mark.gpu


@gpu
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 16, 17, 33, 64, 65, 300, 1536])
def test_every_token_gets_the_experts_of_float64(tokens):
    x, weight, bias = inputs(tokens, device="cuda")
    with sk.force("cuda"):
        weights, ids = sk.moe_router(x, weight, bias, 8, SCALE)
    assert weights.shape == ids.shape == (tokens, 8) and ids.dtype == torch.int32
    if tokens:
        assert_routes((weights, ids), x, weight, bias, 8)


@gpu
@pytest.mark.parametrize("tokens", [1, 11, 40])
@pytest.mark.parametrize(
    "experts, hidden, top_k",
    [
        (288, 64, 8),
        (288, 576, 8),
        (7, 4096, 7),
        (16, 1088, 1),
        (33, 8192, 5),
        (300, 512, 32),
        (512, 2048, 8),
        (5, 100, 2),
    ],
)
def test_shapes_that_leave_blocks_part_empty(experts, hidden, top_k, tokens):
    x, weight, bias = inputs(tokens, experts, hidden, device="cuda")
    with sk.force("cuda"):
        assert_routes(sk.moe_router(x, weight, bias, top_k, SCALE), x, weight, bias, top_k, clear=0.3)


def in_bf16(weight, chunks):
    """The weight, in some chunks of 64 k rounded to bf16."""
    columns = torch.arange(weight.shape[1], device=weight.device) // 64
    chosen = {"none": columns < 0, "all": columns >= 0, "every third": columns % 3 == 0}[chunks]
    weight = torch.where(chosen, weight.bfloat16().float(), weight)
    if weight.is_cuda:
        torch.cuda.synchronize()
    return weight


@gpu
@pytest.mark.parametrize("chunks", ["none", "all", "every third"])
@pytest.mark.parametrize(
    "tokens, experts, hidden, top_k",
    [(1537, 288, 4096, 8), (8192, 288, 4096, 8), (20011, 288, 4096, 8), (1600, 7, 64, 7), (1664, 33, 1088, 32)],
)
def test_many_tokens_get_the_experts_of_float64_whatever_parts_a_weight_has(tokens, experts, hidden, top_k, chunks):
    x, weight, bias = inputs(tokens, experts, hidden, device="cuda")
    weight = in_bf16(weight, chunks)
    with sk.force("cuda"):
        got = sk.moe_router(x, weight, bias, top_k, SCALE)
        again = sk.moe_router(x, weight, bias, top_k, SCALE)
    assert all(map(torch.equal, got, again))
    assert_routes(got, x, weight, bias, top_k, clear=0.3)


@gpu
def test_many_tokens_keep_all_bits_of_weights_of_very_different_sizes():
    """Logits of 2^-20, and of 2^-19 for one expert, are what is left of weights of size 1."""
    x = torch.ones(1600, 4096, device="cuda").to(BF16)
    weight = torch.zeros(288, 4096, device="cuda")
    weight[:, 0], weight[:, 3] = 1 + 2.0**-20, -1
    weight[100, 0] += 2.0**-20
    torch.cuda.synchronize()
    weights, ids = sk.moe_router(x, weight, torch.zeros(288, device="cuda"), 2, SCALE)
    assert (ids == torch.tensor([100, 0], device="cuda")).all()


@gpu
def test_many_tokens_are_read_with_their_strides_and_nan_stays_in_its_token():
    x, weight, bias = inputs(1700, device="cuda")
    wanted = sk.moe_router(x, weight, bias, 8, SCALE)
    wide = torch.full((1700, 5000), torch.nan, device="cuda", dtype=BF16)
    wide[:, 8:4104] = x
    assert all(map(torch.equal, sk.moe_router(wide[:, 8:4104], weight, bias, 8, SCALE), wanted))
    assert all(map(torch.equal, sk.moe_router(x.t().contiguous().t(), weight, bias, 8, SCALE), wanted))
    alike = sk.moe_router(x[:1].expand(1700, 4096), weight, bias, 8, SCALE)
    assert all(torch.equal(got, one[:1].expand(1700, 8)) for got, one in zip(alike, wanted))
    x[777, 17] = torch.nan
    weights, ids = sk.moe_router(x, weight, bias, 8, SCALE)
    others = torch.arange(1700, device="cuda") != 777
    assert torch.equal(weights[others], wanted[0][others]) and torch.equal(ids[others], wanted[1][others])
    assert weights[777].isnan().all() and ids[777].tolist() == list(range(8))


@gpu
@pytest.mark.parametrize("tokens", [1537, 1600, 1791])
def test_the_kernel_for_many_tokens_writes_its_outputs_and_nothing_beside_them(tokens):
    from step_kernels.cuda import moe_router

    x, weight, bias = inputs(tokens, device="cuda")
    weights = torch.full((tokens + 2, 8), -7.0, device="cuda")
    ids = torch.full((tokens + 2, 8), -7, dtype=torch.int32, device="cuda")
    parts = torch.full((64, 3, 288, 64), torch.nan, device="cuda", dtype=BF16)
    counts = torch.full((66,), -7, dtype=torch.int32, device="cuda")
    moe_router.SPLIT.launch((64, 1, 1), 288, weight, parts, counts[1:], 288, 4096)
    assert counts.tolist() == [-7, *64 * [3], -7]
    row, unit = torch.arange(288, device="cuda")[:, None], torch.arange(8, device="cuda")
    unswizzled = parts.view(64, 3, 288, 8, 8)[:, :, row, unit ^ row % 8].flatten(3)
    assert torch.equal(unswizzled.double().sum(1).permute(1, 0, 2).flatten(1), weight.double())
    grid, x_map = (2 * -(-tokens // 128), 1, 1), moe_router.tensor_map(x, 64)
    moe_router.MANY.launch(grid, 384, parts, counts[1:], bias, weights[1:], ids[1:], tokens, 288, 64, 8, SCALE, *x_map)
    for out, wanted in zip((weights, ids), sk.moe_router(x, weight, bias, 8, SCALE)):
        assert torch.equal(out[1:-1], wanted) and (out[0] == -7).all() and (out[-1] == -7).all()


@gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_backends_route_x_of_any_type(backend, dtype):
    x, weight, bias = inputs(19, dtype=dtype, device="cuda")
    with sk.force(backend):
        assert_routes(sk.moe_router(x, weight, bias, 8, SCALE), x, weight, bias, 8)


@gpu
def test_weights_of_very_different_sizes_keep_all_their_bits():
    """Logits of 2^-20, and of 2^-19 for one expert, are what is left of weights of size 1."""
    x, weight, bias = inputs(1, device="cuda")
    x = torch.ones_like(x)
    weight[:] = 0
    weight[:, 0], weight[:, 4095] = 1 + 2.0**-20, -1
    weight[100, 0] += 2.0**-20
    torch.cuda.synchronize()
    weights, ids = sk.moe_router(x, weight, 0 * bias, 2, SCALE)
    assert ids.tolist() == [[100, 0]]


@gpu
def test_a_tokens_choice_does_not_depend_on_how_many_there_are():
    x, weight, bias = inputs(200, device="cuda")
    wanted = sk.moe_router(x, weight, bias, 8, SCALE)
    for tokens in (1, 5, 8, 13, 32, 33, 64, 65):
        for got, of_all in zip(sk.moe_router(x[:tokens], weight, bias, 8, SCALE), wanted):
            assert torch.equal(got, of_all[:tokens])


@gpu
@pytest.mark.parametrize("tokens", [1, 64])
def test_a_thousand_launches_in_a_row_give_the_same_bits_and_leave_no_sums(tokens):
    from step_kernels.cuda.moe_router import _pool

    x, weight, bias = inputs(tokens, device="cuda")
    wanted = sk.moe_router(x, weight, bias, 8, SCALE)
    for got in [sk.moe_router(x, weight, bias, 8, SCALE) for _ in range(1000)]:
        assert all(map(torch.equal, got, wanted))
    assert (_pool(x.device.index)[0] == -1).all()


@gpu
def test_x_is_read_with_its_strides():
    x, weight, bias = inputs(12, device="cuda")
    wanted = sk.moe_router(x, weight, bias, 8, SCALE)
    wide = torch.randn(12, 5000, device="cuda").to(BF16)
    wide[:, 8:4104] = x
    odd = torch.randn(12, 5001, device="cuda").to(BF16)
    odd[:, 3:4099] = x
    columns = x.t().contiguous().t()
    for view in (wide[:, 8:4104], odd[:, 3:4099], columns):
        assert all(map(torch.equal, sk.moe_router(view, weight, bias, 8, SCALE), wanted))
    every_other = sk.moe_router(x[::2], weight, bias, 8, SCALE)
    assert all(torch.equal(got, of_all[::2]) for got, of_all in zip(every_other, wanted))


@gpu
def test_nan_in_a_token_stays_in_it_and_ranks_last():
    x, weight, bias = inputs(9, device="cuda")
    wanted = sk.moe_router(x, weight, bias, 8, SCALE)
    x[4, 17] = torch.nan
    weights, ids = sk.moe_router(x, weight, bias, 8, SCALE)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(weights[others], wanted[0][others]) and torch.equal(ids[others], wanted[1][others])
    assert weights[4].isnan().all() and ids[4].tolist() == list(range(8))


@gpu
@pytest.mark.parametrize("tokens", [1, 9, 64, 70])
def test_kernels_write_their_outputs_and_nothing_beside_them(tokens):
    from step_kernels.cuda.moe_router import CHOOSE, ONE, SUM, _partials

    x, weight, bias = inputs(tokens, device="cuda")
    weights = torch.full((tokens + 2, 8), -7.0, device="cuda")
    ids = torch.full((tokens + 2, 8), -7, dtype=torch.int32, device="cuda")
    sums = torch.full((8 * tokens + 2, 288), -7.0, device="cuda")
    if tokens == 1:
        arguments = (x, weight, bias, weights[1:], ids[1:], _partials(x.device), 288, 4096, 8, SCALE)
        ONE[288].launch((8, 18, 1), 256, *arguments)
    else:
        layer = min((n for n in SUM if n >= tokens), default=64)
        SUM[layer].launch((8, 18, -(-tokens // layer)), 256, x, weight, sums[1:], 4096, tokens, 288, 4096)
        CHOOSE[288].launch((tokens, 1, 1), 256, sums[1:], bias, weights[1:], ids[1:], 288, 8, 8, SCALE)
        logits = sums[1:-1].view(8, tokens, 288).double().sum(0)
        torch.testing.assert_close(logits, x.double() @ weight.double().mT, rtol=0, atol=1e-5)
        assert (sums[0] == -7).all() and (sums[-1] == -7).all()
    for out, wanted in zip((weights, ids), sk.moe_router(x, weight, bias, 8, SCALE)):
        assert torch.equal(out[1:-1], wanted) and (out[0] == -7).all() and (out[-1] == -7).all()


@gpu
@pytest.mark.parametrize("tokens", [1, 8, 64])
def test_a_graph_of_norms_and_routers_replays_on_new_input(tokens):
    """Each kernel is the dependent of the one ahead and reads what that has just written."""
    x, weight, bias = inputs(tokens, device="cuda")
    norm = torch.zeros(4096, device="cuda", dtype=BF16)

    def chain():
        hidden, out = x, []
        for _ in range(6):
            hidden, total = sk.add_rms_norm(hidden, x, norm, 1e-5)
            out += [hidden, *sk.moe_router(hidden, weight, bias, 8, SCALE)]
        return out

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in range(20):
        x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).to(BF16))
        graph.replay()
        wanted = chain()
        assert all(map(torch.equal, out, wanted))
    assert_routes(out[-2:], out[-3], weight, bias, 8)


@gpu
def test_streams_that_run_at_once_do_not_mix_their_sums():
    cases = [inputs(tokens, device="cuda") for tokens in (64, 1, 33)]
    wanted = [sk.moe_router(*case, 8, SCALE) for case in cases]
    streams = [torch.cuda.Stream() for _ in cases]
    torch.cuda.synchronize()
    got = [[], [], []]
    for _ in range(50):
        for stream, case, mine in zip(streams, cases, got):
            with torch.cuda.stream(stream):
                mine.append(sk.moe_router(*case, 8, SCALE))
    torch.cuda.synchronize()
    for mine, right in zip(got, wanted):
        assert all(torch.equal(a, b) for pair in mine for a, b in zip(pair, right))


@gpu
def test_opcheck_passes_on_the_gpu():
    x, weight, bias = inputs(3, device="cuda")
    torch.library.opcheck(torch.ops.step_kernels.moe_router.default, (x, weight, bias, 8, SCALE))
