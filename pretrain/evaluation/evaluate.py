"""Perplexity by documents: every token of a corpus is scored exactly once, given the start of its own document.

What counts as a target, and what it sees, is in `pretrain.evaluation.windows`. Here documents are dealt to ranks, cut
into windows, scored in batches, and recorded one by one: all measures are ratios of sums over those records.
Shapes: B windows of a batch, T the longest of them, P ranges of context (`position_of`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from data_pipeline.batch import IGNORED_TARGET
from pretrain.evaluation.record import DocumentScore, DocumentSet, RecordsWriter, position_of
from pretrain.evaluation.texts import EvaluationDocument
from pretrain.evaluation.windows import Window, Windowing, document_windows, packed, padded
from pretrain.load_model import LoadedModel

# Documents of about so much text are tokenized together, so that a tokenizer with threads can use them.
ENCODED_CHARACTERS = 1 << 18
POSITIONS = 33  # a context has less than 2^32 tokens


@dataclass
class Scored:
    """What this rank has scored so far: documents that are complete, targets, and about how many bytes of text they
    stand for; and of all documents, whoever has scored them: how many there are, and their domains in the order of
    reading."""

    documents: int = 0
    tokens: int = 0
    bytes: float = 0.0
    read: int = 0
    domains: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pending:
    """A document some windows of which are still to be scored."""

    document: EvaluationDocument
    targets: int
    targets_left: int
    tokens_by_position: np.ndarray = field(default_factory=lambda: np.zeros(POSITIONS, dtype=np.int64))
    nats_by_position: np.ndarray = field(default_factory=lambda: np.zeros(POSITIONS))

    def score(self) -> DocumentScore:
        return DocumentScore(
            index=self.document.index,
            domain=self.document.domain,
            nats=float(self.nats_by_position.sum()),
            tokens=int(self.tokens_by_position.sum()),
            bytes=self.document.text_bytes,
            words=self.document.words,
            text_xxh3=xxhash.xxh3_64_hexdigest(self.document.text.encode("utf-8")),
        )


def score_documents(
    model: LoadedModel,
    documents: Iterable[EvaluationDocument],
    windowing: Windowing,
    records: RecordsWriter,
    rank: int = 0,
    world: int = 1,
    done: DocumentSet | None = None,
    on_progress: Callable[[Scored], None] = lambda so_far: None,
) -> Scored:
    """Record this rank's share of the documents; all ranks' shares together are all but those that are `done`.

    documents: all of them, the same on every rank, of which few are held at once: memory is bounded by the longest one
    and the batch, never by the corpus. Neither `batch_tokens` nor `world` changes a document's score beyond the
    rounding of a forward pass. on_progress: is told after each batch.

    Raises ValueError for a loss that is not finite, and for a document that is longer than the model can see at once
    where it has to.
    """
    scored = Scored()
    pending: dict[int, _Pending] = {}
    mine = deal(_new(documents, done or DocumentSet(), scored), rank, world)
    for batch in packed(_windows(model, mine, windowing, pending), windowing.batch_tokens):
        tokens_BP, nats_BP = _by_position(model, batch)
        for row, tokens_P, nats_P in zip(batch, tokens_BP, nats_BP, strict=True):
            waiting = pending[row.document]
            _check_finite(waiting.document, nats_P)
            waiting.tokens_by_position[: len(tokens_P)] += tokens_P
            waiting.nats_by_position[: len(nats_P)] += nats_P
            tokens = int(tokens_P.sum())
            waiting.targets_left -= tokens
            scored.tokens += tokens
            scored.bytes += waiting.document.text_bytes * tokens / max(1, waiting.targets)
            if not waiting.targets_left:
                del pending[row.document]
                records.add(waiting.score(), waiting.tokens_by_position, waiting.nats_by_position)
                scored.documents += 1
        on_progress(scored)
    assert not pending, "every target of a document is in one of its windows"
    return scored


def deal(documents: Iterable[EvaluationDocument], rank: int, world: int) -> Iterator[EvaluationDocument]:
    """This rank's documents: each goes to the rank that was dealt the least text so far.

    A pure function of the documents, so that the ranks agree without a word, and finish at about the same time.
    """
    load_characters = [0] * world
    for document in documents:
        owner = load_characters.index(min(load_characters))
        load_characters[owner] += len(document.text) + 1  # 1: empty documents go round, too
        if owner == rank:
            yield document


def _new(documents: Iterable[EvaluationDocument], done: DocumentSet, scored: Scored) -> Iterator[EvaluationDocument]:
    """Those that are not done; notes number and domains of all."""
    known = set()
    for document in documents:
        scored.read += 1
        if document.domain not in known:
            known.add(document.domain)
            scored.domains.append(document.domain)
        if document.index not in done:
            yield document


def _windows(
    model: LoadedModel, documents: Iterable[EvaluationDocument], windowing: Windowing, pending: dict[int, _Pending]
) -> Iterator[Window]:
    """The documents' windows, one after another; a document is pending from its first on."""
    start, _ = model.start_token
    eos = model.tokenizer.eos_id
    for document, ids in _tokenized(model, documents):
        targets = len(ids) + (eos is not None)
        if windowing.window is None and model.longest_context is not None and targets > model.longest_context:
            raise ValueError(
                f"document {document.index} of {document.domain} is {targets} tokens long, and {model.name} sees at "
                f"most {model.longest_context} at once: read it by --window {model.longest_context}"
            )
        pending[document.index] = _Pending(document, targets, targets)
        yield from document_windows(ids, start, eos, windowing, document.index)


