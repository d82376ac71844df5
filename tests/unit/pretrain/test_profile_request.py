"""Profiles that cannot be made are refused, with what can be."""

import pytest

from pretrain.profile_request import WARM_UP_STEPS, ProfileRequest, check_profile


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (ProfileRequest(0), "--profile 0: give a number of steps, 1 or more"),
        (ProfileRequest(-2), "--profile -2: give a number of steps, 1 or more"),
        (ProfileRequest(6), "--profile 6: from step 3 to the last one, step 10, there are 5 steps .* use --profile 5"),
        (ProfileRequest(5, (0, 4)), "--profile-rank 4: there are 4 ranks, so give one from 0 to 3"),
        (ProfileRequest(5, (-1,)), "--profile-rank -1: there are 4 ranks"),
    ],
)
def test_what_cannot_be_profiled(request_: ProfileRequest, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_profile(request_, ranks=4, first_step=2, last_step=10)


def test_a_run_without_a_step_to_profile() -> None:
    said = "there are 0 steps after the 3 that warm up: leave it out, or end later .*--stop-after"
    with pytest.raises(ValueError, match=said):
        check_profile(ProfileRequest(1), ranks=1, first_step=8, last_step=10)


def test_a_rank_that_a_run_alone_does_not_have() -> None:
    with pytest.raises(ValueError, match="--profile-rank 1: there is 1 rank, so give 0"):
        check_profile(ProfileRequest(1, (1,)), ranks=1, first_step=0, last_step=10)


def test_what_can_be_profiled() -> None:
    check_profile(None, ranks=4, first_step=9, last_step=10)
    check_profile(ProfileRequest(10 - WARM_UP_STEPS, (3,)), ranks=4, first_step=0, last_step=10)
    check_profile(ProfileRequest(10**6), ranks=4, first_step=0, last_step=None)
