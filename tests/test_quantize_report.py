"""The report of a conversion: what is counted, what adds up, and that the page says it."""

from __future__ import annotations

import base64
import html
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from small_checkpoint import PROJECTIONS, read, refused

from quantize import Settings, UsageError, figures, plots, report, run
from quantize.figures import OFFSETS, Figures, Weight, tally
from quantize.kinds import Kind, kinds
from quantize.matrices import quantize_piece
from quantize.nvfp4 import main
from quantize.plan import make_plan
from quantize.shards import Shard
from step_kernels import nvfp4
from step_kernels.model.checkpoint import INDEX, Checkpoint


def quantized(rows: int = 24, k: int = 96, search: str = "mse", dtype=torch.bfloat16):
    """A matrix of many sizes with an outlier and blocks that become 0 and -0, its codes, block scales and scale."""
    generator = torch.Generator().manual_seed(rows)
    sizes = 2.0 ** torch.randint(-14, 1, (rows, k // 16), generator=generator)
    x = torch.randn(rows, k, generator=generator) * sizes.repeat_interleave(16, 1)
    x[1, 16:48], x[2, 5], x[3, :16] = 0, 40.0, -1e-6
    x = x.to(dtype)
    scale = nvfp4.global_scale(x.abs().amax().float(), search)
    return x, *quantize_piece(x, scale, search)[:2], scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("search", nvfp4.SEARCHES)
def test_tally_equals_a_count_block_by_block(search, dtype):
    x, codes, blocks, scale = quantized(search=search, dtype=dtype)
    blocks[4] = (blocks[4].int() - 3).clamp(min=1)  # clips
    weight = Weight.zeros(1)
    before = x.clone()
    weight.counts += tally(x, codes, blocks, scale).numpy()
    assert torch.equal(x, before)
    first = nvfp4.search_scales(x.float(), scale, "max").view(torch.uint8)
    by_code, offsets, zero, six, seven = [0] * 128, dict.fromkeys(OFFSETS, 0), 0, 0, 0
    values = nvfp4.e2m1_decode(nvfp4.unpack(codes))
    for row in range(x.shape[0]):
        for block in range(x.shape[1] // 16):
            at, code = slice(16 * block, 16 * block + 16), int(blocks[row, block])
            by_code[code] += 1
            offsets[min(max(code - int(first[row, block]), OFFSETS[0]), OFFSETS[-1])] += 1
            zero += not values[row, at].any()
            step = float(blocks[row, block].view(torch.float8_e4m3fn)) * float(scale)
            six += sum(abs(float(w)) > 6.00001 * step for w in x[row, at])
            seven += sum(abs(float(w)) > 7.00001 * step for w in x[row, at])
    assert weight.codes.tolist() == by_code
    assert weight.offsets.tolist() == list(offsets.values())
    assert (weight.zero_blocks, weight.sampled, weight.above) == (zero, x.numel(), (six, seven))
    assert zero >= 3 and six > seven > 0 and (offsets[0] < 138) == (search != "max")


def test_of_a_large_piece_evenly_spaced_rows_are_looked_at_but_every_scale_is_counted(monkeypatch):
    x, codes, blocks, scale = quantized(rows=40)
    monkeypatch.setattr(figures, "_SAMPLE", 10 * 96)
    weight, rows = Weight.zeros(1), Weight.zeros(1)
    weight.counts += tally(x, codes, blocks, scale).numpy()
    rows.counts += tally(x[::4], codes[::4], blocks[::4], scale).numpy()
    assert weight.sampled == rows.sampled == 960
    assert weight.offsets.tolist() == rows.offsets.tolist() and weight.above == rows.above
    assert weight.codes.tolist() == torch.bincount(blocks.flatten(), minlength=128).tolist()
    assert weight.zero_blocks == int((codes.view(40, 6, 8) & 0x77 == 0).all(-1).sum())


@pytest.mark.gpu
def test_tally_of_weights_on_a_gpu_equals_the_hosts():
    x, codes, blocks, scale = quantized(rows=8192, k=256)
    there = [t.cuda() for t in (x, codes, blocks, scale)]
    assert torch.equal(tally(*there), tally(x, codes, blocks, scale))
    assert torch.equal(tally(there[0], codes, blocks, there[3]), tally(x, codes, blocks, scale))


def noted(experts, total: int = 6) -> dict:
    weights = {(layer, "moe.up_proj"): Weight.zeros(total) for layer in (1, 2)}
    for layer in (1, 2):
        for expert in experts:
            x, codes, blocks, scale = quantized(rows=10 + layer + expert)
            sums = torch.tensor([layer / 3, expert + 1.5], dtype=torch.float64)
            weights[layer, "moe.up_proj"].add(expert, sums, scale, tally(x, codes, blocks, scale))
            weights[layer, "moe.up_proj"].add_tokens(torch.eye(total)[expert] * expert * 10)
            weights[layer, "moe.up_proj"].add_outputs(expert, torch.tensor([0.1, layer]).double())
    return weights


def test_two_workers_halves_through_json_merge_to_the_whole():
    halves = [noted(experts) for experts in ((0, 2, 5), (1, 3, 4))]
    for key, whole in noted(range(6)).items():
        first, second = (Weight.from_state(json.loads(json.dumps(half[key].state()))) for half in halves)
        first.merge(second)
        for name in ("errors", "scales", "counts", "tokens", "outputs"):
            assert getattr(whole, name).any()
            assert np.array_equal(getattr(whole, name), getattr(first, name)), name


def test_state_of_288_experts_takes_10_kilobytes():
    weight = Weight.zeros(288)
    weight.errors += np.random.default_rng(0).random((288, 2))
    weight.scales += np.random.default_rng(1).random(288)
    weight.counts += 1 << 40
    assert len(json.dumps(weight.state())) < 11_000
    again = Weight.from_state(json.loads(json.dumps(weight.state())))
    assert np.array_equal(again.errors, weight.errors) and np.array_equal(again.counts, weight.counts)


BAD = {(4, "moe.up_proj", 17): 9.25, (30, "moe.down_proj", 287): 12.5, (3, "moe.gate_proj", 0): 14.125}


@pytest.fixture(scope="module")
def full() -> Figures:
    """As large as the full model's: 42 layers of 288 experts, three of them bad, one zero, calibrated."""
    rng = np.random.default_rng(0)
    x, codes, blocks, scale = quantized(rows=64)
    counts = tally(x, codes, blocks, scale).numpy()
    made = Figures(title="Step-3.7-Flash-NVFP4", about={"recipe": "experts", "search": "mse"}, problems=[])
    for layer in range(3, 45):
        tokens = rng.integers(256, 90_000, 288)
        tokens[:3] = 0, 255, 256
        for projection in ("moe.gate_proj", "moe.up_proj", "moe.down_proj"):
            weight = made.weights[layer, projection] = Weight.zeros(288)
            decibels = 21.8 + rng.normal(0, 0.02, 288)
            for (bad_layer, bad_projection, expert), value in BAD.items():
                if (bad_layer, bad_projection) == (layer, projection):
                    decibels[expert] = value
            weight.errors[:, 1] = rng.uniform(2000, 3000, 288)
            weight.errors[:, 0] = weight.errors[:, 1] * 10 ** (-decibels / 10)
            weight.scales += rng.uniform(1e-4, 1e-3, 288)
            weight.counts += counts
            weight.tokens += tokens
            weight.outputs += (0.003, 1)
    made.weights[20, "moe.down_proj"].errors[100] = 0
    made.kinds = [
        Kind("routed experts", "NVFP4", 126, 190_253_629_440, 380_507_258_880, 107_018_257_536),
        Kind("attention", "BF16", 180, 3_200_000_000, 6_400_000_000, 6_400_000_000, "not in recipe experts"),
    ]
    made.bytes_in, made.bytes_out, made.seconds, made.verify_seconds = 400_000_000_000, 125_000_000_000, 80.0, 33.3
    made.host_peak, made.gpu_peak = 1_870_000_000, 612_300_000
    return made


@pytest.fixture(scope="module")
def page(full) -> str:
    return report.page(full)


def rows_of(page: str, heading: str) -> list[list[str]]:
    """The cells of the first table after a heading."""
    start = page.index(f">{heading}")
    start = page.rindex("<table", 0, start) if page[:start].endswith("<caption") else page.index("<table", start)
    table = page[start:].partition("</table>")[0]
    rows = [re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in table.split("<tr")[1:]]
    return [[html.unescape(re.sub(r"<[^>]*>", " ", cell)) for cell in row] for row in rows]


def text_of(page: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page))


def test_error_table_has_each_layers_sqnr_and_relative_mse(full, page):
    head, *rows = rows_of(page, "Error by layer and projection")
    assert head == ["layer", "gate_proj", "up_proj", "down_proj"]
    assert [row[0] for row in rows] == [*map(str, range(3, 45)), "all"]
    for row in rows[:-1]:
        for cell, projection in zip(row[1:], head[1:]):
            error, power = full.weights[int(row[0]), f"moe.{projection}"].errors.sum(0)
            assert cell.split() == [f"{-10 * np.log10(error / power):.2f}", f"{error / power:.6f}"]
    error, power = sum(w.errors.sum(0) for (_, p), w in full.weights.items() if p == "moe.up_proj")
    assert rows[-1][2].split() == [f"{-10 * np.log10(error / power):.2f}", f"{error / power:.6f}"]


def test_worst_table_names_the_twenty_lowest_of_all_matrices_in_order(full, page):
    found = [(w.sqnr[m], n, p, m) for (n, p), w in full.weights.items() for m in range(288) if np.isfinite(w.sqnr[m])]
    wanted = [[str(n), p, str(m), f"{value:.2f}"] for value, n, p, m in sorted(found)[:20]]
    rows = rows_of(page, "The worst 20")[1:]
    assert [row[:4] for row in rows] == wanted
    assert [(int(n), p, int(m)) for n, p, m, _ in wanted[:3]] == [*BAD]
    assert rows[0][4:] == [f"{10**-0.925:.6f}", f"{full.weights[4, 'moe.up_proj'].scales[17]:.3e}",
                           f"{full.weights[4, 'moe.up_proj'].tokens[17]:,}"]  # fmt: skip


def test_sizes_and_cost_are_the_figures(page):
    rows = {row[0]: row[1:] for row in rows_of(page, "Sizes")}
    assert rows["routed experts"] == ["NVFP4", "126", "190.254", "380.507", "107.018", "3.56", "4.50", ""]
    assert rows["attention"] == ["BF16", "180", "3.200", "6.400", "6.400", "1.00", "16.00", "not in recipe experts"]
    assert rows["all"] == ["", "306", "193.454", "386.907", "113.418", "3.41", "4.69", ""]
    cost = dict(rows_of(page, "How it was made"))
    assert cost["search"] == "mse" and cost["time"] == "80.0 s, then 33.3 s to verify"
    assert cost["read"] == "400.00 GB, 5.00 GB/s" and cost["written"] == "125.00 GB, 1.56 GB/s"
    assert cost["peak memory"] == "1.87 GB of the host's" and cost["peak memory of a GPU"] == "612.30 MB"


def test_scale_table_has_the_shares_of_zero_saturated_and_clipped(full, page):
    weight = full.weights[3, "moe.up_proj"]
    blocks = weight.codes.sum()
    shares = [weight.zero_blocks / blocks, weight.codes[126] / blocks, weight.codes[1:8].sum() / blocks]
    shares += [n / weight.sampled for n in weight.above]
    scales = np.concatenate([w.scales for (_, p), w in full.weights.items() if p == "moe.up_proj"])
    row = next(row for row in rows_of(page, "Scales") if row[0] == "moe.up_proj")
    assert row[1:7] == [f"{42 * blocks:,}", *(f"{100 * share:.4f}" if share else "0" for share in shares)]
    assert row[7:] == [f"{x:.2e}" for x in (scales.min(), np.median(scales), scales.max())]


def test_experts_of_few_tokens_are_counted(page):
    assert "fewer than 256 tokens: 84 of 12,096, of which 42 saw none" in text_of(page)


def test_heat_map_is_a_raster_with_the_bad_experts_and_only_them_in_orange(page):
    start = page.index("Error by layer and expert")
    section = page[start : page.index("<h2>", start)]
    assert ": 3 of 36,287" in text_of(section)
    pictures = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]*)", section)]
    pixels = [np.array(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures]
    maps = [image for image in pixels if image.shape[:2] == (42, 288)]
    orange = [int(plots.BELOW[i : i + 2], 16) for i in (1, 3, 5)]
    names, found = ("moe.gate_proj", "moe.up_proj", "moe.down_proj"), set()
    for name, image in zip(names, maps, strict=True):
        places = np.argwhere((np.abs(image.astype(int) - orange) <= 1).all(-1))
        found |= {(int(layer) + 3, name, int(expert)) for layer, expert in places}
    assert found == set(BAD)


def test_page_of_the_full_model_is_one_file_below_3_mb_that_asks_for_nothing(full, page):
    assert len(page.encode()) < 3_000_000
    assert not re.search(r"https?:|//\w|<script|<link|<img|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", page))
    assert all(target[0] == "#" or target.startswith("data:") for target in re.findall(r'href="([^"]*)"', page))
    assert report.page(full) == page


