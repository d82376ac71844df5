"""Text to token ids and back, without loss, through a sentencepiece model file."""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
import xxhash
from sentencepiece import sentencepiece_model_pb2

from data_pipeline.corpus import Document

SPACE = "\u2581"
"""sentencepiece writes a space as this character, so the character itself needs care (see Tokenizer)."""

WHITESPACE_PIECES = ["\n", "\n\n", *("\t" * n for n in range(1, 5)), *(SPACE * n for n in range(2, 17))]
"""Line ends and runs of tabs and spaces: a line of code keeps its indentation for one token."""

SEGMENT_CHARACTERS = 8192
"""Longer documents are cut for encoding: sentencepiece's time a byte grows with the length of its input."""

MAX_TRAINING_BYTES = 4 << 30
"""The trainer holds its text in memory, several times over."""

MAX_SENTENCE_CHARACTERS = 1 << 24
"""Longer documents reach the trainer in parts."""


@dataclass(frozen=True)
class TrainingStats:
    """What a tokenizer was trained on."""

    documents: int
    text_bytes: int
    vocab_size: int
    fingerprint: str


def train_tokenizer(inputs: Iterable[Document | str], vocab_size: int, out: Path) -> TrainingStats:
    """Train a byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) and write it to `out`.

    The same documents in the same order give the same file, byte for byte, on any machine.

    Raises:
        ValueError: there is no text, too much of it, or the vocabulary does not suit it.
    """
    counted = _CountedSentences(inputs)
    first = next(counted, None)
    if first is None:
        raise ValueError("the corpus has no text to train a tokenizer on: check --input and --text-field")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], counted),
            # A writer rather than a prefix, and a fixed thread count: both are stored in the model, which must not
            # depend on where or on what machine it was trained.
            model_writer=model,
            num_threads=4,
            model_type="bpe",
            vocab_size=vocab_size,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.9995,
            user_defined_symbols=WHITESPACE_PIECES,
            # The default silently skips sentences over 4,192 bytes, which is most of a corpus.
            max_sentence_length=4 * MAX_SENTENCE_CHARACTERS,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain_training_error(error, vocab_size)) from error
    assert next(counted, None) is None, "sentencepiece stopped before the end of the corpus"
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(model.getvalue())
    os.replace(temporary, out)
    tokenizer = Tokenizer(out)
    assert tokenizer.vocab_size == vocab_size
    return TrainingStats(counted.documents, counted.text_bytes, vocab_size, tokenizer.fingerprint)


class _CountedSentences(Iterator[str]):
    """Documents as the trainer's sentences, counting what passes."""

    def __init__(self, inputs: Iterable[Document | str]) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._sentences = (sentence for item in inputs for sentence in self._split(item))

    def _split(self, item: Document | str) -> Iterator[str]:
        text = item if isinstance(item, str) else item.text
        self.documents += 1
        self.text_bytes += len(text.encode())
        if self.text_bytes > MAX_TRAINING_BYTES:
            raise ValueError(
                f"the corpus has more than {MAX_TRAINING_BYTES >> 30} GiB of text, more than the trainer can hold: "
                "give --input a sample of the files"
            )
        # No piece may hold this character (Tokenizer spells it in bytes), so to the trainer it is a boundary.
        text = text.replace(SPACE, "\n")
        start = 0
        while start < len(text):
            # A line end is a piece of its own, so a cut after one changes no statistics.
            end = text.rfind("\n", start, start + MAX_SENTENCE_CHARACTERS) + 1 or start + MAX_SENTENCE_CHARACTERS
            yield text[start:end]
            start = end

    def __next__(self) -> str:
        return next(self._sentences)


def _explain_training_error(error: RuntimeError, vocab_size: int) -> str:
    message = " ".join(str(error).split())
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        needed = too_small.group(1)
        return f"vocab_size {vocab_size} cannot hold the characters of this corpus: use at least {needed}"
    if too_large := re.search(r"value <= (\d+)", message):
        limit = too_large.group(1)
        return f"vocab_size {vocab_size} is more than this corpus can fill: use at most {limit}, or more text"
    return f"sentencepiece cannot train a vocabulary of {vocab_size} on this corpus: {message}"


class Tokenizer:
    """Encodes and decodes by a sentencepiece model file.

    For models that `train_tokenizer` made, `decode(encode(text)) == text` for every text that has a UTF-8 form,
    and text that spells a control piece, such as `<s>`, is encoded as ordinary text.
    """

    def __init__(self, path: str | Path) -> None:
        """Load the model file.

        Raises:
            ValueError: the file is missing or no sentencepiece model.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"tokenizer {self.path} does not exist: make one with `steppe data train-tokenizer`")
        model_bytes = self.path.read_bytes()
        spec = sentencepiece_model_pb2.ModelProto()
        try:
            spec.ParseFromString(model_bytes)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
        except Exception as error:
            raise ValueError(f"tokenizer {self.path} is not a sentencepiece model ({error})") from error
        self.fingerprint: str = xxhash.xxh3_64_hexdigest(model_bytes)
        """xxh3-64 of the model file, in hexadecimal."""
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int | None = _none_if_negative(self._processor.bos_id())
        self.eos_id: int | None = _none_if_negative(self._processor.eos_id())
        normalizer = spec.normalizer_spec
        # A model that rewrites its input does so differently at the edges of a cut, so it gets documents whole.
        self._text_may_be_cut = not (
            normalizer.precompiled_charsmap or normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces
        )
        self._joined_pairs = {pair for piece in spec.pieces for pair in itertools.pairwise(piece.piece)}
        byte_pieces = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
        self._space_character_ids = np.array(byte_pieces, dtype=np.int32)

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS and EOS."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int32 `(n,)`, without BOS and EOS. Releases the interpreter lock while it encodes."""
        segments: list[str] = []
        ends: list[int] = []
        for text in texts:
            if self._text_may_be_cut and (len(text) > SEGMENT_CHARACTERS or SPACE in text):
                segments.extend(self._segments(text))
            else:
                segments.append(text)
            ends.append(len(segments))
        ids = self._processor.encode(segments, out_type="numpy")
        if len(ids) == len(texts):
            return ids
        for index, segment in enumerate(segments):
            if segment == SPACE and self._text_may_be_cut:
                ids[index] = self._space_character_ids
        starts = [0, *ends[:-1]]
        return [ids[a] if b - a == 1 else np.concatenate(ids[a:b]) for a, b in zip(starts, ends, strict=True)]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of the ids; control pieces have none."""
        return self._processor.decode([int(i) for i in ids])

    def _segments(self, text: str) -> Iterator[str]:
        """Cut a text where the ids of the parts are the ids of the whole.

        That is between two characters which no piece of the vocabulary holds side by side: no merge and no match
        can then span the cut. The character U+2581 becomes a segment of its own, spelled in bytes, since
        sentencepiece would read it as a space.
        """
        for part in re.split(f"({SPACE})", text):
            start = 0
            while len(part) - start > SEGMENT_CHARACTERS:
                cut = self._next_cut(part, start + SEGMENT_CHARACTERS)
                yield part[start:cut]
                start = cut
            yield part[start:]

    def _next_cut(self, text: str, start: int) -> int:
        for index in range(start, len(text)):
            before, after = text[index - 1], text[index]
            if (before.replace(" ", SPACE), after.replace(" ", SPACE)) not in self._joined_pairs:
                return index
        return len(text)


def _none_if_negative(token_id: int) -> int | None:
    return None if token_id < 0 else token_id
