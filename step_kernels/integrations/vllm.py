"""vLLM plugin: a Step model's NVFP4 experts and linears on our ops, where vLLM would fall back to Marlin or emulation.

vLLM finds `register` through the entry point group `vllm.general_plugins`, calls it in every process, and skips it
when its own `VLLM_PLUGINS` filter leaves it out. Written against vLLM 0.25.1 and 0.33.0.

What differs from vLLM's own kernels there: gate and up (and q, k, v) keep a global scale each instead of sharing
one; activations are not quantized; and a TP slice need only be a multiple of 16 (1280 / 8 = 160 is). The checkpoint's
bytes are used as loaded, or on Hopper in bf16 laid out anew a layer at a time: no second copy outlives that.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from .. import registry
from ..nvfp4 import NVFP4Experts, NVFP4Weight
from ..ops import nvfp4_linear, nvfp4_moe, nvfp4_prepare, prepares
from ..ops.nvfp4_linear import is_prepared
from ..prepared import PreparedWeight

MODELS = ("step3p5", "step3p5_mtp", "step3p7")
NAMES = ("weight", "weight_scale", "weight_scale_2")
STEP_LIMIT = 7.0  # vLLM's swiglustep holds this number itself and passes no swiglu_limit


def register() -> None:
    """Put our config classes in the place of vLLM's for modelopt NVFP4 checkpoints; any number of calls."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    for method, config in config_classes().items():
        register_quantization_config(method)(config)


def experts(layer) -> NVFP4Experts:
    """vLLM's expert parameters as they lie: w13 holds gate (w1) above up (w3), each with a global scale of its own."""
    tensors = {stem: tuple(getattr(layer, f"{stem}_{name}").data for name in NAMES) for stem in ("w13", "w2")}
    if is_prepared(tensors["w13"][1]):
        shapes = layer.nvfp4_shapes
        return NVFP4Experts(PreparedWeight(*tensors["w13"], shapes[0], True), PreparedWeight(*tensors["w2"], shapes[1]))
    return NVFP4Experts(NVFP4Weight(*tensors["w13"]), NVFP4Weight(*tensors["w2"]))


def prepare_experts(layer, dtype: torch.dtype) -> None:
    """Lay the experts out as the GPU's kernels for `dtype` read them, if that is another layout."""
    if dtype == torch.bfloat16 and prepares(layer.w13_weight.device):
        plain = experts(layer)
        ready = _prepared(layer, plain)
        for stem, weight in (("w13", ready.gate_up), ("w2", ready.down)):
            _replace(layer, f"{stem}_weight", weight.codes)
            _replace(layer, f"{stem}_weight_scale", weight.scales)
        layer.nvfp4_shapes = plain.gate_up.shape, plain.down.shape


def linear_weight(layer) -> NVFP4Weight | PreparedWeight:
    """Our linear layer's weight as it lies."""
    tensors = layer.weight, layer.weight_scale, layer.weight_global_scale
    if is_prepared(layer.weight_scale):
        return PreparedWeight(*tensors, torch.Size((layer.output_size_per_partition, layer.input_size_per_partition)))
    return NVFP4Weight(*tensors)


def prepare_linear(layer, dtype: torch.dtype) -> None:
    """Lay the weight out as the GPU's kernels for `dtype` read it, if that is another layout."""
    if dtype == torch.bfloat16 and prepares(layer.weight.device):
        ready = _prepared(layer, linear_weight(layer))
        _replace(layer, "weight", ready.codes)
        _replace(layer, "weight_scale", ready.scales)


def _prepared(layer, weight):
    try:
        return nvfp4_prepare(weight)
    except ValueError as error:
        raise ValueError(f"{_where(layer)}: {error}") from None


def _replace(layer, name: str, tensor: Tensor) -> None:
    setattr(layer, name, torch.nn.Parameter(tensor, requires_grad=False))


def _where(layer) -> str:
    return getattr(layer, "layer_name", None) or getattr(layer, "prefix", type(layer).__name__)


def limit(layer) -> float | None:
    """The clamp after silu, or None. Raises ValueError for an activation that is not Step's."""
    activation = getattr(layer.activation, "value", layer.activation)
    given = getattr(layer, "swiglu_limit", None)
    if activation == "swiglustep":
        return given or STEP_LIMIT
    if activation == "silu" and not given:  # given, vLLM's silu clamps the gate before silu, which is another function
        return None
    raise ValueError(f"activation: got {activation} with swiglu_limit {given}, wanted swiglustep, or silu without one")


