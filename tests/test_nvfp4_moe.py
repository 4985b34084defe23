"""nvfp4_moe: a token-by-token float64 computation, skipped ids, the clamp, order, compile, opcheck, errors."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import step_kernels as sk
from step_kernels.testing import nvfp4_weight, relative_error

OP = torch.ops.step_kernels.nvfp4_moe.default
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
EXPERTS, HIDDEN, INNER = 5, 32, 16
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def experts(split: bool = True) -> sk.NVFP4Experts:
    gate_up = nvfp4_weight(EXPERTS, 2 * INNER, HIDDEN, parts=2 if split else None, seed=1)
    if split:  # gate and up scales that differ by much, so that taking one for both shows
        gate_up = dataclasses.replace(gate_up, global_scale=gate_up.global_scale * torch.tensor([1.0, 3.0]))
    return sk.NVFP4Experts(gate_up, nvfp4_weight(EXPERTS, HIDDEN, INNER, seed=2))


def routing(tokens: int, top_k: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x f64, weights, ids without repetition in a token."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(-1)[:, :top_k].int()
    x = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64)
    return x, torch.rand(tokens, top_k, generator=generator), ids


def decode(codes: torch.Tensor, scales: torch.Tensor, scale: float) -> torch.Tensor:
    """[n, k/2] bytes -> [n, k] f64."""
    w = torch.empty(codes.shape[0], 2 * codes.shape[1], dtype=torch.float64)
    for column in range(w.shape[1]):
        code = codes[:, column // 2].long() // (16 if column % 2 else 1) % 16
        w[:, column] = E2M1[code] * scales[:, column // 16].double() * scale
    return w


def by_token(x, weights, ids, experts: sk.NVFP4Experts, limit: float | None) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for slot, e in enumerate(ids[t].tolist()):
            if not 0 <= e < EXPERTS:
                continue
            up_down = experts.gate_up.codes[e], experts.gate_up.scales[e]
            scale = experts.gate_up.global_scale[e].expand(2).tolist()
            gate, up = (
                decode(*(b[part * INNER :][:INNER] for b in up_down), scale[part]) @ x[t].double() for part in (0, 1)
            )
            gate = gate / (1 + (-gate).exp())
            if limit is not None:
                gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
            down = decode(experts.down.codes[e], experts.down.scales[e], experts.down.global_scale[e].item())
            out[t] += weights[t, slot].item() * (down @ (gate * up))
    return out


@pytest.mark.parametrize("limit", [None, 2.0])
@pytest.mark.parametrize("split", [True, False])
def test_the_routed_sum_equals_a_token_by_token_computation(split, limit):
    x, weights, ids = routing(7)
    wanted = by_token(x, weights, ids, experts(split), limit)
    assert relative_error(sk.nvfp4_moe(x, weights, ids, experts(split), limit), wanted) < 1e-13
    assert relative_error(sk.nvfp4_moe(x.float(), weights, ids, experts(split), limit), wanted) < 1e-6
    half = sk.nvfp4_moe(x.bfloat16(), weights, ids, experts(split), limit)
    exact = by_token(x.bfloat16(), weights, ids, experts(split), limit)
    assert half.dtype == torch.bfloat16 and relative_error(half, exact) < 2**-8


def all_ones(n: int, k: int) -> sk.NVFP4Weight:
    """One expert's weight of ones: code 2 everywhere."""
    codes, scales = torch.full((1, n, k // 2), 0x22, dtype=torch.uint8), torch.ones(1, n, k // 16)
    return sk.NVFP4Weight(codes, scales.to(torch.float8_e4m3fn), torch.ones(1))


@pytest.mark.parametrize(
    ("total", "inner"),  # gate = up = total; silu(7) = 6.994 is below the limit, silu(7.1) = 7.094 is not
    [
        (7.0, 7 / (1 + math.exp(-7)) * 7),
        (7.1, 7 * 7),
        (-9.0, -9 / (1 + math.exp(9)) * -7),
        (3.0, 9 / (1 + math.exp(-3))),
    ],
)
def test_the_limit_cuts_gate_above_after_silu_and_up_on_both_sides(total, inner):
    x = torch.full((1, 16), total / 16, dtype=torch.float64)
    ids = torch.zeros(1, 1, dtype=torch.int32)
    out = sk.nvfp4_moe(x, torch.ones(1, 1), ids, sk.NVFP4Experts(all_ones(32, 16), all_ones(16, 16)), 7.0)
    assert out[0].tolist() == pytest.approx([16 * inner] * 16, rel=1e-12)


def test_ids_of_other_ranks_add_nothing():
    x, weights, ids = routing(6)
    ids[0], ids[1, 1], ids[2, 0] = torch.tensor([-1, EXPERTS, 10_000]), -(2**31), 2**31 - 1
    out = sk.nvfp4_moe(x, weights, ids, experts())
    assert not out[0].any() and relative_error(out, by_token(x, weights, ids, experts(), None)) < 1e-13
    local = sk.NVFP4Experts(experts().gate_up[1:3], experts().down[1:3])
    rest = torch.where((ids >= 1) & (ids < 3), -1, ids)
    total = sk.nvfp4_moe(x, weights, ids - 1, local) + sk.nvfp4_moe(x, weights, rest, experts())
    assert relative_error(total, out) < 1e-13


def test_the_order_of_a_tokens_experts_changes_no_bit():
    x, weights, ids = routing(9)
    flipped = sk.nvfp4_moe(x.float(), weights.flip(1), ids.flip(1), experts(), 7.0)
    assert torch.equal(flipped, sk.nvfp4_moe(x.float(), weights, ids, experts(), 7.0))


def test_tokens_do_not_see_each_other():
    x, weights, ids = routing(4)
    clean = sk.nvfp4_moe(x, weights, ids, experts())
    x[1] = torch.nan
    out = sk.nvfp4_moe(x, weights, ids, experts())
    assert out[1].isnan().all() and relative_error(out[[0, 2, 3]], clean[[0, 2, 3]]) < 1e-14
    assert sk.nvfp4_moe(x[:0], weights[:0], ids[:0], experts()).shape == (0, HIDDEN)
    assert not sk.nvfp4_moe(x[:1], weights[:1, :0], ids[:1, :0], experts()).any()  # top 0


def test_views_give_the_values_of_their_copies_in_a_contiguous_output():
    x, weights, ids = routing(8)
    got = sk.nvfp4_moe(x.T.contiguous().T, weights.T.contiguous().T, ids.T.contiguous().T, experts())
    assert got.is_contiguous() and relative_error(got, sk.nvfp4_moe(x, weights, ids, experts())) < 1e-14


def flat(e: sk.NVFP4Experts) -> tuple[torch.Tensor, ...]:
    return tuple(getattr(w, f) for w in (e.gate_up, e.down) for f in ("codes", "scales", "global_scale"))


@pytest.mark.parametrize("limit", [None, 7.0])
def test_opcheck_passes(limit):
    x, weights, ids = routing(4)
    for view in (x.float(), x.T.contiguous().T):
        torch.library.opcheck(OP, (view, weights, ids, *flat(experts()), limit), test_utils=NO_SCHEMA_TEST)


def test_the_compiled_call_takes_an_experts_object():
    x, weights, ids = routing(4)
    compiled = torch.compile(
        lambda x, w, i, e: sk.nvfp4_moe(x + 1, w, i, e, 7.0) * 2, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x, weights, ids, experts()), sk.nvfp4_moe(x + 1, weights, ids, experts(), 7.0) * 2)


GOOD = experts()
DOWN, GATE_UP = GOOD.down, GOOD.gate_up
BAD = [
    ("x: got int64", TypeError, {"x": torch.zeros(4, HIDDEN).long()}),
    (r"x: got shape \[1, 4, 32\]", ValueError, {"x": torch.zeros(1, 4, HIDDEN)}),
    (r"weights: got shape \[3, 3\], wanted \[4, any\]", ValueError, {"weights": torch.zeros(3, 3)}),
    ("weights: got bfloat16, wanted float32", TypeError, {"weights": torch.zeros(4, 3).bfloat16()}),
    ("ids: got int64, wanted int32", TypeError, {"ids": torch.zeros(4, 3).long()}),
    (r"ids: got shape \[4, 2\], wanted \[4, 3\]", ValueError, {"ids": torch.zeros(4, 2).int()}),
    (r"experts.gate_up.codes: got shape \[5, 32, 16\], wanted \[any, any, 8\]", ValueError, {"x": torch.zeros(4, 16)}),
    ("experts.down.codes: got", ValueError, {"experts": sk.NVFP4Experts(GATE_UP, DOWN[:4])}),
    (r"experts.gate_up: got shape \[5, 24, 32\].*multiples of 16", ValueError,
     {"experts": sk.NVFP4Experts(dataclasses.replace(GATE_UP, codes=GATE_UP.codes[:, :24]), DOWN)}),
    (r"experts.gate_up.global_scale: got shape \[5, 1\], wanted \[5, 2\]", ValueError,
     {"experts": sk.NVFP4Experts(dataclasses.replace(GATE_UP, global_scale=torch.ones(5, 1)), DOWN)}),
    (r"experts.down.global_scale: got shape \[5, 2\], wanted \[5\]", ValueError,
     {"experts": sk.NVFP4Experts(GATE_UP, dataclasses.replace(DOWN, global_scale=torch.ones(5, 2)))}),
    ("limit: got 0.0, wanted a positive number", ValueError, {"limit": 0.0}),
    ("limit: got nan, wanted a positive number", ValueError, {"limit": math.nan}),
    ("different devices", ValueError, {"x": torch.zeros(4, HIDDEN, device="meta")}),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, changed = case
    x, weights, ids = routing(4)
    with pytest.raises(kind, match=message):
        sk.nvfp4_moe(**{"x": x.float(), "weights": weights, "ids": ids, "experts": GOOD} | changed)
