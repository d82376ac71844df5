"""One rank of a job: `python -P -m launch.cluster.rank RUN_DIR`, a task of srun's or a child of torch's launcher.

It says who it is in the words that torch knows, and becomes `pretrain.worker`.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from launch.cluster.local_folder import problem_of_local_folder
from pretrain import worker
from pretrain.affinity import BIND
from pretrain.rank_error import write_rank_error
from pretrain.run_dir import RunDir

# How the node is called by Slurm, whatever its host name.
NODE_NAME = "SLURMD_NODENAME"
OF_TORCHRUN = "TORCHELASTIC_RUN_ID"


def main() -> None:
    """Raises ValueError if this was not started by a supervisor."""
    if OF_TORCHRUN not in os.environ:
        os.environ |= rank_environment(os.environ)
    os.environ[BIND] = "1"
    # torch reads it when it is imported.
    cores = len(os.sched_getaffinity(0)) // int(os.environ["LOCAL_WORLD_SIZE"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
    run, rank = RunDir(Path(sys.argv[1])), int(os.environ["RANK"])
    if problem := problem_of_local_folder():  # where there was no preflight to find it
        write_rank_error(run, rank, RuntimeError(f"{os.environ[NODE_NAME]} is a bad node: {problem}"))
        sys.exit(1)
    if rank == 0:
        write_pid(run)
    worker.main()


def write_pid(run: RunDir) -> None:
    """Say which process this is, all at once: whoever reads it finds all of it, or nothing yet."""
    path = pid_path(run)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(f"{os.getpid()}\n", encoding="utf-8")
    os.replace(scratch, path)


def pid_path(run: RunDir) -> Path:
    """Where rank 0 says which process of the first node, the batch script's, it is: a signal to it alone reaches no
    process that a rank has started, as one that Slurm delivers does."""
    return run.logs / "rank_00000.pid"


def rank_environment(slurm: Mapping[str, str]) -> dict[str, str]:
    """RANK and friends of a task, from Slurm's variables and the supervisor's MASTER_ADDR and MASTER_PORT.

    Raises ValueError if one is missing, nodes have unlike numbers of tasks, or several nodes are to meet at an address
    that is each one's own.
    """
    nodes, tasks = meeting_nodes(slurm), _number(slurm, "SLURM_STEP_NUM_TASKS")
    if tasks % nodes:
        raise ValueError(f"{tasks} tasks do not spread evenly over {nodes} nodes: every node must have as many ranks")
    return {
        "RANK": str(_number(slurm, "SLURM_PROCID")),
        "LOCAL_RANK": str(_number(slurm, "SLURM_LOCALID")),
        "WORLD_SIZE": str(tasks),
        "LOCAL_WORLD_SIZE": str(tasks // nodes),
        "GROUP_RANK": str(_number(slurm, "SLURM_NODEID")),
    }


def meeting_nodes(slurm: Mapping[str, str]) -> int:
    """How many nodes the step has. Raises ValueError if they could not meet at MASTER_ADDR."""
    nodes, address = _number(slurm, "SLURM_STEP_NUM_NODES"), slurm.get("MASTER_ADDR", "")
    _number(slurm, "MASTER_PORT")
    if not address or (nodes > 1 and (address in ("localhost", "::1") or address.startswith("127."))):
        raise ValueError(
            f"MASTER_ADDR={address}: ranks on {nodes} nodes must meet at an address that all of them reach, "
            "the name of the first node"
        )
    return nodes


def _number(slurm: Mapping[str, str], name: str) -> int:
    try:
        return int(slurm[name])
    except (KeyError, ValueError):
        raise ValueError(f"{name} is not set as srun sets it: submit runs with `steppe submit`") from None


if __name__ == "__main__":
    main()
