"""Events that survive a crash, and progress for a person, on a terminal and elsewhere."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.evaluation.score import Score
from pretrain.progress import StepProgress
from pretrain.recorder import RunRecorder
from pretrain.run_dir import RunDir, event_line, open_events, read_events

STEP = {
    "loss": 0.1 + 0.2,
    "grad_norm": 1 / 3,
    "lr": 1e-3,
    "tokens": 4096,
    "tokens_per_second": 1e4,
    "mfu": 0.5,
    "step_seconds": 0.4,
    "data_seconds": 0.0,
    "memory_bytes": 7,
    "tokens_in_step": 4096,
}


def test_events_keep_every_digit_and_a_torn_line_is_left_out(tmp_path: Path) -> None:
    recorder = RunRecorder(RunDir(tmp_path), 0, 10, None)
    recorder.step(step=1, **STEP)
    recorder.validation(1, 4096, {"a": Score(nats=6.0, tokens=2, bytes=4, documents=1)}, 0.1)
    recorder.close()
    with open(tmp_path / "events.jsonl", "a") as events:
        events.write(event_line("step", {**STEP, "step": 2})[:50])
    (step,) = read_events(tmp_path / "events.jsonl", "step")
    assert (step["loss"], step["grad_norm"]) == (0.1 + 0.2, 1 / 3)
    assert [event["type"] for event in read_events(tmp_path / "events.jsonl")] == ["step", "evaluation"]


def test_validation_is_told_in_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorder = RunRecorder(RunDir(tmp_path), 0, 10, None)
    recorder.validation(
        3, 4096, {"a b": Score(nats=6.0, tokens=2, bytes=4, documents=1), "lost": Score(math.nan, 2, 4, 1)}, 0.5
    )
    recorder.close()
    (event,) = read_events(tmp_path / "events.jsonl", "evaluation")
    assert (event["step"], event["tokens"], event["seconds"]) == (3, 4096, 0.5)
    counts = {"tokens": 2, "bytes": 4, "documents": 1}
    measures = {"loss": 3.0, "perplexity": math.exp(3), "bits_per_byte": 1.5 / math.log(2)}
    assert event["by_source"]["a b"] == measures | counts
    assert math.isnan(event["by_source"]["lost"]["loss"])
    assert "step 3: validation a b 3.0000 (2.1640 bits/byte), lost nan (nan bits/byte)" in capsys.readouterr().err
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = {name: board.Scalars(f"validation/a b_{name}") for name in ("perplexity", "bits_per_byte")}
    assert {name: (one.step, one.value) for name, (one,) in shown.items()} == {
        "perplexity": (3, pytest.approx(math.exp(3))),
        "bits_per_byte": (3, pytest.approx(1.5 / math.log(2))),
    }


def test_a_line_that_is_torn_or_no_event_takes_no_other_along(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for kind in ("a", "b"):
        with open_events(run) as events:
            events.write(event_line(kind, {}))
            events.write('{"type": "torn')
    with open_events(run) as events:
        events.write('[1]\n{"type": "no time"}\n')
    assert [event["type"] for event in read_events(run.events_path)] == ["a", "b"]


def shown(terminal: bool, **lengths: int | None) -> str:
    out = io.StringIO()
    progress = StepProgress(
        0, lengths.get("steps"), lengths.get("tokens"), Console(file=out, force_terminal=terminal, width=150)
    )
    for step in range(1, 4):
        progress.step({**STEP, "step": step, "tokens": step * 4096})
    progress.say("saved")
    progress.close()
    return out.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    first, last, saved = shown(terminal=False, steps=3).splitlines()
    assert first.startswith("step 1/3  loss 0.3000  lr 1.00e-03  10,000 tok/s  MFU 50.0%  grad norm 0.333")
    assert last.startswith("step 3/3")
    assert saved == "saved"


def test_the_time_left_is_that_of_the_steps_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which compiles: 100 s, and the others 10 s each."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("pretrain.progress.time", SimpleNamespace(monotonic=lambda: clock.now))
    out = io.StringIO()
    shown_steps = StepProgress(5, 20, None, Console(file=out, force_terminal=False, width=150))
    for step in range(6, 10):
        clock.now += 100 if step == 6 else 10
        shown_steps.step({**STEP, "step": step, "tokens": step * 4096})
    first, *others = out.getvalue().splitlines()
    assert first.endswith("grad norm 0.333")
    assert [line.rpartition("  ")[2] for line in others] == ["130 s left", "120 s left", "110 s left"]


def test_a_bar_on_a_terminal() -> None:
    bar = shown(terminal=True, steps=3)
    assert "3/3" in bar
    assert "loss 0.3000" in bar


def test_what_is_printed_beside_a_bar_stays_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    """Which is a rank's log: the bar would take it to the terminal."""
    out = io.StringIO()
    progress = StepProgress(0, 3, None, Console(file=out, force_terminal=True, width=150))
    print("for the log")
    progress.close()
    assert capsys.readouterr().out == "for the log\n"
    assert "for the log" not in out.getvalue()


def test_a_run_counted_in_tokens_shows_its_length_in_steps() -> None:
    assert "step 1/10" in shown(terminal=False, tokens=40960)


def test_event_line_is_one_line() -> None:
    line = event_line("note", {"text": "a\nb"})
    assert line.count("\n") == 1
    assert json.loads(line)["text"] == "a\nb"


def test_expert_load_is_shown_expert_by_expert(tmp_path: Path) -> None:
    recorder = RunRecorder(RunDir(tmp_path), 0, 10, None)
    for step in (1, 2, 100):
        recorder.step(step=step, **STEP, expert_load={2: [6, 0, 2]})
    recorder.close()
    assert [e["expert_load_max_over_mean"] for e in read_events(tmp_path / "events.jsonl", "step")] == [{"2": 2.25}] * 3
    loads = read_events(tmp_path / "events.jsonl", "expert_load")
    assert [(load["step"], load["pairs"]) for load in loads] == [(1, {"2": [6, 0, 2]}), (100, {"2": [6, 0, 2]})]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert board.Scalars("experts/layer_2_max_over_mean")[0].value == 6 * 3 / 8
    shown_load = board.Histograms("experts/layer_2_pairs_by_expert")[-1]
    assert list(shown_load.histogram_value.bucket) == [6, 0, 2]
