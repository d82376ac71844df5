"""What benchmarks ask of a model's forward pass: rows of tokens, and how probable their last targets are.

Shapes: B rows of a batch, T the longest of them, N targets of a batch, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.batch import IGNORED_TARGET
from pretrain.language_model import LanguageModel


class Likelihood(NamedTuple):
    """log_probability: in nats, of all targets of a request; greedy: whether each is the most probable token there."""

    log_probability: float
    greedy: bool


@dataclass(frozen=True)
class Row:
    """Inputs `(T,)`, one or more, and who asks for what follows them: (request, targets), the last of which follows
    the last input."""

    inputs: np.ndarray
    asked: list[tuple[int, np.ndarray]]

    @property
    def scored(self) -> int:
        """How many of the inputs somebody asks for the follower of; they are the last ones."""
        return max(len(targets) for _, targets in self.asked)


def batches(rows: Iterable[Row], tokens: int, targets: int) -> list[list[Row]]:
    """Rows of like length together, the longest first, so that too large a batch shows at once.

    A batch has at most so many tokens, padding included, and at most so many targets, or one row.
    """
    batches: list[list[Row]] = []
    room = 0
    for row in sorted(rows, key=lambda row: len(row.inputs), reverse=True):
        if not batches or row.scored > room or (len(batches[-1]) + 1) * len(batches[-1][0].inputs) > tokens:
            batches.append([])
            room = targets
        batches[-1].append(row)
        room -= row.scored
    return batches


def padded_tokens(batch: Sequence[Row]) -> int:
    """What a batch costs: its rows times the longest."""
    return len(batch) * len(batch[0].inputs)


def likelihoods(model: LanguageModel, batch: Sequence[Row]) -> Iterator[tuple[int, Likelihood]]:
    """The answer to each request of each row. Raises ValueError for logits that are not finite."""
    at_BT = np.zeros((len(batch), len(batch[0].inputs)), dtype=bool)
    places, targets = list[np.ndarray](), list[np.ndarray]()  # of each request: which of the N logits, for which tokens
    end = 0
    for at_T, row in zip(at_BT, batch, strict=True):
        at_T[len(row.inputs) - row.scored : len(row.inputs)] = True
        end += row.scored
        places += [np.arange(end - len(wanted), end) for _, wanted in row.asked]
        targets += [wanted for _, wanted in row.asked]
    logits_NV = model.logits_at(_inputs(batch).to(model.device), torch.from_numpy(at_BT).to(model.device))
    place, target = (torch.from_numpy(np.concatenate(ids)).long().to(model.device) for ids in (places, targets))
    logs = logits_NV[place, target] - logits_NV.logsumexp(dim=-1)[place]
    hits = logits_NV.argmax(dim=-1)[place] == target
    found = torch.stack([logs.double(), hits.double()]).cpu()
    _check_finite(found)
    requests = [request for row in batch for request, _ in row.asked]
    for request, (log_probabilities, right) in zip(requests, _cut(found.numpy(), targets), strict=True):
        yield request, Likelihood(float(log_probabilities.sum()), bool(right.all()))


def log_probabilities(model: LanguageModel, batch: Sequence[Row]) -> Iterator[tuple[int, float]]:
    """As `likelihoods`, without asking what else was probable, for rows of one request each."""
    targets_BT = torch.full((len(batch), len(batch[0].inputs)), IGNORED_TARGET)
    for targets_T, row in zip(targets_BT, batch, strict=True):
        ((_, wanted),) = row.asked
        targets_T[len(row.inputs) - len(wanted) : len(row.inputs)] = torch.from_numpy(wanted)
    losses_BT = model.token_losses(_inputs(batch).to(model.device), targets_BT.to(model.device))
    sums_B = -losses_BT.double().sum(dim=1).cpu()
    _check_finite(sums_B)
    yield from zip((row.asked[0][0] for row in batch), sums_B.tolist(), strict=True)


def _inputs(batch: Sequence[Row]) -> Tensor:
    """(B, T) int64, padded on the right with token 0; causality hides the padding."""
    tokens_BT = torch.zeros(len(batch), len(batch[0].inputs), dtype=torch.int64)
    for tokens_T, row in zip(tokens_BT, batch, strict=True):
        tokens_T[: len(row.inputs)] = torch.from_numpy(row.inputs)
    return tokens_BT


def _cut(columns: np.ndarray, lengths_of: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Columns `(2, N)` as one part a request."""
    return np.split(columns, np.cumsum([len(part) for part in lengths_of])[:-1], axis=1)


def _check_finite(values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(
            "the model's log-probabilities are not finite, so it overflows in this precision: compute with --precision "
            "fp32, or use an earlier checkpoint"
        )
