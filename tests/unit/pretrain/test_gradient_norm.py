"""The norm of a gradient is as exact for a large matrix as for a small one."""

import pytest
import torch

from pretrain.gradient_norm import PIECE_ELEMENTS, squared_norm


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (PIECE_ELEMENTS,), (PIECE_ELEMENTS + 1,), (2, PIECE_ELEMENTS)])
def test_it_is_that_in_fp64(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    assert gradient.dtype == torch.float32
    found = squared_norm(gradient)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, gradient.double().square().sum(), rtol=1e-4, atol=0)


def test_of_a_gradient_that_lies_otherwise() -> None:
    gradient = torch.arange(6.0).view(2, 3).T
    assert squared_norm(gradient) == 55


def test_what_is_no_number_stays_none() -> None:
    gradient = torch.zeros(PIECE_ELEMENTS + 1)
    gradient[-1] = torch.inf
    assert squared_norm(gradient).isinf()
    gradient[0] = torch.nan
    assert squared_norm(gradient).isnan()
