"""The Hopper kernels of linear and of SwiGLU behind it: what they take; on a GPU their errors, edges, bits, graphs."""

from __future__ import annotations

import itertools
import re
import shutil

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.cuda import linear as launcher
from step_kernels.cuda import tensor_map
from step_kernels.testing import assert_close_to_reference, relative_error

gpu = pytest.mark.gpu
BF16 = torch.bfloat16
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


VARIANTS = [launcher.BESIDE, *launcher.BF16, *launcher.FP8, *launcher.SWIGLU.values()]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not on PATH")
@pytest.mark.parametrize("fp8", [False, True])
def test_kernels_compile_to_the_launchers_symbols_with_products_in_flight(fp8):
    from step_kernels.cuda import driver

    variants = [variant for variant in VARIANTS if variant.fp8 == fp8]
    cubin, report = driver.build.compile_with_nvcc(variants[0].kernel.source, "90a")
    symbols = {symbol.decode() for symbol in re.findall(rb"\.text\.(\w+)\0", cubin)}
    split = {launcher.SPLIT.symbol} if fp8 else set()
    assert symbols == {variant.kernel.symbol for variant in variants} | split
    assert "serialized" not in report  # ptxas' word where it makes every wgmma wait for the one before
    assert set(re.findall(r"(\d+) bytes spill", report)) == {"0"}


def test_a_small_block_of_the_next_kernel_fits_beside_each_ones():
    for variant in VARIANTS:
        assert variant.shared_bytes + 1024 + 8 * 1024 <= 228 * 1024
        assert variant.rows * variant.tokens <= launcher.MOST_SUMS


def split(x: torch.Tensor, joined: bool) -> torch.Tensor:
    """bf16 [m, k] -> f64: what the FP8 kernel multiplies, x = 2^e (hi + lo); `joined` as with up to four tokens."""
    e = x.double().abs().amax(-1, keepdim=True).clamp(min=2.0**-119).log2().floor()
    v = (x.double() * torch.exp2(7 - e)).float()
    hi = v.to(torch.float8_e4m3fn).float()
    lo = ((v - hi) * 16).to(torch.float8_e4m3fn).float() / 16 if joined else (v - hi).to(torch.float8_e5m2).float()
    return (hi.double() + lo) * torch.exp2(e - 7)


@pytest.mark.parametrize("joined", [False, True])
def test_split_x_is_exact_within_2_to_the_13_of_the_largest_and_errs_by_2_to_the_minus_21_of_it_below(joined):
    every = torch.arange(0x3F80, 0x3F80 + 128, dtype=torch.int16).view(BF16)  # 1 to 2
    for octave in range(13):
        x = torch.cat((every.float() * 2.0**-octave, torch.tensor([-1.9921875])))[None].bfloat16()
        assert torch.equal(split(x, joined), x.double())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 256, generator=generator) * torch.exp2(-30 * torch.rand(64, 256, generator=generator))
    error = (split(x.bfloat16(), joined) - x.bfloat16().double()).abs()
    assert error.any() and (error <= x.double().abs().amax(-1, keepdim=True) * 2.0**-21).all()


@pytest.fixture
def launched(monkeypatch):
    """What each launch was given, on the CPU: tokens of the variant, blocks, arguments."""
    calls = []

    def launch(variant):
        name = f"swiglu {variant.tokens}" if variant.paired else variant.tokens
        return lambda grid, block, *args: calls.append((name, grid[0], args))

    for variant in VARIANTS:
        monkeypatch.setattr(variant.kernel, "launch", launch(variant))
    monkeypatch.setattr(launcher.SPLIT, "launch", lambda grid, block, *args: calls.append(("split", grid[0], args)))
    monkeypatch.setattr(launcher, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launcher, "parts", lambda device: torch.zeros(132, 8192, dtype=torch.int32))
    monkeypatch.setattr(launcher, "tensor_map", lambda *layout: (*layout, *[0] * (16 - len(layout))))
    return calls


