"""The trainer's small state."""

import pytest

from pretrain.data_stages import DataStage, Place
from pretrain.state import TrainState


def test_what_was_read_stays_read() -> None:
    """A range that is told late leaves out what of it is still to come."""
    state = TrainState(step=4, position=32, tokens=32 * 8)
    assert state.leave_out([(30, 34), (8, 16), (40, 44)]) == [(32, 34), (40, 44)]
    assert state.leave_out([(30, 34), (40, 44)]) == []
    state.advance(8, 64)
    assert state.position == 52
    assert state.leave_out([(30, 34), (40, 44)]) == []
    assert state.left_out == [(32, 34), (40, 44)]


def test_state_through_json() -> None:
    stages = [
        DataStage(Place(), {"web": 1.0}, 24, 8, ((100, 4),), {"web": 2}),
        DataStage(Place(3, 24, 576), {}, 48, 4, ()),
    ]
    state = TrainState(5, 40, 1344, stages, [(48, 56)], [3.5, 3.25], 1)
    assert TrainState.from_state_dict(state.state_dict()) == state


def test_stages_of_an_earlier_version_are_refused() -> None:
    saved = TrainState(step=1).state_dict() | {"stages": [{"start": 0, "weights": {"web": 1.0}}]}
    with pytest.raises(ValueError, match="of an earlier Steppe.*go on with that version, or start a new run"):
        TrainState.from_state_dict(saved)
