"""The nvfp4_gptq op: what a block's choice is among, whom it changes, and the specification's bits from the kernel."""

from __future__ import annotations

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4, registry
from step_kernels.ops.nvfp4_gptq import OFFSETS

gpu = pytest.mark.gpu
OP = torch.ops.step_kernels.nvfp4_gptq.default


def inputs(*shape: int, size: float = 1.0, begun: bool = False, seed: int = 0) -> list[torch.Tensor]:
    """The op's arguments for [..., n, k]: Gaussian weights of a `size`, the factor of uneven inputs that lean on their
    neighbours, and products as large as errors make them; with `begun` some choices made before."""
    *lead, n, k = shape
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g) * size
    x = torch.randn(*lead, 3 * k, k, generator=g) * torch.exp(torch.randn(k, generator=g))
    x = x + 0.7 * x.roll(1, -1)
    factor = torch.linalg.cholesky((x.mT @ x).flip(-2, -1)).flip(-2, -1).mT
    noise = 0.1 * torch.randn(2, *shape, generator=g) * size * factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
    products = noise[0]
    errors, scales = torch.zeros(shape), torch.zeros(*lead, n, k // 16, dtype=torch.uint8)
    if begun:
        op(w, factor, products, errors, scales)
        products = products + errors @ factor.mT + 0.2 * noise[1]
        scales *= (torch.rand(scales.shape, generator=g) > 0.1).to(torch.uint8)
    return [w, factor, products, errors, scales]


def op(w, factor, products, errors, scales):
    """The op in place; gives what it changes."""
    sk.nvfp4_gptq(w, factor, products, errors, scales)
    return errors, scales


def copied(arguments, device="cpu"):
    return [t.to(device, copy=True) for t in arguments]


def assert_on_the_grid(w, errors, scales):
    """w + errors are e2m1 values of their block's scale."""
    steps = (w + errors).unflatten(-1, (-1, 16)) / scales.view(torch.float8_e4m3fn).float()[..., None]
    assert torch.allclose(steps, nvfp4.e2m1_round(steps), atol=1e-5)


def test_values_are_the_formats_and_no_products_change():
    arguments = inputs(2, 9, 64)
    before = copied(arguments)
    errors, scales = op(*arguments)
    assert_on_the_grid(arguments[0], errors, scales)
    assert all(torch.equal(a, b) for a, b in zip(arguments[:3], before))


def test_of_the_scales_around_that_of_the_largest_the_one_with_the_least_error_is_taken():
    """Without correlation and products a column's loss is its error, and its value the nearest."""
    w = torch.randn(300, 16, generator=torch.Generator().manual_seed(1)) * 3
    errors, scales = op(w, torch.eye(16), torch.zeros_like(w), torch.zeros_like(w), w.new_zeros(300, 1).byte())
    first = nvfp4.search_scales(w, torch.tensor(1.0)).view(torch.uint8).int()
    every = []
    for offset in OFFSETS:
        scale = (first + offset).byte().view(torch.float8_e4m3fn).float()
        every.append((nvfp4.e2m1_round(w / scale) * scale - w).square().sum(1))
    assert torch.allclose(errors.square().sum(1), torch.stack(every).amin(0))
    assert len((scales.int() - first).unique()) > 6


def test_a_column_is_rounded_where_those_before_it_have_moved_the_least():
    """In f64, with the scale that was chosen: each column's remaining product as small as a grid value can make it."""
    w, factor, products, *rest = inputs(200, 16)
    errors, scales = op(w, factor, products, *rest)
    scale = scales.view(torch.float8_e4m3fn).double()[:, 0]
    wanted, lower = torch.zeros(200, 16).double(), factor.double()
    for j in range(16):
        left = products[:, j].double() + (wanted[:, :j] - w[:, :j].double()) @ lower[j, :j]
        target = (w[:, j].double() - left / lower[j, j]) / scale
        wanted[:, j] = nvfp4.e2m1_decode(nvfp4.e2m1_encode(target)).double() * scale
    same = (w + errors).double().isclose(wanted, rtol=1e-6, atol=1e-9)
    assert same.all(1).float().mean() > 0.99  # a tie may fall to either side in f32


def test_a_block_that_has_a_scale_changes_only_where_its_loss_falls():
    w, factor, products, errors, scales = arguments = inputs(3, 50, 16, begun=True)
    old_errors, old_scales = errors.clone(), scales.clone()
    op(*arguments)
    changed = errors - old_errors
    before, after = (t.square().sum(-1) for t in (products, products + changed @ factor.mT))
    kept, none = (changed == 0).all(-1), old_scales[..., 0] == 0
    assert torch.equal(scales[..., 0][kept & ~none], old_scales[..., 0][kept & ~none])
    assert (after[~none] <= before[~none] * 1.0001).all() and 0.1 < kept[~none].float().mean() < 0.9
    assert (scales > 0).all() and (after[none] > before[none]).any()


def test_blocks_behind_see_what_the_ones_before_have_changed():
    """All at once is each alone with its products brought up to date."""
    w, factor, products, errors, scales = arguments = inputs(40, 80, begun=True)
    alone = copied(arguments)
    op(*arguments)
    for i in range(5):
        own = slice(16 * i, 16 * i + 16)
        since = (alone[3] - copied(inputs(40, 80, begun=True))[3])[:, : 16 * i]
        seen = products[:, own] + since @ factor[own, : 16 * i].T
        op(w[:, own], factor[own, own], seen, alone[3][:, own], alone[4][:, i : i + 1])
    assert (alone[4] == scales).float().mean() > 0.99  # near ties may fall to either side
    assert (alone[3] == errors).all(1).float().mean() > 0.95


def test_zero_rows_get_zeros_and_a_scale_of_1():
    w, factor, products, errors, scales = inputs(6, 48)
    w[::2], products[::2] = 0, 0
    op(w, factor, products, errors, scales)
    assert (errors[::2] == 0).all() and (scales[::2] == 0x38).all() and (errors[1::2] != 0).any()


def test_rows_do_not_depend_on_how_many_there_are():
    arguments = inputs(2, 700, 32)
    some = [t if t is arguments[1] else t[:, 300:303].clone() for t in arguments]
    whole, part = op(*arguments), op(*some)
    assert all(torch.equal(a[:, 300:303], b) for a, b in zip(whole, part))
    assert [t.numel() for t in op(*inputs(2, 0, 32))] == [0, 0]


def test_wrong_arguments_are_named():
    arguments = inputs(4, 32)
    for at, bad, message in (
        (0, torch.zeros(4, 24), "w: got last dimension 24, wanted a multiple of 16"),
        (1, torch.zeros(16, 32), r"factor: got shape \[16, 32\], wanted \[32, 32\]"),
        (2, torch.zeros(3, 32), r"products: got shape \[3, 32\], wanted \[4, 32\]"),
        (4, torch.zeros(4, 1).byte(), r"scales: got shape \[4, 1\], wanted \[4, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*[bad if i == at else t for i, t in enumerate(arguments)])
    with pytest.raises(TypeError, match="w: got float64, wanted float32"):
        op(arguments[0].double(), *arguments[1:])


def test_opcheck_passes():
    torch.library.opcheck(OP, tuple(inputs(2, 5, 32)))
    w, factor, products, errors, scales = inputs(2, 5, 48)
    views = w[..., 16:], factor[:, 16:, 16:], products[..., 16:], errors[..., 16:], scales[..., 1:]
    torch.library.opcheck(OP, views, test_utils=("test_schema", "test_faketensor"))


def test_kernel_takes_up_to_128_neighbouring_columns():
    pytest.importorskip("cuda.bindings")

    def row(*arguments):
        return registry.table("nvfp4_gptq", *arguments, capability=80).splitlines()[1].split(None, 1)[1]

    assert row(*inputs(4, 128)) == "serves"
    assert row(*inputs(4, 144)) == "takes at most 128 columns, got 144"
    assert row(*(t[None, None, None] for t in inputs(4, 16))) == "takes at most two dimensions before rows, got 3"
    w, *rest = inputs(32, 32)
    assert row(w.mT, *rest) == "takes neighbouring columns, got w with a stride of 32"


@pytest.mark.parametrize("lead, n, blocks", [((), 1, 1), ((), 65, 2), ((3,), 64, 3), ((2, 5), 130, 30)])
def test_64_rows_a_thread_block(monkeypatch, lead, n, blocks):
    """What is launched, on CPU tensors whose kernel is left out."""
    from step_kernels.cuda import nvfp4_gptq

    launched = []
    monkeypatch.setattr(nvfp4_gptq.Kernel, "launch", lambda kernel, *arguments: launched.append(arguments))
    w, factor, *rest = inputs(*lead, n, 32)
    nvfp4_gptq.launch(w, factor.mT.contiguous().mT, *rest)
    grid, threads, *arguments, inner, rows, columns = launched[0]
    assert (grid, threads, rows, columns) == ((blocks, 1, 1), 256, n, 32)
    assert inner == (lead[-1] if lead else 1)
    assert arguments[3] == arguments[12] == 32 and arguments[7:9] == [1, 32] and arguments[20] == 2
    nvfp4_gptq.launch(w[..., :0, :], factor, *(t[..., :0, :] for t in rest))
    assert len(launched) == 1


KINDS = {
    "one block": inputs(7, 3, 70, 16),
    "large": inputs(200, 16, size=1e3),
    "tiny": inputs(200, 16, size=1e-3),
    "subnormal": inputs(200, 16, size=1e-39),
    "begun": inputs(5, 129, 16, begun=True),
    "large, begun": inputs(129, 16, size=1e3, begun=True),
}


def assert_same(got, wanted, least=1.0):
    for name, a, b in zip(("errors", "scales"), got, wanted):
        same = (a.cpu() == b.cpu()).all(-1)
        assert same.float().mean() >= least, f"{name}: {int((~same).sum())} of {same.numel()} rows differ"


@gpu
@pytest.mark.parametrize("kind", KINDS)
def test_kernel_gives_a_block_the_bits_of_the_cpu(kind):
    arguments = KINDS[kind]
    with sk.force("cuda"):
        got = op(*copied(arguments, "cuda"))
        assert_same(op(*copied(arguments, "cuda")), got)
    assert_same(got, op(*copied(arguments)))


@gpu
def test_kernel_gives_ties_and_zeros_the_bits_of_the_cpu():
    g = torch.Generator().manual_seed(5)
    for size in (0.25, 3.0, 448.0):
        w = (torch.rand(999, 16, generator=g) * 49 - 24.5).round() * 0.25 * size
        w[::5], w[1::5, ::2] = 0, 0
        arguments = [w, torch.eye(16), torch.zeros_like(w), torch.zeros_like(w), torch.zeros(999, 1).byte()]
        with sk.force("cuda"):
            got = op(*copied(arguments, "cuda"))
        assert_same(got, op(*arguments))


@gpu
@pytest.mark.parametrize("shape", [(128,), (48,), (2, 112)], ids=str)
@pytest.mark.parametrize("n", [1, 64, 333])
def test_kernel_gives_rows_of_blocks_the_references_but_for_near_ties(shape, n):
    """Products with earlier changes are summed in another order."""
    *lead, k = shape
    for begun in (False, True):
        arguments = inputs(*lead, n, k, begun=begun)
        with sk.force("cuda"):
            got = op(*copied(arguments, "cuda"))
            assert_same(op(*copied(arguments, "cuda")), got)
        assert_on_the_grid(arguments[0], *(t.cpu() for t in got))
        assert_same(got, op(*arguments), 0.99 if n > 100 else 0.98)


@gpu
def test_kernel_reads_and_writes_parts_of_matrices_and_nothing_beside_them():
    arguments = inputs(3, 100, 192, begun=True)
    some, blocks = slice(48, 128), slice(3, 8)
    results = []
    for device in ("cpu", "cuda"):
        w, factor, products, errors, scales = copied(arguments, device)
        factor = factor[:, some, some].mT.contiguous().mT  # its columns apart
        with sk.force("cuda"):
            op(w[..., some], factor, products[..., some], errors[..., some], scales[..., blocks])
        results.append((errors, scales))
    assert_same(results[1], results[0], 0.99)
    for got, old, columns in zip(results[1], arguments[3:], (some, blocks)):
        got[..., columns] = old[..., columns].cuda()
        assert torch.equal(got.cpu(), old)


@gpu
def test_kernel_takes_all_blocks_of_a_weight_as_matrices():
    """[experts, blocks, n, 16] within [experts, n, k], products of 0 that are one row."""
    w, *_ = inputs(2, 130, 320)
    factor = inputs(2, 20, 1, 16)[1]
    errors, scales = torch.zeros_like(w), torch.zeros(2, 130, 20, dtype=torch.uint8)
    results = []
    for device in ("cpu", "cuda"):
        e, s = errors.to(device, copy=True), scales.to(device, copy=True)
        blocks, moved = (t.unflatten(-1, (-1, 16)).transpose(-3, -2) for t in (w.to(device), e))
        with sk.force("cuda"):
            op(blocks, factor.to(device), torch.zeros(16, device=device).expand_as(blocks), moved, s.mT[..., None])
        results.append((e, s))
    assert_same(results[1], results[0])


@gpu
def test_a_cuda_graph_replays_on_new_weights():
    arguments = copied(inputs(100, 64), "cuda")
    again = copied(inputs(100, 64, seed=3), "cuda")
    with sk.force("cuda"):
        op(*copied(arguments, "cuda"))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            op(*arguments)
        for kept, new in zip(arguments, again):
            kept.copy_(new)
        graph.replay()
        assert_same(arguments[3:], op(*again))
