"""NVFP4 Step-3.7 checkpoints in transformers: import this module, then `from_pretrained` as for any model.

It registers `modelopt`, the quantization method that such checkpoints name. What they store as NVFP4 or FP8 stays so
in memory and runs on nvfp4_moe, nvfp4_linear and fp8_linear; routers compute in f32, as the model's config asks for.
"""

from __future__ import annotations

import math
import re
from fnmatch import translate
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..nvfp4 import BLOCK, NVFP4Experts, NVFP4Weight
from ..ops import fp8_linear, nvfp4_linear, nvfp4_moe, nvfp4_prepare, nvfp4_restore, prepares
from ..ops.nvfp4_linear import is_prepared
from ..prepared import PreparedWeight

try:
    from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming
    from transformers.models.step3p7 import modeling_step3p7 as step3p7
    from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
    from transformers.utils import logging
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as e:
    raise ImportError(f"step_kernels.integrations.transformers: wanted transformers >= 5.17, got: {e}") from e

# Scales that other engines read, for activations and for a quantized KV cache.
_UNUSED = (r"\.input_scale$", r"\.[kv]_proj\.[kv]_scale$")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_FP8 = "FP8_PER_CHANNEL_PER_TOKEN"  # beside NVFP4, in a checkpoint of several precisions
_SCALES = ("weight_scale", "weight_scale_2")  # beside a weight; `weight_scale` of `down_proj` is `down_proj_scale` here


