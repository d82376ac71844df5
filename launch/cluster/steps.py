"""Job steps: `srun`, what it says, and who is to blame when it fails."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable

from launch.cluster.container import rank_command
from launch.cluster.record import JobRecord
from launch.ranks import RanksError
from pretrain.run_dir import RunDir

# A step has all of the job's cores on its nodes, which ranks share out themselves (`pretrain/affinity.py`); these would
# confine it.
CONFINING = ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_CPU_BIND")
LAST_LINES = 200
# How long srun may take to end its tasks, told to. It is less than what is left to the time limit then
# (`clock.KILL_SECONDS`); should srun itself hang, a requeue ends the tasks.
KILL_SECONDS = 8.0
# Once one rank has ended by itself, the others follow from a barrier.
STRAGGLING_SECONDS = 600

SIGNALS = {signal.strsignal(number): number.name for number in signal.Signals}
EXITED = re.compile(r"Exited with exit code (\d+)")
# srun's words, such as "srun: error: n2: tasks 2-3: Killed".
TASKS = re.compile(r"srun: error: (?P<host>[^\s:]+): tasks? (?P<first>\d+)[-,\d]*: (?P<how>.+)")


class StepError(RanksError):
    """A step failed without a rank that says why."""

    def __init__(self, message: str, killed_by: str | None) -> None:
        Exception.__init__(self, message)
        self.killed_by = killed_by


def srun_words(record: JobRecord, run: RunDir, tasks_per_node: int, arguments: list[str]) -> list[str]:
    """The command that runs `python arguments...` as so many tasks on each of the job's nodes.

    Tasks are numbered node by node, so that the first is on the node of the batch script.
    """
    options, command = rank_command(record, run, arguments)
    if record.profile.launcher == "torchrun" and tasks_per_node > 1:
        options = ["--overcommit", *options]  # the job was asked for as one task a node
    return [
        "srun",
        f"--nodes={record.nodes}",
        f"--ntasks={record.nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        "--distribution=block",
        "--cpu-bind=none",
        "--mpi=none",
        "--kill-on-bad-exit=1",  # else the others wait for a rank that is gone
        f"--wait={STRAGGLING_SECONDS}",
        *options,
        *command,
    ]


class Step:
    """A job step under way."""

    def __init__(self, words: list[str], environment: dict[str, str], task: str = "task") -> None:
        """environment: of the tasks, besides what this process has. task: what one is called, in errors."""
        self._task = task
        inherited = {name: value for name, value in os.environ.items() if name not in CONFINING}
        # In a session of its own: what this process is sent, srun is not.
        self._srun = subprocess.Popen(
            words,
            env=inherited | environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._said: deque[str] = deque(maxlen=LAST_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, seconds: float) -> bool:
        """Wait for the step, at most so long; returns whether it is over."""
        try:
            self._srun.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        self._reader.join(1.0)  # what else it said; a process that it left behind may keep the pipe open
        return True

    def kill(self) -> None:
        """End the step's processes. srun does that at once when it is sent TERM; ranks hear nothing of it before."""
        self._srun.terminate()
        if not self.wait(KILL_SECONDS):
            self._srun.kill()
            self._srun.wait()

    @property
    def error(self) -> StepError | None:
        """Why the step failed, None if srun ended well. That alone does not say that ranks did: of a step that Slurm
        has cancelled srun says so, too."""
        code = self._srun.returncode
        return blame(list(self._said), code, self._task) if code else None

    def _read(self) -> None:
        assert self._srun.stderr is not None
        for line in self._srun.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.buffer.flush()
            self._said.append(line.decode(errors="replace").rstrip())


def blame(lines: Iterable[str], code: int, task: str = "task") -> StepError:
    """What srun said about the first tasks that went wrong. It ends the others itself, by TERM and by KILL, and says
    that they were "Terminated" or "Killed" too, after the word of its own that it does so."""
    errors = []
    for line in lines:
        found = TASKS.match(line)
        if found is not None:
            by = killer(found["how"])
            how = f" was killed by {by}" if by else f": {found['how'][0].lower()}{found['how'][1:]}"
            return StepError(f"{task} {found['first']} on {found['host']}{how}", by)
        if line.startswith(("srun: error: ", "srun: fatal: ", "slurmstepd")):
            errors.append(line)
    said = "; ".join(errors[:3]) or f"exit code {code}, and nothing more was said"
    return StepError(f"srun: {said}", None)


def killer(how: str) -> str | None:
    """The signal that ended a task, from srun's words; launchers and shells tell it on as 128 and its number."""
    code = EXITED.fullmatch(how)
    number = int(code[1]) - 128 if code is not None else 0
    if number > 0 and number in set(signal.Signals):
        return signal.Signals(number).name
    return SIGNALS.get(how.removesuffix(" (core dumped)"))
