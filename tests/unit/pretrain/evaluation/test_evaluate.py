"""Scores of documents: equal to a plain computation with transformers, whatever the windows, batches and shares."""

import gc
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from model.decoder import Decoder
from pretrain.evaluation import evaluate
from pretrain.evaluation.evaluate import deal, score_documents
from pretrain.evaluation.record import DocumentSet, RecordsWriter, read_positions, read_scores
from pretrain.evaluation.texts import EvaluationDocument
from pretrain.evaluation.windows import Windowing
from pretrain.language_model import OwnModel
from pretrain.load_model import LoadedModel, load_model
from tests.plain_scoring import in_memory, our_scores, plain_nats
from tests.tiny_hf import TEXTS, tiny_hf_folder, tokenizer_without

WINDOWS = [(64, 64), (32, 32), (32, 8), (17, 5), (5, 1), (1, 1), (1000, 1000), ("document", None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


@pytest.mark.parametrize(("window", "stride"), WINDOWS)
def test_equals_transformers(
    folder: Path, model: LoadedModel, window: int | Literal["document"], stride: int | None
) -> None:
    hf = LlamaForCausalLM.from_pretrained(folder)
    found = our_scores(model, in_memory(TEXTS), Windowing.of(model.context_length, window, stride))
    assert list(found) == list(range(len(TEXTS)))
    for text, score in zip(TEXTS, found.values(), strict=True):
        ids = [1, *model.tokenizer.encode(text), 2]
        assert score.nats == pytest.approx(plain_nats(hf, ids, window, stride), rel=1e-5)
        assert score.tokens == len(ids) - 1
        assert score.bytes == len(text.encode())
        assert score.words == len(text.split())
        assert score.text_xxh3 == xxhash.xxh3_64_hexdigest(text.encode())


def test_token_ids_are_taken_as_they_are(model: LoadedModel) -> None:
    tokenized = [
        EvaluationDocument(at, "memory", text, model.tokenizer.encode_batch([text])[0] if at % 2 else None)
        for at, text in enumerate(TEXTS)
    ]
    windowing = Windowing(32, 16, 256)
    assert our_scores(model, tokenized, windowing) == our_scores(model, in_memory(TEXTS), windowing)


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60), st.integers(0, 90)), min_size=1, max_size=7),
    world=st.integers(1, 4),
    batch_tokens=st.integers(16, 700),
    shuffle=st.randoms(use_true_random=False),
    window=st.sampled_from([(16, 16), (16, 3), ("document", None)]),
)
def test_batches_ranks_order_and_padding_change_nothing(
    model: LoadedModel,
    cuts: list[tuple[int, int, int]],
    world: int,
    batch_tokens: int,
    shuffle: random.Random,
    window: tuple[int | Literal["document"], int | None],
) -> None:
    documents = in_memory([TEXTS[which][begin : begin + length] for which, begin, length in cuts])
    alone = {
        document.index: our_scores(model, [document], Windowing.of(64, *window))[document.index]
        for document in documents
    }
    shuffle.shuffle(documents)
    found = our_scores(model, documents, Windowing.of(64, *window, batch_tokens), world)
    for index, expected in alone.items():
        assert found[index].nats == pytest.approx(expected.nats, rel=1e-6)
        assert replace(found[index], nats=0.0) == replace(expected, nats=0.0)


def test_domains_are_told_in_the_order_of_reading(model: LoadedModel, tmp_path: Path) -> None:
    documents = [*in_memory(TEXTS[:1], "z"), *in_memory(TEXTS[1:3], "a", first=1), *in_memory(TEXTS[3:], "z", first=3)]
    done = DocumentSet()
    done.add(0)
    for rank in range(2):
        with RecordsWriter(tmp_path, rank) as records:
            scored = score_documents(model, documents, Windowing(64, 64, 256), records, rank, 2, done)
        assert scored.domains == ["z", "a"]
    assert sorted((score.index, score.domain) for score in read_scores(tmp_path)) == [(1, "a"), (2, "a"), (3, "z")]


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (4, 1), ("document", None)])
def test_positions_count_what_a_window_holds_of_the_document(
    model: LoadedModel, tmp_path: Path, window: int | Literal["document"], stride: int | None
) -> None:
    windowing = Windowing.of(64, window, stride)
    with RecordsWriter(tmp_path, 0) as records:
        score_documents(model, in_memory(TEXTS), windowing, records)
    expected: dict[int, int] = {}
    for text in TEXTS:
        scored = 0
        targets = len(model.tokenizer.encode(text)) + 1
        for begin in range(0, targets, windowing.stride or targets):
            for place in range(scored, min(begin + (windowing.window or targets), targets)):
                # Tokens t1 .. t(place) are before this target; the window begins with t(begin), t0 being the start.
                context = place - max(begin, 1) + 1
                expected[context.bit_length()] = expected.get(context.bit_length(), 0) + 1
                scored = place + 1
    found = read_positions(tmp_path)
    assert {position.last.bit_length(): position.tokens for position in found} == expected
    total = math.fsum(score.nats for score in read_scores(tmp_path))
    assert math.fsum(position.nats for position in found) == pytest.approx(total, rel=1e-12)
    first = [our_scores(model, [one], Windowing(1, 1, 1)) for one in in_memory(["a", "b"])]
    assert all(score.tokens == 2 for scores in first for score in scores.values())