def test_each_number_of_tokens_goes_to_the_smallest_variant_with_room(launched):
    weight = torch.zeros(256, 512, dtype=BF16)
    codes, scale = weight.to(torch.float8_e4m3fn), torch.ones(256)
    for m in (1, 4, 5, 8, 9, 16, 17, 32, 33, 64):
        x = torch.zeros(m, 512, dtype=BF16)
        for out in (launcher.launch(x, weight), launcher.launch_fp8(x, codes, scale)):
            assert out.shape == (m, 256) and out.dtype == BF16
    wanted = [8, 4] * 2 + [8] * 4 + [16, "split", 16] * 2 + [32, "split", 32] * 2 + [64, "split", 64] * 2
    assert [tokens for tokens, _, _ in launched] == wanted
    assert launcher.launch(torch.zeros(2, 0, 512, dtype=BF16), weight).shape == (2, 0, 256)
    assert launcher.launch(torch.zeros(2, 0, dtype=BF16), weight[:, :0]).count_nonzero() == 0
    assert len(launched) == len(wanted)


def test_weights_of_a_share_expert_leave_half_of_the_shared_memory_to_a_kernel_beside(monkeypatch):
    shared = []

    def launch(size):
        return lambda *args: shared.append(size)

    for variant in (launcher.BESIDE, launcher.BF16[0]):
        monkeypatch.setattr(variant.kernel, "launch", launch(variant.shared_bytes))
    for name, value in (("multiprocessors", 132), ("parts", torch.zeros(1)), ("tensor_map", ())):
        monkeypatch.setattr(launcher, name, lambda *args, value=value: value)
    for n, k in ((2560, 4096), (4096, 1280), (4096, 4096), (4097, 4096)):
        launcher.launch(torch.zeros(1, k, dtype=BF16), torch.zeros(n, k, dtype=BF16))
    half, whole = launcher.BESIDE.shared_bytes, launcher.BF16[0].shared_bytes
    assert shared == [half, half, half, whole] and half + 1024 + 113 * 1024 + 1024 <= 228 * 1024


def test_more_than_64_tokens_times_fp8_weights_go_by_64s(launched):
    codes, scale = torch.zeros(200, 512).to(torch.float8_e4m3fn), torch.ones(200)
    x = torch.zeros(2, 70, 512, dtype=BF16)
    assert launcher.refuse_fp8(x, codes, scale) is None and launcher.launch_fp8(x, codes, scale).shape == (2, 70, 200)
    assert [tokens for tokens, _, _ in launched] == ["split", 64, "split", 64, "split", 16]
    many = torch.zeros(257, 512, dtype=BF16)
    assert launcher.refuse_fp8(many, codes, scale) == "takes at most 256 tokens, got 257"


def test_a_block_a_multiprocessor_unless_there_are_fewer_units(launched):
    for n, k, m in ((4096, 4096, 1), (64, 128, 1), (100, 1000, 8), (130, 1000, 9)):
        launcher.launch(torch.zeros(m, k, dtype=BF16), torch.zeros(n, k, dtype=BF16))
    launcher.launch_fp8(
        torch.zeros(3, 1040, dtype=BF16), torch.zeros(100, 1040).to(torch.float8_e4m3fn), torch.ones(100)
    )
    assert [blocks for _, blocks, _ in launched] == [132, 1, 16, 32, 10]
    shapes = [(1, 4096, 32, 0), (1, 64, 1, 0), (8, 100, 8, 0), (9, 130, 16, 0)]
    assert [args[2:6] for _, _, args in launched[:4]] == shapes and launched[4][2][4:8] == (3, 100, 5, 0)