def _tokenized(
    model: LoadedModel, documents: Iterable[EvaluationDocument]
) -> Iterator[tuple[EvaluationDocument, np.ndarray]]:
    for some in _some_at_a_time(documents):
        texts = [document.text for document in some if document.ids is None]
        encoded = iter(model.tokenizer.encode_batch(texts))
        for document in some:
            yield document, next(encoded) if document.ids is None else document.ids


def _some_at_a_time(documents: Iterable[EvaluationDocument]) -> Iterator[list[EvaluationDocument]]:
    some: list[EvaluationDocument] = []
    characters = 0
    for document in documents:
        some.append(document)
        characters += len(document.text) + 1
        if characters >= ENCODED_CHARACTERS:
            yield some
            some, characters = [], 0
    yield some


def _by_position(model: LoadedModel, batch: list[Window]) -> tuple[np.ndarray, np.ndarray]:
    """The counted targets and their nats in fp64, both (B, P), by the tokens of the document that each has seen."""
    inputs_BT, targets_BT = padded(batch)
    device = model.model.device
    losses_BT = model.model.token_losses(inputs_BT.to(device), targets_BT.to(device)).double().cpu().numpy()
    counted_BT = (targets_BT != IGNORED_TARGET).numpy()
    # A document's first window begins with the start token, which is none of the document's; the others with a token.
    lead_B1 = np.array([row.begin > 0 for row in batch], dtype=np.int64)[:, None]
    context_BT = np.arange(targets_BT.size(1)) + lead_B1
    P = int(position_of(context_BT[:, -1]).max()) + 1
    cells = (position_of(context_BT) + P * np.arange(len(batch))[:, None])[counted_BT]
    tokens_BP = np.bincount(cells, minlength=len(batch) * P).reshape(-1, P)
    nats_BP = np.bincount(cells, losses_BT[counted_BT], minlength=len(batch) * P).reshape(-1, P)
    return tokens_BP, nats_BP


def _check_finite(document: EvaluationDocument, nats_P: np.ndarray) -> None:
    total = nats_P.sum()
    if not np.isfinite(total):
        raise ValueError(
            f"{document.domain}: the loss of document {document.index} is {total}, so the model overflows in this "
            "precision: try fp32"
        )