def test_bf16_is_near_fp32(folder: Path, model: LoadedModel) -> None:
    windowing = Windowing.of(model.context_length)
    exact = our_scores(model, in_memory(TEXTS), windowing)
    rounded = our_scores(load_model(folder, dtype=torch.bfloat16), in_memory(TEXTS), windowing)
    for index, score in exact.items():
        assert rounded[index].nats != score.nats
        assert rounded[index].nats == pytest.approx(score.nats, rel=2e-2)


def test_an_empty_document_is_an_eos(model: LoadedModel) -> None:
    (empty,) = our_scores(model, in_memory([""]), Windowing.of(model.context_length)).values()
    assert (empty.tokens, empty.bytes, empty.words) == (1, 0, 0)
    assert empty.nats > 0


def test_a_tokenizer_without_bos_starts_from_eos(folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1))
    eos = other.tokenizer.eos_id
    assert eos is not None
    hf = LlamaForCausalLM.from_pretrained(folder)
    found = our_scores(other, in_memory(TEXTS), Windowing.of(model.context_length, 32))
    for text, score in zip(TEXTS, found.values(), strict=True):
        expected = plain_nats(hf, [eos, *other.tokenizer.encode(text), eos], 32, 32)
        assert score.nats == pytest.approx(expected, rel=1e-5)


def test_a_tokenizer_without_eos_scores_none(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", eos_id=-1))
    found = our_scores(other, in_memory(["", *TEXTS]), Windowing.of(model.context_length))
    assert [score.tokens for score in found.values()] == [len(other.tokenizer.encode(text)) for text in ["", *TEXTS]]
    assert found[0].nats == 0.0


def test_a_tokenizer_without_either_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1, eos_id=-1))
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        our_scores(other, in_memory(TEXTS), Windowing.of(model.context_length))


def test_a_document_longer_than_the_model_can_see_is_refused(model: LoadedModel) -> None:
    limited = replace(model, longest_context=100)
    with pytest.raises(ValueError, match=r"document 1 of memory is \d+ tokens long.*at most 100.*--window 100"):
        our_scores(limited, in_memory(TEXTS), Windowing.of(64, "document"))
    assert len(our_scores(limited, in_memory(TEXTS), Windowing.of(64, 100))) == len(TEXTS)


class Overflowing(OwnModel):
    """A model whose loss of one token is no number."""

    token = -1

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return super().token_losses(tokens_BT, targets_BT).where(targets_BT != self.token, torch.nan)


def test_a_loss_that_is_not_finite_is_refused_at_once(model: LoadedModel) -> None:
    rare = min(set(model.tokenizer.encode(TEXTS[3])) - set(model.tokenizer.encode("".join(TEXTS[:3]))))
    overflowing = Overflowing(decoder_of(model))
    overflowing.token = rare
    with pytest.raises(ValueError, match="memory: the loss of document 3 is nan.*try fp32"):
        our_scores(replace(model, model=overflowing), in_memory(TEXTS), Windowing(64, 64, 64))


def test_a_long_corpus_is_never_held(model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 20,000 documents through all but the forward pass, which is not what is asked about.
    monkeypatch.setattr(evaluate, "ENCODED_CHARACTERS", 1 << 12)
    instant = replace(model, model=Instant(decoder_of(model)))
    alive = most = 0

    class Counted(EvaluationDocument):
        def __init__(self, index: int) -> None:
            nonlocal alive, most
            super().__init__(index, "memory", "grass on the plain", np.arange(10, 18))
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    def corpus() -> Iterator[EvaluationDocument]:
        for index in range(20_000):
            yield Counted(index)

    with RecordsWriter(tmp_path, 0) as records:
        scored = score_documents(instant, corpus(), Windowing(8, 8, 512), records)
    gc.collect()
    assert (scored.documents, scored.tokens, alive) == (20_000, 180_000, 0)
    assert most < 2000


class Instant(OwnModel):
    """A model to which every token is equally likely, and that takes no time."""

    def token_losses(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return torch.ones(targets_BT.shape)


def decoder_of(model: LoadedModel) -> Decoder:
    assert isinstance(model.model, OwnModel)
    return model.model.decoder


@given(lengths=st.lists(st.integers(0, 200), max_size=50), world=st.integers(1, 5))
def test_documents_are_dealt_once_and_evenly(lengths: list[int], world: int) -> None:
    documents = in_memory(["x" * length for length in lengths])
    shares = [list(deal(documents, rank, world)) for rank in range(world)]
    assert sorted(document.index for share in shares for document in share) == list(range(len(lengths)))
    loads = [sum(len(document.text) + 1 for document in share) for share in shares]
    assert max(loads) - min(loads) <= max([length + 1 for length in lengths], default=0)
