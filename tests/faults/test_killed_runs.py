"""Runs of the command line, killed in the middle of a save: the resumed curve is the undisturbed one, bit for bit."""

from pathlib import Path

import pytest

from tests.conftest import Corpus, Steppe
from tests.dist.test_run import curve, weights
from tests.faults.faulty_run import Fault, faulty
from tests.faults.states import names_in

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        pytest.param(Fault(1, "fsync step_00000008.tmp/rank-00001.safetensors", "kill"), 4, id="a rank, in its shard"),
        pytest.param(
            Fault(0, "open step_00000008.tmp/index.json.tmp", "kill all"), 4, id="all, between shards and index"
        ),
        pytest.param(
            Fault(0, "replace step_00000004 step_00000004.tmp", "kill all"),
            8,
            id="all, while pruning",
            marks=pytest.mark.long,
        ),
    ],
)
def test_killed_while_saving(
    undisturbed: Path, steppe: Steppe, corpus: Corpus, tmp_path: Path, fault: Fault, found: int
) -> None:
    run = tmp_path / "run"
    settings = corpus.settings("checkpoint={every_steps: 4, keep: 1}")
    said = faulty([fault], "train", "58m", "--nproc", 2, "--run-dir", run, *settings, code=1)
    assert "was killed by SIGKILL" in said.splitlines()[-1]
    assert f"resumes after step {found} from" in steppe("resume", run).stderr
    assert curve(run) == curve(undisturbed)
    assert weights(run) == weights(undisturbed)
    assert names_in(run / "checkpoints") == ["latest", "step_00000012"]
