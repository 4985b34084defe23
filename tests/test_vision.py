import math

import pytest
import torch

from step_kernels.model import vision
from step_kernels.model.config import StepConfig, VisionConfig
from step_kernels.model.vision import VisionEncoder, rope_2d, rotate_pairs

SIZES = dict(width=64, layers=2, heads=4, mlp_width=128, patch_size=14)
MINI = VisionConfig(image_size=168, crop_size=112, image_tokens=9, crop_tokens=4, **SIZES)


class Weights:
    """The tensors of a dict, as the model's weights are asked for."""

    def __init__(self, tensors):
        self.tensors = tensors

    def tensor(self, name, shape, keep=False):
        assert tuple(self.tensors[name].shape) == shape, name
        return self.tensors[name]


class Seeded:
    """Random tensors, remembered by name; the device and dtype of choice."""

    def __init__(self, device="cpu", dtype=torch.float32):
        self.device, self.dtype, self.tensors = device, dtype, {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, name, shape, keep=False):
        if self.device == "meta":
            x = torch.empty(shape, dtype=self.dtype, device="meta")
        else:
            x = torch.randn(shape, generator=self.generator).to(self.dtype) * max(shape[-1], 16) ** -0.5
        return self.tensors.setdefault(name, x)


def relative_error(got, wanted):
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


@pytest.fixture(scope="module")
def oracle(tmp_path_factory):
    """transformers' model with random weights in every vision tensor, and what it saves."""
    transformers = pytest.importorskip("transformers", minversion="5.23")
    from safetensors.torch import load_file

    torch.manual_seed(0)
    config = transformers.Step3p7Config(
        text_config=dict(
            vocab_size=64,
            hidden_size=96,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            max_position_embeddings=256,
            layer_types=["full_attention"],
            sliding_window=16,
            moe_layers_enum="",
            mlp_layer_types=["dense"],
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            share_expert_dim=32,
            rope_theta=1e4,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        ),
        vision_config=dict(width=64, layers=2, heads=4, image_size=168, patch_size=14, mlp_ratio=2.0),
        image_token_id=63,
        projector_bias=False,
    )
    model = transformers.Step3p7ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for part in (model.model.vision_model, model.model.multi_modal_projector):
            for p in part.parameters():
                p.copy_(torch.randn(p.shape) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    folder = tmp_path_factory.mktemp("oracle")
    model.save_pretrained(folder)
    saved = load_file(folder / "model.safetensors")
    return model.model, {name.removeprefix("model."): x for name, x in saved.items()}


def test_features_equal_transformers_for_whole_views_and_for_crops_on_a_smaller_grid(oracle):
    model, saved = oracle
    encoder = VisionEncoder(MINI, 96, Weights(saved))
    generator = torch.Generator().manual_seed(1)
    whole, crops = (torch.randn(n, 3, s, s, generator=generator) for n, s in ((2, 168), (5, 112)))
    with torch.no_grad():
        features = model.get_image_features(whole, crops, [3, 2]).pooler_output
    ours, ours_crops = encoder(whole), encoder(crops)
    assert ours.shape == (2, 9, 96) and ours_crops.shape == (5, 4, 96)
    for i, part in enumerate(ours_crops.split([3, 2])):
        assert relative_error(part.flatten(0, 1), features[i][:-9]) <= 1e-5
        assert relative_error(ours[i], features[i][-9:]) <= 1e-5


def test_half_of_the_released_position_grid_is_the_mean_of_each_two_by_two():
    seeded = Seeded()
    encoder = VisionEncoder(MINI, 96, seeded)
    grid = seeded.tensors["vision_model.positional_embedding"].view(6, 2, 6, 2, 64)
    torch.testing.assert_close(encoder._positions(6), grid.mean((1, 3)).flatten(0, 1))


def test_rope_turns_the_first_pairs_by_the_column_and_the_last_by_the_row():
    cos, sin = rope_2d(2, 3, 96)
    assert cos.shape == sin.shape == (6, 48) and cos.dtype == torch.float32
    frequency = torch.tensor([1e4 ** (-2 * j / 48) for j in range(24)])
    none = torch.zeros(24)
    for token, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angle = torch.cat([column * frequency if column else none, row * frequency if row else none])
        torch.testing.assert_close(cos[token], angle.cos())
        torch.testing.assert_close(sin[token], angle.sin())
    assert sin[1, 0] == pytest.approx(0.84147098) and sin[1, 24] == 0  # column 1, row 0
    assert sin[3, 0] == 0 and sin[3, 24] == pytest.approx(0.84147098)  # column 0, row 1


def test_rope_positions_are_not_rescaled_on_a_smaller_grid():
    large, small = rope_2d(52, 52, 96)[1].view(52, 52, 48), rope_2d(36, 36, 96)[1].view(36, 36, 48)
    assert torch.equal(large[:36, :36], small)


def test_rotation_pairs_neighbouring_dimensions():
    cos, sin = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])  # a quarter turn of the first pair alone
    assert rotate_pairs(torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), cos, sin).tolist() == [[[-2.0, 1.0, 3.0, 4.0]]]


def test_bfloat16_rope_angles_stay_in_float32():
    turned = rotate_pairs(torch.ones(2704, 1, 96, dtype=torch.bfloat16), *rope_2d(52, 52, 96))
    angle = 51 * 1e4 ** (-4 / 48)  # row 0, column 51, pair 2: 23.672, which bfloat16 would make 23.625
    assert turned.dtype == torch.bfloat16
    assert turned[51, 0, 4].item() == pytest.approx(math.cos(angle) - math.sin(angle), rel=2**-8)
    assert math.cos(23.625) - math.sin(23.625) != pytest.approx(math.cos(angle) - math.sin(angle), rel=2**-7)


