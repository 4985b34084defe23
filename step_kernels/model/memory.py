"""What a model takes of a device's memory, before anything is loaded: weights, cache, workspace, headroom."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from .cache import CHUNK, PAGE_SIZE, PagedCache
from .config import StepConfig
from .vision import VIEWS_AT_ONCE

# CUDA graphs of the decode batches, cubins, cuBLAS's workspace, and what the allocator rounds up.
HEADROOM = 1_500_000_000
_KINDS = {  # the first part of a name that is found
    "vision_model.": "vision", "vit_large_projector": "vision", ".self_attn.": "attention", ".moe.gate.": "router",
    ".moe.router_bias": "router", ".moe": "routed experts", ".share_expert.": "share experts", ".mlp.": "dense MLP",
    "embed_tokens": "embeddings", "lm_head": "lm_head",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Bytes on the device for `requests` of up to `context` tokens each, their prompts in steps of `chunk` tokens.

    weights: bytes by kind; drafts: MTP layers that have a cache.
    """

    config: StepConfig
    weights: dict[str, int]
    drafts: int = 0
    requests: int = 1
    context: int = CHUNK
    chunk: int = CHUNK
    cache_dtype: torch.dtype = torch.float8_e4m3fn

    def __post_init__(self):
        if self.context > self.config.max_positions:
            raise ValueError(f"context: got {self.context} tokens, wanted at most {self.config.max_positions}")

    @property
    def bytes_a_token(self) -> int:
        """Of cache: keys and values in every layer that keeps them all."""
        full = [layer for layer in self.config.layers[: self.config.num_layers + self.drafts] if layer.window is None]
        return sum(2 * layer.kv_heads * layer.head_dim for layer in full) * self.cache_dtype.itemsize

    @property
    def window_cache(self) -> int:
        """Bytes of the layers that keep a window: some pages a request, and one chunk's."""
        return PagedCache(
            self.config, self.requests, self.context, dtype=self.cache_dtype, device=torch.device("meta"),
            mtp_depths=self.drafts, chunk=self.chunk, tokens=0,
        ).bytes  # fmt: skip

    @property
    def cache(self) -> int:
        """Bytes of all pages, each request's for its whole context."""
        return self.requests * self._whole + self.window_cache

    @property
    def _whole(self) -> int:
        """Bytes of one request's pages in the layers that keep all."""
        return -(-self.context // PAGE_SIZE) * PAGE_SIZE * self.bytes_a_token

    @property
    def workspace(self) -> int:
        """Bytes of activations at the widest point of a prefill step or of the vision encoder, and of a step's logits.

        A token of a chunk has four hidden states and the widest of: q three times (projected, rotated, attended), k and
        v twice; the MLP's inner size three times; for each of top_k experts x, its output and the inner size, and three
        times the share expert's. A view's patch has four times the encoder's inner size and three its width. All in
        2 bytes. Logits are f32, six times while one is drawn.
        """
        c = self.config
        attention = max(3 * x.heads * x.head_dim + 4 * x.kv_heads * x.head_dim for x in c.layers)
        routed = c.top_k * (2 * c.hidden_size + c.moe_intermediate_size) + 3 * c.share_expert_dim
        widest = max(attention, 3 * c.intermediate_size, routed if any(x.moe for x in c.layers) else 0)
        prefill = min(self.chunk, self.requests * self.context) * (4 * c.hidden_size + widest) * 2
        views = 0
        if c.vision:
            patches = VIEWS_AT_ONCE * (c.vision.image_size // c.vision.patch_size) ** 2
            views = patches * (4 * c.vision.mlp_width + 3 * c.vision.width) * 2
        return max(prefill, views) + self.requests * (1 + self.drafts) * c.vocab_size * 6 * 4

    @property
    def total(self) -> int:
        return sum(self.weights.values()) + self.cache + self.workspace + HEADROOM

    def fits(self, free: int) -> bool:
        """Whether `free` bytes are enough."""
        return self.total <= free

    def cache_tokens(self, free: int) -> int:
        """Tokens of all requests together that the layers without a window can keep in `free` bytes."""
        left = free - (self.total - self.cache) - self.window_cache
        page = self.bytes_a_token * PAGE_SIZE
        if page == 0:
            return self.requests * self.config.max_positions if left >= 0 else 0
        return max(left // page, 0) * PAGE_SIZE

    def largest_context(self, free: int) -> int:
        """The longest that as many requests may be in `free` bytes; 0: none."""
        return self._most(self.config.max_positions, lambda n: dataclasses.replace(self, context=n).fits(free))

    def largest_batch(self, free: int) -> int:
        """The most requests of this context that fit in `free` bytes, up to 4096."""
        most = min(4096, free // max(self._whole, 1))
        return self._most(most, lambda n: dataclasses.replace(self, requests=n).fits(free))

    def check(self, free: int, device: str) -> None:
        """ValueError in one line, with the largest request that would fit, if this one does not."""
        if self.fits(free):
            return
        context, batch = self.largest_context(free), self.largest_batch(free)
        choices = [f"{_requests(self.requests)} of {context} tokens"] if context else []
        choices += [f"{_requests(batch)} of {self.context}"] if batch else []
        fixed = f"nothing would fit: weights {_gb(sum(self.weights.values()))}, workspace and headroom "
        fixed += _gb(self.workspace + HEADROOM)
        raise ValueError(
            f"memory: {_requests(self.requests)} of {self.context} tokens would take {_gb(self.total)}, {device} has "
            f"{_gb(free)} free; {'at most ' + ' or '.join(choices) + ' would fit' if choices else fixed}"
        )

    def table(self, free: int | None = None, device: str = "the device") -> str:
        """The plan in GB (10^9 bytes; small models in MB), one line a kind; with `free`, what that has room for."""
        c, layers = self.config, self.config.layers[: self.config.num_layers + self.drafts]
        rows = [("weights", kind, size) for kind, size in sorted(self.weights.items(), key=lambda item: -item[1])]
        full, sliding = (sum((x.window is None) == kept for x in layers) for kept in (True, False))
        many = f"{self.requests} x {self.context:,} tokens"
        rows += [("cache", f"{full} full layers, {many}, {self.bytes_a_token:,} B each", self.requests * self._whole)]
        if sliding:
            rows += [("", f"{sliding} sliding layers", self.window_cache)]
        views = f", {VIEWS_AT_ONCE} views" if c.vision else ""
        rows += [("workspace", f"steps of {self.chunk:,} tokens{views}", self.workspace)]
        rows += [("headroom", "CUDA graphs, libraries", HEADROOM), ("total", "", self.total)]
        if free is not None:
            rows += [("free", f"on {device}", free)]
        seen, lines, (unit, name) = set(), [], (1e9, "GB") if self.total >= 10**10 else (1e6, "MB")
        for part, what, size in rows:
            lines.append(f"{'' if part in seen else part:<10} {what:<54} {size / unit:>8.2f} {name}")
            seen.add(part)
        if free is not None:
            longest = f"one request up to {dataclasses.replace(self, requests=1).largest_context(free):,}"
            lines.append(f"{'room for':<10} {self.cache_tokens(free):,} tokens of cache; {longest}")
        return "\n".join(lines)

    @staticmethod
    def _most(limit: int, fits) -> int:
        low, high = 0, limit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low


class Tapped:
    """Parameters on their way to the modules: each value passes through `tap(name, value)`, which may replace it."""

    def __init__(self, weights, tap):
        self.weights, self.tap, self.device, self.dtype = weights, tap, weights.device, weights.dtype

    def tensor(self, name: str, shape: tuple[int, ...], keep: bool = False):
        return self.tap(name, self.weights.tensor(name, shape, keep))

    def scalar(self, name: str, default: float):
        return self.tap(name, self.weights.scalar(name, default))

    def linear(self, module: str, out: int, inner: int):
        return self.tap(f"{module}.weight", self.weights.linear(module, out, inner))

    def experts(self, module: str, count: int, inner: int, hidden: int):
        return self.tap(module, self.weights.experts(module, count, inner, hidden))

    def finish(self) -> None:
        self.weights.finish()


def tally(config: StepConfig, sizes: Counter):
    """A tap that adds each value's bytes to `sizes` under its kind."""

    def tap(name: str, value):
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        drafts = layer is not None and int(layer[1]) >= config.num_layers
        sizes["MTP layers" if drafts else next((k for part, k in _KINDS.items() if part in name), "norms")] += size(
            value
        )
        return value

    return tap


def size(value) -> int:
    """Bytes of a tensor, or of all tensors in a dataclass and those it holds."""
    if isinstance(value, Tensor):
        return value.nbytes
    parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return sum(size(part) for part in parts if isinstance(part, Tensor) or dataclasses.is_dataclass(part))


def usable_device(device: str | torch.device) -> torch.device:
    """The device, or ValueError if it is a GPU that torch does not see."""
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device: got {device}, but torch {torch.__version__} sees {count} GPUs; wanted one or cpu")
    return device


def free_bytes(device: torch.device) -> int | None:
    """Bytes that torch can still use on a GPU, its own unused cache included; None on other devices."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _requests(n: int) -> str:
    return "1 request" if n == 1 else f"{n} requests"


def _gb(n: int) -> str:
    return f"{n / 1e9:.1f} GB"
