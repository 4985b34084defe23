"""Checkpoint reading: names, slices, indexes that lie, and headers that are broken."""

from __future__ import annotations

import io
import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from step_kernels.model.checkpoint import INDEX, Checkpoint, CheckpointError, canonical, read_header

F8 = torch.float8_e4m3fn
A = "a.safetensors"
NAME = "model.layers.3.moe.gate.weight"


def folder(path: Path, shards: dict[str, dict], index: dict | None = None) -> Path:
    (path / "config.json").write_text("{}")
    for file, tensors in shards.items():
        save_file(tensors, path / file)
    if index is not None:
        (path / INDEX).write_text(json.dumps(index))
    return path


def raw(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """A file of `header` (bytes, or what becomes JSON) and data, with a config beside it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "config.json").write_text("{}")
    (path / A).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def one(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.view(torch.uint8).equal(b.view(torch.uint8))


def test_every_dtype_and_shape_reads_as_the_safetensors_library_reads_it(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, F8, torch.int64, torch.int32, torch.uint8)
    tensors = {f"t{i}": (torch.randn(5, 3) * 50).to(d) for i, d in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(4, 0, 2), "odd": torch.arange(7, dtype=torch.uint8)}
    checkpoint = Checkpoint(folder(tmp_path, {A: tensors}))
    wanted = load_file(tmp_path / A)
    assert checkpoint.entries.keys() == wanted.keys() == tensors.keys()
    for name, tensor in wanted.items():
        assert same(checkpoint.read(name)[None], tensor[None])
        assert checkpoint.entry(name).shape == tuple(tensor.shape)
        if tensor.dim():
            n = tensor.shape[0]
            for begin, end in ((0, n), (1, n - 1), (n, n), (2, 2)):
                assert same(checkpoint.read(name, begin, end), tensor[begin:end])


def test_a_slice_reads_only_its_bytes(tmp_path, monkeypatch):
    w = torch.arange(600, dtype=torch.int32).reshape(20, 10, 3)
    checkpoint = Checkpoint(folder(tmp_path, {A: {"first": torch.ones(7), "w": w}}))
    reads = []

    class Recorded(io.FileIO):
        def readinto(self, buffer):
            reads.append((self.tell(), len(buffer)))
            return super().readinto(buffer)

    monkeypatch.setattr(Path, "open", lambda path, *args, **options: Recorded(path))
    assert same(checkpoint.read("w", 17, 19), w[17:19])
    assert reads == [(checkpoint.entry("w").begin + 17 * 120, 2 * 120)]


@pytest.mark.parametrize("span", [(-1, 1), (1, 6), (3, 2)])
def test_a_range_outside_the_first_dimension_is_refused(tmp_path, span):
    checkpoint = Checkpoint(folder(tmp_path, {A: {"w": torch.zeros(5)}}))
    with pytest.raises(CheckpointError, match="w: got the range .*, wanted one within 5"):
        checkpoint.read("w", *span)


@pytest.mark.parametrize("rest", ["layers.3.moe.gate.weight", "embed_tokens.weight", "norm.weight"])
def test_three_prefix_schemes_have_one_canonical_name(rest):
    for prefix in ("model.", "model.language_model.", "language_model.model."):
        assert canonical(prefix + rest) == "model." + rest
    for other in ("lm_head.weight", "vision_model.conv1.weight", "vit_large_projector.weight"):
        assert canonical(other) == canonical("model." + other) == other
    assert canonical("language_model.lm_head.weight") == "lm_head.weight"


def test_two_schemes_in_one_folder_are_read_by_canonical_name(tmp_path):
    body = {"model.language_model.layers.3.moe.gate.weight": torch.ones(2)}
    drafts = {"model.layers.45.enorm.weight": torch.zeros(3)}
    checkpoint = Checkpoint(folder(tmp_path, {"body.safetensors": body, "mtp.safetensors": drafts}))
    assert set(checkpoint.entries) == {NAME, "model.layers.45.enorm.weight"} and NAME in checkpoint
    assert checkpoint.entry(NAME).stored_name.startswith("model.language_model.")
    assert checkpoint.read(NAME).tolist() == [1, 1]
    with pytest.raises(CheckpointError, match="tensor lm_head.weight is missing"):
        checkpoint.read("lm_head.weight")


def test_one_tensor_under_two_prefixes_is_refused_with_both_files(tmp_path):
    shards = {A: {NAME: torch.ones(2)}, "b.safetensors": {"language_model." + NAME: torch.ones(2)}}
    with pytest.raises(CheckpointError, match=f"b.safetensors: language_model.{NAME} is also in {A} as {NAME}"):
        Checkpoint(folder(tmp_path, shards))


def test_tensors_that_the_index_omits_are_found(tmp_path):
    tensors = {"w": torch.ones(2), "w_scale_inv": torch.ones(1)}
    checkpoint = Checkpoint(folder(tmp_path, {A: tensors}, {"weight_map": {"w": A}}))
    assert "w_scale_inv" in checkpoint


def test_symlinked_shards_are_read(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "blobs" / "0123")
    (tmp_path / A).symlink_to(Path("blobs") / "0123")
    assert Checkpoint(folder(tmp_path, {}, {"weight_map": {"w": A}})).read("w").tolist() == [1, 1]


LISTED, UNMAPPED = f"not found, but {INDEX} lists it", "weight_map is missing or not a map of names"
INDEXES = [
    ({"weight_map": {"w": A, "v": "b.safetensors"}}, f"/b.safetensors: {LISTED}"),
    ({"weight_map": {"w": A, "v": A}}, f"/{A}: v is missing, but {INDEX} lists it"),
    ({"weight_map": {"w": "../outside.safetensors"}}, f"/outside.safetensors: {LISTED}"),
    ({"weight_map": {"w": "{absolute}"}}, f"/outside.safetensors: {LISTED}"),
    ({"weight_map": {"w": 3}}, f"{INDEX}: {UNMAPPED}"),
    ({"weight_map": [A]}, f"{INDEX}: {UNMAPPED}"),
    ({"metadata": {}}, f"{INDEX}: {UNMAPPED}"),
    ([], f"{INDEX}: got a JSON list, wanted an object"),
]


@pytest.mark.parametrize(("index", "message"), INDEXES, ids=[m for _, m in INDEXES])
def test_an_index_that_lies_or_points_outside_the_folder_is_refused(tmp_path, index, message):
    save_file({"w": torch.ones(2)}, tmp_path / "outside.safetensors")  # there, but not in the checkpoint's folder
    index = json.loads(json.dumps(index).replace("{absolute}", str(tmp_path / "outside.safetensors")))
    (tmp_path / "model").mkdir()
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(folder(tmp_path / "model", {A: {"w": torch.ones(2)}}, index))


HEADERS = [
    ("no header", b"", None, "a.safetensors: the header is not JSON"),
    ("length past the end", b"{}", 11, "header length 11 exceeds the file .18 bytes. or the limit"),
    ("huge length", b"{}", 2**63 + 1, "header length 9223372036854775809 exceeds"),
    ("deep nesting", b"[" * 200_000, None, "the header is not JSON"),
    ("a list", [1], None, "the header is a JSON list, wanted an object"),
    ("a tensor twice", b'{"w": {}, "v": {}, "w": {}}', None, "a.safetensors: w: is in the header more than once"),
    ("a shape twice", b'{"w": {"shape": [1], "shape": [2]}}', None, "shape: is in the header more than once"),
    ("three offsets", one(offsets=(0, 4, 8)), None, "w: the header lacks dtype, shape or data_offsets"),
    ("unknown dtype", one("F4"), None, "w: dtype F4, wanted one of F64, F32"),
    ("wrong length", one(offsets=(0, 7)), None, r"w: bytes 0 to 7 do not hold F32 \[2\]"),
    ("negative shape", one(shape=(-2, -1)), None, r"w: bytes 0 to 8 do not hold F32 \[-2, -1\]"),
    ("bool shape", one(shape=(True, 2)), None, r"do not hold F32 \[True, 2\]"),
    ("huge empty shape", one(shape=(2**70, 0), offsets=(0, 0)), None, "do not hold F32"),
    ("overflowing empty shape", one(shape=(2**62, 2**62, 0), offsets=(0, 0)), None, "do not hold F32"),
    ("truncated", one(shape=(2**40,), offsets=(0, 2**42)), None, "w: ends at byte .*, the file has .*truncated"),
    ("overlap", one() | {"v": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, None, "w and v overlap"),
]


@pytest.mark.parametrize(("header", "length", "message"), [h[1:] for h in HEADERS], ids=[h[0] for h in HEADERS])
def test_a_broken_header_is_one_line_naming_the_file(tmp_path, header, length, message):
    with pytest.raises(CheckpointError, match=message) as error:
        Checkpoint(raw(tmp_path, header, bytes(8), length))
    assert str(error.value).startswith(str(tmp_path / A)) and "\n" not in str(error.value)


def test_short_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: not a folder"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="config.json: not found"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f"{tmp_path}: no .*safetensors file in it"):
        Checkpoint(folder(tmp_path, {}))
    (tmp_path / A).write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="a.safetensors: got 7 bytes, wanted a safetensors file"):
        Checkpoint(tmp_path)
    os.remove(tmp_path / A)
    (tmp_path / A).mkdir()
    with pytest.raises(CheckpointError, match="a.safetensors: Is a directory"):
        Checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="b.safetensors: not found"):
        read_header(tmp_path / "b.safetensors")


def test_a_file_that_shrinks_or_vanishes_after_opening_is_named(tmp_path):
    checkpoint = Checkpoint(folder(tmp_path, {A: {"w": torch.ones(1000)}}))
    os.truncate(tmp_path / A, 500)
    with pytest.raises(CheckpointError, match="a.safetensors: w: the file ends early"):
        checkpoint.read("w")
    os.remove(tmp_path / A)
    with pytest.raises(CheckpointError, match="a.safetensors: w: No such file"):
        checkpoint.read("w")