def routed(layer, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """[tokens, hidden], f32 and int [tokens, top_k] of global expert ids -> this rank's share of the routed sum."""
    if layer.expert_map is not None:  # i32 [global experts]: the id on this rank, -1 elsewhere
        ids = layer.expert_map[ids.clamp(min=0).long()].masked_fill(ids < 0, -1)
    return nvfp4_moe(x, weights.float(), ids.int(), experts(layer), limit(layer))


def global_scale(scales: Tensor, widths: list[int]) -> Tensor:
    """f32 [parts] and rows of each part -> f32 [] where all are equal, else one for each equal range of rows."""
    if (scales == scales[0]).all():
        return scales[0].clone()
    step = math.gcd(*widths)
    return scales.repeat_interleave(torch.tensor([w // step for w in widths], device=scales.device))


def check_loaded(layer, *names: str) -> None:
    """Raise ValueError where a scale is NaN, as it was created: the checkpoint does not hold the layer in NVFP4."""
    for name in names:
        if getattr(layer, name).float().isnan().any():
            raise ValueError(f"{_where(layer)}.{name}: got NaN or nothing, wanted scales; if the layer is not "
                             "quantized, it belongs in the checkpoint's ignore list")  # fmt: skip


def refusal(config, layer=None) -> str | None:
    """Why vLLM keeps the model (its VllmConfig), or with `layer` this RoutedExperts layer; None: ours."""
    kind = getattr(getattr(getattr(config, "model_config", None), "hf_config", None), "model_type", None)
    if kind not in MODELS:
        return f"model type {kind} is not one of {', '.join(MODELS)}"
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        capability = registry.compute_capability(device.index)
        if not 80 <= capability < 100:
            return f"sm_{capability}: vLLM's own FP4 kernels or none"
        for op in ("nvfp4_linear", "nvfp4_moe"):
            if registry.reference_only(op, device):
                return f"{op} has only its reference on this machine, see `python -m step_kernels`"
    if layer is None:
        backend = getattr(getattr(config, "kernel_config", None), "linear_backend", "auto")
        return None if backend == "auto" else f"--linear-backend {backend} was asked for"
    moe, parallel = layer.moe_config, layer.moe_config.moe_parallel_config
    if moe.moe_backend != "auto":
        return f"--moe-backend {moe.moe_backend} was asked for"
    if parallel.use_all2all_kernels and parallel.all2all_backend != "allgather_reducescatter":
        return f"all2all backend {parallel.all2all_backend} hands tokens over in a layout of its own"
    if layer.apply_router_weight_on_input:
        return "router weights go onto the input"
    try:
        limit(layer)
    except ValueError as error:
        return str(error)
    return None


@functools.cache
def config_classes() -> dict[str, type]:
    """vLLM's name of a method -> its config that gives Step's layers in NVFP4 our methods: quant_algo NVFP4, and
    MIXED_PRECISION, whose FP8 stays vLLM's. The same classes for a whole process, so that register is re-entrant."""
    from vllm.config import get_current_vllm_config_or_none
    from vllm.logger import init_logger
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.quantization.modelopt import (
        ModelOptMixedPrecisionConfig,
        ModelOptNvFp4Config,
        ModelOptNvFp4FusedMoE,
    )
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.parameter import ModelWeightParameter, PerTensorScaleParameter

    logger = init_logger("vllm.step_kernels")

    # vLLM's expert loader keeps gate's and up's scales apart only for classes with ModelOpt in their name.
    class ModelOptStepKernelsMoE(ModelOptNvFp4FusedMoE):
        supports_pre_processed_weights = False

        def __init__(self, quant_config, moe_config):
            FusedMoEMethodBase.__init__(self, moe_config)  # the parent's would choose one of vLLM's kernels
            self.quant_config = quant_config
            self.use_global_sf = False  # input scales of this rank's experts only; they are not read

        def create_weights(self, layer, *args, **kwargs):
            super().create_weights(layer, *args, **kwargs)
            for scale in (layer.w13_weight_scale_2, layer.w2_weight_scale_2):
                scale.data.fill_(torch.nan)

        def process_weights_after_loading(self, layer):
            check_loaded(layer, "w13_weight_scale_2", "w2_weight_scale_2")
            prepare_experts(layer, self.moe.in_dtype)

        def maybe_make_prepare_finalize(self, routing_tables=None):  # 0.25.1 asks; None: the runner communicates
            return None

        def get_fused_moe_quant_config(self, layer):  # only vLLM's own kernels read one
            return None

        def apply(self, layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input):
            return routed(layer, x, topk_weights, topk_ids)

    @linear.register_weight_loader_v2_supported_method
    class ModelOptStepKernelsLinear(linear.LinearMethodBase):
        def create_weights(
            self,
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra,
        ):
            n, k, loader = sum(output_partition_sizes), input_size_per_partition, extra.get("weight_loader")
            if k % 16:
                raise ValueError(f"input_size_per_partition: got {k}, wanted a multiple of 16")
            self.dtype, layer.logical_widths = params_dtype, output_partition_sizes
            layer.input_size_per_partition, layer.output_size_per_partition = k, n
            codes = torch.empty(n, k // 2, dtype=torch.uint8)
            scales = torch.full((n, k // 16), torch.nan, dtype=torch.float32).to(torch.float8_e4m3fn)
            for name, data in (("weight", codes), ("weight_scale", scales)):
                parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
                layer.register_parameter(name, parameter)
            for name in ("weight_scale_2", "input_scale"):
                # f32 by name: vLLM builds models with bf16 as torch's default, which would round the scales
                data = torch.full((len(output_partition_sizes),), torch.nan, dtype=torch.float32)
                layer.register_parameter(name, PerTensorScaleParameter(data=data, weight_loader=loader))

        def process_weights_after_loading(self, layer):
            check_loaded(layer, "weight_scale", "weight_scale_2")
            scale = global_scale(layer.weight_scale_2.data, layer.logical_widths)
            # torch.compile takes plain parameters only; .data shares the loaded bytes
            for name in ("weight", "weight_scale"):
                _replace(layer, name, getattr(layer, name).data)
            _replace(layer, "weight_global_scale", scale)
            del layer.weight_scale_2, layer.input_scale
            prepare_linear(layer, self.dtype)

        def apply(self, layer, x, bias=None):
            out = nvfp4_linear(x, linear_weight(layer))
            return out if bias is None else out + bias

    class Ours:
        def get_quant_method(self, layer, prefix):
            moe = isinstance(layer, RoutedExperts)
            vision = any(name in prefix for name in ("vision_tower", "vision_model", "vit_large_projector"))
            if isinstance(layer, ParallelLMHead) and not prefix:
                return None  # 0.25.1 names no MTP head, so no pattern can exclude it; none is ever quantized
            quantized = moe or isinstance(layer, linear.LinearBase | ParallelLMHead)
            if not quantized or vision or self.is_layer_excluded(prefix):
                return super().get_quant_method(layer, prefix)
            config = self.nvfp4_of(layer, prefix)
            if config is None:
                return super().get_quant_method(layer, prefix)
            reason = refusal(get_current_vllm_config_or_none(), layer if moe else None)
            if reason:
                logger.info_once("step_kernels leaves NVFP4 %s to vLLM: %s", "experts" if moe else "linears", reason)
                return super().get_quant_method(layer, prefix)
            return ModelOptStepKernelsMoE(config, layer.moe_config) if moe else ModelOptStepKernelsLinear()

    class StepKernelsConfig(Ours, ModelOptNvFp4Config):
        def nvfp4_of(self, layer, prefix):
            return self

    class StepKernelsMixedConfig(Ours, ModelOptMixedPrecisionConfig):
        def nvfp4_of(self, layer, prefix):
            algorithm = self._resolve_quant_algo(prefix)
            if algorithm == "NVFP4":
                return self.nvfp4_config
            theirs = ModelOptMixedPrecisionConfig.get_quant_method(self, layer, prefix)
            if algorithm and isinstance(theirs, linear.UnquantizedLinearMethod):
                raise ValueError(f"{prefix}: is {algorithm} in the checkpoint, which this vLLM builds unquantized and "
                                 "loads as if codes were weights: wanted vLLM 0.33")  # fmt: skip
            return None

    return {"modelopt_fp4": StepKernelsConfig, "modelopt_mixed": StepKernelsMixedConfig}
