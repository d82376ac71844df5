"""The supervisor of a job, which the batch script becomes: `python -P -m launch.cluster.job RUN_DIR`.

It starts the ranks by srun, asks them to stop in time, and decides what is next. What it knows it writes to
attempts.jsonl before it acts: a requeue ends it at once, and no rank of the next attempt can ask it.
"""

import math
import os
import random
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from launch.cluster.clock import Clock, Stopwatch
from launch.cluster.next_job import NextJob
from launch.cluster.preflight import Findings, judge_preflight, new_folder, read_reports, slowest_all_reduce
from launch.cluster.rank import pid_path
from launch.cluster.record import AttemptLine, JobRecord, append_attempt, read_attempts
from launch.cluster.signals import Told, ask_rank_0
from launch.cluster.slurm import NoSlurmError, Slurm, SlurmError, SlurmRefusedError
from launch.cluster.steps import Step, StepError, srun_words
from launch.cluster.verdict import GOES_ON, Signal, Situation, Verdict, attempts_without_progress, judge
from launch.feed import FileFeed
from launch.run import clear_last_attempt, failure, last_step
from launch.run_folder import LockedError, locked
from pretrain.checkpoint.folder import list_checkpoints, step_of
from pretrain.collective_timeout import COLLECTIVE_TIMEOUT
from pretrain.host_memory import malloc_environment
from pretrain.outcome import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_INPUT, Outcome
from pretrain.recipe import check_unchanged
from pretrain.run_dir import RunDir

# The ranks of an attempt whose first node went down may still be there, and a file system may keep a dead node's locks.
LOCK_PATIENCE_SECONDS = 300.0
LOOK_SECONDS = 0.5
ASK_AGAIN_SECONDS = 5.0
# From one look at the run's pace to the next; from one question to Slurm to the next, and how long it may take to
# answer: meanwhile nothing else is seen.
MEASURE_SECONDS = 10.0
LOOK_UP_SECONDS = 60.0
LOOK_UP_TIMEOUT_SECONDS = 10.0
PORTS = range(20000, 32000)  # below those that Linux lends to outgoing connections (32768 on)


