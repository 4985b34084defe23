"""bench.run: what becomes of a peer that is wrong, fails or is not installed; the table's row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bench import run, timing


@pytest.fixture
def timed(monkeypatch) -> list:
    """The calls that were timed; each takes 2 µs, give or take 3 %."""
    calls = []
    monkeypatch.setattr(timing, "copies", lambda arguments: [arguments])
    monkeypatch.setattr(timing, "measure", lambda call, inputs: calls.append(call) or (2.0, 0.03))
    return calls


def fails(x):
    raise RuntimeError("no\nluck")


def bench(**peers) -> SimpleNamespace:
    """Of an op that doubles; its peers have the arguments that they are given."""
    return SimpleNamespace(
        contenders=lambda: {"ours": lambda x: 2 * x},
        peers=lambda case, x: {who: lambda call=call: (call, (x,)) for who, call in peers.items()},
        exact=lambda case, x: ([0, 2], 2 * x[[0, 2]].double()),
    )


def test_peers_that_are_wrong_or_fail_are_named_and_not_timed(timed, capsys):
    x = torch.tensor([1.0, 2.0, 4.0])
    peers = bench(
        sums=lambda x: x + x, near=lambda x: 2.001 * x, wrong=lambda x: 2.1 * x, nan=lambda x: x / 0, no=fails
    )
    measured = dict(run._measured(peers, "case", None, (x,)))
    assert list(measured) == ["ours", "sums", "near"] and len(timed) == 3
    assert measured["ours"] == (2.0, 0.03, 0.0) and measured["near"][2] == pytest.approx(5e-4, rel=1e-3)
    assert capsys.readouterr().out.splitlines() == [
        "case: wrong: wrong, relative error 0.05: not timed",
        "case: nan: wrong, relative error inf: not timed",
        "case: no: no luck",
    ]


def test_a_failure_of_the_op_leaves_its_peers_and_is_said(timed, capsys):
    one = bench(sums=lambda x: x + x)
    one.contenders = lambda: {"ours": fails}
    assert list(dict(run._measured(one, "case", None, (torch.ones(3),)))) == ["sums"]
    assert capsys.readouterr().out == "case: ours: no luck\n"


def test_missing_peers_are_listed_with_the_reason(capsys):
    assert run._missing({"torch": "torch", "none-such": "none_such"}) == {"none-such"}
    assert capsys.readouterr().out.startswith(f"peers: torch {torch.__version__.split('+')[0]}")
    run._missing({"none-such": "none_such"})
    assert capsys.readouterr().out == "peers: ; missing: none-such (No module named 'none_such')\n"


def test_a_row_has_both_shares_the_error_and_each_peers_time_and_spread():
    line = {
        "case": "1 tokens", "us": 20.0, "spread": 0.01, "memory_share": 0.825, "matrix_share": 0.012, "flops": 1,
        "error": 2.5e-3, "peers": {"humming": 40.0}, "peer_spreads": {"humming": 0.02},
    }  # fmt: skip
    shown = run.row(line).split()
    assert shown[:6] == ["1", "tokens", "20.00", "us", "±", "1%"]
    assert shown[6:12] == ["82%", "memory", "1%", "matrix", "error", "2.5e-03"]
    assert shown[12:] == ["humming", "40.0", "us", "±2%", "(2.00x)"]
