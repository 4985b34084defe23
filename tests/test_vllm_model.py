"""Every tensor of the converted release through the loaders of vLLM's whole models, by shape alone on the meta device.

The models are vLLM's; its attention kernels are stood in for, since it has none without compiled code. Skipped where
vLLM is not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from test_quantize_release import real_plan
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("vllm")

from test_vllm_layers import vllm_config  # noqa: E402, F401

from step_kernels.integrations import vllm as plugin  # noqa: E402
from step_kernels.model.checkpoint import DTYPES  # noqa: E402

SLIDING = {"attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128}
# What vLLM reads of the released config.json and the plan's config does not hold.
VLLM_ONLY = {
    "att_impl_type": "GQA",
    "use_head_wise_attn_gate": True,
    "attention_other_setting": SLIDING,
    "max_position_embeddings": 262144,
    "rope_theta": [5e6 if i % 4 == 0 else 1e4 for i in range(48)],
    "partial_rotary_factors": [0.5 if i % 4 == 0 else 1.0 for i in range(48)],
    "yarn_only_types": ["full_attention"],
    "norm_expert_weight": True,
    "moe_router_activation": "sigmoid",
    "use_moe_router_bias": True,
    "need_fp32_gate": True,
    "swiglu_limits": [0.0] * 43 + [7.0] * 2 + [0.0] * 3,
    "swiglu_limits_shared": [0.0] * 43 + [16.0] * 2 + [0.0] * 3,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
VISION_ONLY = {"hidden_act": "quick_gelu", "use_cls_token": False, "use_ln_post": False, "ls_init_value": 0.1}
VISION_ONLY |= {"use_abs_posemb": True, "use_rope2d": True, "use_ln_pre": True, "mlp_ratio": 8960 / 1536}


class Absent(SimpleNamespace):
    """A config of vLLM's in which what was not named is None."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class Attention:
    """In place of an attention backend and its implementation; holds no parameters."""

    def __init__(self, *args, **kwargs):
        self.supports_quant_query_input = False

    get_name = staticmethod(lambda: "TRITON_ATTN")
    get_impl_cls = staticmethod(lambda: Attention)
    supports_alibi_sqrt = staticmethod(lambda: False)


class Copies(TorchDispatchMode):
    """Counts what is copied while each tensor of a checkpoint is the one in hand: name -> elements, and dtype pairs."""

    def __init__(self):
        super().__init__()
        self.elements, self.casts, self.name = {}, {}, None

    def hand_out(self, tensors: dict):
        for self.name, tensor in tensors.items():
            yield self.name, tensor
        self.name = None

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.copy_.default and self.name:
            target, source = args[:2]
            assert target.shape == source.shape, f"{self.name}: {list(source.shape)} into {list(target.shape)}"
            self.elements[self.name] = self.elements.get(self.name, 0) + source.numel()
            if target.dtype != source.dtype:
                self.casts[self.name] = (source.dtype, target.dtype)
        return op(*args, **(kwargs or {}))


@pytest.fixture
def released(vllm_config, monkeypatch, request):  # noqa: F811
    """vLLM's config for the release converted under the names asked for, and the tensors it then has."""
    from vllm.model_executor.layers.attention import attention
    from vllm.model_executor.layers.quantization import get_quantization_config

    plan, _ = real_plan(request.param)
    written = plan.checkpoint.config
    text = Absent(**(written["text_config"] | VLLM_ONLY | {"model_type": "step3p7"}))
    vision = Absent(**(written["vision_config"] | VISION_ONLY))
    vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads = vision.width, vision.layers, vision.heads
    whole = Absent(text_config=text, vision_config=vision, projector_bias=False, model_type="step3p7",
                   understand_projector_stride=2, image_token_id=128001)  # fmt: skip
    images = Absent(mm_encoder_tp_mode="weights", get_limit_per_prompt=lambda kind: 1)
    model = Absent(hf_config=whole, hf_text_config=text, dtype=torch.bfloat16, is_moe=True, enforce_eager=True,
                   multimodal_config=images, get_multimodal_config=lambda: images)  # fmt: skip
    monkeypatch.setattr(attention, "get_attn_backend", lambda *args, **kwargs: Attention)
    plugin.register()
    found = plan.quantization["config.json"]
    monkeypatch.setattr(vllm_config, "model_config", model)
    method = "modelopt_mixed" if found["quant_algo"] == "MIXED_PRECISION" else "modelopt_fp4"
    monkeypatch.setattr(vllm_config, "quant_config", get_quantization_config(method).from_config(found))
    vllm_config.compilation_config.static_forward_context.clear()
    (shard,) = plan.shards.values()
    tensors = {n: torch.empty(shape, dtype=DTYPES[dtype], device="meta") for n, (dtype, shape) in shard.items()}
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # vLLM's loader sets it to the model's
    yield SimpleNamespace(config=vllm_config, text=text, tensors=tensors)
    torch.set_default_dtype(default)


