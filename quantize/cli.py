"""How the two command lines print what is wrong."""

from __future__ import annotations

import sys

_SHOWN = 20


def print_problems(problems: list[str]) -> None:
    """One line each on stderr; one fault can show in thousands of tensors, so only the first are shown."""
    for problem in problems[:_SHOWN]:
        print(f"error: {problem}", file=sys.stderr)
    if len(problems) > _SHOWN:
        print(f"error: and {len(problems) - _SHOWN} more", file=sys.stderr)
