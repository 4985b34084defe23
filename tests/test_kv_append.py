"""kv_append: norm, rope and the paged write against Python floats and transformers; compile, opcheck, errors."""

from __future__ import annotations

import math

import pytest
import torch

import step_kernels as sk
from step_kernels.testing import relative_error

OP = torch.ops.step_kernels.kv_append.default
F8 = torch.float8_e4m3fn
E4M3 = torch.arange(127, dtype=torch.uint8).view(F8).double().tolist()  # the finite values of sign 0, in order
TOKENS, HEADS, KV_HEADS, DIM, PAGE = 6, 4, 2, 8, 4
# opcheck's schema test multiplies every input by a number, which torch does not implement for float8
NO_SCHEMA_TEST = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def inputs(rotary: int = 4, cache: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32) -> dict:
    g = torch.Generator().manual_seed(rotary)
    return {
        "q": torch.randn(TOKENS, HEADS, DIM, generator=g).to(dtype),
        "k": torch.randn(TOKENS, KV_HEADS, DIM, generator=g).to(dtype),
        "v": torch.randn(TOKENS, KV_HEADS, DIM, generator=g).to(dtype),
        "q_norm": torch.randn(DIM, generator=g) * 0.3,
        "k_norm": torch.randn(DIM, generator=g) * 0.3,
        "eps": 1e-5,
        "inv_freq": 100.0 ** -(torch.arange(rotary // 2) * 2 / rotary),
        "positions": torch.tensor([0, 1, 2, 70, 71, 100_000]),
        "slots": torch.tensor([9, 10, -1, 0, 3, 13]),
        "k_cache": torch.full((4, KV_HEADS, PAGE, DIM), 7.0).to(cache),
        "v_cache": torch.full((4, KV_HEADS, PAGE, DIM), -7.0).to(cache),
        "k_scale": torch.tensor(1.0),
        "v_scale": torch.tensor(1.0),
    }


def head(x: list[float], weight: list[float], position: int, inv_freq: torch.Tensor) -> list[float]:
    """One head's vector, normed and rotated, in Python floats."""
    rms = math.sqrt(sum(v * v for v in x) / len(x) + 1e-5)
    x = [v / rms * (1 + w) for v, w in zip(x, weight)]
    r, out = len(inv_freq), list(x)
    for j in range(r):
        angle = (torch.tensor(float(position)) * inv_freq[j]).item()  # an f32 product
        out[j] = x[j] * math.cos(angle) - x[j + r] * math.sin(angle)
        out[j + r] = x[j + r] * math.cos(angle) + x[j] * math.sin(angle)
    return out


def by_head(x: torch.Tensor, weight: torch.Tensor, a: dict) -> torch.Tensor:
    rows = [
        [head(h, weight.tolist(), p, a["inv_freq"]) for h in t] for t, p in zip(x.tolist(), a["positions"].tolist())
    ]
    return torch.tensor(rows, dtype=torch.float64)


def e4m3(x: float) -> float:
    """Nearest finite e4m3, ties to the even code, saturating."""
    size = min(abs(x), 448.0)
    code = min(range(127), key=lambda c: (abs(E4M3[c] - size), c % 2))
    return math.copysign(E4M3[code], x)


@pytest.mark.parametrize("rotary", [2, 4, 8])
def test_q_and_k_are_normed_and_rotated_and_v_is_only_copied(rotary):
    a = inputs(rotary)
    q = sk.kv_append(*a.values())
    assert relative_error(q, by_head(a["q"], a["q_norm"], a)) < 3e-7
    k = by_head(a["k"], a["k_norm"], a)
    for token, slot in enumerate(a["slots"].tolist()):
        if slot >= 0:
            page, offset = divmod(slot, PAGE)
            assert relative_error(a["k_cache"][page, :, offset], k[token]) < 3e-7
            assert torch.equal(a["v_cache"][page, :, offset], a["v"][token])


def test_position_zero_and_the_dims_past_the_rotary_ones_are_only_normed():
    a = inputs(rotary=4)
    q = sk.kv_append(*a.values())
    normed = torch.nn.functional.rms_norm(a["q"], (DIM,), 1 + a["q_norm"], 1e-5)
    torch.testing.assert_close(q[0], normed[0])
    torch.testing.assert_close(q[..., 4:], normed[..., 4:])
    assert not torch.allclose(q[1:, :, :4], normed[1:, :, :4])


def test_only_the_given_slots_are_written():
    a = inputs()
    sk.kv_append(*a.values())
    for cache, sentinel in ((a["k_cache"], 7.0), (a["v_cache"], -7.0)):
        untouched = (cache == sentinel).all(-1)  # [pages, kv_heads, page_size]
        written = [9, 10, 0, 3, 13]
        assert [s for s in range(16) if not untouched[s // PAGE, :, s % PAGE].any()] == sorted(written)
        assert untouched.sum() == (16 - len(written)) * KV_HEADS


def test_it_equals_transformers_norm_and_rope():
    step = pytest.importorskip("transformers.models.step3p7.modeling_step3p7", exc_type=ImportError)
    a = inputs(rotary=4)
    angle = a["positions"].float()[:, None] * a["inv_freq"].repeat(2)
    q_norm, k_norm = step.Step3p7RMSNorm(DIM, 1e-5), step.Step3p7RMSNorm(DIM, 1e-5)
    q_norm.weight.data, k_norm.weight.data = a["q_norm"], a["k_norm"]
    q, k = step.apply_rotary_pos_emb(q_norm(a["q"]), k_norm(a["k"]), angle.cos(), angle.sin())
    a["slots"] = torch.arange(TOKENS)
    torch.testing.assert_close(sk.kv_append(*a.values()), q)
    torch.testing.assert_close(a["k_cache"].transpose(1, 2).flatten(0, 1)[:TOKENS], k)


@pytest.mark.parametrize("scale", [torch.tensor(0.04), torch.tensor([0.003, 0.5])], ids=["scalar", "per head"])
def test_an_e4m3_cache_holds_x_over_scale_saturated(scale):
    a = inputs(cache=F8) | {"k_scale": scale, "v_scale": scale * 2}
    a["slots"] = torch.arange(TOKENS)
    a["v"][0, :, 0], a["v"][1, :, 0] = 1e30, -500.0
    sk.kv_append(*a.values())
    plain = inputs() | {"slots": a["slots"], "v": a["v"]}
    sk.kv_append(*plain.values())
    for name, scale in (("k_cache", a["k_scale"]), ("v_cache", a["v_scale"])):
        scaled = (plain[name] / scale.expand(KV_HEADS)[:, None, None]).flatten().tolist()
        wanted = torch.tensor([e4m3(x) for x in scaled]).reshape(4, KV_HEADS, PAGE, DIM)
        written = [(s // PAGE, s % PAGE) for s in range(TOKENS)]
        got = a[name].float()
        assert all(torch.equal(got[p, :, o], wanted[p, :, o]) for p, o in written)
    assert a["v_cache"].float()[0, :, 0, 0].tolist() == [448, 448]


def test_half_types_are_computed_in_f32_and_rounded_once():
    for cache in (torch.bfloat16, torch.float32):  # rounded to the cache's type, not to k's before
        a = inputs(dtype=torch.bfloat16, cache=cache)
        exact = inputs() | {n: a[n].float() for n in "qkv"}
        q, q_exact = sk.kv_append(*a.values()), sk.kv_append(*exact.values())
        assert torch.equal(q, q_exact.bfloat16())
        assert torch.equal(a["k_cache"], exact["k_cache"].to(cache))


def test_views_of_every_argument_are_read_and_written_in_place():
    a, b = inputs(), inputs()
    both = torch.stack((b["k_cache"], b["v_cache"]), 1)  # one buffer, K and V interleaved page by page
    b["k_cache"], b["v_cache"] = both[:, 0], both[:, 1]
    qkv = torch.cat((b["q"], b["k"], b["v"]), 1)
    b["q"], b["k"], b["v"] = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
    b["positions"], b["slots"] = b["positions"].int(), torch.stack((b["slots"],) * 2, 1)[:, 0]
    q = sk.kv_append(*b.values())
    assert q.is_contiguous() and relative_error(q, sk.kv_append(*a.values())) < 1e-7
    assert relative_error(both, torch.stack((a["k_cache"], a["v_cache"]), 1)) < 1e-7


def test_no_tokens_write_nothing():
    a = inputs(cache=F8) | {n: inputs()[n][:0] for n in ("q", "k", "v", "positions", "slots")}
    assert sk.kv_append(*a.values()).shape == (0, HEADS, DIM) and (a["k_cache"].float() == 7).all()


def test_opcheck_passes():
    torch.library.opcheck(OP, tuple(inputs().values()))
    qkv = torch.randn(TOKENS, HEADS + 2 * KV_HEADS, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1)
    torch.library.opcheck(OP, tuple((inputs() | dict(zip("qkv", qkv))).values()))
    torch.library.opcheck(OP, tuple(inputs(cache=F8).values()), test_utils=NO_SCHEMA_TEST)


def test_the_compiled_call_writes_the_caches():
    a, b = inputs(cache=F8), inputs(cache=F8)
    compiled = torch.compile(lambda *args: sk.kv_append(*args) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*a.values()), sk.kv_append(*b.values()) * 2)
    assert all(torch.equal(a[n].float(), b[n].float()) for n in ("k_cache", "v_cache"))


BAD = [
    ("q: got int64", TypeError, {"q": torch.zeros(TOKENS, HEADS, DIM).long()}),
    (r"k: got shape \[5, 2, 8\], wanted \[6, any, 8\]", ValueError, {"k": torch.zeros(5, KV_HEADS, DIM)}),
    ("k: got bfloat16, wanted float32", TypeError, {"k": torch.zeros(TOKENS, KV_HEADS, DIM).bfloat16()}),
    (r"v: got shape \[6, 1, 8\]", ValueError, {"v": torch.zeros(TOKENS, 1, DIM)}),
    (r"q_norm: got shape \[4\], wanted \[8\]", ValueError, {"q_norm": torch.zeros(4)}),
    ("inv_freq: got 5 frequencies, wanted at most head_dim / 2 = 4", ValueError, {"inv_freq": torch.zeros(5)}),
    ("positions: got float32, wanted int32 or int64", TypeError, {"positions": torch.zeros(TOKENS)}),
    (r"slots: got shape \[5\], wanted \[6\]", ValueError, {"slots": torch.zeros(5).long()}),
    ("k_cache: got uint8, wanted float8_e4m3fn or", TypeError, {"k_cache": torch.zeros(4, 2, 4, 8).byte()}),
    (r"k_cache: got shape \[4, 4, 2, 8\], wanted \[any, 2, any, 8\]", ValueError, {"k_cache": torch.zeros(4, 4, 2, 8)}),
    ("v_cache: got bfloat16, wanted float32", TypeError, {"v_cache": torch.zeros(4, 2, 4, 8).bfloat16()}),
    (r"k_scale: got shape \[3\], wanted \[2\]", ValueError, {"k_scale": torch.ones(3)}),
    ("v_scale: got float64, wanted float32", TypeError, {"v_scale": torch.tensor(1.0).double()}),
    ("different devices.*'slots': 'meta'", ValueError, {"slots": torch.zeros(TOKENS, device="meta").long()}),
]


@pytest.mark.parametrize("case", BAD, ids=[c[0] for c in BAD])
def test_bad_arguments_are_named(case):
    message, kind, changed = case
    with pytest.raises(kind, match=message):
        sk.kv_append(*(inputs() | changed).values())
