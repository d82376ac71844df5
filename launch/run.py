"""Starting and resuming a run on this machine, and what an attempt at it came to."""

import re
import sys
from pathlib import Path
from typing import Any

from launch.ranks import RanksError, StoppedError, run_ranks
from launch.run_checks import check_device, check_ranks, check_stop_after
from launch.run_folder import checked_change, checked_recipe, locked, new_run
from pretrain.hang import HANG, Report, hang_line
from pretrain.outcome import EXIT_FAILED, EXIT_WRONG_INPUT, Outcome
from pretrain.profile_request import ProfileRequest, check_profile
from pretrain.run_dir import RunDir, read_events, read_json
from pretrain.schedule import last_step_asked

# What torch raises where a peer is gone, among other things.
OF_PEERS = {"RuntimeError", "DistBackendError", "DistNetworkError", "DistStoreError"}
# How gloo, NCCL and torch's store say that a peer is gone.
SIGNS_OF_PEERS = re.compile(r"gloo|nccl|connection|socket|peer", re.IGNORECASE)
# Of a rank that ended by SIGKILL without a word.
OF_MEMORY = (
    "; if nobody killed it, the kernel did, as it does when memory runs out: `dmesg` says so then, Slurm's `sacct` too "
    "(OUT_OF_MEMORY), and `steppe plan` what a rank needs"
)


def start(
    recipe: str,
    overrides: list[str],
    run_dir: Path,
    nproc: int | None,
    stop_after: int | None,
    profile: ProfileRequest | None = None,
) -> Outcome:
    """`steppe train`: make the run folder and train in it. Raises ValueError if the folder holds anything already."""
    run = RunDir(run_dir.resolve())
    config = checked_recipe(recipe, overrides, run)
    ranks = nproc if nproc is not None else default_ranks(run)
    check_ranks(config, ranks)
    check_device(config, ranks)
    check_stop_after(stop_after)
    check_profile(profile, ranks, 0, last_step_asked(config.schedule, stop_after))
    with new_run(config, run):
        return attempt(run, ranks, stop_after, profile)


def resume(
    run_dir: Path,
    overrides: list[str],
    allowed: list[str],
    nproc: int | None,
    stop_after: int | None,
    profile: ProfileRequest | None = None,
) -> Outcome:
    """`steppe resume`: go on from the newest checkpoint, with what a resume may change changed."""
    run = RunDir(run_dir.resolve())
    change = checked_change(run, overrides, allowed)
    ranks = nproc if nproc is not None else default_ranks(run)
    check_ranks(change.new, ranks)
    check_device(change.new, ranks)
    check_stop_after(stop_after)
    check_profile(profile, ranks, 0, last_step=None)  # the ranks find out which step they resume after
    check_no_job(run)
    with locked(run):
        run.stop_path.unlink(missing_ok=True)  # it was to stop then, and is to go on now
        change.make()
        begun = times_begun(run)
        outcome = attempt(run, ranks, stop_after, profile)
        if times_begun(run) == begun and change.differences:
            # What was changed has not trained a step, perhaps because it cannot: the run stays what it was.
            change.take_back()
            print("nothing was trained: the run's config is as it was before", file=sys.stderr)
        return outcome


def check_no_job(run: RunDir) -> None:
    """Raise ValueError if a job of the run waits or runs, as far as Slurm can be asked here."""
    if not run.job_path.is_file():
        return
    from launch.cluster.record import JobRecord
    from launch.cluster.resume import check_no_job as check_queue
    from launch.cluster.slurm import NoSlurmError, SlurmError

    try:
        check_queue(run, JobRecord.read(run))
    except (NoSlurmError, SlurmError) as error:
        print(f"steppe: whether a job of this run waits could not be found out: {error}", file=sys.stderr)


def times_begun(run: RunDir) -> int:
    """How many attempts came so far as to have built the model and loaded what there was to load."""
    return len(read_events(run.events_path, "start")) if run.events_path.is_file() else 0


