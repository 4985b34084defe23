"""The documentation inside a wheel, which is opened as an archive: none of its code runs."""

from __future__ import annotations

import ast
import gzip
import json
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

from . import prose

Piece = tuple[str, list[list[str]], str]  # what it describes, blocks of lines, the start of a question or ""
OTHERS = re.compile(
    r"(^|/)(tests?|testing|testsuite|_?vendor(ed)?|_?externals?|extern|third_?party(_files)?)/|(^|/)(test_|conftest)"
)
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def read(path: Path, package: str) -> list[tuple[str, list[Piece]]]:
    """Modules or services of a wheel in the order of their names, each with its pieces."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if not OTHERS.search(name))
        if package == "botocore":
            return [(service, aws_pieces(_json(archive, name))) for service, name in _latest_aws(names)]
        if package == "google-api-python-client":
            return [(service, google_pieces(_json(archive, name))) for service, name in _latest_google(names)]
        found = []
        for name in names:
            if name.endswith(".py") or (
                name.endswith(".pyi") and "/stdlib/" in name
            ):  # stubs with CPython's docstrings
                module = re.sub(r"^.*/stdlib/|(/__init__)?\.pyi?$", "", name).replace("/", ".")
                found.append((module, list(python_pieces(archive.read(name), module.split(".")[0]))))
            elif name.endswith(".metadata.json") or name.endswith("/translations/en.json"):
                module = name.removesuffix(".metadata.json").removesuffix("/translations/en.json").replace("/", ".")
                found.append((f"{module}.json", list(json_pieces(_json(archive, name)))))
            elif name.startswith("awscli/") and name.endswith(".rst"):
                found.append((name.removesuffix(".rst"), [("", prose.blocks(archive.read(name).decode()), "")]))
        return found


def python_pieces(source: bytes, package: str) -> Iterator[Piece]:
    """Docstrings, and other string constants of 100 characters or more, of a module in its own order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about escapes in other people's strings
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            return
    yield from _strings(tree, "", package, True)


def _strings(node: ast.AST, name: str, package: str, public: bool) -> Iterator[Piece]:
    docstring = None
    if isinstance(node, (ast.Module, *DEFINITIONS)):
        if not isinstance(node, ast.Module):
            name, public = f"{name}.{node.name}".lstrip("."), public and not node.name.startswith("_")
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            docstring = first
            kind = "class " if isinstance(node, ast.ClassDef) else ""
            found = prose.blocks(first.value.value)
            if found:
                yield name, found, f"{kind}{package}.{name}" if public and 0 < name.count(".") + bool(name) < 3 else ""
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, str) and len(node.value) >= 100:
            found = prose.blocks(node.value)
            if found:
                yield name, found, ""
        return
    elif isinstance(node, ast.JoinedStr):
        return
    for child in ast.iter_child_nodes(node):
        if child is not docstring:
            yield from _strings(child, name, package, public)


def json_pieces(value) -> Iterator[Piece]:
    """Strings of JSON of 60 characters or more, in order."""
    if isinstance(value, str):
        found = prose.blocks(value) if len(value) >= 60 else []
        if found:
            yield "", found, ""
    elif isinstance(value, (dict, list)):
        for child in value.values() if isinstance(value, dict) else value:
            yield from json_pieces(child)


def aws_pieces(api: dict) -> list[Piece]:
    """The service, its operations with what they take and give, then the remaining shapes."""
    shapes, service = api["shapes"], api["metadata"].get("serviceId", "")
    pieces, seen = [("", prose.html_blocks(api.get("documentation", "")), "")], set()

    def members(name):
        seen.add(name)
        shape = shapes.get(name, {})
        parts = [shape.get("documentation", "")]
        parts += [member.get("documentation", "") for member in shape.get("members", {}).values()]
        return [block for part in parts for block in prose.html_blocks(part)]

    for name, operation in api["operations"].items():
        found = prose.html_blocks(operation.get("documentation", ""))
        question = f"{service} operation {name}" if found else ""
        for side in ("input", "output"):
            found += members(operation[side]["shape"]) if side in operation else []
        pieces.append((name, found, question))
    pieces += [(name, members(name), "") for name in shapes if name not in seen]
    return pieces


def google_pieces(api: dict) -> list[Piece]:
    """The API, its methods with their parameters, then its schemas."""
    pieces = [("", prose.blocks(api.get("description", "")), "")]

    def described(entry, children):
        parts = [entry.get("description", ""), *(child.get("description", "") for child in children)]
        return [block for part in parts for block in prose.blocks(part)]

    def methods(resource):
        for method in resource.get("methods", {}).values():
            question = f"method {method['id']}" if prose.blocks(method.get("description", "")) else ""
            pieces.append((method["id"], described(method, method.get("parameters", {}).values()), question))
        for child in resource.get("resources", {}).values():
            methods(child)

    methods(api)
    for name, schema in api.get("schemas", {}).items():
        pieces.append((name, described(schema, schema.get("properties", {}).values()), ""))
    return pieces


def _json(archive: zipfile.ZipFile, name: str) -> dict:
    raw = archive.read(name)
    return json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)


def _latest_aws(names: list[str]) -> list[tuple[str, str]]:
    found = {name.split("/")[2]: name for name in names if name.endswith("/service-2.json.gz")}  # dates sort
    return sorted(found.items())


def _latest_google(names: list[str]) -> list[tuple[str, str]]:
    found = {}
    for name in names:
        match = re.search(r"/documents/([^/]+?)\.([^/]+)\.json$", name)
        if match:
            service, version = match.groups()
            rank = ("alpha" not in version and "beta" not in version, [int(n) for n in re.findall(r"\d+", version)])
            found[service] = max(found.get(service, (rank, name)), (rank, name))
    return sorted((service, name) for service, (_, name) in found.items())
