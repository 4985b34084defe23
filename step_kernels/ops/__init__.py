"""One file an op: what it computes, what it accepts, and which kernels serve it."""

from .choose import choose
from .decode_inputs import decode_inputs
from .kv_append import kv_append
from .linear import fp8_linear, fp8_linear_swiglu, linear, linear_swiglu
from .moe_router import moe_router
from .moe_topk import moe_topk
from .nvfp4_gptq import nvfp4_gptq
from .nvfp4_linear import nvfp4_linear
from .nvfp4_moe import nvfp4_moe
from .nvfp4_prepare import nvfp4_prepare, nvfp4_restore, prepares
from .nvfp4_quantize import nvfp4_dequantize, nvfp4_quantize
from .nvfp4_search import nvfp4_error, nvfp4_search
from .paged_attention import paged_attention, paged_attention_lse
from .rms_norm import add_rms_norm, rms_norm
from .swiglu import swiglu

__all__ = [
    "add_rms_norm",
    "choose",
    "decode_inputs",
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
    "prepares",
    "rms_norm",
    "swiglu",
]
