"""bench.accuracy: what its figures are, and the command from held-out data to table, JSON and plot."""

import importlib.util
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench import accuracy, accuracy_report, corpus, digits, quality
from bench.corpus.documents import rank
from bench.run import RESULTS
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7
from step_kernels.model.chat import Chat
from step_kernels.model.drafts import Drafts, DraftStats
from step_kernels.model.generation import generate
from step_kernels.model.image import prepare

CPU = torch.device("cpu")
WORDS = "The router scores every expert and keeps the best of them, so that a token visits only a few. "


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


@pytest.fixture
def heldout(tmp_path, monkeypatch):
    """Three short documents and six drawn digits; answers and drafts of a few tokens."""
    folder = tmp_path / "heldout"
    folder.mkdir()
    lines = [json.dumps({"name": str(i), "text": f"{i} {WORDS * (i + 1)}", "source": "-"}) for i in range(3)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    images = np.random.default_rng(0).integers(0, 17, (6, 8, 8)).astype(np.uint8)
    np.savez(folder / "digits.npz", images=images, labels=np.arange(6, dtype=np.uint8))
    monkeypatch.setattr(corpus, "HELDOUT", folder)
    monkeypatch.setattr(quality, "NEW", 6)
    monkeypatch.setattr(quality, "ANSWER", 3)
    return folder


def documents(model, *lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(13, model.config.vocab_size, (n,), generator=generator).tolist() for n in lengths]


def test_divergence_equals_torchs_kl_div():
    p, q = (torch.randn(50, 300, generator=torch.Generator().manual_seed(i)).mul(3).log_softmax(-1) for i in (0, 1))
    wanted = F.kl_div(q.double(), p.double(), log_target=True, reduction="none").sum(-1)
    assert wanted.min() > 1 and (quality.divergence(p, q) - wanted).abs().max() < 1e-5


def test_divergence_of_a_coin_from_a_biased_one():
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    assert quality.divergence(p, q).item() == pytest.approx(0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1), rel=1e-6)


