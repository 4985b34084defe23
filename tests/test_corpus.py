"""What goes into the training text, how it is split, and that reading a wheel runs none of its code."""

import gzip
import json
import zipfile

import numpy as np
import pytest

from bench import corpus
from bench.corpus import documents, pieces, prose, wheels

SENTENCE = "This sentence is the long description of a thing that is needed by the tests of the corpus. "
HOSTILE = '''"""The module that must stay closed, for it would fail on import."""
raise SystemExit("imported")


class Scale:
    """Scale of a block, which the tensor is divided by. It is the largest value over six."""

    def _hidden(self):
        """Return nothing that a question should ever be asked about."""

    def apply(self, x):
        """Apply the scale to every element of the tensor and return the result."""
        raise ValueError(
            "the help of this option is a string of the module, and it stays, for it is prose too, which people read."
        )
'''


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def test_a_wheel_is_read_without_running_it(tmp_path):
    path = wheel(
        tmp_path / "x.whl", {"pack/__init__.py": HOSTILE, "pack/tests/test_x.py": HOSTILE, "pack/bad.py": "def"}
    )
    modules = dict(pieces.read(path, "pack"))
    assert sorted(modules) == ["pack", "pack.bad"] and modules["pack.bad"] == []
    labels = [(label, question) for label, _, question in modules["pack"]]
    assert labels == [
        ("", ""),
        ("Scale", "class pack.Scale"),
        ("Scale._hidden", ""),
        ("Scale.apply", "pack.Scale.apply"),
        ("Scale.apply", ""),
    ]
    assert modules["pack"][4][1][0][0].startswith("the help of this option is a string of the module")


def test_aws_operations_come_with_what_they_take_and_the_newest_version_wins(tmp_path):
    def api(word):
        return {
            "metadata": {"serviceId": "S9"},
            "documentation": "<p>The service keeps things &amp; gives them back.</p>",
            "operations": {
                "GetThing": {
                    "documentation": f"<p>Gets the {word} thing for <code>you</code>.</p>",
                    "input": {"shape": "In"},
                }
            },
            "shapes": {"In": {"members": {"Name": {"documentation": "<p>The name of the thing.</p>"}}}},
        }

    gz = {
        f"botocore/data/s9/{day}/service-2.json.gz": json.dumps(api(day[-2:])) for day in ("2020-01-01", "2024-01-02")
    }
    path = wheel(tmp_path / "b.whl", {name: gzip.compress(text.encode()) for name, text in gz.items()})
    assert pieces.read(path, "botocore") == [
        (
            "s9",
            [
                ("", [["The service keeps things & gives them back."]], ""),
                ("GetThing", [["Gets the 02 thing for `you`."], ["The name of the thing."]], "S9 operation GetThing"),
            ],
        )
    ]


@pytest.mark.parametrize(
    "docstring, wanted",
    [
        ("Sort the array\n    along an axis.", [["Sort the array along an axis."]]),
        ("Some words here.\n\n    >>> f(1)\n    2", [["Some words here."]]),
        (
            "Use it like this::\n\n        x = 1 of the many words in here\n\n    Then go on with it.",
            [["Use it like this:"], ["Then go on with it."]],
        ),
        (
            "Parameters\n    ----------\n    a : array of any kind\n        The input\n        of it all.",
            [["a: array of any kind", "The input of it all."]],
        ),
        (":param a: what goes on\n      in the next line", [[":param a: what goes on in the next line"]]),
        (
            "See :class:`~pack.Scale` and `the guide <https://x.y/z>`_ for more.",
            [["See `pack.Scale` and the guide for more."]],
        ),
        ("===  ===\n    the table of a\n    ===  ===", []),
        ("x = [1, 2, 3] + [4, 5, 6] / (7 * 8)", []),
        ("Функция возвращает сумму чисел", []),
        ("THIS IS SHOUTED AND SO IT IS DROPPED", []),
    ],
)
def test_blocks_keep_prose_and_drop_code_tables_and_other_scripts(docstring, wanted):
    assert prose.blocks(docstring) == wanted


def test_answers_are_whole_sentences_of_30_to_300_characters():
    assert prose.answer([["Too short a one."]]) is None
    assert prose.answer([["A first sentence of the right length. And a second one."]]) == (
        "A first sentence of the right length. And a second one."
    )
    assert prose.answer([["A sentence of the right length, e.g. this one, without its end"]]) is None
    assert prose.answer([[SENTENCE * 2 + SENTENCE]]) == (SENTENCE * 2).strip()
    assert prose.answer([["Long " * 80 + "sentence."]]) is None


def test_a_long_line_is_kept_once_and_takes_its_heading_along():
    once = documents.Deduplication()
    assert once.block(["a: array like it", SENTENCE + "One."]) == ["a: array like it", SENTENCE + "One."]
    assert once.block(["b: array like it", SENTENCE.upper() + "one!", "The rest stays."]) == ["The rest stays."]
    kept = [once.block(["The rest stays."]) for _ in range(documents.REPEATS)]
    assert kept == [["The rest stays."]] * (documents.REPEATS - 1) + [[]]


def test_pieces_become_documents_of_400_characters_or_more_named_after_their_first_piece():
    parts = [(f"f{i}", [[f"{SENTENCE * 8} The number of this one is {'x' * i}."]], f"pack.f{i}") for i in range(6)]
    parts.append(("end", [["A short end of it."]], ""))
    found = list(documents.documents("pack", "pack.mod", parts, documents.Deduplication()))
    assert [document["name"] for document in found] == ["pack:pack.mod", "pack:pack.mod/f4"]
    assert found[1]["text"].endswith("\n\nA short end of it.")
    assert list(documents.documents("pack", "m", [("", [["Short and alone."]], "")], documents.Deduplication())) == []


