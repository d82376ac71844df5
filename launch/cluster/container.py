"""How ranks are started inside a profile's container. The supervisor is outside, where Slurm's commands are."""

import os
import sys
from pathlib import Path

from launch.cluster.record import JobRecord
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir

# Where this job's code lies: RUN/code, or its copy on node-local disk. The batch script sets both.
CODE, LOCAL_FOLDER = "STEPPE_CODE", "STEPPE_LOCAL_FOLDER"


def rank_command(record: JobRecord, run: RunDir, arguments: list[str]) -> tuple[list[str], list[str]]:
    """(options for srun, command) that run `python arguments...` on a node, in the profile's container if it has one.

    Called in a job, by the supervisor: without a container ranks take the supervisor's own interpreter.
    """
    container = record.profile.container
    if container is None:
        return [], [sys.executable, *arguments]
    inside = [container.python, *arguments]
    mounts = [*(f"{folder}:{folder}" for folder in folders(run)), *container.mounts]
    if container.runtime == "pyxis":
        options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
        return [*options, "--no-container-mount-home"], inside
    binds = [word for mount in mounts for word in ("--bind", mount)]
    gpus = ["--nv"] if record.gpus_per_node else []
    return [], ["apptainer", "exec", *gpus, *binds, container.image, *inside]


def folders(run: RunDir) -> list[str]:
    """What a rank reads and writes: the run, its code, its data, node-local disk. None of them within another."""
    config = load_config(run.config_path)
    wanted = {run.path, *(Path(source.path) for source in (*config.data.sources, *config.evaluation.sources))}
    wanted |= {Path(os.environ[name]) for name in (CODE, LOCAL_FOLDER) if name in os.environ}
    if config.init_from is not None:
        wanted.add(Path(config.init_from))
    return sorted(str(path) for path in wanted if not any(path.is_relative_to(other) for other in wanted - {path}))