def test_linears_get_a_table_a_module_and_lm_head_a_row_without_layer():
    made = Figures(title="x")
    for layer, projection in ((0, "self_attn.q_proj"), (0, "mlp.up_proj"), (None, "lm_head")):
        made.weights[layer, projection] = Weight.zeros(1)
        made.weights[layer, projection].errors += (1, 100)
    page = report.page(made)
    assert re.findall(r"<caption>(.*?)</caption>", page) == ["self_attn", "mlp", "lm_head"]
    assert [[cell.split() for cell in row] for row in rows_of(page, "lm_head")] == [
        [["layer"], ["lm_head"]], [["–"], ["20.00", "0.010000"]], [["all"], ["20.00", "0.010000"]]
    ]  # fmt: skip
    assert "Error by layer and expert" not in page


def test_hostile_names_are_shown_and_not_obeyed():
    name = "moe.<script>alert('1')</script>&$x_$"
    made = Figures({(3, name): Weight.zeros(2)}, '<img src="http://x">', {"source": "<b>&"})
    made.problems = ["<i>tensor</i>: shape"]
    x, codes, blocks, scale = quantized()
    made.weights[3, name].add(1, torch.tensor([1.0, 50.0]).double(), scale, tally(x, codes, blocks, scale))
    page = report.page(made)
    assert not re.search(r"<script|<img|<b>|<i>", page)
    for shown in (name, "<b>&", "<i>tensor</i>: shape", '<img src="http://x">'):
        assert shown in text_of(page)
    assert "1 problem" in page


