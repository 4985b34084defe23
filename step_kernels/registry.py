"""Ops: a reference in plain torch, a table of kernels, and the rule that picks one.

`define` registers an op with torch.library. On CPU it runs its reference; on CUDA the first row of its
table that does not refuse the call. Every table ends with the reference, so a GPU without a tuned kernel
still computes. `explain` prints the table with each row's reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_library = torch.library.Library("step_kernels", "DEF")
_ops: dict[str, Op] = {}
_forced: list[str] = [os.environ["STEP_KERNELS_BACKEND"]] if os.environ.get("STEP_KERNELS_BACKEND") else []


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A row of an op's table: `launch` takes the op's arguments, `refuse` too and returns a reason or None."""

    name: str
    launch: Callable
    capability: tuple[int, int] = (80, 129)  # lowest and highest compute capability, inclusive
    package: str | None = None  # what must be importable
    refuse: Callable[..., str | None] | None = None

    def refusal(self, capability: int | None) -> str | None:
        """Why this machine cannot run the kernel at all, or None. `capability` is None without a GPU."""
        low, high = self.capability
        if capability is not None and not low <= capability <= high:
            return f"serves sm_{low} to sm_{high}, this GPU is sm_{capability}"
        if self.package and not _installed(self.package):
            return f"{self.package} is not installed"
        if self.package and capability is None:
            return "needs a GPU, the tensors are on the CPU"
        return None


@dataclasses.dataclass(frozen=True)
class Op:
    name: str
    reference: Callable
    check: Callable
    kernels: tuple[Kernel, ...]

    def rows(self, capability: int | None, args: tuple) -> Iterator[tuple[Kernel, str | None]]:
        """Each kernel with the reason it refuses `args` there, or None. Without args: by machine alone."""
        for kernel in self.kernels:
            reason = kernel.refusal(capability)
            if reason is None and _forced and capability is not None and kernel.name != _forced[-1]:
                reason = f"the backend is forced to {_forced[-1]}"
            if reason is None and args and kernel.refuse:
                reason = kernel.refuse(*args)
            yield kernel, reason

    def run_on_cpu(self, *args):
        self.check(*args)
        _one_device(self, args)
        return self.reference(*args)

    def run_on_cuda(self, *args):
        self.check(*args)
        device = _one_device(self, args)
        capability = compute_capability(device.index)
        for kernel, reason in self.rows(capability, args):
            if reason is None:
                with torch.cuda.device(device):
                    return kernel.launch(*args)
        raise RuntimeError(f"{self.name}: no kernel serves this call\n{table(self.name, *args, capability=capability)}")


def define(*, check: Callable, fake: Callable, kernels: tuple[Kernel, ...] = (), mutates: tuple[str, ...] = ()):
    """Decorate an op's reference: its type hints give the schema, its name (less a leading `_`) the op's.

    `check` looks at metadata only and raises ValueError or TypeError; `fake` returns empty outputs. All take
    the op's arguments. The decorated name becomes the op; `.reference` keeps the specification.
    """

    def decorate(reference: Callable) -> Callable:
        name = reference.__name__.lstrip("_")
        op = Op(name, reference, check, (*kernels, Kernel("reference", reference, capability=(0, 999))))
        _ops[name] = op
        _library.define(name + torch.library.infer_schema(reference, mutates_args=mutates))
        _library.impl(name, op.run_on_cpu, "CPU")
        _library.impl(name, op.run_on_cuda, "CUDA")

        def checked_fake(*args):
            check(*args)
            _one_device(op, args)
            return fake(*args)

        torch.library.register_fake(f"step_kernels::{name}", checked_fake, lib=_library)
        overload = getattr(torch.ops.step_kernels, name).default

        @functools.wraps(reference)
        def call(*args, **kwargs):
            return overload(*args, **kwargs)

        call.reference = reference
        return call

    return decorate


def lazy(path: str) -> Callable:
    """The function at `path` below this package ("triton.swiglu.launch"), imported at its first call."""
    module, name = path.rsplit(".", 1)
    return lambda *args: getattr(importlib.import_module(f"{__package__}.{module}"), name)(*args)