def load(model, tensors, optional: tuple[str, ...]) -> tuple[Copies, set[str], int]:
    """The copies made, the parameters vLLM does not report as loaded, all parameters' elements.

    `optional`: attention scales that are left out.
    """
    with Copies() as copies:
        loaded = model.load_weights(copies.hand_out(tensors))
    endings = tuple(f".self_attn.attn.{name}_scale" for name in optional)
    wanted = {n: p.numel() for n, p in model.named_parameters() if not n.endswith(endings)}
    return copies, set(wanted) - loaded, sum(wanted.values())


def is_mtp(name: str) -> bool:
    return any(f"layers.{i}." in name for i in (45, 46, 47))


@pytest.mark.parametrize("released", ["source", "released"], indirect=True)
def test_vllms_model_copies_every_element_of_the_release_into_every_parameter(released, monkeypatch):
    if importlib.util.find_spec("torchvision") is None:  # vLLM's image processor asks for it, its model does not
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            monkeypatch.setitem(sys.modules, name, MagicMock())
    from vllm.model_executor.model_loader.utils import configure_quant_config
    from vllm.model_executor.models import step3p7
    from vllm.model_executor.models.step3p5 import Step3p5ForCausalLM

    def text_model(vllm_config, hf_config, prefix):  # noqa: F811
        monkeypatch.setattr(vllm_config.model_config, "hf_config", hf_config)
        configure_quant_config(vllm_config.quant_config, Step3p5ForCausalLM)
        return Step3p5ForCausalLM(vllm_config=vllm_config, prefix=prefix)

    monkeypatch.setattr(step3p7, "init_vllm_registered_model", text_model)
    configure_quant_config(released.config.quant_config, step3p7.Step3p7ForConditionalGeneration)
    with torch.device("meta"):
        model = step3p7.Step3p7ForConditionalGeneration(vllm_config=released.config)
    copies, missing, total = load(model, released.tensors, optional=("q", "prob"))  # the release has those of k and v
    assert missing == set()
    assert copies.elements == {n: t.numel() for n, t in released.tensors.items() if not is_mtp(n)}
    assert sum(copies.elements.values()) == total
    gates = {n for n in released.tensors if n.endswith("moe.gate.weight")}
    cache = {n for n in released.tensors if n.endswith(("k_scale", "v_scale"))}  # 1.0; vLLM makes a float of it later
    casts = dict.fromkeys(gates, (torch.bfloat16, torch.float32)) | dict.fromkeys(
        cache, (torch.float32, torch.bfloat16)
    )
    assert (len(gates), len(cache)) == (42, 90) and copies.casts == casts
    ours = [m for m in model.modules() if type(getattr(m, "quant_method", None)).__name__.startswith("ModelOptStep")]
    assert [type(m).__name__ for m in ours] == ["RoutedExperts"] * 42


@pytest.mark.parametrize("released", ["source", "released"], indirect=True)
def test_vllms_mtp_model_copies_every_element_of_its_layers_into_every_parameter(released, monkeypatch):
    from vllm.model_executor.models import step3p5_mtp

    config = released.config
    monkeypatch.setattr(config.model_config, "hf_config", released.text)
    if hasattr(step3p5_mtp, "get_draft_quant_config"):  # 0.33.0 takes the draft's own configs
        monkeypatch.setattr(step3p5_mtp, "get_draft_quant_config", lambda _: released.config.quant_config)
        draft = SimpleNamespace(draft_model_config=config.model_config)
        config = SimpleNamespace(speculative_config=draft, with_hf_config=lambda hf_config: released.config)
    with torch.device("meta"):
        model = step3p5_mtp.Step3p5MTP(vllm_config=config)
    copies, missing, total = load(
        model, released.tensors, optional=("q", "k", "v", "prob")
    )  # of the body's layers only
    assert missing == set()
    wanted = {n: t.numel() for n, t in released.tensors.items() if is_mtp(n) or "embed_tokens" in n}
    assert copies.elements == wanted and copies.casts == {} and sum(wanted.values()) == total
