"""Reading JSON fields with errors that say what was wrong."""

from __future__ import annotations

from .checkpoint import CheckpointError


class Fields:
    """A JSON object whose fields are read with a type check; errors name file, field, value and what was wanted."""

    def __init__(self, data: dict, source: str, prefix: str = ""):
        self.data, self.source, self.prefix = data, source, prefix

    def fail(self, name: str, wanted: str):
        found = f"is {self.data[name]!r}" if name in self.data else "is missing"
        raise CheckpointError(f"{self.source}: {self.prefix}{name} {found}, wanted {wanted}")

    def part(self, name: str) -> Fields:
        if not isinstance(self.data.get(name), dict):
            self.fail(name, "an object")
        return Fields(self.data[name], self.source, f"{self.prefix}{name}.")

    def get(self, name: str, default, kind: type):
        value = self.data.get(name)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            self.fail(name, {int: "an integer", float: "a number", str: "a string"}.get(kind, kind.__name__))
        return value

    def size(self, name: str) -> int:
        value = self.data.get(name)
        if type(value) is not int or value < 1:
            self.fail(name, "a positive integer")
        return value

    def number(self, name: str) -> float:
        if type(self.data.get(name)) not in (int, float):
            self.fail(name, "a number")
        return float(self.data[name])

    def per_layer(self, name: str, count: int, kind: tuple[type, ...], default=None) -> list:
        """`count` values: a list (the first NVFP4 upload has short ones: padded with None), or one for all."""
        value = self.data.get(name, default)
        if not isinstance(value, list):
            value = [value] * count
        if any(v is not None and type(v) not in kind for v in value):
            self.fail(name, f"{' or '.join(k.__name__ for k in kind)}, or a list of them")
        return (value + [None] * count)[:count]
