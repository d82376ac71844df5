"""The result of an evaluation, as `steppe eval --json` prints it, out of the folder that the evaluation leaves."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.evaluation.bootstrap import REPLICATES, SEED, Sums, percentiles, resample
from pretrain.evaluation.compare import check_same_documents, comparison
from pretrain.evaluation.conventions import comparison_conventions, conventions, titled
from pretrain.evaluation.folder import Facts, read_facts
from pretrain.evaluation.record import read_positions, read_scores
from pretrain.evaluation.score import LEVEL, MEASURES, Measure, Score


def result(folder: Path, compared: Path | None = None) -> dict[str, Any]:
    """What a finished evaluation says; with `compared`, the folder of another one of the same documents, also by how
    much the two differ.

    Memory is bounded by the domains, never by the documents; "tasks" is left to those who run benchmarks.

    Raises ValueError for a folder without a finished evaluation, for a domain without text, and for a comparison of
    other documents, naming the first that differs.
    """
    facts = read_facts(folder)
    resampled = resample(read_scores(folder))
    scores = {name: sums.score for name, sums in resampled.by_domain.items()}
    for name, score in scores.items():
        _check(name, score)
    sentences = conventions(facts, scores)
    difference = None
    if compared is not None:
        other_facts, other = read_facts(compared), resample(read_scores(compared))
        check_same_documents(folder, resampled, compared, other)
        same_tokenizer = facts.tokenizer == other_facts.tokenizer
        difference = {
            "with": titled(other_facts),
            "same_tokenizer": same_tokenizer,
            **comparison(resampled, other, same_tokenizer),
        }
        sentences += comparison_conventions(facts, other_facts)
    return {
        **_of_facts(facts),
        **_measured(resampled.whole),
        "by_domain": {name: _measured(sums) for name, sums in resampled.by_domain.items()},
        "by_position": [
            {"from": range_.first, "to": range_.last, "tokens": range_.tokens, "loss": range_.nats / range_.tokens}
            for range_ in read_positions(folder)
        ],
        "compared": difference,
        "conventions": sentences,
        "tasks": None,
        "cost": asdict(facts.cost),
    }


def _of_facts(facts: Facts) -> dict[str, Any]:
    names = ("model", "step", "precision", "offload", "window", "stride", "start_token", "eos_scored")
    return {**{name: getattr(facts, name) for name in names}, "passed_over": list(facts.passed_over)}


def _check(name: str, score: Score) -> None:
    if not score.bytes or not score.tokens:
        raise ValueError(
            f"{name}: nothing to measure in {score.documents} documents, {score.bytes} bytes, {score.tokens} tokens: "
            "name texts that hold something"
        )


def _measured(sums: Sums) -> dict[str, Any]:
    """Measures, counts and the interval of each measure, which is None of a single document."""
    return {**sums.score.as_dict(), "interval": _interval(sums) if sums.score.documents > 1 else None}


def _interval(sums: Sums) -> dict[str, Any]:
    bounds = {name: _bounds(sums, measure) for name, measure in MEASURES.items()}
    return {"level": LEVEL, "replicates": REPLICATES, "seed": SEED, **bounds}


def _bounds(sums: Sums, measure: Measure) -> list[float] | None:
    """None where a bound is no number, as a perplexity per word may be."""
    found = [measure.of(nats) for nats in percentiles(sums.nats_per(measure.unit)) or ()]
    return found if found and all(map(math.isfinite, found)) else None
