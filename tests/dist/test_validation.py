"""Validation in the loop says what an evaluation of the checkpoint says, on any layout, and leaves training alone."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation.job import EvaluationJob, evaluate_job
from pretrain.evaluation.record import read_scores
from pretrain.evaluation.score import Score
from pretrain.evaluation.texts import texts_config
from tests.dist.harness import run_cases
from tests.dist.validation_cases import LAYOUTS
from tests.held_out_folder import held_out_texts, write_held_out
from tests.small_run import SEQUENCE_LENGTH

pytestmark = pytest.mark.slow
Results = Callable[[int], dict[str, Any]]


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_held_out(tmp_path_factory.mktemp("held_out"), held_out_texts(), shard_bytes=2000)


@pytest.fixture(scope="module")
def results(held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Of all layouts on so many ranks, which are started once."""

    @cache
    def on_ranks(world: int) -> dict[str, Any]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HELD_OUT", str(held_out))
            return run_cases("tests.dist.validation_cases", world, tmp_path_factory.mktemp(f"world{world}"))

    return on_ranks


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in LAYOUTS.items() for name in names])
def test_validation_is_an_evaluation_of_the_same_weights(
    results: Results, held_out: Path, tmp_path: Path, world: int, name: str
) -> None:
    found = results(world)[name]
    assert found["same"], "the validated run is not, in every bit, the one that was not, or ranks differ"
    job = EvaluationJob(found["path"], texts_config(data=[str(held_out)]), window=SEQUENCE_LENGTH)
    evaluate_job(job, tmp_path)
    documents = list(read_scores(tmp_path))
    expected = Score(
        sum(one.nats for one in documents),
        sum(one.tokens for one in documents),
        sum(one.bytes for one in documents),
        documents=len(documents),
    )
    *sums, held_out_documents = found["score"]
    score = Score(*sums, documents=held_out_documents)
    assert (score.tokens, score.bytes, score.documents) == (expected.tokens, expected.bytes, expected.documents)
    for measure in ("loss", "perplexity", "bits_per_byte"):
        assert score.measure(measure) == pytest.approx(expected.measure(measure), rel=1e-6)
