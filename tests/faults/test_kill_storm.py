"""A short kill storm, and what a long one stands on: its plan, its watching and its verdict."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pretrain.layout import check_layout
from pretrain.recipe import load_config
from tests.conftest import Corpus
from tests.faults.kill_storm import check, run_storm
from tests.faults.storm_attempt import Attempt, EventTail, StormError
from tests.faults.storm_curves import compare
from tests.faults.storm_plan import MODEL_SETTINGS, SETTINGS, Model, Setup, draw_plan, undisturbed_setups
from tests.faults.storm_report import Report, print_report
from tests.small_run import RECIPE

SHORT_SEED = 2197  # of everything within four kills, on 1 and 2 ranks
MODELS: tuple[Model, ...] = ("dense", "moe")


def curve(offset: float = 0.0, steps: int = 20, **changes: Any) -> dict[int, dict[str, Any]]:
    """A run whose losses lie beside another's by `offset` at step 7; `changes` are to step 9."""
    even = {"grad_norm": 1.0, "lr": 1.0}
    events = {
        step: {"loss": 4.0 + offset * (step == 7), "position": 8 * step, "tokens": 256 * step, **even}
        for step in range(1, steps + 1)
    }
    events[9] = events[9] | changes
    return events


def storm_settings(corpus: Corpus, model: Model) -> list[str]:
    return corpus.settings(*SETTINGS, *MODEL_SETTINGS[model])


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_is_a_function_of_its_seed(model: Model) -> None:
    kills, last = draw_plan(40, 3, model)
    assert (kills, last) == draw_plan(40, 3, model)
    assert draw_plan(7, 3, model)[0] == kills[:7]
    assert draw_plan(40, 4, model)[0] != kills


@pytest.mark.parametrize("model", MODELS)
def test_a_plan_has_something_of_everything(model: Model) -> None:
    kills, _ = draw_plan(200, 0, model)
    assert {kill.setup.ranks for kill in kills} == {1, 2, 4}
    assert {kill.setup.parallel.zero_stage for kill in kills} == {0, 1, 2, 3}
    assert {kill.setup.parallel.offload_parameters for kill in kills} == {"none", "cpu"}
    for axis in ("tensor", "sequence", *(["expert"] if model == "moe" else [])):
        assert {getattr(kill.setup.parallel, axis) for kill in kills} == {1, 2}
    assert min(Counter(kill.moment for kill in kills).values()) >= 10
    assert min(Counter(kill.target for kill in kills).values()) >= 20
    assert {kill.setup.save_every for kill in kills} == {1, 2, 3}


@pytest.mark.parametrize("seed", range(40))
def test_the_first_kill_waits_until_the_folder_is_a_run(seed: int) -> None:
    assert draw_plan(1, seed, "dense")[0][0].moment != "starting"


@pytest.mark.parametrize("model", MODELS)
def test_every_layout_is_possible(model: Model, tmp_path: Path) -> None:
    corpus = Corpus(*(tmp_path / name for name in ("tokenizer.model", "train", "held_out", "text")))
    kills, last = draw_plan(200, 0, model)
    setups: set[Setup] = {last, *undisturbed_setups(model), *(kill.setup for kill in kills)}
    for setup in setups:
        words = [word for word in [*storm_settings(corpus, model), *setup.words()[2:]] if word != "--set"]
        check_layout(load_config(RECIPE, words), setup.ranks)
    assert len({setup.name for setup in setups}) >= 17


def test_rounding_passes_and_more_does_not() -> None:
    assert compare(curve(2.9e-6), curve(), curve(1e-6), 20).ok
    comparison = compare(curve(-3.1e-6), curve(), curve(1e-6), 20)
    assert not comparison.ok
    assert comparison.loss is not None
    assert comparison.loss.at_step == 7
    assert comparison.loss.storm == pytest.approx(3.1e-6)


def test_the_last_digit_passes_where_undisturbed_runs_agree() -> None:
    digit = 2.0**-21  # of an fp32 number from 4 to 8
    assert compare(curve(3 * digit), curve(), curve(), 20).ok
    assert not compare(curve(3.1 * digit), curve(), curve(), 20).ok


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_fails(loss: float) -> None:
    assert not compare(curve(loss=loss), curve(), curve(1e-6), 20).ok
    assert not compare(curve(loss=loss), curve(loss=loss), curve(1e-6, loss=loss), 20).ok


def test_a_wrong_norm_fails() -> None:
    assert compare(curve(grad_norm=1.00001), curve(), curve(1e-6), 20).ok
    assert not compare(curve(grad_norm=1.001), curve(), curve(1e-6), 20).ok


@pytest.mark.parametrize(
    ("changes", "word"), [({"position": 80}, "position"), ({"tokens": 2560}, "tokens"), ({"lr": 0.99}, "lr")]
)
def test_other_data_or_another_schedule_fails(changes: dict[str, Any], word: str) -> None:
    comparison = compare(curve(**changes), curve(), curve(1e-6), 20)
    assert not comparison.ok
    assert comparison.problems == (
        f"storm: {word} of step 9 is {changes[word]}, not {curve()[9][word]} (1 steps in all)",
    )


def test_a_step_that_is_missing_or_too_many_fails() -> None:
    holed = {step: event for step, event in curve().items() if step != 5}
    assert compare(holed, curve(), curve(), 20).problems == ("storm: step 5 is missing (1 in all)",)
    assert compare(curve(steps=22), curve(), curve(), 20).problems == ("storm: step 21 is beyond the end (2 in all)",)


def test_only_new_and_whole_lines_are_events(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"type": "step", "step": 1}\n{"type": "st')
    tail = EventTail(path)
    with open(path, "a") as file:
        file.write('\n{"type": "start", "step": 0}\n{"type": "step", "step": 2}\n{"type": "step"')
        file.flush()
        tail.read()
        assert [event["step"] for event in tail.events] == [0, 2]
        file.write(', "step": 3}\n')
    tail.read()
    assert [event["step"] for event in tail.of("step")] == [2, 3]


def test_an_attempt_that_ends_by_itself_is_told(tmp_path: Path) -> None:
    with (
        Attempt(["resume", tmp_path / "none"], tmp_path / "events.jsonl", tmp_path / "log") as attempt,
        pytest.raises(StormError, match="by itself with exit code 2 .* is not a run"),
    ):
        attempt.await_events("start", 1, 60)


def test_wrong_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--kills 0: give a number of 1 or more"):
        check(0, None)
    (tmp_path / "thing").touch()
    with pytest.raises(ValueError, match="is not empty"):
        check(1, tmp_path)


def weathered(report: Report, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    """Run a storm; all that it promises holds."""
    run_storm(report, corpus)
    print_report(report)
    assert report.ok, f"{capsys.readouterr().out}\nrepeat with: {report.repeat}"
    assert json.loads(json.dumps(report.as_dict()))["ok"] is True
    assert len(report.struck) == report.kills


def test_the_short_storm_has_something_of_everything() -> None:
    kills, _ = draw_plan(4, SHORT_SEED, "dense")
    assert {kill.target for kill in kills} == {"all", "one rank", "launcher"}
    assert {kill.moment for kill in kills} == {"starting", "training", "saving"}
    assert {kill.setup.ranks for kill in kills} == {1, 2}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_storm(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weathered(Report("dense", SHORT_SEED, 4, tmp_path / "storm"), corpus, capsys)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("model", MODELS)
def test_a_longer_storm(model: Model, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weathered(Report(model, 7, 20, tmp_path / "storm"), corpus, capsys)
