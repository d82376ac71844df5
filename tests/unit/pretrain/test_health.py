"""What is made of a step that went wrong, and what people ask for by files."""

import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.engine import Status
from pretrain.health import Health, robust_zscore
from pretrain.recorder import SilentRecorder
from pretrain.run_dir import RunDir
from pretrain.state import TrainState
from pretrain.stop import Switches
from tests.small_run import small_config

losses = st.lists(st.floats(0.1, 20), min_size=3, max_size=50)


class Replicas:
    """An engine as far as its replicas are asked for."""

    def __init__(self, differing: list[tuple[str, list[int]]]) -> None:
        self.differing, self.asked = differing, 0

    def differing_replicas(self) -> list[tuple[str, list[int]]]:
        self.asked += 1
        return self.differing


def status(loss: float, grad_norm: float = 1.0) -> Status:
    return Status(loss, 8, grad_norm, False, False, False, 0.0, 0, [])


def health(*overrides: str, differing: list[tuple[str, list[int]]] | None = None) -> Health:
    engine: Any = Replicas(differing or [])
    saver: Any = None  # nothing is saved or loaded here
    return Health(small_config(*overrides), engine, saver, None, SilentRecorder())


@given(losses, st.floats(0.5, 8), st.floats(-5, 5))
def test_zscore_does_not_depend_on_the_unit(window: list[float], scale: float, shift: float) -> None:
    spread = statistics.median(abs(x - statistics.median(window)) for x in window)
    if spread > 0.1:
        moved = [x * scale + 10 + shift for x in window]
        assert robust_zscore(30 * scale + 10 + shift, moved) == pytest.approx(robust_zscore(30, window), rel=1e-6)


def test_zscore_of_a_normal_sample_is_in_standard_deviations() -> None:
    normal = statistics.NormalDist(3, 0.2)
    window = [normal.inv_cdf((i + 0.5) / 200) for i in range(200)]
    assert robust_zscore(4, window) == pytest.approx(5, rel=0.02)
    assert robust_zscore(4, [*window, 50, 60, 70]) == pytest.approx(5, rel=0.05)  # outliers hardly move it
    assert math.isfinite(robust_zscore(4, [3.0] * 20))


def test_a_spike_is_told_after_half_a_window_and_stays_out_of_it() -> None:
    judge, state = health("health={spike_zscore: 6, spike_window: 8}"), TrainState()
    assert [judge.spike(state, status(loss), False) for loss in (9, 3.0, 3.1, 2.9)] == [None] * 4
    assert judge.spike(state, status(3.05), False) is None
    found = judge.spike(state, status(5.0), False)
    assert found is not None
    assert found > 6
    assert state.losses == [9, 3.0, 3.1, 2.9, 3.05]
    for _ in range(20):
        judge.spike(state, status(3.0), False)
    assert len(state.losses) == 8


def test_a_step_that_was_skipped_is_no_spike() -> None:
    """Nor does it enter the window: asked for or not, it is the same step."""
    judge, state = health("health={spike_zscore: 6, spike_window: 8}"), TrainState(losses=[3.0, 3.1, 2.9, 3.0])
    assert judge.spike(state, status(math.nan), True) is None
    assert judge.spike(state, status(9.0), True) is None
    assert judge.spike(state, status(3.0), True) is None
    assert state.losses == [3.0, 3.1, 2.9, 3.0]


def test_spikes_are_not_looked_for_unasked() -> None:
    judge, state = health(), TrainState(losses=[3.0] * 100)
    assert judge.spike(state, status(99.0), False) is None


def test_too_many_skipped_steps_in_a_row_end_the_run() -> None:
    judge, state = health("health.max_skipped_steps=2"), TrainState(step=7)
    bad = status(math.nan)
    assert judge.unsound(state, bad) is None
    assert judge.unsound(state, bad) is None
    assert judge.unsound(state, status(3.0)) is None
    assert judge.unsound(state, bad) is None
    assert judge.unsound(state, status(3.0, grad_norm=math.inf)) is None
    state = TrainState.from_state_dict(state.state_dict())  # a resume does not forgive
    outcome = health("health.max_skipped_steps=2").unsound(state, bad)
    assert outcome is not None
    assert (outcome.status, outcome.exit_code, outcome.step) == ("failed", 1, 7)
    assert "loss nan with gradient norm 1.0, for the 3. time in a row" in outcome.message
    assert "health.max_skipped_steps=2" in outcome.message


def test_replicas_are_compared_when_due() -> None:
    judge = health("health.replica_check_every_steps=3", differing=[("head.weight", [0]), ("norm.weight", [0])])
    assert judge.unsound(TrainState(step=4), status(3.0)) is None
    outcome = judge.unsound(TrainState(step=6), status(3.0))
    assert outcome is not None
    assert outcome.exit_code == 1
    where = f"rank 0 on {os.uname().nodename} has other bits in head.weight and 1 other parameters"
    assert f"step 6: {where}" in outcome.message
    never = health("health.replica_check_every_steps=0", differing=[("head.weight", [0])])
    assert never.unsound(TrainState(step=6), status(3.0)) is None


def test_the_first_rank_sees_switch_files_and_only_the_wish_to_save_is_forgotten(
    tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(Switches, "EVERY_SECONDS", 0.05)
    run = RunDir(tmp_path)
    first, other = Switches(run, 0), Switches(run, 1)
    assert first.look() == (False, False)
    run.save_path.touch()
    assert first.look() == (False, False)  # not asked again so soon
    time.sleep(0.06)
    assert first.look() == (False, True)
    run.stop_path.touch()  # after it was looked: it is for the next time
    first.saving()
    assert not run.save_path.exists()
    assert run.stop_path.exists()
    assert first.look() == (False, False)
    time.sleep(0.06)
    assert first.look() == (True, False)
    first.saving()
    assert run.stop_path.exists()  # the wish to end outlives this attempt
    assert first.look() == (True, False)
    assert other.look() == (False, False)
