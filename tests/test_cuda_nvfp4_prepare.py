"""The prepared layout: where each code and scale lies, its inverse, what refuses and takes it; the GPU's bytes."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4, prepared, registry
from step_kernels.ops.nvfp4_prepare import prepares
from step_kernels.testing import nvfp4_weight

SHAPES = [(64, 64, False), (80, 160, False), (64, 64, True), (160, 80, True), (96, 112, True), (16, 16, False)]


def random_weight(*shape: int, seed: int = 0) -> sk.NVFP4Weight:
    """Every code and every block scale, 0 and subnormal ones too; no Gaussian about it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (*shape[:-1], shape[-1] // 16), dtype=torch.uint8, generator=generator)
    return sk.NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), torch.rand(shape[:-2], generator=generator))


def source_row(block: int, row: int, n: int, paired: bool) -> int | None:
    if not paired:
        return block * 64 + row if block * 64 + row < n else None
    at = block * 32 + row // 16 * 8 + row % 8
    return (row // 8 % 2) * (n // 2) + at if at < n // 2 else None


@pytest.mark.parametrize("n, k, paired", SHAPES)
def test_codes_lie_where_the_tensor_cores_fragments_want_them(n, k, paired):
    weight = random_weight(n, k)
    packed, _ = prepared.pack(weight.codes, weight.scales, paired)
    nibbles = nvfp4.unpack(weight.codes).tolist()
    assert packed.shape == (*prepared.tiles(n, k, paired), 2048)
    for block, chunk in itertools.product(*map(range, packed.shape[:2])):
        tile = packed[block, chunk].tolist()
        for at, byte in enumerate(tile):
            thread, word, by = at // 16, at // 4 % 4, at % 4
            row = source_row(block, thread // 32 * 16 + thread % 32 // 4 + 8 * (word & 1), n, paired)
            column = chunk * 64 + 16 * (word >> 1) + 2 * (thread % 4) + (by >> 1) + 8 * (by & 1)
            first, second = (nibbles[row][c] if row is not None and c < k else 0 for c in (column, column + 32))
            bits = (first >> 3) << 7 | (first & 7) << 1 | second >> 3 | (second & 7) << 4
            assert byte == bits, (block, chunk, at)


@pytest.mark.parametrize("n, k, paired", SHAPES)
def test_scale_bytes_hold_the_scale_and_what_the_codes_fp8_form_lacks(n, k, paired):
    weight = random_weight(n, k)
    _, packed = prepared.pack(weight.codes, weight.scales, paired)
    wanted = weight.scales.double().tolist()
    as_f32 = (packed.int() << 20).view(torch.float32).double().tolist()  # how the kernels read a byte
    for block, chunk in itertools.product(*map(range, packed.shape[:2])):
        for row in range(64):
            for block16 in range(4):
                at = row // 16 * 64 + row % 8 * 8 + block16 % 2 * 4 + block16 // 2 * 2 + row // 8 % 2
                source, column = source_row(block, row, n, paired), chunk * 4 + block16
                scale = wanted[source][column] if source is not None and column < k // 16 else 0.0
                debt = 2.0 ** ((18 if block16 < 2 else 10) - 127)
                assert as_f32[block][chunk][at] == scale * debt


@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (3, 80, 160), (2, 3, 96, 112), (2, 128, 1040)])
def test_restoring_gives_every_byte_back(shape):
    for paired in (False, True):
        weight = random_weight(*shape, seed=len(shape))
        back = prepared.unpack(*prepared.pack(weight.codes, weight.scales, paired), *shape[-2:], paired)
        assert torch.equal(back[0], weight.codes) and torch.equal(
            back[1].view(torch.uint8), weight.scales.view(torch.uint8)
        )
        assert back[0].is_contiguous() and back[1].is_contiguous()


def test_every_code_under_every_scale_survives():
    codes = torch.arange(256, dtype=torch.uint8).repeat(127, 4, 1).view(127, 64, 16)
    scales = torch.arange(127, dtype=torch.uint8)[:, None, None].repeat(1, 64, 2).view(torch.float8_e4m3fn)
    back = prepared.unpack(*prepared.pack(codes, scales, False), 64, 32, False)
    assert torch.equal(back[0], codes) and torch.equal(back[1].view(torch.uint8), scales.view(torch.uint8))


def test_prepared_weights_take_the_bytes_of_the_checkpoints():
    for n, k in ((4096, 4096), (8192, 12288), (1280, 320)):
        rows, columns = prepared.tiles(n, k, False)
        assert rows * columns * (2048 + 256) == n * k * 9 // 16
    assert prepared.tiles(2 * 160, 4096, True) == (5, 64) and prepared.tiles(2 * 16, 80, True) == (1, 2)


def test_prepare_and_restore_take_weights_and_experts():
    weight = nvfp4_weight(48, 96, parts=3)
    ready = sk.nvfp4_prepare(weight)
    assert ready.shape == (48, 96) and ready.global_scale is weight.global_scale and not ready.paired
    assert_same(sk.nvfp4_restore(ready), weight)
    experts = sk.NVFP4Experts(nvfp4_weight(3, 96, 80, parts=2), nvfp4_weight(3, 80, 48))
    ready = sk.nvfp4_prepare(experts)
    assert ready.gate_up.paired and not ready.down.paired and ready.gate_up[1:].shape == (2, 96, 80)
    back = sk.nvfp4_restore(ready)
    assert_same(back.gate_up, experts.gate_up), assert_same(back.down, experts.down)
    assert_same(sk.nvfp4_restore(ready.gate_up[1]), experts.gate_up[1])


