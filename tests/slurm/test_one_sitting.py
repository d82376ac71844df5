"""What `python -m tests.slurm.one_sitting` does, on a model of 50 thousand parameters."""

from pathlib import Path

import pytest

from tests.slurm.one_sitting import LEAST_STEPS, sit

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(3600)]


def test_one_sitting(slurm: None, tmp_path: Path) -> None:
    """It raises when anything does not come out as promised."""
    sit(tmp_path, "tiny", steps=LEAST_STEPS)
