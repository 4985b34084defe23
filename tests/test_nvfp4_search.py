"""The nvfp4_search op: the specification's bits from the CUDA kernels, at every kind of weight and global scale."""

from __future__ import annotations

import pytest
import torch

import step_kernels as sk
from step_kernels import nvfp4, registry

gpu = pytest.mark.gpu
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
OPS = torch.ops.step_kernels
NAMES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
N, K = 96, 1024


def weights(kind: str, n: int = N, k: int = K, device: str = "cpu") -> torch.Tensor:
    """f32 [n, k]."""
    g = torch.Generator(device).manual_seed(0)
    w = torch.randn(n, k, generator=g, device=device) * 0.02
    some = torch.rand(n, k, generator=g, device=device)
    if kind == "t5":  # Student's t with 5 degrees of freedom
        return w * (torch.randn(5, n, k, generator=g, device=device).square().mean(0)).rsqrt()
    return {
        "gaussian": w,
        "all magnitudes": w * torch.exp2(some * 40 - 24),
        "mostly zero": w * (some > 0.95),
        "-0": -(w * (some > 0.5)).abs(),
        "zero": w * 0,
        "outliers": torch.where(some > 0.9999, w * 1e4, w),
        "on the grid": (some * 13 - 6.5).round(),
        "on ties": (some * 49 - 24.5).round() * 0.25,
        "nearly equal": (some * 2 - 1).sign() * (0.02 + some * 1e-4),
        "large": w * 1e5,
        "tiny": w * 1e-6,
        "subnormal": w * 1e-38,
    }[kind]


KINDS = ("gaussian", "t5", "all magnitudes", "mostly zero", "-0", "zero", "outliers", "on the grid", "on ties")
KINDS += ("nearly equal", "large", "tiny", "subnormal")


def reference(x: torch.Tensor, scale: torch.Tensor, search: str) -> tuple[torch.Tensor, torch.Tensor]:
    scales = nvfp4.search_scales(x, scale, search)
    return nvfp4.quantize(x, scale, scales)


def assert_same_bits(got, wanted, x=None):
    for name, a, b in zip(("codes", "scales"), got, wanted):
        assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.is_contiguous()
        a, b = a.view(torch.uint8), b.view(torch.uint8).to(a.device)
        different = (a != b).flatten()
        if different.any():
            at = int(different.nonzero()[0])
            where = "" if x is None else f"; first of {x.reshape(-1, 16)[at // (8 if name == 'codes' else 1)].tolist()}"
            values = f"got {int(a.flatten()[at])}, wanted {int(b.flatten()[at])}"
            raise AssertionError(f"{int(different.sum())} of {a.numel()} {name} differ: {values}{where}")


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_op_is_the_formats_search_and_encoding_of_any_strides(search):
    x, scale = weights("gaussian", 8, 96), torch.tensor(3e-5)
    for view in (x, x[::2], x[:, 16:64], x.unflatten(1, (2, 48)).transpose(0, 1), x.mT[:, :0], x[:0]):
        assert_same_bits(sk.nvfp4_search(view, scale, search), reference(view.contiguous(), scale, search))


def test_mse_leaves_the_least_error_and_max_the_most():
    x = weights("t5")
    errors = []
    for search in ("mse", "four-six", "max"):
        scale = nvfp4.global_scale(x.abs().amax(), search)
        values = nvfp4.dequantize(*sk.nvfp4_search(x, scale, search), scale)
        errors.append(float((values - x).square().sum()))
    assert errors[0] < 0.95 * errors[1] < 0.95 * errors[2]


def test_wrong_arguments_are_named():
    scale = torch.tensor(1.0)
    with pytest.raises(ValueError, match="x: got last dimension 24, wanted a multiple of 16"):
        sk.nvfp4_search(torch.zeros(24), scale, "mse")
    with pytest.raises(ValueError, match="search: got 'best', wanted one of mse, max, four-six"):
        sk.nvfp4_search(torch.zeros(16), scale, "best")
    with pytest.raises(ValueError, match=r"global_scale: got shape \[1\], wanted \[\]"):
        sk.nvfp4_search(torch.zeros(16), scale[None], "mse")
    with pytest.raises(TypeError, match="x: got int8, wanted bfloat16 or"):
        sk.nvfp4_search(torch.zeros(16, dtype=torch.int8), scale, "mse")


def test_kernel_refuses_float64_and_weights_beyond_its_counters():
    pytest.importorskip("cuda.bindings")
    scale = torch.tensor(1.0)

    def row(x):
        return (
            registry.table("nvfp4_search", x, scale.to(x.device), "mse", capability=80).splitlines()[1].split(None, 1)
        )

    assert row(torch.zeros(2, 32)) == row(torch.zeros(2, 32, dtype=torch.float16)) == ["cuda", "serves"]
    assert row(torch.zeros(2, 32).double())[1] == "takes bfloat16, float16 and float32, got float64"
    huge = torch.empty(2**20, 2**14, dtype=torch.bfloat16, device="meta")
    assert row(huge)[1] == "takes fewer than 17179869184 weights, got 17179869184"
    assert row(huge[:-1])[1] == "serves"