def assert_same(a: sk.NVFP4Weight, b: sk.NVFP4Weight):
    assert torch.equal(a.codes, b.codes) and torch.equal(a.scales.view(torch.uint8), b.scales.view(torch.uint8))
    assert torch.equal(a.global_scale, b.global_scale)


@pytest.mark.parametrize("scale", [math.nan, -1.0, -0.0])
def test_scales_that_no_quantizer_writes_are_refused(scale):
    weight = nvfp4_weight(32, 64)
    weight.scales[3, 1] = scale
    with pytest.raises(ValueError, match="weight.scales: got a negative or NaN block scale, wanted 0 to 448"):
        sk.nvfp4_prepare(weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_products_of_prepared_weights_have_the_bits_of_the_checkpoints(dtype):
    x = torch.randn(5, 176, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight = nvfp4_weight(100, 176, parts=4)
    assert torch.equal(sk.nvfp4_linear(x, sk.nvfp4_prepare(weight)), sk.nvfp4_linear(x, weight))
    experts = sk.NVFP4Experts(nvfp4_weight(4, 96, 176, parts=2), nvfp4_weight(4, 176, 48))
    routing = torch.rand(5, 2), torch.tensor([[0, 1], [3, -1], [2, 2], [1, 9], [0, 3]], dtype=torch.int32)
    with_prepared = sk.nvfp4_moe(x, *routing, sk.nvfp4_prepare(experts), 1.0)
    torch.testing.assert_close(
        with_prepared, sk.nvfp4_moe(x, *routing, experts, 1.0), rtol=1e-2 if dtype == torch.bfloat16 else 1e-13, atol=0
    )


def test_ops_take_prepared_weights_in_fake_mode_and_compiled():
    weight = sk.nvfp4_prepare(nvfp4_weight(40, 64))
    x = torch.randn(3, 64)
    arguments = (x, weight.codes, weight.scales, weight.global_scale, 40)
    torch.library.opcheck(torch.ops.step_kernels.nvfp4_linear.default, arguments)
    compiled = torch.compile(lambda x: sk.nvfp4_linear(x + 1, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), sk.nvfp4_linear(x + 1, weight))


@pytest.mark.parametrize("n", [65, 0])
def test_a_prepared_weights_rows_must_fit_its_tiles(n):
    weight = sk.nvfp4_prepare(nvfp4_weight(40, 64))
    with pytest.raises(ValueError, match=rf"weight: got a prepared \[{n}, 64\] of 64 rows"):
        torch.ops.step_kernels.nvfp4_linear(torch.zeros(3, 64), weight.codes, weight.scales, weight.global_scale, n)


def test_the_tables_give_prepared_weights_to_cuda_and_others_to_triton(monkeypatch):
    monkeypatch.setattr(registry, "_installed", lambda package: package in ("triton", "cuda.bindings"))
    monkeypatch.setattr(registry, "_forced", [])
    experts = sk.NVFP4Experts(nvfp4_weight(4, 64, 32), nvfp4_weight(4, 32, 32))
    routing = torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.int32)
    cases = {
        "nvfp4_linear": (lambda x, w: (x, w), nvfp4_weight(32, 32)),
        "nvfp4_moe": (lambda x, w: (x, *routing, w, 7.0), experts),
    }
    for op, (arguments, weight) in cases.items():
        for w, serves in ((weight, "triton"), (sk.nvfp4_prepare(weight), "cuda")):
            table = registry.table(op, *arguments(torch.zeros(3, 32).bfloat16(), w), capability=90)
            assert [line.split()[0] for line in table.splitlines() if line.endswith(" serves")] == [serves], table
        table = registry.table(op, *arguments(torch.zeros(3, 32), sk.nvfp4_prepare(weight)), capability=90)
        assert "takes bfloat16, got float32" in table and "got a prepared one" in table
        assert table.splitlines()[-1].split() == ["reference", "serves"]


def test_only_hopper_prepares():
    assert not prepares(torch.device("cpu"))


def test_weights_stay_in_checkpoint_layout_where_a_backend_is_forced_that_wants_it(monkeypatch):
    monkeypatch.setattr(sys.modules["step_kernels.ops.nvfp4_prepare"], "compute_capability", lambda device: 90)
    assert prepares(torch.device("cuda", 0))
    for backend, wanted in (("cuda", True), ("cuda-w4a8", True), ("triton", False), ("reference", False)):
        with sk.force(backend):
            assert prepares(torch.device("cuda", 0)) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 64), (16, 16), (3, 80, 160), (2, 128, 1040), (1, 4096, 11264)])
def test_the_gpu_packs_and_unpacks_the_same_bytes(shape):
    weight = random_weight(*shape)
    for paired in (False, True):
        wanted = prepared.pack(weight.codes, weight.scales, paired)
        from step_kernels.cuda import nvfp4_prepare

        got = nvfp4_prepare.pack(weight.codes.cuda(), weight.scales.cuda(), paired)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted))
        back = nvfp4_prepare.unpack(*got, *shape[-2:], paired)
        assert torch.equal(back[0].cpu(), weight.codes)
        assert torch.equal(back[1].cpu().view(torch.uint8), weight.scales.view(torch.uint8))


@pytest.mark.gpu
def test_preparing_on_the_gpu_takes_no_more_memory_than_the_result():
    from step_kernels.model.synthetic import RandomWeights

    weight = RandomWeights(torch.device("cuda"), torch.float32).experts("", 32, 1280, 4096).gate_up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ready = sk.nvfp4_prepare(weight)
    size = weight.codes.nbytes + weight.scales.nbytes
    assert ready.codes.nbytes + ready.scales.nbytes == size
    assert torch.cuda.max_memory_allocated() - before <= 1.05 * size
