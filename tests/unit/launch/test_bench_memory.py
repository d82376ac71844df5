"""`steppe bench memory`: what is measured is what was accounted."""

import pytest

from launch.bench.memory import MODES, STAGES, run


def test_the_default_is_the_whole_table() -> None:
    assert list(STAGES) == [0, 1, 2, 3]
    assert MODES == ("none", "selective", "full")


@pytest.mark.slow
def test_measured_is_near_accounted() -> None:
    result = run(2, 2, 128, 256, 4, stages=[2], overrides=["precision=bf16"], modes=("none",))
    (setting,) = result["settings"]
    assert setting["zero_stage"] == 2
    assert setting["resident_bytes"] > 0
    assert setting["ratio"] == pytest.approx(1, abs=0.1)


def test_what_is_measured_one_by_one_is_not_overridden() -> None:
    """Said before anything is measured: an override may be what the first of them have anyway."""
    with pytest.raises(ValueError, match="--hidden-size 100 is no multiple of 64, the size of a head: choose one"):
        run(1, 1, 100, 8, 1, stages=[1], overrides=[])
    for override in (
        "precision=fp16",
        "parallel.zero_stage=2",
        "parallel={activation_checkpointing: none}",
        "data.sequence_length=9",
    ):
        with pytest.raises(ValueError, match="--set .*: what is measured has .*; leave it out"):
            run(1, 1, 64, 8, 1, stages=[1], overrides=[override])
