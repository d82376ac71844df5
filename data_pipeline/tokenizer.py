"""Text to token ids and back, without loss: what a tokenizer is to everything else, whatever its file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from data_pipeline.tokenizer_files import SENTENCEPIECE_NAME, TokenizerFiles


class Codec(Protocol):
    """How the ids come about: by a library that reads the file."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    def decode(self, ids: list[int]) -> str: ...


class Tokenizer:
    """Encodes and decodes by a sentencepiece model or a Hugging Face `tokenizer.json`.

    A document of any length gets the ids that it would get in one piece, in bounded time and memory (see the codecs),
    and text that spells a control piece, such as `<s>`, is encoded as ordinary text. For models that `train_tokenizer`
    made, `decode(encode(text)) == text` for every text that has a UTF-8 form.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the file, from this machine or an object store.

        Raises:
            ValueError: it is missing or no tokenizer.
            OSError: it cannot be read now.
        """
        self.path = Path(path)
        self.files = TokenizerFiles.read(path)
        self.fingerprint = self.files.fingerprint
        """Equal for tokenizers that give the same ids because they are the same files."""
        self._codec = _codec(self.files)
        self.vocab_size = self._codec.vocab_size
        """Ids are below it."""
        self.bos_id = self._codec.bos_id
        self.eos_id = self._codec.eos_id

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 `(n,)`, without BOS and EOS. Releases the interpreter lock while it encodes."""
        return self._codec.encode_batch(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; control pieces have none."""
        return self._codec.decode([int(i) for i in ids])


def _codec(files: TokenizerFiles) -> Codec:
    # Either library takes a while to import, and a process needs one of them.
    if files.name == SENTENCEPIECE_NAME:
        from data_pipeline.sentencepiece_codec import SentencepieceCodec

        return SentencepieceCodec(files)
    from data_pipeline.json_codec import JsonCodec

    return JsonCodec(files)
