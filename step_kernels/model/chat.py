"""Text to token ids and back: tokenizer.json and the release's chat format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from .checkpoint import CheckpointError
from .config import StepConfig
from .image import TOKENS, Views, image_tokens


class Chat:
    """A checkpoint's tokenizer with the chat format around it."""

    def __init__(self, folder: str | Path, config: StepConfig):
        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise CheckpointError(f"{file}: not found")
        try:
            self.tokenizer = Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{file}: not a tokenizer: {e}") from None
        self.file, self.config = file, config
        size = self.tokenizer.get_vocab_size()
        if size > config.vocab_size:
            raise CheckpointError(f"{file}: has {size} tokens, the model's vocab_size is {config.vocab_size}")

    def prompt(self, text: str, images: list[Views] = ()) -> list[int]:
        """Token ids of a user turn, images before the text, ready for the answer; `text` holds no control tokens."""
        ids = [self.config.bos_id, self._id("<|im_start|>"), *self._encode("user\n")]
        names = {name: self.tokenizer.token_to_id(name) for name in TOKENS}
        for views in images:
            ids += image_tokens(views.columns, views.rows, self.config.vision, names)
        ids += [*self._encode(text), self._id("<|im_end|>"), *self._encode("\n"), self._id("<|im_start|>")]
        return [*ids, *self._encode("assistant\n"), self._id("<think>"), *self._encode("\n")]

    def stream(self, tokens: Iterable[int]) -> Iterator[str]:
        """The text of tokens as they come, a piece once its characters are whole; special tokens are left out."""
        stream, ids, shown = DecodeStream(skip_special_tokens=True), [], 0
        for token in tokens:
            ids.append(token)
            piece = stream.step(self.tokenizer, token)
            if piece:
                shown += len(piece)
                yield piece
        rest = self.tokenizer.decode(ids, skip_special_tokens=True)[shown:]
        if rest:  # a character that was never finished
            yield rest

    def _encode(self, text: str) -> list[int]:
        self.tokenizer.encode_special_tokens = True  # as text, so that a prompt cannot forge a turn or an image
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _id(self, token: str) -> int:
        found = self.tokenizer.token_to_id(token)
        if found is None:
            raise CheckpointError(f"{self.file}: has no token {token}")
        return found
