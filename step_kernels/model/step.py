"""Step-3.7: embeddings with image features in their places, decoder layers, heads."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention import WholeSequences
from .checkpoint import Checkpoint
from .config import StepConfig
from .decoder import DecoderLayer, MTPLayer
from .generation import generate
from .layers import RMSNorm, linear
from .vision import VisionEncoder
from .weights import RandomWeights, Weights


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
    ) -> Step3p7:
        """A BF16, FP8 or NVFP4 checkpoint folder under any of its name schemes; CheckpointError if it is unusable.

        A checkpoint without MTP weights (the first NVFP4 upload) loads without draft layers. `progress` shows a
        bar on a terminal.
        """
        checkpoint = Checkpoint(path)
        config = StepConfig.from_dict(checkpoint.config, str(checkpoint.folder / "config.json"))
        drafts = f"model.layers.{config.num_layers}.eh_proj.weight" in checkpoint
        return cls(config, Weights(checkpoint, _device(device), dtype, progress), config.num_mtp if drafts else 0)

    @classmethod
    @torch.inference_mode()
    def random(
        cls,
        config: StepConfig,
        device: str | torch.device = "cuda",
        nvfp4: bool = True,
        seed: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Step3p7:
        """Synthetic weights made on the device, routed experts in NVFP4 unless told otherwise: for benchmarks."""
        return cls(config, RandomWeights(_device(device), dtype, nvfp4, seed), config.num_mtp)

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
        for layer in self.layers:
            x = layer(x, context)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states before the final norm [..., hidden] -> f32 [..., vocab]."""
        return linear(self.norm(hidden), self.lm_head).float()

    def _hidden(self, input_ids: Tensor, embeddings: Tensor) -> Tensor:
        if input_ids.dim() != 2:
            raise ValueError(f"input_ids: got shape {list(input_ids.shape)}, wanted [batch, length]")
        batch, length = input_ids.shape
        hidden = self.trunk(embeddings.flatten(0, 1), WholeSequences(batch, length, self.device))
        return hidden.unflatten(0, (batch, length))


def _device(device: str | torch.device) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"device: got {device}, but torch {torch.__version__} sees {count} GPUs; wanted one or cpu")
    return device
