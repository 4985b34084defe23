"""The op table: which row serves, the reasons of the others, forcing a backend, and what errors say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import step_kernels as sk
from step_kernels import registry
from step_kernels.registry import Kernel, Op, expect
from step_kernels.testing import nvfp4_weight


@pytest.fixture
def installed(monkeypatch):
    """Say which packages can be imported."""
    present = {"triton", "cuda.bindings"}
    monkeypatch.setattr(registry, "_installed", lambda package: package in present)
    return present


@pytest.fixture
def unforced(monkeypatch):
    monkeypatch.setattr(registry, "_forced", [])


def lines(*args, **kwargs) -> dict[str, str]:
    """The table as {row: verdict}, in order."""
    return {
        name: verdict
        for name, verdict in (line.split(None, 1) for line in registry.table(*args, **kwargs).splitlines()[1:])
    }


def op_of(*kernels: Kernel) -> Op:
    return Op("twice", lambda x: 2 * x, lambda x: None, (*kernels, Kernel("reference", lambda x: 2 * x, (0, 999))))


def test_the_first_row_that_does_not_refuse_serves_on_cuda(monkeypatch, installed, unforced):
    # The walk over the table needs no GPU: say that this CPU is an sm_90 device and enter no device context.
    monkeypatch.setattr(registry, "compute_capability", lambda index: 90)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.no_grad())
    few = Kernel("few", lambda x: "few", refuse=lambda x: "takes at most 4 elements" if x.numel() > 4 else None)
    newer = Kernel("newer", lambda x: "newer", capability=(100, 129))
    op = op_of(newer, few, Kernel("many", lambda x: "many"))
    assert op.run_on_cuda(torch.zeros(4)) == "few"
    assert op.run_on_cuda(torch.zeros(5)) == "many"
    assert op_of(newer).run_on_cuda(torch.ones(2)).tolist() == [2, 2]
    monkeypatch.setitem(registry._ops, "twice", op)
    with registry.force("newer"), pytest.raises(RuntimeError, match="(?s)twice: no kernel serves.*serves sm_100 to"):
        op.run_on_cuda(torch.ones(2))


def test_a_row_is_refused_by_capability_package_force_or_arguments_in_this_order(installed, unforced):
    row = Kernel("row", None, capability=(90, 99), package="triton", refuse=lambda x: f"got {x}")
    op = op_of(row)

    def reason(capability, *args):
        return next(iter(op.rows(capability, args)))[1]

    assert reason(90) is None and reason(99) is None and reason(90, 7) == "got 7"
    assert reason(89) == "serves sm_90 to sm_99, this GPU is sm_89"
    assert reason(100, 7) == "serves sm_90 to sm_99, this GPU is sm_100"
    assert reason(None) == "needs a GPU, the tensors are on the CPU"
    with sk.force("reference"):
        assert reason(90, 7) == "the backend is forced to reference"
    installed.clear()
    assert reason(90) == reason(None) == "triton is not installed"


def test_the_table_says_who_serves_and_why_the_others_do_not(installed, unforced):
    x = torch.zeros(2, 8)
    assert registry.table("swiglu", x).splitlines()[0] == "swiglu on CPU"
    without = "needs a GPU, the tensors are on the CPU"
    assert lines("swiglu", x) == {"cuda": without, "triton": without, "reference": "serves"}
    assert registry.table("swiglu", capability=103).splitlines()[0] == "swiglu on sm_103"
    assert lines("swiglu", x, capability=90) == {
        "cuda": "takes bfloat16, got float32",
        "triton": "serves",
        "reference": "would serve, but an earlier row does",
    }
    assert lines("swiglu", x, capability=75)["triton"] == "serves sm_80 to sm_129, this GPU is sm_75"


def test_refusals_see_the_arguments_of_the_call(installed, unforced):
    doubles = lines("swiglu", torch.zeros(2, 8).double(), 7.0, capability=90)
    assert doubles == {
        "cuda": "takes bfloat16, got float64",
        "triton": "takes bfloat16, float16 and float32, got float64",
        "reference": "serves",
    }
    many = lines("moe_topk", torch.zeros(2, 5000), torch.zeros(5000), 8, 3.0, capability=90)
    assert "got 5000 and 8" in many["cuda"] and many["reference"] == "serves"
    assert lines("moe_topk", torch.zeros(2, 288), torch.zeros(288), 8, 3.0, capability=90)["cuda"] == "serves"


def test_a_package_that_cannot_be_found_refuses_the_row(monkeypatch, unforced):
    registry._installed.cache_clear()
    for package in ("triton", "cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, package, None)
    assert lines("swiglu", capability=90)["triton"] == "triton is not installed"
    assert lines("moe_topk", capability=90)["cuda"] == "cuda.bindings is not installed"
    registry._installed.cache_clear()


def test_explain_prints_the_table_and_takes_weights_as_objects(capsys, unforced):
    weight = nvfp4_weight(32, 64)
    sk.explain("nvfp4_linear", torch.zeros(2, 64), weight)
    printed = capsys.readouterr().out
    assert printed.startswith("nvfp4_linear on CPU\n") and ["reference", "serves"] in map(
        str.split, printed.splitlines()
    )
    with pytest.raises(ValueError, match="x: got shape"):
        sk.explain("nvfp4_linear", torch.zeros(2, 32), weight)


def test_unknown_ops_are_answered_with_the_list_of_ops():
    with pytest.raises(ValueError, match="op: got 'gelu', wanted one of .*swiglu") as error:
        sk.explain("gelu")
    assert all(name in str(error.value) for name in registry.ops())
    others = ("NVFP4Experts", "NVFP4Weight", "PreparedWeight", "explain", "force", "nvfp4_prepare", "nvfp4_restore")
    assert set(registry.ops()) == set(sk.__all__) - set(others)


def test_force_nests_ends_with_its_block_and_leaves_the_cpu_alone(installed, unforced):
    with sk.force("triton"):
        assert lines("swiglu", capability=90)["reference"] == "the backend is forced to triton"
        with sk.force("reference"):
            assert lines("swiglu", capability=90)["reference"] == "serves"
        assert lines("swiglu", capability=90)["triton"] == "serves"
        assert lines("swiglu", torch.zeros(2, 8))["reference"] == "serves"
        assert sk.swiglu(torch.zeros(2, 8)).shape == (2, 4)
    with pytest.raises(KeyError), sk.force("triton"):
        raise KeyError
    assert lines("swiglu", capability=90)["reference"] == "would serve, but an earlier row does"


@pytest.mark.parametrize(("backend", "verdict"), [("", "would serve"), ("nothing", "the backend is forced to nothing")])
def test_the_environment_variable_forces_a_backend(backend, verdict):
    code = "import step_kernels as sk; [sk.explain(f'nvfp4_{op}', capability=90) for op in ('quantize', 'dequantize')]"
    command = [sys.executable, "-c", code]
    out = subprocess.run(command, env=os.environ | {"STEP_KERNELS_BACKEND": backend}, capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.count("forced to nothing") == (4 if backend else 0), out.stderr
    if not backend:
        assert "nvfp4_quantize on sm_90\n  triton       serves\n" in out.stdout


def test_tensors_on_two_devices_are_named_with_their_devices():
    with pytest.raises(ValueError, match="moe_topk: got tensors on different devices.*'logits': 'cpu', 'bias': 'meta'"):
        sk.moe_topk(torch.zeros(2, 8), torch.zeros(8, device="meta"), 2, 1.0)


def test_ops_take_keywords_and_keep_their_reference_and_doc():
    x = torch.randn(3, 8)
    assert torch.equal(sk.swiglu(gate_up=x, limit=0.5), sk.swiglu.reference(x, 0.5))
    assert torch.equal(torch.ops.step_kernels.swiglu(x, limit=0.5), sk.swiglu(x, 0.5))
    assert sk.swiglu.__name__ == "swiglu" and sk.swiglu.__doc__.startswith("[..., 2n] -> [..., n]")


def test_meta_tensors_give_shapes_without_computing():
    x = torch.zeros(3, 1_000_000_000, device="meta")
    assert sk.swiglu(x).shape == (3, 500_000_000) and sk.swiglu(x).is_meta


def test_expect_states_name_got_and_wanted():
    x = torch.zeros(2, 3)
    expect("x", x, (None, 3), torch.float32)
    expect("x", x, (..., 3), (torch.float16, torch.float32))
    expect("x", x, (...,), torch.float32)
    for shape, wanted in (((2,), "[2]"), ((..., 1, 2, 3), "[..., 1, 2, 3]"), ((None, 4), "[any, 4]"), ((), "[]")):
        with pytest.raises(ValueError) as error:
            expect("x", x, shape, torch.float32)
        assert str(error.value) == f"x: got shape [2, 3], wanted {wanted}"
    with pytest.raises(TypeError, match="x: got float32, wanted int32 or int64"):
        expect("x", x, (2, 3), (torch.int32, torch.int64))
    with pytest.raises(TypeError, match="x: got list, wanted a tensor"):
        expect("x", [1], (1,), torch.int32)