def test_calibration_takes_the_start_of_long_training_documents_in_the_order_of_their_hashes(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(accuracy, "CALIBRATION", 2)
    texts = {name: f"{name} {WORDS * times}" for name, times in (("a", 60), ("b", 1), ("c", 60), ("d", 60))}
    corpus._write(tmp_path / "text.jsonl.xz", [{"name": n, "source": "-", "text": t} for n, t in texts.items()])
    chat = Chat(BUNDLED, model.config)
    found = accuracy.calibrated(tmp_path, chat, model.config, tmp_path / "ids.npy")
    assert [(s.search, s.calibration) for s in found.values()] == [
        (s, tmp_path / "ids.npy") for s in ("hessian", "gptq")
    ]
    order = sorted("acd", key=rank)[:2]  # b is short
    wanted = [
        [model.config.bos_id, *chat.tokenizer.encode(texts[n], add_special_tokens=False).ids][:512] for n in order
    ]
    assert np.load(tmp_path / "ids.npy").tolist() == wanted


def test_a_model_is_at_distance_zero_from_itself(model):
    texts = documents(model, 70, 2, 33)
    once, again = (quality.read_text(model, "model", texts) for _ in range(2))
    text = quality.compare(texts, (model, once), (model, again))
    assert text.counts.tolist() == text.hits.tolist() == [69, 1, 32]
    assert text.kl_sums.tolist() == [0, 0, 0] and [len(kl) for kl in text.kl] == [69, 1, 32]


def test_surprise_and_agreement_are_those_of_the_full_forward(model):
    texts = documents(model, 60, 45)
    reference, fp8 = (quality.read_text(model, kv_cache, texts) for kv_cache in ("model", "fp8"))
    own = quality.compare(texts, (model, reference), (model, reference))
    for i, tokens in enumerate(texts):
        logits = model(torch.tensor([tokens]))[0, :-1]
        wanted = F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum").item()
        assert own.surprise[i] == pytest.approx(wanted, rel=1e-5)
        top = model.logits(fp8[i][:-1]).argmax(-1) == logits.argmax(-1)
        assert quality.compare(texts, (model, reference), (model, fp8)).hits[i] == top.sum().item()


def test_an_fp8_cache_moves_every_document_a_little(model):
    texts = documents(model, 60, 45)
    reference, fp8 = (quality.read_text(model, kv_cache, texts) for kv_cache in ("model", "fp8"))
    kl = quality.compare(texts, (model, reference), (model, fp8)).kl_sums
    assert (kl > 1e-4).all() and (kl / 50 < 1).all()


def test_greedy_answers_are_those_of_generate(model):
    chat, rng = Chat(BUNDLED, model.config), np.random.default_rng(0)
    prompts, inputs, rows = [], [], []
    for count in (1, 3, 2):
        views = prepare(digits.picture(rng.integers(0, 17, (count, 8, 8)).astype(np.uint8)), model.config.vision)
        prompts.append(chat.prompt("What is this?", [views]))
        crops = views.crops if len(views.crops) else None
        inputs.append(
            dict(pixel_values=views.global_view[None], patch_pixel_values=crops, num_patches=[len(views.crops)])
        )
        with torch.inference_mode():
            rows.append(model.embed(torch.tensor(prompts[-1]), **inputs[-1]))
    for kv_cache in ("model", "fp8"):
        wanted = [[], [], []]
        for request, token in generate(model, prompts, images=inputs, max_new_tokens=12, kv_cache=kv_cache):
            wanted[request].append(token)
        wanted = [[token for token in row if token not in model.config.eos_ids] for row in wanted]
        assert quality.greedy(model, kv_cache, rows, 12) == wanted


def test_greedy_answers_end_before_the_first_stop_token(model, monkeypatch):
    rows = [model.embed(torch.tensor(tokens)) for tokens in documents(model, 20, 31)]

    def answers(*stop):
        monkeypatch.setattr(model, "config", replace(model.config, eos_ids=stop))
        return quality.greedy(model, "model", rows, 10)

    free = answers(-1)
    stop = free[0][4]
    assert [len(row) for row in free] == [10, 10]
    assert answers(stop) == [row[: row.index(stop)] if stop in row else row for row in free]


def test_an_answer_counts_only_with_the_exact_words(model, monkeypatch):
    chat = Chat(BUNDLED, model.config)
    images, labels = np.zeros((5, 8, 8), np.uint8), np.array([7, 3, 7, 1, 0])

    def says(text):
        ids = chat.tokenizer.encode(text, add_special_tokens=False).ids
        monkeypatch.setattr(quality, "greedy", lambda model, kv_cache, rows, new: [ids] * len(rows))

    says("\nIt is a 7.")
    assert quality.read_digits(model, "model", chat, images, labels, 1).tolist() == [True, False, True, False, False]
    says("\nThe digits are 7 1.")
    assert quality.read_digits(model, "model", chat, images, labels, 2).tolist() == [False, True]
    says("The digits are 7 3 7")
    assert quality.read_digits(model, "model", chat, images, labels, 3).tolist() == [False]


def test_drafts_are_counted_where_tokens_are_left_for_them(model, monkeypatch):
    """64 tokens, the first from the prompt: all drafts right is 15 rounds of 4 and one of 3, and so on."""
    texts = documents(model, 80, 30, 64)
    options = dict(max_new_tokens=64, stop_ids=(), kv_cache="model")
    greedy = [list(model.generate(tokens[:64], **options)) for tokens in texts]
    right = (3, 0, 1)  # drafts that agree, by request

    def oracle(drafts, source, target, position, padding, query_start):
        out = []
        for request, said in zip(source.tolist(), (position - 63).tolist()):
            future = [*greedy[request][said : said + 3], 13, 13, 13][:3]
            good = right[request]
            out.append([t if i < good else (t + 1) % model.config.vocab_size for i, t in enumerate(future)])
        drafts.take(target, position[:, None] + drafts.ahead[1:], torch.tensor(out))
        return torch.tensor(out)

    monkeypatch.setattr(Drafts, "draft", oracle)
    offered, kept = quality.count_drafts(model, "model", texts)
    assert offered.tolist() == [[16, 16, 16], [63, 62, 61], [32, 31, 31]]
    assert kept.tolist() == [[16, 16, 16], [0, 0, 0], [32, 0, 0]]
    stats = DraftStats()
    list(generate(model, [tokens[:64] for tokens in texts], mtp=True, stats=stats, **options))
    assert stats.accepted == kept.sum(0).tolist() and stats.drafted == [111] * 3


def test_bootstrap_interval_covers_the_mean_at_its_rate_and_repeats():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        counts = rng.integers(100, 500, 60)
        sums = counts * rng.normal(0.3, 0.1, 60)
        low, high = accuracy.ratio(sums, counts)["interval"]
        covered += low <= 0.3 <= high
    assert 0.89 < covered / 200 < 0.99  # 95 % less what 60 units lose, give or take three standard deviations
    assert accuracy.ratio(sums, counts) == accuracy.ratio(sums, counts)


def test_bootstrap_weighs_units_by_their_counts():
    assert accuracy.ratio(np.array([1.0, 30.0]), np.array([1, 9]))["value"] == 3.1
    assert accuracy.ratio(np.array([True, False, True, True])) == {"value": 0.75, "interval": [0.25, 1.0]}


def text(kl):
    counts = np.array([len(k) for k in kl])
    return quality.Text(counts, counts * 2.0, counts, [np.array(k) for k in kl])


def test_comparison_is_paired_by_document():
    """Half the KL in each document is exactly half in every draw, however much the documents differ."""
    kl = [[0.1, 0.3], [4.0], [0.02, 0.01, 0.03]]
    got = accuracy.against(text([[x / 2 for x in k] for k in kl]), text(kl))
    assert got["ratio"] == {"value": 0.5, "interval": [0.5, 0.5]}
    assert got["difference"]["value"] == pytest.approx(-4.46 / 12, rel=1e-5)
    assert got["difference"]["interval"][0] < -1 and got["difference"]["interval"][1] < 0


def test_text_figures_are_perplexity_and_the_spread_over_tokens():
    got = accuracy.text_figures(text([[float(i) for i in range(50)], [float(i) for i in range(50, 101)]]))
    assert got["perplexity"]["value"] == pytest.approx(np.exp(2), rel=1e-5)
    assert (got["kl"]["value"], got["kl"]["median"], got["kl"]["99 %"], got["kl"]["max"]) == (50, 50, 99, 100)
    assert got["kl"]["quantiles"] == pytest.approx([100 * level for level in accuracy_report.LEVELS])


def test_report_aligns_its_tables_and_dashes_what_was_not_measured():
    figure = {"value": 0.5, "interval": [0.25, 0.75]}
    kl = {"value": 0.012345, "interval": [0.0, 1.5], "median": 2e-7, "99 %": 0.1, "max": 12.0}
    row = {"weights": "BF16", "kv_cache": "fp8", "perplexity": figure, "kl": kl, "agreement": figure}
    rows = [row | {"digits": figure, "strips": None, "drafts": []}] * 2
    where = {"device": "CPU", "dtype": "float32", "documents": 2, "tokens": 1022, "digits": 6, "strip": 4}
    baseline = {"name": "5-gram", "perplexity": 33.333}
    lines = accuracy_report.report({**where, "rows": rows, "comparisons": [], "baseline": baseline}).splitlines()
    assert lines[0] == "CPU, float32 compute: 2 documents of 1,022 tokens, 6 digits"
    cells = [cell.strip() for cell in lines[5].strip("| ").split("|")]
    assert cells == ["BF16", "fp8", "0.50 [0.25, 0.75]", "0.0123 [0, 1.50]", "2.00e-07", "0.100", "12.0",
                     "50.0% [25.0%, 75.0%]"]  # fmt: skip
    assert len({len(line) for line in lines[3:7]}) == 1
    assert [cell.strip() for cell in lines[10].strip("| ").split("|")] == ["BF16", "fp8", "50.0% [25.0%, 75.0%]", "-"]
    assert lines[-1] == "baseline: 5-gram, perplexity 33.33"


def test_command_measures_every_variant_through_both_caches(heldout, tmp_path, capsys):
    file = tmp_path / "accuracy.json"
    assert accuracy.main(["--device", "cpu", "--documents", "2", "--json", str(file)]) == 0
    out, result = capsys.readouterr().out, json.loads(file.read_text())
    names = [accuracy.SOURCE, *accuracy.variants()]
    assert names[:2] == ["BF16", "NVFP4 experts, max"] and len(names) >= 5
    assert [(r["weights"], r["kv_cache"]) for r in result["rows"]] == [(n, k) for n in names for k in ("model", "fp8")]
    source, *others = result["rows"]
    assert source["kl"]["max"] == 0 and source["agreement"] == {"value": 1, "interval": [1, 1]}
    for row in others:
        low, high = row["kl"]["interval"]
        assert 0 < low <= row["kl"]["value"] <= high < row["kl"]["max"] and row["kl"]["median"] > 0
    assert (result["documents"], result["digits"], result["device"]) == (2, 4, "CPU")
    assert all(len(row["drafts"]) == 3 and row["digits"] and row["strips"] for row in result["rows"])
    assert [(c["weights"], c["against"]) for c in result["comparisons"]][0] == (names[2], names[1])
    assert out == accuracy_report.report(result) + "\n"
    for name in names:
        assert len(re.findall(rf"^\| {re.escape(name)} +\| (model|fp8) ", out, re.MULTILINE)) == 4


def test_a_checkpoint_without_vision_and_drafts_has_dashes(heldout, tmp_path, monkeypatch):
    folder = tmp_path / "text"
    shutil.copytree(BUNDLED, folder)
    load = Step3p7.from_pretrained.__func__

    def blind(cls, *arguments):
        model = load(cls, *arguments)
        model.vision, model.mtp = None, []
        return model

    monkeypatch.setattr(Step3p7, "from_pretrained", classmethod(blind))
    monkeypatch.setattr(accuracy, "variants", lambda: {"NVFP4 experts, max": accuracy.quantize.Settings(search="max")})
    (folder / "training.json").write_text('{"baseline": {"name": "5-gram", "perplexity": 12.345}}')
    (heldout / "text.jsonl").write_text('{"name": "0", "text": "<|im_end|>", "source": "-"}\n')
    result = accuracy.measure(folder, CPU, None)
    assert result["tokens"] > 3  # the name of a control token is text
    assert [(r["digits"], r["strips"], r["drafts"]) for r in result["rows"]] == [(None, None, [])] * 4
    assert accuracy_report.report(result).endswith("baseline: 5-gram, perplexity 12.35")


def test_readme_shows_the_saved_tables():
    saved = json.loads((RESULTS / "accuracy.json").read_text())
    readme = (RESULTS.parents[1] / "README.md").read_text()
    lines = [line for line in accuracy_report.report(saved).splitlines() if line.startswith("|")]
    assert len(lines) == 24
    for line in lines:
        assert re.sub(" +\\|", " |", re.sub("-{2,}", "---", line)) in readme


def test_an_h200_in_bfloat16_measured_what_the_cpu_did_in_float32():
    gpu, cpu = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("nvidia-h200-accuracy", "accuracy"))
    assert (gpu["dtype"], cpu["dtype"]) == ("bfloat16", "float32") and gpu["tokens"] == cpu["tokens"]
    assert gpu["rows"][0]["kl"]["max"] == 0  # the same bits on every run
    for ours, theirs in zip(gpu["rows"], cpu["rows"], strict=True):
        assert (ours["weights"], ours["kv_cache"]) == (theirs["weights"], theirs["kv_cache"])
        assert ours["perplexity"]["value"] == pytest.approx(theirs["perplexity"]["value"], rel=0.01)
        assert ours["kl"]["value"] == pytest.approx(theirs["kl"]["value"], rel=0.1)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["nowhere"], 1, "nowhere: not a folder"),
        (["--device", "toaster"], 2, "--device: got toaster"),
        (["--device", "meta"], 2, "--device: got meta"),
        (["--device", "cuda:99"], 1, "device: got cuda:99"),
        (["--documents", "0"], 2, "--documents: got 0, wanted at least 1"),
        (["--json", "nowhere/a.json"], 2, "--json: nowhere is not a folder"),
        (["--json", "."], 2, "--json: got ., a folder, wanted a file"),
        (["--plot", "a.doc"], 2, "--plot: got a.doc"),
    ],
)
def test_errors_are_one_line(heldout, arguments, status, message, capsys):
    try:
        got = accuracy.main(arguments)
    except SystemExit as e:
        got = e.code
    error = capsys.readouterr().err
    assert got == status and message in error and error.count("\n") == 1


