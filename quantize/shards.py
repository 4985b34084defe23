"""Safetensors files written in place: the header is computed from the planned shapes, the data goes to its offsets.

A file grows under NAME.part and gets its name when its last byte is on the disk, so a final name means a whole file.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from step_kernels.model.checkpoint import DTYPES, CheckpointError

PART = ".part"
_SIDE_FILES = {".json", ".jinja", ".txt", ".md", ".model", ".tiktoken", ".png", ".jpg", ".jpeg", ".webp", ""}
_SIDE_FILE_MAX = 256 << 20  # bytes
CHUNK = 16 << 20  # bytes of a copied tensor held at a time


@contextlib.contextmanager
def _os_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise CheckpointError(f"{path}: {e.strerror or e}") from None


def write_file(path: Path, data: bytes) -> None:
    """Writes a small file whole: beside its name, to the disk, then renamed."""
    part = path.with_name(path.name + PART)
    with _os_errors(path):
        with part.open("wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
        _sync_folder(path.parent)


def copy_side_files(source: Path, target: Path, skip: set[str], renamed: dict[str, str]) -> list[str]:
    """Copies tokenizer, templates, pictures and the like; gives the names of the files left out, code among them.

    `renamed`: file -> its name in the target.
    """
    left_out = []
    with _os_errors(source):
        files = sorted(f for f in source.iterdir() if f.suffix != ".safetensors" and f.name not in skip and f.is_file())
    for file in files:
        with _os_errors(file):
            belongs = file.suffix.lower() in _SIDE_FILES and not file.name.endswith((".index.json", PART))
            if not belongs or file.name.startswith(".") or file.stat().st_size > _SIDE_FILE_MAX:
                left_out.append(file.name)
                continue
            data = file.read_bytes()
        write_file(target / renamed.get(file.name, file.name), data)
    return left_out


class Shard:
    """One output file, written by many threads. `tensors`: name -> (dtype as in safetensors, shape); `left`: bytes of
    data not yet written."""

    def __init__(self, path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]):
        self.path, self.part, self._fd = path, path.with_name(path.name + PART), None
        self._lock = threading.Lock()  # of `left` and of opening; the writes themselves go on side by side
        # Widest type first, as the safetensors library does: then every tensor is aligned to its type.
        order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name][0]].itemsize, name))
        header, at = {"__metadata__": metadata}, 0
        for name in order:
            dtype, shape = tensors[name]
            count = DTYPES[dtype].itemsize
            for n in shape:
                count *= n
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count]}
            at += count
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.head = struct.pack("<Q", len(text)) + text
        self.data_size = self.left = at
        self.names = order
        self._offsets = {name: header[name]["data_offsets"][0] for name in order}

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return len(self.head) + self.data_size

    def is_whole(self) -> bool:
        """Whether the file is there under its final name, with this header and size."""
        with _os_errors(self.path):
            if not self.path.is_file() or self.path.stat().st_size != self.size:
                return False
            with self.path.open("rb") as f:
                return f.read(len(self.head)) == self.head

    def write(self, name: str, data, at: int = 0) -> None:
        """Puts bytes at `at` of a tensor; each byte of the shard is to be written once."""
        view = memoryview(data).cast("B")
        with _os_errors(self.path):
            with self._lock:
                self._open()
                self.left -= len(view)
            start = offset = len(self.head) + self._offsets[name] + at
            while len(view):
                n = os.pwrite(self._fd, view[: 1 << 30], offset)
                view, offset = view[n:], offset + n
            if hasattr(os, "posix_fadvise"):  # has Linux write it out from now on, not only when it is synced
                os.posix_fadvise(self._fd, start, offset - start, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """To the disk, then to the final name."""
        assert self.left == 0, f"{self.path.name}: {self.left} bytes were never written"
        with _os_errors(self.path):
            self._open()
            os.fsync(self._fd)
            self.close()
            os.replace(self.part, self.path)
            _sync_folder(self.path.parent)

    def close(self) -> None:
        """Lets go of the file as it is."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _open(self) -> None:
        if self._fd is not None:
            return
        self._fd = os.open(self.part, os.O_CREAT | os.O_RDWR | os.O_TRUNC, 0o644)
        os.truncate(self._fd, self.size)
        os.pwrite(self._fd, self.head, 0)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
