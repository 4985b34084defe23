"""The Hopper kernels that round both sides to FP8: exact where nothing is rounded, else near their reference."""

from __future__ import annotations

import random

import pytest
import torch
from test_cuda_nvfp4_prefill import experts_of, poison, prepared_tensors, routing, signature

import step_kernels as sk
from step_kernels import prepared, w4a8
from step_kernels.cuda import nvfp4_w4a8
from step_kernels.ops.swiglu import swiglu
from step_kernels.testing import nvfp4_weight, relative_error

SHAPES = (
    (8192, 4096), (12288, 4096), (1024, 4096), (4096, 8192), (4096, 12288), (11264, 4096), (4096, 11264),
    (1280, 4096), (4096, 1280), (128896, 4096),
)  # fmt: skip
PLANS = tuple((name, size) for name, sizes in nvfp4_w4a8.SIZES.items() for size in sizes)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rounded_weight(codes, scales, n: int, k: int, paired: bool = False) -> torch.Tensor:
    """f64 [n, k] of one prepared weight without its global scale, as the kernels multiply it."""
    return w4a8.round_weight(*prepared.unpack(codes, scales, n, k, paired), torch.float64)


def exact_case(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """x, prepared codes and scales, and the exact bf16 product: small integers times codes, no sum beyond 13 bits."""
    x = torch.randint(-2, 3, (m, k), device="cuda").bfloat16()
    codes, _ = prepared_tensors(n=n, k=k, seed=m)
    ones = torch.full((n, k // 16), 1.0, device="cuda").to(torch.float8_e4m3fn)
    narrow = prepared.unpack(codes, prepared_tensors(n=n, k=k)[1], n, k, False)[0]
    codes, scales = prepared.pack(narrow, ones, False)
    return x, codes, scales, (x.double() @ rounded_weight(codes, scales, n, k).mT).bfloat16()


def first_difference(out, wanted) -> str:
    wrong = out != wanted
    at = wrong.nonzero()
    return f"{len(at)} of {out.numel()} differ, first {at[0].tolist()}, last {at[-1].tolist()}" if len(at) else "none"


def assert_near(out, wanted, spread) -> None:
    """Within bf16's rounding and the short sums' truncation, of which a model with 13 bits takes a quarter."""
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} elements are not finite"
    wrong = (out.double() - wanted).abs() > wanted.abs() / 256 + 3e-3 * spread
    assert not wrong.any(), f"{wrong.sum()} of {out.numel()} wrong, first {wrong.nonzero()[0].tolist()}"
    got = relative_error(out, wanted)
    assert got < 0.012, f"relative error {got:.2e}"


def assert_linear_near(out, x, codes, scales, outer, n: int) -> None:
    a, b = w4a8.round_activations(x.double()), rounded_weight(codes, scales, n, x.shape[1])
    assert_near(out, (a @ b.mT) * outer, (a.abs().float() @ b.abs().float().mT) * outer.abs())


def test_launchers_pack_the_parameters_of_their_kernels():
    quantize = nvfp4_w4a8.QUANTIZE
    assert quantize._layout.format == signature(quantize.source.stem, quantize.symbol)
    for kind, kernels in (("false", nvfp4_w4a8.PLAIN), ("true", nvfp4_w4a8.PAIRED)):
        for name, kernel in kernels.items():
            assert kernel._layout.format == signature(kernel.source.stem, "name")
            sizes = ", ".join(map(str, nvfp4_w4a8.SIZES[name]))
            assert f"PRODUCT({kernel.symbol}, {kind}, {sizes})" in kernel.source.read_text()


@pytest.mark.parametrize("n, k", SHAPES)
def test_many_dense_tokens_take_the_largest_tiles(n, k):
    # of 1280 rows as many waves as of 256 tokens, and shorter ones
    assert nvfp4_w4a8.dense_plan(8192, -(-n // 64), k // 64, 132) == ("256", 224 if n == 1280 else 256)


@pytest.mark.parametrize(
    "mean, name", [(16, "128"), (57, "128"), (114, "192"), (170, "192"), (227, "256"), (1000, "256")]
)
def test_experts_tiles_follow_their_mean_number_of_tokens(mean, name):
    assert nvfp4_w4a8.moe_kernel(mean) == name


def test_bounds_hold_the_tiles_of_any_routing():
    rng = random.Random(0)
    for sizes in nvfp4_w4a8.SIZES.values():
        for _ in range(300):
            counts = [rng.choice((0, 0, 1, 2, rng.randrange(40), rng.randrange(700))) for _ in range(12)]
            tiles, rows = 0, 0
            for tokens in filter(None, counts):
                count = -(-tokens // sizes[-1])
                tiles += count
                rows += count * next(s for s in sizes if s * count >= tokens)
            most_tiles, most_rows = nvfp4_w4a8.bounds(sum(counts), 12, sizes)
            assert tiles <= most_tiles and rows <= most_rows


# ---- rounding x ----


def restored(x8, x_scales, rows) -> torch.Tensor:
    """f64 of places `rows`: bytes 4 t + {0, 1, 2, 3} of 16 are k = 2 t + {0, 1, 8, 9}."""
    values = x8[rows].view(torch.float8_e4m3fn).float().double().unflatten(1, (-1, 4, 2, 2)).transpose(2, 3)
    return values.flatten(1) * (x_scales[rows].double() * 32)[:, None]


@pytest.mark.gpu
@pytest.mark.parametrize("k", [16, 48, 1280, 4096, 12288])
def test_rows_are_rounded_as_the_reference_rounds_them(k):
    x = torch.randn(70, k + 8, device="cuda").bfloat16()[:, :k] * torch.logspace(-36, 36, 70, device="cuda")[:, None]
    x = x.bfloat16() * torch.exp2(-torch.rand(k, device="cuda") * 20).bfloat16()
    x[3], x[4, 0], x[5, k - 1], x[6] = 0, float("inf"), float("nan"), 1.75
    wide = torch.zeros(70, k + 8, device="cuda", dtype=torch.bfloat16)
    wide[:, :k] = x
    wanted, places = w4a8.round_activations(x.double()), torch.randperm(200, device="cuda")[:140].int().view(70, 2)
    places[::7, 1] = -1
    poison(1 << 20)
    x8, x_scales = nvfp4_w4a8._quantize(wide[:, :k], 70, 70)
    torch.testing.assert_close(restored(x8, x_scales, slice(None)), wanted, rtol=0, atol=0, equal_nan=True)
    copies = nvfp4_w4a8._quantize(x, 70, 200, places, 2)
    rows = places.flatten()
    here = rows >= 0
    wanted = wanted.repeat_interleave(2, 0)[here]
    torch.testing.assert_close(restored(*copies, rows[here]), wanted, rtol=0, atol=0, equal_nan=True)
    moved = torch.zeros(200, k, device="cuda", dtype=torch.bfloat16)
    moved[rows[here]] = x.repeat_interleave(2, 0)[here]
    in_place = nvfp4_w4a8._quantize(moved, 140, 200, rows.contiguous(), 1, sorted_x=True)
    torch.testing.assert_close(restored(*in_place, rows[here]), wanted, rtol=0, atol=0, equal_nan=True)


# ---- dense ----


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 32, 33, 64, 65, 90, 128, 150, 200, 224, 250, 256, 257, 300, 513])
def test_linear_is_exact_at_every_tile_size_where_nothing_is_rounded(m, monkeypatch):
    n, k = 576, 448  # 9 blocks, the last cluster's second half empty; 7 chunks of k, of which 4 are taken at a time
    x, codes, scales, wanted = exact_case(m, n, k)
    for plan in PLANS:
        monkeypatch.setattr(nvfp4_w4a8, "dense_plan", lambda *_, plan=plan: plan)
        poison(2 * m * n)
        out = nvfp4_w4a8.launch_linear(x, codes, scales, torch.ones((), device="cuda"), n)
        assert torch.equal(out, wanted), f"{plan}: {first_difference(out, wanted)}"


@pytest.mark.gpu
@pytest.mark.parametrize("n, k", [(1, 16), (7, 48), (100, 80), (130, 272), (257, 496), (4104, 336), (64, 512)])
def test_linear_is_exact_at_sizes_that_are_no_multiple_of_a_tile(n, k):
    x, codes, scales, wanted = exact_case(333, n, k)
    out = nvfp4_w4a8.launch_linear(x, codes, scales, torch.ones((), device="cuda"), n)
    assert torch.equal(out, wanted), first_difference(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [256, 1000, 4096])
@pytest.mark.parametrize("n, k", SHAPES)
def test_linear_is_near_its_reference_at_every_shape_of_the_model(n, k, m):
    if n > 100_000 and m > 1000:
        pytest.skip("the float64 reference would take 13 GB")
    codes, scales = prepared_tensors(n=n, k=k, seed=n + k)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    outer = torch.tensor(0.37, device="cuda")
    poison(2 * m * n)
    assert_linear_near(nvfp4_w4a8.launch_linear(x, codes, scales, outer, n), x, codes, scales, outer, n)


@pytest.mark.gpu
def test_linear_takes_a_global_scale_for_each_part_and_strided_and_batched_x():
    n, k = 640, 512
    codes, scales = prepared_tensors(n=n, k=k)
    outer = torch.tensor([0.5, -3.0, 1e-9, 1e9, 2.0], device="cuda")
    wide = torch.randn(3, 140, k + 24, device="cuda", dtype=torch.bfloat16)
    for x in (wide[0, :, :k], wide[0, :, 8 : k + 8], wide[1, :, 3 : k + 3], wide[0, ::2, :k]):
        out = nvfp4_w4a8.launch_linear(x, codes, scales, outer, n)
        for part, columns in enumerate(out.split(n // 5, 1)):
            rows = slice(part * 2, part * 2 + 2)  # 128 rows: two blocks
            assert_linear_near(columns, x, codes[rows], scales[rows], outer[part], n // 5)
    out = nvfp4_w4a8.launch_linear(wide[..., :k], codes, scales, outer[:1], n)
    assert out.shape == (3, 140, n) and out.is_contiguous()
    assert_linear_near(out.flatten(0, 1), wide[..., :k].flatten(0, 1), codes, scales, outer[0], n)
    assert nvfp4_w4a8.launch_linear(wide[0, :0, :k], codes, scales, outer, n).shape == (0, n)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["largest", "zero scales", "smallest scales", "tiny global", "huge global"])
def test_linear_is_near_its_reference_at_the_ends_of_the_format(case):
    n, k, m = 320, 1024, 300
    ends = {"largest": (126, 127), "zero scales": (0, 2), "smallest scales": (1, 30)}
    codes, scales = prepared_tensors(n=n, k=k, scales=ends.get(case, (0, 127)))
    if case == "largest":
        codes = codes | 0b01111110  # 6 or -6 everywhere
    outer = torch.tensor({"tiny global": 1e-38, "huge global": 1e30}.get(case, 1.0), device="cuda")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    if case == "tiny global":
        x *= 1e20
    out = nvfp4_w4a8.launch_linear(x, codes, scales, outer, n)
    if case == "zero scales":  # and 2^-9: every product is less than half of 2^-6, or 6 * 2^-9, which rounds to it
        assert out.any()
    assert_linear_near(out, x, codes, scales, outer, n)


@pytest.mark.gpu
def test_a_token_that_is_not_finite_gives_nan_and_a_zero_token_zeros_alone():
    codes, scales = prepared_tensors(n=256, k=512, scales=(40, 90))
    x = torch.randn(300, 512, device="cuda", dtype=torch.bfloat16)
    one = torch.ones((), device="cuda")
    clean = nvfp4_w4a8.launch_linear(x, codes, scales, one, 256)
    x[7, 100], x[50, 3], x[260] = float("nan"), float("inf"), 0
    out = nvfp4_w4a8.launch_linear(x, codes, scales, one, 256)
    others = [i for i in range(300) if i not in (7, 50, 260)]
    assert out[[7, 50]].isnan().all() and not out[260].any() and torch.equal(out[others], clean[others])


# ---- experts ----


def moe_reference(x, weights, ids, gate_up, down, inner, limit):
    """f64 [tokens, hidden] of rounded products; what lies between them is rounded to bf16, then to FP8."""
    hidden, total = x.shape[1], torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    rounded = w4a8.round_activations(x.double())
    for e in range(len(gate_up[0])):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        w = rounded_weight(gate_up[0][e], gate_up[1][e], 2 * inner, hidden, True)
        outer = gate_up[2][e].double().expand(2).repeat_interleave(inner)
        middle = w4a8.round_activations(swiglu.reference((rounded[token] @ w.mT) * outer, limit).bfloat16().double())
        parts = (middle @ rounded_weight(down[0][e], down[1][e], hidden, inner).mT) * down[2][e].double()
        total.index_add_(0, token, parts * weights[token, slot, None].double())
    return total


def moe(x, weights, ids, gate_up, down, limit):
    return nvfp4_w4a8.launch_moe(x, weights, ids, *gate_up, *down, limit)


def assert_moe_near(out, wanted) -> None:
    """The short sums move some values between the products to a neighbour in bf16 and FP8: about 1 % of a token."""
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} elements are not finite"
    got = relative_error(out, wanted)
    assert got < 0.03, f"relative error {got:.2e}"
    rows = (out.double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    assert rows.max() < 0.1, f"token {rows.argmax().item()} is off by {rows.max():.3g}, of {len(rows)}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", nvfp4_w4a8.SIZES)
@pytest.mark.parametrize("kind", ["random", "zipf", "one expert", "elsewhere", "none"])
@pytest.mark.parametrize("tokens, inner, parts, limit", [(17, 1280, 1, None), (1700, 320, 2, 7.0), (333, 160, 2, 0.3)])
def test_moe_is_near_the_routed_sum_of_rounded_products(tokens, inner, parts, limit, kind, name, monkeypatch):
    monkeypatch.setattr(nvfp4_w4a8, "moe_kernel", lambda _: name)
    gate_up, down = experts_of(24, 512, inner, parts)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing(kind, tokens, 24, 4), torch.rand(tokens, 4, device="cuda")
    wanted = moe_reference(x, weights, ids, gate_up, down, inner, limit)
    poison(1 << 28)
    out = moe(x, weights, ids, gate_up, down, limit)
    if kind == "none":
        assert (out == 0).all()
    else:
        assert_moe_near(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, kind", [(1024, "random"), (4096, "zipf"), (8192, "random")])
def test_moe_is_near_the_routed_sum_at_the_models_size(tokens, kind):
    gate_up, down = experts_of(288, 4096, 1280, 2)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing(kind, tokens, 288, 8), torch.rand(tokens, 8).cuda()
    poison(1 << 31)
    out = moe(x, weights, ids, gate_up, down, 7.0)
    assert_moe_near(out, moe_reference(x, weights, ids, gate_up, down, 1280, 7.0))


@pytest.mark.gpu
def test_a_token_that_is_not_finite_makes_no_other_token_so():
    gate_up, down = experts_of(8, 256, 128, 2)
    x = torch.randn(200, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing("random", 200, 8, 2), torch.rand(200, 2, device="cuda")
    clean = moe(x, weights, ids, gate_up, down, 7.0)
    x[5, 9], x[77, 200] = float("nan"), float("-inf")
    out = moe(x, weights, ids, gate_up, down, 7.0)
    others = [i for i in range(200) if i not in (5, 77)]
    assert out[[5, 77]].isnan().all() and torch.equal(out[others], clean[others])


@pytest.mark.gpu
def test_moe_in_parts_equals_moe_at_once(monkeypatch):
    gate_up, down = experts_of(16, 256, 64, 1)
    x = torch.randn(500, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing("random", 500, 16, 4), torch.rand(500, 4, device="cuda")
    wanted = moe(x, weights, ids, gate_up, down, None)
    monkeypatch.setattr(nvfp4_w4a8, "_LARGEST", 2 * 4 * 256 * 123)  # 123 tokens a part
    assert torch.equal(moe(x, weights, ids, gate_up, down, None), wanted)


@pytest.mark.gpu
def test_kernels_give_the_same_bits_on_every_run_and_in_a_graph_on_new_inputs():
    gate_up, down = experts_of(32, 1024, 320, 2)
    codes, scales = prepared_tensors(n=1024, k=1024)
    x = torch.randn(2000, 1024, device="cuda", dtype=torch.bfloat16)
    ids, weights, one = routing("zipf", 2000, 32, 6), torch.rand(2000, 6, device="cuda"), torch.ones((), device="cuda")

    def both():
        dense = [nvfp4_w4a8.launch_linear(x[:m], codes, scales, one, 1024) for m in (2000, 600, 300)]
        return moe(x, weights, ids, gate_up, down, 7.0), *dense

    first = both()
    for _ in range(5):
        poison(1 << 28)
        assert all(map(torch.equal, both(), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    x.copy_(x.flip(0))
    ids.copy_(routing("one expert", 2000, 32, 6))
    graph.replay()
    assert all(map(torch.equal, captured, both()))


@pytest.mark.gpu
def test_the_ops_round_to_fp8_where_the_environment_allows_it_and_not_elsewhere(monkeypatch):
    tokens, rows = nvfp4_w4a8.FEWEST_TOKENS, nvfp4_w4a8.FEWEST_ROWS
    weight = nvfp4_weight(rows, 512, device="cuda")
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    wanted = x.double() @ weight.dequantize(torch.float64).mT
    ready, moved = sk.nvfp4_prepare(weight), []
    for value in ("0", "1"):
        monkeypatch.setenv("STEP_KERNELS_W4A8", value)
        moved.append(relative_error(sk.nvfp4_linear(x, ready), wanted))
    assert moved[0] < 3e-3 and 0.025 < moved[1] < 0.045