def released(mlp_ratio):
    data = dict(
        vision_config=dict(width=1536, layers=47, heads=16, image_size=728, patch_size=14, mlp_ratio=mlp_ratio),
        image_token_id=128001,
        text_config=dict(
            vocab_size=128896,
            hidden_size=4096,
            intermediate_size=11264,
            num_hidden_layers=1,
            max_position_embeddings=262144,
            layer_types=["full_attention"],
            moe_layers_enum="",
            num_attention_heads=64,
            num_attention_groups=8,
            head_dim=128,
            moe_num_experts=288,
            moe_top_k=8,
            moe_intermediate_size=1280,
            share_expert_dim=1280,
            moe_router_scaling_factor=3.0,
        ),
    )
    return StepConfig.from_dict(data).vision


@pytest.mark.parametrize("mlp_ratio", [None, 8960 / 1536, 5.8333333])
def test_the_released_mlp_is_8960_wide_however_its_ratio_is_written(mlp_ratio):
    assert released(mlp_ratio).mlp_width == 8960


def test_the_released_encoder_asks_for_the_released_tensors_and_makes_169_and_81_features():
    seeded = Seeded("meta", torch.bfloat16)
    encoder = VisionEncoder(released(None), 4096, seeded)
    block = "vision_model.transformer.resblocks.46."
    shapes = {name: tuple(x.shape) for name, x in seeded.tensors.items()}
    assert {name.removeprefix(block): shape for name, shape in shapes.items() if name.startswith(block)} == {
        "attn.in_proj_weight": (4608, 1536),
        "attn.in_proj_bias": (4608,),
        "attn.out_proj.weight": (1536, 1536),
        "attn.out_proj.bias": (1536,),
        "ln_1.weight": (1536,),
        "ln_1.bias": (1536,),
        "ln_2.weight": (1536,),
        "ln_2.bias": (1536,),
        "ls_1.gamma": (1536,),
        "ls_2.gamma": (1536,),
        "mlp.c_fc.weight": (8960, 1536),
        "mlp.c_fc.bias": (8960,),
        "mlp.c_proj.weight": (1536, 8960),
        "mlp.c_proj.bias": (1536,),
    }
    assert {name: shape for name, shape in shapes.items() if ".resblocks." not in name} == {
        "vision_model.conv1.weight": (1536, 3, 14, 14),
        "vision_model.positional_embedding": (2704, 1536),
        "vision_model.ln_pre.weight": (1536,),
        "vision_model.ln_pre.bias": (1536,),
        "vision_model.vit_downsampler1.weight": (3072, 1536, 3, 3),
        "vision_model.vit_downsampler1.bias": (3072,),
        "vision_model.vit_downsampler2.weight": (6144, 3072, 3, 3),
        "vision_model.vit_downsampler2.bias": (6144,),
        "vit_large_projector.weight": (4096, 6144),
    }
    total = sum(x.numel() for x in seeded.tensors.values())
    assert total == 1_955_848_960 + 25_165_824  # the release's own counts: encoder, projector
    assert encoder(torch.empty(1, 3, 728, 728, device="meta")).shape == (1, 169, 4096)
    assert encoder(torch.empty(3, 3, 504, 504, device="meta")).shape == (3, 81, 4096)


def test_features_of_a_view_do_not_depend_on_the_views_beside_it(monkeypatch):
    encoder = VisionEncoder(MINI, 96, Seeded())
    views = torch.randn(5, 3, 112, 112, generator=torch.Generator().manual_seed(2))
    together = encoder(views)
    monkeypatch.setattr(vision, "VIEWS_AT_ONCE", 2)
    assert relative_error(encoder(views), together) < 1e-6
    assert relative_error(encoder(views[3:4]), together[3:4]) < 1e-6


def test_no_views_give_no_features():
    assert VisionEncoder(MINI, 96, Seeded())(torch.empty(0, 3, 112, 112)).shape == (0, 4, 96)


def test_bfloat16_features_stay_within_bfloat16_rounding_of_float32():
    seeded = Seeded(dtype=torch.bfloat16)
    views = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(3))
    low = VisionEncoder(MINI, 96, seeded)(views)
    exact = VisionEncoder(MINI, 96, Weights({n: x.float() for n, x in seeded.tensors.items()}))(views)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, exact) < 8 * 2**-8  # eight roundings' worth over two blocks and four linear maps


def test_features_are_row_major():
    """With blocks that add nothing and averaging weights, a bright top right corner shows in the last of row 0."""
    seeded = Seeded()
    VisionEncoder(MINI, 96, seeded)
    tensors = dict(seeded.tensors)
    for name in tensors:
        if name.endswith("gamma") or "positional" in name:
            tensors[name] = torch.zeros_like(tensors[name])
    views = torch.zeros(2, 3, 168, 168)
    views[1, :, :14, -14:] = 1
    dark, bright = VisionEncoder(MINI, 96, Weights(tensors))(views)
    changed = (bright - dark).abs().sum(-1) > 1e-4
    assert changed.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("shape", [(3, 112, 112), (1, 1, 112, 112), (1, 3, 112, 168), (1, 3, 100, 100), (1, 3, 0, 0)])
def test_other_pixel_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"^pixel_values: got \[.*\], wanted \[views, 3, side, side\], .* of 56$"):
        VisionEncoder(MINI, 96, Seeded())(torch.zeros(shape))


def test_bytes_are_refused():
    with pytest.raises(ValueError, match="^pixel_values: got torch.uint8, wanted"):
        VisionEncoder(MINI, 96, Seeded())(torch.zeros(1, 3, 112, 112, dtype=torch.uint8))
