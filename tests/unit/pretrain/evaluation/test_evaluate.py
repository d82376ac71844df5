"""Perplexity: equal to a plain computation with transformers, whatever the windows, the batches and the shares."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from data_pipeline.batch import IGNORED_TARGET
from data_pipeline.corpus.document import Document
from pretrain.evaluation.evaluate import (
    Evaluation,
    Score,
    Window,
    Windowing,
    deal,
    document_windows,
    evaluate,
    packed,
    score,
)
from pretrain.load_model import LoadedModel, load_model
from tests.tiny_hf import TEXTS, tiny_hf_folder, tokenizer_without


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_hf_folder(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def model(folder: Path) -> LoadedModel:
    return load_model(folder)


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, "memory", index) for index, text in enumerate(texts)]


@torch.no_grad()
def plain_nats(hf: LlamaForCausalLM, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Summed loss and count of one document `[start, t1, .. tn, EOS]`, window by window, with transformers alone."""
    nats, scored = 0.0, 0
    for begin in itertools.count(0, stride):
        inputs, targets = ids[begin : begin + window], ids[begin + 1 : begin + window + 1]
        inputs = inputs[: len(targets)]
        log_p = hf(torch.tensor([inputs])).logits[0].double().log_softmax(-1)
        for at, target in enumerate(targets):
            if begin + at >= scored:
                nats -= log_p[at, target].item()
                scored = begin + at + 1
        if scored == len(ids) - 1:
            return nats, scored
    raise AssertionError("unreachable")


