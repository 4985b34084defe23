"""What FlashInfer's decode attention gets; the kernel is a stand-in over the op's reference."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from flashinfer_stand_in import SOURCES, FlashInfer, activations, definition

import step_kernels as sk
import step_kernels.flashinfer
from step_kernels.flashinfer import paged_attention
from step_kernels.testing import relative_error


def attention_arguments(dtype=torch.float8_e4m3fn, heads=8, dim=128, page_size=16, window=None, gate=False) -> list:
    generator = torch.Generator().manual_seed(heads)
    caches = [torch.randn(6, 2, page_size, dim, generator=generator).to(dtype) for _ in range(2)]
    table = torch.tensor([[5, 1, -1], [0, 2, 3], [4, -1, -1]], dtype=torch.int32)
    return [
        activations(3, heads, dim), *caches, torch.tensor(0.5), torch.tensor(2.0), table,
        torch.tensor([page_size + 3, 3 * page_size, 1], dtype=torch.int32), torch.arange(4, dtype=torch.int32),
        window, activations(3, heads) if gate else None, None,
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("window, gate", [(None, False), (20, True)])
def test_decode_attention_gets_its_scales_window_and_bounds(monkeypatch, dtype, window, gate):
    calls = []

    def decode(query, kv_cache, workspace_buffer, block_tables, seq_lens, **keywords):
        calls.append(keywords)
        assert workspace_buffer.dtype == torch.uint8 and not workspace_buffer.any() and (block_tables >= 0).all()
        assert keywords["max_seq_len"] >= seq_lens.max() and keywords["q_len_per_req"] is None
        ones, start = torch.tensor(1.0), keywords["cum_seq_lens_q"]
        assert keywords["max_q_len"] >= start.diff().max()
        left = keywords["window_left"]
        caches = [c.bfloat16() for c in kv_cache]
        window, scale = None if left < 0 else left + 1, float(keywords["bmm1_scale"])
        rest = block_tables, seq_lens, start, window, None, scale
        out = sk.paged_attention.reference(query.double(), *caches, ones, ones, *rest)
        return (out * float(keywords["bmm2_scale"])).to(query.dtype)

    module = types.ModuleType("flashinfer.decode")
    module.trtllm_batch_decode_with_kv_cache = decode
    monkeypatch.setitem(sys.modules, "flashinfer", FlashInfer())
    monkeypatch.setattr(step_kernels.flashinfer, "installed", lambda: (0, 7, 2))
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module)
    arguments = attention_arguments(dtype, window=window, gate=gate)
    assert paged_attention.refuse(*arguments) is None
    q, *rest = arguments
    wanted = sk.paged_attention.reference(q.double(), *rest)
    assert relative_error(paged_attention.launch(*arguments), wanted) < 4e-3
    if SOURCES:
        known = {a.arg for a in definition("decode.py", "trtllm_batch_decode_with_kv_cache").args.args}
        assert set(calls[0]) <= known


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"dim": 64}, "takes heads of 128, got 64"),
        ({"page_size": 8}, "takes pages of 16, 32 or 64 tokens, got 8"),
        ({"heads": 64}, "takes up to 16 query heads a kv head, got 32"),
        ({"dtype": torch.float16}, "got bfloat16 and float16"),
    ],
)
def test_attention_refuses_shapes_that_its_kernels_lack(change, reason):
    assert reason in paged_attention.refuse(*attention_arguments(**change))


def test_attention_refuses_prefill_and_a_scale_a_head():
    arguments = attention_arguments()
    arguments[0] = activations(4, 8, 128)
    assert paged_attention.refuse(*arguments) == "serves decode: 1 to 3 tokens (requests), got 4"
    arguments = attention_arguments()
    arguments[3] = torch.ones(2)
    assert paged_attention.refuse(*arguments) == "takes one k_scale and one v_scale, got one a head"
