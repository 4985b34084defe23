"""What the bundled model is trained on, as rows of tokens: text from bench.corpus, dialogues about drawn digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from step_kernels.model.chat import Chat
from step_kernels.model.config import StepConfig
from step_kernels.model.image import prepare

from . import bundled, corpus, digits

LENGTH = 512  # tokens a row
ANSWER_WEIGHT = 4.0  # in the loss of a dialogue's answer beside a text's token: answers are a fiftieth of all tokens


@dataclass
class Dialogue:
    """A picture's question and answer as tokens, the answer from place `answer` on; its views as f16 arrays."""

    ids: list[int]
    answer: int
    view: np.ndarray
    crops: np.ndarray


def encode(tokenizer: Tokenizer, chat: Chat, data: Path, seed: int) -> np.ndarray:
    """u16: every document and every dialogue of text behind its begin token, shuffled."""
    pairs = []
    for pair in corpus.read_chat(data):  # small talk ten times, for there are only some hundred of it
        dialogue = chat.prompt(pair["question"]) + answer_ids(chat, pair["answer"])
        pairs += [dialogue] * (10 if pair["name"] == "everyday" else 1)
    texts = tokenizer.encode_batch_fast([d["text"] for d in corpus.read_text(data)], add_special_tokens=False)
    documents = [[chat.config.bos_id, *e.ids] for e in texts] + pairs
    order = np.random.default_rng(seed).permutation(len(documents))
    return np.concatenate([np.asarray(documents[i], np.uint16) for i in order])


def answer_ids(chat: Chat, text: str) -> list[int]:
    """What follows a prompt: the end of an empty thought, the answer, the end of the turn."""
    end, stop = (chat.tokenizer.token_to_id(name) for name in ("</think>", "<|im_end|>"))
    return [end, *chat.tokenizer.encode("\n" + text, add_special_tokens=False).ids, stop]


def draw(tokenizer_folder: Path, data: Path, first: int, count: int) -> list[Dialogue]:
    """Dialogues `first` to `first + count`: one to four training digits, shaken, with a question."""
    chat = Chat(tokenizer_folder, StepConfig.from_dict(bundled.config()))
    images, labels = corpus.read_digits(data)
    out = []
    for i in range(first, first + count):
        rng = np.random.default_rng(i)
        chosen = rng.integers(len(images), size=1 if i % 3 == 0 else rng.integers(2, 5))
        views = prepare(digits.picture(images[chosen], rng), chat.config.vision)
        prompt = chat.prompt(digits.QUESTIONS[rng.integers(len(digits.QUESTIONS))], [views])
        ids = prompt + answer_ids(chat, digits.answer(labels[chosen]))
        out.append(Dialogue(ids, len(prompt), views.global_view.half().numpy(), views.crops.half().numpy()))
    return out


@dataclass
class Batch:
    """Of one shape always, so that a CUDA graph can take it. i64 and f32 [rows, LENGTH + 1]: tokens and their weight in
    the loss; i64 views [n] and crops [m] of the pool, unused ones 0; i64 places [picture rows, LENGTH]: the feature
    that an image token stands for, the views' first, then the crops'."""

    tokens: Tensor
    weights: Tensor
    views: Tensor
    crops: Tensor
    places: Tensor


class Rows:
    """Draws batches: an eighth of the rows dialogues one behind the other, the others text, half of them from a
    document's first token and half from anywhere. `views` and `crops` are the pool's pixels, f16 on the device."""

    def __init__(self, stream: np.ndarray, dialogues: list[Dialogue], config: StepConfig, rows: int, seed: int, device):
        self.config, self.text_rows, self.picture_rows = config, rows - rows // 8, rows // 8
        self.most_views, self.most_crops = 10 * self.picture_rows, 20 * self.picture_rows
        self.stream = torch.from_numpy(stream.astype(np.int16)).to(device)
        firsts = np.flatnonzero(stream == config.bos_id)
        self.firsts = torch.from_numpy(firsts[firsts < len(stream) - LENGTH - 1]).to(device)
        self.dialogues, self.random = dialogues, np.random.default_rng(seed)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.views = torch.from_numpy(np.stack([d.view for d in dialogues])).to(device)
        self.crops = torch.from_numpy(np.concatenate([d.crops for d in dialogues])).to(device)
        self.first_crop = np.cumsum([0, *(len(d.crops) for d in dialogues)])

    def draw(self) -> Batch:
        device, n = self.stream.device, self.text_rows
        anywhere = torch.randint(len(self.stream) - LENGTH - 1, (n,), generator=self.generator, device=device)
        documents = torch.randint(len(self.firsts), (n,), generator=self.generator, device=device)
        starts = torch.where(torch.arange(n, device=device) % 2 == 0, anywhere, self.firsts[documents])
        text = self.stream[starts[:, None] + torch.arange(LENGTH + 1, device=device)].long()
        tokens, weights, *pictures = map(self._upload, self._pictures())
        weights = torch.cat((weights.new_ones(n, LENGTH + 1), weights))
        return Batch(torch.cat((text, tokens)), weights, *pictures)

    def _upload(self, x: np.ndarray) -> Tensor:
        x = torch.from_numpy(x)
        # Pinned, so that the host does not wait for the step before.
        return x.pin_memory().to(self.stream.device, non_blocking=True) if self.stream.is_cuda else x

    def _pictures(self) -> tuple[np.ndarray, ...]:
        """The last rows of a batch."""
        config = self.config
        tokens = np.full((self.picture_rows, LENGTH + 1), config.bos_id)
        weights, places = np.zeros(tokens.shape, np.float32), np.zeros((self.picture_rows, LENGTH), np.int64)
        views, crops = [], []
        for row in range(self.picture_rows):
            begin = 0
            while True:
                i = int(self.random.integers(len(self.dialogues)))
                dialogue, parts = self.dialogues[i], range(self.first_crop[i], self.first_crop[i + 1])
                end = begin + len(dialogue.ids)
                full = len(views) == self.most_views or len(crops) + len(parts) > self.most_crops
                if end > LENGTH or full:
                    break
                tokens[row, begin:end] = dialogue.ids
                weights[row, begin + dialogue.answer : end] = ANSWER_WEIGHT
                first = config.vision.image_tokens * self.most_views + config.vision.crop_tokens * len(crops)
                features = [*range(first, first + config.vision.crop_tokens * len(parts))]
                first = config.vision.image_tokens * len(views)
                features += range(first, first + config.vision.image_tokens)
                places[row, begin + np.flatnonzero(np.array(dialogue.ids) == config.image_token_id)] = features
                views.append(i)
                crops += parts
                begin = end
        views += [0] * (self.most_views - len(views))
        crops += [0] * (self.most_crops - len(crops))
        return tokens, weights, np.array(views), np.array(crops), places
