"""Which samples each step has, in closed form, against a walk step by step."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.order import Stage
from pretrain.config import RunConfig
from pretrain.data_plan import stage_at, timeline, with_stage
from pretrain.data_stages import (
    DataStage,
    Place,
    batches,
    next_position,
    order_stages,
    place_at_step,
    place_at_tokens,
    stage_of,
)
from pretrain.state import TrainState
from tests.small_run import small_config

STEPS = 40
WEB = {"web": 1.0}


def stage(size: int, ramp: tuple[tuple[int, int], ...] = (), T: int = 24, begin: Place | None = None) -> DataStage:
    return DataStage(begin or Place(), WEB, T, size, ramp)


def ranges() -> st.SearchStrategy[list[tuple[int, int]]]:
    pairs = st.tuples(st.integers(0, 200), st.integers(1, 40))
    return st.lists(pairs, max_size=4).map(lambda found: [(start, start + length) for start, length in found])


def ramps() -> st.SearchStrategy[tuple[tuple[int, int], ...]]:
    pairs = st.tuples(st.integers(1, 2000), st.integers(1, 12))
    return st.lists(pairs, max_size=3, unique_by=lambda pair: pair[0]).map(lambda found: tuple(sorted(found)))


def staged_config(changes: list[tuple[int, int | None, int | None]], unit: str, *overrides: str) -> RunConfig:
    """changes: (begin, sequence length or None, batch size or None)."""
    listed = [
        {f"from_{unit}": begin, "sequence_length": T, "global_batch_size": size, "weights": {"web": 1 + begin}}
        for begin, T, size in changes
    ]
    return small_config(
        "data.sources=[{name: web, path: none}]", f"data.stages={listed}".replace("None", "null"), *overrides
    )


@st.composite
def staged_configs(draw: st.DrawFn) -> RunConfig:
    unit, most = draw(st.sampled_from([("step", STEPS), ("tokens", 4000)]))
    begins = sorted(draw(st.sets(st.integers(0, most), max_size=4)))
    changes = [(b, draw(st.none() | st.integers(1, 50)), draw(st.none() | st.integers(1, 9))) for b in begins]
    ramp = [list(pair) for pair in draw(ramps())]
    return staged_config(changes, unit, f"batch.ramp={ramp}", f"batch.global_batch_size={draw(st.integers(1, 9))}")


def walked(config: RunConfig, state: TrainState, steps: int) -> list[tuple[Place, int, int, int]]:
    """(place, first position, size, T) of each step, as the loop goes: one at a time, asking the config anew."""
    seen = []
    for _ in range(steps):
        state.begin_stage(stage_at(config, state.place, {}))
        now = state.stages[-1]
        size = now.batch_size(state.tokens)
        seen.append((state.place, next_position(state.position, size, state.left_out), size, now.sequence_length))
        state.advance(size, size * now.sequence_length)
    return seen


@given(config=staged_configs(), left_out=ranges())
@settings(max_examples=200)
def test_the_plan_is_what_the_loop_does(config: RunConfig, left_out: list[tuple[int, int]]) -> None:
    looped = TrainState(left_out=left_out)
    steps = walked(config, looped, STEPS)
    foreseen = timeline(config, [], Place(), left_out, {})
    assert [known for known in foreseen if known.begin.step < STEPS] == looped.stages
    plan = list(itertools.islice(batches(foreseen, Place(), left_out), STEPS))
    assert plan == [(first, size) for _, first, size, _ in steps]
    for place, _, _, T in steps:
        known = stage_of(foreseen, place.step)
        assert known.sequence_length == T
        assert place_at_step(known, known.begin, left_out, place.step) == place
        assert place_at_tokens(known, known.begin, left_out, place.tokens) == place
    # From any step on, with what is on record by then, it is the rest of the same plan.
    for at in (1, STEPS // 2, STEPS - 1):
        place = steps[at][0]
        record = [known for known in looped.stages if known.begin.step <= at]
        rest = timeline(config, record, place, left_out, {})
        assert list(itertools.islice(batches(rest, place, left_out), STEPS - at)) == plan[at:]


@given(size=st.integers(1, 8), left_out=ranges())
def test_what_is_left_out_is_never_read(size: int, left_out: list[tuple[int, int]]) -> None:
    plan = list(itertools.islice(batches([stage(size)], Place(), left_out), 20))
    read = [position for first, count in plan for position in range(first, first + count)]
    assert read == sorted(set(read))
    assert not any(start <= position < end for position in read for start, end in left_out)
    gaps = set(range(read[-1])) - set(read)
    near = {p for start, end in left_out for p in range(start - size + 1, end)}
    assert gaps <= near  # nothing but what is left out, and what remains before it of a batch that would reach in


def test_batch_ramp() -> None:
    ramped = stage(8, ((96, 2), (288, 4)))
    assert list(itertools.islice(batches([ramped], Place(), ()), 6)) == [
        (0, 2),
        (2, 2),
        (4, 4),
        (8, 4),
        (12, 8),
        (20, 8),
    ]
    assert ramped.batch_size(10**9) == 8


def test_a_far_step_takes_no_walk() -> None:
    far = place_at_step(stage(8, ((10**12, 4),)), Place(), [(5, 9)], 10**15)
    assert far.step == 10**15


def test_a_stage_before_a_step_replaces_the_one_that_made_none() -> None:
    early, late = stage(8), replace(stage(4), begin=Place(5, 40, 960))
    assert with_stage([early], stage(8, begin=Place(3, 24, 576))) == [early]
    assert with_stage([early, late], replace(late, global_batch_size=2)) == [early, replace(late, global_batch_size=2)]
    assert with_stage([early, late], stage(8, begin=late.begin)) == [early]


def test_batch_sizes_are_nothing_to_the_order() -> None:
    begins = [Place(), Place(1, 8, 192), Place(2, 16, 384), Place(3, 24, 768)]
    stages = [stage(8), stage(4, begin=begins[1]), stage(4, T=48, begin=begins[2]), stage(2, T=48, begin=begins[3])]
    assert order_stages(stages) == [Stage(0, WEB, 24), Stage(16, WEB, 48)]


def test_a_cap_that_is_raised_is_another_stage_of_the_order() -> None:
    once, thrice = (small_config(f"data.sources=[{{name: web, path: none, max_epochs: {n}}}]") for n in (1, 3))
    first, later = stage_at(once, Place(), {}), Place(5, 40, 960)
    raised = stage_at(thrice, later, {})
    assert with_stage([first], stage_at(once, later, {})) == [first]
    assert TrainState.from_state_dict(TrainState(stages=[first, raised]).state_dict()).stages == [first, raised]
    T = first.sequence_length
    assert order_stages(with_stage([first], raised)) == [Stage(0, WEB, T, {"web": 1}), Stage(40, WEB, T, {"web": 3})]


def test_what_the_config_says_at_a_place() -> None:
    config = staged_config([(10, None, None), (20, 48, 2)], "step", "batch.ramp=[[96, 2]]")
    assert stage_at(config, Place(9), {}).weights == {"web": 1.0}
    middle, late = stage_at(config, Place(10), {}), stage_at(config, Place(99), {})
    assert (middle.weights, middle.sequence_length, middle.ramp) == ({"web": 11.0}, 24, ((96, 2),))
    assert (late.weights, late.sequence_length, late.global_batch_size, late.ramp) == ({"web": 21.0}, 48, 2, ())


def test_a_temperature_weighs_by_tokens() -> None:
    sources = "data={sources: [{name: web, path: w}, {name: code, path: c, weight: 2}], temperature: 2}"
    weights = stage_at(small_config(sources), Place(), {"web": 900, "code": 50}).weights
    assert weights["web"] / weights["code"] == pytest.approx(3.0)
    assert all(weight == float(f"{weight:.9g}") for weight in weights.values())
