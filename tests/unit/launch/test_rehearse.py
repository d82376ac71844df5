"""A rehearsal without its ranks: what is refused before anything starts, what is compared, and what is reported."""

import math
from pathlib import Path
from typing import Any

import pytest

from launch.commands.train import train
from launch.rehearsal_report import Report, Stage
from launch.rehearse import TOLERANCES, check_done, figures, library, relative, with_sources
from launch.run_folder import recipe_path
from launch.shrink import rehearsal_config
from pretrain.config import RunConfig
from pretrain.layout import Layout
from pretrain.outcome import Outcome
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir, event_line

OK, FAILED = Stage("train", 0, "3 steps", 1.0), Stage("resume", 1, "rank 1 was killed by SIGKILL", 1.0)


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(recipe_path(name), overrides)


def report(config: RunConfig, world: int, *stages: Stage, has_data: bool = False) -> Report:
    small, ranks = rehearsal_config(config, world)
    return Report(config, small, Layout.of(config, world), Layout.of(small, ranks), has_data, list(stages), None)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"nodes": 2}, "--nodes does not go without --rehearse"),
        ({"gpus_per_node": 2}, "--gpus-per-node does not go without --rehearse"),
        ({"ranks": 2}, "--ranks does not go without --rehearse"),
        ({"as_json": True}, "--json does not go without --rehearse"),
        ({"rehearse": True, "nproc": 2}, "--nproc does not go with --rehearse"),
        ({"rehearse": True, "stop_after": 2}, "--stop-after does not go with --rehearse"),
        ({"profile_rank": [1]}, "--profile-rank 1 does not go without --profile"),
        ({"rehearse": True, "profile": 2}, "--profile does not go with --rehearse"),
        ({"rehearse": True, "ranks": 2, "nodes": 1}, "--ranks says what --nodes and --gpus-per-node say"),
        ({"rehearse": True, "nodes": 0}, "--nodes 0: give a number of 1 or more"),
        ({"rehearse": True, "ranks": -1}, "--ranks -1: give a number of 1 or more"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train("58m", **options)


@pytest.mark.parametrize(
    ("overrides", "ranks", "said"),
    [
        (["parallel.tensor=3"], 3, "parallel.tensor=3 does not divide model.num_heads=8: use one of 1, 2"),
        (["parallel.tensor=4"], 6, "does not divide 6 ranks: use a multiple of 4 ranks"),
        (["batch.global_batch_size=20"], 4, "batch.global_batch_size=20 is not a multiple of"),
        (
            ["deepspeed.zero_optimization.stage=2"],
            4,
            "zero_optimization.stage=2 contradicts .* set parallel.zero_stage",
        ),
    ],
)
def test_an_impossible_run_is_refused_before_anything_starts(
    overrides: list[str], ranks: int, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "rehearsal"
    with pytest.raises(ValueError, match=said):
        train("58m", run_dir=folder, overrides=overrides, rehearse=True, ranks=ranks)
    assert not folder.exists()


def test_data_that_are_here_must_be_whole(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    sources = f"data.sources=[{{name: mine, path: '{tmp_path / 'data'}'}}]"
    with pytest.raises(ValueError, match="is unfinished or no data folder"):
        train("58m", overrides=[sources], rehearse=True, ranks=2)


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="exists and is not empty: choose another --run-dir"):
        train("58m", run_dir=tmp_path, rehearse=True, ranks=2)


def test_the_exit_code_is_that_of_the_stage_that_failed() -> None:
    config = recipe("58m")
    assert report(config, 2, OK).exit_code == 0
    assert report(config, 2, OK, FAILED).exit_code == 1
    assert report(config, 2, OK, Stage("train", 2, "shard x is damaged", 1.0)).exit_code == 2
    assert report(config, 2, Stage("train", 75, "stopped on request", 1.0)).exit_code == 75
    assert report(config, 2, OK, FAILED).as_dict()["ok"] is False


def test_what_is_reported_as_different() -> None:
    config = recipe("70b", "parallel={tensor: 8, sequence: 2, compile: true, zero_stage: 1}", "optimizer.name=muon")
    told = report(config, 512, OK)
    rows = {key: (full, rehearsed) for key, full, rehearsed in told.differences}
    assert rows["ranks"] == (512, 8)
    assert rows["data parallelism"] == (32, 2)
    assert rows["parallel.tensor"] == (8, 2)
    assert rows["model.hidden_size"] == (8192, 64)
    assert not any(key.endswith("sources") for key in rows)
    said = " ".join(told.not_rehearsed)
    for words in ("steppe plan", "gloo", "Data: data/train", "tensor 2 for 8", "Muon", "parallel.compile"):
        assert words in said
    assert "sequence" not in said
    full = {"world": 512, "data": 32, "tensor": 8, "sequence": 2, "expert": 1, "kv_copies": 1}
    assert told.as_dict()["layout"]["full"] == full


def test_what_a_small_run_leaves_unrehearsed() -> None:
    """Of a recipe that runs on a laptop only the device and the sizes."""
    told = report(recipe("demo"), 2, OK, has_data=True)
    assert len(told.not_rehearsed) == 2
    assert not {"ranks", "data parallelism"} & {key for key, _, _ in told.differences}


def test_a_precision_that_this_processor_lacks_is_told() -> None:
    config = recipe("demo", "precision=fp16")
    small, _ = rehearsal_config(config.model_copy(update={"precision": "bf16"}), 2)
    told = Report(config, small, Layout(2), Layout(2), True, [OK], None)
    assert "precision=fp16: this processor does not compute in it; bf16 took its place." in told.not_rehearsed
    assert ("precision", "fp16", "bf16") in told.differences


def test_how_far_numbers_are_apart() -> None:
    assert relative(2.0, 2.0) == 0
    assert relative(2.02, 2.0) == pytest.approx(0.01)
    assert relative(math.inf, math.inf) == 0  # an fp16 step that both skip
    for pair in ((math.nan, 2.0), (2.0, math.nan), (math.nan, math.nan), (2.0, math.inf), (math.inf, 2.0)):
        assert relative(*pair) == math.inf
    assert TOLERANCES.keys() == {"fp32", "bf16", "fp16"}


def test_a_curve_is_read_from_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    events: list[tuple[str, dict[str, Any]]] = [
        ("step", {"step": 1, "loss": 3.0, "grad_norm": 1.0}),
        ("step", {"step": 2, "loss": 2.0, "grad_norm": 0.5}),
        ("evaluation", {"step": 2, "by_source": {"a": {"loss": 2.5}, "b": {"loss": 2.25}}}),
    ]
    run.events_path.write_text("".join(event_line(*event) for event in events))
    assert figures(run) == {"losses": [3.0, 2.0, 2.5, 2.25], "gradient norms": [1.0, 0.5]}


def test_data_in_place_of_the_recipes() -> None:
    config = recipe("demo", "data.sources=[{name: a, path: x, weight: 2.0}, {name: b, path: y}]")
    changed = with_sources(config, Path("made"), Path("held"))
    assert [(s.name, s.path, s.weight) for s in changed.data.sources] == [("a", "made", 2.0), ("b", "made", 1.0)]
    assert [(s.name, s.path) for s in changed.evaluation.sources] == [("held-out", "held")]
    with pytest.raises(ValueError, match="does not exist: rehearse with a Python that has the sources"):
        library("no_such_package")


def test_an_attempt_that_did_not_end_well() -> None:
    check_done(Outcome("done", 0, 3, "step 3: stopped early as --stop-after asked"))
    with pytest.raises(Exception, match="shard x is damaged") as caught:
        check_done(Outcome("failed", 2, 3, "shard x is damaged"))
    assert caught.value.exit_code == 2  # type: ignore[attr-defined]
