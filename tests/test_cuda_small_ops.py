"""rms_norm, add_rms_norm and swiglu by the CUDA kernels, on a GPU against the references; what they refuse, without."""

from __future__ import annotations

import math

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.testing import assert_close_to_reference

BF16, EPS = torch.bfloat16, 1e-5
gpu = pytest.mark.gpu


def random(*shape, dtype=BF16, seed=0, device="cuda"):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (torch.randn(shape, generator=generator) * 2).to(device, dtype)


def first_row(op, *arguments):
    return registry.table(op, *arguments, capability=90).splitlines()[1].split(None, 1)


def test_norm_kernel_takes_bf16_rows_of_1024_to_16384_and_says_what_it_refuses():
    pytest.importorskip("cuda.bindings")

    def row(n, dtype=BF16, weight_dtype=BF16):
        x, weight = torch.zeros(2, n, dtype=dtype), torch.zeros(n, dtype=weight_dtype)
        rows = first_row("rms_norm", x, weight, EPS), first_row("add_rms_norm", x, x, weight, EPS, x)
        assert rows[0] == rows[1] and rows[0][0] == "cuda"
        return rows[0][1]

    assert row(1024) == row(16384) == row(4096, weight_dtype=torch.float32) == "serves"
    assert row(4096, torch.float16) == "takes bfloat16, got x in float16"
    assert row(4096, weight_dtype=torch.float16) == "takes weights in bfloat16 and float32, got float16"
    for n in (1016, 4100, 16392):
        assert row(n) == f"takes rows of 1024 to 16384, a multiple of 8, got {n}"
    x, weight = torch.zeros(2, 4096, dtype=BF16), torch.zeros(4096)
    assert "serves sm_90 to sm_129" in registry.table("rms_norm", x, weight, EPS, capability=89)


def test_swiglu_kernel_takes_bf16_and_multiples_of_8_outputs():
    pytest.importorskip("cuda.bindings")
    assert first_row("swiglu", torch.zeros(3, 32, dtype=BF16), 7.0) == ["cuda", "serves"]
    assert first_row("swiglu", torch.zeros(3, 32)) == ["cuda", "takes bfloat16, got float32"]
    assert first_row("swiglu", torch.zeros(3, 24, dtype=BF16))[1] == "takes a multiple of 8 outputs a row, got 12"
    huge = torch.empty(2**22, 2**13, dtype=BF16, device="meta")
    assert first_row("swiglu", huge)[1] == "takes fewer than 17179869184 outputs, got 17179869184"


