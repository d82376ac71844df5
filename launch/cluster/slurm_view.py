"""What Slurm says of a run's job, or that it does not answer. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.cluster.slurm import Job, Slurm, SlurmError


@dataclass(frozen=True)
class SlurmView:
    """What Slurm said about a job: its lines (of a job array, its tasks'), or why there was no answer."""

    jobs: list[Job] = field(default_factory=list)
    problem: str | None = None

    @classmethod
    def of(cls, job_ids: Sequence[str], slurm: Slurm) -> "SlurmView":
        """Ask for these jobs, all at once."""
        try:
            return cls(slurm.squeue(*job_ids) if job_ids else [])
        except (SlurmError, ValueError) as error:
            return cls(problem=str(error))

    def of_job(self, job_id: str) -> "SlurmView":
        """Of several jobs, this one: "12" with all its tasks if it is an array, or "12_3"."""
        return SlurmView([job for job in self.jobs if is_of(job, job_id)], self.problem)

    @property
    def active(self) -> Job | None:
        """The job, or the task of an array, that runs, or else that is pending."""
        going = [job for job in self.jobs if not job.is_over]
        return next((job for job in going if job.state != "PENDING"), going[0] if going else None)

    @property
    def last_word(self) -> str | None:
        """The state of the last task that ended."""
        over = [job for job in self.jobs if job.is_over]
        return max(over, key=lambda job: tasks_of(job)[-1].stop).state if over else None


def is_of(job: Job, job_id: str) -> bool:
    """Whether a line of squeue is about this job: "12", or "12_3" of an array."""
    array, _, task = job_id.partition("_")
    return job.array_job_id == array and (not task or any(int(task) in tasks for tasks in tasks_of(job)))


def tasks_of(job: Job) -> list[range]:
    """The tasks of an array that a line of squeue is about: pending ones may share a line, as "1,4-7%2"."""
    if job.array_task is None:
        return [range(1)]
    ranges = (part.partition("-") for part in job.array_task.partition("%")[0].split(","))
    return [range(int(first), int(last or first) + 1) for first, _, last in ranges]
