"""What is particular to a cluster: one YAML file a cluster, for all runs on it. Read on a login node: no torch."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from launch.named_file import named_file
from pretrain.config import Section
from pretrain.recipe import read_mapping, validated_as

PROFILES = Path(__file__).parents[2] / "slurm" / "profiles"

# Options of sbatch that follow from a profile and from what is submitted, and where each is set. An option of the
# user's may not be one of them, nor the short form of one (getopt takes `--part` for `--partition`).
DERIVED = {
    **{name: f"`{name.replace('-', '_')}`" for name in ("partition", "account", "qos", "reservation", "constraint")},
    **dict.fromkeys(("gres", "gpus", "gpus-per-node", "gpus-per-task"), "`gpus_per_node` and `gpu_request`"),
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "`ranks_per_node` and --nodes"),
    **dict.fromkeys(("cpus-per-task",), "`cpus_per_rank`"),
    **dict.fromkeys(("mem",), "`memory_per_node`"),
    **dict.fromkeys(("exclusive",), "`exclusive`"),
    **dict.fromkeys(("requeue", "no-requeue"), "`requeue`"),
    **dict.fromkeys(("time",), "`time_limit` or --time"),
    **dict.fromkeys(("signal",), "`signal_lead_seconds`"),
    **dict.fromkeys(("nodes",), "--nodes"),
    **dict.fromkeys(("array",), "--chain or --sweep"),
    **dict.fromkeys(("job-name",), "the recipe's `name`"),
    **dict.fromkeys(("batch",), "Steppe, whose batch script runs on the first node,"),
    **dict.fromkeys(("exclude",), "Steppe, when a preflight finds bad nodes,"),
    **dict.fromkeys(
        ("output", "error", "input", "open-mode", "chdir", "export", "parsable", "test-only", "wrap", "wait"), "Steppe"
    ),
}
# Variables that Steppe sets for each rank or that would put other code before the frozen one.
OURS = re.compile(r"SLURM_|SBATCH_|SRUN_|STEPPE_|PYTHONPATH$|PYTHONHOME$|PYTHONSAFEPATH$|BASH_ENV$|ENV$")
OF_A_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

MOST_LEAD_SECONDS = 65535  # that sbatch's --signal takes
TIME_LIMIT = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(\d+)(?::(\d+)(?::(\d+))?)?)", re.ASCII)


def time_limit_seconds(limit: str) -> int:
    """Seconds of a time limit in Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S.

    Raises ValueError for anything else, and for no time at all.
    """
    found = TIME_LIMIT.fullmatch(limit)
    if found is None:
        raise ValueError(
            f"{limit!r} is no time limit: write minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    days, hours, minutes, seconds, first, second, third = (int(part or 0) for part in found.groups())
    if found.group(1) is None:
        hours, minutes, seconds = (first, second, third) if found.group(7) is not None else (0, first, second)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise ValueError(f"{limit!r} is no time at all: a job needs at least a minute")
    return total


def one_line(text: str) -> str:
    """Raise ValueError for text that would not stay on its line of a script."""
    if not text or text != text.strip() or any(not character.isprintable() for character in text):
        raise ValueError(f"{text!r} must be one line of printable characters, without blanks around it")
    return text


def _a_text(value: object) -> object:
    if isinstance(value, int):
        raise ValueError(f"{value} is a number to YAML, which reads 12:00:00 as 43200: put the time limit in quotes")
    return value


def _a_limit(text: str) -> str:
    time_limit_seconds(text)
    return text


Line = Annotated[str, AfterValidator(one_line)]
TimeLimit = Annotated[str, BeforeValidator(_a_text), AfterValidator(_a_limit)]


class ContainerConfig(Section):
    """The container that ranks run in. The supervisor stays outside, where Slurm's commands are.

    runtime: apptainer (also what used to be singularity), or pyxis, NVIDIA's plugin of srun.
    image: a path, or for pyxis also an address such as "nvcr.io#nvidia/pytorch:26.01-py3".
    mounts: "HOST:CONTAINER" or "HOST:CONTAINER:ro". The run's folder, its data and node-local folder are added.
    python: the interpreter inside.
    """

    runtime: Literal["apptainer", "pyxis"]
    image: Line
    mounts: tuple[Line, ...] = ()
    python: Line = "python3"

    @field_validator("mounts")
    @classmethod
    def _mounts_have_two_ends(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            if len(mount.split(":")) not in (2, 3) or not all(mount.split(":")) or "," in mount:
                raise ValueError(f"{mount!r} is no mount: write HOST:CONTAINER or HOST:CONTAINER:ro, without commas")
        return mounts


class StagingConfig(Section):
    """What is copied to node-local disk before ranks start, by sbcast: one reader of the shared file system, and a tree
    of copies between the nodes. Worth it from some hundred ranks on.

    code: Steppe's own code.
    environment_archive: a tar file of the Python environment (its `bin/` at the top, or in one folder), or None.
    """

    code: bool = True
    environment_archive: Line | None = None


class PreflightConfig(Section):
    """What is looked at on every node before ranks start.

    seconds: how long it may take before the nodes that have not answered count as bad; 0: no preflight.
    free_gigabytes: room that there must be where the run's folder lies, and on each node's local folder.
    clock_skew_seconds: how far clocks may be apart.
    """

    seconds: float = Field(default=300.0, ge=0)
    free_gigabytes: float = Field(default=5.0, ge=0)
    clock_skew_seconds: float = Field(default=5.0, gt=0)


class ClusterProfile(Section):
    """How jobs are submitted on a cluster. What is left out is left to the cluster.

    description: a line for people.
    partition, account, qos, reservation, constraint: as sbatch takes them.
    time_limit: of a job, in Slurm's forms, in quotes ("24:00:00", "2-00"); `--time` goes before it.
    gpus_per_node: GPUs, and so ranks, of a node; 0 on a cluster of CPUs. `--gpus-per-node` goes before it.
    ranks_per_node: ranks of a node without GPUs.
    gpu_request: whether GPUs are asked for by --gres=gpu:N, by --gpus-per-node=N, or not at all ("none": they come
        with the node). gpu_type: the type to name in it.
    cpus_per_rank: cores of each rank, and its OMP_NUM_THREADS; None: what Slurm gives.
    memory_per_node: as sbatch's --mem takes it ("900G"; "0": all of the node).
    exclusive: no other job on the nodes.
    modules: names for `module load`, in order; what is loaded at submission stays loaded.
    setup: lines of bash, run as they are on the first node after the modules: the one place for a user's own shell.
    python: the interpreter of the supervisor and, without a container, of ranks; None: the one that submits.
    container: see ContainerConfig.
    environment: variables of every process, as they are (no $NAME is expanded), before Steppe's own defaults.
    network_interface: of the traffic between nodes (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME); several with commas.
    collective_timeout_seconds: how long a rank waits for the others in one collective operation. Where the recipe's
        `health.hang_seconds` asks for more, it is more: the watchdog's report says who is late.
    local_folder: node-local disk, for compile caches and staging; variables of the job may stand in it ($SLURM_JOB_ID).
        It is made for the job's user alone, and must be his own where it is there: code that is run lies in it.
    launcher: srun starts one task a rank, or torchrun one task a node that starts the node's ranks.
    requeue: whether a job may be requeued, as Steppe does at a time limit and Slurm after a node failure. Where it may
        not, `steppe submit --chain N` queues N jobs that follow one another.
    max_restarts_without_progress: attempts in a row that may end without a newer checkpoint before the run is given up.
    signal_lead_seconds: how long before its limit a job is told to stop, until a step and a save have been measured.
    staging: see StagingConfig; None: everything is read from the shared file system.
    preflight: see PreflightConfig.
    sbatch_options: further options, each "--name" or "--name=value"; not what another field sets.
    slurm_timeout_seconds: how long a call of Slurm's may take.
    """

    description: str = ""
    partition: Line | None = None
    account: Line | None = None
    qos: Line | None = None
    reservation: Line | None = None
    constraint: Line | None = None
    time_limit: TimeLimit | None = None
    gpus_per_node: int = Field(default=0, ge=0)
    ranks_per_node: int = Field(default=1, gt=0)
    gpu_request: Literal["gres", "gpus-per-node", "none"] = "gres"
    gpu_type: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_.-]+$")
    cpus_per_rank: int | None = Field(default=None, gt=0)
    memory_per_node: str | None = Field(default=None, pattern=r"^\d+[KMGT]?$")
    exclusive: bool = False
    modules: tuple[Line, ...] = ()
    setup: tuple[str, ...] = ()
    python: Line | None = None
    container: ContainerConfig | None = None
    environment: dict[str, str] = Field(default_factory=dict)
    network_interface: str | None = Field(default=None, pattern=r"^[=^]?[A-Za-z0-9_.,:-]+$")
    collective_timeout_seconds: int = Field(default=2400, gt=0)
    local_folder: Line = "/tmp/steppe-$SLURM_JOB_ID"
    launcher: Literal["srun", "torchrun"] = "srun"
    requeue: bool = True
    max_restarts_without_progress: int = Field(default=3, gt=0)
    signal_lead_seconds: int = Field(default=300, gt=0, le=MOST_LEAD_SECONDS)
    staging: StagingConfig | None = None
    preflight: PreflightConfig = PreflightConfig()
    sbatch_options: tuple[Line, ...] = ()
    slurm_timeout_seconds: float = Field(default=60.0, gt=0)

    @field_validator("setup")
    @classmethod
    def _setup_is_text(cls, setup: tuple[str, ...]) -> tuple[str, ...]:
        if any("\0" in line for line in setup):
            raise ValueError("a line of setup holds a NUL character, which bash cannot read")
        return setup

    @field_validator("local_folder")
    @classmethod
    def _local_folder_is_absolute(cls, folder: str) -> str:
        if not folder.startswith(("/", "$")) or any(character in folder for character in "`\\\"'(){}:"):
            raise ValueError(f"{folder!r} must be an absolute path, plain but for variables such as $SLURM_JOB_ID")
        return folder

    @field_validator("environment")
    @classmethod
    def _environment_is_a_shells(cls, environment: dict[str, str]) -> dict[str, str]:
        for name, value in environment.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f"{name!r} is no name of a variable: use letters, digits and _")
            if OURS.match(name) or name in OF_A_RANK:
                raise ValueError(f"{name} is set by Slurm or by Steppe for each job or rank: leave it out")
            if any(not character.isprintable() for character in value):
                raise ValueError(f"{name}={value!r} must be one line of printable characters")
        return environment

    @field_validator("sbatch_options")
    @classmethod
    def _options_contradict_nothing(cls, options: tuple[str, ...]) -> tuple[str, ...]:
        for option in options:
            found = re.fullmatch(r"--([a-z][a-z0-9-]*)(?:=.*)?", option)
            if found is None:
                raise ValueError(f"{option!r} must have the form --name or --name=value, one option a line")
            for name, where in DERIVED.items():
                if name.startswith(found.group(1)):
                    raise ValueError(f"{option} is not to be set here: --{name} is set by {where}")
        return options

    @model_validator(mode="after")
    def _one_way_to_count_ranks(self) -> Self:
        if (
            self.gpus_per_node
            and "ranks_per_node" in self.model_fields_set
            and self.ranks_per_node != self.gpus_per_node
        ):
            raise ValueError(
                f"ranks_per_node={self.ranks_per_node} does not go with gpus_per_node={self.gpus_per_node}: there is "
                "one rank a GPU; leave ranks_per_node out"
            )
        return self


def load_profile(name_or_path: str) -> ClusterProfile:
    """Read and validate a profile: a path, or the name of one that comes with Steppe.

    Raises ValueError (one line: value, rule, remedy) for anything wrong with it.
    """
    path = named_file(name_or_path, PROFILES, "profile")
    try:
        return validated_as(ClusterProfile, read_mapping(path, "profile", "fields such as partition and gpus_per_node"))
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
