"""One contender of `steppe bench data --part loader`:
`python -P -m launch.bench.data_loader_contender NAME DATA SCRATCH T B`.

It answers {"seconds": s} with how many tokens it read in about so many seconds, from the beginning.
"""

import sys
import time
from pathlib import Path
from typing import Any

from launch.bench.data_loaders import BUILDERS, Open, Work
from launch.bench.turns import Answers


def turn(opened: Open, batch_tokens: int, seconds: float) -> dict[str, Any]:
    """Read until the time or the epoch is over."""
    began = time.perf_counter()
    batches = opened()
    next(batches)
    first = time.perf_counter()
    count = 0
    for _ in batches:
        count += 1
        if time.perf_counter() - first >= seconds:
            break
    ended = time.perf_counter()
    batches.close()
    return {"tokens": count * batch_tokens, "seconds": ended - first, "first_batch_seconds": first - began}


def main() -> None:
    """Answer until stdin ends."""
    answers = Answers()
    name, data, scratch = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    work = Work(data, scratch, *map(int, sys.argv[4:]))
    opened = BUILDERS[name](work)
    answers.say(name=name)
    for question in answers.questions():
        answers.say(**turn(opened, work.sequence_length * work.micro_batch_size, question["seconds"]))


if __name__ == "__main__":
    main()
