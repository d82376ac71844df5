"""Sampling: transformers' distribution, and draws that follow it."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from pretrain.generation.options import LEAST_TEMPERATURE, GenerationOptions
from pretrain.generation.sampling import filtered, next_tokens


def logits(rows: int = 16, vocabulary: int = 300) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [None, 1, 7, 300, 1000])
@pytest.mark.parametrize("top_p", [None, 1e-6, 0.5, 0.95, 1.0])
def test_the_distribution_is_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k is not None:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = filtered(logits(), GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p))
    assert torch.equal(found, expected)
    assert (found > -torch.inf).any(dim=-1).all()


def test_draws_follow_the_distribution() -> None:
    options = GenerationOptions(temperature=2.0, top_k=12)
    row = logits(1, 40)
    drawn = next_tokens(row.expand(20_000, -1), options, np.random.default_rng(0).random(20_000).tolist())
    frequency = torch.bincount(torch.tensor(drawn), minlength=40) / len(drawn)
    expected = filtered(row, options)[0].softmax(dim=-1)
    assert (frequency - expected).abs().max() < 0.01
    assert not frequency[expected == 0].any()


def test_the_ends_of_the_unit_interval_are_tokens_that_can_be_drawn() -> None:
    row = torch.tensor([[-torch.inf, 1.0, 2.0, -torch.inf]])
    options = GenerationOptions(temperature=1.0)
    assert next_tokens(row, options, [0.0]) == [1]
    assert next_tokens(row, options, [1 - 2**-53]) == [2]


def test_hardly_any_temperature_is_as_good_as_none() -> None:
    options = GenerationOptions(temperature=LEAST_TEMPERATURE)
    assert next_tokens(logits(), options, [0.5] * 16) == logits().argmax(dim=-1).tolist()


def test_greedy_takes_the_most_probable() -> None:
    assert next_tokens(logits(), GenerationOptions(), [0.5] * 16) == logits().argmax(dim=-1).tolist()
