"""Searches by Hessians: what they gain on inputs that they have not seen, and that they are what they claim to be."""

import pytest
import torch

from quantize.hessian import BLOCK, DAMPING, _damped, block_hessians, fitted, gptq, local_gptq, output_error, shrunk
from step_kernels import nvfp4

TOKENS, N, K = 2048, 96, 256


def activations(tokens, seed, k=K):
    """Channels of uneven size that lean on their left neighbours."""
    x = torch.randn(tokens, k, generator=torch.Generator().manual_seed(seed))
    x *= torch.exp(0.8 * torch.randn(k, generator=torch.Generator().manual_seed(k)))
    return x + 0.5 * x.roll(1, 1)


def weights(kind, n=N, k=K):
    torch.manual_seed(3)
    w = torch.distributions.StudentT(5.0).sample((n, k)) if kind == "t5" else torch.randn(n, k)
    return w / k**0.5, nvfp4.global_scale((w / k**0.5).abs().amax())


def output_sqnr(x, weight, decoded):
    """Of what the weight gives for these inputs, in dB."""
    wanted = x @ weight.T
    return 10 * torch.log10(wanted.square().sum() / (x @ (decoded - weight).T).square().sum()).item()


def by_search(weight, scale, search):
    codes, scales = nvfp4.quantize(weight, scale, nvfp4.search_scales(weight, scale, search))
    return nvfp4.dequantize(codes, scales, scale)


@pytest.mark.parametrize("kind", ["gauss", "t5"])
def test_on_held_out_inputs_hessians_gain_4_db_over_max(kind):
    (weight, scale), seen, held_out = weights(kind), activations(TOKENS, 1), activations(TOKENS, 2)
    plain = output_sqnr(held_out, weight, by_search(weight, scale, "max"))
    decoded = nvfp4.dequantize(*local_gptq(weight, scale, block_hessians(seen)), scale)
    assert output_sqnr(held_out, weight, decoded) > plain + 4
    decoded = nvfp4.dequantize(*gptq(weight, scale, seen.T @ seen), scale)
    assert output_sqnr(held_out, weight, decoded) > plain + 4


def test_correlation_of_distant_inputs_is_what_only_whole_hessians_use():
    """Inputs of 24 factors, each in all channels, and noise."""
    factors = torch.randn(24, K, generator=torch.Generator().manual_seed(7))
    seen, held_out = (torch.cat((activations(TOKENS, s), activations(TOKENS, s + 2)), 1)[:, : 24 + K] for s in (1, 2))
    seen, held_out = (0.3 * x[:, 24:] + x[:, :24] @ factors for x in (seen, held_out))
    weight, scale = weights("gauss")
    local = nvfp4.dequantize(*local_gptq(weight, scale, block_hessians(seen)), scale)
    whole = nvfp4.dequantize(*gptq(weight, scale, seen.T @ seen), scale)
    assert output_sqnr(held_out, weight, whole) > output_sqnr(held_out, weight, local) + 3


