"""A node's launcher, where the profile wants torchrun: `python -P -m launch.cluster.node RUN_DIR RANKS`."""

import argparse
import os
import signal
import sys

from launch.cluster.rank import meeting_nodes
from launch.ranks import Meeting, RanksError, StoppedError, run_ranks


def main() -> None:
    """Start the node's ranks and see them through. Exits as a shell would: with 128 and the signal that ended the first
    rank to fail, so that srun tells it on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir")
    parser.add_argument("ranks", type=int)
    args = parser.parse_args()
    environ = os.environ
    meeting = Meeting(
        name=f"steppe-{environ['SLURM_JOB_ID']}-{environ['SLURM_STEP_ID']}",
        address=environ["MASTER_ADDR"],
        port=int(environ["MASTER_PORT"]),
        nodes=meeting_nodes(environ),
        node=int(environ["SLURM_NODEID"]),
    )
    try:
        run_ranks("launch.cluster.rank", [args.run_dir], args.ranks, meeting)
    except RanksError as error:
        print(f"{environ['SLURMD_NODENAME']}: {error}", file=sys.stderr)
        sys.exit(1 if error.killed_by is None else 128 + signal.Signals[error.killed_by])
    except StoppedError:
        pass  # what its ranks made of it is in outcome.json


if __name__ == "__main__":
    main()