@pytest.mark.parametrize("file", ["text.jsonl", "digits.npz"])
def test_missing_or_broken_held_out_data_is_one_line(heldout, file, capsys):
    for damage in (lambda: (heldout / file).write_bytes(b"["), (heldout / file).unlink):
        damage()
        assert accuracy.main(["--device", "cpu"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {heldout}: holds no usable held-out data: ") and error.count("\n") == 1


def test_a_plot_without_matplotlib_is_refused_before_any_work(heldout, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    monkeypatch.setattr(accuracy, "measure", lambda *a: pytest.fail("it measured"))
    assert accuracy.main(["--plot", "a.svg"]) == 1
    assert capsys.readouterr().err.startswith("error: --plot: matplotlib is not installed")


def test_plot_is_the_same_file_each_time_and_names_every_variant(tmp_path):
    pytest.importorskip("matplotlib")
    figure = accuracy.text_figures(text([[0.01 * i for i in range(1, 40)], [0.02 * i for i in range(1, 30)]]))
    rows = [{"weights": w, "kv_cache": k, **figure} for w in ("BF16", "NVFP4 linears, mse") for k in ("model", "fp8")]
    for name in ("a.svg", "b.svg"):
        accuracy_report.plot({"rows": rows}, tmp_path / name)
    svg = (tmp_path / "a.svg").read_text()
    assert svg == (tmp_path / "b.svg").read_text() and "<!-- NVFP4 linears, mse -->" in svg
