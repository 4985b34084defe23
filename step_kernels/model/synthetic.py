"""Parameters from a seed, made on the device at their full size within a minute: for benchmarks."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from ..nvfp4 import BLOCK, NVFP4Experts, NVFP4Weight
from ..prepared import PreparedWeight
from .config import StepConfig
from .formats import DenseExperts, FP8Channels, fp8_channels, gathered, kernel_layout

RECIPES = ("experts", "linears", "fp8")
ROUTERS = ("balanced", "zipf")
_EXPERTS_AT_ONCE = 16  # of Step-3.7's 288: 142 MB before they are prepared, and after
_MOST = 0.95  # the largest share of the tokens that an expert serves under `zipf`


class RandomWeights:
    """Gaussian weights of a model, its routed experts in NVFP4 unless `nvfp4` is False.

    `recipe`, for the rest: `experts` leaves it plain, `linears` makes the trunk's linears NVFP4 but for g_proj, as the
    converter does, lm_head with `lm_head`; `fp8` makes all linears FP8Channels. `router`: `balanced` or `zipf`, see
    zipf_bias. `config` tells trunk from MTP layers, and how many experts a token takes.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        nvfp4: bool = True,
        seed: int = 0,
        *,
        config: StepConfig | None = None,
        recipe: str = "experts",
        lm_head: bool = False,
        router: str = "balanced",
    ):
        for name, got, wanted in (("recipe", recipe, RECIPES), ("router", router, ROUTERS)):
            if got not in wanted:
                raise ValueError(f"{name}: got {got!r}, wanted one of {', '.join(wanted)}")
        if lm_head and recipe != "linears":
            raise ValueError(f"lm_head: got it with recipe {recipe}, wanted recipe linears")
        self.device, self.dtype, self.nvfp4, self.config = device, dtype, nvfp4, config
        self.recipe, self.lm_head, self.router = recipe, lm_head, router
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False) -> Tensor:
        """Gaussian, of the size that keeps activations near 1: fan-in scaling for matrices, 0.1 for vectors."""
        if name.endswith(".router_bias"):
            return self._router_bias(shape[0])
        fan_in = 100 if len(shape) == 1 else shape[-1] if len(shape) == 3 else torch.Size(shape[1:]).numel()
        x = torch.empty(shape, dtype=torch.float32 if keep else self.dtype, device=self.device)
        x.normal_(0, 1.0 if "embed" in name else fan_in**-0.5, generator=self.generator)
        if name.endswith(".moe.gate.weight"):
            x = x.bfloat16().to(x.dtype)  # as the release stores it
        return x.add_(1) if ".ln_" in name and name.endswith("weight") else x  # a LayerNorm's is no delta

    def scalar(self, name: str, default: float) -> Tensor:
        return torch.tensor(default, device=self.device)

    def linear(self, module: str, out: int, inner: int) -> Tensor | NVFP4Weight | PreparedWeight | FP8Channels:
        if self._is_nvfp4(module):
            return kernel_layout(self._codes((), out, inner), self.device, self.dtype)
        weight = self.tensor(f"{module}.weight", (out, inner))
        return fp8_channels(weight) if self.recipe == "fp8" else weight

    def experts(self, module: str, count: int, inner: int, hidden: int):
        if not self.nvfp4:
            gate_up = self.tensor(f"{module}.gate_up_proj.weight", (count, 2 * inner, hidden))
            return DenseExperts(gate_up, self.tensor(f"{module}.down_proj.weight", (count, hidden, inner)))

        def part(begin: int, end: int) -> NVFP4Experts:
            gate_up, down = (
                self._codes((end - begin,), 2 * inner, hidden, (2,)),
                self._codes((end - begin,), hidden, inner),
            )
            return kernel_layout(NVFP4Experts(gate_up, down), self.device, self.dtype)

        return gathered(count, _EXPERTS_AT_ONCE, part)

    def finish(self) -> None:
        pass

    def _is_nvfp4(self, module: str) -> bool:
        if self.recipe != "linears" or module.endswith(".g_proj"):
            return False
        layer = re.match(r"model\.layers\.(\d+)\.", module)
        if layer is None:
            return module == "lm_head" and self.lm_head
        return self.config is None or int(layer[1]) < self.config.num_layers

    def _codes(self, lead: tuple[int, ...], n: int, k: int, parts: tuple[int, ...] = ()) -> NVFP4Weight:
        codes = torch.empty((*lead, n, k // 2), dtype=torch.uint8, device=self.device)
        codes.view(torch.int64).random_(-(2**63), None, generator=self.generator)
        scales = torch.empty((*lead, n, k // BLOCK), dtype=torch.uint8, device=self.device)
        scales.random_(0x38, 0x40, generator=self.generator)  # e4m3 1.0 to 1.875
        # uniform codes have an rms of 2.93, these scales one of 1.46
        outer = torch.full((*lead, *parts), k**-0.5 / (2.93 * 1.46), device=self.device)
        return NVFP4Weight(codes, scales.view(torch.float8_e4m3fn), outer)

    def _router_bias(self, experts: int) -> Tensor:
        if self.router == "balanced":
            return torch.zeros(experts, device=self.device)
        bias = zipf_bias(experts, self.config.top_k if self.config else 8).to(self.device)
        return bias if bias.is_meta else bias[torch.randperm(experts, generator=self.generator, device=self.device)]


def zipf_bias(experts: int, top_k: int) -> Tensor:
    """f32 [experts]: router biases that give the r-th expert a share min(0.95, c / r) of the tokens, top_k in all.

    For logits that are independent standard normals, as random inputs make them: expert e is among the chosen where
    sigmoid(logit) + bias passes a threshold that hardly moves, so -sigmoid(the logit's quantile at 1 - share) will do.
    """
    rank = torch.arange(1, experts + 1, dtype=torch.float64)
    low, high = 0.0, float(experts * top_k)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle / rank).clamp(max=_MOST).sum() < top_k else (low, middle)
    share = (high / rank).clamp(max=_MOST)
    return -torch.special.ndtri(1 - share).sigmoid().float()
