"""A real Slurm on this machine, for tests: what `cluster.sh` starts, and what is seen of it from outside."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import psutil

from tests.small_disk import mount, unmount

SCRIPT = Path(__file__).with_name("cluster.sh")
PATIENCE_SECONDS = 600.0  # for anything that must come, on a machine that does much else
SMALL_DISK_MEGABYTES = 20
COMMANDS = ("slurmctld", "slurmd", "sbatch", "munged", "unshare")

Thing = TypeVar("Thing")


def why_not() -> str | None:
    """Why no cluster can be started here, None if one can."""
    if os.geteuid() != 0:
        return "a virtual Slurm cluster takes root"
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"  # where the daemons are
    missing = [name for name in COMMANDS if shutil.which(name, path=path) is None]
    if missing:
        return f"{', '.join(missing)} not installed: apt-get install slurmctld slurmd slurm-client munge"
    words = ["unshare", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        return "no right to make namespaces, which virtual nodes are (CAP_SYS_ADMIN)"
    return None


def wait_for(what: str, look: Callable[[], Thing], seconds: float = PATIENCE_SECONDS, every: float = 0.1) -> Thing:
    """What `look` returns as soon as it is true. Raises AssertionError naming `what` when it does not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(every)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what}")


class Cluster:
    """Virtual nodes n1 to nN. As a context it is up inside and gone, folder and all, afterwards."""

    def __init__(self, nodes: int, **knobs: object) -> None:
        """knobs: CPUS, GPUS and MEMORY_MB of a node."""
        self.nodes, self.knobs = nodes, {key: str(value) for key, value in knobs.items()}
        # Sockets lie in it, whose paths may have some 100 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="steppe-", dir="/run"))
        self.local = self.folder / "local"  # what a profile may take for node-local disk
        self.small_disk = self.folder / "small"  # which every node sees
        self._changed: set[int] = set()  # nodes whose mounts are not those that they booted with

    def up(self) -> None:
        """Start it. Raises AssertionError with what the daemons said if it does not come up."""
        self.local.mkdir()
        mount(self.small_disk, SMALL_DISK_MEGABYTES)  # before there are nodes, which take over what is mounted
        self._script("up", self.nodes)

    def down(self) -> None:
        """End it, with every process on its nodes."""
        self._script("down")
        unmount(self.small_disk)

    def kill_node(self, number: int) -> None:
        """A crash: every process on the node is gone at once."""
        self._script("kill-node", number)

    def start_node(self, number: int) -> None:
        """Boot a node that has crashed."""
        self._script("start-node", number)

    def kill_controller(self) -> None:
        """slurmctld dies; jobs run on, and commands of Slurm's hang."""
        self._script("kill-controller")

    def start_controller(self) -> None:
        self._script("start-controller")

    def mount_on_node(self, number: int, *words: object) -> None:
        """`mount words...` as this node alone sees it, until it boots again."""
        self._changed.add(number)
        self._script("on-node", number, "mount", *words)

    @property
    def environment(self) -> dict[str, str]:
        """This process's, with Slurm's commands directed to this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def ask(self, *words: object) -> str:
        """A command of Slurm's; returns what it says. Raises CalledProcessError if it fails."""
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, env=self.environment, timeout=60, check=True
        )
        return done.stdout.strip()

    def jobs(self, job_id: int | None = None) -> dict[int, dict[str, str]]:
        """Jobs by id, `{"state", "nodes", "restarts", "reason"}`; also those that have ended."""
        chosen = [] if job_id is None else ["--jobs", job_id]
        shape = "--Format=JobArrayID:|,State:|,NodeList:|,RestartCnt:|,Reason:|"
        said = self.ask("squeue", "--noheader", "--states=all", shape, *chosen)
        jobs = {}
        for line in said.splitlines():
            name, state, nodes, restarts, reason, *_ = (word.strip() for word in line.split("|"))
            if name.isdigit():
                jobs[int(name)] = {"state": state, "nodes": nodes, "restarts": restarts, "reason": reason}
        return jobs

    def idle_nodes(self) -> int:
        return len(self.ask("sinfo", "--noheader", "-N", "-p", "main", "-t", "idle", "-o", "%n").splitlines())

    def restore(self) -> None:
        """No jobs, and every node up and idle, as a test finds it."""
        self.ask("scancel", "--full", "--signal=KILL", "--user=root")
        self.ask("scancel", "--user=root")
        for number in self._changed:
            self.kill_node(number)
        self._changed.clear()
        for entry in self.small_disk.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for number in range(1, self.nodes + 1):
            if not self._is_up(number):
                self.start_node(number)
        wait_for("the queue to be empty", lambda: not self.ask("squeue", "--noheader"))
        wait_for("all nodes to be idle", lambda: self.idle_nodes() == self.nodes)

    def _is_up(self, number: int) -> bool:
        return (self.folder / "run" / f"n{number}.pid").exists()

    def _script(self, verb: str, *words: object) -> None:
        done = subprocess.run(
            [str(SCRIPT), verb, str(self.folder), *map(str, words)],
            env={**os.environ, **self.knobs},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, f"cluster.sh {verb}: {done.stdout}{done.stderr}"

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            self.down()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()
        shutil.rmtree(self.folder, ignore_errors=True)


def ranks(job_id: int) -> dict[int, psutil.Process]:
    """The ranks of a job by number."""
    # One task a rank says it to srun's task; torchrun to the process itself.
    found = processes(job_id, ("launch.cluster.rank", "pretrain.worker"))
    return {int(environment.get("RANK", environment["SLURM_PROCID"])): process for process, environment in found}


def supervisor(job_id: int) -> psutil.Process:
    """The process that a job's batch script has become."""
    ((process, _),) = processes(job_id, ("launch.cluster.job",))
    return process


def processes(job_id: int, modules: tuple[str, ...]) -> list[tuple[psutil.Process, dict[str, str]]]:
    """Processes `python -P -m MODULE` of a job (of an array: of any of its tasks), with their environments.

    Those on virtual nodes are seen from here, by other ids than their own.
    """
    found = []
    for process in psutil.process_iter():
        try:
            environment, words = process.environ(), process.cmdline()
            of_job = environment.get("SLURM_ARRAY_JOB_ID", environment.get("SLURM_JOB_ID")) == str(job_id)
            is_one = words[1:3] == ["-P", "-m"] and words[3] in modules
            if of_job and is_one and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, environment))
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return found
