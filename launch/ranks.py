"""Starting ranks on this machine, through torch's elastic launcher: all of a run's, or those of one of its nodes."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from dataclasses import dataclass
from typing import Any

from pretrain.environment_variables import added_to_environment
from pretrain.host_memory import malloc_environment
from pretrain.stop import LAUNCHER

# How long ranks may take to finish a step and save, once asked to stop, before they are killed.
GRACE_SECONDS = 600
# How long the launchers of several nodes wait for one another.
MEETING_SECONDS = 600
# Where ranks that share a machine meet. Its own name need not resolve.
HERE: dict[str, Any] = {
    "min_nodes": 1,
    "max_nodes": 1,
    "rdzv_backend": "c10d",
    "rdzv_endpoint": "localhost:0",
    "local_addr": "localhost",
}


class RanksError(Exception):
    """Some rank failed. `killed_by` is the signal that ended the first culprit, None if it exited by itself."""

    def __init__(self, rank: int, killed_by: str | None) -> None:
        super().__init__(f"rank {rank} " + (f"was killed by {killed_by}" if killed_by else "failed"))
        self.killed_by = killed_by


class StoppedError(Exception):
    """The launcher was asked to stop and has seen its ranks through."""


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of several nodes meet: at a port of the first one. name: the same on all of them, and other
    than those of other runs."""

    name: str
    address: str
    port: int
    nodes: int
    node: int

    @property
    def launch_options(self) -> dict[str, Any]:
        """As torch's LaunchConfig takes it."""
        return {
            "min_nodes": self.nodes,
            "max_nodes": self.nodes,
            "run_id": self.name,
            "rdzv_backend": "static",
            "rdzv_endpoint": f"{self.address}:{self.port}",
            "rdzv_configs": {"rank": self.node, "timeout": MEETING_SECONDS},
        }


def run_ranks(module: str, args: list[str], nproc: int, meeting: Meeting | None = None) -> None:
    """Run `python -P -m module args...` on `nproc` local ranks and wait for them; with a `meeting` they are part of a
    run over several nodes, each of which calls this.

    SIGTERM and SIGINT go on to every rank, which then has GRACE_SECONDS. Raises RanksError if a rank fails (the others
    are ended), StoppedError if a signal came and the ranks are through.
    """
    # The launcher's own remarks would drown the one line that a user needs.
    os.environ.setdefault("LOGLEVEL", "CRITICAL")
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # Its own reports on ranks, which nobody reads: ranks say themselves how they failed.
    reports = tempfile.TemporaryDirectory(prefix="steppe-ranks-")
    config = LaunchConfig(
        **(HERE | {"run_id": uuid.uuid4().hex} if meeting is None else meeting.launch_options),
        nproc_per_node=nproc,
        max_restarts=0,
        shutdown_timeout=GRACE_SECONDS,
        # Not SIGHUP: a run started with nohup goes on when its terminal is gone.
        signals_to_handle="SIGTERM,SIGINT",
        logs_specs=DefaultLogsSpecs(log_dir=reports.name),
    )
    # Ranks that share a node share its cores; torch's launcher would otherwise warn and pick one thread. All of it is
    # set only while they run: this process may start another number of them, as a rehearsal does.
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    ours = {LAUNCHER: str(os.getpid()), "OMP_NUM_THREADS": threads, **malloc_environment(os.environ)}
    try:
        with reports, added_to_environment(ours):
            elastic_launch(config, sys.executable)("-P", "-m", module, *args)
    except ChildFailedError as error:
        raise culprit(error.failures) from None
    except SignalException as error:
        raise StoppedError(str(error)) from None


def culprit(failures: dict[int, Any]) -> RanksError:
    """Whom to blame: a rank that was killed leads, for its peers only fail because it is gone. SIGTERM is what the
    launcher itself sends to the others."""
    for rank, failure in sorted(failures.items()):
        if failure.exitcode < 0 and -failure.exitcode != signal.SIGTERM:
            return RanksError(rank, signal.Signals(-failure.exitcode).name)
    return RanksError(min(failures), None)