def published(weight, scales, global_scale, whole):
    """The algorithm as the paper has it, one column after the other in f64, with these scales."""
    damped = whole.double() + DAMPING * whole.double().diagonal().mean() * torch.eye(len(whole))
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    left, step = weight.double().clone(), scales.double() * global_scale.double()
    out = torch.empty_like(left)
    for j in range(weight.shape[1]):
        s = step[:, j // BLOCK]
        out[:, j] = nvfp4.e2m1_decode(nvfp4.e2m1_encode(left[:, j] / s)) * s
        left[:, j:] -= ((left[:, j] - out[:, j]) / upper[j, j])[:, None] * upper[j, j:]
    return out


def test_block_hessians_are_the_diagonal_blocks_of_all_products():
    x = activations(100, 1)
    whole = x.T @ x
    for b, block in enumerate(block_hessians(x)):
        part = slice(BLOCK * b, BLOCK * (b + 1))
        assert torch.allclose(block, whole[part, part], rtol=1e-5, atol=1e-3)


def test_a_block_has_the_scale_that_leaves_the_least_of_d_h_d_among_all_codes():
    """Every code's block is rounded by the same rule; within 1 % of what the best of all 126 leaves."""
    (weight, scale), hessians = weights("t5", 16, 64), block_hessians(activations(TOKENS, 1, 64))
    damping = DAMPING * hessians.diagonal(dim1=1, dim2=2).mean(1)
    damped = hessians + damping[:, None, None] * torch.eye(BLOCK)

    def loss(decoded):
        d = (decoded.float() - weight).unflatten(1, (-1, BLOCK))
        return torch.einsum("nbi,bij,nbj->nb", d, damped, d)

    got = loss(nvfp4.dequantize(*local_gptq(weight, scale, hessians), scale))
    every = []
    for code in range(1, 0x7F):
        scales = torch.full((16, 1), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        parts = zip(weight.split(BLOCK, 1), hessians)
        every.append(loss(torch.cat([published(part, scales, scale, block) for part, block in parts], 1)))
    assert got.sum() < 1.01 * torch.stack(every).amin(0).sum()


def test_gptq_rounds_a_column_and_takes_its_error_from_those_behind(monkeypatch):
    monkeypatch.setattr("quantize.hessian.SWEEPS", 0)
    monkeypatch.setattr("quantize.hessian.STARTS", 1)
    (weight, scale), x = weights("gauss", 32, 160), activations(TOKENS, 1, 160)  # 160: more than one group of columns
    codes, scales = gptq(weight, scale, x.T @ x)
    wanted = published(weight, scales, scale, x.T @ x)
    same = nvfp4.dequantize(codes, scales, scale, torch.float64).isclose(wanted, rtol=1e-5)
    assert same.float().mean() > 0.995  # a value at a tie may fall to either side, and moves its row a little


def test_sweeps_lower_what_outputs_err_by(monkeypatch):
    """Inputs of 24 factors and noise: by 1 dB and more."""
    factors = torch.randn(24, K, generator=torch.Generator().manual_seed(7))
    x = 0.3 * activations(TOKENS, 1) + activations(TOKENS, 3, 24) @ factors
    weight, scale = weights("gauss")
    errors = []
    for sweeps in (0, 2):
        monkeypatch.setattr("quantize.hessian.SWEEPS", sweeps)
        errors.append(output_sqnr(x, weight, nvfp4.dequantize(*gptq(weight, scale, x.T @ x), scale)))
    assert errors[1] > errors[0] + 1


def test_no_row_loses_by_more_orders_of_its_columns(monkeypatch):
    """And all together leave 2 % less of d^T H d."""
    (weight, scale), x = weights("gauss", 64, 192), activations(TOKENS, 3, 24)
    x = 0.3 * activations(TOKENS, 1, 192) + x @ torch.randn(24, 192, generator=torch.Generator().manual_seed(7))
    damped, left = _damped(x.T @ x).double(), []
    for starts in (1, 4):
        monkeypatch.setattr("quantize.hessian.STARTS", starts)
        d = nvfp4.dequantize(*gptq(weight, scale, x.T @ x), scale).double() - weight
        left.append(((d @ damped) * d).sum(1))
    assert (left[1] < 1.0001 * left[0]).all() and left[1].sum() < 0.98 * left[0].sum()


def test_fitted_weights_give_what_is_wanted_where_inputs_can():
    (weight, _), x = weights("gauss", 8, 32), activations(TOKENS, 1, 32)
    wanted = x @ weight.T + x @ torch.randn(32, 8, generator=torch.Generator().manual_seed(3))
    got = fitted(weight, (wanted - x @ weight.T).T @ x / TOKENS, x.T @ x / TOKENS)
    assert (x @ got.T - wanted).norm() < 0.1 * (x @ weight.T - wanted).norm()  # what DAMPING leaves


def test_without_correlation_gptq_is_rounding():
    weight, scale = weights("gauss")
    codes, scales = gptq(weight, scale, torch.eye(K))
    decoded = nvfp4.dequantize(codes, scales, scale)
    assert torch.equal(decoded, nvfp4.dequantize(nvfp4.quantize(weight, scale, scales)[0], scales, scale))
    least = (by_search(weight, scale, "mse") - weight).square().sum()
    assert torch.allclose((decoded - weight).square().sum(), least, rtol=1e-3)


def test_experts_in_a_batch_get_what_each_gets_alone():
    weight = torch.stack([weights("gauss")[0], weights("t5")[0], torch.zeros(N, K)])
    scale = nvfp4.global_scale(weight.abs().amax((1, 2)))
    inputs = [activations(TOKENS, seed) for seed in (1, 2, 3)]
    blocks, whole = torch.stack([block_hessians(x) for x in inputs]), torch.stack([x.T @ x for x in inputs])
    for way, hessians in ((local_gptq, blocks), (gptq, whole)):
        codes, scales = way(weight, scale, hessians)
        for i in range(3):
            alone = nvfp4.dequantize(*way(weight[i], scale[i], hessians[i]), scale[i])
            assert (nvfp4.dequantize(codes[i], scales[i], scale[i]) == alone).float().mean() > 0.995
        assert torch.equal(scales[2].float(), torch.ones(N, K // BLOCK)) and not codes[2].any()


def test_inputs_that_are_always_zero_leave_scales_and_codes_finite():
    (weight, scale), x = weights("gauss"), activations(TOKENS, 1)
    x[:, :40] = 0
    blocks = torch.zeros(K // BLOCK, BLOCK, BLOCK)
    for way, sums in (
        (gptq, x.T @ x),
        (gptq, torch.zeros(K, K)),
        (local_gptq, block_hessians(x)),
        (local_gptq, blocks),
    ):
        decoded = nvfp4.dequantize(*way(weight, scale, sums), scale)
        assert output_sqnr(activations(TOKENS, 2), weight, decoded) > 15


def test_an_expert_of_few_tokens_leans_on_the_mean_and_one_of_none_takes_it():
    x = activations(TOKENS, 1)
    mean, few = x.T @ x / TOKENS, x[:8].T @ x[:8]
    hessians = shrunk(torch.stack([few, torch.zeros(K, K), 1e6 * few]), torch.tensor([8.0, 0, 8e6]), mean)
    assert torch.equal(hessians[1], mean)
    assert torch.allclose(hessians[2], few / 8, rtol=1e-2, atol=1e-2 * (few / 8).abs().max())
    (weight, scale), held_out = weights("gauss"), activations(TOKENS, 2)
    alone, leaning = (
        output_sqnr(held_out, weight, nvfp4.dequantize(*gptq(weight, scale, h), scale)) for h in (few, hessians[0])
    )
    assert leaning > alone + 1


def test_output_errors_are_those_of_the_products():
    (weight, scale), x = weights("gauss"), activations(TOKENS, 1)
    decoded = by_search(weight, scale, "max")
    wanted = torch.stack([(x @ (decoded - weight).T).square().sum(), (x @ weight.T).square().sum()]).double()
    assert torch.allclose(output_error(weight, decoded, x.T @ x), wanted, rtol=1e-3)
    apart = sum((x[:, b : b + BLOCK] @ weight[:, b : b + BLOCK].T).square().sum() for b in range(0, K, BLOCK))
    assert torch.allclose(output_error(weight, decoded, block_hessians(x))[1], apart.double(), rtol=1e-3)
