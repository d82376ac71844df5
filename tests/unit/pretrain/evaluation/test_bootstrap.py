"""Resamples of documents: their weights, the exactness of their sums, and how often their intervals hold the truth."""

import math
import random
import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest

from pretrain.evaluation import bootstrap
from pretrain.evaluation.bootstrap import CHUNK_DOCUMENTS, Resampled, percentiles, poisson_thresholds, resample, weights
from pretrain.evaluation.record import DocumentScore
from pretrain.evaluation.score import Score

TRUE_LOSS = 3.0


def made_up_documents(count: int, seed: int, domains: tuple[str, ...] = ("a",)) -> Iterator[DocumentScore]:
    """Of lengths and losses that differ as much as those of real documents do; their expected nats are TRUE_LOSS
    times their expected tokens."""
    draw = np.random.default_rng(seed)
    tokens = 1 + draw.lognormal(5.0, 0.8, count).astype(np.int64)
    hardness = draw.gamma(8.0, 1 / 8.0, count)  # of mean 1, whatever the length
    for index, (n, share) in enumerate(zip(tokens.tolist(), hardness.tolist(), strict=True)):
        yield DocumentScore(index, domains[index % len(domains)], TRUE_LOSS * n * share, n, 4 * n, n // 2, f"{n:016x}")


def test_thresholds_are_the_distribution_function() -> None:
    """P(X <= k) for all k that a 32-bit number can tell from certainty."""
    exact = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(12)])
    np.testing.assert_allclose(poisson_thresholds() / 2**32, exact, atol=2**-32)


def test_weights_are_poisson_and_independent() -> None:
    found = weights(0, np.arange(4000), 1000)
    frequencies = np.bincount(found.ravel(), minlength=8)[:8] / found.size
    np.testing.assert_allclose(frequencies, [math.exp(-1) / math.factorial(k) for k in range(8)], atol=1e-3)
    for pair in (found[:-1] * found[1:], found[:, :-1] * found[:, 1:], found[:, ::2] * found[:, 1::2]):
        assert pair.mean() == pytest.approx(1.0, abs=5e-3)  # of neighbours, and of the two halves of one word
    assert found.mean(axis=0).std() == pytest.approx(4000**-0.5, rel=0.1)
    assert found.mean(axis=1).std() == pytest.approx(1000**-0.5, rel=0.1)


def test_a_weight_depends_on_seed_document_and_replicate_alone() -> None:
    all_of_them = weights(7, np.arange(100), 64)
    some = np.array([93, 5, 41])
    np.testing.assert_array_equal(weights(7, some, 64), all_of_them[some])
    np.testing.assert_array_equal(weights(7, some, 33), all_of_them[some, :33])
    assert (weights(8, np.arange(100), 64) != all_of_them).mean() > 0.5


def test_neither_order_nor_chunks_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = list(made_up_documents(3 * CHUNK_DOCUMENTS + 17, 1, ("a", "b", "c")))
    expected = resample(documents, 50)
    assert list(expected.by_domain) == ["a", "b", "c"]
    random.Random(0).shuffle(documents)
    monkeypatch.setattr(bootstrap, "CHUNK_DOCUMENTS", 100)
    found = resample(documents, 50)
    assert (list(found.by_domain), found.identity) == (list(expected.by_domain), expected.identity)
    for name, sums in found.by_domain.items():
        assert sums.score == expected.by_domain[name].score
        np.testing.assert_array_equal(sums.resampled, expected.by_domain[name].resampled)


def test_sums_are_those_of_fsum_and_domains_add_up() -> None:
    documents = [*made_up_documents(999, 2, ("x", "y")), DocumentScore(999, "x", 0.1 + 1e-9, 1, 1, 1, "0" * 16)]
    resampled = resample(documents, 20)
    for name, sums in resampled.by_domain.items():
        own = [document for document in documents if document.domain == name]
        assert sums.score == Score(
            math.fsum(document.nats for document in own),
            sum(document.tokens for document in own),
            sum(document.bytes for document in own),
            sum(document.words for document in own),
            len(own),
        )
    whole = resampled.whole
    assert whole.score.nats == pytest.approx(math.fsum(document.nats for document in documents), rel=1e-15)
    times = weights(0, np.arange(1000), 20).astype(float)
    values = np.array([[d.nats, d.tokens, d.bytes, d.words] for d in documents]).T
    np.testing.assert_allclose(whole.resampled, values @ times, rtol=1e-6)


def test_identity_tells_documents_domains_and_places() -> None:
    def identity(*documents: tuple[int, str, str]) -> int:
        return resample([DocumentScore(i, name, 1.0, 1, 1, 1, text) for i, name, text in documents], 2).identity

    one = identity((0, "a", "f0"), (1, "a", "f1"))
    assert one == identity((1, "a", "f1"), (0, "a", "f0"))
    others = [
        identity((0, "a", "f1"), (1, "a", "f0")),
        identity((0, "b", "f0"), (1, "a", "f1")),
        identity((0, "a", "f0")),
    ]
    assert len({one, *others}) == 4


def interval_of_loss(resampled: Resampled) -> tuple[float, float]:
    found = percentiles(resampled.whole.nats_per("tokens"))
    assert found is not None
    return found


def test_agrees_with_the_plain_bootstrap() -> None:
    """Drawing as many documents with replacement, by numpy, 20,000 times."""
    documents = list(made_up_documents(300, 3))
    times = np.random.default_rng(0).multinomial(300, np.full(300, 1 / 300), size=20_000)
    nats, tokens = np.array([(d.nats, d.tokens) for d in documents]).T
    expected = np.quantile(times @ nats / (times @ tokens), [0.025, 0.975])
    found = np.array(interval_of_loss(resample(documents, 20_000)))
    np.testing.assert_allclose(found, expected, atol=0.03 * (expected[1] - expected[0]))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    held = 0
    for trial in range(400):
        low, high = interval_of_loss(resample(made_up_documents(200, 1000 + trial), seed=trial))
        held += low <= TRUE_LOSS <= high
    assert 0.92 <= held / 400 <= 0.98


def test_an_empty_resample_is_no_replicate() -> None:
    documents = list(made_up_documents(2, 4))
    losses = resample(documents).whole.nats_per("tokens")
    assert np.isnan(losses).mean() == pytest.approx(math.exp(-2), abs=0.04)
    low, high = interval_of_loss(resample(documents))
    assert (low, high) == pytest.approx(sorted(document.nats / document.tokens for document in documents))
    assert percentiles(np.array([np.nan, np.nan])) is None


def test_memory_does_not_grow_with_the_documents() -> None:
    def peak(count: int) -> int:
        tracemalloc.start()
        documents = (DocumentScore(i, "ab"[i % 2], 300.0, 100, 400, 70, "0" * 16) for i in range(count))
        resample(documents)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # imports
    assert peak(20_000) < 1.05 * peak(4_000)
