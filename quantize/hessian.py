"""Searches that know what the weights will be multiplied by: block scales by local Hessians, and GPTQ.

A Hessian is the sum of x x^T over calibration tokens: a row's output errs by d^T H d when its weights err by d.
Codes, scales and their meaning are the format's; only the choice among them differs. All functions are batched over
leading dimensions (experts).
"""

from __future__ import annotations

import torch
from torch import Tensor

from step_kernels import nvfp4_gptq
from step_kernels.nvfp4 import BLOCK, e2m1_encode, pack

DAMPING = 0.01  # of the mean of H's diagonal, added to it
SHRINKAGE = 512  # tokens' worth of the layer's mean Hessian in that of an expert
SWEEPS = 2  # 2 dB where few factors make the inputs, nothing where only neighbours are alike; more gain 0.2
STARTS = 4  # 0.2 dB of loss for the miniature's gate and up, 0.1 for down; 16 gain 0.15 more
_COLUMNS = 128  # columns of a product: of eight blocks at once, which take each other's errors from the op


def products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """[tokens, k] float, y alike (x without) -> f32 [k, k]: x^T y."""
    y = x if y is None else y
    if x.is_cuda and x.dtype == torch.bfloat16:  # products of bf16 are exact in f32, on tensor cores too
        return torch.mm(x.mT, y, out_dtype=torch.float32)
    return x.float().mT @ y.float()


def block_hessians(x: Tensor) -> Tensor:
    """[tokens, k] float -> f32 [k / 16, 16, 16]: the 16 x 16 blocks along the diagonal of x^T x."""
    blocks = x.float().unflatten(-1, (-1, BLOCK)).transpose(0, 1)
    return blocks.transpose(1, 2) @ blocks


def shrunk(sums: Tensor, tokens: Tensor, mean: Tensor | float = 0.0) -> Tensor:
    """Sums f32 [experts, ...] over `tokens` f32 [experts], and the mean a token over all experts [...] -> a token's.

    An expert of few tokens leans on the mean, one of none takes it.
    """
    tokens = tokens.view(-1, *[1] * (sums.dim() - 1))
    return (sums + SHRINKAGE * mean) / (tokens + SHRINKAGE)


def fitted(weight: Tensor, pull: Tensor, hessian: Tensor) -> Tensor:
    """[..., n, k], f32 [..., n, k], f32 [..., k, k] -> f32 [..., n, k]: the weight whose outputs are closest to those
    wanted; `pull`: a token's (wanted output - output) x^T."""
    factor = torch.linalg.cholesky(_damped(hessian))
    return weight.float() + torch.cholesky_solve(pull.mT, factor).mT


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
    w, errors, scales = _begun(weight, global_scale)
    blocks, moved = (t.unflatten(-1, (-1, BLOCK)).transpose(-3, -2) for t in (w, errors))
    nvfp4_gptq(blocks, _upper(_damped(hessians)).mT, w.new_zeros(BLOCK).expand_as(blocks), moved, scales.mT[..., None])
    return _packed(w, errors, scales)


