"""Sums over documents and the measures made of them."""

import json
import math

import pytest

from pretrain.evaluation.score import MEASURES, Score


def test_measures_are_ratios_of_the_sums() -> None:
    score = Score(nats=60.0, tokens=30, bytes=120, documents=2, words=20)
    assert (score.loss, score.perplexity) == (2.0, math.exp(2))
    assert (score.word_perplexity, score.byte_perplexity) == (math.exp(3), math.exp(0.5))
    assert score.bits_per_byte == pytest.approx(math.log2(math.exp(0.5)), rel=1e-15)
    counts = {"tokens": 30, "bytes": 120, "words": 20, "documents": 2}
    assert score.as_dict() == {**{name: getattr(score, name) for name in MEASURES}, **counts}


def test_the_total_is_exact_in_any_order() -> None:
    scores = [Score(nats, 1, 2, 3, 1) for nats in (1e16, 1.0, 1e-3, 1.0, 7e15)]
    total = Score.sum(scores)
    assert total == Score.sum(scores[::-1]) == Score(math.fsum(score.nats for score in scores), 5, 10, 15, 5)


@pytest.mark.parametrize("words", [0, 1])
def test_a_perplexity_beyond_numbers_is_inf_and_none_in_json(words: int) -> None:
    """A text without white space is one word, or none where it is nothing else."""
    score = Score(nats=3000.0, tokens=1000, bytes=3000, documents=1, words=words)
    assert score.word_perplexity == math.inf
    assert score.as_dict()["word_perplexity"] is None
    json.dumps(score.as_dict(), allow_nan=False)