def test_swiglu_goes_to_the_paired_variants_with_its_limit(launched):
    weight = torch.zeros(160, 528, dtype=BF16)
    codes, scale = weight.to(torch.float8_e4m3fn), torch.ones(160)
    for m, limit in ((1, None), (8, 16.0), (9, 7.0), (16, 0.5)):
        x = torch.zeros(m, 528, dtype=BF16)
        for out in (launcher.launch_swiglu(x, weight, limit), launcher.launch_fp8_swiglu(x, codes, scale, limit)):
            assert out.shape == (m, 80) and out.dtype == BF16
    calls = [call for call in launched if call[0] != "split"]
    assert [tokens for tokens, _, _ in calls] == [f"swiglu {t}" for t in (8, 4, 8, 8, 16, 16, 16, 16)]
    assert [args[2:7] for _, _, args in calls[:2:2]] == [(1, 160, 5, 0, torch.inf)]
    assert [args[4:9] for _, _, args in calls[3::2]] == [(8, 160, 3, 0, 16), (9, 160, 5, 0, 7), (16, 160, 5, 0, 0.5)]
    for (_, _, args), first in zip(calls, itertools.cycle((7, 9))):  # the weights' map is paired, that of x is not
        assert args[first + 8] is True and args[first + 16 + 8] == 0
    assert launcher.launch_fp8_swiglu(torch.zeros(2, 70, 528, dtype=BF16), codes, scale).shape == (2, 70, 80)
    assert [tokens for tokens, _, _ in launched[-6::2]] == ["split"] * 3 and len(launched) == 10 + 6
    assert launcher.launch_swiglu(torch.zeros(0, 528, dtype=BF16), weight).shape == (0, 80)