class _NVFP4Module(nn.Module):
    """Holds NVFP4 weights as buffers: as parameters, transformers would have the float8 scales ask for gradients.

    On a GPU with a prepared layout they lie in it once the model is loaded or moved there; state dicts never do.
    """

    compute_dtype: torch.dtype | None = None  # set once the model is loaded

    def __init__(self):
        super().__init__()
        self._parts: dict[str, tuple[str, torch.Size]] = {}  # name of the codes: name of the scales, weight's shape

    def _add(self, name: str, shape: tuple[int, ...], outer: tuple[int, ...], scale: str) -> None:
        *lead, n, k = shape
        self._parts[name] = scale, torch.Size(shape)
        self.register_buffer(name, torch.empty(*lead, n, k // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer(scale, torch.empty(*lead, n, k // BLOCK, dtype=torch.float8_e4m3fn, device="meta"))
        self.register_buffer(f"{scale}_2", torch.empty(outer, dtype=torch.float32, device="meta"))

    def _held(self) -> NVFP4Weight | PreparedWeight | NVFP4Experts:
        """Of one part a weight, of two the experts."""
        weights = []
        for name, (scale, shape) in self._parts.items():
            tensors = [getattr(self, part) for part in (name, scale, f"{scale}_2")]
            ready = is_prepared(tensors[1])
            weights.append(PreparedWeight(*tensors, shape, name == "gate_up_proj") if ready else NVFP4Weight(*tensors))
        return NVFP4Experts(*weights) if len(weights) > 1 else weights[0]

    def _named(self, weight: NVFP4Weight | PreparedWeight | NVFP4Experts):
        """The codes and scales under their names here; the layout does not change global scales."""
        parts = (weight.gate_up, weight.down) if isinstance(weight, NVFP4Experts) else (weight,)
        for part, (name, (scale, _)) in zip(parts, self._parts.items()):
            yield from ((name, part.codes), (scale, part.scales))

    def _hold(self, weight: NVFP4Weight | PreparedWeight | NVFP4Experts) -> None:
        for name, tensor in self._named(weight):
            setattr(self, name, tensor)

    def _is_prepared(self) -> bool:
        return any(is_prepared(getattr(self, scale)) for scale, _ in self._parts.values())

    def lay_out(self) -> None:
        """Hold the weights as the kernels on their device read them; needs room for both layouts of this module's."""
        device = next(self.buffers()).device
        wanted = self.compute_dtype == torch.bfloat16 and prepares(device)
        if device.type != "meta" and wanted != self._is_prepared():
            self._hold(nvfp4_prepare(self._held()) if wanted else nvfp4_restore(self._held()))

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # .cuda(), .to(device)
        self.lay_out()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._is_prepared():
            for name, tensor in self._named(nvfp4_restore(self._held())):
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args):
        if self._is_prepared():
            self._hold(nvfp4_restore(self._held()))
        super()._load_from_state_dict(*args)
        self.lay_out()


class NVFP4Linear(_NVFP4Module):
    """A Linear without bias, on nvfp4_linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._add("weight", (self.out_features, self.in_features), (), "weight_scale")

    def forward(self, x: Tensor) -> Tensor:
        return nvfp4_linear(x, self._held())


class FP8Linear(nn.Module):
    """A Linear without bias whose weight is e4m3 with an f32 scale a row, on fp8_linear; buffers as of NVFP4."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features, self.in_features = shape = linear.weight.shape
        self.register_buffer("weight", torch.empty(shape, dtype=torch.float8_e4m3fn, device="meta"))
        self.register_buffer("weight_scale", torch.empty(shape[0], dtype=torch.float32, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.weight_scale)


class NVFP4RoutedExperts(_NVFP4Module):
    """Step3p7Experts on nvfp4_moe. The block around it multiplies by the router's scaling factor."""

    def __init__(self, experts: step3p7.Step3p7Experts):
        super().__init__()
        count, inner, hidden = experts.num_experts, experts.intermediate_dim, experts.hidden_dim
        self.limit = None if math.isinf(experts.limit) else float(experts.limit)
        self._add("gate_up_proj", (count, 2 * inner, hidden), (count, 2), "gate_up_proj_scale")
        self._add("down_proj", (count, hidden, inner), (count,), "down_proj_scale")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden], integer and float [tokens, top_k] -> [tokens, hidden]."""
        return nvfp4_moe(hidden_states, top_k_weights.float(), top_k_index.int(), self._held(), self.limit)


@register_quantization_config("modelopt")
class ModelOptConfig(QuantizationConfigMixin):
    """config.json's quantization_config; `ignore` (or `exclude_modules`) names what is not quantized, with
    MIXED_PRECISION `quantized_layers` what is in FP8."""

    def __init__(self, quant_algo: str = "NVFP4", ignore: list[str] | None = None, **others):
        layers = others.get("quantized_layers") if quant_algo == "MIXED_PRECISION" else None
        named = layers.values() if isinstance(layers, dict) else [layers] if layers else []
        if not all(isinstance(how, dict) and isinstance(how.get("quant_algo"), str) for how in named):
            raise ValueError("quantization_config: quantized_layers: got no quant_algo of a module, wanted one of each")
        other = {how["quant_algo"] for how in named} - {_FP8} if layers else {quant_algo}
        if other - {"NVFP4"}:
            raise ValueError(f"quantization_config: got quant_algo {min(other - {'NVFP4'})}, wanted NVFP4")
        self.__dict__.update(others)
        self.quant_method, self.quant_algo = "modelopt", quant_algo
        self.quantized_layers = layers or {}
        self.ignore = list(ignore if ignore is not None else others.get("exclude_modules") or [])


class _StackScales(ConversionOps):
    """gate's and up's scales [experts] -> [experts, 2]."""

    def convert(self, input_dict, source_patterns, target_patterns, **kwargs):
        return {target_patterns[0]: torch.stack([input_dict[p][0] for p in source_patterns if p in input_dict], 1)}


@register_quantizer("modelopt")
class ModelOptQuantizer(HfQuantizer):
    """Puts NVFP4 modules in the model's places before its weights are read."""

    dtype = torch.bfloat16
    is_trainable = False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        ignore, layers = _matcher(self.quantization_config.ignore), self.quantization_config.quantized_layers
        fp8 = {name for name, how in layers.items() if how["quant_algo"] == _FP8}
        for name, module in list(model.named_modules()):
            if isinstance(module, step3p7.Step3p7TopKRouter):
                module.float()  # its input follows; bf16 logits would change which experts are chosen
            elif isinstance(module, step3p7.Step3p7Experts) and not _is_ignored(name, ignore):
                model.set_submodule(name, NVFP4RoutedExperts(module))
            elif type(module) is not nn.Linear or module.bias is not None or _is_ignored(name, ignore):
                continue
            elif _spellings(name) & fp8:
                model.set_submodule(name, FP8Linear(module))
            elif module.in_features % BLOCK == 0:
                model.set_submodule(name, NVFP4Linear(module))
        if checkpoint_files:
            ours = {n: m for n, m in model.named_modules() if isinstance(m, _NVFP4Module | FP8Linear)}
            _check_names(ours, checkpoint_files)
        ignored = model._keys_to_ignore_on_load_unexpected
        model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *_UNUSED}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}

    def _process_model_after_weight_loading(self, model, **kwargs):
        for name, tensor in model.state_dict().items():  # 5.17 checks no shapes in a quantized checkpoint
            if tensor.shape != self.shapes[name]:
                raise ValueError(f"{name}: got shape {list(tensor.shape)}, wanted {list(self.shapes[name])}")
        for name, module in model.named_modules():
            if isinstance(module, _NVFP4Module | FP8Linear):
                for part, scale in module.named_buffers(recurse=False):
                    checked = scale.dtype == torch.float32 and not scale.is_meta
                    if checked and not ((scale > 0) & scale.isfinite()).all():
                        raise ValueError(f"{name}.{part}: holds a zero, negative or NaN scale, wanted positive ones")
            if isinstance(module, _NVFP4Module):
                module.compute_dtype = self.dtype
                try:
                    module.lay_out()
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
            elif isinstance(module, step3p7.Step3p7TopKRouter):
                module.float()
            elif isinstance(module, step3p7.Step3p7VisionRotaryEmbedding):
                _put_columns_first(module)
            else:  # 5.17 leaves renamed tensors of a quantized checkpoint in the stored dtype
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.dtype)
        return model

    def update_weight_conversions(self, weight_conversions, model=None):
        """The model's rules fuse and rename the codes like any weight; the scales' rules must come before them."""
        # transformers knows the projector by its name in BF16 checkpoints alone.
        renamings = [WeightRenaming(r"^model\.vit_large_projector\.", "model.multi_modal_projector.")]
        converters = []
        for scale, join in zip(_SCALES, (Concatenate(dim=1), _StackScales())):
            here = scale.removeprefix("weight")
            renamings.append(WeightRenaming(rf"\.moe\.down_proj\.{scale}$", f".mlp.experts.down_proj{here}"))
            sources = [rf"moe\.{p}_proj\.{scale}$" for p in ("gate", "up")]
            converters.append(WeightConverter(sources, f"mlp.experts.gate_up_proj{here}", [join]))
        return renamings + converters + weight_conversions

    def is_serializable(self, *args, **kwargs) -> bool:
        logging.get_logger(__name__).warning("an NVFP4 model is not saved from memory: copy the checkpoint's folder")
        return False


