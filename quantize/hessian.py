"""Searches that know what the weights will be multiplied by: block scales by local Hessians, and GPTQ.

A Hessian is the sum of x x^T over calibration tokens: a row's output errs by d^T H d when its weights err by d.
Codes, scales and their meaning are the format's; only the choice among them differs. All functions are batched over
leading dimensions (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels.nvfp4 import BLOCK, E2M1_MAX, E4M3_MAX, E4M3_MIN, e2m1_encode, e2m1_round, pack

# Offsets from the code of amax / 6 to the best code by local Hessians: with all codes an output gains 0.05 dB at most.
OFFSETS = tuple(range(-4, 8))
DAMPING = 0.01  # of the mean of H's diagonal, added to it
SHRINKAGE = 512  # tokens' worth of the layer's mean Hessian in that of an expert
SWEEPS = 2  # 2 dB where few factors make the inputs, nothing where only neighbours are alike; more gain 0.2
_COLUMNS = 128  # columns whose errors wait before they reach those behind: one product instead of eight


def products(x: Tensor) -> Tensor:
    """[tokens, k] float -> f32 [k, k]: x^T x."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # products of bf16 are exact in f32, on tensor cores too
        return torch.mm(x.mT, x, out_dtype=torch.float32)
    return x.float().mT @ x.float()


def block_hessians(x: Tensor) -> Tensor:
    """[tokens, k] float -> f32 [k / 16, 16, 16]: the 16 x 16 blocks along the diagonal of x^T x."""
    blocks = x.float().unflatten(-1, (-1, BLOCK)).transpose(0, 1)
    return blocks.transpose(1, 2) @ blocks


def shrunk(hessian: Tensor, tokens: Tensor, mean: Tensor) -> Tensor:
    """Sums f32 [experts, ...] over `tokens` f32 [experts], and the mean a token over all experts [...] -> a token's.

    An expert of few tokens leans on the mean, one of none takes it.
    """
    tokens = tokens.view(-1, *[1] * (hessian.dim() - 1))
    return (hessian + SHRINKAGE * mean) / (tokens + SHRINKAGE)


def output_error(weight: Tensor, decoded: Tensor, hessian: Tensor) -> Tensor:
    """[n, k] twice, f32 [k, k] or [k / 16, 16, 16] -> f64 [2]: squared error and size of a token's outputs."""
    sums = []
    for w in (decoded.float() - weight.float(), weight.float()):
        if hessian.dim() == 2:
            sums.append(((w @ hessian) * w).sum(dtype=torch.float64))
        else:
            blocks = w.unflatten(-1, (-1, BLOCK)).transpose(0, 1)
            sums.append(((blocks @ hessian) * blocks).sum(dtype=torch.float64))
    return torch.stack(sums)


def local_gptq(weight: Tensor, global_scale: Tensor, hessians: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, k], f32 [...], f32 [..., k / 16, 16, 16] -> codes u8 [..., n, k / 2], scales e4m3 [..., n, k / 16].

    gptq as if inputs of different blocks were uncorrelated: all blocks at once, and k / 16 times less to remember.
    """
    outer = global_scale.float()[..., None, None]
    blocks = (weight.float() / outer).unflatten(-1, (-1, BLOCK)).transpose(-3, -2)
    code, rounded, _ = _best_block(blocks, _inverse_factor(_damped(hessians)))
    return _packed(rounded.transpose(-3, -2).flatten(-2), code.transpose(-2, -1))


def gptq(weight: Tensor, global_scale: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, k], f32 [...], f32 [..., k, k] -> codes u8 [..., n, k / 2], scales e4m3 [..., n, k / 16].

    Columns are rounded one after the other, and what a column errs by is taken from those behind it (arXiv 2210.17323).
    A block's scale is the one among OFFSETS whose 16 columns then leave the least of the loss. SWEEPS times each block
    is then chosen anew, all others as they are.
    """
    outer = global_scale.float()[..., None, None]
    w, damped = weight.float() / outer, _damped(hessian)
    factor, left = _inverse_factor(damped), w.clone()
    rounded, scales = torch.empty_like(w), []
    for begin in range(0, w.shape[-1], _COLUMNS):
        end = min(begin + _COLUMNS, w.shape[-1])
        errors = torch.empty_like(w[..., begin:end])
        for at in range(begin, end, BLOCK):
            block = slice(at, at + BLOCK)
            code, rounded[..., block], error = _best_block(left[..., block], factor[..., block, block])
            scales.append(code)
            errors[..., at - begin : at - begin + BLOCK] = error
            left[..., at + BLOCK : end] -= error @ factor[..., block, at + BLOCK : end]
        left[..., end:] -= errors @ factor[..., begin:end, end:]
    scales = torch.stack(scales, -1)
    for _ in range(SWEEPS):
        _sweep(w, damped, rounded, scales)
    return _packed(rounded, scales)


