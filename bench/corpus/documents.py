"""Documents and questions out of the wheels' pieces: repeats removed, and split by name before anything is written."""

from __future__ import annotations

import collections
import hashlib
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from . import pieces, prose

HELD_SHARE = 60  # one document in so many is held out
LEAST, FULL = 400, 3000  # characters: a shorter document is joined or dropped; a longer one is closed
REPEATS = 8  # a line under prose.LONG characters, such as a parameter's type, stays so many times
PAIRS_A_SOURCE = 1200
PHRASINGS = {
    "": ("What does {} do?", "What is {} for?", "Tell me about {}."),
    "class": ("What is the class {}?", "What is the class {} for?", "Tell me about the class {}."),
    "operation": ("What does the {} do?", "What is the {} for?", "Tell me about the {}."),
}


def rank(name: str) -> int:
    """A document's place in the hash order: SHA-256 of its name as a number."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Whether a document is never trained on: one in 60, by its name alone."""
    return rank(name) % HELD_SHARE == 0


def normal(line: str) -> str:
    """What two lines share when they are taken as the same: their small letters."""
    return re.sub("[^a-z]+", "", line.lower())


class Deduplication:
    """Keeps the first occurrence of a long line, and a few of a short one, over all documents."""

    def __init__(self):
        self.seen = collections.Counter()

    def block(self, lines: list[str]) -> list[str]:
        """Lines to keep; a short line goes with the repeated long line it introduces."""
        kept, waiting = [], []
        for line in lines:
            key = hashlib.blake2b(normal(line).encode(), digest_size=8).digest()
            self.seen[key] += 1
            if len(line) < prose.LONG:
                if self.seen[key] <= REPEATS:
                    waiting.append(line)
            elif self.seen[key] == 1:
                kept += [*waiting, line]
                waiting = []
            else:
                waiting = []
        return kept + waiting


def documents(source: str, module: str, parts: Iterable[pieces.Piece], once: Deduplication) -> Iterator[dict]:
    """Pieces of a module gathered to documents of about FULL characters: {name, source, text, pairs}."""
    closed, open_, size = [], None, 0
    for label, found, subject in parts:
        texts = ["\n".join(lines) for lines in map(once.block, found) if lines]
        if open_ is None:
            name = f"{source}:{module}" + (f"/{label}" if closed else "")
            open_, size = {"name": name, "source": source, "text": [], "pairs": []}, 0
        open_["text"] += texts
        size += sum(map(len, texts))
        reply = prose.answer(found) if subject else None
        if reply:
            open_["pairs"].append((subject, reply))
        if size >= FULL:
            closed.append(open_)
            open_ = None
    if open_ is not None and size >= LEAST:
        closed.append(open_)
    elif open_ is not None and closed:
        closed[-1]["text"] += open_["text"]
        closed[-1]["pairs"] += open_["pairs"]
    for document in closed:
        yield {**document, "text": "\n\n".join(document["text"])}


def build(paths: list[Path], sources: list[str]) -> list[dict]:
    """Documents of all wheels, {name, source, text, pairs}, in a fixed order, each name once."""
    once, found, names = Deduplication(), [], set()
    with ProcessPoolExecutor() as pool:
        read = pool.map(pieces.read, paths, sources)
        for source, modules in zip(sources, tqdm(read, total=len(paths), desc="wheels", unit="wheel")):
            for module, parts in modules:
                for document in documents(source, module, parts, once):
                    while document["name"] in names:
                        document["name"] += "+"
                    names.add(document["name"])
                    found.append(document)
    return found


def question(subject: str) -> str:
    """A question about `numpy.argsort`, `class numpy.ndarray` or `S3 operation CopyObject`, worded by the hash."""
    kind = "class" if subject.startswith("class ") else "operation" if " " in subject else ""
    return PHRASINGS[kind][rank(subject) % 3].format(subject.removeprefix("class "))


def pairs(found: list[dict]) -> list[dict]:
    """Questions and answers of the documents that are trained on; none answers with a held-out sentence."""
    held = {
        normal(sentence)
        for document in found
        if is_held_out(document["name"])
        for line in document["text"].split("\n")
        for sentence in prose.SENTENCE.split(line)
    }
    subjects, answers, by_source = set(), collections.Counter(), collections.defaultdict(list)
    for document in found:
        for subject, reply in document["pairs"]:
            answers[normal(reply)] += 1
            known = subject in subjects or answers[normal(reply)] > 2
            if known or is_held_out(document["name"]) or held & set(map(normal, prose.SENTENCE.split(reply))):
                continue
            subjects.add(subject)
            row = {"name": document["name"], "question": question(subject), "answer": reply}
            by_source[document["source"]].append((rank(subject), row))
    chosen = []
    for rows in by_source.values():
        chosen += [row for _, row in sorted(rows, key=lambda item: item[0])[:PAIRS_A_SOURCE]]
    return chosen
