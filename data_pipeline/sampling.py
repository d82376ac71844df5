"""A sample of a corpus that a tokenizer is trained on: of each input its share, each document as likely as any other.

A document's key is a hash of the seed and of its number within the input, and those with the smallest keys are taken:
an exact uniform sample in one pass and in memory for the sample alone (bottom-k sampling: Cohen & Kaplan 2007,
"Summarizing data using bottom-k sketches", section 2). It depends neither on where the files lie nor on the clock.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import xxhash

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.corpus.document import Document, OnBad, OnBytes, ignore
from data_pipeline.corpus.reading import read_documents

DEFAULT_SAMPLE_BYTES = 1 << 30
MAX_SAMPLE_BYTES = 4 << 30
"""The trainer holds its text in memory, several times over."""
LEAST_INPUT_BYTES = 4
"""Of an input's part: the longest character in UTF-8. Of less, nothing may be left when a text is cut."""


@dataclass(frozen=True)
class Sample:
    """What was taken of one input."""

    name: str
    seen_documents: int
    seen_bytes: int
    """UTF-8 bytes of their texts."""
    documents: list[str]
    """In the order in which they were read."""
    text_bytes: int
    """UTF-8 bytes of these."""


def sample_corpus(
    corpus: CorpusConfig,
    sample_bytes: int = DEFAULT_SAMPLE_BYTES,
    seed: int = 0,
    on_bad: OnBad = ignore,
    on_bytes: OnBytes = ignore,
) -> list[Sample]:
    """Sample every input, the bytes shared out by the inputs' weights. An input that has fewer is taken whole, and
    what it leaves of its share goes to no other. Documents come as they are stored, uncurated.

    Raises:
        ValueError: more bytes than the trainer can hold, or than none; an input's weight is too small for a part of
            them; or as `read_documents` does.
        OSError: as `read_documents` does.
    """
    if not 0 < sample_bytes <= MAX_SAMPLE_BYTES:
        raise ValueError(
            f"--sample-bytes {sample_bytes}: the trainer holds its sample in memory, give 1 to {MAX_SAMPLE_BYTES}"
        )
    samples = []
    for input_, quota_bytes in zip(corpus.inputs, _quotas(corpus, sample_bytes), strict=True):
        documents = read_documents(corpus.model_copy(update={"inputs": (input_,)}), on_bad, on_bytes)
        samples.append(draw(documents, quota_bytes, seed, input_.name))
    return samples


def _quotas(corpus: CorpusConfig, sample_bytes: int) -> list[int]:
    """Bytes of each input."""
    total = sum(Fraction(input_.weight) for input_ in corpus.inputs)
    quotas = [int(sample_bytes * Fraction(input_.weight) / total) for input_ in corpus.inputs]
    for input_, quota_bytes in zip(corpus.inputs, quotas, strict=True):
        if quota_bytes < LEAST_INPUT_BYTES:
            raise ValueError(
                f"input {input_.name} has weight {input_.weight:g} of {float(total):g}, which is {quota_bytes} of "
                f"--sample-bytes {sample_bytes}, too few for a text: raise one of the two, or take the input out"
            )
    return quotas


def draw(documents: Iterable[Document], quota_bytes: int, seed: int, name: str) -> Sample:
    """Take documents by ascending key until `quota_bytes` are full; the last one is cut short where they are."""
    taken: list[tuple[int, int, bytes]] = []  # (-key, -number, text): a heap, the largest key on top
    taken_bytes = seen_bytes = number = 0
    for number, document in enumerate(documents, start=1):
        text = document.text.encode()
        seen_bytes += len(text)
        key = xxhash.xxh3_64_intdigest(f"{name}\0{number}".encode(), seed)
        if taken and taken_bytes >= quota_bytes and (-key, -number) < taken[0][:2]:
            continue
        text = text[:quota_bytes]
        heapq.heappush(taken, (-key, -number, text))
        taken_bytes += len(text)
        while taken and taken_bytes - len(taken[0][2]) >= quota_bytes:
            taken_bytes -= len(heapq.heappop(taken)[2])
    chosen = {-order: text for _, order, text in taken}
    if taken_bytes > quota_bytes:
        last = -taken[0][1]
        chosen[last] = chosen[last][: len(chosen[last]) - (taken_bytes - quota_bytes)]
    # A cut may fall into a character.
    texts = [chosen[at].decode(errors="ignore") for at in sorted(chosen)]
    return Sample(name, number, seen_bytes, texts, sum(len(text.encode()) for text in texts))
