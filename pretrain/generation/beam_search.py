"""Beam search: the continuations of a prompt that are most probable so far, side by side.

Of a prompt's 2 k best candidates the first k may end, and the best k that have not ended go on; a continuation that
has ended scores by its mean log-probability, or over another power of its length (Wu et al. 2016, arXiv 1609.08144,
section 7). In what papers leave open, and in when to stop, the rules are those of transformers' `generate`, so that
the results are the same.
Shapes: k beams, B rows (a prompt each at first, then a beam each), V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.generation.options import GenerationOptions
from pretrain.generation.reader import Ends, Reader


class _Beam(NamedTuple):
    """What was written after a prompt. score: its log-probability; once it has ended, over the length penalty.
    row: of the batch, that has read all of it but the last token."""

    ids: tuple[int, ...]
    score: float
    row: int


@dataclass
class _Search:
    """One prompt's beams. Those that have ended are sorted, the best first; without open ones the search is over."""

    place: int  # of the prompt among the batch's
    open: list[_Beam]
    ended: list[_Beam]


def beam_search(
    reader: Reader, prompts: Sequence[Sequence[int]], options: GenerationOptions, ends: Ends
) -> list[list[int]]:
    """The best continuation of each prompt. `ends` is asked for every candidate, in no order."""
    searches = [_Search(place, [_Beam((), 0.0, place)], []) for place in range(len(prompts))]
    logits_BV = reader.read(prompts)
    going_on = searches
    while True:
        log_probabilities_BV = logits_BV.log_softmax(dim=-1)
        for search in going_on:
            candidates = _candidates(search.open, log_probabilities_BV, 2 * options.beams)
            _advance(search, candidates, options, ends)
        going_on = [search for search in going_on if search.open]
        if not going_on:
            return [list(search.ended[0].ids) for search in searches]
        beams = [beam for search in going_on for beam in search.open]
        reader.select([beam.row for beam in beams])
        logits_BV = reader.read([beam.ids[-1:] for beam in beams])
        rows = iter(range(len(beams)))
        for search in going_on:
            search.open = [beam._replace(row=next(rows)) for beam in search.open]


def _candidates(beams: Sequence[_Beam], log_probabilities_BV: Tensor, count: int) -> list[_Beam]:
    """The most probable continuations of a prompt's beams by one token, the best first."""
    V = log_probabilities_BV.size(-1)
    so_far = torch.tensor([[beam.score] for beam in beams], device=log_probabilities_BV.device)
    scores = (log_probabilities_BV[[beam.row for beam in beams]] + so_far).flatten()
    best = scores.topk(min(count, len(scores)))
    found = []
    for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        beam = beams[index // V]
        found.append(_Beam((*beam.ids, index % V), score, beam.row))
    return found


def _advance(search: _Search, candidates: Sequence[_Beam], options: GenerationOptions, ends: Ends) -> None:
    """Sort the candidates into beams that have ended and open ones, of which there are none if the search is over."""
    k, length = options.beams, len(candidates[0].ids)
    penalty = length**options.length_penalty
    ended = [ends(search.place, beam.ids) for beam in candidates]
    just_ended = [
        beam._replace(score=beam.score / penalty) for beam, end in zip(candidates[:k], ended, strict=False) if end
    ]
    search.ended = sorted([*search.ended, *just_ended], key=lambda beam: beam.score, reverse=True)[:k]
    search.open = [beam for beam, end in zip(candidates, ended, strict=True) if not end][:k]
    if len(search.ended) == k and search.open:
        # A beam only gets less probable, so this is the best that it can become unless the penalty is in favour of
        # longer ones: a rule of thumb then, which ends the search where waiting longer would seldom pay.
        beaten = search.open[0].score / penalty <= search.ended[-1].score
        if options.early_stopping or beaten:
            search.open = []
