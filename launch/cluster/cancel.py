"""Ending a run: before it runs by Slurm, while it trains by a file that it looks for, or at once by Slurm. No torch."""

from dataclasses import dataclass
from pathlib import Path

from launch.cluster.record import JobRecord
from launch.cluster.slurm import Job, Slurm, SlurmError
from launch.cluster.status import WatchedRun
from launch.cluster.sweep import Sweep
from pretrain.run_dir import RunDir


@dataclass(frozen=True)
class Cancelled:
    """What was done about a run (nothing, cancelled, asked or killed), and what will come of it, in words."""

    run: str
    job_id: str | None
    done: str
    words: str


def cancel_sweep(folder: Path, now: bool) -> list[Cancelled]:
    """End every point of a sweep, as `cancel_run` does. Raises ValueError, SlurmError.

    The last first: those wait, and would begin as soon as one that runs has ended.
    """
    return [cancel_run(run.path, now) for run in reversed(Sweep.read(folder).runs)][::-1]


def cancel_run(path: Path, now: bool) -> Cancelled:
    """End a run for good: what of it waits in the queue at once, what trains as soon as it has checkpointed.

    now: what trains is told to end by Slurm, which kills it after KillWait.

    Raises ValueError where there is nothing that could be cancelled, SlurmError if Slurm does not answer.
    """
    watched = WatchedRun(path)
    run, slurm = watched.run, Slurm()
    if not run.job_path.is_file():
        return _cancel_local(run, now, watched.is_alive)
    job_id = JobRecord.read(run).job_id
    if job_id is None:
        raise ValueError(f"{run.path} was never queued: there is nothing to cancel")
    try:
        going = _going(slurm, job_id)
        if not going:
            return Cancelled(str(run.path), job_id, "nothing", f"job {job_id} is over: there was nothing to cancel")
        if now:
            slurm.cancel(job_id)
            return _now(run, job_id, going)
        if any(job.state == "PENDING" for job in going):
            slurm.cancel(job_id, pending_only=True)
            going = [job for job in _going(slurm, job_id) if job.state != "PENDING"]  # one may have begun just now
    except SlurmError as error:
        if now:
            raise
        ask_to_stop(run)
        raise SlurmError(
            f"{error}; the file {run.stop_path} is written: if it trains, or once it does, it checkpoints and ends"
        ) from None
    if not going:
        return Cancelled(str(run.path), job_id, "cancelled", f"job {job_id} was waiting, and is cancelled")
    ask_to_stop(run)
    return Cancelled(
        str(run.path),
        job_id,
        "asked",
        f"job {going[0].job_id} runs: it ends after its present step and a checkpoint, however long that takes, and is "
        f"not run again (steppe status {run.path} --watch); --now does not wait",
    )


def ask_to_stop(run: RunDir) -> None:
    """The file that rank 0 looks for every few seconds."""
    run.stop_path.touch()


def _cancel_local(run: RunDir, now: bool, alive: bool) -> Cancelled:
    if not alive:
        raise ValueError(f"{run.path} is no job, and does not run on this machine: there is nothing to cancel")
    if now:
        raise ValueError(f"--now: {run.path} is no job of Slurm's; press Ctrl-C where it runs, or leave --now out")
    ask_to_stop(run)
    return Cancelled(str(run.path), None, "asked", "it runs on this machine: it checkpoints, and then ends")


def _going(slurm: Slurm, job_id: str) -> list[Job]:
    """What of a job, or of an array, is not over."""
    return [job for job in slurm.squeue(job_id) if not job.is_over]


def _now(run: RunDir, job_id: str, going: list[Job]) -> Cancelled:
    if all(job.state == "PENDING" for job in going):
        return Cancelled(str(run.path), job_id, "cancelled", f"job {job_id} was waiting, and is cancelled")
    words = (
        f"job {job_id} is told to end, and killed after KillWait (scontrol show config; usually 30 s): it checkpoints "
        "if that fits, and is not run again"
    )
    return Cancelled(str(run.path), job_id, "killed", words)
