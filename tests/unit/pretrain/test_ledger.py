"""What the ledger says of each step is, token for token, what the loader serves in it."""

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.pack_files import plan_packing
from pretrain.config import RunConfig
from pretrain.data_plan import stage_at, timeline
from pretrain.data_stages import batches, order_stages
from pretrain.ledger import Ledger, check_order
from pretrain.state import TrainState
from tests.conftest import Corpus
from tests.small_run import small_config

pytestmark = pytest.mark.slow  # a corpus is prepared

STEPS = 30
STAGES = (
    "data.stages=[{from_step: 5, weights: {more: 1}, sequence_length: 48}, {from_step: 9, global_batch_size: 4}, "
    "{from_step: 14, weights: {code: 1, more: 2}, sequence_length: 24}]"
)


@pytest.fixture(scope="module")
def folders(corpus: Corpus) -> dict[str, Path]:
    """Data folders by source, packed for both lengths."""
    for folder in (corpus.train, corpus.held_out):
        for length in (24, 48):
            plan_packing(folder, length)
    return {"code": corpus.train, "more": corpus.held_out}


def config_of(folders: dict[str, Path], *overrides: str) -> RunConfig:
    sources = [{"name": name, "path": str(path)} for name, path in folders.items()]
    return small_config(f"data.sources={sources}", "model.vocab_size=600", *overrides)


def loaded(config: RunConfig, state: TrainState, tokens: dict[str, int], steps: int) -> list[np.ndarray]:
    """Input tokens of each step from the state on, as the loop gets them; the state goes on with it."""
    stages = timeline(config, state.stages, state.place, state.left_out, tokens)
    plan = batches(stages, state.place, state.left_out)
    loader = Loader(config.data, config.seed, order_stages(stages), 0, 1, 2, False, plan)
    found = []
    with closing(loader):
        for _ in range(steps):
            state.begin_stage(stage_at(config, state.place, tokens))
            rows = np.concatenate([batch.tokens for batch in next(loader)])
            found.append(rows)
            state.advance(len(rows), rows.size)
    return found


def manifests_of(config: RunConfig) -> dict[str, Manifest]:
    return {source.path: Manifest.load(source.path) for source in config.data.sources}


def ledger_of(config: RunConfig, state: TrainState) -> Ledger:
    return Ledger(config, state, manifests_of(config))


def told(ledger: Ledger, step: int) -> list[np.ndarray]:
    """The tokens of each sample of a step, by the ledger."""
    data = ledger.step(step)
    samples = ledger.samples(np.arange(data.first, data.first + data.size))
    return [np.concatenate([part.tokens for part in sample.parts]) for sample in samples]


CASES: dict[str, list[str]] = {
    "plain": [],
    "stages": [STAGES],
    "bins": [STAGES, "data.packing=best_fit"],
    "temperature": [STAGES, "data.temperature=3"],
    "left out": [STAGES, "skips.data=[[20, 27], [60, 61], [100, 130]]"],
    "ramp": ["batch.ramp=[[400, 2], [1500, 6]]"],
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_told_as_it_is_read(case: str, folders: dict[str, Path]) -> None:
    config = config_of(folders, *CASES[case])
    with closing(ledger_of(config, TrainState())) as before:
        state = TrainState()
        state.leave_out(config.skips.data)
        read = loaded(config, state, before.source_tokens, STEPS)
        check(before, read)
        # With the run's own record of the first half, too.
        half = TrainState()
        half.leave_out(config.skips.data)
        loaded(config, half, before.source_tokens, STEPS // 2)
        with closing(ledger_of(config, half)) as after:
            check(after, read)
            assert after.consumed(after.place(STEPS)) == before.consumed(before.place(STEPS))
        counted = sum(source.tokens or 0 for source in before.consumed(state.place).values())
        served = sum(len(row) for step in range(STEPS) for row in told(before, step + 1))
        assert (counted > served) if case == "left out" else (counted == served)


def check(ledger: Ledger, read: list[np.ndarray]) -> None:
    for step, rows in enumerate(read, start=1):
        samples = told(ledger, step)
        assert len(samples) == len(rows)
        for row, tokens in zip(rows, samples, strict=True):
            np.testing.assert_array_equal(row[: len(tokens)], tokens)


def test_ranges_that_are_told_late_leave_the_past_as_it_was(folders: dict[str, Path]) -> None:
    plain, late = config_of(folders), config_of(folders, "skips.data=[[6, 9], [30, 34], [70, 71]]")
    with closing(ledger_of(plain, TrainState())) as ledger:
        tokens = ledger.source_tokens
    state = TrainState()
    read = loaded(plain, state, tokens, 4)  # up to position 32, in the middle of a range
    state.leave_out(late.skips.data)
    record = TrainState.from_state_dict(state.state_dict())
    read += loaded(late, state, tokens, 8)
    for known in (record, state):
        with closing(ledger_of(late, known)) as ledger:
            check(ledger, read)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_the_end_is_that_of_the_schedule(unit: str, folders: dict[str, Path]) -> None:
    total: dict[str, Any] = {"steps": 20, "tokens": 5000}
    lengths = f"warmup_steps: null, total_steps: null, total_{unit}: {total[unit]}"
    config = config_of(folders, STAGES, f"schedule={{{lengths}}}")
    with closing(ledger_of(config, TrainState())) as ledger:
        end = ledger.end()
        assert (end.step if unit == "steps" else end.tokens) >= total[unit]
        assert ledger.place(end.step) == end
        assert ledger.place(end.step - 1).tokens < end.tokens
    assert f"by step {end.step} the run will have read" in check_order(config, TrainState(), manifests_of(config))


def test_a_cap_that_ends_the_data_is_found(folders: dict[str, Path]) -> None:
    capped = [{"name": name, "path": str(path), "max_epochs": 1} for name, path in folders.items()]
    config = config_of(folders, f"data.sources={capped}", "schedule.total_steps=100000")
    with pytest.raises(ValueError, match="max_epochs let the data end with sample .* in its 100,000 steps"):
        check_order(config, TrainState(), manifests_of(config))
