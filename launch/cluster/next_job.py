"""What a job asks of Slurm when it is through: to be run again, elsewhere, or to let the rest of its chain go."""

import math
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from launch.cluster.profile import MOST_LEAD_SECONDS
from launch.cluster.record import JobRecord
from launch.cluster.signals import Told
from launch.cluster.slurm import Slurm, SlurmError, SlurmRefusedError
from launch.cluster.submit import resubmit
from pretrain.run_dir import RunDir

# How long to go on asking while Slurm's controller is down, and between two tries: from the first, doubling, to the
# second.
INSIST_SECONDS = 600.0
PAUSES_SECONDS = (1.0, 30.0)
LOOK_SECONDS = 0.2


@dataclass(frozen=True)
class NextJob:
    """Each method raises SlurmError if Slurm refuses, or does not answer for INSIST_SECONDS. Once TERM has come nothing
    is asked any more: either what was asked took effect, and only the answer was lost, or somebody has ended this job.

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

    def resubmit(self, bad_nodes: Iterable[str], lead_seconds: float) -> None:
        """Another job on other nodes: which nodes a running job avoids cannot be changed, nor does a requeue change it.
        Where a job may submit none, the same again. If Slurm does not answer, it may have queued that job or not: then
        nothing else goes on, which could be a second job beside it, and SlurmError is raised.

        lead_seconds: how long before its limit the job is to be told to stop, by what is known now.
        """
        if self.told.term:
            return
        bad = tuple(bad_nodes)
        why = f"bad nodes {','.join(bad)}"
        lead = min(math.ceil(lead_seconds), MOST_LEAD_SECONDS)
        try:
            # Not insisted on: a submission whose answer was lost, made again, would be two jobs.
            resubmit(self.run, why, bad, chain=self.tasks_left, signal_lead_seconds=lead, after=self.queue_id)
        except SlurmRefusedError as error:
            print(f"steppe: {error}; it goes on as it is", file=sys.stderr)
            if self.tasks_left is None:
                self.requeue()
        except SlurmError:
            self.end_chain()
            raise
        else:
            self.end_chain()

    def end_chain(self) -> None:
        """Cancel the tasks that would follow; nothing if this is no chain."""
        if self.tasks_left:
            self._insist(partial(self.slurm.cancel, self.array_job_id, pending_only=True))

    def _insist(self, call: Callable[[], None]) -> None:
        pause, end = PAUSES_SECONDS[0], time.monotonic() + INSIST_SECONDS
        while not self.told.term:
            try:
                call()
                return
            except SlurmRefusedError:
                raise
            except SlurmError as error:
                if time.monotonic() > end:
                    raise
                print(f"steppe: {error}; trying again in {pause:g} s", file=sys.stderr)
            self._sleep(pause)
            pause = min(2 * pause, PAUSES_SECONDS[1])

    def _sleep(self, seconds: float) -> None:
        """A signal does not end a sleep, which Python takes up again; TERM is seen between short ones."""
        end = time.monotonic() + seconds
        while not self.told.term and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
