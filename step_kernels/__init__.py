"""Fused MoE routing, clamped SwiGLU, NVFP4 GEMMs and FP8-KV paged attention, and a Step-3.7 that runs on them."""

from .nvfp4 import NVFP4Experts, NVFP4Weight
from .ops import (
    add_rms_norm,
    choose,
    decode_inputs,
    fp8_linear,
    fp8_linear_swiglu,
    kv_append,
    linear,
    linear_swiglu,
    moe_router,
    moe_topk,
    nvfp4_dequantize,
    nvfp4_error,
    nvfp4_gptq,
    nvfp4_linear,
    nvfp4_moe,
    nvfp4_prepare,
    nvfp4_quantize,
    nvfp4_restore,
    nvfp4_search,
    paged_attention,
    paged_attention_lse,
    rms_norm,
    swiglu,
)
from .prepared import PreparedWeight
from .registry import explain, force

__version__ = "0.1.0"

__all__ = [
    "NVFP4Experts",
    "NVFP4Weight",
    "PreparedWeight",
    "add_rms_norm",
    "choose",
    "decode_inputs",
    "explain",
    "force",
    "fp8_linear",
    "fp8_linear_swiglu",
    "kv_append",
    "linear",
    "linear_swiglu",
    "moe_router",
    "moe_topk",
    "nvfp4_dequantize",
    "nvfp4_error",
    "nvfp4_gptq",
    "nvfp4_linear",
    "nvfp4_moe",
    "nvfp4_prepare",
    "nvfp4_quantize",
    "nvfp4_restore",
    "nvfp4_search",
    "paged_attention",
    "paged_attention_lse",
    "rms_norm",
    "swiglu",
]
