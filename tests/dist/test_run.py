"""A run from the command line: trains, stops, dies, resumes, and is the same run."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.checkpoint.folder import list_checkpoints, newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.read import read_weights
from pretrain.recorder import STEP_SCALARS
from pretrain.run_dir import RunDir, read_events
from tests.conftest import Corpus, Steppe, command, environment

pytestmark = pytest.mark.slow
EXACT = ("step", "loss", "grad_norm", "lr", "tokens", "position")


def curve(run: Path) -> list[tuple[Any, ...]]:
    """What must repeat in every digit; of a step made twice, the later one."""
    steps = {event["step"]: event for event in read_events(RunDir(run).events_path, "step")}
    return [tuple(steps[step][key] for key in EXACT) for step in sorted(steps)]


def weights(run: Path) -> str:
    """A digest of the newest checkpoint's weights."""
    newest = newest_checkpoint(RunDir(run).checkpoints)
    assert newest is not None
    return hashlib.sha256(b"".join(w.numpy().tobytes() for w in read_weights(newest).values())).hexdigest()


@pytest.fixture(scope="module")
def undisturbed(steppe: Steppe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on 2 ranks in bf16, ZeRO 1."""
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings())
    return run


def test_a_run_is_a_folder(undisturbed: Path, corpus: Corpus) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names >= {
        *("config.yaml", "environment.json", "data.json", "events.jsonl", "outcome.json"),
        *("tokenizer.model", "checkpoints", "tensorboard", "logs"),
    }
    outcome = json.loads((undisturbed / "outcome.json").read_text())
    assert outcome == {"status": "done", "exit_code": 0, "step": 12, "message": "step 12: the run is complete"}
    recorded = json.loads((undisturbed / "environment.json").read_text())
    assert recorded["packages"]["torch"].startswith("2.13.0")
    assert recorded["ranks"] == 2
    assert [path.name for path in list_checkpoints(undisturbed / "checkpoints")] == ["step_00000008", "step_00000012"]
    assert (undisturbed / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    assert not list((undisturbed / "checkpoints").glob("*.tmp"))


def test_events_and_tensorboard_agree(undisturbed: Path) -> None:
    events = read_events(undisturbed / "events.jsonl", "step")
    assert [event["step"] for event in events] == list(range(1, 13))
    assert events[-1]["tokens"] == 12 * 8 * 32
    assert 0 < events[-1]["mfu"] < 1
    board = EventAccumulator(str(undisturbed / "tensorboard"))
    board.Reload()
    for key, name in STEP_SCALARS.items():
        shown = [scalar.value for scalar in board.Scalars(name)]
        assert shown == pytest.approx([event[key] for event in events], rel=1e-6), name
    validation = read_events(undisturbed / "events.jsonl", "evaluation")
    assert [event["step"] for event in validation] == [6, 12]
    assert len(board.Scalars("validation/held-out_loss_nats_per_token")) == 2


def test_it_learns(undisturbed: Path) -> None:
    losses = [event["loss"] for event in read_events(undisturbed / "events.jsonl", "step")]
    assert losses[0] == pytest.approx(6.4, abs=0.3)  # ln 600
    assert losses[-1] < losses[0] - 1


def test_stop_after_then_resume_is_exact(undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings(), "--stop-after", 5)
    assert "step 5: stopped early" in done.stderr
    assert len(curve(run)) == 5
    done = steppe("resume", run)
    assert "resumes after step 5" in done.stderr
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)
    done = steppe("resume", run)
    assert "step 12: the run has come that far already" in done.stderr


def test_deterministic_changes_no_digit_on_processors(
    undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """And the ranks really set it; see `pretrain/device.py`."""
    run = tmp_path / "run"
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings("deterministic=true"))
    recorded = [json.loads((path / "environment.json").read_text())["deterministic"] for path in (undisturbed, run)]
    assert recorded == [False, True]
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_a_profile_is_told_and_changes_no_digit(
    undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """All steps after those that warm up, with a validation, saves, and the run's end in them."""
    run = tmp_path / "run"
    words = ("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings())
    refused = steppe(*words, "--profile", 10, code=2)
    assert "--profile 10: from step 1 to the last one, step 12, there are 9 steps" in refused.stderr
    assert not run.exists()
    done = steppe(*words, "--profile", 9, "--profile-rank", 1)
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)

    folder = run / "profile" / "step_4"
    assert {path.name for path in folder.iterdir()} == {"regions.json", "trace_rank_1.json"}
    facts = json.loads((folder / "regions.json").read_text())
    assert [step["step"] for step in facts["steps"]] == list(range(4, 13))
    for step in facts["steps"]:
        assert sum(step["host_ns"].values()) == step["wall_ns"]
        assert (step["host_ns"]["validation"] > 0) == (step["step"] in (6, 12))
        assert all(nanoseconds for region, nanoseconds in step["host_ns"].items() if region != "validation")
    wall_ns = sum(step["wall_ns"] for step in facts["steps"])
    assert sum(region["host_ns"] for region in facts["regions"].values()) == wall_ns
    assert len(facts["operators"]) == 10
    traced = json.loads((folder / "trace_rank_1.json").read_text())["traceEvents"]
    spans = Counter(event["name"] for event in traced if event.get("cat") == "user_annotation")
    assert spans["steppe: step 12"] == 1
    assert spans["steppe: forward"] == spans["steppe: backward"] == 9 * 2  # micro-batches
    assert spans["steppe: validation"] == 2
    # Whatever computes has a region of its own.
    rest = [
        (event["tid"], event["ts"], event["ts"] + event["dur"])
        for event in traced
        if event.get("name") == "steppe: other"
    ]
    operators = [(event["tid"], event["ts"]) for event in traced if event.get("cat") == "cpu_op"]
    assert len(rest) == 9
    assert not [at for tid, at in operators if any(tid == of and begin <= at < end for of, begin, end in rest)]
    table = done.stderr[done.stderr.index("profile of steps 4 to 12") :]
    assert table.index("reduction") < table.index("aten::mm") < table.index("PaLM, appendix B")
    assert "profile of steps 4 to 12" in (run / "logs" / "rank_00000.log").read_text()
    (event,) = read_events(RunDir(run).events_path, "profile")
    assert (event["step"], event["path"]) == (4, str(folder))


def test_a_run_starts_from_the_weights_of_another(
    undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path
) -> None:
    """Also when it was stopped before its first checkpoint: then from the same ones again."""
    run = tmp_path / "run"
    settings = corpus.settings("precision=fp32", f"init_from={undisturbed}")
    done = steppe("train", "58m", "--run-dir", run, *settings, "--stop-after", 1)
    assert f"starts from the weights of {undisturbed / 'checkpoints' / 'step_00000012'}" in done.stderr
    first = curve(run)
    assert first[0][1] < curve(undisturbed)[0][1] - 0.5
    shutil.rmtree(run / "checkpoints")
    refused = steppe("resume", run, code=2)
    assert "holds no checkpoint, though the run has saved one at step 1: bring it back" in refused.stderr
    (run / "events.jsonl").unlink()  # as if it had been killed before it saved
    steppe("resume", run, "--stop-after", 1)
    assert curve(run) == first


def ranks_of(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The ranks under a launcher; each has a watchdog beneath it."""
    return psutil.Process(process.pid).children()


@pytest.fixture
def started(corpus: Corpus, tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A run of 12 steps on 2 ranks under way, past step 5 and with a checkpoint, which a thread writes meanwhile; its
    ranks are stopped (SIGSTOP) so that it stays there."""
    words = ("train", "58m", "--nproc", 2, "--run-dir", tmp_path / "run", *corpus.settings())
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, text=True, env=environment())
    events, checkpoints = tmp_path / "run" / "events.jsonl", tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 120

    def under_way() -> bool:
        return events.exists() and events.read_text().count('"step", ') >= 5 and bool(list_checkpoints(checkpoints))

    while time.monotonic() < deadline and not under_way():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    for rank in ranks_of(process):
        rank.suspend()
    yield process
    for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
        child.kill()
    process.kill()
    process.wait()


def test_sigkill_of_everything_then_resume_is_exact(
    started: "subprocess.Popen[str]", undisturbed: Path, steppe: Steppe, tmp_path: Path
) -> None:
    for process in [*psutil.Process(started.pid).children(recursive=True), psutil.Process(started.pid)]:
        process.kill()
    started.wait()
    run = tmp_path / "run"
    assert 5 <= len(curve(run)) < 12
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    steppe("resume", run)
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_finishes_the_step_checkpoints_and_exits_75(
    started: "subprocess.Popen[str]", undisturbed: Path, steppe: Steppe, tmp_path: Path, number: signal.Signals
) -> None:
    ranks = ranks_of(started)
    started.send_signal(number)
    time.sleep(2)  # the launcher passes it on; the ranks find it pending
    for rank in ranks:
        rank.resume()
    _, said = started.communicate(timeout=60)
    run = tmp_path / "run"
    steps = len(curve(run))
    assert started.returncode == 75, said
    assert f"step {steps}: stopped on request, checkpointed; go on with: steppe resume" in said
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert read_index(newest).step == steps < 12
    steppe("resume", run)
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)


