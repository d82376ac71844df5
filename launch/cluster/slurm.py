"""Slurm's commands, each with a time-out. The only file that calls them.

States come from squeue, which every Slurm has; sacct needs a database that a site may not run, and is never asked.
"""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

# What a job leaves in the environment of a command that it calls, and what would silently overrule a script's own
# #SBATCH lines. Kept: where Slurm is configured, and who we are to it.
OF_A_JOB = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "PMI_", "PMIX_")
KEPT = frozenset({"SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT"})
# Of a shell or of an earlier job, and not of the run that is submitted.
OF_ANOTHER_RUN = frozenset(
    {"PYTHONPATH", "PYTHONHOME", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"}
    | {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
)
# How Slurm's commands say that they did not reach the controller: not a refusal, and no fault of the user's.
UNREACHED = (
    *("unable to contact", "timed out", "connection refused", "zero bytes", "communication connection"),
    *("munge", "authentication", "configuration source", "configuration file"),
)


class SlurmError(OSError):
    """A call of Slurm's failed or took too long: one line. A retry may help."""


class SlurmRefusedError(SlurmError):
    """Slurm answered, and said no: one line with its reason."""


class NoSlurmError(ValueError):
    """This machine has no Slurm."""


@dataclass(frozen=True)
class Job:
    """One line of squeue: a job, or a task of a job array (or all of its pending tasks together).

    job_id: as squeue and scancel take it: "12", "12_3", or "12_[4-7]" for pending tasks.
    array_job_id, array_task: of an array; a job that is none is its own array job, and has no task.
    state: Slurm's word, such as PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, NODE_FAIL, PREEMPTED.
    nodes: as many as it asks for or has. node_list: Slurm's short form, "" while pending.
    start_time, end_time: epoch seconds, end_time being the limit of a running job; None where Slurm does not know yet.
    reason: why it is pending or ended; "None" where there is none.
    """

    job_id: str
    array_job_id: str
    array_task: str | None
    state: str
    nodes: int
    start_time: float | None
    end_time: float | None
    node_list: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether it neither runs nor will. squeue lists such a job for a while (MinJobAge)."""
        return self.state in ENDED


# The states in which a job ends, by squeue's manual; all others come before or go on.
ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
    | {"REVOKED", "TIMEOUT"}
)
# No field but the last can contain the separator.
SQUEUE_FIELDS = ("%i", "%F", "%K", "%T", "%D", "%S", "%e", "%N", "%r")


@dataclass(frozen=True)
class Slurm:
    """Slurm's commands. Each method raises SlurmError if the call fails or takes longer than `timeout_seconds`, and
    NoSlurmError, a ValueError, on a machine that has no Slurm."""

    timeout_seconds: float = 60.0

    def sbatch(self, script: str, *options: str) -> str:
        """Queue a batch script (its text); returns the job's id. Raises SlurmRefusedError if Slurm does not want it.

        The job's environment is this process's without what belongs to another job or run.
        """
        answer = self._call("sbatch", "--parsable", *options, given=script)
        return answer.strip().splitlines()[-1].split(";")[0]  # "id" or "id;cluster"

    def test_only(self, script: str, *options: str) -> str:
        """What sbatch would do with a script: its words, such as when and where it may start. Queues nothing.

        Raises SlurmRefusedError if it would refuse.
        """
        return self._call("sbatch", "--test-only", *options, given=script, said_on_stderr=True)

    def squeue(self, *job_ids: str) -> list[Job]:
        """The jobs of these ids that Slurm still knows, in any state; an array by its tasks."""
        words = ["--noheader", "--states=all", f"--format={'|'.join(SQUEUE_FIELDS)}", f"--jobs={','.join(job_ids)}"]
        try:
            answer = self._call("squeue", *words, extra={"SLURM_TIME_FORMAT": "%s"})
        except SlurmRefusedError as error:
            if "invalid job id" in str(error).lower():
                return []
            raise
        return [parse_job(line) for line in answer.splitlines() if line.strip()]

    def requeue(self, job_id: str) -> None:
        """Put a job back into the queue; if it runs, its processes are killed at once, this one included."""
        self._call("scontrol", "requeue", job_id)

    def cancel(self, *job_ids: str, pending_only: bool = False) -> None:
        """Cancel jobs; with `pending_only`, what of them has not started. One that is over already is no error."""
        self._call("scancel", *(["--state=PENDING"] if pending_only else []), *job_ids)

    def hostnames(self, node_list: str) -> list[str]:
        """The names behind Slurm's short form, such as "n[1-3,7]", in its order."""
        return self._call("scontrol", "show", "hostnames", node_list).split() if node_list else []

    def _call(
        self, *words: str, given: str | None = None, said_on_stderr: bool = False, extra: dict[str, str] | None = None
    ) -> str:
        """Run a command; its stdout (or stderr)."""
        shown = " ".join(words[:3])
        try:
            done = subprocess.run(
                words,
                input=given,
                stdin=subprocess.DEVNULL if given is None else None,
                capture_output=True,
                text=True,
                timeout=self.timeout_seconds,
                env=clean_environment(os.environ) | (extra or {}),
                check=False,
            )
        except FileNotFoundError:
            raise NoSlurmError(f"{words[0]} is not on this machine: run this where Slurm is, on a login node") from None
        except subprocess.TimeoutExpired:
            raise SlurmError(
                f"{shown}: no answer in {self.timeout_seconds:g} s; is Slurm's controller up? (scontrol ping)"
            ) from None
        said = " ".join((done.stderr or done.stdout).split())
        if done.returncode:
            unreached = done.returncode < 0 or any(sign in said.lower() for sign in UNREACHED)
            raise (SlurmError if unreached else SlurmRefusedError)(f"{shown}: {said or f'exit code {done.returncode}'}")
        return done.stderr if said_on_stderr else done.stdout


def clean_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy without what belongs to another job or run."""
    return {
        name: value
        for name, value in environment.items()
        if name in KEPT or not (name.startswith(OF_A_JOB) or name in OF_ANOTHER_RUN)
    }


def parse_job(line: str) -> Job:
    """One line of squeue in SQUEUE_FIELDS."""
    job_id, array_job_id, task, state, nodes, start, end, node_list, reason = line.split("|", len(SQUEUE_FIELDS) - 1)
    return Job(
        job_id=job_id,
        array_job_id=array_job_id,
        array_task=None if task == "N/A" else task,
        state=state,
        nodes=int(nodes),
        start_time=_seconds(start),
        end_time=_seconds(end),
        node_list=node_list,
        reason=reason,
    )


def _seconds(text: str) -> float | None:
    return float(text) if text.isdigit() else None