def _sweep(w: Tensor, hessian: Tensor, rounded: Tensor, scales: Tensor) -> None:
    """Chooses each block's scale and values anew where that lowers d^T H d, d = rounded - w, in place."""
    d = rounded - w
    for i in range(scales.shape[-1]):
        block = slice(BLOCK * i, BLOCK * (i + 1))
        own = hessian[..., block, block]
        pull = d @ hessian[..., :, block] - d[..., block] @ own  # of the other blocks' errors
        wanted = w[..., block] - (torch.linalg.solve(own, pull.mT)).mT
        code, values, _ = _best_block(wanted, _inverse_factor(own))
        new = values - w[..., block]
        before, after = (((e @ own + 2 * pull) * e).sum(-1) for e in (d[..., block], new))
        better = after < before
        d[..., block] = torch.where(better[..., None], new, d[..., block])
        scales[..., i] = torch.where(better, code, scales[..., i])
    torch.add(w, d, out=rounded)


def _best_block(w: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[..., n, 16] in units of the global scale, its part of the factor -> scale codes, and values and errors alike."""
    first = _first_code(w[..., None, :])[..., 0]
    offsets = torch.tensor(sorted(OFFSETS, key=abs), device=w.device).view(-1, *[1] * first.dim())
    code = (first + offsets).clamp(1, 0x7E)
    scale, left = _value(code), w.expand(len(code), *w.shape).clone()
    errors, loss = torch.empty_like(left), torch.zeros_like(scale)
    for j in range(BLOCK):
        rounded = _rounded(left[..., j], scale)
        errors[..., j] = (left[..., j] - rounded) / upper[..., j, j, None]
        loss += errors[..., j].square()
        left[..., j + 1 :] -= errors[..., j, None] * upper[..., None, j, j + 1 :]
        left[..., j] = rounded
    best = loss.argmin(0, keepdim=True)
    wide = best[..., None].expand(1, *w.shape)
    return code.gather(0, best)[0], left.gather(0, wide)[0], errors.gather(0, wide)[0]


def _damped(hessian: Tensor) -> Tensor:
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    damped = hessian.float().clone()
    # an input that is always zero has no say; it must not make the matrix singular
    damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return damped


def _inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse."""
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)


def _packed(rounded: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Values [..., n, k] in units of the global scale, codes of scales [..., n, k / 16] -> the format's tensors."""
    codes = e2m1_encode((rounded.unflatten(-1, (-1, BLOCK)) / _value(scales)[..., None]).flatten(-2))
    return pack(codes), _e4m3(scales)


def _first_code(blocks: Tensor) -> Tensor:
    """[..., 16] in units of the global scale -> i32 [...]: the e4m3 code of amax / 6, of 1 for a block of zeros."""
    amax = blocks.abs().amax(-1)
    scale = torch.where(amax == 0, 1.0, amax / E2M1_MAX).clamp(E4M3_MIN, E4M3_MAX)
    return scale.to(torch.float8_e4m3fn).view(torch.uint8).int()


def _e4m3(code: Tensor) -> Tensor:
    return code.to(torch.uint8, memory_format=torch.contiguous_format).view(torch.float8_e4m3fn)


def _value(code: Tensor) -> Tensor:
    return _e4m3(code).float()


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return e2m1_round(x / scale) * scale