def test_sigkill_of_one_rank_is_named_and_resumes_exactly(
    started: "subprocess.Popen[str]", undisturbed: Path, steppe: Steppe, tmp_path: Path
) -> None:
    (rank,) = [process for process in ranks_of(started) if process.environ().get("RANK") == "1"]
    others = [process for process in ranks_of(started) if process != rank]
    rank.kill()
    for other in others:
        other.resume()
    _, said = started.communicate(timeout=90)
    assert started.returncode == 1
    assert "steppe: rank 1 was killed by SIGKILL" in said.splitlines()[-1]
    steppe("resume", tmp_path / "run")
    assert curve(tmp_path / "run") == curve(undisturbed)


def test_the_launchers_death_stops_the_ranks(started: "subprocess.Popen[str]", tmp_path: Path) -> None:
    ranks = ranks_of(started)
    started.kill()
    started.wait()
    for rank in ranks:
        rank.resume()
    _, alive = psutil.wait_procs(ranks, timeout=60)
    assert not alive
    newest = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert newest is not None
    assert read_index(newest).step == len(curve(tmp_path / "run"))


def test_the_launchers_death_while_ranks_start_ends_them(corpus: Corpus, tmp_path: Path) -> None:
    """They would wait for each other at an address that is gone."""
    words = ("train", "58m", "--nproc", 2, "--run-dir", tmp_path / "run", *corpus.settings())
    launcher = subprocess.Popen(command(*words), stderr=subprocess.DEVNULL, env=environment())
    deadline = time.monotonic() + 120
    while len(ranks := ranks_of(launcher)) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.5)  # both have told the kernel what to do
    launcher.kill()
    launcher.wait()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_resume_on_another_layout_changes_nothing_but_rounding(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    """fp32: 2 ranks under ZeRO 1, then 1 rank under ZeRO 3 with other micro-batches; and all on 1 rank."""
    settings = corpus.settings("precision=fp32")
    steppe("train", "58m", "--nproc", 2, "--run-dir", tmp_path / "a", *settings, "--stop-after", 6)
    steppe(
        "resume", tmp_path / "a", "--nproc", 1, "--set", "parallel.zero_stage=3", "--set", "batch.micro_batch_size=4"
    )
    steppe("train", "58m", "--nproc", 1, "--run-dir", tmp_path / "b", *settings)
    torch.testing.assert_close(
        torch.tensor(curve(tmp_path / "a"), dtype=torch.float64),
        torch.tensor(curve(tmp_path / "b"), dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )


def test_what_a_resume_may_change(steppe: Steppe, corpus: Corpus, tmp_path: Path) -> None:
    run = tmp_path / "run"
    steppe("train", "58m", "--run-dir", run, *corpus.settings(), "--stop-after", 2)
    before = (run / "config.yaml").read_text()
    assert "set the fields themselves" in steppe("resume", run, "--set", "model.preset=58m", code=2).stderr
    refused = steppe("resume", run, "--set", "seed=5", code=2)
    assert "seed was 0 and would become 5" in refused.stderr
    assert "--allow seed" in refused.stderr
    assert "optimizer.name was 'adamw'" in steppe("resume", run, "--set", "optimizer.name=muon", code=2).stderr
    assert (run / "config.yaml").read_text() == before
    # What is insisted on and then fails leaves no trace.
    wider = ("--set", "model.ffn_size=64", "--allow", "model.ffn_size")
    assert "holds shape" in steppe("resume", run, *wider, code=2).stderr
    assert (run / "config.yaml").read_text() == before
    # Recorded: a learning rate, and a second source, which is a stage of the mixture from position 16 on.
    sources = f"data.sources=[{{name: code, path: '{corpus.train}'}}, {{name: more, path: '{corpus.held_out}'}}]"
    steppe("resume", run, "--set", "optimizer.lr=5e-3", "--set", sources, "--stop-after", 4)
    *_, resumed = read_events(run / "events.jsonl", "resume")
    assert resumed["changes"]["optimizer.lr"] == [0.01, 0.005]
    assert read_events(run / "events.jsonl", "stage")[-1]["position"] == 16
    newest = newest_checkpoint(run / "checkpoints")
    assert newest is not None
    assert [stage["begin"]["position"] for stage in read_index(newest).trainer["stages"]] == [0, 16]
    # And back to one source; the first one's consumption goes on where it was.
    steppe("resume", run, "--set", f"data.sources=[{{name: code, path: '{corpus.train}'}}]", "--stop-after", 6)
    assert read_events(run / "events.jsonl", "stage")[-1]["position"] == 32
    # A source that was left out may come back only as it was.
    other = f"data.sources=[{{name: more, path: '{corpus.train}'}}]"
    assert "data source more is not what" in steppe("resume", run, "--set", other, code=2).stderr
    # Other bytes under a known name are refused.
    swapped = f"data.sources=[{{name: code, path: '{corpus.held_out}'}}]"
    assert "--allow manifest" in steppe("resume", run, "--set", swapped, code=2).stderr


def test_a_torn_checkpoint_is_passed_over(steppe: Steppe, corpus: Corpus, undisturbed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    torn = run / "checkpoints" / "step_00000012" / "rank-00001.safetensors"
    os.truncate(torn, torn.stat().st_size - 1)
    done = steppe("resume", run)
    assert "resumes after step 8" in done.stderr
    assert "rank-00001.safetensors has" in done.stderr
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)
