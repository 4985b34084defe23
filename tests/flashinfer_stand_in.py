"""FlashInfer as its documentation has it, in plain torch; its helpers and signatures come from its sources."""

from __future__ import annotations

import ast
import importlib.util
import types
from pathlib import Path

import torch

from step_kernels import nvfp4
from step_kernels.flashinfer import layout

SPEC = importlib.util.find_spec("flashinfer")
SOURCES = Path(SPEC.origin).parent if SPEC else None


def definition(file: str, function: str) -> ast.FunctionDef:
    tree = ast.parse((SOURCES / file).read_text(encoding="utf-8"))
    return next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == function)


def unswizzled(swizzled: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """By the documented offset of scale (m, k): FlashInfer's get_sf_out_offset_128x4."""
    flat = swizzled.contiguous().view(torch.uint8).flatten()
    m, k = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    tiles = -(-columns // 4)
    offset = (m // 128 * tiles + k // 4) * 512 + m % 32 * 16 + m % 128 // 32 * 4 + k % 4
    return flat[offset].view(torch.float8_e4m3fn)


def helpers(file: str, *wanted: str) -> dict:
    """Functions and tables of a FlashInfer source, without importing the package, which needs more packages."""
    nodes = [
        node
        for node in ast.parse((SOURCES / file).read_text(encoding="utf-8")).body
        if getattr(node, "name", "") in wanted or (isinstance(node, ast.Assign) and node.targets[0].id in wanted)
    ]
    names = {"torch": torch}
    exec(compile(ast.Module(nodes, []), file, "exec"), names)
    return names


def quantized(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """x as NVFP4 without its global scale: what a kernel sees, in f64."""
    outer = 1 / inverse.float().reshape(())
    return nvfp4.dequantize(*nvfp4.quantize(x.float(), outer), outer, torch.float64) / outer.double()


def unscaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return nvfp4.dequantize(codes, scales, torch.tensor(1.0), torch.float64)


class FlashInfer(types.ModuleType):
    """FlashInfer's documented behaviour in plain torch; `calls` are the functions used, with their keywords."""

    ActivationType = types.SimpleNamespace(Swiglu=3, SwigluStep=7)
    SfLayout = types.SimpleNamespace(layout_128x4=0, layout_linear=2)

    def __init__(self):
        super().__init__("flashinfer")
        self.calls = []

    def nvfp4_quantize(self, a, a_global_sf, **keywords):
        self.calls.append(("quantization/fp4_quantization.py", "nvfp4_quantize", 2, keywords))
        assert a_global_sf.shape == (1,) and a_global_sf.dtype == torch.float32
        codes, scales = nvfp4.quantize(a, 1 / a_global_sf[0])
        return codes, scales if keywords.get("sfLayout") == 2 else layout.swizzle_scales(scales)

    def mm_fp4(self, a, b, a_descale, b_descale, alpha, out_dtype, **keywords):
        self.calls.append(("gemm/gemm_base.py", "mm_fp4", 6, keywords))
        assert b.stride(0) == 1 and b_descale.stride(0) == 1 and alpha.numel() == 1 and alpha.dtype == torch.float32
        (m, half), n = a.shape, b.shape[1]
        x = unscaled(a, unswizzled(a_descale, m, half // 8))
        return (x @ unscaled(b.mT, unswizzled(b_descale.mT, n, half // 8)).mT * alpha.double()).to(out_dtype)

    def prepare_bf16_fp4_weights(self, b, b_descale, alpha, *, backend):
        self.calls.append(("gemm/gemm_bf16_fp4.py", "prepare_bf16_fp4_weights", 3, {"backend": backend}))
        assert alpha.shape == (1,) and b.is_contiguous()
        return b, b_descale, alpha

    def mm_bf16_fp4(self, a, b, b_descale, alpha, *, backend):
        self.calls.append(("gemm/gemm_bf16_fp4.py", "mm_bf16_fp4", 4, {"backend": backend}))
        w = unscaled(b, unswizzled(b_descale, b.shape[0], b.shape[1] // 8))
        return (a.double() @ w.mT * alpha.double()).to(a.dtype)

    def cutlass_fused_moe(self, x, ids, weights, fc1, fc2, out_dtype, quant_scales, **keywords):
        self.calls.append(("fused_moe/core.py", "cutlass_fused_moe", 7, keywords))
        first, fc1_scales, fc1_alpha, second, fc2_scales, fc2_alpha = quant_scales
        assert fc1.dtype == fc2.dtype == torch.int64 and fc1_scales.dtype == fc2_scales.dtype == torch.int32
        assert fc1_alpha.shape == fc2_alpha.shape == (fc1.shape[0],) and first.dim() == second.dim() == 0
        inner, out = fc2.shape[2] * 16, torch.zeros(x.shape, dtype=torch.float64)
        columns = fc1.shape[2]  # of scales: one i64 holds a block of 16 codes
        for t, s in (ids >= 0).logical_and(ids < fc1.shape[0]).nonzero().tolist():
            e = ids[t, s]
            w1 = unscaled(fc1[e].view(torch.uint8), unswizzled(fc1_scales[e], 2 * inner, columns))
            w2 = unscaled(fc2[e].view(torch.uint8), unswizzled(fc2_scales[e], x.shape[1], inner // 16))
            linear, gate = (w1 @ quantized(x, first)[t] * fc1_alpha[e].double()).chunk(2)
            gate = gate * gate.sigmoid()
            if keywords["activation_type"] == self.ActivationType.SwigluStep:
                limit = keywords["swiglu_limit"][e].double()
                gate, linear = gate.minimum(limit), linear.clamp(-limit, limit)
            out[t] += w2 @ quantized(gate * linear, second) * fc2_alpha[e].double() * weights[t, s].double()
        return out.to(out_dtype)

    def trtllm_fp4_block_scale_routed_moe(self, **keywords):
        self.calls.append(("fused_moe/core.py", "trtllm_fp4_block_scale_routed_moe", 0, keywords))
        a = types.SimpleNamespace(**keywords)
        ids, weights = a.topk_ids
        assert ids.dtype == torch.int32 and ids.min() >= 0 and weights.dtype == torch.float32
        x = unscaled(a.hidden_states, a.hidden_states_scale)
        double, size = a.gemm1_weights.shape[1], a.gemm2_weights.shape[1]
        out = torch.zeros(x.shape, dtype=torch.float64)
        for t, s in torch.ones_like(ids).nonzero().tolist():
            e = ids[t, s]
            w1 = unscaled(a.gemm1_weights[e], unswizzled(a.gemm1_weights_scale[e], double, x.shape[1] // 16))
            w2 = unscaled(a.gemm2_weights[e], unswizzled(a.gemm2_weights_scale[e], size, double // 32))
            h = (w1[unshuffle(double)] @ x[t]).unflatten(0, (-1, 2))  # up and gate in turn
            gate_scale = a.output1_scale_gate_scalar[e].double()
            linear, gate = h[:, 0], h[:, 1] * gate_scale
            gate = gate * gate.sigmoid()
            if a.activation_type == self.ActivationType.SwigluStep:
                limit = a.gemm1_clamp_limit[e].double()
                linear, gate = linear.clamp(-limit, limit), gate.clamp(max=limit * gate_scale)
            h = gate * linear * a.output1_scale_scalar[e].double()  # in the unit of FP4's values
            h = quantized(h, torch.tensor(1.0))
            out[t] += weights[t, s].double() * (w2[unshuffle(size)] @ h) * a.output2_scale_scalar[e].double()
        return [out.bfloat16()]


def unshuffle(rows: int) -> torch.Tensor:
    """The shuffled row at which row i lies, by FlashInfer's table for blocks of 32."""
    i = torch.arange(rows)
    return i // 32 * 32 + i % 4 * 8 + i % 32 // 4


def activations(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()