@pytest.mark.parametrize(("window", "stride"), [(64, 64), (32, 32), (32, 8), (17, 5), (5, 1), (1, 1), (1000, 1000)])
def test_equals_transformers(folder: Path, model: LoadedModel, window: int, stride: int) -> None:
    hf = LlamaForCausalLM.from_pretrained(folder)
    per_document = [plain_nats(hf, [1, *model.tokenizer.encode(text), 2], window, stride) for text in TEXTS]
    nats, tokens = (sum(column) for column in zip(*per_document, strict=True))
    found = evaluate(model, {"all": documents(TEXTS)}, Windowing.of(model.context_length, window, stride)).as_dict()
    assert found["tokens"] == tokens == sum(len(model.tokenizer.encode(text)) + 1 for text in TEXTS)
    assert found["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert found["documents"] == len(TEXTS)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
    assert (found["window"], found["stride"]) == (window, stride)
    assert (found["start_token"], found["eos_scored"]) == ("bos", True)


def test_defaults_are_the_training_length_side_by_side(model: LoadedModel) -> None:
    assert Windowing.of(model.context_length) == Windowing(window=64, stride=64, batch_tokens=8192)
    assert Windowing.of(model.context_length, window=100_000) == Windowing(100_000, 100_000, 100_000)


@pytest.mark.parametrize("batch_tokens", [32, 100, 1000])
def test_the_batch_budget_changes_nothing(model: LoadedModel, batch_tokens: int) -> None:
    domains = {"a": documents(TEXTS[:2]), "b": documents(TEXTS[2:])}
    whole = evaluate(model, domains, Windowing(32, 8, 100_000))
    cut = evaluate(model, domains, Windowing(32, 8, batch_tokens))
    for name, expected in whole.by_domain.items():
        assert cut.by_domain[name].nats == pytest.approx(expected.nats, rel=1e-6)
        assert replace(cut.by_domain[name], nats=0.0) == replace(expected, nats=0.0)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_the_shares_of_ranks_add_up(model: LoadedModel, world: int) -> None:
    domains = {"a": documents(TEXTS[:3]), "b": documents(TEXTS[3:])}
    windowing = Windowing(32, 16, 256)
    alone = evaluate(model, domains, windowing)
    shares = [score(model, domains, windowing, rank, world) for rank in range(world)]
    together = Evaluation.of(model, windowing, shares)
    for name, expected in alone.by_domain.items():
        assert together.by_domain[name].nats == pytest.approx(expected.nats, rel=1e-6)
        assert replace(together.by_domain[name], nats=0.0) == replace(expected, nats=0.0)


def test_domains_add_up_to_the_whole(model: LoadedModel) -> None:
    windowing = Windowing.of(model.context_length, 32)
    both = evaluate(model, {"a": documents(TEXTS[:1]), "b": documents(TEXTS[1:])}, windowing).as_dict()
    one = evaluate(model, {"all": documents(TEXTS)}, windowing).as_dict()
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert both["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-6)
    for key in ("tokens", "bytes", "documents"):
        assert both[key] == one[key] == sum(domain[key] for domain in both["by_domain"].values())
    alone = evaluate(model, {"b": documents(TEXTS[1:])}, windowing).as_dict()["by_domain"]["b"]
    assert both["by_domain"]["b"]["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_bf16_is_near_fp32(folder: Path, model: LoadedModel) -> None:
    bf16 = load_model(folder, dtype=torch.bfloat16)
    exact, rounded = (
        evaluate(each, {"a": documents(TEXTS)}, Windowing.of(model.context_length)).as_dict() for each in (model, bf16)
    )
    assert rounded["loss"] != exact["loss"]
    assert rounded["loss"] == pytest.approx(exact["loss"], rel=2e-2)


def test_an_empty_document_is_an_eos(model: LoadedModel) -> None:
    with_empty = evaluate(model, {"a": documents([TEXTS[0], ""])}, Windowing.of(model.context_length)).as_dict()
    without = evaluate(model, {"a": documents([TEXTS[0]])}, Windowing.of(model.context_length)).as_dict()
    assert with_empty["documents"] == 2
    assert with_empty["tokens"] == without["tokens"] + 1
    assert with_empty["bytes"] == without["bytes"]


def test_a_tokenizer_without_bos_starts_from_eos(folder: Path, model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1))
    found = evaluate(other, {"a": documents(TEXTS)}, Windowing.of(model.context_length, 32)).as_dict()
    eos = other.tokenizer.eos_id
    assert eos is not None
    hf = LlamaForCausalLM.from_pretrained(folder)
    sums = [plain_nats(hf, [eos, *other.tokenizer.encode(text), eos], 32, 32) for text in TEXTS]
    nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    assert (found["start_token"], found["eos_scored"]) == ("eos", True)
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def test_a_tokenizer_without_eos_scores_none(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", eos_id=-1))
    found = evaluate(other, {"a": documents([*TEXTS, ""])}, Windowing.of(model.context_length)).as_dict()
    assert (found["start_token"], found["eos_scored"]) == ("bos", False)
    assert found["tokens"] == sum(len(other.tokenizer.encode(text)) for text in TEXTS)
    assert found["documents"] == len(TEXTS) + 1


def test_a_tokenizer_without_either_is_refused(model: LoadedModel, tmp_path: Path) -> None:
    other = replace(model, tokenizer=tokenizer_without(tmp_path / "t.model", bos_id=-1, eos_id=-1))
    with pytest.raises(ValueError, match="neither BOS nor EOS"):
        evaluate(other, {"a": documents(TEXTS)}, Windowing.of(model.context_length))


@pytest.mark.parametrize(
    ("window", "stride", "batch_tokens", "message"),
    [
        (0, 0, 10, "window=0"),
        (8, 9, 10, "stride=9 must lie between 1 and window=8"),
        (8, 0, 10, "stride=0"),
        (8, 8, 7, "batch_tokens=7 does not hold one window=8"),
    ],
)
def test_impossible_windows_are_refused(window: int, stride: int, batch_tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Windowing(window, stride, batch_tokens)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_a_domain_without_text_is_refused(model: LoadedModel, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="empty: nothing to measure in .* 0 bytes"):
        evaluate(model, {"full": documents(TEXTS), "empty": documents(texts)}, Windowing.of(model.context_length))


def test_a_loss_that_is_not_finite_is_refused(model: LoadedModel) -> None:
    share = {"a": Score(nats=math.nan, tokens=3, bytes=3, documents=1)}
    with pytest.raises(ValueError, match="loss is nan.*fp32"):
        Evaluation.of(model, Windowing(8, 8, 8), [share])


@given(n=st.integers(0, 60), window=st.integers(1, 40), data=st.data(), eos=st.sampled_from([None, 2]))
def test_each_target_counts_once(n: int, window: int, data: st.DataObject, eos: int | None) -> None:
    stride = data.draw(st.integers(1, window))
    ids = np.arange(10, 10 + n)
    sequence = [1, *ids.tolist(), *([] if eos is None else [eos])]
    windows = list(document_windows(ids, 1, eos, Windowing(window, stride, window), "d", text_bytes=7))
    counted: list[int] = []
    for number, row in enumerate(windows):
        begin = number * stride
        assert row.inputs.tolist() == sequence[:-1][begin : begin + window]
        kept = row.targets != IGNORED_TARGET
        assert row.targets[kept].tolist() == np.array(sequence[1:])[begin : begin + window][kept].tolist()
        if number:
            context = np.flatnonzero(kept)[0]
            assert context >= window - stride  # what a stride below the window buys
        counted += row.targets[kept].tolist()
    assert counted == sequence[1:]
    assert [row.ends for row in windows] == [False] * (len(windows) - 1) + [True]
    assert sum(row.text_bytes for row in windows) == 7
    assert all(row.text_bytes >= 0 for row in windows)


@given(lengths=st.lists(st.integers(0, 50), max_size=60), budget=st.integers(50, 120))
def test_batches_hold_every_window_within_the_budget(lengths: list[int], budget: int) -> None:
    windows = [Window(np.full(length, at), np.zeros(length)) for at, length in enumerate(lengths)]
    batches = list(packed(windows, budget))
    assert sorted(map(id, itertools.chain(*batches))) == sorted(map(id, windows))
    assert all(len(batch) * max(map(len, batch)) <= budget for batch in batches)


def test_packing_reads_a_bounded_part_of_an_endless_corpus() -> None:
    taken = 0

    def endless() -> Iterator[Window]:
        nonlocal taken
        while True:
            taken += 1
            yield Window(np.zeros(10), np.zeros(10))

    batches = packed(endless(), 100)
    for _ in range(3):
        assert len(next(batches)) == 10
    assert taken <= 16 * 10


@given(lengths=st.lists(st.integers(0, 200), max_size=50), world=st.integers(1, 5))
def test_documents_are_dealt_once_and_evenly(lengths: list[int], world: int) -> None:
    texts = documents(["x" * length for length in lengths])
    domains = {"a": texts[::2], "b": texts[1::2]}
    shares = [list(deal(domains, rank, world)) for rank in range(world)]
    assert sorted(document.index for share in shares for _, document in share) == list(range(len(texts)))
    assert all(document in domains[name] for share in shares for name, document in share)
    loads = [sum(len(document.text) + 1 for _, document in share) for share in shares]
    assert max(loads) - min(loads) <= max([length + 1 for length in lengths], default=0)
