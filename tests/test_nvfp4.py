"""The format: codes, ties, scales, packing, the scale search; modelopt and compressed-tensors as oracles."""

from __future__ import annotations

import hashlib

import pytest
import torch

from step_kernels import nvfp4
from step_kernels.testing import nvfp4_weight

VALUES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
INPUTS = {
    "gaussian": lambda: torch.randn(48, 512) * 0.02,
    "heavy-tailed": lambda: torch.distributions.StudentT(2.0).sample((48, 512)),
    "tiny": lambda: torch.randn(48, 512) * 1e-20,
    "bf16 with zero blocks": lambda: (torch.randn(48, 512) * (torch.arange(512) % 64 > 15)).bfloat16(),
}


def codes_of(*values: float) -> list[int]:
    return nvfp4.e2m1_encode(torch.tensor(values)).tolist()


def gaussian(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)) * 0.02


def test_the_sixteen_codes_decode_to_their_values_and_back():
    decoded = nvfp4.e2m1_decode(torch.arange(16, dtype=torch.uint8))
    assert decoded.tolist() == VALUES and decoded[8].signbit()
    assert codes_of(*VALUES) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]


@pytest.mark.parametrize("below", range(7))
def test_a_tie_goes_to_the_even_code_and_its_neighbours_to_the_nearest(below):
    tie = torch.tensor((VALUES[below] + VALUES[below + 1]) / 2)
    low, high = (torch.nextafter(tie, torch.tensor(end)).item() for end in (-99.0, 99.0))
    even = below + below % 2
    assert codes_of(low, tie.item(), high) == [below, even, below + 1]
    assert codes_of(-low, -tie.item(), -high) == [below + 8, even + 8, below + 9]


def test_large_values_saturate_and_signs_follow_less_than_zero():
    assert codes_of(6.1, 1e30, torch.inf, -7, -torch.inf, torch.nan) == [7, 7, 7, 15, 15, 7]
    assert codes_of(0.0, -0.0, 1e-30, -1e-30) == [0, 0, 0, 8]


def test_rounding_without_codes_equals_decoding_the_codes():
    steps = torch.arange(-2048, 2049) / 256  # every tie, and values on both sides
    x = torch.cat((steps, torch.randn(4096) * 3, torch.tensor([1e30, -1e30, 1e-40, torch.inf])))
    untouched = x.clone()
    assert torch.equal(nvfp4.e2m1_round(x), nvfp4.e2m1_decode(nvfp4.e2m1_encode(x)) + 0.0)
    assert torch.equal(x, untouched)


def test_even_k_is_the_low_nibble():
    row = torch.tensor([0.5, 6, -0.5, -6] + [0] * 12)
    codes, scales = nvfp4.quantize(row, torch.tensor(1.0))
    assert codes.tolist() == [0x71, 0xF9] + [0] * 6 and scales.float().tolist() == [1]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(nvfp4.pack(nvfp4.unpack(every)), every)
    assert nvfp4.unpack(torch.tensor([0x1F], dtype=torch.uint8)).tolist() == [15, 1]


