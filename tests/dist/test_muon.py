"""Muon's matrices in pieces on several ranks: the result is that of whole matrices, on every rank that holds a part."""

from pathlib import Path

import pytest

from tests.dist.harness import run_cases

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("nproc", [2, 4])
def test_any_cut_gives_the_whole_matrices_result(tmp_path: Path, nproc: int) -> None:
    """A matrix is orthogonalised whole on one rank from the same input, so the cut shows in no more than rounding.

    In bf16 too, since the input is the same: only the products of several matrices at once may round otherwise.
    """
    errors = run_cases("tests.dist.muon_cases", nproc, tmp_path)
    assert len(errors) == 15
    for case, error in errors.items():
        assert error <= (1e-2 if case.startswith("bf16") else 1e-5), f"{case}: {error}"