def attempt(run: RunDir, nproc: int, stop_after: int | None, profile: ProfileRequest | None) -> Outcome:
    """Start the ranks and read how they ended."""
    clear_last_attempt(run)
    print(f"starting {nproc} rank{'s' * (nproc > 1)}", file=sys.stderr)
    args = [str(run.path), *([] if stop_after is None else ["--stop-after", str(stop_after)])]
    args += [] if profile is None else profile.arguments()
    try:
        run_ranks("pretrain.worker", args, nproc)
    except (RanksError, StoppedError) as error:
        if not run.outcome_path.is_file():
            outcome = failure(run, error)
            outcome.write(run)
            return outcome
    return Outcome.read(run)


def clear_last_attempt(run: RunDir) -> None:
    """Remove what the attempt before has left to say how it ended."""
    run.logs.mkdir(exist_ok=True)
    for stale in (run.outcome_path, *run.logs.glob("*.error.json"), *run.logs.glob("*.stacks")):
        stale.unlink(missing_ok=True)


def failure(run: RunDir, error: RanksError | StoppedError) -> Outcome:
    """What went wrong, in one line: the user's own mistake first, then what a rank said, then a hang, then a rank that
    was killed.

    A rank whose peer vanished complains too, with one of the network's errors. In a hang every rank is killed, by
    its own watchdog.
    """
    said: list[tuple[Path, dict[str, Any]]] = [(path, read_json(path)) for path in run.logs.glob("*.error.json")]
    hangs = {rank_of(path): Report.of(reason) for path, reason in said if reason["type"] == HANG}
    said = [item for item in said if item[1]["type"] != HANG]
    # Of several the first: the others may only complain that it is gone, in the same words as it.
    said.sort(
        key=lambda item: (item[1]["exit_code"] != EXIT_WRONG_INPUT, item[1]["type"] in OF_PEERS, written(item[0]))
    )
    go_on = f"go on with: steppe resume {run.path}"
    complaints = not said or said[0][1]["type"] in OF_PEERS
    if hangs and complaints:
        message = f"{hang_line(hangs)}; stacks in {run.logs / 'rank_*.stacks'}; {go_on}"
        return Outcome("failed", EXIT_FAILED, last_step(run), message)
    killed = error.killed_by if isinstance(error, RanksError) else None
    if not said or (killed and complaints):
        message = f"{error}; {go_on}{OF_MEMORY if killed == 'SIGKILL' else ''}"
        return Outcome("failed", EXIT_FAILED, last_step(run), message)
    path, first = said[0]
    message = " ".join(first["message"].split())
    if complaints and SIGNS_OF_PEERS.search(message):  # words of addresses and source files
        message = f"rank {rank_of(path)} lost touch with another"
    if first["type"] == "CheckpointError":
        message += f"; put that right, then go on from the checkpoint before with: steppe resume {run.path}"
    elif first["exit_code"] != EXIT_WRONG_INPUT and first["type"] != "OSError":
        message = f"{first['type']}: {message} (traceback in {run.rank_log(rank_of(path))})"
    return Outcome("failed", first["exit_code"], last_step(run), message)


def rank_of(error_path: Path) -> int:
    """The rank that a `rank_00000.error.json` is of."""
    return int(error_path.name.removeprefix("rank_").removesuffix(".error.json"))


def written(path: Path) -> int:
    """When, in nanoseconds; by the clock of the file system, which is one for all nodes."""
    return path.stat().st_mtime_ns


def last_step(run: RunDir) -> int:
    """The last step that was made, 0 if none was."""
    steps = read_events(run.events_path, "step") if run.events_path.is_file() else []
    return steps[-1]["step"] if steps else 0


def default_ranks(run: RunDir) -> int:
    """As many ranks as the last attempt had; if none came so far as to say, one a GPU, one where there is none."""
    if run.environment_path.is_file():
        return read_json(run.environment_path)["ranks"]
    from pretrain.device import device_count

    return device_count()
