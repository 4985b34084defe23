"""English prose out of docstrings and of the HTML of API descriptions, by rules that read no model."""

from __future__ import annotations

import html
import inspect
import re

LONG = 80  # a line of so many characters is prose of its own; a shorter one may be a term above its description
COMMON = frozenset(
    "a an and are as at be by can for from has have if in into is it its may must not of on or that the their then "
    "this to was when which will with you your".split()
)
PUNCTUATION = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\xa0": " ", "\u200b": "", "•": "-"}
)
INLINE = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r":[a-zA-Z:]+:`~?([^`<]*?)(?: ?<[^`>]*>)?`", r"`\1`"),  # a role, its target dropped
        (r"`([^`<]+?) ?<[^`>]+>`_{0,2}", r"\1"),  # a link
        (r"`([^`]+)`__?\b", r"\1"),
        (r"\[([^\]]+)\]\((?:https?://|/)[^)]*\)", r"\1"),  # Markdown's link
        (r"\[[\w#*, ]{1,16}\]_", ""),  # a citation
        (r"\b[CLIBUF]\{([^}]*)\}", r"\1"),  # epytext
        (r"``", "`"),
        (r"\*\*", ""),
        (r"\(?<?https?://[^\s)>]+>?\)?", ""),
        (r"\s+", " "),
        (r" ([.,;:)])", r"\1"),
    )
)
RULE = re.compile(r"^\W{3,}$")
DROPPED = re.compile(r"^(>>>|\.\.\.|\$ |\.\. |#|[|+] ?[-|=]|@|\w+\(.*\)$|%)")
HANGING = re.compile(r"^(?:[-*+] |\d+[.)] |:\w+|\w+(?: \([^)]*\))?: )")
ITEM = re.compile(r"^(?:[-*+] |\d+[.)] |:\w+|\w+ ?(?:\([^)]*\))?: )")
BLOCK_TAG = re.compile(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|div|h\d|br|table|tr|td|pre)\b[^>]*>")
SENTENCE = re.compile(r"(?<=[a-z0-9)\"'`][.!?]) (?=[A-Z\"'`])")


def is_prose(line: str) -> bool:
    """Reads like English: mostly letters and spaces, mostly small letters, everyday words, no word past 40."""
    words = line.split()
    letters = sum(map(str.isalpha, line))
    if len(words) < 3 or len(line) > 4000 or "\\" in line or not line.isprintable() or max(line) > "\u00ff":
        return False
    if (letters + len(words) - 1) < 0.8 * len(line) or max(map(len, words)) > 40:
        return False
    if sum(map(str.islower, line)) < 0.75 * letters or any(mark in line for mark in ("{{", "==", "://", "->", "%s")):
        return False
    return len(line) < LONG or sum(word.lower() in COMMON for word in words) * 8 >= len(words)


def inline(line: str) -> str:
    """One line without reST's and Markdown's links and roles, with plain quotes and single spaces."""
    line = line.translate(PUNCTUATION)
    for pattern, replacement in INLINE:
        line = pattern.sub(replacement, line)
    return line.strip()


def blocks(docstring: str) -> list[list[str]]:
    """Paragraphs of unwrapped lines; code, doctests, tables, headings' rules and lines that are no prose are gone.

    A line goes on while the indentation stays and no list item starts, so a term and its description are two lines.
    """
    found, code = [], None
    for block in re.split(r"\n\s*\n", inspect.cleandoc(docstring)):
        lines = block.expandtabs(4).split("\n")
        ruled = [bool(RULE.match(line.strip())) for line in lines] + [False]
        lines = [line for i, line in enumerate(lines) if not (ruled[i] or ruled[i + 1])]  # headings go with their rules
        depth = len(lines[0]) - len(lines[0].lstrip()) if lines else 0
        if code is not None and depth > code:
            continue  # a literal block under `::`
        code = None
        unwrapped: list[tuple[int, str]] = []
        for line in lines:
            depth, text = len(line) - len(line.lstrip()), line.strip()
            if DROPPED.match(text):
                unwrapped = [] if text.startswith(("|", "+")) else unwrapped
                if not text.startswith("#"):
                    break
                continue
            hangs = unwrapped and depth > unwrapped[-1][0] and HANGING.match(unwrapped[-1][1])
            if unwrapped and (depth == unwrapped[-1][0] or hangs) and not ITEM.match(text):
                unwrapped[-1] = (unwrapped[-1][0], f"{unwrapped[-1][1]} {text}")
            else:
                unwrapped.append((depth, text))
        if unwrapped and unwrapped[-1][1].endswith("::"):
            code = unwrapped[-1][0]
            unwrapped[-1] = (code, unwrapped[-1][1][:-1])
        kept = [line for line in (inline(text) for _, text in unwrapped) if is_prose(line)]
        if kept:
            found.append(kept)
    return found


def html_blocks(text: str) -> list[list[str]]:
    """The same for a description in HTML: a paragraph or list item is a block."""
    parts = BLOCK_TAG.sub("\n", text).split("\n")
    lines = (inline(html.unescape(re.sub(r"<[^>]+>", "", re.sub(r"</?code>", "`", part)))) for part in parts)
    return [[line] for line in lines if is_prose(line)]


def answer(found: list[list[str]]) -> str | None:
    """The first sentence, with the second when both are short; None unless 30 to 300 characters and a full stop."""
    if not found:
        return None
    first, *more = SENTENCE.split(found[0][0])
    if more and len(first) + len(more[0]) < 200 and more[0].endswith("."):
        first = f"{first} {more[0]}"
    return first if 30 <= len(first) <= 300 and first.endswith(".") and first[0].isupper() else None
