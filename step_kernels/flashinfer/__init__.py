"""Launchers of FlashInfer's kernels for Blackwell; nothing here imports flashinfer before a kernel is launched."""

from __future__ import annotations

import functools
import importlib.metadata

OLDEST = (0, 7, 2)  # the version these calls were read in; older ones clamp FP4 experts before silu only


@functools.cache
def installed() -> tuple[int, ...] | None:
    """(0, 7, 2) for 0.7.2.post1; None without FlashInfer."""
    try:
        version = importlib.metadata.version("flashinfer-python")
    except importlib.metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in version.split(".")[:3] if part.isdecimal())


def refuse() -> str | None:
    """Why the installed FlashInfer cannot serve, or None."""
    version = installed()
    if version is None or version < OLDEST:
        got = "none" if version is None else ".".join(map(str, version))
        return f"needs flashinfer-python {'.'.join(map(str, OLDEST))} or later, got {got}"
