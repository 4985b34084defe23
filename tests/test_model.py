"""The model against transformers' own, and its traps one by one."""

import json
import shutil

import pytest
import torch

from step_kernels.generate import BUNDLED
from step_kernels.model import Step3p7, StepConfig
from step_kernels.model.chat import Chat
from step_kernels.model.checkpoint import Checkpoint, CheckpointError
from step_kernels.model.weights import Weights
from step_kernels.testing import relative_error

CONFIG = StepConfig.read(BUNDLED)
IMAGE, VOCAB, TRUNK = CONFIG.image_token_id, CONFIG.vocab_size, CONFIG.num_layers
QUESTION = "What can you do?"


@pytest.fixture(scope="module")
def model():
    return Step3p7.from_pretrained(BUNDLED, "cpu", torch.float32)


@pytest.fixture(scope="module")
def oracle():
    transformers = pytest.importorskip("transformers", "5.23.0")
    return transformers.Step3p7ForConditionalGeneration.from_pretrained(BUNDLED, dtype=torch.float32).eval()


def tokens(*shape, seed=4):
    """With seed 4 no token's fourth and fifth expert score nearer than 1e-5, ten times what f32 rounding moves."""
    return torch.randint(13, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def typical_error(out, wanted):
    """The median of the tokens' relative errors: a token whose router flips in bf16 errs by any amount."""
    out, wanted = (t.double().cpu().flatten(0, 1) for t in (out, wanted))
    return ((out - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median().item()


def with_config(change):
    """The bundled weights under a changed config."""
    checkpoint = Checkpoint(BUNDLED)
    data = json.loads(json.dumps(checkpoint.config))
    change(data["text_config"])
    config = StepConfig.from_dict(data)
    return Step3p7(config, Weights(checkpoint, torch.device("cpu"), torch.float32), config.num_mtp)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 64, 65, 150, 700])  # the window is 64
def test_text_logits_equal_transformers(model, oracle, length):
    ids = tokens(2, length)
    assert relative_error(model(ids), oracle(input_ids=ids).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("crops", [[0], [2], [3, 0], [0, 1], [2, 2]])
def test_image_logits_equal_transformers(model, oracle, crops):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(crops), 3, 168, 168, generator=generator)
    patches = torch.randn(sum(crops), 3, 112, 112, generator=generator) if sum(crops) else None
    ids, at = tokens(1, 120), 3
    for n in crops:
        ids[0, at : at + 4 * n + 9] = IMAGE
        at += 4 * n + 9 + 5
    wanted = oracle(input_ids=ids, pixel_values=images, pixel_values_local=patches, num_local_patches=crops).logits
    assert relative_error(model(ids, images, patches, crops), wanted) < 1e-5


@torch.no_grad()
def test_images_of_two_prompts_in_a_batch_go_to_their_own(model, oracle):
    images = torch.randn(2, 3, 168, 168, generator=torch.Generator().manual_seed(2))
    ids = tokens(2, 40)
    ids[0, 5:14] = ids[1, 20:29] = IMAGE
    assert relative_error(model(ids, images), oracle(input_ids=ids, pixel_values=images).logits) < 1e-5
    alone = model(ids[1:], images[1:])
    assert relative_error(model(ids, images)[1:], alone) < 1e-5


def test_padding_behind_a_prompt_changes_nothing_before_it(model):
    ids = tokens(1, 40)
    padded = torch.cat((ids, torch.ones(1, 9, dtype=torch.long)), 1)
    assert relative_error(model(padded)[:, :40], model(ids)) < 1e-5


def no_limits(text):
    text["swiglu_limits"] = [0.0] * len(CONFIG.layers)


def no_shared_limits(text):
    text["swiglu_limits_shared"] = [0.0] * len(CONFIG.layers)


def full_rotary(text):
    text["partial_rotary_factors"] = [1.0] * len(CONFIG.layers)


def one_theta(text):
    text["rope_theta"] = 1e4


def scaled_everywhere(text):
    text["yarn_only_types"] = ["full_attention", "sliding_attention"]


def unscaled(text):
    del text["rope_scaling"]


def window_one_less(text):
    text["sliding_window"] -= 1


def router_scale_one(text):
    text["moe_router_scaling_factor"] = 1.0


@pytest.mark.parametrize(
    "change",
    [no_limits, no_shared_limits, full_rotary, one_theta, scaled_everywhere, unscaled, window_one_less,
     router_scale_one],
)  # fmt: skip
def test_each_trap_in_the_config_moves_the_logits(model, change):
    """So the agreement with transformers above is agreement on each of them."""
    ids = tokens(1, 150)
    assert relative_error(with_config(change)(ids), model(ids)) > 1e-4


def test_clamps_bind_on_the_last_two_layers_alone(model):
    limits = [(layer.limit, layer.shared_limit) for layer in model.config.layers]
    assert limits == [(None, None)] * 6 + [(2.0, 3.0)] * 2 + [(None, None)] * 3


def test_sliding_layers_have_more_heads_than_full_ones(model):
    assert [layer.attention.qkvg.rows[0] // 32 for layer in model.layers] == [8, 12, 12, 12, 8, 12, 12, 12]
    assert [layer.decoder.attention.qkvg.rows[0] // 32 for layer in model.mtp] == [12, 12, 12]


def test_norm_weights_are_deltas_from_one(model):
    from step_kernels.model.layers import RMSNorm

    class Zero:
        def tensor(self, name, shape):
            return torch.zeros(shape)

    out = RMSNorm(Zero(), "norm", 2, 0.0)(torch.tensor([[3.0, 4.0]]))
    assert out[0].tolist() == pytest.approx([3 / 12.5**0.5, 4 / 12.5**0.5])


def test_router_and_its_bias_stay_in_f32_in_a_bf16_model():
    model = Step3p7.from_pretrained(BUNDLED, "cpu", torch.bfloat16)
    moe = model.layers[3].ffn
    stored = Checkpoint(BUNDLED).read("model.layers.3.moe.router_bias")
    assert moe.gate.dtype == torch.float32 and torch.equal(moe.bias, stored)
    assert not torch.equal(stored.bfloat16().float(), stored)


def test_share_expert_is_not_scaled_by_the_router(model):
    moe = model.layers[3].ffn
    x = torch.randn(5, CONFIG.hidden_size, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        whole, share = sum(moe(x)), moe.share(x)
        from step_kernels.model.weights import routed_sum
        from step_kernels.ops import moe_topk

        weights, ids = moe_topk(x @ moe.gate.mT, moe.bias, CONFIG.top_k, 1.0)
        routed = routed_sum(x, weights, ids, moe.experts, moe.limit)
    assert relative_error(whole, 3.0 * routed + share) < 1e-5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m(torch.tensor([[3, 2048]])), "got token id 2048, wanted 0 to 2047"),
        (lambda m: m(torch.tensor([[3, -1]])), "got token id -1"),
        (lambda m: m(torch.tensor([3, 4])), "input_ids: got shape [2], wanted [batch, length]"),
        (lambda m: m(tokens(1, 20), torch.zeros(1, 3, 168, 168)), "got 0 image tokens, wanted 9"),
        (lambda m: m(tokens(1, 20), None, torch.zeros(1, 3, 112, 112)), "got patches without pixel_values"),
        (lambda m: m(tokens(1, 20), torch.zeros(1, 3, 168, 168), None, [1]), "num_patches: got [1]"),
        (lambda m: Step3p7.from_pretrained(BUNDLED, "cuda:99"), "device: got cuda:99"),
        (lambda m: m(tokens(1, 20), torch.zeros(1, 3, 168, 170)), "pixel_values: got [1, 3, 168, 170]"),
    ],
)
def test_bad_calls_name_the_argument(model, call, message):
    with pytest.raises(ValueError) as error:
        call(model)
    assert message in str(error.value)


def test_zero_tokens_make_zero_logits(model):
    assert model(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, VOCAB)
    assert model(torch.zeros(0, 5, dtype=torch.long)).shape == (0, 5, VOCAB)


def test_random_model_is_finite_and_repeats_from_its_seed():
    config = StepConfig.read(BUNDLED)
    a, b = (Step3p7.random(config, "cpu", seed=5, dtype=torch.float32)(tokens(1, 30)) for _ in range(2))
    assert torch.equal(a, b) and a.isfinite().all() and 0.1 < a.std() < 10
    assert not torch.equal(a, Step3p7.random(config, "cpu", seed=6, dtype=torch.float32)(tokens(1, 30)))


def test_checkpoint_without_mtp_weights_loads_without_drafts(tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copy(BUNDLED / "config.json", tmp_path)
    for file in BUNDLED.glob("*.safetensors"):
        drafts = tuple(f"model.layers.{i}." for i in range(TRUNK, len(CONFIG.layers)))
        save_file({n: t for n, t in load_file(file).items() if not n.startswith(drafts)}, tmp_path / file.name)
    model = Step3p7.from_pretrained(tmp_path, "cpu", torch.float32)
    assert model.mtp == [] and model(tokens(1, 9)).isfinite().all()
    with pytest.raises(ValueError, match="no MTP layers"):
        model.generate([3], mtp=True)


def test_tensor_with_no_place_in_the_model_is_an_error(tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(BUNDLED, tmp_path, dirs_exist_ok=True)
    save_file({"model.layers.0.mystery.weight": torch.zeros(2)}, tmp_path / "extra.safetensors")
    with pytest.raises(CheckpointError, match="mystery.weight: 1 tensors have no place"):
        Step3p7.from_pretrained(tmp_path, "cpu")


@pytest.fixture
def exact_convolutions():
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu_logits_equal_the_cpus(model, exact_convolutions, dtype):
    """In bf16 the GPU may err against f32 at most twice as much as the CPU, in the median over the tokens.

    Near ties route a few tokens to other experts, and those err by up to 0.3: over all tokens the CPU's error is 0.015
    to 0.025 by the seed, its median 0.005 to 0.007.
    """
    error = relative_error if dtype == torch.float32 else typical_error
    on_gpu, on_cpu = (Step3p7.from_pretrained(BUNDLED, device, dtype) for device in ("cuda", "cpu"))
    ids = tokens(2, 150)
    ids[0, 5:14] = ids[1, 20:33] = IMAGE
    generator = torch.Generator().manual_seed(4)
    images, patches = torch.randn(2, 3, 168, 168, generator=generator), torch.randn(1, 3, 112, 112, generator=generator)

    def logits(m):
        return [m(ids, images, patches, [0, 1]), *m.draft_logits(ids)]

    for gpu, cpu, wanted in zip(logits(on_gpu), logits(on_cpu), logits(model), strict=True):
        assert error(gpu, wanted) < 2 * error(cpu, wanted) + 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("kv_cache", ["fp8", "model"])
def test_gpu_generates_what_the_cpu_generates(model, kv_cache):
    """An answer whose every token leads the next best by 1.6; after random tokens leads go down to 0.01."""
    on_gpu, prompt = Step3p7.from_pretrained(BUNDLED, "cuda", torch.float32), Chat(BUNDLED, CONFIG).prompt(QUESTION)
    options = dict(max_new_tokens=60, kv_cache=kv_cache)
    wanted = list(model.generate(prompt, **options))
    assert len(wanted) == 49  # with the prompt 70, more than the window
    assert list(on_gpu.generate(prompt, **options)) == wanted
    assert list(on_gpu.generate(prompt, mtp=True, **options)) == wanted


def test_checkpoint_saved_by_transformers_loads_the_same_model(model, oracle, tmp_path):
    """Its config has other field names, and its rope settings are grouped by layer type."""
    oracle.save_pretrained(tmp_path)
    saved = Step3p7.from_pretrained(tmp_path, "cpu", torch.float32)
    ids = tokens(1, 60)
    ids[0, 5:14] = IMAGE
    image = torch.randn(1, 3, 168, 168, generator=torch.Generator().manual_seed(5))
    assert saved.config.layers[:TRUNK] == CONFIG.layers[:TRUNK] and saved.mtp == []
    assert relative_error(saved(ids, image), model(ids, image)) < 1e-6