def _check_names(modules: dict[str, nn.Module], files: list[str]) -> None:
    """Fail if the checkpoint lacks a tensor of a quantized module: transformers would fill it in and only warn."""
    stored = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            stored.update(tensors.keys())
    for module, held in modules.items():
        precision, scales = ("FP8", _SCALES[:1]) if isinstance(held, FP8Linear) else ("NVFP4", _SCALES)
        for projection in _PROJECTIONS if module.endswith(".mlp.experts") else ("",):
            roots = {s.replace(".moe.gate_proj", f".moe.{projection}") for s in _spellings(module)}
            for part in ("weight", *scales):
                if not any(f"{root}.{part}" in stored for root in roots):
                    where, folder = f"{module}: {projection}".rstrip(": "), Path(files[0]).parent
                    raise ValueError(f"{where}: has no {part} in {folder}, wanted {precision} by its config.json")


def _put_columns_first(rotary: step3p7.Step3p7VisionRotaryEmbedding) -> None:
    """Let a patch's column turn the first half of each vision head; transformers 5.17 gives it the row's place."""
    row, column = torch.zeros(1), torch.ones(1)
    if rotary.recomposition_frequencies(torch.stack((row, column))[None])[0, 0] == row:
        rotary.register_forward_pre_hook(lambda _, args: (args[0], args[1].flip(-1)))


def _matcher(patterns: list[str]) -> re.Pattern:
    """Matches what one of the globs names, and all below it."""
    return re.compile("|".join(translate(form) for p in patterns for form in (p, f"{p}.*")))


def _is_ignored(name: str, ignore: re.Pattern) -> bool:
    return any(ignore.fullmatch(spelling) for spelling in _spellings(name))


def _spellings(name: str) -> set[str]:
    """transformers' module name, and the names of its tensors in released and source checkpoints."""
    released = name.replace(".mlp.shared_experts", ".share_expert").replace("multi_modal_", "vit_large_")
    names = {name, released}
    if released.endswith(".mlp.experts"):
        names |= {released.replace(".mlp.experts", f".moe.{part}") for part in ("experts", "gate_proj")}
    # `vi`: vision_model and vit_large_projector
    for prefix, source in (("model.language_model.", "model."), ("model.vi", "vi")):
        names |= {source + n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    return names
