"""Which Hopper kernel serves each layer at each number of tokens: the tables below, on an H200's 132 multiprocessors.

t2, t4, t8 decode: so many tokens share a read of the weights. few_64 to many are prefill kernels, a number is their
largest tile; with a + they split k and a second kernel sums. A change of thresholds shows as a difference of tables.
"""

from __future__ import annotations

import pytest
import torch

from step_kernels import registry
from step_kernels.prepared import PreparedWeight, tiles

LINEARS = """
tokens      1  2  3  4  5  8  9       16      17      32      33      64      128      256      1024     8192
8192x4096   t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ many     many     many
12288x4096  t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ many     many     many
1024x4096   t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_64+  few_64+  few_128+ many
64x4096     t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_64+  few_64+  few_64+  many
96x4096     t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_64+  few_64+  few_64+  many
4096x8192   t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ few_128+ many     many
4096x12288  t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ few_128+ many     many
11264x4096  t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ many     many     many
4096x11264  t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_128+ few_128+ many     many
1280x4096   t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ few_64+  few_64+  few_128+ many
4096x1280   t2 t2 t4 t4 t8 t8 few_64+ few_64+ few_64+ few_64+ few_64+ few_64+ many     many     many     many
128896x4096 t2 t2 t4 t4 t8 t8 few_64  few_64  few_64  few_64  few_64  few_64  few_128  many     many     many
"""

EXPERTS = """
tokens   1   2   3  4  5  8  10 11 16 32 33        64        128       256       512       1024      2048   4096    8192
288x1280 few few t2 t2 t2 t2 t2 t4 t4 t4 halves_32 halves_32 halves_32 halves_32 halves_32 halves_48 few_96 few_128 many
288x640  few few t2 t2 t2 t2 t2 t4 t4 t4 halves_32 halves_32 halves_32 halves_32 halves_32 halves_48 few_96 few_128 many
288x320  few few t2 t2 t2 t2 t2 t4 t4 t4 halves_32 halves_32 halves_32 halves_32 halves_32 halves_48 few_96 few_128 many
288x160  few few t2 t2 t2 t2 t2 t4 t4 t4 halves_32 halves_32 halves_32 halves_32 halves_32 halves_48 few_96 few_128 many
36x1280  few few t4 t4 t4 t4 t8 t8 t8 t8 halves_32 halves_32 halves_48 few_96    few_128   many      many   many    many
"""


def heading(table: str) -> list[int]:
    return [int(tokens) for tokens in table.split("\n")[1].split()[1:]]


def first_column(table: str) -> list[tuple[int, ...]]:
    """Of all rows but the heading: numbers joined by x."""
    return [tuple(map(int, line.split()[0].split("x"))) for line in table.strip().split("\n")[1:]]


def rendered(tokens: list[int], rows: dict[str, list[str]]) -> str:
    columns = list(zip(*([name, *cells] for name, cells in {"tokens": map(str, tokens), **rows}.items())))
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n" + "".join(" ".join(line).rstrip() + "\n" for line in zip(*padded))


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Symbols of the kernels launched, which nothing is done for; on an H200 in all that the launchers ask."""
    from step_kernels.cuda import driver, nvfp4_linear, nvfp4_moe, nvfp4_prefill

    symbols = []
    monkeypatch.setattr(driver.Kernel, "launch", lambda self, *arguments: symbols.append(self.symbol))
    for module in (nvfp4_linear, nvfp4_moe):
        monkeypatch.setattr(module, "multiprocessors", lambda device: 132)
        monkeypatch.setattr(module, "partials", lambda device: torch.empty(132 * 512, dtype=torch.int32, device="meta"))
    monkeypatch.setattr(nvfp4_prefill, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(nvfp4_prefill, "tensor_map", lambda *_: (0,) * 16)
    return symbols


def prepared(*shape: int, outer: tuple[int, ...] = (), paired: bool = False) -> PreparedWeight:
    """A weight of meta tensors: nothing is read or written."""
    *lead, n, k = shape
    count = tiles(n, k, paired)
    codes, scales = (torch.empty(*lead, *count, size, dtype=torch.uint8, device="meta") for size in (2048, 256))
    return PreparedWeight(codes, scales, torch.empty(outer, device="meta"), torch.Size(shape), paired)


def short(symbols: list[str]) -> list[str]:
    return [symbol.removeprefix("sm90_nvfp4_") for symbol in symbols]


def linear_name(symbols: list[str]) -> str:
    """Of the kernel that multiplies; + where another must sum."""
    (at,) = (i for i, symbol in enumerate(symbols) if "_plain_" in symbol or "_linear_" in symbol)
    first = short(symbols)[at].removeprefix("linear_").removeprefix("prefill_").replace("plain_", "")
    return first + "+" * (len(symbols) - at - 1)


def test_every_linear_at_every_number_of_tokens_goes_to_its_kernel(launched):
    tokens, rows = heading(LINEARS), {}
    for n, k in first_column(LINEARS):
        weight, names = prepared(n, k), []
        for m in tokens:
            x = torch.empty(m, k, dtype=torch.bfloat16, device="meta")
            arguments = (x, weight.codes, weight.scales, weight.global_scale, n)
            assert registry.choice("nvfp4_linear", 90, *arguments) == "cuda"
            assert launch("nvfp4_linear", arguments).shape == (m, n)
            names.append(linear_name(launched))
            launched.clear()
        rows[f"{n}x{k}"] = names
    got = rendered(tokens, rows)
    assert got == LINEARS, got


def test_experts_at_every_number_of_tokens_go_to_their_kernels(launched):
    tokens, rows = heading(EXPERTS), {}
    for experts, inner in first_column(EXPERTS):
        gate_up = prepared(experts, 2 * inner, 4096, outer=(experts, 2), paired=True)
        down, names = prepared(experts, 4096, inner, outer=(experts,)), []
        for m in tokens:
            x = torch.empty(m, 4096, dtype=torch.bfloat16, device="meta")
            weights, ids = (torch.empty(m, 8, dtype=d, device="meta") for d in (torch.float32, torch.int32))
            parts = (w for weight in (gate_up, down) for w in (weight.codes, weight.scales, weight.global_scale))
            arguments = (x, weights, ids, *parts, 7.0)
            assert registry.choice("nvfp4_moe", 90, *arguments) == "cuda"
            assert launch("nvfp4_moe", arguments).shape == x.shape
            names.append(experts_name(launched))
            launched.clear()
        rows[f"{experts}x{inner}"] = names
    got = rendered(tokens, rows)
    assert got == EXPERTS, got


def experts_name(symbols: list[str]) -> str:
    """Of the pair of kernels that multiply, which must be alike, with what they need before and after them."""
    names = short(symbols)
    if names[0].startswith("moe_gate_up_"):
        name = names[0].removeprefix("moe_gate_up_")
        assert names[1:] == [f"moe_down_{name}"] + ["moe_sum"] * (name != "few")
        return name
    paired, plain = (n for n in names if "_paired_" in n or "_plain_" in n)
    assert plain == paired.replace("_paired_", "_plain_") and names[-1] == "moe_prefill_combine"
    assert "moe_prefill_sort" in names[: names.index(paired)]
    return plain.removeprefix("prefill_").replace("plain_", "")


def launch(op: str, arguments: tuple) -> torch.Tensor:
    from step_kernels.cuda import nvfp4_linear, nvfp4_moe

    return {"nvfp4_linear": nvfp4_linear, "nvfp4_moe": nvfp4_moe}[op].launch(*arguments)
