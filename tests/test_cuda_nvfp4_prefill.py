"""The Hopper kernels for many tokens against float64, over the model's shapes, every tile size and unkind routing."""

from __future__ import annotations

import random
import re

import pytest
import torch

from step_kernels import nvfp4, prepared
from step_kernels.cuda import driver
from step_kernels.ops.swiglu import swiglu
from step_kernels.testing import relative_error

prefill = pytest.importorskip("step_kernels.cuda.nvfp4_prefill")

SHAPES = (
    (8192, 4096), (12288, 4096), (1024, 4096), (64, 4096), (96, 4096), (4096, 8192), (4096, 12288), (11264, 4096),
    (4096, 11264), (1280, 4096), (4096, 1280), (128896, 4096),
)  # fmt: skip


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def prepared_tensors(*lead: int, n: int, k: int, paired: bool = False, seed: int = 0, scales: tuple = (0, 127)):
    """Random prepared codes and scales; the scales' e4m3 bytes from a range, 0 (zero) and 126 (448) included."""
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = (*lead, *prepared.tiles(n, k, paired))
    codes = torch.randint(0, 256, (*shape, 2048), dtype=torch.uint8, device="cuda", generator=generator)
    narrow = torch.randint(*scales, (*shape, 64, 2, 2), device="cuda", generator=generator)
    wide = [prepared._to_e5m3(bias).cuda()[narrow[..., i, :]] for i, bias in enumerate((18, 10))]
    return codes, torch.stack(wide, -2).flatten(-3).contiguous()


def dense(codes, scales, n: int, k: int, paired: bool = False) -> torch.Tensor:
    """f64 [n, k] of one prepared weight without its global scale."""
    checkpoint = prepared.unpack(codes, scales, n, k, paired)
    return nvfp4.dequantize(*checkpoint, torch.ones((), device="cuda"), torch.float64).view(n, k)


