"""What is wrong with a checkpoint: noted tensor by tensor, printed alike ones together."""

from __future__ import annotations

from dataclasses import dataclass, field

CHECKS = {"a": "headers", "b": "scales", "c": "copies", "d": "excludes", "e": "error", "g": "loaders"}
_SHOWN, _WIDTH, _INDENT = 3, 120, " " * 11


@dataclass(frozen=True)
class Finding:
    """One fault of one tensor, module or file (`where`). `what` and `effect`, what engines do with it, are alike for
    all that have the same fault; `detail` is not. A fault that does not break an engine is merely unusual."""

    check: str
    breaks: bool
    what: str
    where: str
    detail: str = ""
    effect: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Findings:
    """All of a checkpoint's. `done`: check -> what was looked at; `skipped`: check -> why it was not done."""

    found: list[Finding] = field(default_factory=list)
    done: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def fail(self, check: str, what: str, where: str, detail: str = "", effect: str = "") -> None:
        """Notes what breaks an engine."""
        self.found.append(Finding(check, True, what, where, detail, effect))

    def note(self, check: str, what: str, where: str, detail: str = "", effect: str = "") -> None:
        """Notes what is merely unusual."""
        self.found.append(Finding(check, False, what, where, detail, effect))

    def groups(self) -> list[list[Finding]]:
        """Alike findings together, those that break an engine first, then by check."""
        groups: dict[tuple, list[Finding]] = {}
        for f in self.found:
            groups.setdefault((not f.breaks, f.check, f.what, f.effect), []).append(f)
        return [groups[key] for key in sorted(groups, key=lambda key: key[:2])]

    def table(self) -> list[str]:
        """A line a check."""
        lines = []
        for check, name in CHECKS.items():
            mine = [f for f in self.found if f.check == check]
            failed, unusual = (sum(f.breaks is b for f in mine) for b in (True, False))
            state = f"FAILED ({failed})" if failed else "ok" if check in self.done else "not checked"
            text = self.done.get(check) or self.skipped.get(check, "")
            text += f"; unusual: {unusual}" if unusual else ""
            lines.append(f"{check}  {name:<9} {state:<12} {text}".rstrip())
        return lines

    def lines(self, everything: bool = False) -> list[str]:
        """A line a group, or a line a tensor where that gets too long; one more for what engines do."""
        lines = []
        for group in self.groups():
            first, shown = group[0], group if everything else group[:_SHOWN]
            head = f"{'FAILED ' if first.breaks else 'unusual'} {first.check}  {first.what}"
            head += f", {len(group)} times" if len(group) > 1 else ""
            places = [f.where + (f" ({f.detail})" if f.detail else "") for f in shown]
            places += [f"and {len(group) - len(shown)} more"] if len(group) > len(shown) else []
            line = f"{head}: {', '.join(places)}"
            lines += [line] if len(group) == 1 or len(line) <= _WIDTH else [f"{head}:", *(_INDENT + p for p in places)]
            lines += [f"{_INDENT}-> {first.effect}"] if first.effect else []
        return lines


def size(count: int) -> str:
    """Bytes, as printed."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