def gptq(weight: Tensor, global_scale: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
    """[..., n, k], f32 [...], f32 [..., k, k] -> codes u8 [..., n, k / 2], scales e4m3 [..., n, k / 16].

    Columns are rounded one after the other, and what a column errs by is taken from those behind it (arXiv 2210.17323).
    A block's scale is the one whose 16 columns then leave the least of the loss. SWEEPS times each block is then chosen
    anew, all others as they are. Of STARTS orders of the blocks, and of the columns in each, a row takes its best.
    """
    w, best, scales = _begun(weight, global_scale)
    damped, least = _damped(hessian), w.new_full(w.shape[:-1], torch.inf)
    for order in _orders(w.shape[-1]):
        back, order = order.argsort(), order.to(w.device)
        blocks, back = (back[::BLOCK] // BLOCK).to(w.device), back.to(w.device)
        some, loss = w[..., order], damped[..., order, :][..., order]
        errors, codes = torch.zeros_like(some), torch.zeros_like(scales)
        _choose(some, errors, codes, _factor(loss), first=True)
        rows = _whitened(loss)
        for _ in range(SWEEPS):
            _choose(some, errors, codes, rows)
        del rows
        left = ((errors @ loss) * errors).sum(-1)
        better = (left < least)[..., None]
        best = torch.where(better, errors[..., back], best)
        scales = torch.where(better, codes[..., blocks], scales)
        least = torch.minimum(left, least)
    return _packed(w, best, scales)


def _orders(k: int) -> list[Tensor]:
    """STARTS orders of k columns whose blocks stay together; the first is as they come."""
    generator, columns = torch.Generator().manual_seed(0), torch.arange(k).view(-1, BLOCK)
    orders = [columns]
    while len(orders) < STARTS:
        within = torch.stack([torch.randperm(BLOCK, generator=generator) for _ in columns])
        orders.append(columns.gather(1, within)[torch.randperm(len(columns), generator=generator)])
    return [order.flatten() for order in orders]


def _begun(weight: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight in units of the global scale, errors of 0, and no scales: what nvfp4_gptq begins with."""
    w = weight.float() / global_scale.float()[..., None, None]
    return w, torch.zeros_like(w), w.new_zeros(*w.shape[:-1], w.shape[-1] // BLOCK, dtype=torch.uint8)


def _choose(w: Tensor, errors: Tensor, scales: Tensor, rows: Tensor, first: bool = False) -> None:
    """Every block once: `rows` [..., k, k] are nvfp4_gptq's factor, at the `first` time without what lies above it."""
    for begin in range(0, w.shape[-1], _COLUMNS):
        end = min(begin + _COLUMNS, w.shape[-1])
        some, others = slice(begin, end), slice(begin if first else None)
        products = errors[..., others] @ rows[..., some, others].mT
        blocks = scales[..., begin // BLOCK : end // BLOCK]
        nvfp4_gptq(w[..., some], rows[..., some, some], products, errors[..., some], blocks)


def _damped(hessian: Tensor) -> Tensor:
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True)
    damped = hessian.float().clone()
    # an input that is always zero has no say; it must not make the matrix singular
    damped.diagonal(dim1=-2, dim2=-1).add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return damped


def _upper(hessian: Tensor) -> Tensor:
    """[..., k, k] -> U, upper triangular: H = U U^T."""
    return torch.linalg.cholesky(hessian.flip(-2, -1)).flip(-2, -1)


def _inverse(upper: Tensor) -> Tensor:
    return torch.linalg.solve_triangular(upper, torch.eye(upper.shape[-1], device=upper.device), upper=True)


def _factor(hessian: Tensor) -> Tensor:
    """[..., k, k] -> T, lower triangular but for what it leaves above: H = T^T T, so d^T H d is |d T^T|^2.

    T is the transposed inverse of GPTQ's factor of H's inverse. From the last rows on, in products over all matrices:
    a library would factor large ones one by one.
    """
    rows, k = hessian.clone(), hessian.shape[-1]
    for begin in reversed(range(0, k, _COLUMNS)):
        end = min(begin + _COLUMNS, k)
        some, behind = slice(begin, end), rows[..., end:, :end]
        rows[..., some, :end] -= behind[..., some].mT @ behind
        upper = _upper(rows[..., some, some])
        rows[..., some, :begin] = _inverse(upper) @ rows[..., some, :begin]
        rows[..., some, some] = upper.mT
    return rows


def _whitened(hessian: Tensor) -> Tensor:
    """[..., k, k] -> each 16 rows times the inverse of their U: by them |d rows^T|^2 of a block is its part of the loss
    as long as the other blocks stay."""
    rows = hessian.unflatten(-2, (-1, BLOCK))
    own = hessian.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK)).diagonal(dim1=-4, dim2=-2).movedim(-1, -3)
    return (_inverse(_upper(own)) @ rows).flatten(-3, -2)


def _packed(w: Tensor, errors: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in units of the global scale [..., n, k], their errors, codes of scales -> the format's tensors."""
    scales = scales.view(torch.float8_e4m3fn)
    values = errors.add_(w).unflatten(-1, (-1, BLOCK))
    return pack(e2m1_encode(values.div_(scales.float()[..., None]).flatten(-2))), scales
