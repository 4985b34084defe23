"""Without a GPU, Triton runs in its interpreter and `gpu` tests are skipped; and a source that many tests convert."""

import os

import pytest
import torch
from small_checkpoint import TEXT, tensors_of, write_source

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before any test module
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    torch.set_num_threads(max(1, os.cpu_count() // workers))  # 10 workers of 16 threads each took minutes for seconds


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    folder = write_source(tmp_path_factory.mktemp("quantize") / "source", TEXT, tensors_of(TEXT))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "modeling.py").write_text("raise SystemExit('never to be run')")
    return folder


@pytest.fixture(scope="session")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize") / "converted"
    from quantize import run

    assert run(source, folder).problems == []
    return folder
