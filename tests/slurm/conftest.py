"""A virtual cluster for the tests of this folder, which are skipped, or fail (`lacking`), where none can be started."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Corpus, Steppe
from tests.required import lacking
from tests.slurm.cluster import Cluster, why_not

NODES = 4
STEPS = 40


@pytest.fixture(scope="session")
def slurm() -> None:
    """A virtual cluster can be started here."""
    reason = why_not()
    if reason is not None:
        lacking(reason)


@pytest.fixture(scope="session")
def started_cluster(slurm: None) -> Iterator[Cluster]:
    """Four nodes with one GPU each, in name only."""
    with Cluster(NODES) as cluster:
        yield cluster


@pytest.fixture
def cluster(started_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all its nodes and no jobs, whatever the test before has done to it."""
    yield started_cluster
    started_cluster.restore()


@pytest.fixture(scope="session")
def settings(corpus: Corpus) -> list[str]:
    """`--set` words of the run that faults befall: 40 steps, saved every fifth, on 2 nodes of one rank each."""
    return corpus.settings(
        f"schedule={{warmup_steps: 2, total_steps: {STEPS}}}",
        "checkpoint={every_steps: 5, keep: 2}",
        "evaluation.every_steps=0",
        "health={hang_seconds: 30, replica_check_every_steps: 10}",
    )


Reference = Callable[..., Path]


@pytest.fixture(scope="session")
def reference(steppe: Steppe, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The run that nothing befalls, but which leaves out from its start what it is told to; made once for each.

    It needs no cluster: the same number of ranks is the same arithmetic.
    """
    made: dict[tuple[str, ...], Path] = {}

    def run(*skips: str) -> Path:
        if skips not in made:
            made[skips] = tmp_path_factory.mktemp("reference") / "run"
            words = [word for skip in skips for word in ("--set", skip)]
            steppe("train", "58m", "--nproc", 2, "--run-dir", made[skips], *settings, *words)
        return made[skips]

    return run