class Supervisor:
    """One attempt of a job."""

    def __init__(self, run: RunDir, record: JobRecord, told: Told, environ: Mapping[str, str]) -> None:
        self.run, self.record, self.told = run, record, told
        self.slurm = Slurm(min(record.profile.slurm_timeout_seconds, LOOK_UP_TIMEOUT_SECONDS))
        self.job_id = environ["SLURM_JOB_ID"]
        task, array = environ.get("SLURM_ARRAY_TASK_ID"), environ.get("SLURM_ARRAY_JOB_ID", self.job_id)
        self.array_task = None if task is None else int(task)
        # One task of an array has the array's number for its own, which then means all of them.
        self.queue_id = self.job_id if task is None else f"{array}_{task}"
        self.restart = int(environ.get("SLURM_RESTART_COUNT", "0"))
        self.nodes = Slurm(record.profile.slurm_timeout_seconds).hostnames(environ["SLURM_JOB_NODELIST"])
        self.next = NextJob(
            run=run,
            record=record,
            told=told,
            queue_id=self.queue_id,
            array_job_id=array,
            tasks_left=tasks_left(environ) if record.chain > 1 else None,
        )
        self.events, self.stopwatch = FileFeed(run.events_path), Stopwatch()
        self.clock = Clock(time.time(), None, record.signal_lead_seconds)
        self.measured_at = self.looked_up_at = -math.inf
        self.asked_at: float | None = None
        self.signal: Signal | None = None

    def attempt(self) -> int:
        """Run the ranks, decide, act. Returns the batch script's exit code."""
        self._note("attempt", nodes=self.nodes, ranks=self.record.ranks, checkpoint=self._newest_checkpoint())
        clear_last_attempt(self.run)
        self._refresh()
        findings, outcome = Findings(), self._changed_config() or self._before_ranks()
        if outcome is None and self.record.profile.preflight.seconds:
            findings = self._preflight()
            if findings.words:
                outcome = Outcome("failed", EXIT_FAILED, last_step(self.run), f"preflight: {findings.words}")
        if outcome is None:
            outcome = self._before_ranks() or self._train()
        if not self.run.outcome_path.is_file():
            outcome.write(self.run)
        verdict = self._decide(outcome, findings)
        if verdict.action in GOES_ON and self.told.term:  # it came while that was written down
            verdict = self._decide(outcome, findings)
        return self._act(verdict, findings)

    def _changed_config(self) -> Outcome | None:
        try:
            check_unchanged(self.run.config_path)
        except ValueError as error:
            return Outcome("failed", EXIT_WRONG_INPUT, last_step(self.run), str(error))
        return None

    def _preflight(self) -> Findings:
        limits, started, folder = self.record.profile.preflight, time.monotonic(), new_folder(self.run)
        words = ["-P", "-m", "launch.cluster.preflight_rank", str(self.run.path)]
        words += [str(limits.free_gigabytes * 1e9), str(self.record.gpus_per_node)]
        step = self._start(words, self.record.ranks_per_node, **{COLLECTIVE_TIMEOUT: str(limits.seconds)})
        late = False
        while not step.wait(LOOK_SECONDS):
            late = time.monotonic() - started > limits.seconds
            if late or self._stop_is_due():
                step.kill()
        if self._stop_is_due() and not late:
            return Findings()  # it was cut short, and says nothing
        reports = read_reports(folder, self.record.ranks)
        findings = judge_preflight(self.nodes, self.record.ranks_per_node, reports, limits)
        if step.error is not None and not late and not findings.bad:
            findings = Findings(fault="; ".join(filter(None, [findings.fault, str(step.error)])))
        seconds = time.monotonic() - started
        self._note("preflight", seconds=seconds, bad=findings.bad, fault=findings.fault, **slowest_all_reduce(reports))
        print(f"preflight: {seconds:.1f} s, {findings.words or 'all is well'}", file=sys.stderr)
        return findings

    def _before_ranks(self) -> Outcome | None:
        """What has come of it already, if ranks need not be started at all."""
        if not self.told.term and self.asked_at is None and not self.run.stop_path.exists():
            return None
        return Outcome("stopped", EXIT_STOPPED, last_step(self.run), "stopped before the training began")

    def _train(self) -> Outcome:
        """See the ranks through."""
        pid_path(self.run).unlink(missing_ok=True)
        run, ranks = str(self.run.path), self.record.ranks_per_node
        if self.record.profile.launcher == "srun":
            step = self._start(["-P", "-m", "launch.cluster.rank", run], ranks, **malloc_environment(os.environ))
        else:
            step = self._start(["-P", "-m", "launch.cluster.node", run, str(ranks)], 1, task="launcher")
        asked_again, killed = -ASK_AGAIN_SECONDS, False
        while not step.wait(LOOK_SECONDS):
            self._refresh()
            if not self._stop_is_due():
                continue
            if self.asked_at is not None and time.time() > self.clock.kill_at(self.asked_at):
                step.kill()
                killed = True
            elif time.monotonic() - asked_again > ASK_AGAIN_SECONDS:
                asked_again = time.monotonic()
                ask_rank_0(self.run)
        if self.run.outcome_path.is_file():
            return Outcome.read(self.run)
        if killed:
            error = StepError("the ranks did not stop before the time limit, and were killed", None)
        else:
            error = step.error or StepError("the ranks ended without a word", None)
        return failure(self.run, error)

    def _start(self, arguments: list[str], tasks_per_node: int, task: str = "rank", **environment: str) -> Step:
        """Ranks meet on the first node, where this process is, at a port that is free here."""
        meeting = {"MASTER_ADDR": self.nodes[0], "MASTER_PORT": str(free_port())}
        words = srun_words(self.record, self.run, tasks_per_node, arguments)
        return Step(words, meeting | environment, task)

    def _stop_is_due(self) -> bool:
        """Whether ranks are to stop: TERM has come, or the time is near. What asked for it is recorded once."""
        if self.told.term:
            if self.signal != "TERM":
                self._heard("TERM")
            return True
        now = time.time()
        if self.asked_at is None and self.clock.stop_is_due(now, self.told.usr1_at):
            self.asked_at = now
            self._heard("time" if self.told.usr1_at is None else "USR1")
        return self.asked_at is not None

    def _heard(self, name: Signal) -> None:
        self.signal = name
        try:
            self._note("signal", name=name)
        except OSError as error:  # such as a full disk's: ranks are to be seen through all the same
            print(f"steppe: {error}", file=sys.stderr)

    def _refresh(self) -> None:
        """Look at what steps and saves take, and at the job's limit, which an administrator may have changed."""
        now = time.monotonic()
        if now - self.measured_at >= MEASURE_SECONDS:
            self.measured_at = now
            self.clock = replace(self.clock, pace=self.stopwatch.see(self.events.new()))
        if now - self.looked_up_at >= LOOK_UP_SECONDS:
            self.looked_up_at = now
            try:
                jobs = self.slurm.squeue(self.queue_id)
            except SlurmError:
                return  # what was known holds
            running = [job for job in jobs if job.state == "RUNNING"]
            if running:
                self.clock = replace(self.clock, end=running[0].end_time)

    def _decide(self, outcome: Outcome, findings: Findings) -> Verdict:
        """The verdict, on record."""
        if self.told.term and self.signal != "TERM":
            self._heard("TERM")
        situation = Situation(
            outcome=outcome,
            signal=self.signal,
            stop_asked=self.run.stop_path.exists(),
            bad_nodes=tuple(findings.bad),
            without_progress=attempts_without_progress(read_attempts(self.run), self._newest_checkpoint()),
            max_without_progress=self.record.profile.max_restarts_without_progress,
            may_requeue=self.record.profile.requeue,
            tasks_left=self.next.tasks_left,
        )
        verdict = judge(situation)
        self._note("attempt_end", outcome=vars(outcome), action=verdict.action, why=verdict.why)
        print(f"{outcome.message}\n{verdict.action}: {verdict.why}", file=sys.stderr)
        return verdict

    def _act(self, verdict: Verdict, findings: Findings) -> int:
        """Do it. Returns the exit code, unless Slurm is quicker."""
        try:
            if verdict.action == "requeue":
                self.next.requeue()
            elif verdict.action == "resubmit":
                self.next.resubmit(findings.bad, self.clock.lead_seconds)
            elif verdict.action in ("done", "stop"):
                self.next.end_chain()
        except SlurmError as error:
            print(f"steppe: {error}", file=sys.stderr)
            if verdict.action in GOES_ON:
                refused = isinstance(error, SlurmRefusedError)
                unknown = verdict.action == "resubmit" and not refused  # and the error says what to do
                remedy = "" if unknown else f"; go on with: steppe resume {self.run.path}"
                why = f"{verdict.why}, but Slurm {'refused' if refused else 'did not answer'} ({error}){remedy}"
                self._note("attempt_end", outcome=vars(Outcome.read(self.run)), action="stop", why=why)
        return verdict.exit_code

    def _newest_checkpoint(self) -> int:
        checkpoints = list_checkpoints(self.run.checkpoints)
        return step_of(checkpoints[-1]) if checkpoints else 0

    def _note(self, kind: AttemptLine, **fields: object) -> None:
        ours = {"job_id": self.job_id, "restart": self.restart, "array_task": self.array_task}
        append_attempt(self.run, kind, **ours, **fields)


