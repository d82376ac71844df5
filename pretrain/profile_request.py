"""What `--profile` asks for. No torch here."""

from typing import NamedTuple

WARM_UP_STEPS = 3  # in the first ones memory is found, ZeRO 3 learns the order of the modules, and kernels are compiled


class ProfileRequest(NamedTuple):
    """How many steps of an attempt to profile, after WARM_UP_STEPS, and of which ranks to write a trace."""

    steps: int
    ranks: tuple[int, ...] = (0,)

    def arguments(self) -> list[str]:
        """Of a worker's command line."""
        return ["--profile", str(self.steps), "--profile-rank", *map(str, self.ranks)]


def check_profile(request: ProfileRequest | None, ranks: int, first_step: int, last_step: int | None) -> None:
    """Raise ValueError unless so many steps can be profiled on these ranks between `first_step`, which is made already,
    and `last_step` (None: not known beforehand, as in a run that is counted in tokens)."""
    if request is None:
        return
    steps = request.steps
    if steps < 1:
        raise ValueError(f"--profile {steps}: give a number of steps, 1 or more")
    if last_step is not None and first_step + WARM_UP_STEPS + steps > last_step:
        most = max(0, last_step - first_step - WARM_UP_STEPS)
        remedy = f"use --profile {most}" if most else "leave it out, or end later (schedule.total_steps, --stop-after)"
        raise ValueError(
            f"--profile {steps}: from step {first_step + 1} to the last one, step {last_step}, there are {most} steps "
            f"after the {WARM_UP_STEPS} that warm up: {remedy}"
        )
    for rank in request.ranks:
        if not 0 <= rank < ranks:
            there_are = (
                "there is 1 rank, so give 0"
                if ranks == 1
                else f"there are {ranks} ranks, so give one from 0 to {ranks - 1}"
            )
            raise ValueError(f"--profile-rank {rank}: {there_are}")
