"""A sentencepiece model trained on a sample of text: byte-pair encoding that loses nothing."""

import io
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from data_pipeline.sampling import Sample
from data_pipeline.sentencepiece_codec import SPACE
from data_pipeline.tokenizer import Tokenizer

WHITESPACE_PIECES = ["\n", "\n\n", *("\t" * n for n in range(1, 5)), *(SPACE * n for n in range(2, 17))]
"""Line ends and runs of tabs and spaces: a line of code keeps its indentation for one token."""

TAKEN_PIECES = {"<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))}
"""What sentencepiece makes of itself: the control pieces 0 to 2, and the bytes."""

MAX_SENTENCE_CHARACTERS = 1 << 24
"""Longer documents reach the trainer in parts."""


@dataclass(frozen=True)
class TrainingStats:
    """What a tokenizer was trained on."""

    documents: int
    text_bytes: int
    vocab_size: int
    fingerprint: str


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, out: Path, special_tokens: Sequence[str] = ()
) -> TrainingStats:
    """Train a byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) and write it to `out`.

    The same texts in the same order give the same file, byte for byte, on any machine.
    special_tokens: control pieces besides BOS and EOS, with the ids from 3 on. No text is ever read as one of them.

    Raises:
        ValueError: there is no text, the vocabulary does not suit it, or a special token cannot be one.
    """
    check_special(special_tokens)
    counted = _CountedSentences(texts)
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
            control_symbols=list(special_tokens),
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


def train_on_samples(
    samples: Sequence[Sample], vocab_size: int, out: Path, special_tokens: Sequence[str] = ()
) -> TrainingStats:
    """Train on samples of a corpus, one after the other; all of their bytes, and no others. See `train_tokenizer`."""
    texts = (text for sample in samples for text in sample.documents)
    stats = train_tokenizer(texts, vocab_size, out, special_tokens)
    assert stats.documents == sum(len(sample.documents) for sample in samples)
    assert stats.text_bytes == sum(sample.text_bytes for sample in samples)
    return stats


class _CountedSentences(Iterator[str]):
    """Documents as the trainer's sentences, counting what passes."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.documents = 0
        self.text_bytes = 0
        self._sentences = (sentence for text in texts for sentence in self._split(text))

    def _split(self, text: str) -> Iterator[str]:
        self.documents += 1
        self.text_bytes += len(text.encode())
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


def check_special(special_tokens: Sequence[str]) -> None:
    """Raise ValueError unless each can be a control piece."""
    for token in special_tokens:
        if not token or not token.isprintable() or " " in token or SPACE in token:
            raise ValueError(f"--special {token!r}: a special token is of printable characters without white space")
        if token in TAKEN_PIECES or special_tokens.count(token) > 1:
            raise ValueError(f"--special {token}: there is such a piece already, leave it out")


def _explain_training_error(error: RuntimeError, vocab_size: int) -> str:
    message = " ".join(str(error).split())
    if too_small := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        needed = too_small.group(1)
        return f"vocab_size {vocab_size} cannot hold the characters of this corpus: use at least {needed}"
    if too_large := re.search(r"value <= (\d+)", message):
        limit = too_large.group(1)
        return f"vocab_size {vocab_size} is more than this corpus can fill: use at most {limit}, or more text"
    return f"sentencepiece cannot train a vocabulary of {vocab_size} on this corpus: {message}"
