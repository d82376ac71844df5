"""Muon against torch's own, on whole matrices, on stacks of experts, and one group at a time as DeepSpeed steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pretrain.muon import Muon, newton_schulz, update_scale

STEPS, LR, DECAY = 5, 1e-2, 0.1
ADAMW = {"lr": LR, "betas": (0.9, 0.95), "eps": 1e-8}


def muon_group(*parameters: nn.Parameter) -> dict[str, Any]:
    return {"params": list(parameters), "algorithm": "muon", "momentum": 0.95, "weight_decay": DECAY}


def adamw_group(*parameters: nn.Parameter) -> dict[str, Any]:
    return {"params": list(parameters), "algorithm": "adamw", "weight_decay": DECAY}


def random_parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))))


def train(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters after some steps, with gradients that depend on the step and the shape only."""
    for step in range(STEPS):
        for parameter in parameters:
            random = torch.Generator().manual_seed(1000 * step + parameter.numel())
            parameter.grad = torch.randn(parameter.shape, generator=random) * 10.0 ** (2 * step - 4)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (32, 32), (5, 64), (1, 7)])
def test_a_matrix_moves_as_torchs_muon_moves_it(shape: tuple[int, int]) -> None:
    """torch orthogonalises in bf16."""
    ours, theirs = random_parameter(*shape), random_parameter(*shape)
    muon = torch.optim.Muon([theirs], lr=LR, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
    (moved,), (expected,) = train([ours], Muon([muon_group(ours)], torch.bfloat16, **ADAMW)), train([theirs], muon)
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def test_experts_are_matrices_each_by_itself() -> None:
    stack = random_parameter(3, 8, 16)
    single = [nn.Parameter(matrix.detach().clone()) for matrix in stack]
    together = Muon([muon_group(stack)], torch.float32, **ADAMW)
    apart = Muon([muon_group(*single)], torch.float32, **ADAMW)
    for step in range(STEPS):
        stack.grad = torch.randn(stack.shape, generator=torch.Generator().manual_seed(step))
        stack.grad[1] *= 1e-3  # an expert with little load moves as far as the rest
        for index, matrix in enumerate(single):
            matrix.grad = stack.grad[index].clone()
        together.step()
        apart.step()
    torch.testing.assert_close(stack, torch.stack(single), rtol=0, atol=1e-6)


def test_the_rest_is_adamw_bit_for_bit() -> None:
    matrix, vector, other = random_parameter(4, 6), random_parameter(6), random_parameter(6)
    adamw = torch.optim.AdamW([other], weight_decay=DECAY, fused=True, **ADAMW)
    _, moved = train([matrix, vector], Muon([muon_group(matrix), adamw_group(vector)], torch.float32, **ADAMW))
    assert torch.equal(moved, train([other], adamw)[0])


def test_state_is_of_the_parameters_shape() -> None:
    matrix, vector = random_parameter(4, 6), random_parameter(6)
    optimizer = Muon([adamw_group(vector), muon_group(matrix)], torch.bfloat16, **ADAMW)
    train([matrix, vector], optimizer)
    assert {key: value.shape for key, value in optimizer.state[matrix].items()} == {
        "step": (),
        "momentum_buffer": (4, 6),
    }
    assert optimizer.state[vector].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(state["step"] == STEPS for state in optimizer.state.values())
    assert all(value.dtype == torch.float32 for state in optimizer.state.values() for value in state.values())


def test_groups_stepped_one_by_one_as_deepspeed_does() -> None:
    """It replaces the parameters after construction, and at a step shows the optimizer one group only."""
    at_once = [random_parameter(4, 6), random_parameter(6)]
    one_by_one = [random_parameter(4, 6), random_parameter(6)]
    expected = Muon([muon_group(at_once[0]), adamw_group(at_once[1])], torch.float32, **ADAMW)
    optimizer = Muon([muon_group(random_parameter(2, 2)), adamw_group(random_parameter(2))], torch.float32, **ADAMW)
    groups = optimizer.param_groups
    for group, parameter in zip(groups, one_by_one, strict=True):
        group["params"] = [parameter]
    for step in range(STEPS):
        for parameter, other in zip(at_once, one_by_one, strict=True):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step))
            other.grad = parameter.grad.clone()
        expected.step()
        for group in groups:
            optimizer.param_groups = [group]
            optimizer.step()
            optimizer.param_groups = groups
    assert all(torch.equal(a, b) for a, b in zip(at_once, one_by_one, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e12])
def test_singular_values_end_near_one(dtype: torch.dtype, scale: float) -> None:
    matrices = torch.randn(2, 24, 64, generator=torch.Generator().manual_seed(0)) * scale
    values = torch.linalg.svdvals(newton_schulz(matrices.to(dtype)).float())
    assert 0.65 < values.min() < values.max() < 1.2


def test_nothing_to_orthogonalise_stays_nothing() -> None:
    assert torch.equal(newton_schulz(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (4, 64, 256), (256, 16, 32)])
def test_updates_have_the_size_of_adamws(shape: tuple[int, ...]) -> None:
    update = newton_schulz(torch.randn(shape, generator=torch.Generator().manual_seed(0))) * update_scale(shape)
    assert 0.15 < update.square().mean().sqrt() < 0.25


def test_a_missing_gradient_is_not_passed_over() -> None:
    with pytest.raises(AssertionError, match="without a gradient"):
        Muon([muon_group(random_parameter(4, 6))], torch.float32, **ADAMW).step()


def test_a_step_that_fails_leaves_the_groups_whole() -> None:
    """AdamW's part of a step is over its own groups alone; where it raises, the next step still has all."""
    matrix, vector = random_parameter(4, 6), random_parameter(6)
    optimizer = Muon([muon_group(matrix), adamw_group(vector)], torch.float32, **ADAMW)
    matrix.grad, vector.grad = torch.ones(4, 6), torch.ones(6).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()
    assert [group["algorithm"] for group in optimizer.param_groups] == ["muon", "adamw"]
    before = matrix.detach().clone()
    train([matrix, vector], optimizer)
    assert not torch.equal(matrix, before)
