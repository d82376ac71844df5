"""`steppe train` and `steppe resume`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pretrain.profile_request import WARM_UP_STEPS, ProfileRequest
from pretrain.run_dir import RunDir

if TYPE_CHECKING:
    from pretrain.outcome import Outcome

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a key; VALUE is YAML. May be repeated.")
]
StopAfter = Annotated[
    int | None, typer.Option(help="End early after this step, with a checkpoint; the schedule is unchanged.")
]
Profile = Annotated[
    int | None,
    typer.Option(
        metavar="STEPS",
        help=f"Profile so many steps, after the first {WARM_UP_STEPS}: a table, and a trace for Chrome.",
    ),
]
ProfileRank = Annotated[
    list[int] | None,
    typer.Option(metavar="RANK", help="To profile: a rank whose trace is written; may be repeated [default: 0]."),
]


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe that comes with Steppe.")],
    run_dir: Annotated[Path | None, typer.Option(help="Folder of the run [default: runs/RECIPE].")] = None,
    nproc: Annotated[int | None, typer.Option(help="Ranks on this machine [default: one a GPU, else 1].")] = None,
    overrides: Overrides = [],  # noqa: B006
    stop_after: StopAfter = None,
    profile: Profile = None,
    profile_rank: ProfileRank = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Try the recipe here, made small, on a few CPU ranks; then report.")
    ] = False,
    nodes: Annotated[int | None, typer.Option(help="To rehearse: nodes that the run is meant for.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="To rehearse: GPUs of each [default: 8].")] = None,
    ranks: Annotated[
        int | None, typer.Option(help="To rehearse: the same as one number [default: the fewest].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="To rehearse: one JSON object on stdout.")] = False,
) -> None:
    """Pretrain a model in a new run folder; or, with --rehearse, find out beforehand whether that will work."""
    to_profile = profile_request(profile, profile_rank)
    meant_for = {"--nodes": nodes, "--gpus-per-node": gpus_per_node, "--ranks": ranks, "--json": as_json or None}
    of_a_run = {"--nproc": nproc, "--stop-after": stop_after, "--profile": profile}
    for flag, value in (of_a_run if rehearse else meant_for).items():
        if value is not None:
            raise ValueError(f"{flag} does not go {'with' if rehearse else 'without'} --rehearse: leave it out")
    if rehearse:
        from launch.commands.rehearse import rehearse as rehearse_recipe

        rehearse_recipe(recipe, overrides, run_dir, nodes, gpus_per_node, ranks, as_json)
    from launch.run import start

    folder = run_dir or Path("runs") / Path(recipe).stem
    report(start(recipe, overrides, folder, nproc, stop_after, to_profile), folder)


def resume(
    run_dir: Annotated[Path, typer.Argument(help="Folder of the run.")],
    nproc: Annotated[int | None, typer.Option(help="Ranks on this machine [default: as before].")] = None,
    overrides: Overrides = [],  # noqa: B006
    allow: Annotated[list[str], typer.Option(metavar="KEY", help="Change a key that a resume refuses.")] = [],  # noqa: B006
    stop_after: StopAfter = None,
    profile: Profile = None,
    profile_rank: ProfileRank = None,
    cluster: Annotated[
        str | None, typer.Option(metavar="PROFILE", help="By a job on this cluster [default: as submitted].")
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Nodes of the job [default: as before].")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="GPUs of each [default: as before].")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Time limit of the job [default: as before].")
    ] = None,
    chain: Annotated[int | None, typer.Option(help="Queue this many jobs that follow one another.")] = None,
) -> None:
    """Go on with a run from its newest checkpoint: here, or by a job if it was submitted to a cluster."""
    to_profile = profile_request(profile, profile_rank)
    of_a_job = {"--cluster": cluster, "--nodes": nodes, "--gpus-per-node": gpus_per_node, "--time": time}
    of_a_job |= {"--chain": chain}
    here = {"--nproc": nproc, "--stop-after": stop_after, "--profile": profile}
    job = next((flag for flag, value in of_a_job.items() if value is not None), None)
    local = next((flag for flag, value in here.items() if value is not None), None)
    if job is not None and local is not None:
        raise ValueError(f"{local} trains on this machine, {job} by a job: leave one of them out")
    if job is not None or (local is None and RunDir(run_dir).job_path.is_file()):
        from launch.cluster.resume import Again
        from launch.cluster.resume import resume as queue
        from launch.commands.submit import report as report_job

        record = queue(run_dir, overrides, allow, Again(cluster, nodes, gpus_per_node, time, chain))
        report_job({"job_id": record.job_id}, record, run_dir, as_json=False)
        return
    from launch.run import resume as go_on

    report(go_on(run_dir, overrides, allow, nproc, stop_after, to_profile), run_dir)


def profile_request(steps: int | None, ranks: list[int] | None) -> ProfileRequest | None:
    """What is asked to be profiled. Raises ValueError if only ranks are given."""
    if steps is None:
        if ranks:
            raise ValueError(f"--profile-rank {ranks[0]} does not go without --profile: add it, or leave this out")
        return None
    return ProfileRequest(steps, tuple(ranks or [0]))


def report(outcome: "Outcome", run_dir: Path) -> None:
    """Say how the run ended and leave with its exit code."""
    hint = f"; go on with: steppe resume {run_dir}" if outcome.status == "stopped" else ""
    print(f"steppe: {outcome.message}{hint}", file=sys.stderr)
    raise typer.Exit(outcome.exit_code)