def poison(size: int) -> None:
    """Fill memory that the next allocations get with NaN."""
    torch.full((size // 2,), float("nan"), dtype=torch.bfloat16, device="cuda")


def assert_rounded_once(out, x, w, outer, kernel: str = "") -> None:
    """Every element is within bf16's rounding and the summation's of the exact product.

    Sums are f32; those of 32 FP8 products, in the tensor cores, keep 13 bits below the largest product.
    """
    summed = 3e-4 if kernel.startswith("halves_") else 2e-5
    wanted = (x.double() @ w.mT) * outer
    spread = (x.abs().float() @ w.abs().float().mT) * outer.abs()
    wrong = (out.double() - wanted).abs() > wanted.abs() / 256 + summed * spread
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} elements are not finite, first {_first(~out.isfinite())}"
    assert not wrong.any(), f"{wrong.sum()} of {out.numel()} wrong, first {_first(wrong)}, last {_last(wrong)}"
    assert relative_error(out, wanted) < 1.05 * relative_error(wanted.bfloat16(), wanted) + summed


def _first(mask):
    return mask.nonzero()[0].tolist()


def _last(mask):
    return mask.nonzero()[-1].tolist()


def signature(source: str, symbol: str) -> str:
    """The struct codes of a kernel's parameters, read off its source; a tensor map is 16 q."""
    text = re.sub(r"//[^\n]*|\\\n", "", (driver.CSRC / f"{source}.cu").read_text())
    names = re.search(rf"\b{symbol}\((.*?)\)\s*\{{", text, re.DOTALL)[1].split(",")
    kinds = {"long long": "q", "int": "i", "u32": "I", "float": "f", "TensorMap": 16 * "q", "Maps": 32 * "q"}
    return "".join("P" if "*" in n else next(c for k, c in kinds.items() if re.search(rf"\b{k}\b", n)) for n in names)


def test_launchers_pack_the_parameters_of_their_kernels():
    for kernel in (prefill.COUNT, prefill.SORT, prefill.GATHER, prefill.HALVES, prefill.COMBINE, prefill.SUM):
        assert kernel._layout.format == signature(kernel.source.stem, kernel.symbol)
    for kernel in (*prefill.PLAIN.values(), *prefill.PAIRED.values()):
        assert kernel._layout.format == signature(kernel.source.stem, "name")
        assert f"PRODUCT({kernel.symbol}," in kernel.source.read_text()


def test_bounds_hold_the_tiles_of_any_routing():
    rng = random.Random(0)
    for sizes in prefill.SIZES.values():
        largest = sizes[-1]
        for _ in range(300):
            counts = [rng.choice((0, 0, 1, 2, rng.randrange(40), rng.randrange(700))) for _ in range(12)]
            tiles, rows = 0, 0
            for tokens in filter(None, counts):
                count = -(-tokens // largest)
                tiles += count
                rows += count * next(s for s in sizes if s * count >= tokens)
            most_tiles, most_rows = prefill.bounds(sum(counts), 12, sizes)
            assert tiles <= most_tiles and rows <= most_rows


@pytest.mark.parametrize("sizes", [*prefill.SIZES.values(), (128, 192), (128, 224, 256)], ids=str)
def test_size_bits_tell_the_smallest_size_that_holds_a_tile_as_the_kernel_asks_them(sizes):
    bits = prefill.size_bits(sizes)
    assert 8 * bits.bit_length() == sizes[-1] and bits < 1 << 32
    for tokens in range(1, sizes[-1] + 1):
        eighth = (tokens - 1) // 8
        above = bits >> eighth
        assert 8 * (eighth + (above & -above).bit_length()) == next(s for s in sizes if s >= tokens)


def plan(tokens: int, n: int, k: int) -> tuple[str, int, int]:
    return prefill.dense_plan(tokens, -(-n // 64), -(-k // 64), 132)


@pytest.mark.parametrize(
    "n, k, tokens",
    [(8192, 4096, 1024), (8192, 4096, 8192), (4096, 1280, 1024), (4096, 1280, 8192), (4096, 8192, 8192),
     (4096, 12288, 8192), (1024, 4096, 8192), (128896, 4096, 1024)],
)  # fmt: skip
def test_many_dense_tokens_take_the_tiles_measured_fastest(n, k, tokens):
    assert plan(tokens, n, k) == ("many", 256, 1)


@pytest.mark.parametrize("n, k", [(8192, 4096), (4096, 8192), (1024, 4096), (4096, 12288), (4096, 1280)])
def test_few_dense_tokens_split_k_until_most_of_the_machine_works(n, k):
    for tokens in (17, 64):
        name, size, splits = plan(tokens, n, k)
        assert name == "few_64" and 40 <= -(-tokens // size) * -(-n // 256) * splits <= 132


def test_splits_of_k_are_whole_steps_and_none_is_empty():
    for tokens in (1, 17, 100, 129, 300):
        for n, k in (*SHAPES, (64, 64), (576, 448), (7, 80)):
            chunks, (_, _, splits) = -(-k // 64), plan(tokens, n, k)
            steps = -(-chunks // prefill.STEP)
            each = -(-steps // splits)
            assert (splits - 1) * each < steps <= splits * each


@pytest.mark.parametrize("mean, name", [(7, "halves_32"), (28, "halves_48"), (227, "many"), (1000, "many")])
def test_experts_tiles_follow_their_mean_number_of_tokens(mean, name):
    assert prefill.moe_kernel(mean) == name


@pytest.mark.gpu
@pytest.mark.parametrize("m", [17, 64, 128, 129, 1000, 4096])
@pytest.mark.parametrize("n, k", SHAPES)
def test_linear_is_rounded_once_at_every_shape_of_the_model(n, k, m):
    if n > 100_000 and m > 1000:
        pytest.skip("the float64 reference would take 13 GB")
    codes, scales = prepared_tensors(n=n, k=k, seed=n + k)
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    outer = torch.tensor(0.37, device="cuda")
    poison(2 * m * n)
    assert_rounded_once(prefill.linear(x, codes, scales, outer, n), x, dense(codes, scales, n, k), outer)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 9, 32, 33, 48, 64, 65, 90, 128, 150, 200, 224, 250, 256, 257, 300, 513])
def test_linear_is_rounded_once_at_every_tile_size(m, monkeypatch):
    n, k = 576, 448  # 9 blocks, the last cluster's second half empty; 7 chunks of k
    codes, scales = prepared_tensors(n=n, k=k, seed=m)
    w, x = dense(codes, scales, n, k), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    outer = torch.tensor(1.0, device="cuda")
    plans = [(name, size, 1) for name, sizes in prefill.SIZES.items() for size in sizes]
    splittable = [(name, size) for name, size, _ in plans if name != "many" and (size % 32 == 0 or m <= size)]
    plans += [(*plan, splits) for plan in splittable for splits in (2, 4)]
    for plan in plans:
        monkeypatch.setattr(prefill, "dense_plan", lambda *_, plan=plan: plan)
        poison(2 * m * n)
        out = prefill.linear(x, codes, scales, outer, n)
        try:
            assert_rounded_once(out, x, w, outer, plan[0])
        except AssertionError as error:
            raise AssertionError(f"{plan}: {error}") from None


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["", "halves_32", "halves_48"])
@pytest.mark.parametrize("n, k", [(1, 16), (7, 48), (100, 80), (130, 4112), (257, 1040), (4104, 336)])
def test_linear_takes_sizes_that_are_no_multiple_of_a_tile(n, k, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(prefill, "dense_plan", lambda *_: (kernel, 24, 1))
    codes, scales = prepared_tensors(n=n, k=k)
    x = torch.randn(77, k, device="cuda", dtype=torch.bfloat16)
    outer = torch.tensor(2.5, device="cuda")
    around = torch.full((77 * n + 64,), 7.0, device="cuda", dtype=torch.bfloat16)
    out = prefill.linear(x, codes, scales, outer, n)
    assert_rounded_once(out, x, dense(codes, scales, n, k), outer, kernel)
    assert (around == 7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("n, k, m", [(130, 4112, 77), (1024, 4096, 64), (4096, 8192, 200)])
@pytest.mark.parametrize("name, size", [("halves_32", 32), ("few_64", 64), ("few_96", 96), ("few_128", 128)])
def test_splits_of_k_sum_in_their_order_to_the_product(name, size, n, k, m, monkeypatch):
    codes, scales = prepared_tensors(n=n, k=k)
    w, x = dense(codes, scales, n, k), torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    outer = torch.tensor([0.5, -3.0], device="cuda")
    for splits in (1, 3, 11):
        plan = name, size, splits
        monkeypatch.setattr(prefill, "dense_plan", lambda *_, plan=plan: plan)
        poison(64 * m * n)
        out = prefill.linear(x, codes, scales, outer, n)
        assert_rounded_once(out, x, w, outer.repeat_interleave(n // 2), name)
        poison(64 * m * n)
        assert torch.equal(prefill.linear(x, codes, scales, outer, n), out)


@pytest.mark.gpu
def test_linear_takes_a_global_scale_for_each_part_and_strided_and_batched_x():
    n, k = 640, 512
    codes, scales = prepared_tensors(n=n, k=k)
    w, outer = dense(codes, scales, n, k), torch.tensor([0.5, -3.0, 1e-9, 1e9, 2.0], device="cuda")
    wide = torch.randn(3, 40, k + 24, device="cuda", dtype=torch.bfloat16)
    for x in (wide[0, :, :k], wide[0, :, 8 : k + 8], wide[1, :, 3 : k + 3], wide[0, ::2, :k]):
        out = prefill.linear(x, codes, scales, outer, n)
        assert_rounded_once(out, x, w, outer.repeat_interleave(n // 5))
    out = prefill.linear(wide[..., :k], codes, scales, outer[:1], n)
    assert out.shape == (3, 40, n)
    assert_rounded_once(out.flatten(0, 1), wide[..., :k].flatten(0, 1), w, outer[:1])
    assert prefill.linear(wide[0, :0, :k], codes, scales, outer, n).shape == (0, n)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["", "halves_32"])
@pytest.mark.parametrize("case", ["largest", "zero scales", "smallest scales", "tiny global", "huge global"])
def test_linear_is_exact_to_rounding_at_the_ends_of_the_format(case, kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(prefill, "dense_plan", lambda *_: (kernel, 32, 1))
    n, k, m = 320, 1024, 200
    ends = {"largest": (126, 127), "zero scales": (0, 2), "smallest scales": (1, 9)}
    codes, scales = prepared_tensors(n=n, k=k, scales=ends.get(case, (0, 127)))
    if case == "largest":
        codes = codes | 0b01111110  # 6 or -6 everywhere
    outer = torch.tensor({"tiny global": 1e-38, "huge global": 1e30}.get(case, 1.0), device="cuda")
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    if case == "tiny global":
        x *= 1e20
    assert_rounded_once(prefill.linear(x, codes, scales, outer, n), x, dense(codes, scales, n, k), outer, kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["", "halves_32"])
def test_linear_passes_nan_and_infinity_of_a_token_to_that_token_alone(kernel, monkeypatch):
    if kernel:
        monkeypatch.setattr(prefill, "dense_plan", lambda *_: (kernel, 24, 1))
    codes, scales = prepared_tensors(n=256, k=512, scales=(40, 90))
    x = torch.randn(100, 512, device="cuda", dtype=torch.bfloat16)
    clean = prefill.linear(x, codes, scales, torch.ones((), device="cuda"), 256)
    x[7, 100], x[50, 3] = float("nan"), float("inf")
    out = prefill.linear(x, codes, scales, torch.ones((), device="cuda"), 256)
    others = [i for i in range(100) if i not in (7, 50)]
    assert out[7].isnan().all() and not out[50].isfinite().any() and torch.equal(out[others], clean[others])


def as_float(halves: torch.Tensor) -> torch.Tensor:
    """FP8 halves [steps, groups, 4096] -> f64 [8 * groups, 256 * steps], hi + lo."""
    steps, groups, _ = halves.shape
    rows = halves.view(torch.float8_e4m3fn).double().view(steps, groups, 4, 8, 8, 16)
    row, unit = torch.arange(8).view(8, 1), torch.arange(8)
    rows = rows[:, :, :, row, unit ^ row]  # as the copy engine's swizzle of 128 bytes
    both = rows.unflatten(4, (4, 2)).sum(5)  # step, group, chunk, row, block of 16 k, byte
    k = [2 * (i // 4) + i % 4 // 2 + i % 2 * 8 for i in range(16)]
    return both[..., torch.tensor(k).argsort()].permute(1, 3, 0, 2, 4, 5).reshape(groups * 8, steps * 256)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [16, 448, 1280, 4096])
def test_halves_are_exact_down_to_a_512th_of_their_rows_largest_and_close_below(k):
    x = torch.randn(21, k, device="cuda", dtype=torch.bfloat16) * 2.0 ** torch.randint(-60, 61, (21, 1), device="cuda")
    x[:, ::3] *= 2.0**-10
    x = x.bfloat16()
    position = torch.randperm(64, device="cuda")[:42].view(21, 2).int()
    position[4, 1] = -1
    halves, factors, groups = prefill._halves(x, position, 64, 2)
    assert groups == 8
    got = as_float(halves) * factors.double()[:, None] / 8
    for slot in range(2):
        here = position[:, slot] >= 0
        rows, wanted = got[position[here, slot]], x[here].double()
        largest = wanted.abs().amax(1, keepdim=True)
        error = (rows[:, :k] - wanted).abs()
        assert (error <= largest * 2.0**-17).all(), f"off by {(error / largest).max():.3g} of the row's largest"
        assert (error[wanted.abs() >= largest / 512] == 0).all()
        assert (rows[:, k:] == 0).all()


# ---- experts ----


def routing(kind: str, tokens: int, experts: int, top_k: int, seed: int = 0) -> torch.Tensor:
    """i32 [tokens, top_k], a token's distinct unless all go to one expert."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "one expert":
        return torch.full((tokens, top_k), experts // 2, dtype=torch.int32, device="cuda")
    if kind == "none":
        return torch.full((tokens, top_k), -1, dtype=torch.int32, device="cuda")
    logits = -torch.rand(tokens, experts, generator=generator).log()  # exponential races: p proportional to weight
    weight = (1 + torch.randperm(experts, generator=generator)) ** (-1.2 if kind == "zipf" else 0.0)
    ids = (logits / weight).topk(top_k, largest=False).indices.int()
    if kind == "elsewhere":
        ids[::2] += experts // 2  # half of these belong to another rank
        ids[1::3, 0] = -1
    return ids.cuda()


def moe_reference(x, weights, ids, gate_up, down, inner, limit):
    """f64 [tokens, hidden]; nothing rounded in between."""
    hidden, total = x.shape[1], torch.zeros(x.shape, dtype=torch.float64, device="cuda")
    for e in range(len(gate_up[0])):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            continue
        w = dense(gate_up[0][e], gate_up[1][e], 2 * inner, hidden, True)
        outer = gate_up[2][e].double().expand(2).repeat_interleave(inner)
        middle = swiglu.reference((x[token].double() @ w.mT) * outer, limit)
        parts = (middle @ dense(down[0][e], down[1][e], hidden, inner).mT) * down[2][e].double()
        total.index_add_(0, token, parts * weights[token, slot, None].double())
    return total


def experts_of(count: int, hidden: int, inner: int, parts: int):
    """Prepared experts whose results are of order one."""
    scales = (40, 64)  # 0.25 to 1.9
    gate_up = prepared_tensors(count, n=2 * inner, k=hidden, paired=True, scales=scales)
    down = prepared_tensors(count, n=hidden, k=inner, seed=1, scales=scales)
    shape = (count, 2) if parts == 2 else (count,)
    outer = torch.rand(shape, device="cuda") * 0.5 * hidden**-0.5 + 0.2 * hidden**-0.5
    return (*gate_up, outer), (*down, (torch.rand(count, device="cuda") + 0.5) * inner**-0.5)


def assert_moe_close(out, wanted):
    assert out.isfinite().all(), f"{(~out.isfinite()).sum()} elements are not finite, first {_first(~out.isfinite())}"
    allowed = 2 * relative_error(wanted.bfloat16(), wanted) + torch.finfo(torch.bfloat16).eps / 2
    assert relative_error(out, wanted) <= allowed
    rows = (out.double() - wanted).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-30)
    assert rows.max() < 0.012, f"token {rows.argmax().item()} is off by {rows.max():.3g}, of {len(rows)}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["random", "zipf", "one expert", "elsewhere", "none"])
@pytest.mark.parametrize("tokens, top_k", [(1, 1), (1023, 8), (1024, 8), (1100, 8), (5000, 7), (20000, 8)])
@pytest.mark.parametrize("sizes", [prefill.SIZES["many"], prefill.SIZES["halves_48"], (128, 192)], ids=str)
def test_sort_gives_every_pair_a_row_of_its_own_in_its_experts_tiles(tokens, top_k, kind, sizes):
    experts, ids = 36, routing(kind, tokens, 36, top_k)
    tiles, rows = prefill.bounds(ids.numel(), experts, sizes)
    position, table, count = prefill.sort(ids, experts, sizes, tiles)
    wanted, row = [], 0
    for expert, pairs in enumerate(ids[(ids >= 0) & (ids < experts)].bincount(minlength=experts).tolist()):
        parts = -(-pairs // sizes[-1])
        size = next(s for s in sizes if s * parts >= pairs) if pairs else 0
        wanted += [[expert, row + i * size, size, 0] for i in range(parts)]
        row += parts * size
    wanted.sort(key=lambda tile: (-tile[2], tile[0], tile[1]))
    assert count.item() == len(wanted) <= tiles and table[: len(wanted)].tolist() == wanted and row <= rows
    owner = torch.full((rows,), -1, dtype=torch.int32, device="cuda")
    for expert, first, size, _ in wanted:
        owner[first : first + size] = expert
    here = (ids >= 0) & (ids < experts)
    assert (position[~here] == -1).all()
    assert torch.equal(owner[position[here]], ids[here]) and len(position[here].unique()) == here.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("name", prefill.SIZES)
@pytest.mark.parametrize("kind", ["random", "zipf", "one expert", "elsewhere", "none"])
@pytest.mark.parametrize("tokens, inner, parts, limit", [(17, 1280, 1, None), (700, 320, 2, 7.0), (333, 160, 2, 0.3)])
def test_moe_is_the_routed_sum(tokens, inner, parts, limit, kind, name, monkeypatch):
    monkeypatch.setattr(prefill, "moe_kernel", lambda _: name)
    gate_up, down = experts_of(24, 512, inner, parts)
    x = torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing(kind, tokens, 24, 4), torch.rand(tokens, 4, device="cuda")
    wanted = moe_reference(x, weights, ids, gate_up, down, inner, limit)
    poison(1 << 28)
    out = prefill.moe(x, weights, ids, gate_up, down, inner, limit)
    if kind == "none":
        assert (out == 0).all()
    else:
        assert_moe_close(out, wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [65, 1024, 2048, 4096, 8192])
def test_moe_is_the_routed_sum_at_the_models_size(tokens):
    gate_up, down = experts_of(288, 4096, 1280, 2)
    x = torch.randn(tokens, 4096, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing("zipf" if tokens == 4096 else "random", tokens, 288, 8), torch.rand(tokens, 8).cuda()
    poison(1 << 31)
    out = prefill.moe(x, weights, ids, gate_up, down, 1280, 7.0)
    assert_moe_close(out, moe_reference(x, weights, ids, gate_up, down, 1280, 7.0))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["halves_32", "few_64", "many"])
def test_moe_in_parts_equals_moe_at_once(name, monkeypatch):
    monkeypatch.setattr(prefill, "moe_kernel", lambda _: name)
    gate_up, down = experts_of(16, 256, 64, 1)
    x = torch.randn(500, 256, device="cuda", dtype=torch.bfloat16)
    ids, weights = routing("random", 500, 16, 4), torch.rand(500, 4, device="cuda")
    wanted = prefill.moe(x, weights, ids, gate_up, down, 64, None)
    monkeypatch.setattr(prefill, "_LARGEST", 2 * 4 * 256 * 123)  # 123 tokens a part
    assert torch.equal(prefill.moe(x, weights, ids, gate_up, down, 64, None), wanted)


@pytest.mark.gpu
def test_kernels_give_the_same_bits_on_every_run_and_in_a_graph_on_new_inputs():
    gate_up, down = experts_of(32, 1024, 320, 2)
    codes, scales = prepared_tensors(n=1024, k=1024)
    x = torch.randn(2000, 1024, device="cuda", dtype=torch.bfloat16)
    ids, weights, one = routing("zipf", 2000, 32, 6), torch.rand(2000, 6, device="cuda"), torch.ones((), device="cuda")

    def both():
        dense = [prefill.linear(x[:m], codes, scales, one, 1024) for m in (2000, 600, 64, 17)]  # the last in splits
        return prefill.moe(x, weights, ids, gate_up, down, 320, 7.0), *dense

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
