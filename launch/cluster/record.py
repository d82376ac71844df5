"""What a run's folder keeps of the cluster: how it was submitted (job.json), and each attempt (attempts.jsonl)."""

import json
import os
import time
from typing import Any, Literal

from pydantic import ConfigDict, Field

from launch.cluster.profile import ClusterProfile
from pretrain.config import Section
from pretrain.run_dir import RunDir, read_events, read_json, write_json

# submit writes the first, the supervisor (`launch/cluster/job.py`) the others and, when it resubmits, the first again.
AttemptLine = Literal["submitted", "attempt", "preflight", "signal", "attempt_end"]


class JobRecord(Section):
    """How a run is submitted: enough to render job.sbatch and to submit it again.

    cluster: the profile's name. profile: its contents on the day of submission; a later edit changes nothing.
    nodes: nodes of the job. gpus_per_node: GPUs of each, 0 where there are none. ranks_per_node: ranks of each.
    time_limit: of a job, in Slurm's form; None: the partition's default.
    signal_lead_seconds: how long before the limit Slurm tells the job to stop.
    chain: jobs in a row, as an array that runs one task at a time; 1: a single job that requeues itself.
    exclude: nodes that are to be avoided.
    environment: variables of every process, Steppe's defaults and the profile's, as of the last submission; the batch
        script expands $run, $local_folder.
    sweep: the folder of the sweep that this run is a point of, None if it is none.
    job_ids: the jobs of this run, the newest last, as squeue and scancel take them: "12" (a chained array's: all its
        tasks), or "12_3" for a point of a sweep.
    """

    model_config = ConfigDict(extra="ignore")  # an older version may have written fields that are gone since

    cluster: str
    profile: ClusterProfile
    nodes: int = Field(gt=0)
    gpus_per_node: int = Field(default=0, ge=0)
    ranks_per_node: int = Field(gt=0)
    time_limit: str | None = None
    signal_lead_seconds: int = Field(gt=0)
    chain: int = Field(default=1, gt=0)
    exclude: tuple[str, ...] = ()
    environment: dict[str, str] = Field(default_factory=dict)
    sweep: str | None = None
    job_ids: tuple[str, ...] = ()

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def job_id(self) -> str | None:
        """The newest job, None if none was queued yet."""
        return self.job_ids[-1] if self.job_ids else None

    @classmethod
    def read(cls, run: RunDir) -> "JobRecord":
        """Raises ValueError if the run was never submitted to a cluster, or the record is damaged."""
        if not run.job_path.is_file():
            raise ValueError(f"{run.path} was not submitted to a cluster: {run.job_path.name} is missing in it")
        try:
            return cls.model_validate(read_json(run.job_path))
        except ValueError:  # of JSON, or of what is in it
            raise ValueError(
                f"{run.job_path} is damaged: restore it, or move it away and go on with `steppe resume {run.path} "
                "--cluster PROFILE --nodes N`"
            ) from None

    def write(self, run: RunDir) -> None:
        write_json(run.job_path, self.model_dump(mode="json"))


def append_attempt(run: RunDir, kind: AttemptLine, **fields: Any) -> None:
    """Add one line to attempts.jsonl, durably. A line that a crash cut short is ended first."""
    line = json.dumps({"type": kind, "time": time.time(), **fields}) + "\n"
    path = run.attempts_path
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_attempts(run: RunDir, kind: AttemptLine | None = None) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl, oldest first; none if nothing was submitted."""
    return read_events(run.attempts_path, kind) if run.attempts_path.is_file() else []
