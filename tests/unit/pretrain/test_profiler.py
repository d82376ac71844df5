"""What profiles a rank: the steps after those that warm up, told under the rank's number, and nothing kept of it."""

import gc
import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.engine import agree, build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.meter import Meter
from pretrain.parallel_dims import ParallelDims
from pretrain.profile_request import WARM_UP_STEPS, ProfileRequest
from pretrain.profiler import NoProfiler, StepProfiler, open_profiler
from pretrain.recorder import SilentRecorder
from pretrain.run_dir import RunDir, read_json
from tests.small_run import rank_batches, small_config

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
CONFIG = small_config("precision=fp32")
ASKED = 2


class Told(SilentRecorder):
    """Keeps what it is told of profiles."""

    def __init__(self) -> None:
        self.profiles: list[tuple[str, dict[str, Any]]] = []

    def event(self, kind: str, say: str = "", **event: Any) -> None:
        if kind == "profile":
            self.profiles.append((say, event))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def profiled(run: RunDir, steps: int, rank: int = 0) -> tuple[StepProfiler, Told]:
    """So many steps of a rank, numbered from 11 on."""
    engine, told = TorchEngine(build_decoder(CONFIG, CPU, torch.float32), CONFIG, CPU), Told()
    meter, dims = Meter(CONFIG, CPU, told), replace(ParallelDims.of_this_rank(CONFIG), rank=rank)
    profiler = open_profiler(ProfileRequest(ASKED, (rank,)), run, engine, meter, told, dims)
    assert isinstance(profiler, StepProfiler)
    for number in range(11, 11 + steps):
        profiler.begin(number)
        profiler.at("forward")
        agree(engine.train_step(rank_batches(CONFIG, 0, 0, 1), 1e-3))
        profiler.at("validation")
        meter.tokens, meter.flops = meter.tokens + 100, meter.flops + 100_000
    profiler.end()
    return profiler, told


@pytest.mark.parametrize("steps", [WARM_UP_STEPS + ASKED, WARM_UP_STEPS + ASKED + 2])
def test_the_steps_that_were_asked_for(run: RunDir, steps: int) -> None:
    """Whether the run ends with them or goes on."""
    _, told = profiled(run, steps)
    facts = read_json(run.profiles / "step_14" / "regions.json")
    assert [step["step"] for step in facts["steps"]] == [14, 15]
    assert facts["mfu"]["flops_per_token"] == 1000
    training_ns = sum(step["wall_ns"] - step["host_ns"]["validation"] for step in facts["steps"])
    assert facts["mfu"]["tokens_per_second"] == pytest.approx(200 / (training_ns / 1e9))
    assert "traceEvents" in json.loads((run.profiles / "step_14" / "trace_rank_0.json").read_text())
    ((say, event),) = told.profiles
    assert say.startswith("profile of steps 14 to 15, rank 0 of 1, on ")
    assert event == {"step": 14, "path": str(run.profiles / "step_14")}


def test_fewer_if_the_run_ends_earlier(run: RunDir) -> None:
    profiled(run, WARM_UP_STEPS + 1)
    assert len(read_json(run.profiles / "step_14" / "regions.json")["steps"]) == 1


def test_none_if_it_ends_before_them(run: RunDir) -> None:
    _, told = profiled(run, WARM_UP_STEPS)
    assert told.profiles == [(f"nothing was profiled: the run ended before step {WARM_UP_STEPS + 1} of it", {})]
    assert not run.profiles.exists()


def test_another_rank_tells_its_own_log(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    profiled(run, WARM_UP_STEPS + ASKED, rank=3)
    assert [path.name for path in (run.profiles / "step_14").iterdir()] == ["trace_rank_3.json"]
    assert "profile of steps 14 to 15, rank 3 of 1, on " in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_does_not_end_the_run(run: RunDir) -> None:
    run.profiles.touch()
    _, told = profiled(run, WARM_UP_STEPS + ASKED + 1)
    assert "the profile could not be written: " in told.profiles[0][0]


def test_nothing_is_kept_of_the_trace(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can be gigabytes."""
    traces: list[weakref.ref[torch.profiler.profile]] = []
    start = torch.profiler.profile.start

    def noted(trace: torch.profiler.profile) -> None:
        traces.append(weakref.ref(trace))
        start(trace)

    monkeypatch.setattr(torch.profiler.profile, "start", noted)
    kept = profiled(run, WARM_UP_STEPS + ASKED + 1)
    gc.collect()
    assert [trace() for trace in traces] == [None]
    assert kept


def test_ranks_that_nobody_asks_for_are_not_profiled(run: RunDir) -> None:
    engine, told = TorchEngine(build_decoder(CONFIG, CPU, torch.float32), CONFIG, CPU), Told()
    dims = ParallelDims.of_this_rank(CONFIG)
    meter = Meter(CONFIG, CPU, told)
    for request, rank in ((None, 0), (ProfileRequest(1, (0, 2)), 1)):
        assert isinstance(open_profiler(request, run, engine, meter, told, replace(dims, rank=rank)), NoProfiler)
    assert isinstance(open_profiler(ProfileRequest(1, (2,)), run, engine, meter, told, dims), StepProfiler)