def test_a_paired_map_goes_through_8_rows_of_gate_then_8_of_up(monkeypatch):
    made = []

    class Driver:
        @staticmethod
        def cuTensorMapEncodeTiled(at, dtype, rank, address, sizes, strides, box, *_):
            made.append((list(sizes)[:rank], [1, *list(strides)[: rank - 1]], list(box)[:rank]))
            return 0

    monkeypatch.setattr(tensor_map, "_libcuda", lambda: Driver)
    weight = torch.arange(48 * 64, dtype=torch.int16).view(48, 64)
    launcher.tensor_map.__wrapped__(4096, 48, 64, 128, 2, 64, 32, True, True)
    (sizes, strides, box), *_ = made
    assert (sizes, box) == ([64, 8, 2, 3], [64, 8, 2, 2])
    strides = [1] + [stride // 2 for stride in strides[1:]]  # bytes to values
    through = weight.as_strided(sizes[::-1], strides[::-1])
    order = [row for group in range(3) for half in (0, 24) for row in range(half + 8 * group, half + 8 * group + 8)]
    assert torch.equal(through.reshape(48, 64), weight[order])
    launcher.tensor_map.__wrapped__(4096, 48, 64, 128, 2, 64, 32, True)
    assert made[1] == ([64, 48], [1, 128], [64, 32])


def test_x_of_more_than_8_tokens_is_split_ahead_of_fp8_weights(launched):
    codes = torch.zeros(100, 1040).to(torch.float8_e4m3fn)
    launcher.launch_fp8(torch.zeros(20, 1048, dtype=BF16)[:, :1040], codes, torch.ones(100))
    (_, blocks, split), (_, _, args) = launched
    assert blocks == 23 and split[1] == 1048 and split[4:] == (20, 1040, 32)  # 20 x 9 parts of 128, 8 a block
    assert split[2].shape == (64, 1040) and split[3].shape == (9, 32)
    assert args[1] is split[3] and args[9 + 16 :][:8] == (split[2].data_ptr(), 64, 1040, 1040, 1, 128, 32, True)


def test_rows_the_copy_engine_cannot_reach_are_copied(launched):
    weight, wide = torch.zeros(64, 176, dtype=BF16), torch.zeros(4, 184, dtype=BF16)
    for x, copied in (
        (wide[:, :176], False), (wide[::2, 8:], False), (wide[:, 1:177], True), (wide[:1, :176].expand(4, 176), True),
        (torch.zeros(4 * 178, dtype=BF16).view(4, 178)[:, :176], True),
    ):  # fmt: skip
        launcher.launch(x, weight)
        address, rows, columns, stride, size, *box = launched[-1][2][7 + 16 :][:8]
        assert (rows, columns, size, box) == (len(x), 176, 2, [64, 8, True]) and address % 16 == 0
        assert (address != x.data_ptr()) == copied and stride == 2 * (176 if copied else x.stride(0))


def test_refusals_say_what_came_and_what_is_taken():
    weight = torch.zeros(64, 72, dtype=BF16)

    def cannot(m: int, weight: torch.Tensor, out_dtype=None, dtype=BF16):
        return launcher.cannot(torch.zeros(m, weight.shape[1], dtype=dtype), weight, out_dtype)

    assert cannot(64, weight) is None and cannot(1, weight, torch.float32) is None and cannot(1, weight, BF16) is None
    assert cannot(65, weight) == "takes at most 64 tokens, got 65"
    assert cannot(1, weight, torch.float16) == "takes bfloat16 to bfloat16 or float32, got bfloat16 to float16"
    assert cannot(1, weight.float(), dtype=torch.float32).endswith("got float32 to float32")
    for short in (weight[:, :71], weight[:, 1:65], weight.mT.contiguous().mT, weight[:1].expand(4, 72)):
        assert cannot(1, short).startswith("takes rows at multiples of 16 bytes, got k = ")
        assert launcher.refuse(torch.zeros(1, short.shape[1], dtype=BF16), short) == cannot(1, short)
    x, codes = torch.zeros(2, 72, dtype=BF16), weight.to(torch.float8_e4m3fn)
    assert launcher.refuse_fp8(x, codes, torch.ones(64)).startswith("takes rows at multiples of 16 bytes, got k = 72")
    assert launcher.refuse_fp8(x[:, :64].expand(2, 64), torch.zeros(64, 64).to(codes.dtype), torch.ones(64)) is None


def test_swiglu_refuses_what_does_not_pair_in_8_rows_and_what_cublas_does_faster():
    weight, most = torch.zeros(72, 64, dtype=BF16), launcher.FAST_SWIGLU_TOKENS
    x, (codes, scale) = torch.zeros(most + 1, 64, dtype=BF16), (weight.to(torch.float8_e4m3fn), torch.ones(72))
    assert launcher.refuse_swiglu(x[:most], weight[:64]) is None
    assert launcher.refuse_swiglu(x, weight[:64]) == f"is the faster up to {most} tokens, got {most + 1}"
    assert launcher.refuse_fp8_swiglu(x, codes[:64], scale[:64]) is None
    odd = "takes gate and up of 8 rows or a multiple, got 36"
    assert launcher.refuse_swiglu(x[:1], weight) == odd and launcher.refuse_fp8_swiglu(x, codes, scale) == odd
    assert launcher.refuse_swiglu(x[:1].float(), weight[:64].float()).endswith("got float32 to float32")


def test_what_cublas_does_faster_goes_there_unless_it_comes_out_in_f32_or_in_fp8():
    weight, x = torch.zeros(200, 64, dtype=BF16), torch.zeros(9, 64, dtype=BF16)
    assert launcher.refuse(x[:8], weight) is None
    assert launcher.refuse(x, weight) == "is the faster up to 8 tokens, got 9"
    assert launcher.refuse(x, weight, torch.float32) is None
    assert launcher.refuse_fp8(x, weight.to(torch.float8_e4m3fn), torch.ones(200)) is None


def cuda(x: torch.Tensor, weight: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    """The kernel itself, with NaN where its output will be."""
    size = weight.shape[0] * x[..., 0].numel() * (out_dtype or x.dtype).itemsize
    torch.full((size,), 255, dtype=torch.uint8, device="cuda")  # freed: what the allocator hands out next
    return launcher.launch(x, weight, out_dtype)


def fp8(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, out_dtype: torch.dtype | None = None):
    """The FP8 kernel itself, likewise."""
    size = codes.shape[0] * x[..., 0].numel() * (out_dtype or x.dtype).itemsize
    torch.full((size,), 255, dtype=torch.uint8, device="cuda")
    return launcher.launch_fp8(x, codes, scale, out_dtype)


def quantized(n: int, k: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales, a row's largest weight at 448, as quantizing Gaussian rows of different sizes leaves them."""
    weight = random(n, k, seed=seed).float() * torch.linspace(0.1, 3, n, device="cuda")[:, None]
    scale = weight.abs().amax(1) / 448
    return (weight / scale[:, None]).to(torch.float8_e4m3fn), scale


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda()


@gpu
@pytest.mark.parametrize(
    "n, k", [(4096, 4096), (2560, 4096), (4096, 1280), (1030, 4104), (96, 12288), (130, 176), (7, 8), (8192, 72)]
)
def test_errs_no_more_than_torch_for_every_number_of_tokens(n, k):
    weight = random(n, k, seed=1)
    for m in (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64):
        try:
            assert_close_to_reference(cuda, sk.linear.reference, random(m, k, seed=m), weight)
            x = random(m, k, seed=m)
            assert relative_error(cuda(x, weight, torch.float32), x.double() @ weight.double().mT) < 5e-5
        except AssertionError as error:
            raise AssertionError(f"m = {m}: {error}") from None


@gpu
@pytest.mark.parametrize(
    "n, k", [(10304, 4096), (14432, 4096), (4096, 11264), (22528, 4096), (4096, 12288), (128896, 4096)]
)
def test_the_models_shapes_err_by_no_more_than_rounding(n, k):
    weight = torch.randn(n, k, device="cuda", dtype=BF16)
    for m in (1, 16, 64):
        x = random(m, k, seed=m)
        wanted = torch.cat([x.double() @ part.double().mT for part in weight.split(8192)], 1)
        assert relative_error(cuda(x, weight), wanted) < 2**-8, f"m = {m}"


@gpu
def test_every_output_is_written_and_none_beyond():
    for n in (1, 63, 64, 65, 127, 128, 129, 200):
        for m in (1, 5, 12, 30, 50):
            x, weight = torch.ones(m, 136, device="cuda", dtype=BF16), torch.ones(n, 136, device="cuda", dtype=BF16)
            weight *= torch.arange(n, device="cuda", dtype=BF16)[:, None] % 2 + 1
            wanted = (136.0 * (torch.arange(n, device="cuda") % 2 + 1)).expand(m, n)
            assert torch.equal(cuda(x, weight).float(), wanted) and torch.equal(cuda(x, weight, torch.float32), wanted)


@gpu
@pytest.mark.parametrize("m", [1, 8, 40])
def test_nan_and_infinite_rows_spoil_no_other_row(m):
    x, weight = random(m + 1, 4096), random(300, 4096, seed=1)
    clean = cuda(x, weight)
    for bad in (torch.nan, torch.inf):
        x[1, 700] = bad
        out = cuda(x, weight)
        assert not out[1].isfinite().any() and torch.equal(out[[0, *range(2, m + 1)]], clean[[0, *range(2, m + 1)]])


@gpu
def test_strided_rows_and_rows_of_a_merged_weight_give_what_copies_give():
    merged, x = random(700, 264, seed=1), random(6, 4, 280)
    for weight in (merged[100:400, :176], merged[64:, 88:], merged[::2, :256]):
        k = weight.shape[1]
        for view in (
            x[::2, 1, :k],
            x[..., 1 : k + 1],
            x.transpose(0, 1)[..., 8 : k + 8],
            x[:1, :1, :k].expand(2, 4, k),
        ):
            out = cuda(view, weight)
            assert out.shape == (*view.shape[:-1], len(weight)) and out.is_contiguous()
            assert torch.equal(out, cuda(view.contiguous(), weight.contiguous()))


@gpu
@pytest.mark.parametrize("m", [1, 8, 12, 64])
def test_gives_the_same_bits_on_every_run_and_in_graphs(m):
    weights = [random(4096, 1280, seed=1) / 32, random(2560, 4096, seed=2) / 64, random(1280, 2560, seed=3) / 50]
    x = random(m, 1280)

    def chain():
        first = launcher.launch(x, weights[0])
        second = launcher.launch(first, weights[1])
        third = launcher.launch(second, weights[2])
        return first, second, third, launcher.launch(third, weights[0], torch.float32)

    wanted = chain()
    for a, b, weight in ((x, 0, 0), (0, 1, 1), (1, 2, 2)):
        exact = (a if b == 0 else wanted[a]).double() @ weights[weight].double().mT
        assert relative_error(wanted[b], exact) < 2**-8
    for _ in range(50):
        assert all(map(torch.equal, chain(), wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in (0, 1, 2):
        x.copy_(random(m, 1280, seed=seed))
        graph.replay()
        assert all(map(torch.equal, out, chain()))


@gpu
@pytest.mark.parametrize("m", [8, 16, 32, 64])
def test_parts_are_absent_again_after_every_kernel(m):
    for n, k in ((4096, 4096), (64, 12288), (320, 12288), (128, 8), (2560, 4096)):
        x, weight = random(m, k), random(n, k, seed=1)
        x[0, 5] = torch.nan
        for _ in range(3):
            cuda(x, weight)
        assert (launcher.parts(x.device) == -1).all()


@gpu
def test_streams_keep_their_sums_apart():
    weight = random(1024, 4096, seed=9)
    xs = [random(3, 4096, seed=seed) for seed in range(4)]
    wanted = [sk.linear(x, weight) for x in xs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in xs]
    outs = [[] for _ in xs]
    for _ in range(20):
        for x, stream, out in zip(xs, streams, outs):
            with torch.cuda.stream(stream):
                out.append(sk.linear(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(o, w) for out, w in zip(outs, wanted) for o in out)


@gpu
@pytest.mark.parametrize("m", [65, 140, 256])
def test_more_than_64_tokens_times_fp8_weights_are_the_products_of_their_parts(m):
    x, codes, scale = random(m, 512), random(200, 512).to(torch.float8_e4m3fn), torch.rand(200, device="cuda") + 0.5
    out = sk.fp8_linear(x, codes, scale)
    assert torch.equal(out, torch.cat([sk.fp8_linear(part, codes, scale) for part in x.split(64)]))
    wanted = x.double() @ codes.double().mT * scale.double()
    assert relative_error(out, wanted) < 2e-3


@gpu
def test_many_tokens_and_other_types_go_to_torch():
    weight = random(256, 512)
    for x in (random(65, 512), random(2, 40, 512), random(9, 512)):
        assert registry.table("linear", x, weight).splitlines()[-1].split() == ["reference", "serves"]
        assert torch.equal(sk.linear(x, weight), torch.nn.functional.linear(x, weight))
        wide = sk.linear(x, weight, torch.float32)
        assert wide.shape == (*x.shape[:-1], 256) and relative_error(wide, x.double() @ weight.double().mT) < 5e-5
    assert sk.linear(random(2, 512).float(), weight.float()).dtype == torch.float32


@gpu
def test_op_on_the_gpu_keeps_the_rules_of_torch_library():
    for out_dtype in (None, torch.float32):
        arguments = (random(3, 64), random(100, 64), out_dtype)
        assert registry.table("linear", *arguments).splitlines()[1].split() == ["cuda", "serves"]
        torch.library.opcheck(torch.ops.step_kernels.linear.default, arguments)


@gpu
@pytest.mark.parametrize(
    "n, k", [(4096, 4096), (2560, 4096), (4096, 1280), (1030, 4112), (96, 12288), (130, 176), (7, 16)]
)
def test_fp8_weights_err_no_more_than_torch_for_every_number_of_tokens(n, k):
    codes, scale = quantized(n, k)
    for m in (1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64):
        try:
            x = random(m, k, seed=m)
            assert_close_to_reference(
                lambda x, *_: fp8(x, codes, scale), lambda x, *_: sk.fp8_linear.reference(x, codes, scale), x
            )
            wanted = sk.fp8_linear.reference(x.double(), codes, scale)
            assert relative_error(fp8(x, codes, scale, torch.float32), wanted) < 2**-10  # of short sums
        except AssertionError as error:
            raise AssertionError(f"m = {m}: {error}") from None


@gpu
@pytest.mark.parametrize("m", [1, 4, 8, 20, 64])
def test_large_activations_leave_their_small_neighbours_exact_beside_fp8_weights(m):
    codes, scale = quantized(512, 2048)
    x = random(m, 2048)
    x[:, ::16] *= 2**12
    codes.view(torch.uint8)[:, ::16] = 0
    assert_close_to_reference(lambda x: fp8(x, codes, scale), lambda x: sk.fp8_linear.reference(x, codes, scale), x)


@gpu
@pytest.mark.parametrize("m", [1, 3, 8, 40])
def test_nan_and_infinite_rows_spoil_no_other_row_of_fp8(m):
    (codes, scale), x = quantized(300, 4096), random(m + 1, 4096)
    clean = fp8(x, codes, scale)
    for bad in (torch.nan, torch.inf):
        x[1, 700] = bad
        out = fp8(x, codes, scale)
        assert out[1].isnan().all() and torch.equal(out[[0, *range(2, m + 1)]], clean[[0, *range(2, m + 1)]])


@gpu
@pytest.mark.parametrize("m", [1, 7, 12, 32, 64])
def test_fp8_gives_the_same_bits_on_every_run_in_graphs_and_beside_bf16(m):
    (codes, scale), weight, x = quantized(2560, 1280), random(1280, 2560, seed=2) / 64, random(m, 1280)

    def chain():
        first = launcher.launch_fp8(x, codes, scale)
        second = launcher.launch(first, weight)
        return first, second, launcher.launch_fp8(second, codes, scale)

    wanted = chain()
    for _ in range(50):
        assert all(map(torch.equal, chain(), wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in (0, 1, 2):
        x.copy_(random(m, 1280, seed=seed))
        graph.replay()
        assert all(map(torch.equal, out, chain()))
    assert (launcher.parts(x.device) == -1).all()


@gpu
def test_more_than_256_tokens_of_fp8_go_to_torch_in_bf16():
    (codes, scale), x = quantized(256, 512), random(257, 512)
    assert registry.table("fp8_linear", x[:256], codes, scale).splitlines()[1].split() == ["cuda", "serves"]
    assert registry.table("fp8_linear", x, codes, scale).splitlines()[-1].split() == ["reference", "serves"]
    wanted = sk.fp8_linear.reference(x.double(), codes, scale)
    assert relative_error(sk.fp8_linear(x, codes, scale), wanted) < 2**-8
    assert relative_error(sk.fp8_linear(x, codes, scale, torch.float32), wanted) < 1e-5
    torch.library.opcheck(torch.ops.step_kernels.fp8_linear.default, (x[:3], codes, scale), test_utils=NO_SCHEMA_TEST)


def both(kind: str, n: int, k: int, whole: bool = False):
    """The kernel behind linear_swiglu or fp8_linear_swiglu, with NaN where its output will be, and their reference with
    the kernels that serve it, both as functions of x and limit; `whole`: small integers, whose sums are exact."""
    generator = torch.Generator("cuda").manual_seed(1)
    weight = torch.randint(-1, 2, (n, k), device="cuda", generator=generator).bfloat16() if whole else random(n, k)
    scale = torch.exp2(torch.randint(-2, 3, (n,), device="cuda", generator=generator).float())
    scale, codes = scale if whole else scale * k**-0.5, weight.to(torch.float8_e4m3fn)
    weight *= 1 if whole else k**-0.5

    def kernel(x, limit):
        torch.full((x[..., 0].numel() * n,), 255, dtype=torch.uint8, device="cuda")
        if kind == "fp8":
            return launcher.launch_fp8_swiglu(x, codes, scale, limit)
        return launcher.launch_swiglu(x, weight, limit)

    def reference(x, limit):
        if kind == "fp8":
            return sk.fp8_linear_swiglu.reference(x, codes, scale, limit)
        return sk.linear_swiglu.reference(x, weight.to(x.dtype), limit)

    return kernel, reference


@gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("n, k", [(2560, 4096), (22528, 4096), (1040, 1040), (16, 16), (208, 12288), (48, 272)])
def test_swiglu_has_the_bits_of_linear_and_swiglu_one_after_the_other(kind, n, k):
    kernel, reference = both(kind, n, k, whole=True)
    for m in (1, 2, 4, 5, 8, 9, 16) + (17, 32, 33, 64) * (kind == "fp8"):
        x = torch.randint(-1, 2, (m, k), generator=torch.Generator().manual_seed(m)).bfloat16().cuda() * 2**-5
        for limit in (None, 16.0, 0.75):
            out, wanted = kernel(x, limit), reference(x, limit)
            assert out.shape == (m, n // 2) and torch.equal(out, wanted), (
                f"m = {m}, limit = {limit}: {int((out != wanted).sum())} of {out.numel()} differ, "
                f"the first at {(out != wanted).nonzero()[:1].tolist()}"
            )


@gpu
@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("n, k", [(2560, 4096), (22528, 4096), (1040, 1040)])
def test_swiglu_errs_no_more_than_the_two_ops(kind, n, k):
    kernel, reference = both(kind, n, k)
    for m in (1, 3, 7, 8, 12, 16) + (30, 64) * (kind == "fp8"):
        x = random(m, k, seed=m)
        for limit in (None, 1.0):
            try:
                assert_close_to_reference(lambda x: kernel(x, limit), lambda x: reference(x, limit), x)  # noqa: B023
            except AssertionError as error:
                raise AssertionError(f"m = {m}, limit = {limit}: {error}") from None


@gpu
@pytest.mark.parametrize("kind, m", [("bf16", 1), ("bf16", 8), ("bf16", 15), ("fp8", 1), ("fp8", 8), ("fp8", 40)])
def test_nan_and_infinite_rows_spoil_no_other_row_of_swiglu(kind, m):
    x = random(m + 1, 4096)
    kernel, _ = both(kind, 304, 4096)
    clean = kernel(x, 7.0)
    for bad in (torch.nan, torch.inf):
        x[1, 700] = bad
        out = kernel(x, 7.0)
        assert torch.equal(out[[0, *range(2, m + 1)]], clean[[0, *range(2, m + 1)]])
        assert out[1].isnan().all() or bad == torch.inf


@gpu
def test_swiglu_of_strided_rows_and_of_a_part_of_a_merged_weight_gives_what_copies_give():
    merged, x = random(700, 264, seed=1), random(6, 280)
    for weight in (merged[100:420, :176], merged[64:576, 88:], merged[:640:2, :256]):
        k = weight.shape[1]
        for view in (x[::2, :k], x[:, 1 : k + 1]):
            out = launcher.launch_swiglu(view, weight, 1.0)
            assert torch.equal(out, launcher.launch_swiglu(view.contiguous(), weight.contiguous(), 1.0))


@gpu
@pytest.mark.parametrize("m", [1, 8, 12, 16])
def test_a_gated_mlp_gives_the_same_bits_on_every_run_and_in_graphs(m):
    gate_up, down, x = random(2560, 4096, seed=1) / 64, random(4096, 1280, seed=2) / 32, random(m, 4096)
    codes, scale = quantized(2560, 4096)

    def chain():
        first = launcher.launch(launcher.launch_swiglu(x, gate_up, 16.0), down)
        return first, launcher.launch(launcher.launch_fp8_swiglu(first, codes, scale), down)

    wanted = chain()
    for _ in range(50):
        assert all(map(torch.equal, chain(), wanted))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = chain()
    for seed in (0, 1, 2):
        x.copy_(random(m, 4096, seed=seed))
        graph.replay()
        assert all(map(torch.equal, out, chain()))
    assert (launcher.parts(x.device) == -1).all()


@gpu
def test_swiglu_ops_on_the_gpu_keep_the_rules_of_torch_library_and_leave_many_tokens_to_two_ops():
    weight, x = random(96, 64), random(100, 64)
    codes, scale = weight.to(torch.float8_e4m3fn), torch.rand(96, device="cuda")
    assert registry.table("linear_swiglu", x[:3], weight).splitlines()[1].split() == ["cuda", "serves"]
    assert registry.table("linear_swiglu", x, weight).splitlines()[-1].split() == ["reference", "serves"]
    assert torch.equal(sk.linear_swiglu(x, weight, 1.0), sk.swiglu(sk.linear(x, weight), 1.0))
    torch.library.opcheck(torch.ops.step_kernels.linear_swiglu.default, (x[:3], weight, 1.0))
    fp8_op, arguments = torch.ops.step_kernels.fp8_linear_swiglu.default, (x[:3], codes, scale, 1.0)
    torch.library.opcheck(fp8_op, arguments, test_utils=NO_SCHEMA_TEST)
    assert registry.table("fp8_linear_swiglu", x, codes, scale).splitlines()[1].split() == ["cuda", "serves"]
    split = torch.cat([launcher.launch_fp8_swiglu(part, codes, scale) for part in x.split(64)])
    assert torch.equal(sk.fp8_linear_swiglu(x, codes, scale), split)
