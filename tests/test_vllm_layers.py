"""The vLLM plugin in vLLM's own layers, on a CPU: choosing, loading, weight preparation, TP and EP ranks, numbers.

Skipped where vLLM is not installed; its sources install without compiling when VLLM_TARGET_DEVICE=empty.
The block is layer 43 of 45, whose routed experts are clamped.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import socket
from types import SimpleNamespace

import pytest
import torch
from test_vllm import EXPERTS, HIDDEN, INNER, TOP_K, tokens, weights

import step_kernels as sk
from step_kernels.integrations import vllm as plugin
from step_kernels.testing import nvfp4_weight, relative_error

pytest.importorskip("vllm")

PREFIX = "model.layers.43.moe"


@pytest.fixture(scope="module")
def vllm_config():
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        destroy_distributed_environment,
        destroy_model_parallel,
        init_distributed_environment,
        initialize_model_parallel,
    )

    config = VllmConfig(device_config=DeviceConfig("cpu"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)
        yield config
    destroy_model_parallel()
    destroy_distributed_environment()


def step(config, experts=EXPERTS, hidden=HIDDEN, inner=INNER, model_type="step3p7", ignore=(), dtype=torch.float32):
    """Fill in what vLLM's FusedMoEBlock reads of the model's config and the checkpoint's."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    plugin.register()
    plugin.register()  # every process of an engine calls it, some more than once
    text = SimpleNamespace(
        model_type=model_type, hidden_size=hidden, moe_num_experts=experts, moe_top_k=TOP_K,
        moe_intermediate_size=inner, share_expert_dim=inner, use_moe_router_bias=True, moe_router_scaling_factor=3.0,
        need_fp32_gate=True, swiglu_limits=[0] * 43 + [7.0, 7.0], swiglu_limits_shared=[0] * 43 + [16.0, 16.0],
        norm_expert_weight=True, moe_router_activation="sigmoid", num_hidden_layers=45, num_nextn_predict_layers=3,
        hidden_act="silu", num_attention_heads=64, num_attention_groups=8, head_dim=128,
        attention_other_setting={"num_attention_heads": 96, "num_attention_groups": 8, "head_dim": 128},
        layer_types=["full_attention"] * 48,
    )  # fmt: skip
    config.model_config = SimpleNamespace(
        hf_config=text, hf_text_config=text, dtype=dtype, is_moe=True, enforce_eager=True
    )
    config.compilation_config.static_forward_context.clear()
    found = {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "ignore": list(ignore)}
    found["config_groups"] = {"group_0": {"input_activations": {"num_bits": 4}}}
    config.quant_config = get_quantization_config("modelopt_fp4").from_config(found)
    return text


def build(config, **changes):
    """A model of one block, with the loader of vLLM's Step3p5Model."""
    from vllm.model_executor.models.step3p5 import FusedMoEBlock, Step3p5Model

    model = torch.nn.Module()
    model.config = step(config, **changes)
    model.moe_num_experts = model.config.moe_num_experts
    model.layers = torch.nn.ModuleDict({"43": torch.nn.Module()})
    model.layers["43"].moe = FusedMoEBlock(config, prefix=PREFIX)
    model.load_weights = Step3p5Model.load_weights.__get__(model)
    return model