def name(held: bool, start: int = 0) -> str:
    return next(f"pack:m{i}" for i in range(start, 10**6) if documents.is_held_out(f"pack:m{i}") == held)


def test_the_split_goes_by_name_and_holds_out_one_in_sixty():
    assert documents.rank("numpy:numpy.linalg") == 6258878364940760822  # from sha256sum, the first 16 hex digits
    share = np.mean([documents.is_held_out(f"pack:m{i}") for i in range(60_000)])
    assert share == pytest.approx(1 / 60, rel=0.1)


def test_no_question_comes_from_a_held_out_document_or_is_answered_with_its_sentence():
    stated = "The held-out sentence that must stay unknown to the model."
    rows = [
        {"name": name(True), "source": "p", "text": stated, "pairs": [("p.a", "Another thing that p does for you.")]},
        {
            "name": name(False),
            "source": "p",
            "text": "",
            "pairs": [("p.b", stated), ("p.c", "It adds the numbers up.")],
        },
        {"name": name(False, 50), "source": "p", "text": "", "pairs": [("p.c", "It is here a second time.")]},
    ]
    asked = documents.pairs(rows)
    assert [(row["question"], row["answer"]) for row in asked] == [
        (documents.question("p.c"), "It adds the numbers up.")
    ]


def test_a_wrong_hash_is_an_error_of_one_line(tmp_path):
    path = wheel(tmp_path / "pack-1.0-py3-none-any.whl", {"pack/__init__.py": ""})
    with pytest.raises(
        RuntimeError, match=f"{path}: SHA-256 is [0-9a-f]{{64}}, wanted 00; delete it to fetch it again"
    ):
        wheels.fetch(tmp_path, [wheels.Wheel("pack", "1.0", "MIT", "00")])


@pytest.mark.parametrize(
    "printed, wanted",
    [
        ("", "no message"),
        ("python: No module named pip", "python: No module named pip"),
        ("ERROR: THE HASHES DIFFER.\n    Expected 00\n    Got 01", "THE HASHES DIFFER."),
    ],
)
def test_a_failed_download_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, printed, wanted):
    interpreter = tmp_path / "python"
    interpreter.write_text(f"#!/bin/sh\ncat >&2 <<'END'\n{printed}\nEND\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setattr(wheels.sys, "executable", str(interpreter))
    assert corpus.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: pip download: {wanted}\n"


def test_every_wheel_is_pinned_once_under_a_permissive_licence():
    assert len({wheel.package for wheel in wheels.WHEELS}) == len(wheels.WHEELS)
    assert all(len(wheel.sha256) == 64 and int(wheel.sha256, 16) for wheel in wheels.WHEELS)
    allowed = {"Apache-2.0", "BSD", "BSD-2-Clause", "BSD-3-Clause", "MIT", "PSF", "MIT,PSF-2.0"}
    assert {wheel.licence for wheel in wheels.WHEELS} <= allowed


def test_files_written_are_read_back_and_the_same_bytes_each_time(tmp_path):
    rows = [{"name": "a", "source": "b", "text": "Zwölf\u2028lines.\n\nTwo."}]
    images = np.arange(128, dtype=np.uint8).reshape(2, 8, 8) % 17
    written = []
    for folder in (tmp_path / "1", tmp_path / "2"):
        folder.mkdir()
        corpus._write(folder / "text.jsonl.xz", rows)
        corpus._write_digits(folder / "digits.npz", images, np.array([3, 4], np.uint8))
        written.append([(path.name, path.read_bytes()) for path in sorted(folder.iterdir())])
    assert written[0] == written[1] and [file for file, _ in written[0]] == ["digits.npz", "text.jsonl.xz"]
    assert corpus.read_text(folder) == rows
    assert np.array_equal(corpus.read_digits(folder)[0], images)


def test_the_repository_holds_128_documents_that_the_split_holds_out():
    held = corpus.heldout_text()
    assert len(held) == len({row["name"] for row in held}) == 128
    assert all(documents.is_held_out(row["name"]) for row in held)
    assert [documents.rank(row["name"]) for row in held] == sorted(documents.rank(row["name"]) for row in held)
    assert min(len(row["text"]) for row in held) >= 750 and max(len(row["text"]) for row in held) <= 2400
    assert {row["source"] for row in held} <= {wheel.package for wheel in wheels.WHEELS}


def test_the_repository_holds_360_digits_of_all_ten_kinds():
    images, labels = corpus.heldout_digits()
    assert images.shape == (360, 8, 8) and images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [35, 36, 35, 37, 37, 37, 37, 36, 33, 37]
    assert images.max() == 16 and images.reshape(360, 64).max(1).min() > 8


def test_a_document_is_cut_at_the_end_of_a_paragraph_or_sentence():
    assert corpus.cut("Short.") == "Short."
    assert corpus.cut("a" * 1800 + "\n\n" + "b" * 900) == "a" * 1800
    assert corpus.cut((SENTENCE * 40).strip()) == (SENTENCE * 26).strip()


def test_everyday_questions_are_asked_in_one_way_each():
    rows = corpus.everyday()
    assert len({row["question"] for row in rows}) == len(rows) >= 100
    assert all(row["answer"].isascii() and row["answer"][-1] in ".!?" for row in rows)


def test_the_overlap_counts_runs_of_13_words_that_training_text_has_too():
    words = [f"word{i}" for i in range(20)]
    held, train = [{"text": " ".join(words)}], [{"text": "Before, " + ", ".join(words[2:16]).upper() + "."}]
    assert corpus.overlap(train, held) == 2 / 8
