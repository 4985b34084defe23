"""Step-3.7: embeddings with image features in their places, decoder layers, heads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import WholeSequences
from .cache import CHUNK
from .config import StepConfig
from .decoder import DecoderLayer, MTPLayer
from .generation import generate
from .layers import RMSNorm, linear
from .loading import Opened
from .memory import Plan, Tapped, free_bytes, tally, usable_device
from .prepared_copy import Copy
from .synthetic import RandomWeights
from .vision import VisionEncoder


class Step3p7:
    """The model on one device. Build it with `from_pretrained` or `random`."""

    def __init__(self, config: StepConfig, weights, mtp_depths: int):
        hidden, vocab = config.hidden_size, config.vocab_size
        self.config, self.device, self.dtype = config, weights.device, weights.dtype
        self.embed_tokens = weights.tensor("model.embed_tokens.weight", (vocab, hidden))
        self.layers = [DecoderLayer(weights, i, config) for i in range(config.num_layers)]
        self.norm = RMSNorm(weights, "model.norm", hidden, config.rms_norm_eps)
        self.lm_head = weights.linear("lm_head", vocab, hidden)
        self.mtp = [MTPLayer(weights, depth, config) for depth in range(mtp_depths)]
        self.vision = VisionEncoder(config.vision, hidden, weights) if config.vision else None
        weights.finish()

    @classmethod
    @torch.inference_mode()
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        device: str | torch.device = "cuda",
        dtype: torch.dtype = torch.bfloat16,
        progress: bool = False,
        *,
        fp8: bool = False,
        requests: int = 1,
        context: int | None = None,
    ) -> Step3p7:
        """A BF16, FP8 or NVFP4 checkpoint folder under any of its name schemes, or a prepared copy of one;
        CheckpointError if it is unusable, ValueError before any weight is read if the GPU lacks room for it and for
        `requests` of `context` tokens (by default a prefill step's).

        A checkpoint without MTP weights (the first NVFP4 upload) loads without draft layers. `progress` shows a
        bar on a terminal. `fp8` makes the linears that are plain FP8Channels.
        """
        device = usable_device(device)
        opened = Opened(cls, path, dtype, fp8)
        _check(opened.plan(requests, context), device)
        with opened.weights(device, progress) as weights:
            return cls(opened.config, weights, opened.depths)

    @classmethod
    @torch.inference_mode()
    def plan(
        cls, path: str | os.PathLike, dtype: torch.dtype = torch.bfloat16, *, fp8: bool = False, requests: int = 1,
        context: int | None = None,
    ) -> Plan:  # fmt: skip
        """What a checkpoint would take of a GPU's memory, from its headers alone; one request of the longest context
        unless told otherwise."""
        opened = Opened(cls, path, dtype, fp8)
        return opened.plan(requests, opened.config.max_positions if context is None else context)

    @classmethod
    @torch.inference_mode()
    def save_prepared(
        cls, path: str | os.PathLike, target: str | os.PathLike, device: str | torch.device = "cuda", *,
        fp8: bool = False, progress: bool = False,
    ) -> None:  # fmt: skip
        """Write a checkpoint with NVFP4 experts to a new folder in the layout of this GPU's kernels. The GPU holds no
        more than one layer's experts at a time."""
        device, opened = usable_device(device), Opened(cls, path, torch.bfloat16, fp8)
        with opened.weights(device, progress) as weights, Copy(path, target, device) as copy:
            cls(opened.config, Tapped(weights, copy.add), opened.depths)

    @classmethod
    @torch.inference_mode()
    def random(
        cls,
        config: StepConfig,
        device: str | torch.device = "cuda",
        nvfp4: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        **options,
    ) -> Step3p7:
        """Synthetic weights made on the device, routed experts in NVFP4 unless told otherwise: for benchmarks.

        `recipe`, `lm_head` and `router` as RandomWeights takes them.
        """
        device, sizes = usable_device(device), Counter()
        weights = RandomWeights(torch.device("meta"), dtype, nvfp4, seed, config=config, **options)
        cls(config, Tapped(weights, tally(config, sizes)), config.num_mtp)
        _check(Plan(config, dict(sizes), config.num_mtp, context=min(CHUNK, config.max_positions)), device)
        return cls(config, RandomWeights(device, dtype, nvfp4, seed, config=config, **options), config.num_mtp)

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        patch_pixel_values: Tensor | None = None,
        num_patches: list[int] | None = None,
    ) -> Tensor:
        """i64 [batch, length] -> f32 [batch, length, vocab], without a cache; shorter prompts are padded behind.

        pixel_values f [images, 3, S, S] and patch_pixel_values f [patches, 3, s, s] as image.prepare makes them,
        num_patches: patches of each image. Their features take the places of the image tokens, in order.
        """
        embeddings = self.embed(input_ids, pixel_values, patch_pixel_values, num_patches)
        return self.logits(self._hidden(input_ids, embeddings))

    @torch.inference_mode()
    def draft_logits(self, input_ids: Tensor) -> list[Tensor]:
        """i64 [batch, length] -> for each MTP depth d f32 [batch, length - 1 - d, vocab], teacher-forced.

        Position i sees tokens up to i + 1 + d and predicts token i + 2 + d.
        """
        embeddings = self.embed(input_ids)
        hidden = self._hidden(input_ids, embeddings)
        logits = []
        for depth, layer in enumerate(self.mtp):
            length = input_ids.shape[1] - 1 - depth
            if length < 1:
                logits.append(hidden.new_zeros(len(input_ids), 0, self.config.vocab_size, dtype=torch.float32))
                continue
            context = WholeSequences(len(input_ids), length, self.device)
            hidden = layer(embeddings[:, 1 + depth :].flatten(0, 1), hidden[:, :length].flatten(0, 1), context)
            hidden = hidden.unflatten(0, (-1, length))
            logits.append(layer.logits(hidden))
        return logits

    def generate(self, prompt_ids: list[int], **options) -> Iterator[int]:
        """The new tokens for one prompt, as they come, the stop token included; options as generation.generate."""
        return (token for _, token in generate(self, [prompt_ids], **options))

    def embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        patch_pixel_values: Tensor | None = None,
        num_patches: list[int] | None = None,
    ) -> Tensor:
        """i64 [...] -> [..., hidden], image features in the places of the image tokens."""
        ids = input_ids.to(self.device)
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"input_ids: got {ids.dtype}, wanted int64")
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocab_size:
            bad = int(ids[(ids < 0) | (ids >= self.config.vocab_size)].flatten()[0])
            raise ValueError(f"input_ids: got token id {bad}, wanted 0 to {self.config.vocab_size - 1}")
        embeddings = self.embed_tokens[ids.long()]
        if pixel_values is None:
            if patch_pixel_values is not None:
                raise ValueError("patch_pixel_values: got patches without pixel_values, wanted both")
            return embeddings
        features = self.image_features(pixel_values, patch_pixel_values, num_patches)
        places = ids == self.config.image_token_id
        if int(places.sum()) != len(features):
            raise ValueError(
                f"input_ids: got {int(places.sum())} image tokens, wanted {len(features)}, one a feature of the images"
            )
        embeddings[places] = features
        return embeddings

    def image_features(
        self, pixel_values: Tensor, patch_pixel_values: Tensor | None, num_patches: list[int] | None
    ) -> Tensor:
        """[tokens, hidden]: for each image its patches' features, then the whole view's."""
        if self.vision is None:
            raise ValueError("pixel_values: got images, but this checkpoint has no vision encoder")
        counts = [0] * len(pixel_values) if num_patches is None else [int(n) for n in num_patches]
        given = 0 if patch_pixel_values is None else len(patch_pixel_values)
        if len(counts) != len(pixel_values) or sum(counts) != given or min(counts, default=0) < 0:
            raise ValueError(f"num_patches: got {counts} for {len(pixel_values)} images and {given} patches")
        whole = self.vision(pixel_values)
        parts = self.vision(patch_pixel_values).split(counts) if given else counts
        rows = [t.flatten(0, 1) for i, n in enumerate(counts) for t in ((parts[i],) if n else ()) + (whole[i : i + 1],)]
        return torch.cat(rows) if rows else whole.flatten(0, 1)

    def trunk(self, x: Tensor, context) -> Tensor:
        """Embeddings [tokens, hidden] -> hidden states before the final norm, [tokens, hidden]."""
        addends = ()
        for layer in self.layers:
            x, addends = layer(x, addends, context)
        return sum(addends, x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states before the final norm [..., hidden] -> f32 [..., vocab]."""
        return linear(self.norm(hidden), self.lm_head, torch.float32)

    def _hidden(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, wanted [batch, length]")
        batch, length = input_ids.shape
        hidden = self.trunk(embeddings.flatten(0, 1), WholeSequences(batch, length, self.device))
        return hidden.unflatten(0, (batch, length))


def _check(plan: Plan, device: torch.device) -> None:
    free = free_bytes(device)
    if free is not None:
        plan.check(free, str(device))