def test_global_scale_divides_by_2688_or_1536_and_is_one_for_zero():
    amax = torch.tensor([2688.0, 0.0, 1.0])
    assert nvfp4.global_scale(amax).tolist() == [1, 1, torch.tensor(1 / 2688).item()]
    assert nvfp4.global_scale(torch.tensor(1536.0), "four-six") == 1
    assert nvfp4.global_scale(torch.tensor(3.0).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_block_scales_clamp_at_both_ends_and_a_zero_block_gets_one(search):
    blocks = torch.tensor([1e-9, 6 * 2.0**-10, 1e9, 0.0])[:, None].expand(4, 16)
    scales = nvfp4.search_scales(blocks, torch.tensor(1.0), search)
    assert scales.flatten().float().tolist() == [2**-9, 2**-9, 448, 1]
    codes, scales = nvfp4.quantize(torch.zeros(2, 32), torch.tensor(1.0))
    assert not codes.any() and not nvfp4.dequantize(codes, scales, torch.tensor(1.0)).any()


@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_scaling_by_a_power_of_two_changes_the_global_scale_alone(search):
    w = gaussian(16, 256)
    wanted = None
    for exponent in (0, -90, 100):  # amax about 1e-28 and 1e29: squares leave the range of f32
        x = w * 2.0**exponent
        scale = nvfp4.global_scale(x.abs().amax(), search)
        codes, scales = nvfp4.quantize(x, scale, nvfp4.search_scales(x, scale, search))
        got = codes, scales.view(torch.uint8), nvfp4.dequantize(codes, scales, scale, torch.float64) / 2.0**exponent
        wanted = wanted or got
        assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_quantizing_dequantized_values_changes_nothing():
    weight = nvfp4_weight(64, 256)
    codes, scales = nvfp4.quantize(weight.dequantize(), weight.global_scale)
    assert torch.equal(scales.view(torch.uint8), weight.scales.view(torch.uint8))
    assert torch.equal(nvfp4.e2m1_decode(nvfp4.unpack(codes)), nvfp4.e2m1_decode(nvfp4.unpack(weight.codes)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", INPUTS)
def test_max_bytes_and_decoded_values_equal_modelopts(kind):
    modelopt = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor", exc_type=ImportError)
    torch.manual_seed(3)
    w = INPUTS[kind]()
    theirs, scales, scale = modelopt.NVFP4QTensor.quantize(w.clone(), 16)
    assert torch.equal(nvfp4.global_scale(w.abs().amax()), scale)
    codes, ours = nvfp4.quantize(w, scale)
    assert torch.equal(ours.view(torch.uint8), scales.view(torch.uint8))
    assert torch.equal(codes, theirs._quantized_data)
    for dtype in (torch.float32, torch.bfloat16):
        decoded = theirs.dequantize(dtype, scale=scales, double_scale=scale, block_sizes={-1: 16})
        assert torch.equal(nvfp4.dequantize(codes, ours, scale, dtype), decoded)


def test_max_bytes_equal_those_recorded_from_modelopt():
    i = torch.arange(64 * 256)
    w = (((i * i * 40503 + i * 7919) % 65521 - 32760).double() ** 3 / 2.0**50).float().reshape(64, 256)
    scale = nvfp4.global_scale(w.abs().amax())
    codes, scales = nvfp4.quantize(w, scale)
    found = b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in (codes, scales, scale[None]))
    # of NVFP4QTensor.quantize(w, 16), nvidia-modelopt 0.47.0: packed codes, scale bytes, global scale
    assert hashlib.sha256(found).hexdigest() == "7996df0ef471889d814bba15a2e6abb310abd6343cd7e4857564151f0b7d4922"


def test_compressed_tensors_decodes_the_same_values_to_bf16_rounding():
    base = pytest.importorskip("compressed_tensors.compressors.nvfp4.base", exc_type=ImportError)
    from compressed_tensors.quantization import QuantizationScheme, quant_scheme

    weight = nvfp4_weight(32, 64)
    state = {"weight_packed": weight.codes, "weight_scale": weight.scales}
    state["weight_global_scale"] = 1 / weight.global_scale
    scheme = QuantizationScheme(targets=["Linear"], **quant_scheme.NVFP4)
    decoded = base.NVFP4PackedCompressor.decompress(state, scheme)["weight"]
    torch.testing.assert_close(decoded.float(), weight.dequantize(), rtol=2**-7, atol=0)  # it rounds twice


def errors(w: torch.Tensor, scales: torch.Tensor, scale: torch.Tensor) -> float:
    decoded = nvfp4.dequantize(*nvfp4.quantize(w, scale, scales), scale, torch.float64)
    return (w - decoded).square().mean().item()


def test_mse_equals_a_sweep_over_all_126_scales_and_beats_max_by_26_percent():
    w = gaussian(128, 1024)
    scale = nvfp4.global_scale(w.abs().amax())
    blocks = w.unflatten(-1, (-1, 16))
    grid = torch.tensor(VALUES[:8])
    ties = (grid[1:] + grid[:-1]) / 2
    best = torch.full(blocks.shape[:-1], torch.inf)
    for code in range(1, 0x7F):
        step = torch.tensor(code, dtype=torch.uint8).view(torch.float8_e4m3fn).float() * scale
        rounded = grid[torch.bucketize(blocks.abs() / step, ties)] * step  # at a tie both neighbours err the same
        best = torch.minimum(best, (blocks.abs() - rounded).square().sum(-1))
    swept = best.double().sum().item() / w.numel()
    mse = errors(w, nvfp4.search_scales(w, scale, "mse"), scale)
    assert mse == pytest.approx(swept, rel=1e-6)
    assert mse < 0.74 * errors(w, nvfp4.search_scales(w, scale, "max"), scale)


def test_mse_prefers_the_smaller_offset_where_two_scales_are_exact():
    # One value of 8 units of 2^-9: max takes 1 unit (code 6, wrong by 2); 2 units (code 4) and 4 (code 2) are exact.
    block = torch.zeros(16)
    block[5] = 8 * 2.0**-9
    assert nvfp4.search_scales(block, torch.tensor(1.0), "mse").float().tolist() == [2 * 2.0**-9]


def test_four_six_lowers_the_error_by_14_to_18_percent():
    w = gaussian(128, 1024)
    found = {}
    for search in ("max", "four-six"):
        scale = nvfp4.global_scale(w.abs().amax(), search)
        found[search] = errors(w, nvfp4.search_scales(w, scale, search), scale)
    assert 0.82 < found["four-six"] / found["max"] < 0.86


def test_stacked_and_split_global_scales_act_per_expert_and_per_part():
    plain, split = nvfp4_weight(3, 32, 64), nvfp4_weight(3, 32, 64, parts=2)
    assert plain.shape == split.shape == (3, 32, 64) and split.global_scale.shape == (3, 2)
    for weight, rows in ((plain, 32), (split, 16)):
        whole = weight.dequantize()
        for e in range(3):
            assert torch.equal(weight[e].dequantize(), whole[e])
            for part in range(32 // rows):
                here = slice(part * rows, part * rows + rows)
                scale = weight.global_scale[e] if rows == 32 else weight.global_scale[e, part]
                alone = nvfp4.dequantize(weight.codes[e, here], weight.scales[e, here], scale)
                assert torch.equal(whole[e, here], alone)
        assert torch.equal(weight[1:].dequantize(torch.bfloat16), whole[1:].bfloat16())


def test_errors_name_the_search_and_the_dimension():
    with pytest.raises(ValueError, match="search: got 'best', wanted one of mse, max, four-six"):
        nvfp4.search_scales(torch.ones(16), torch.tensor(1.0), "best")
    with pytest.raises(ValueError, match="x: got last dimension 24, wanted a multiple of 16"):
        nvfp4.quantize(torch.ones(24), torch.tensor(1.0))