def tasks_left(environ: Mapping[str, str]) -> int | None:
    """How many tasks of this task's array come after it; None if it is none."""
    if "SLURM_ARRAY_TASK_ID" not in environ:
        return None
    return max(0, int(environ["SLURM_ARRAY_TASK_MAX"]) - int(environ["SLURM_ARRAY_TASK_ID"]))


def free_port() -> int:
    """A port that nobody listens at on this machine."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as candidate:
            try:
                candidate.bind(("", port))
            except OSError:
                continue
            return port


def is_done(run: RunDir, job_id: str) -> bool:
    """Whether this very job, which somebody has requeued, has completed the run."""
    return any(line["action"] == "done" and line["job_id"] == job_id for line in read_attempts(run, "attempt_end"))


def supervise(run: RunDir, told: Told) -> int:
    """The batch script's exit code. Raises LockedError, NoSlurmError, OSError (such as SlurmError)."""
    with locked(run, LOCK_PATIENCE_SECONDS):
        if is_done(run, os.environ["SLURM_JOB_ID"]):
            print("the run is complete", file=sys.stderr)
            return EXIT_DONE
        try:
            record = JobRecord.read(run)
        except ValueError as error:
            print(f"steppe: {error}", file=sys.stderr)
            return EXIT_WRONG_INPUT
        return Supervisor(run, record, told, os.environ).attempt()


def main() -> None:
    """One line says what is wrong where there is no attempt to record it of; an error of ours is a traceback."""
    told = Told()
    told.listen()
    run = RunDir(Path(sys.argv[1]))
    try:
        sys.exit(supervise(run, told))
    except (LockedError, NoSlurmError, OSError) as error:
        print(f"steppe: {error}", file=sys.stderr)
        sys.exit(EXIT_FAILED)


if __name__ == "__main__":
    main()
