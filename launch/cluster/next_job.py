"""What a job asks of Slurm when it is through: to be run again, elsewhere, or to let the rest of its chain go."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from launch.cluster.record import JobRecord
from launch.cluster.signals import Told
from launch.cluster.slurm import Slurm, SlurmError, SlurmRefusedError
from launch.cluster.submit import resubmit
from pretrain.run_dir import RunDir

# How long to go on asking while Slurm's controller is down, and between two tries: from the first, doubling, to the
# second.
INSIST_SECONDS = 600.0
PAUSES_SECONDS = (1.0, 30.0)


@dataclass(frozen=True)
class NextJob:
    """Each method raises SlurmError if Slurm refuses, or does not answer for INSIST_SECONDS.

    queue_id: this job, or this task of an array, as Slurm's commands take it. array_job_id: the whole array.
    tasks_left: of a chained array, after this one; None: this is none.
    """

    run: RunDir
    record: JobRecord
    told: Told
    queue_id: str
    array_job_id: str
    tasks_left: int | None

    @property
    def slurm(self) -> Slurm:
        return Slurm(self.record.profile.slurm_timeout_seconds)

    def requeue(self) -> None:
        """Slurm ends this process at once."""
        self._insist(partial(self.slurm.requeue, self.queue_id))

    def resubmit(self, bad_nodes: Iterable[str], lead_seconds: float | None) -> None:
        """Another job on other nodes: which nodes a running job avoids cannot be changed, nor does a requeue change it.
        Where a job may submit none, the same again.

        lead_seconds: as measured, None if not.
        """
        bad = tuple(bad_nodes)
        why = f"bad nodes {','.join(bad)}"
        lead = None if lead_seconds is None else int(lead_seconds)
        try:
            # Not insisted on: a submission whose answer was lost, made again, would be two jobs.
            resubmit(self.run, why, bad, chain=self.tasks_left, signal_lead_seconds=lead, after=self.queue_id)
        except SlurmError as error:
            print(f"steppe: {error}; it goes on as it is", file=sys.stderr)
            if self.tasks_left is None:
                self.requeue()
        else:
            self.end_chain()

    def end_chain(self) -> None:
        """Cancel the tasks that would follow; nothing if this is no chain."""
        if self.tasks_left:
            self._insist(partial(self.slurm.cancel, self.array_job_id, pending_only=True))

    def _insist(self, call: Callable[[], None]) -> None:
        pause, end = PAUSES_SECONDS[0], time.monotonic() + INSIST_SECONDS
        while True:
            try:
                return call()
            except SlurmRefusedError:
                raise
            except SlurmError as error:
                if self.told.term:  # it did take effect, only the answer was lost; or somebody else has ended this job
                    return None
                if time.monotonic() > end:
                    raise
                print(f"steppe: {error}; trying again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
            pause = min(2 * pause, PAUSES_SECONDS[1])
