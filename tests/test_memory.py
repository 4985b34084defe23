"""The memory plan: bytes against numbers worked by hand from the released model's sizes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections import Counter

import pytest
import torch

from bench.release import released_config
from quantize.layout import expert_shapes, tensor_shapes
from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig, loading, step
from step_kernels.model import weights as weights_module
from step_kernels.model.cache import PagedCache
from step_kernels.model.memory import HEADROOM, Plan, Tapped, size, tally
from step_kernels.model.synthetic import RandomWeights

CONFIG = released_config(45)
META = torch.device("meta")
H200 = 150_100_000_000 - 600_000_000  # bytes, less what a CUDA context takes
LONGEST = 262_144


def weights(config=CONFIG, **options) -> dict[str, int]:
    sizes = Counter()
    source = RandomWeights(META, torch.bfloat16, config=config, **options)
    Step3p7(config, Tapped(source, tally(config, sizes)), config.num_mtp)
    return dict(sizes)


@pytest.fixture(scope="module")
def released() -> Plan:
    return Plan(CONFIG, weights(), CONFIG.num_mtp, 1, LONGEST)


def test_weights_of_the_released_recipe_are_its_tensors_bytes(released):
    layers, experts, weight = 42, 288, 3 * 1280 * 4096
    assert released.weights == {
        "routed experts": layers * experts * (weight * 9 // 16 + 3 * 4),  # codes, scales, a global scale each
        "attention": 2 * 4_520_815_872 + 45 * 2 * 4,  # and k_scale, v_scale
        "dense MLP": 2 * 415_236_096,
        "share experts": 2 * 660_602_880,
        "router": 4 * (49_545_216 + 12_096),  # kept in f32
        "embeddings": 2 * 527_958_016,
        "lm_head": 2 * 527_958_016,
        "norms": 2 * (368_640 + 4_096),
        "vision": 2 * (1_955_848_960 + 25_165_824),
        "MTP layers": 2 * 2_428_171_008 + 3 * 2 * 4,
    }
    assert sum(released.weights.values()) == 129_340_300_160


def test_recipes_take_what_their_formats_take(released):
    before = released.weights
    linears, with_head, fp8 = (
        weights(recipe="linears"), weights(recipe="linears", lm_head=True), weights(recipe="fp8")
    )  # fmt: skip
    gates = (12 * 64 + 33 * 96) * 4096  # g_proj stays as it is
    norms = 45 * 2 * 128
    quantized = 4_520_815_872 - gates - norms
    assert linears["attention"] == quantized * 9 // 16 + 4 * 45 * 4 + 2 * (gates + norms) + 45 * 2 * 4
    assert {k for k in before if linears[k] != before[k]} == {"attention", "dense MLP", "share experts"}
    assert with_head == linears | {"lm_head": 527_958_016 * 9 // 16 + 4}
    assert fp8["lm_head"] == 527_958_016 + 4 * 128_896
    assert fp8["dense MLP"] == 415_236_096 + 3 * 4 * (2 * 11264 + 4096)
    assert {k for k in before if fp8[k] == before[k]} == {"routed experts", "router", "embeddings", "norms", "vision"}


def test_cache_is_24576_bytes_a_token_and_the_windows_pages(released):
    assert released.bytes_a_token == 12 * 2 * 8 * 128 == 24_576
    # 36 layers of 2048 bytes a token: ceil-free pages of 64 for 511 + 3 positions behind a token, and a chunk's 65
    alive = (514 + 3 - 1) // 64 + 2
    assert released.window_cache == 36 * 2048 * 64 * (alive + 4096 // 64 + 1)
    assert released.cache == LONGEST * 24_576 + released.window_cache


@pytest.mark.parametrize("requests, context, drafts", [(1, 1, 0), (1, 700, 3), (5, 1000, 1), (3, 64, 3), (40, 4096, 0)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_cache_bytes_are_those_of_the_cache_made(requests, context, drafts, dtype):
    config = StepConfig.read(BUNDLED)
    plan = Plan(config, {}, drafts, requests, context, chunk=256, cache_dtype=dtype)
    made = PagedCache(
        config, requests, context, dtype=dtype, device=META, mtp_depths=drafts, chunk=256,
        tokens=requests * -(-context // 64) * 64,
    )  # fmt: skip
    assert plan.cache == made.bytes


def test_workspace_is_the_widest_of_a_chunk_or_of_eight_views_and_logits(released):
    views = 8 * 2704 * (4 * 8960 + 3 * 1536) * 2
    logits = 4 * 128_896 * 6 * 4
    assert released.workspace == views + logits
    long = dataclasses.replace(released, chunk=16384)
    assert long.workspace == 16384 * (4 * 4096 + 8 * (2 * 4096 + 1280) + 3 * 1280) * 2 + logits


def test_an_h200_holds_the_released_model_with_600k_tokens_of_cache_and_the_longest_request(released):
    assert released.fits(H200)
    # 149.5e9 - 129,340,300,160 - 1,762,316,288 - 1.5e9 - 202,899,456 = 16,694,484,096: 10,614 pages of 64 * 24,576
    assert released.cache_tokens(H200) == 10_518 * 64 == 673_152
    assert released.largest_context(H200) == LONGEST and released.largest_batch(H200) == 2
    assert not dataclasses.replace(released, requests=3).fits(H200)


def test_what_fits_is_the_most_that_fits(released):
    free = 137_000_000_000
    for requests in (1, 2, 3):
        plan = dataclasses.replace(released, requests=requests)
        context = plan.largest_context(free)
        assert context % 64 == 0 and context > 0
        assert dataclasses.replace(plan, context=context).fits(free)
        assert not dataclasses.replace(plan, context=context + 1).fits(free)
    short = dataclasses.replace(released, context=8192)
    batch = short.largest_batch(free)
    assert dataclasses.replace(short, requests=batch).fits(free)
    assert not dataclasses.replace(short, requests=batch + 1).fits(free)
    assert released.fits(released.total) and not released.fits(released.total - 1)


def test_a_request_that_does_not_fit_is_refused_with_the_largest_that_would(released):
    four = dataclasses.replace(released, requests=4, context=100_000)
    with pytest.raises(ValueError) as error:
        four.check(137_000_000_000, "cuda:0")
    # weights 129,340,300,160; windows 4 * 10 + 65 pages of 4,718,592; 4 * 1563 pages of 1,572,864; views and 4 * 4 rows
    # of logits 1,799,438,336; 1.5e9: 142,968,736,384. Without the pages 3,864,809,344 are left: 614 for each of four.
    assert str(error.value) == (
        "memory: 4 requests of 100000 tokens would take 143.0 GB, cuda:0 has 137.0 GB free; at most 4 requests of "
        "39296 tokens or 1 request of 100000 would fit"
    )
    with pytest.raises(ValueError, match="nothing would fit: weights 129.3 GB, workspace and headroom 3.3 GB$"):
        released.check(80_000_000_000, "cuda:0")
    with pytest.raises(ValueError, match="context: got 262145 tokens, wanted at most 262144"):
        dataclasses.replace(released, context=LONGEST + 1).check(10**12, "cuda:0")
    released.check(H200, "cuda:0")


def test_the_table_adds_up_and_says_what_is_left(released):
    lines = released.table(H200, "cuda:0").splitlines()
    numbers = {line[:66].strip(): float(line.split()[-2]) for line in lines[:-1]}
    total, free = (next(v for k, v in numbers.items() if k.startswith(word)) for word in ("total", "free"))
    assert total == pytest.approx(sum(numbers.values()) - total - free, abs=0.08)
    assert (total, free) == (pytest.approx(released.total / 1e9, abs=0.006), 149.5)
    assert max(map(len, lines)) <= 80
    assert lines[-1] == "room for   673,152 tokens of cache; one request up to 262,144"
    assert "free" not in released.table() and str(HEADROOM // 10**8 / 10) in released.table()


def test_a_plan_reads_headers_alone(monkeypatch):
    for module in (loading, weights_module):
        monkeypatch.setattr(module, "read_piece", lambda *a: pytest.fail("bytes were read"))
    plan = Step3p7.plan(BUNDLED)
    stored = sum(f.stat().st_size for f in BUNDLED.glob("*.safetensors"))
    router = 5 * 32 * 192 * 2  # bf16 in the file, f32 in the model
    scales = 8 * (len(plan.config.layers))  # k and v, not in the file
    assert 0 < stored - (sum(plan.weights.values()) - router - scales) < 100_000  # headers
    assert (plan.context, plan.requests, plan.drafts) == (plan.config.max_positions, 1, 3)


def headers_alone(folder):
    """The released NVFP4 checkpoint without its bytes: headers under its names, and files of holes."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    files: dict[str, dict] = {"mtp": {}, "body": {}}

    def put(name, dtype, *shape):
        drafts = name.startswith(tuple(f"model.layers.{i}." for i in (45, 46, 47)))
        if not drafts and not name.startswith("lm_head"):
            inner = name.startswith(("vision", "vit"))
            name = f"model.{name}" if inner else name.replace("model.", "model.language_model.", 1)
        header = files["mtp" if drafts else "body"]
        begin = max((info["data_offsets"][1] for info in list(header.values())[-1:]), default=0)
        size = math.prod(shape) * {"BF16": 2, "F32": 4}.get(dtype, 1)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}

    for name, shape in tensor_shapes(CONFIG).items():
        put(name, "F32" if name.endswith("router_bias") else "BF16", *shape)
    for name, (experts, n, k) in expert_shapes(CONFIG).items():
        put(name, "U8", experts, n, k // 2)
        put(f"{name}_scale", "F8_E4M3", experts, n, k // 16)
        put(f"{name}_scale_2", "F32", experts)
        put(name.replace("weight", "input_scale"), "F32", experts)
    for i in range(45):
        for name in ("k_proj.k_scale", "v_proj.v_scale"):
            put(f"model.layers.{i}.self_attn.{name}", "F32")
    for file, header in files.items():
        text = json.dumps(header).encode()
        with (folder / f"{file}.safetensors").open("wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            f.truncate(8 + len(text) + list(header.values())[-1]["data_offsets"][1])
    return folder


def test_the_released_checkpoint_is_planned_and_its_reads_are_laid_out_from_its_headers(
    released, tmp_path, monkeypatch
):
    folder = headers_alone(tmp_path / "m")
    monkeypatch.setattr(loading.StepConfig, "from_dict", lambda data, source: CONFIG)
    opened = loading.Opened(Step3p7, folder, torch.bfloat16)
    assert len(opened.checkpoint.entries) == 1939
    assert sum(f.stat().st_size for f in folder.glob("*.safetensors")) == pytest.approx(129_241_604_232, abs=300_000)
    assert dict(opened.sizes) == released.weights and opened.depths == 3
    unread = 42 * 3 * 288 * 4  # input_scale
    assert sum(p.end - p.begin for p in opened.pieces) == 129_241_354_856 - unread
    batches = loading._batches(opened.pieces)
    assert max(sum(p.end - p.begin for p in batch) for batch in batches) <= 64 << 20
    assert len(batches) < 129_241_354_856 / (64 << 20) * 1.1  # buffers are nine tenths full
    assert loading.BUFFERS * (64 << 20) <= 8e9 / 10


def test_a_model_too_large_for_the_gpu_is_refused_before_its_weights_are_read(monkeypatch):
    monkeypatch.setattr(step, "free_bytes", lambda device: 1_000_000)
    monkeypatch.setattr(loading, "read_piece", lambda *a: pytest.fail("bytes were read"))
    with pytest.raises(ValueError, match="memory: 1 request of 4096 tokens would take .* cpu has 0.0 GB free; nothing"):
        Step3p7.from_pretrained(BUNDLED, "cpu")
    with pytest.raises(ValueError, match="memory: 1 request"):
        Step3p7.random(StepConfig.read(BUNDLED), "cpu")


def test_sizes_reach_into_dataclasses():
    experts = RandomWeights(torch.device("cpu"), torch.float32).experts("", 2, 32, 64)
    assert size(experts) == 2 * (3 * 32 * 64 * 9 // 16 + 3 * 4)
    assert size(torch.zeros(3, 5, dtype=torch.float16)) == 30