def test_kinds_add_up_to_the_bytes_of_the_source_and_of_the_result(source, converted):
    plan = make_plan(Checkpoint(source), Settings())
    found = kinds(plan)
    given = read(source)
    assert sum(kind.source for kind in found) == sum(t.nbytes for t in given.values())
    total = json.loads((converted / INDEX).read_text())["metadata"]["total_size"]
    assert sum(kind.result for kind in found) == total
    assert sum(kind.weights for kind in found) == sum(t.numel() for t in given.values())
    assert [kind.name for kind in found if not kind.why] == ["routed experts"]
    assert {kind.why for kind in found if kind.name == "attention"} == {"not in recipe experts"}


def test_description_of_a_conversion_carries_its_settings_digest_and_cost(source, tmp_path):
    plan = make_plan(Checkpoint(source), Settings(search="max"))
    summary = run(source, tmp_path / "out", Settings(search="max"))
    made = report.describe(plan, tmp_path / "out", "cpu", summary, True, {})
    report.write(tmp_path / "out.html", made)
    text = text_of((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert made.title == "out" and made.problems == []
    for shown in ("max", plan.digest, str(source), f"torch {torch.__version__}", "passed", "is gone"):
        assert shown in text


def test_without_matplotlib_or_folder_the_report_is_refused_before_the_work(tmp_path, monkeypatch):
    target = tmp_path / "new"
    report.ready(tmp_path / "a.html", target)
    report.ready(target / "a.html", target)
    with pytest.raises(UsageError, match="wanted a file in a folder that exists"):
        report.ready(tmp_path / "none" / "a.html", target)
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"matplotlib is not installed, wanted pip install 'step-kernels\[bench\]'"):
        report.ready(tmp_path / "a.html", target)


def without_cost(page: str) -> str:
    """The page from the errors on: what is above has the run's seconds and places."""
    return page[page.index("Error by layer and projection") :]


def test_report_of_a_stopped_and_resumed_conversion_equals_that_of_an_unbroken_one(source, tmp_path, monkeypatch):
    whole, resumed = tmp_path / "whole.html", tmp_path / "resumed.html"
    run(source, tmp_path / "whole", report=whole)
    with monkeypatch.context() as patch:
        finish, calls = Shard.finish, iter(range(10))

        def stop(shard):
            if next(calls) == 3:
                raise KeyboardInterrupt
            finish(shard)

        patch.setattr(Shard, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "resumed", report=resumed)
    assert not resumed.exists()
    run(source, tmp_path / "resumed", resume=True, report=resumed)
    pages = [file.read_text(encoding="utf-8") for file in (whole, resumed)]
    assert without_cost(pages[0]) == without_cost(pages[1])
    assert ["an earlier run" in page for page in pages] == [False, True]


def test_report_counts_every_block_of_the_written_scales(source, tmp_path):
    summary = run(source, tmp_path / "out", report=tmp_path / "out" / "report.html")
    out = read(tmp_path / "out")
    for layer in (1, 2):
        for projection in PROJECTIONS:
            weight, name = summary.weights[layer, f"moe.{projection}"], f"model.layers.{layer}.moe.{projection}.weight"
            codes = out[f"{name}_scale"].view(torch.uint8).flatten()
            assert weight.codes.tolist() == torch.bincount(codes, minlength=128).tolist()
            assert weight.scales.tolist() == out[f"{name}_scale_2"].tolist()
            assert weight.sampled == 16 * len(codes)


def test_command_writes_the_report_and_refuses_one_in_no_folder_before_it_begins(source, tmp_path, capsys):
    target, page = tmp_path / "out", tmp_path / "report.html"
    assert "report" in refused(capsys, 2, source, target, "--report", tmp_path / "none" / "a.html")
    assert not target.exists()
    assert main([str(source), str(target), "--search", "max", "--report", str(page)]) == 0
    assert dict(rows_of(page.read_text(encoding="utf-8"), "How it was made"))["search"] == "max"