@contextlib.contextmanager
def force(backend: str):
    """Let only the table rows called `backend` serve calls on CUDA (`reference`, `triton`, `cuda`, ...)."""
    _forced.append(backend)
    try:
        yield
    finally:
        _forced.pop()


def forced() -> str | None:
    """The backend that alone may serve calls on CUDA, or None."""
    return _forced[-1] if _forced else None


def ops() -> tuple[str, ...]:
    """Names of all ops."""
    return tuple(sorted(_ops))


def table(op: str, *args, capability: int | None = None) -> str:
    """The op's kernels, one a line: which serves, and why each other one does not.

    Without `args` the machine alone decides; `capability` (90 for sm_90) asks for a GPU that is not here.
    """
    if op not in _ops:
        raise ValueError(f"op: got {op!r}, wanted one of {', '.join(_ops)}")
    flat = tuple(_flatten(args))
    if flat:
        _ops[op].check(*flat)
    if capability is None:
        tensors = [a for a in flat if isinstance(a, Tensor)]
        on_gpu = tensors[0].is_cuda if tensors else torch.cuda.is_available()
        capability = compute_capability(tensors[0].device.index if tensors else None) if on_gpu else None
    lines, served, width = [], False, max(12, *(len(kernel.name) for kernel in _ops[op].kernels))
    for kernel, reason in _ops[op].rows(capability, flat):
        verdict = reason or ("would serve, but an earlier row does" if served else "serves")
        served = served or reason is None
        lines.append(f"  {kernel.name:<{width}} {verdict}")
    where = "CPU" if capability is None else f"sm_{capability}"
    return "\n".join([f"{op} on {where}", *lines])


def explain(op: str, *args, capability: int | None = None) -> None:
    """Print `table(op, *args)`: which kernel would serve this call, and why each other one was refused."""
    print(table(op, *args, capability=capability))


def choice(op: str, capability: int, *args) -> str:
    """The kernel that would serve a call on a GPU of `capability` with every package installed; for support tables."""
    for kernel in _ops[op].kernels:
        low, high = kernel.capability
        if low <= capability <= high and not (kernel.refuse and kernel.refuse(*_flatten(args))):
            return kernel.name
    raise RuntimeError(f"{op}: no kernel serves sm_{capability}")


def reference_only(op: str, device: torch.device) -> bool:
    """Whether no kernel but the reference could serve the op on a GPU (the backend forced or none installed)."""
    rows = _ops[op].rows(compute_capability(device.index), ())
    return next(kernel.name for kernel, reason in rows if reason is None) == "reference"


def expect(name: str, tensor: Tensor, shape: tuple, dtypes: tuple[torch.dtype, ...] | torch.dtype) -> None:
    """Raise unless `tensor` has this shape (None: any size; a leading ...: any more dimensions) and dtype."""
    dtypes = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a tensor")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name}: got {str(tensor.dtype).removeprefix('torch.')}, wanted {wanted}")
    dims = shape[1:] if shape and shape[0] is ... else shape
    short = tensor.dim() < len(dims) if len(dims) < len(shape) else tensor.dim() != len(dims)
    tail = tensor.shape[tensor.dim() - len(dims) :]
    if short or any(d is not None and d != t for d, t in zip(dims, tail)):
        wanted = ", ".join("..." if d is ... else "any" if d is None else str(d) for d in shape)
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted [{wanted}]")


@functools.cache
def compute_capability(device: int | None) -> int:
    """90 for sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name is missing
        return False


def _flatten(args: tuple) -> Iterator:
    """NVFP4Weight and the like in place of their fields, as the registered ops take them."""
    for a in args:
        if dataclasses.is_dataclass(a):
            fields = (f.name for f in dataclasses.fields(a) if f.metadata.get("argument", True))
            yield from _flatten(tuple(getattr(a, name) for name in fields))
        else:
            yield a


def _one_device(op: Op, args: tuple) -> torch.device:
    tensors = [a for a in args if isinstance(a, Tensor)]
    for tensor in tensors[1:]:
        if tensor.device != tensors[0].device:
            names = op.reference.__code__.co_varnames
            found = {n: str(a.device) for n, a in zip(names, args) if isinstance(a, Tensor)}
            raise ValueError(f"{op.name}: got tensors on different devices, wanted one: {found}")
    return tensors[0].device
