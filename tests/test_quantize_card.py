"""README.md of a conversion: what it says, that it is the same on every run, and what becomes of the source's."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
from small_checkpoint import contents
from test_model import tokens
from test_quantize_resume import Killed, killed_at

from quantize import Settings, run
from step_kernels.model.checkpoint import INDEX

CARD, SOURCE_CARD = "README.md", "SOURCE_README.md"
GIVEN = """---
license: apache-2.0
license_link: LICENSE
library_name: transformers
---

# A model

**License:** Apache, twice.
"""


@pytest.fixture
def carded(source, tmp_path):
    """The small source with a card."""
    folder = shutil.copytree(source, tmp_path / "small")
    (folder / CARD).write_text(GIVEN)
    return folder


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:].removesuffix("|").split("|")] for line in lines[2:]]


def test_sources_card_is_kept_beside_with_its_licence_in_the_new_one(carded, tmp_path):
    run(carded, tmp_path / "out")
    text = (tmp_path / "out" / CARD).read_text()
    assert (tmp_path / "out" / SOURCE_CARD).read_text() == GIVEN
    assert text.startswith("---\nlicense: apache-2.0\nlicense_link: LICENSE\ntags:\n- nvfp4\n---\n\n# small in NVFP4\n")
    assert "it says: “license: apache-2.0”" in text and "library_name" not in text


def test_without_a_card_of_the_source_there_is_one_all_the_same(converted):
    text = (converted / CARD).read_text()
    assert text.startswith("---\ntags:\n- nvfp4\n---\n\n# source in NVFP4\n") and "## The source" not in text
    assert not (converted / SOURCE_CARD).exists()


def test_errors_and_sizes_are_those_of_the_conversion(source, tmp_path):
    summary = run(source, tmp_path / "out", Settings(recipe="linears", lm_head=True))
    text = (tmp_path / "out" / CARD).read_text()
    found = {name: numbers for name, *numbers in rows(text, "Error of the weights")}
    assert list(found) == list(dict.fromkeys(projection for _, projection in summary.errors.sums))
    for name, (sqnr, relative, worst) in found.items():
        each = [summary.errors.relative([key]) for key in summary.errors.sums if key[1] == name]
        whole = summary.errors.relative([key for key in summary.errors.sums if key[1] == name])
        assert (float(relative), float(sqnr)) == (round(whole, 4), round(-10 * np.log10(whole), 2))
        assert float(worst) == round(-10 * np.log10(max(each)), 2)
    *kinds, (_, _, weights, before, after, bits) = rows(text, "Sizes")
    index = json.loads((tmp_path / "out" / INDEX).read_text())["metadata"]["total_size"]
    assert float(after) == pytest.approx(index / 1e6, abs=0.006)
    assert float(bits) == pytest.approx(8 * index / int(weights.replace(",", "")), abs=0.006)
    assert sum(float(row[3]) for row in kinds) == pytest.approx(float(before), abs=0.06)


def test_stopped_and_resumed_conversions_write_the_same_card(source, converted, tmp_path, monkeypatch):
    for calls in (3, 5, 7, 9, 11):  # once all shards have their names, their errors are in the state alone
        with monkeypatch.context() as patch:
            killed_at(patch, "replace", calls)
            with pytest.raises(Killed):
                run(source, tmp_path / str(calls))
        run(source, tmp_path / str(calls), resume=True)
        assert contents(tmp_path / str(calls)) == contents(converted)
    before = (converted / CARD).read_bytes()
    run(source, converted, resume=True)  # finished: what it noted of the weights is gone, the card must not be
    assert (converted / CARD).read_bytes() == before


def test_settings_are_told_without_any_folder(tmp_path):
    np.save(tmp_path / "ids.npy", tokens(2, 80).numpy())
    settings = Settings(search="hessian", calibration=tmp_path / "ids.npy", mtp=True, kv_scales="calibrated")
    run("bundled", tmp_path / "out", settings)
    text = (tmp_path / "out" / CARD).read_text()
    wanted = "`python -m quantize.nvfp4 SRC DST --search hessian --calibration ids.npy --kv-scales calibrated --mtp`"
    assert wanted in text and str(tmp_path) not in text
    assert "| calibration | `ids.npy`, 160 tokens |" in text
    assert "| KV cache | FP8, scales calibrated |" in text and "MTP layers' attention" in text


@pytest.mark.parametrize(
    ("settings", "engines"),
    [
        ({}, {"vllm serve", "sglang serve", "trtllm-serve", "python -m step_kernels.generate"}),
        ({"format": "compressed-tensors"}, {"vllm serve"}),
    ],
    ids=["modelopt", "compressed-tensors"],
)
def test_only_engines_that_read_the_layout_are_named_with_a_command(settings, engines, tmp_path):
    run("bundled", tmp_path / "out", Settings(**settings, kv_cache="none"))
    text = (tmp_path / "out" / CARD).read_text()
    commands = re.findall(r"```bash\n(.*)\n```", text)
    assert {next(e for e in engines if c.startswith(e)) for c in commands} == engines and len(commands) == len(engines)
    assert "kv-cache-dtype" not in text and ("--quantization modelopt " in commands[0]) == (not settings)


def test_text_models_are_not_promised_to_tensorrt_llm(converted):
    assert "trtllm-serve" not in (converted / CARD).read_text()