@pytest.mark.parametrize("rows, most, wanted", [(1, 264, 1), (264, 264, 264), (265, 264, 133), (8192, 264, 256)])
def test_norm_blocks_share_rows_evenly(monkeypatch, rows, most, wanted):
    """What is launched, on CPU tensors whose kernel is left out."""
    from step_kernels.cuda import rms_norm

    launched = []
    monkeypatch.setattr(rms_norm, "multiprocessors", lambda index: most // rms_norm.BLOCKS)
    monkeypatch.setattr(rms_norm.Kernel, "launch", lambda kernel, *arguments: launched.append((kernel, *arguments)))
    rms_norm.launch(torch.empty(rows, 1024, dtype=BF16), torch.empty(1024), EPS)
    kernel, grid, threads, *_ = launched[0]
    assert (kernel.symbol, grid, threads) == ("smxx_rms_norm_f32_1_1", (wanted, 1, 1), 128)
    rms_norm.launch_add(*torch.empty(2, rows, 16384, dtype=BF16), torch.empty(16384, dtype=BF16), EPS)
    kernel, grid, threads, *_ = launched[1]
    assert (kernel.symbol, grid, threads) == ("smxx_rms_norm_bf16_2_4", (rows, 1, 1), 512)


NORM_SHAPES = [
    (1, 4096),
    (8, 4096),
    (265, 4096),
    (8193, 1024),
    (3, 5, 1096),
    (2, 4104),
    (70, 5120),
    (3, 16384),
    (2048,),
]


@gpu
@pytest.mark.parametrize("weight_dtype", [BF16, torch.float32])
@pytest.mark.parametrize("shape", NORM_SHAPES)
def test_norms_err_no_more_than_torch_and_repeat_their_bits(shape, weight_dtype):
    x, residual, other = (random(*shape, seed=seed) for seed in range(3))
    weight = random(shape[-1], dtype=weight_dtype) * 0.2
    with sk.force("cuda"):
        assert_close_to_reference(
            lambda x: sk.rms_norm(x, weight, EPS), lambda x: sk.rms_norm.reference(x, weight, EPS), x
        )
        for third in (None, other):
            out, total = sk.add_rms_norm(x, residual, weight, EPS, third)
            assert torch.equal(total, sk.add_rms_norm.reference(x, residual, weight, EPS, third)[1])
            assert torch.equal(out, sk.rms_norm(total, weight, EPS))
            for _ in range(3):
                assert all(map(torch.equal, sk.add_rms_norm(x, residual, weight, EPS, third), (out, total)))


@gpu
def test_norms_read_any_strides():
    x = random(6, 4, 1088)
    with sk.force("cuda"):
        for view in (x[:, :, :1080], x[::2], x.transpose(0, 1), x[:, 1], x[:, :1].expand(6, 3, 1088), x[..., 4:1084]):
            weight = random(2 * view.shape[-1])[::2]
            out, total = sk.add_rms_norm(view, view.flip(0), weight, EPS, view)
            wanted, wanted_total = sk.add_rms_norm.reference(view, view.flip(0), weight, EPS, view)
            assert out.is_contiguous() and total.is_contiguous() and torch.equal(total, wanted_total)
            torch.testing.assert_close(out, wanted, rtol=0.01, atol=1e-6)  # a bf16 ulp
            assert torch.equal(sk.rms_norm(total, weight, EPS), out)
            assert torch.equal(sk.rms_norm(view, weight, EPS), sk.rms_norm(view.contiguous(), weight, EPS))


@gpu
def test_norms_of_no_rows_are_empty():
    x, weight = torch.empty(0, 4096, dtype=BF16, device="cuda"), random(4096)
    with sk.force("cuda"):
        assert sk.rms_norm(x, weight, EPS).shape == (0, 4096)
        assert [t.shape for t in sk.add_rms_norm(x, x, weight, EPS, x)] == [(0, 4096)] * 2


@gpu
def test_norms_keep_nan_and_infinity_to_their_rows():
    x = torch.ones(700, 1024, device="cuda", dtype=BF16)
    x[3, 7], x[300, 0], x[650] = math.nan, math.inf, 0
    with sk.force("cuda"):
        out = sk.rms_norm(x, x[0], EPS)
    torch.testing.assert_close(out, sk.rms_norm.reference(x, x[0], EPS), equal_nan=True)
    assert out.isnan().sum(1).nonzero().flatten().tolist() == [3, 300]


@gpu
@pytest.mark.parametrize("n, chunks", [(1024, 1), (4096, 1), (4104, 4)])
@pytest.mark.parametrize("rows", [1, 5])
def test_norm_kernel_writes_its_outputs_and_nothing_beside_them(rows, n, chunks):
    from step_kernels.cuda.rms_norm import VARIANTS

    x, weight = random(rows, n), random(n)
    out, total = torch.full((2, rows + 2, n), -7.0, dtype=BF16, device="cuda")
    arguments = (x, x, x, n, n, n, weight, out[1:], total[1:], rows, n, EPS)
    VARIANTS[BF16, 3, chunks].launch((2, 1, 1), 32 * -(-n // (256 * chunks)), *arguments)
    for got, wanted in zip((out, total), sk.add_rms_norm.reference(x, x, weight, EPS, x)):
        torch.testing.assert_close(got[1:-1], wanted, rtol=0.01, atol=1e-6)
        assert (got[0] == -7).all() and (got[-1] == -7).all()


@gpu
@pytest.mark.parametrize("limit", [None, 0.25, 7.0])
@pytest.mark.parametrize("shape", [(1, 2560), (2, 3, 512), (1025, 2560), (65, 22528), (4112,)])
def test_swiglu_errs_no_more_than_torch_and_repeats_its_bits(shape, limit):
    x = random(*shape) * 2
    with sk.force("cuda"):
        assert_close_to_reference(sk.swiglu, sk.swiglu.reference, x, limit)
        first = sk.swiglu(x, limit)
        assert all(torch.equal(sk.swiglu(x, limit), first) for _ in range(5))
    # Two f32 results an ulp apart straddle a bf16 tie about once in 2^15; truncation would miss half of all.
    assert (first != sk.swiglu.reference(x, limit)).float().mean() < 1e-3


@gpu
@pytest.mark.parametrize("limit", [None, 2.0])
def test_swiglu_passes_nan_and_infinity_as_torch_does(limit):
    values = torch.tensor([math.nan, 1.0, -1.0, math.inf, -math.inf, 0.0, 200.0, -200.0])
    gate, up = (t.flatten() for t in torch.meshgrid(values, values, indexing="ij"))
    x = torch.cat([gate, up])[None].to("cuda", BF16)
    with sk.force("cuda"):
        torch.testing.assert_close(sk.swiglu(x, limit), sk.swiglu.reference(x, limit), equal_nan=True)


@gpu
def test_swiglu_reads_any_strides_and_no_rows():
    x = random(6, 4, 96)
    with sk.force("cuda"):
        for view in (x[:, :, :80], x[::2], x[..., ::2], x.transpose(0, 1), x[:, 1], x[:, :1].expand(6, 3, 96), x[:0]):
            out = sk.swiglu(view, 7.0)
            assert out.is_contiguous() and out.shape == (*view.shape[:-1], view.shape[-1] // 2)
            torch.testing.assert_close(out, sk.swiglu.reference(view, 7.0), rtol=0.01, atol=1e-6)  # a bf16 ulp


@gpu
def test_swiglu_kernel_writes_its_output_and_nothing_beside_it():
    from step_kernels.cuda.swiglu import KERNEL

    x = random(3, 2 * 1000)
    out = torch.full((5, 1000), -7.0, dtype=BF16, device="cuda")
    KERNEL.launch((2, 1, 1), 256, x, out[1:], 2000, 375, 125, 7.0)
    torch.testing.assert_close(out[1:4], sk.swiglu.reference(x, 7.0), rtol=0.01, atol=1e-6)
    assert (out[0] == -7).all() and (out[4] == -7).all()


@gpu
@pytest.mark.parametrize("tokens", [1, 64, 1000])
def test_a_graph_of_dependent_kernels_replays_on_new_input(tokens):
    """Each kernel may start before the one ahead has ended, and reads what that one writes."""
    x, weight = random(tokens, 4096), random(4096) * 0.1

    def chain():
        hidden, other = x, x.flip(0)
        for _ in range(20):
            out, hidden = sk.add_rms_norm(hidden, x, weight, EPS, other)
            other = sk.swiglu(torch.cat((out, sk.rms_norm(out, weight, EPS)), 1), 7.0)
        return hidden, other, sk.swiglu(sk.rms_norm(hidden, weight, EPS), 7.0)

    with sk.force("cuda"):
        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain()
        for seed in range(5):
            x.copy_(random(tokens, 4096, seed=seed))
            graph.replay()
            torch.cuda.synchronize()
            assert all(map(torch.equal, out, chain()))


@gpu
def test_opcheck_passes_on_the_gpu():
    x, weight = random(3, 1024), random(1024)
    with sk.force("cuda"):
        torch.library.opcheck(torch.ops.step_kernels.rms_norm.default, (x, weight, EPS))
        for other in ((), (x.flip(1),)):
            torch.library.opcheck(torch.ops.step_kernels.add_rms_norm.default, (x, x.flip(0), weight, EPS, *other))
        torch.library.opcheck(torch.ops.step_kernels.swiglu.default, (x, 7.0))
