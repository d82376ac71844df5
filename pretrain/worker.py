"""One rank of a run: `python -P -m pretrain.worker RUN_DIR`, started by a launcher that sets RANK and friends."""

import argparse
import fcntl
import logging
import os
import resource
import sys
import traceback
from pathlib import Path

from pretrain.collective_timeout import COLLECTIVE_TIMEOUT, outlasting
from pretrain.config import RunConfig
from pretrain.host_memory import keep_freed_memory
from pretrain.profile_request import ProfileRequest
from pretrain.rank_error import write_rank_error
from pretrain.recipe import load_config
from pretrain.run_dir import RunDir, event_line, open_events, write_json
from pretrain.stop import StopRequest
from pretrain.watchdog import Watchdog


def main() -> None:
    """Train, then let rank 0 write outcome.json once every rank is through; or say why this rank could not go on."""
    stop = StopRequest()  # before the heavy imports, which take seconds in which a signal may come
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--stop-after", type=int, default=None)
    parser.add_argument("--profile", type=int, default=None)
    parser.add_argument("--profile-rank", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    profile = None if args.profile is None else ProfileRequest(args.profile, tuple(args.profile_rank))
    run_dir, rank = RunDir(args.run_dir), int(os.environ["RANK"])
    divert_output(run_dir.rank_log(rank), streams=(1, 2) if rank else (1,))
    try:
        config = load_config(run_dir.config_path)
        watchdog = Watchdog(run_dir, rank, config.health.hang_seconds)
        run(run_dir, config, rank, stop, watchdog, args.stop_after, profile)
    except Exception as error:
        # No barrier here: the other ranks may be in the middle of something, and the launcher ends them.
        with open(run_dir.rank_log(rank), "a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        write_rank_error(run_dir, rank, error)
        sys.exit(1)


def run(
    run_dir: RunDir,
    config: RunConfig,
    rank: int,
    stop: StopRequest,
    watchdog: Watchdog,
    stop_after: int | None,
    profile: ProfileRequest | None,
) -> None:
    """What a rank does when nothing goes wrong."""
    import torch.distributed as dist

    from pretrain.affinity import BIND, bind
    from pretrain.device import detect, gpu_addresses, init_process_group, make_deterministic
    from pretrain.environment import describe_environment
    from pretrain.train import train

    # Each group of ranks takes open files, and so does loading; the usual limit of 1,024 is soft.
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    keep_freed_memory()
    if config.deterministic:
        make_deterministic()
    device = detect()
    if BIND in os.environ:
        local_rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        print(f"bound to cores {bind(local_rank, ranks, gpu_addresses(ranks))}", flush=True)
    if config.health.hang_seconds:  # the watchdog comes first: it can say who is late
        os.environ.setdefault(COLLECTIVE_TIMEOUT, str(outlasting(config.health.hang_seconds)))
    init_process_group(device)
    # Held by every rank until its process is gone, and so longer than the launcher's own, should that be killed.
    lock = open(run_dir.ranks_lock_path, "w", encoding="utf-8")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_SH)
    if rank == 0:
        environment = describe_environment(device, dist.get_world_size())
        write_json(run_dir.environment_path, environment)
        with open_events(run_dir) as events:
            events.write(event_line("environment", environment))
    outcome = train(run_dir, config, device, stop, watchdog, stop_after, profile)
    watchdog.beat(outcome.step, "ending")
    dist.barrier()
    if rank == 0:
        outcome.write(run_dir)
    dist.destroy_process_group()


def divert_output(path: Path, streams: tuple[int, ...]) -> None:
    """Send this process's stdout (and stderr, except on rank 0, which speaks to the terminal) to its log.

    The libraries' remarks and warnings go there too.
    """
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in streams:
        os.dup2(log, stream)
    os.close(log)
    logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
    logging.captureWarnings(True)


if __name__ == "__main__":
    main()
