"""Rotary embedding: what makes it relative, and its scalings where the papers say what they do."""

import math

import pytest
import torch

from model import rope
from model.config import ModelConfig
from model.rope import RotaryTables, attention_factor, inverse_frequencies, rotate, rotate_in_pieces


def config(scaling: dict[str, object] | None = None) -> ModelConfig:
    fields = {"hidden_size": 128, "num_layers": 1, "num_heads": 2, "ffn_size": 8, "vocab_size": 8}
    return ModelConfig.model_validate({**fields, "rope_scaling": scaling})


def test_products_depend_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 64)

    def product(q_position: int, k_position: int) -> torch.Tensor:
        tables = RotaryTables(config())
        rotated = [rotate(x, *tables(torch.tensor([position]))) for x, position in ((q, q_position), (k, k_position))]
        return (rotated[0] * rotated[1]).sum()

    torch.testing.assert_close(product(7, 3), product(107, 103), rtol=1e-4, atol=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_leaves_its_input_alone_and_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 3, 64).to(dtype)
    before = x.clone()
    rotated = rotate(x, *RotaryTables(config())(torch.arange(5)))
    assert torch.equal(x, before)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated.float().norm(dim=-1), x.float().norm(dim=-1), rtol=1e-2, atol=1e-2)


def test_rotation_gradient() -> None:
    x = torch.randn(2, 5, 3, 64, requires_grad=True)
    cos, sin = RotaryTables(config())(torch.arange(5))
    first, second = x.chunk(2, dim=-1)
    plain = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    (actual,) = torch.autograd.grad((rotate(x, cos, sin) * weights).sum(), x)
    torch.testing.assert_close(actual, expected)


def test_rotation_gradient_is_the_derivative() -> None:
    x = torch.randn(2, 3, 2, 64, dtype=torch.float64, requires_grad=True)
    tables = [table.double() for table in RotaryTables(config())(torch.arange(3))]
    assert torch.autograd.gradcheck(lambda x: rotate(x, *tables), (x,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("positions", [(5,), (7, 5)])
def test_pieces_are_the_whole_bit_for_bit(
    dtype: torch.dtype, positions: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 sequences at a time, of 7, with positions of their own or alike; tokens far apart, as in one joint product."""
    monkeypatch.setattr(rope, "PIECE_ELEMENTS", 3 * 5 * 4 * 64)
    x = torch.randn(7, 5, 12, 64).to(dtype)[:, :, 4:8].requires_grad_()
    grad = torch.randn(7, 5, 4, 64).to(dtype)
    tables = RotaryTables(config())(torch.randint(0, 1000, positions))
    whole, pieces = rotate(x, *tables), rotate_in_pieces(x, *tables)
    assert torch.equal(whole, pieces)
    (of_whole,), (of_pieces,) = (torch.autograd.grad(rotated, x, grad) for rotated in (whole, pieces))
    assert torch.equal(of_whole, of_pieces)


def test_tables_are_fp32_and_outside_the_state() -> None:
    tables = RotaryTables(config()).bfloat16()
    cos, sin = tables(torch.tensor([[100_000]]))
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0, 0, 0, 0].item() == pytest.approx(math.cos(100_000), abs=1e-6)
    assert not tables.state_dict()


def test_linear_scaling_stretches_every_position() -> None:
    torch.testing.assert_close(
        inverse_frequencies(config({"type": "linear", "factor": 4.0})) * 4, inverse_frequencies(config())
    )


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
        {
            "type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": 2048,
        },
    ],
)
def test_scaling_by_parts_keeps_fast_turns_and_stretches_slow_ones(scaling: dict[str, object]) -> None:
    ratio = inverse_frequencies(config()) / inverse_frequencies(config(scaling))
    turns = 2048 * inverse_frequencies(config()) / (2 * math.pi)
    torch.testing.assert_close(ratio[turns > 40], torch.ones(int((turns > 40).sum())))
    torch.testing.assert_close(ratio[turns < 0.5], torch.full((int((turns < 0.5).sum()),), 4.0))
    assert (ratio.diff() >= -1e-6).all()


def test_yarn_attention_factor() -> None:
    yarn = {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
    assert attention_factor(config(yarn)) == pytest.approx(0.1 * math.log(16) + 1)
    assert attention_factor(config({**yarn, "attention_factor": 1.5})) == 1.5
    assert attention_factor(config()) == 1.0
    cos, _ = RotaryTables(config({**yarn, "attention_factor": 1.5}))(torch.tensor([0]))
    assert (cos == 1.5).all()