@pytest.mark.parametrize("shape, wanted", [((1, 16), 1), ((32, 16), 1), ((33, 16), 2), ((4096, 4096), 10)])
def test_a_thread_block_for_a_tile_of_32_blocks_up_to_one_a_multiprocessor(monkeypatch, shape, wanted):
    """What is launched, on CPU tensors whose kernel is left out."""
    from step_kernels.cuda import nvfp4_search

    launched = []
    monkeypatch.setattr(nvfp4_search, "multiprocessors", lambda index: 10)
    monkeypatch.setattr(nvfp4_search.Kernel, "launch", lambda kernel, *arguments: launched.append((kernel, *arguments)))
    nvfp4_search.launch(torch.empty(shape, dtype=torch.float16), torch.tensor(1.0), "four-six")
    kernel, grid, threads, *_, blocks = launched[0]
    assert kernel.symbol == "smxx_nvfp4_search_f16_four_six"
    assert (grid, threads, blocks) == ((wanted, 1, 1), 768, shape[0] * shape[1] // 16)


def test_error_is_that_of_the_decoded_weights():
    x, one = torch.full((2, 16), 5.5), torch.tensor(1.0)
    codes, scales = torch.full((2, 8), 0x77, dtype=torch.uint8), torch.ones(2, 1).to(torch.float8_e4m3fn)
    assert sk.nvfp4_error(x, codes, scales, one).tolist() == [32 * 0.25, 32 * 30.25]
    assert sk.nvfp4_error(x[:0], codes[:0], scales[:0], one).tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"scales: got shape \[2, 1\], wanted \[2, 2\]"):
        sk.nvfp4_error(torch.zeros(2, 32), torch.zeros(2, 16, dtype=torch.uint8), scales, one)


# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def test_opcheck_passes():
    x, scale = weights("gaussian", 6, 64), torch.tensor(3e-5)
    torch.library.opcheck(OPS.nvfp4_search.default, (x, scale, "mse"))
    arguments = x, *sk.nvfp4_search(x, scale, "mse"), scale
    torch.library.opcheck(OPS.nvfp4_error.default, arguments, test_utils=NO_SCHEMA_TEST)


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_give_the_bits_of_the_cpu(kind, search, dtype):
    x = weights(kind).clamp(-6e4, 6e4).to(dtype)
    own = nvfp4.global_scale(x.abs().amax().float(), search)
    with sk.force("cuda"):
        # Others: an exponent alone, a mantissa of ones, a scale that saturates and one that makes scales subnormal.
        for scale in (own, torch.tensor(2.0**-15), torch.tensor(2.0**-15 * (2 - 2**-23)), own * 0.3, own * 3000):
            assert_same_bits(sk.nvfp4_search(x.cuda(), scale.cuda(), search), reference(x, scale, search), x)


@gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_kernels_give_every_bf16_number_the_formats_code_whatever_its_neighbours(search):
    numbers = torch.arange(0x7F80, dtype=torch.int32).short().view(torch.bfloat16)
    numbers = torch.cat((numbers, -numbers))
    numbers = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))].view(-1, 16)
    alike = numbers.flatten().abs().sort().values.view(-1, 16)  # blocks whose weights are of a size
    with sk.force("cuda"):
        for x in (numbers, alike):
            for scale in (1.0, 0.013, 1e-18, 1e-38, 1e-44, 0.0, 3e37):
                scale = torch.tensor(scale)
                assert_same_bits(sk.nvfp4_search(x.cuda(), scale.cuda(), search), reference(x, scale, search), x)


@gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_kernels_round_as_the_format_next_to_ties_at_the_global_scale_of_any_bf16_amax(search):
    g = torch.Generator().manual_seed(2)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    with sk.force("cuda"):
        for amax in torch.arange(128, 256) / 2048:  # every mantissa
            scale = nvfp4.global_scale(amax, search)
            code = torch.randint(8, 127, (512, 1), generator=g)  # the block scale by `max`; ties are a candidate's
            other = (code + torch.randint(-2, 7, code.shape, generator=g)).clamp(1, 0x7E)
            max_scale, tied = (c.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale for c in (code, other))
            x = ties[torch.randint(0, 7, (512, 16), generator=g)] * tied
            bits = (x.bfloat16().view(torch.int16) + torch.randint(-1, 2, x.shape, generator=g)).short()
            x = torch.minimum(bits.view(torch.bfloat16), (6 * max_scale).bfloat16())
            x[:, 0] = (6 * max_scale * (0.94 + 0.12 * torch.rand(512, 1, generator=g)))[:, 0]
            x *= torch.randint(0, 2, x.shape, generator=g) * 2 - 1
            assert_same_bits(sk.nvfp4_search(x.cuda(), scale.cuda(), search), reference(x, scale, search), x)


@gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("kind", ["gaussian", "t5"])
def test_kernels_give_the_formats_bits_of_millions_of_blocks_and_the_same_again(kind, search):
    for dtype in (torch.bfloat16, torch.float16):
        x = weights(kind, 4099, 4096, "cuda").to(dtype)
        scale = nvfp4.global_scale(x.abs().amax().float(), search)
        with sk.force("cuda"):
            for factor in (1.0, 1.37, 0.77):  # other roundings of every scale
                got = sk.nvfp4_search(x, scale * factor, search)
                assert_same_bits(got, reference(x, scale * factor, search), x)
                assert_same_bits(sk.nvfp4_search(x, scale * factor, search), got)


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_kernels_take_nan_and_infinite_weights_and_scales_as_the_format(search, dtype):
    x = weights("gaussian", 8, 64).to(dtype)
    x[0, 3], x[1, 20], x[2, 63], x[3, 5], x[3, 6] = torch.nan, torch.inf, -torch.inf, torch.inf, -torch.nan
    with sk.force("cuda"):
        for scale in (3e-5, 1e-3, torch.nan, 1e-42):
            scale = torch.tensor(scale)
            assert_same_bits(sk.nvfp4_search(x.cuda(), scale.cuda(), search), reference(x, scale, search), x)


@gpu
def test_kernels_read_any_strides_and_addresses_and_no_weights():
    x, scale = weights("gaussian", 8, 96).bfloat16().cuda(), torch.tensor(3e-5, device="cuda")
    odd = torch.empty(8 * 96 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(8, 96).copy_(x)
    views = (x[::2], x[:, 16:64], x.unflatten(1, (2, 48)).transpose(0, 1), odd, x[3], x[:0], x[:, :0])
    with sk.force("cuda"):
        for view in views:
            assert_same_bits(sk.nvfp4_search(view, scale, "mse"), reference(view.contiguous(), scale, "mse"))


@gpu
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
@pytest.mark.parametrize("blocks", [1, 31, 33, 1000, 5000])  # up to four tiles a warp
def test_kernels_write_their_outputs_and_nothing_beside_them(blocks, search):
    from step_kernels.cuda.nvfp4_search import THREADS, VARIANTS

    scale = torch.tensor(3e-5, device="cuda")
    for dtype in FLOATS:
        x = weights("gaussian", blocks, 16).to("cuda", dtype)
        codes, scales = (torch.full((blocks + 2, n), 0xA5, dtype=torch.uint8, device="cuda") for n in (8, 1))
        VARIANTS[dtype, search].launch((2, 1, 1), THREADS[search], x, scale, codes[1:], scales[1:], blocks)
        wanted = reference(x, scale, search)
        assert torch.equal(codes[1:-1], wanted[0]) and torch.equal(scales[1:-1], wanted[1].view(torch.uint8))
        assert all((t[0] == 0xA5).all() and (t[-1] == 0xA5).all() for t in (codes, scales))


@gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=NAMES.values())
def test_error_sums_are_the_references_and_the_same_again(dtype):
    codes = torch.arange(256, dtype=torch.uint8, device="cuda").repeat(127 * 16).view(127 * 256, 16)
    scales = torch.arange(127, dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn).repeat_interleave(512)
    cases = [(weights("t5", 127 * 256, 32, "cuda") * 1e3, codes, scales.view(127 * 256, 2), 0.0137)]
    for n, k in ((0, 32), (1, 16), (33, 48), (1280, 4096)):
        x = weights("gaussian", n, k, "cuda")
        cases.append((x, *reference(x.to(dtype), torch.tensor(3e-5, device="cuda"), "max"), 3e-5))
    with sk.force("cuda"):
        for x, codes, scales, scale in cases:
            arguments = x.to(dtype), codes, scales, torch.tensor(scale, device="cuda")
            got, wanted = sk.nvfp4_error(*arguments), sk.nvfp4_error.reference(*arguments)
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
            assert torch.equal(sk.nvfp4_error(*arguments), got)


@gpu
def test_a_cuda_graph_replays_on_new_weights_and_scale():
    x, scale = weights("gaussian").bfloat16().cuda(), torch.tensor(3e-5, device="cuda")
    with sk.force("cuda"):
        sk.nvfp4_search(x, scale, "mse")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = sk.nvfp4_search(x, scale, "mse")
    x.copy_(x.flip(0) * 1.5)
    scale.mul_(1.1)
    graph.replay()
    assert_same_bits(got, reference(x, scale, "mse"), x)


@gpu
def test_opcheck_passes_on_the_gpu():
    x, scale = weights("gaussian", 6, 64).cuda(), torch.tensor(3e-5, device="cuda")
    with sk.force("cuda"):
        torch.library.opcheck(OPS.nvfp4_search.default, (x, scale, "mse"))
