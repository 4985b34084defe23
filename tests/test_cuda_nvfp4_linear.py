"""The decode kernel of nvfp4_linear: its split activations on the CPU; on a GPU, errors, edges, bits, graphs."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch

import step_kernels as sk
from step_kernels import prepared, registry
from step_kernels.ops.nvfp4_linear import _nvfp4_linear
from step_kernels.testing import assert_close_to_reference, nvfp4_weight, relative_error

gpu = pytest.mark.gpu
GROUP = 256  # neighbours of x that share a power of two


def split(x: torch.Tensor, narrow: bool) -> torch.Tensor:
    """bf16 [m, k] -> f64 [m, k]: what the kernel multiplies, x = 2^e (hi + lo); `narrow` as with one or two tokens."""
    m, k = x.shape
    groups = torch.nn.functional.pad(x.double(), (0, -k % GROUP)).unflatten(1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    e = torch.where(largest == 0, -126.0, largest.log2().floor()).clamp(min=-120)
    v = (groups * torch.exp2(7 - e)).float()
    hi = v.to(torch.float8_e4m3fn).float()
    lo = ((v - hi) * 16).to(torch.float8_e4m3fn).float() / 16 if narrow else (v - hi).to(torch.float8_e5m2).float()
    return ((hi.double() + lo) * torch.exp2(e - 7)).flatten(1)[:, :k]


@pytest.mark.parametrize("narrow", [False, True])
def test_split_activations_are_exact_within_2_to_the_13_of_their_groups_largest(narrow):
    every = torch.arange(0x3F80, 0x3F80 + 128, dtype=torch.int16).view(torch.bfloat16)  # 1 to 2
    for largest in (1.0, -1.9921875):
        for octave in range(13):
            x = torch.zeros(1, GROUP)
            x[0, :128], x[0, 128] = every.float() * 2.0**-octave, largest * 2.0 ** (1 if largest == 1 else 0)
            x = x.bfloat16() * (-1) ** octave
            assert torch.equal(split(x, narrow), x.double())


@pytest.mark.parametrize("narrow", [False, True])
def test_smaller_activations_err_by_at_most_2_to_the_minus_21_of_their_groups_largest(narrow):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1024, generator=generator) * torch.exp2(-30 * torch.rand(64, 1024, generator=generator))
    x = x.bfloat16()
    largest = x.double().unflatten(1, (-1, GROUP)).abs().amax(-1, keepdim=True)
    error = (split(x, narrow) - x.double()).unflatten(1, (-1, GROUP)).abs()
    assert error.any() and (error <= largest * 2.0**-21).all()


@pytest.mark.parametrize("narrow", [False, True])
def test_rows_with_a_dynamic_range_of_ten_thousand_stay_within_the_accuracy_rule(narrow):
    generator = torch.Generator().manual_seed(1)
    weight = nvfp4_weight(64, 512, seed=3)
    x = torch.randn(8, 512, generator=generator)
    x[:, ::7] *= 1e4
    weight.codes[:, ::7] &= 0xF0  # and nothing to multiply some of the large ones by
    x = x.bfloat16()
    exact = _nvfp4_linear.reference(x.double(), *fields(weight))
    rounded = _nvfp4_linear.reference(split(x, narrow), *fields(weight)).bfloat16()
    plain = relative_error(_nvfp4_linear.reference(x, *fields(weight)), exact)
    assert relative_error(rounded, exact) < 1.01 * plain


def test_codes_and_scale_bytes_multiply_to_the_weight_in_fp8():
    codes = torch.arange(256, dtype=torch.uint8).repeat(64, 1)[:, :128].contiguous()
    codes[32:] += 128
    scales = torch.arange(64 * 16, dtype=torch.int32).remainder(0x7F).to(torch.uint8).view(64, 16)
    weight = sk.NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), torch.ones(()))
    packed, packed_scales = prepared.pack(*fields(weight)[:2], False)
    word = packed.view(4, 4, 8, 4, 2, 2, 2, 2)  # chunk, warp, g, t, 16 of 32, g + 8, k + 1, k + 8
    first = (word & 0x8E).view(torch.float8_e5m2).double()
    second = (word >> 2 & 0x1C | (word & 1) << 7).view(torch.float8_e4m3fn).double()
    scale = (
        (packed_scales.int() << 20).view(torch.float32).double().view(4, 4, 8, 2, 2, 2)
    )  # chunk, warp, g, h, step, row
    for step, values in enumerate((first, second)):
        got = values * scale[:, :, :, None, :, step, :, None, None] * 2.0**123
        got = got.permute(1, 5, 2, 0, 4, 7, 3, 6).reshape(64, 4, 32)  # warp, g + 8, g; chunk, 16, k + 8, t, k + 1
        wanted = weight.dequantize(torch.float64).view(64, 4, 2, 32)[:, :, step]
        assert torch.equal(got, wanted)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
def test_kernels_compile_to_the_launchers_symbols_with_products_in_flight():
    from step_kernels.cuda import driver, nvfp4_linear, nvfp4_moe, nvfp4_prepare

    launchers = {
        "linear": nvfp4_linear.VARIANTS.values(),
        "moe": [
            *nvfp4_moe.GATE_UP.values(),
            *nvfp4_moe.DOWN.values(),
            nvfp4_moe.GATE_UP_FEW,
            nvfp4_moe.DOWN_FEW,
            nvfp4_moe.SUM,
        ],
        "prepare": [nvfp4_prepare.PACK, nvfp4_prepare.UNPACK],
    }
    for name, kernels in launchers.items():
        cubin, report = driver.build.compile_with_nvcc(driver.CSRC / f"sm90_nvfp4_{name}.cu", "90a")
        symbols = {symbol.decode() for symbol in re.findall(rb"\.text\.(\w+)\0", cubin)}
        assert symbols == {kernel.symbol for kernel in kernels}
        assert "serialized" not in report  # ptxas' word where it makes every wgmma wait for the one before


def test_each_number_of_tokens_goes_to_its_kernel(monkeypatch):
    from step_kernels.cuda import nvfp4_linear as launcher

    launched = []
    for tokens, kernel in launcher.VARIANTS.items():
        monkeypatch.setattr(kernel, "launch", lambda *args, tokens=tokens: launched.append(tokens))

    def prefill(x, codes, scales, global_scale, n):
        launched.append("prefill")
        return x.new_empty(len(x), n + 6)[:, :n]  # it pads rows

    monkeypatch.setattr(launcher.nvfp4_prefill, "linear", prefill)
    monkeypatch.setattr(launcher, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launcher, "partials", lambda device: torch.zeros(132 * 512, dtype=torch.int32))
    for n, k in ((96, 4096), (1280, 320), (4096, 160)):
        ready = sk.nvfp4_prepare(nvfp4_weight(n, k))
        for m in (1, 2, 3, 4, 5, 8, 9, 100):
            out = launcher.launch(torch.zeros(m, k).bfloat16(), *fields(ready), n)
            assert out.shape == (m, n) and out.is_contiguous()
        assert launched == [2, 2, 4, 4, 8, 8, "prefill", "prefill"]
        launched.clear()
    empty = launcher.launch(torch.zeros(2, 0, 160).bfloat16(), *fields(ready), n)
    assert empty.shape == (2, 0, 4096) and not launched


def test_weights_in_flight_at_once_leave_half_of_each_multiprocessor_to_the_next_kernel(monkeypatch):
    from step_kernels.cuda import nvfp4_linear as launcher

    monkeypatch.setattr(launcher, "multiprocessors", lambda device: 132)
    units = {n: n // 64 * 16 for n in (1024, 4096, 8192, 128896)}  # 64 x 256 of n x 4096
    grids = [[launcher.blocks(torch.device("cuda", 0), t, count) for count in units.values()] for t in (2, 4, 8)]
    assert grids == [[132, 132, 264, 264], [132, 264, 264, 264], [132, 132, 132, 132]]


def test_rows_that_begin_between_multiples_of_8_bytes_are_copied():
    from step_kernels.cuda.nvfp4_linear import rows

    wide = torch.arange(720).bfloat16().view(4, 180)
    for x in (wide[:1, 3:179], wide[:, 1:177], wide[:, 3:], wide.view(-1)[: 4 * 178].view(4, 178)):
        copy = rows(x)
        assert copy is not x and copy.data_ptr() % 8 == 0 and copy.stride(1) == 1 and torch.equal(copy, x)
    for x in (wide, wide[::2, 4:176], wide[:1, 8:]):
        assert rows(x) is x


def test_experts_share_reads_by_how_many_tokens_they_have():
    from step_kernels.cuda.nvfp4_moe import tile

    assert [tile(t, 8 * t, 288) for t in (1, 2, 3, 10, 11, 16, 32)] == [2, 2, 2, 2, 4, 4, 4]
    assert [tile(t, 8 * t, 36) for t in (1, 2, 3, 8, 16, 32)] == [2, 2, 4, 4, 8, 8]


def fields(weight) -> tuple[torch.Tensor, ...]:
    return weight.codes, weight.scales, weight.global_scale


def random_x(m: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


def check(x: torch.Tensor, weight: sk.NVFP4Weight):
    """The kernel's error on `weight` prepared, beside torch's."""
    ready = sk.nvfp4_prepare(weight)
    assert_close_to_reference(lambda x, *_: cuda(x, ready), _nvfp4_linear.reference, x, *fields(weight))


def cuda(x: torch.Tensor, ready: sk.PreparedWeight) -> torch.Tensor:
    """The kernel itself, with NaN where its output will be."""
    size = ready.shape[0] * x[..., 0].numel() * 2
    torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # freed: what the allocator hands out next
    with sk.force("cuda"):
        return sk.nvfp4_linear(x, ready)


@gpu
@pytest.mark.parametrize(
    "n, k", [(4096, 4096), (1024, 4096), (96, 4096), (4096, 1280), (4096, 12288), (4096, 320), (130, 176)]
)
def test_errs_no_more_than_torch_for_every_number_of_tokens(n, k):
    weight = nvfp4_weight(n, k, device="cuda", parts=2)
    scale = weight.global_scale * torch.tensor([1.0, 3.0], device="cuda")
    weight = dataclasses.replace(weight, global_scale=scale)
    for m in (1, 2, 3, 4, 5, 8, 9, 17, 33, 64) if k == 4096 else (1, 4, 7, 16):
        try:
            check(random_x(m, k, m), weight)
        except AssertionError as error:
            raise AssertionError(f"m = {m}: {error}") from None


@gpu
@pytest.mark.parametrize(
    "n, k",
    # 81920 x 320: every second unit is short of k and comes where a whole one was
    [(11264, 4096), (4096, 11264), (128896, 4096), (4096, 8192), (12288, 4096), (64, 16), (81920, 320)],
)
def test_real_and_smallest_shapes_err_no_more_than_torch(n, k):
    weight = nvfp4_weight(min(n, 4096), k, device="cuda")
    repeats = -(-n // 4096)
    codes, scales = (t.view(torch.uint8).repeat(repeats, 1)[:n] for t in fields(weight)[:2])
    ready = sk.nvfp4_prepare(sk.NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), weight.global_scale))
    for m in (1, 3, 8):
        x = random_x(m, k, m)
        wanted = _nvfp4_linear.reference(x.double(), *fields(weight)).repeat(1, repeats)[:, :n]
        assert relative_error(cuda(x, ready), wanted) < 2**-8, f"m = {m}"


@gpu
@pytest.mark.parametrize("m", [1, 4, 8])
def test_largest_codes_and_scales_zero_blocks_and_subnormal_scales(m):
    generator = torch.Generator().manual_seed(m)
    codes = torch.randint(0, 256, (256, 1024), dtype=torch.uint8, generator=generator)
    scales = torch.randint(0, 0x7F, (256, 128), dtype=torch.uint8, generator=generator)
    codes[:64], scales[:64] = 0x77, 0x7E  # 6 * 448 everywhere
    scales[64:96] = 0
    scales[96:128] = 1  # 2^-9
    codes[128:144] = 0x88  # -0
    for scale in (1.0, 2.0**-60, 2.0**60):
        weight = sk.NVFP4Weight(codes.cuda(), scales.cuda().view(torch.float8_e4m3fn), torch.tensor(scale).cuda())
        ready = sk.nvfp4_prepare(weight)
        for size in (1.0, 2.0**-40, 2.0**20):
            x = random_x(m, 2048) * size
            out, wanted = cuda(x, ready), _nvfp4_linear.reference(x.double(), *fields(weight))
            for rows in ((0, 64), (64, 96), (96, 128), (128, 144), (144, 256)):
                part = slice(*rows)
                error = relative_error(out[:, part], wanted[:, part])
                assert error < 2**-8, (scale, size, rows, error)


@gpu
@pytest.mark.parametrize("m", [2, 4, 8])
def test_large_activations_leave_their_small_neighbours_exact(m):
    weight = nvfp4_weight(512, 2048, device="cuda")
    x = random_x(m, 2048)
    x[:, ::16] *= 2**12
    weight.codes[:, ::8] &= 0xF0  # their codes are 0
    check(x, weight)


@gpu
@pytest.mark.parametrize("m", [2, 3, 8])
def test_nan_and_infinite_rows_spoil_no_other_row(m):
    ready = sk.nvfp4_prepare(nvfp4_weight(200, 1024, device="cuda"))
    x = random_x(m, 1024)
    clean = cuda(x, ready)
    for bad in (torch.nan, torch.inf):
        x[1, 700] = bad
        out = cuda(x, ready)
        assert out[1].isnan().all() and torch.equal(out[[0, *range(2, m)]], clean[[0, *range(2, m)]])


@gpu
def test_empty_strided_and_misaligned_rows():
    ready = sk.nvfp4_prepare(nvfp4_weight(130, 176, device="cuda"))
    assert cuda(torch.zeros(0, 176, device="cuda").bfloat16(), ready).shape == (0, 130)
    x = torch.randn(6, 4, 180, device="cuda").bfloat16()
    for view in (
        x[::2, 1, :176],
        x[..., 1:177],
        x.transpose(0, 1)[..., 4:],
        x[0, 0, 3:179],
        x[:1, :1, :176].expand(2, 4, 176),
    ):
        out = cuda(view, ready)
        assert out.shape == (*view.shape[:-1], 130) and out.is_contiguous()
        assert torch.equal(out, cuda(view.contiguous(), ready))


@gpu
@pytest.mark.parametrize("m", [1, 3, 8, 20])
def test_gives_the_same_bits_on_every_run_and_in_graphs(m):
    weights = [sk.nvfp4_prepare(nvfp4_weight(4096, k, device="cuda", seed=k)) for k in (1280, 4096)]
    x = random_x(m, 1280)

    def chain():
        inner = sk.nvfp4_linear(x, weights[0])
        return inner, sk.nvfp4_linear(inner, weights[1])

    first = chain()
    for _ in range(20):
        assert all(map(torch.equal, chain(), first))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in (0, 1, 2):
        x.copy_(random_x(m, 1280, seed))
        graph.replay()
        assert all(map(torch.equal, out, chain()))


@gpu
@pytest.mark.parametrize("m", [2, 4, 8])
def test_partial_sums_are_absent_again_after_every_kernel(m):
    from step_kernels.cuda.nvfp4_linear import partials

    for n, k in ((4096, 4096), (1024, 4096), (320, 12288), (8192, 4096)):
        ready = sk.nvfp4_prepare(nvfp4_weight(n, k, device="cuda"))
        x = random_x(m, k)
        x[0, 5] = torch.nan
        for _ in range(3):
            cuda(x, ready)
        assert (partials(x.device) == -1).all()


@gpu
def test_streams_keep_their_sums_apart():
    ready = sk.nvfp4_prepare(nvfp4_weight(1024, 4096, device="cuda"))
    xs = [random_x(3, 4096, seed) for seed in range(4)]
    wanted = [sk.nvfp4_linear(x, ready) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs = [[] for _ in xs]
    for _ in range(20):
        for x, stream, out in zip(xs, streams, outs):
            with torch.cuda.stream(stream):
                out.append(sk.nvfp4_linear(x, ready))
    torch.cuda.synchronize()
    assert all(torch.equal(o, w) for out, w in zip(outs, wanted) for o in out)


@gpu
def test_op_on_the_gpu_keeps_the_rules_of_torch_library():
    ready = sk.nvfp4_prepare(nvfp4_weight(100, 64, device="cuda"))
    arguments = (random_x(3, 64), *fields(ready), 100)
    assert registry.table("nvfp4_linear", *arguments).splitlines()[2].split() == ["cuda", "serves"]
    torch.library.opcheck(torch.ops.step_kernels.nvfp4_linear.default, arguments)
