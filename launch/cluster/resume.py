"""`steppe resume RUN --nodes N`: going on with a run by a job, on as many nodes as now asked for, or elsewhere."""

from dataclasses import dataclass, replace
from pathlib import Path

from launch.cluster.freeze import freeze
from launch.cluster.record import JobRecord
from launch.cluster.script import check_folder
from launch.cluster.slurm import Slurm, SlurmRefusedError
from launch.cluster.submit import Request, check_paths, script_of, submit_prepared, tested
from launch.run_checks import check_ranks
from launch.run_folder import checked_change, locked
from pretrain.config import RunConfig
from pretrain.run_dir import RunDir
from pretrain.schedule import finished


@dataclass(frozen=True)
class Again:
    """The words of the command line about the job; None: as it was submitted before."""

    cluster: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    time_limit: str | None = None
    chain: int | None = None

    def record(self, run: RunDir) -> JobRecord:
        """How the next job will be submitted: on any nodes, those that were avoided before included.

        Raises ValueError where the request is wrong.
        """
        old = JobRecord.read(run) if run.job_path.is_file() else None
        if old is None:
            if self.cluster is None or self.nodes is None:
                raise ValueError(f"{run.path} has had no job yet: say where and how large, with --cluster and --nodes")
            return Request(self.cluster, self.nodes, self.gpus_per_node, self.time_limit, self.chain or 1).record()
        nodes = self.nodes if self.nodes is not None else old.nodes
        request = Request(self.cluster or old.cluster, nodes, self.gpus_per_node, self.time_limit, self.chain or 1)
        if self.cluster is None:  # what the run's own record says, and not what its profile says by now
            request = replace(
                request,
                gpus_per_node=self.gpus_per_node or old.gpus_per_node or None,
                time_limit=self.time_limit or old.time_limit,
                chain=self.chain if self.chain is not None else old.chain,
            )
        record = request.record(None if self.cluster is not None else old.profile)
        return record.model_copy(update={"job_ids": old.job_ids, "sweep": old.sweep})


def resume(run_dir: Path, overrides: list[str], allowed: list[str], again: Again) -> JobRecord:
    """Queue a job that goes on from the newest checkpoint, with today's code and what a resume may change changed.

    Raises ValueError where something is wrong with it, or a job of the run is in the queue; SlurmError.
    """
    run = RunDir(run_dir.resolve())
    check_folder(run.path)
    change = checked_change(run, overrides, allowed)
    record = again.record(run)
    check_ranks(change.new, record.ranks)
    check_paths(record, change.new, run)
    check_no_job(run, record)
    check_not_finished(change.new, run)
    tested(record, script_of(record, run, change.new))
    with locked(run):
        run.stop_path.unlink(missing_ok=True)
        change.make()
        freeze(run)
        try:
            return submit_prepared(run, record, "resume")
        except SlurmRefusedError:
            if change.differences:  # no job trains with them: the run stays what it was
                change.take_back()
            raise


def check_not_finished(config: RunConfig, run: RunDir) -> None:
    """Raise ValueError if the newest checkpoint is the end of the run: no nodes are taken for nothing."""
    from pretrain.checkpoint.folder import newest_checkpoint
    from pretrain.checkpoint.index import read_index

    newest = newest_checkpoint(run.checkpoints)
    trainer = read_index(newest).trainer if newest is not None else None
    if trainer is not None and finished(config.schedule, trainer["step"], trainer["tokens"]):
        raise ValueError(
            f"{run.path} is complete at step {trainer['step']}: to train for longer, raise schedule.total_steps (or "
            "total_tokens) with --set"
        )


def check_no_job(run: RunDir, record: JobRecord) -> None:
    """Raise ValueError if a job of the run runs or waits."""
    if not record.job_ids:
        return
    for job in Slurm(record.profile.slurm_timeout_seconds).squeue(*record.job_ids):
        if not job.is_over:
            raise ValueError(
                f"{run.path} has job {job.job_id} in the queue ({job.state}): wait for it, or end it with "
                f"`steppe cancel {run.path}`"
            )