def checkpoint(experts=EXPERTS, hidden=HIDDEN, inner=INNER, device="cpu") -> dict[str, torch.Tensor]:
    """The layer's stacked tensors as released, and a share expert in NVFP4 too."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{PREFIX}.gate.weight": torch.randn(experts, hidden, generator=generator),
        f"{PREFIX}.router_bias": torch.randn(experts, generator=generator),
    }
    whole = weights(experts, hidden, inner) if device == "cpu" else None
    for stem, count in (("", experts), ("share_expert.", None)):
        for part, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            lead = (count,) if count else ()
            n, k = (hidden, inner) if name == "down_proj" else (inner, hidden)
            if device == "cpu":
                weight = nvfp4_weight(*lead, n, k, seed=part + 10)
                if count and name == "down_proj":
                    weight = whole.down
                elif count:
                    codes, scales = (t.chunk(2, 1)[part] for t in (whole.gate_up.codes, whole.gate_up.scales))
                    weight = sk.NVFP4Weight(codes, scales, whole.gate_up.global_scale[:, part])
                elif name == "up_proj":
                    weight = dataclasses.replace(weight, global_scale=weight.global_scale * 5)
            else:
                weight = sk.NVFP4Weight(
                    torch.empty(*lead, n, k // 2, dtype=torch.uint8),
                    torch.empty(*lead, n, k // 16, dtype=torch.float8_e4m3fn),
                    torch.empty(lead),
                )
            at = f"{PREFIX}.{stem}{name}"
            tensors |= {f"{at}.weight": weight.codes, f"{at}.weight_scale": weight.scales}
            tensors |= {f"{at}.weight_scale_2": weight.global_scale, f"{at}.input_scale": torch.ones(lead)}
    return {name: t.to(device) for name, t in tensors.items()}


def test_vllm_chooses_our_class_for_modelopt_nvfp4(vllm_config):
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config
    from vllm.model_executor.layers.quantization.modelopt import ModelOptNvFp4Config

    plugin.register()
    first = get_quantization_config("modelopt_fp4")
    plugin.register()
    assert get_quantization_config("modelopt_fp4") is first is plugin.config_classes()["modelopt_fp4"]
    assert issubclass(first, ModelOptNvFp4Config) and QUANTIZATION_METHODS.count("modelopt_fp4") == 1
    asked = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    assert first.override_quantization_method(asked, None) == "modelopt_fp4"


def test_the_plugin_loads_by_its_entry_point_and_vllms_filter_leaves_it_out(vllm_config, monkeypatch):
    import vllm.plugins
    from vllm.model_executor.layers import quantization

    registered = quantization._CUSTOMIZED_METHOD_TO_QUANT_CONFIG
    group = "vllm.general_plugins"
    entry = importlib.metadata.EntryPoint("step_kernels", "step_kernels.integrations.vllm:register", group)
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [entry])
    for chosen, loaded in (("another", False), ("step_kernels", True)):
        registered.pop("modelopt_fp4", None)
        monkeypatch.setenv("VLLM_PLUGINS", chosen)
        monkeypatch.setattr(vllm.plugins, "plugins_loaded", False)
        vllm.plugins.load_general_plugins()
        assert ("modelopt_fp4" in registered) == loaded


def test_vllms_layer_loads_every_tensor_and_computes_the_reference(vllm_config):
    model, tensors = build(vllm_config), checkpoint()
    moe = model.layers["43"].moe
    assert model.load_weights(iter(tensors.items())) == set(dict(model.named_parameters()))
    routed, share = moe.experts.routed_experts, moe.share_expert
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    for module in (routed, share.gate_up_proj, share.down_proj):
        module.quant_method.process_weights_after_loading(module)
    after = {n: p.data_ptr() for n, p in model.named_parameters()}
    same = [n for n in before if "scale_2" not in n and "input_scale" not in n or "routed" in n]
    assert [after[n] for n in same] == [before[n] for n in same]

    x, w, ids = tokens()
    out = routed.forward_modular(x=x, topk_weights=w, topk_ids=ids)
    assert torch.equal(out, sk.nvfp4_moe(x, w, ids, weights(), 7.0))
    assert relative_error(sk.nvfp4_moe(x, w, ids, weights()), out) > 0.1  # the clamp had something to do

    def dense(name):
        parts = (tensors[f"{PREFIX}.share_expert.{name}.{t}"] for t in ("weight", "weight_scale", "weight_scale_2"))
        return sk.NVFP4Weight(*parts).dequantize()

    gate, up = x @ dense("gate_proj").T, x @ dense("up_proj").T
    assert relative_error(share.gate_up_proj(x)[0], torch.cat((gate, up), -1)) < 1e-6
    compiled = torch.compile(share.down_proj.quant_method.apply, fullgraph=True, backend="aot_eager")
    inner = torch.randn(3, INNER)
    assert torch.equal(compiled(share.down_proj, inner), share.down_proj(inner)[0])
    wanted = torch.nn.functional.silu(gate).clamp(max=16) * up.clamp(-16, 16) @ dense("down_proj").T
    assert relative_error(share(x), wanted) < 1e-6


def test_vllms_layer_in_bf16_computes_the_same_bits_from_weights_laid_out_for_a_gpus_kernels(vllm_config, monkeypatch):
    outputs, (x, w, ids) = [], tokens()
    x, inner = x.bfloat16(), torch.randn(3, INNER).bfloat16()
    for ready in (False, True):
        monkeypatch.setattr(plugin, "prepares", lambda device, ready=ready: ready)
        torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
        try:
            model = build(vllm_config, dtype=torch.bfloat16)
        finally:
            torch.set_default_dtype(torch.float32)
        model.load_weights(iter(checkpoint().items()))
        moe = model.layers["43"].moe
        routed, gate_up, down = moe.experts.routed_experts, moe.share_expert.gate_up_proj, moe.share_expert.down_proj
        for module in (routed, gate_up, down):
            module.quant_method.process_weights_after_loading(module)
        assert {routed.w2_weight.dim() - 1, gate_up.weight.dim(), down.weight.dim()} == {3 if ready else 2}
        compiled = torch.compile(down.quant_method.apply, fullgraph=True, backend="aot_eager")
        outputs.append(
            (
                routed.forward_modular(x=x, topk_weights=w, topk_ids=ids),
                gate_up(x)[0],
                down(inner)[0],
                compiled(down, inner),
            )
        )
    assert all(map(torch.equal, *outputs)) and torch.equal(outputs[0][2], outputs[0][3])
    assert torch.equal(outputs[0][0], sk.nvfp4_moe(x, w, ids, weights(), 7.0))


def test_a_tensor_that_was_not_loaded_is_named(vllm_config):
    model = build(vllm_config)
    model.load_weights((n, t) for n, t in checkpoint().items() if "up_proj.weight_scale" not in n)
    moe = model.layers["43"].moe
    for module, name in ((moe.experts.routed_experts, "w13_weight_scale_2"), (moe.share_expert.gate_up_proj, "weight")):
        with pytest.raises(ValueError, match=rf"{PREFIX}.*{name}.*got NaN"):
            module.quant_method.process_weights_after_loading(module)


def test_the_real_sizes_map_tensor_for_tensor(vllm_config):
    sizes = {"experts": 288, "hidden": 4096, "inner": 1280}
    with torch.device("meta"):
        model = build(vllm_config, **sizes)
        tensors = checkpoint(**sizes, device="meta")
    assert model.load_weights(iter(tensors.items())) == set(dict(model.named_parameters()))
    shapes = {n: list(p.shape) for n, p in model.layers["43"].moe.experts.routed_experts.named_parameters()}
    del shapes["e_score_correction_bias"]  # the router bias, which the block holds too
    assert shapes == {
        "w13_weight": [288, 2560, 2048], "w13_weight_scale": [288, 2560, 256], "w13_weight_scale_2": [288, 2],
        "w2_weight": [288, 4096, 640], "w2_weight_scale": [288, 4096, 80], "w2_weight_scale_2": [288],
        "w13_input_scale": [288, 2], "w2_input_scale": [288],
    }  # fmt: skip


@pytest.mark.parametrize(("tp", "ep"), [(2, 1), (1, 2)])
def test_vllms_ranks_hold_slices_that_add_up(vllm_config, tp, ep):
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    model, tensors = build(vllm_config), checkpoint()
    whole = model.layers["43"].moe.experts.routed_experts
    x, w, ids = tokens()
    total = torch.zeros_like(x)
    for rank in range(tp * ep):
        moe = copy.deepcopy(whole.moe_config)
        parallel = {"tp_size": tp, "tp_rank": rank} if tp > 1 else {"ep_size": ep, "ep_rank": rank, "use_ep": True}
        moe.moe_parallel_config = dataclasses.replace(moe.moe_parallel_config, **parallel)
        moe.intermediate_size_per_partition, moe.num_local_experts = INNER // tp, EXPERTS // ep
        manager = ExpertMapManager(
            max_num_batched_tokens=8,
            top_k=TOP_K,
            global_num_experts=EXPERTS,
            num_redundant_experts=0,
            num_expert_group=None,
            moe_parallel_config=moe.moe_parallel_config,
            placement_strategy="round_robin",
            enable_eplb=False,
        )
        mine = RoutedExperts(
            f"{PREFIX}.experts.routed_experts.{rank}", torch.float32, moe, vllm_config.quant_config, manager
        )
        model.layers["43"].moe.experts.routed_experts = mine
        model.load_weights(iter(tensors.items()))
        mine.quant_method.process_weights_after_loading(mine)
        assert mine.w13_weight.shape == (EXPERTS // ep, 2 * INNER // tp, HIDDEN // 2)
        total += mine.forward_modular(x=x, topk_weights=w, topk_ids=ids)
    assert relative_error(total, sk.nvfp4_moe(x, w, ids, weights(), 7.0)) < 1e-6


def test_other_models_and_excluded_layers_stay_with_vllm(vllm_config):
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    model = build(vllm_config, ignore=[f"{PREFIX}.share_expert*"])
    share = model.layers["43"].moe.share_expert
    assert isinstance(share.down_proj.quant_method, UnquantizedLinearMethod)
    assert plugin.refusal(vllm_config) is None
    step(vllm_config, model_type="qwen3_moe")
    assert "model type qwen3_moe" in plugin.refusal(vllm_config)


def test_global_scales_stay_f32_in_a_model_that_is_built_in_bf16(vllm_config):
    torch.set_default_dtype(torch.bfloat16)  # as vLLM does while it builds a model
    try:
        model = build(vllm_config)
    finally:
        torch.set_default_dtype(torch.float32)
    scales = [p for name, p in model.named_parameters() if name.endswith(("weight_scale_2", "input_scale"))]
    assert len(scales) >= 6 and {p.dtype for p in scales} == {torch.float32}
