"""Who may import what, read from the sources; and that the package needs torch, numpy and safetensors alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT) for folder in ("step_kernels", "quantize") for p in (ROOT / folder).rglob("*.py"))
OPTIONAL = ("triton", "cuda", "flashinfer", "PIL", "tokenizers", "tqdm", "transformers")
LAYERS = ("nvfp4", "registry", "ops", "model", "integrations")  # each may import those before it


def imports(file: Path) -> list[tuple[str, bool]]:
    """(absolute module name, whether it is imported inside a function) of every import in the file."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = file.parts[: len(file.parts) - node.level] if node.level else ()
            base = ".".join((*package, *([node.module] if node.module else [])))
            names = [f"{base}.{alias.name}" for alias in node.names]  # the name may be a module or a module's member
        else:
            continue
        found += [(name, id(node) in inside) for name in names]
    return found


def under(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def violations(file: Path) -> list[str]:
    here = ".".join(file.with_suffix("").parts)
    bad = []
    for name, lazy in imports(file):
        engine = name.split(".")[0]
        if engine in ("vllm", "sglang", "transformers") and here != f"step_kernels.integrations.{engine}":
            bad.append(f"{name}: an engine belongs to integrations/{engine}.py")
        if under(name, "flashinfer") and not (lazy and under(here, "step_kernels.flashinfer")):
            bad.append(f"{name}: flashinfer belongs to flashinfer/, inside functions")
        if under(name, "cuda") and here != "step_kernels.cuda.driver":
            bad.append(f"{name}: cuda-python belongs to cuda/driver.py")
        if under(name, "triton") and not under(here, "step_kernels.triton"):
            bad.append(f"{name}: triton belongs to triton/")
        if not under(here, "step_kernels"):
            continue
        if under(name, "quantize"):
            bad.append(f"{name}: quantize builds on step_kernels, not the reverse")
        kernels = tuple(f"step_kernels.{room}" for room in ("triton", "cuda", "flashinfer"))
        if under(here, *kernels) and under(name, "step_kernels.ops", "step_kernels.model"):
            bad.append(f"{name}: kernels know neither ops nor model")
        if under(name, *kernels):
            if not under(here, *kernels) and not (lazy and under(here, "step_kernels.ops")):
                bad.append(f"{name}: kernels are imported by ops, inside functions")
        for i, layer in enumerate(LAYERS):
            if under(here, f"step_kernels.{layer}") and under(
                name, *(f"step_kernels.{later}" for later in LAYERS[i + 1 :])
            ):
                bad.append(f"{name}: {layer} comes before it")
    return bad


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_one_way(file):
    assert not violations(file)


@pytest.mark.parametrize(
    ("file", "source", "count"),
    [
        ("step_kernels/nvfp4.py", "from .registry import define", 1),
        ("step_kernels/ops/x.py", "from ..triton.x import launch", 1),
        ("step_kernels/ops/x.py", "def f():\n    from ..triton.x import launch", 0),
        ("step_kernels/ops/x.py", "from ..model import step", 1),
        ("step_kernels/ops/x.py", "def f():\n    import triton", 1),
        ("step_kernels/model/x.py", "def f():\n    from ..cuda.x import launch", 1),
        ("step_kernels/triton/x.py", "import triton.language as tl\nfrom .. import ops", 1),
        ("step_kernels/cuda/x.py", "from cuda.bindings import driver", 1),
        ("step_kernels/cuda/driver.py", "from cuda.bindings import driver", 0),
        ("step_kernels/integrations/vllm.py", "import vllm\nimport transformers", 1),
        ("step_kernels/ops/x.py", "from . import y\nfrom ..integrations import vllm", 1),
        ("step_kernels/flashinfer/x.py", "import flashinfer", 1),
        ("step_kernels/flashinfer/x.py", "def f():\n    import flashinfer", 0),
        ("step_kernels/model/x.py", "import transformers\nimport quantize.plan", 2),
        ("quantize/x.py", "from step_kernels.model import checkpoint", 0),
    ],
)
def test_the_rules_catch(monkeypatch, tmp_path, file, source, count):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert len(violations(Path(file))) == count


def test_device_code_includes_no_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cu", ".cuh", ".h")]
    assert sources
    for file in sources:
        for line in file.read_text(encoding="utf-8").splitlines():
            assert not (line.lstrip().startswith("#include") and any(w in line for w in ("torch", "ATen", "c10"))), file


@pytest.mark.parametrize("module", ["step_kernels", "step_kernels.model"])
def test_importing_and_computing_need_none_of_the_optional_packages(module):
    code = (
        f"import sys\nfor name in {OPTIONAL}: sys.modules[name] = None\n"
        f"import {module}, torch, step_kernels as sk\n"
        "assert sk.swiglu(torch.ones(2, 4)).shape == (2, 2)\n"
        "assert sk.nvfp4_quantize(torch.ones(16), torch.tensor(1.0))[0].tolist() == [0x77] * 8\n"
        "sk.explain('moe_topk')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cuda.bindings is not installed" in done.stdout
