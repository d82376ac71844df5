"""`steppe submit`."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launch.commands.train import Overrides

if TYPE_CHECKING:
    from launch.cluster.record import JobRecord


def submit(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Steppe.")],
    cluster: Annotated[str, typer.Option(metavar="PROFILE", help="The cluster's profile: a YAML file, or a name.")],
    nodes: Annotated[int, typer.Option(help="Nodes of the job.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each [default: the profile's].")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of a job [default: the profile's].")
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/RECIPE].")] = None,
    overrides: Overrides = [],  # noqa: B006
    chain: Annotated[int, typer.Option(help="Queue this many jobs that follow one another.")] = 1,
    sweep: Annotated[
        list[str],
        typer.Option(metavar="KEY=V1,V2,...", help="A run for each value, as one job array. May be repeated."),
    ] = [],  # noqa: B006
    parallel: Annotated[int | None, typer.Option(help="Points of a sweep that run at the same time.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the batch script; write and queue nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Queue a run on a Slurm cluster, once everything that can be wrong has been looked at."""
    from launch.cluster.submit import Request, checked
    from launch.cluster.submit import submit as queue
    from launch.cluster.sweep import checked_sweep, submit_sweep

    folder = run_dir or Path("runs") / Path(recipe).stem
    request = Request(cluster, nodes, gpus_per_node, time, chain)
    if parallel is not None and not sweep:
        raise ValueError("--parallel does not go without --sweep: leave it out")
    if sweep:
        points = checked_sweep(recipe, overrides, sweep, folder, request, parallel)
        if dry_run:
            show(points.record, points.script, as_json)
        else:
            report(submit_sweep(points), points.record, points.folder, as_json)
    else:
        one = checked(recipe, overrides, folder, request.record())
        if dry_run:
            show(one.record, one.script, as_json)
        else:
            report({"job_id": queue(one).job_id}, one.record, one.run.path, as_json)


def show(record: "JobRecord", script: str, as_json: bool) -> None:
    """What would be queued, and what Slurm says of it. Raises ValueError where it would refuse."""
    from launch.cluster.slurm import NoSlurmError, SlurmError
    from launch.cluster.submit import tested

    if not as_json:
        print(script, end="")
    try:
        answer = tested(record, script)
    except (NoSlurmError, SlurmError) as error:
        answer = f"not tested: {error}"
    if as_json:
        print(json.dumps({"script": script, "slurm": answer}))
    else:
        print(f"steppe: {answer}", file=sys.stderr)
    hint_at_chain(record)


def report(told: dict[str, Any], record: "JobRecord", folder: Path, as_json: bool) -> None:
    """Say what was queued."""
    told |= {"run_dir": str(folder), "cluster": record.cluster, "nodes": record.nodes, "ranks": record.ranks}
    if as_json:
        print(json.dumps(told))
    else:
        size = f"{record.nodes} node{'s' * (record.nodes > 1)}, {record.ranks} rank{'s' * (record.ranks > 1)}"
        runs = f"{len(told['points'])} runs of " if "points" in told else ""
        print(f"job {told['job_id']}: {runs}{size} on {record.cluster}, in {folder}")
        print(f"steppe: see what it does with: steppe status {shlex.quote(str(folder))}", file=sys.stderr)
    hint_at_chain(record)


def hint_at_chain(record: "JobRecord") -> None:
    """Say so if the run will end at its first time limit, whatever it has left to do."""
    if not record.profile.requeue and record.chain == 1:
        print(
            "steppe: this profile has requeue: false, so the run ends with its first job; --chain N queues N in a row",
            file=sys.stderr,
        )
