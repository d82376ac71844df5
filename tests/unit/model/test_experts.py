"""The experts: equal to a loop over them, gradients too, whole or sharded, and what they keep for backward."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from model.config import ModelConfig
from model.experts import Experts
from model.router import count_pairs
from model.token_rows import SLOT_MULTIPLE

D, E, F, K = 32, 8, 24, 3
NAMES = ("x", "weights", "gate", "up", "down")


def build(dtype: torch.dtype = torch.float32) -> Experts:
    shape = {"hidden_size": D, "num_layers": 1, "num_heads": 2, "ffn_size": 16, "vocab_size": 100}
    moe = {"experts": E, "experts_per_token": K, "expert_ffn_size": F}
    experts, generator = Experts(ModelConfig.model_validate({**shape, "moe": moe})), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return experts.to(dtype)


def routed(tokens: int, likely: list[float] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """x, experts (different ones of each token) and weights."""
    generator = torch.Generator().manual_seed(tokens)
    chances = torch.tensor(likely or [1.0] * E).expand(max(tokens, 1), E)
    experts_NK = torch.multinomial(chances, K, generator=generator)[:tokens]
    return torch.randn(tokens, D, generator=generator), experts_NK, torch.rand(tokens, K, generator=generator)


def plain(experts: Experts, x_ND: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """The formula, expert by expert."""
    y_ND = torch.zeros_like(x_ND)
    for expert in range(len(experts.gate_proj)):
        weights_N = (weights_NK * (experts_NK == expert)).sum(1, keepdim=True)
        inner_NF = functional.silu(x_ND @ experts.gate_proj[expert].T) * (x_ND @ experts.up_proj[expert].T)
        y_ND = y_ND + weights_N * (inner_NF @ experts.down_proj[expert].T)
    return y_ND


def counts(experts_NK: Tensor, number: int = E) -> Tensor:
    return count_pairs(experts_NK[None], number)[0]


def gradients(y: Tensor, inputs: list[Tensor], experts: Experts) -> list[Tensor]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    return list(torch.autograd.grad(y, [*inputs, *experts.parameters()], direction))


@pytest.mark.parametrize("likely", [None, [0, 0, 1, 5, 0, 1, 0, 20.0]], ids=["even", "four-idle"])
@pytest.mark.parametrize("tokens", [1, 7, SLOT_MULTIPLE, 150])
def test_they_equal_a_loop(tokens: int, likely: list[float] | None) -> None:
    x, chosen, weights = routed(tokens, likely)
    experts = build()
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weights)] for _ in range(2))
    y = experts(ours[0], chosen, ours[1], counts(chosen))
    expected = plain(experts, theirs[0], chosen, theirs[1])
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for name, got, want in zip(NAMES, gradients(y, ours, experts), gradients(expected, theirs, experts), strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_16_bits_are_as_near_the_truth_as_the_formula() -> None:
    """The same weights and tokens in fp32 are the truth; both ways to it in bf16 round about as much."""
    experts, (x, chosen, weights) = build(torch.bfloat16), routed(150)
    truth = build().requires_grad_()
    truth.load_state_dict({name: value.float() for name, value in experts.state_dict().items()})
    rough = x.bfloat16()
    results = []
    for module, forward, tokens in ((truth, plain, rough.float()), (experts, plain, rough), (experts, None, rough)):
        inputs = [t.clone().requires_grad_() for t in (tokens, weights)]
        if forward is None:
            y = module(inputs[0], chosen, inputs[1], counts(chosen))
        else:
            y = forward(module, inputs[0], chosen, inputs[1])
        results.append([y, *gradients(y, inputs, module)])
    for name, exact, formula, ours in zip(("y", *NAMES), *results, strict=True):
        errors = [((got.float() - exact).norm() / exact.norm()).item() for got in (formula, ours)]
        assert errors[1] < max(1.25 * errors[0], 0.006), (name, errors)


def test_a_shard_works_the_same() -> None:
    """Each takes the pairs of its own experts, which it knows by numbers of its own."""
    whole, (x, chosen, weights) = build(), routed(40)
    parts = []
    for begin, end in ((0, 3), (3, E)):
        part = build()
        for name, parameter in whole.named_parameters():
            setattr(part, name, torch.nn.Parameter(parameter[begin:end]))
        held_N, held_K = ((chosen >= begin) & (chosen < end)).nonzero(as_tuple=True)
        own = chosen[held_N, held_K, None] - begin
        y = part(x[held_N], own, weights[held_N, held_K, None], counts(own, end - begin))
        parts.append(torch.zeros_like(x).index_add_(0, held_N, y))
    torch.testing.assert_close(sum(parts), whole(x, chosen, weights, counts(chosen)))


class OverRows(TorchDispatchMode):
    """How many rows each grouped product sums over that gives one matrix an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[1].dim() == 2:
            self.rows.append(len(args[1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_rank_may_get_no_token(tokens: int) -> None:
    """Gradients are 0, and no product is asked for over no rows, which a GPU refuses."""
    experts, (x, chosen, weights) = build(), routed(tokens)
    with OverRows() as products:
        y = experts(x.requires_grad_(), chosen, weights, counts(chosen))
        y.sum().backward()
    assert y.shape == (tokens, D)
    found = [parameter.grad for parameter in experts.parameters()]
    assert all(gradient is not None and bool(gradient.any()) == bool(tokens) for gradient in found)
    assert len(products.rows) == 3 * tokens
    assert all(products.rows)


def test_what_pads_a_slot_is_no_one_elses_trouble() -> None:
    """Of a token that overflows with an expert that it did not choose, nothing reaches the gradients."""
    experts, (x, chosen, weights) = build(), routed(9, [0.0] + [1.0] * (E - 1))
    with torch.no_grad():
        experts.up_proj[0] *= 1e36
    chosen[8, 0] = 0  # one token alone takes the first expert, after which slots pad
    x[8] *= 1e-36
    x[:8] *= 1e3
    x.requires_grad_()
    experts(x, chosen, weights, counts(chosen)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in experts.parameters())
    assert x.grad is not None
    assert x.grad[:8].isfinite().all()


def test_uninitialised_memory_is_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's deterministic mode fills it with NaN, and changes no bit of ours."""
    x, chosen, weights = routed(50)

    def run() -> list[Tensor]:
        experts, inputs = build(), [t.clone().requires_grad_() for t in (x, weights)]
        y = experts(inputs[0], chosen, inputs[1], counts(chosen))
        return [y, *gradients(y, inputs, experts)]

    expected = run()
    torch.use_deterministic_algorithms(True)
    try:
        again = run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_what_is_kept_for_backward() -> None:
    """Two products a slot, x once a token, and where they go; of parameters no copy and no view."""
    experts, (x, chosen, weights) = build(), routed(150)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Any:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        experts(x.requires_grad_(), chosen, weights.requires_grad_(), counts(chosen))
    parameters = {id(parameter) for parameter in experts.parameters()}
    assert {id(tensor) for tensor in kept} >= parameters
    rows = [tensor for tensor in kept if tensor.dim() == 2 and tensor.is_floating_point()]
    slots = 150 * K + E * (SLOT_MULTIPLE - 1)
    assert sorted(tuple(tensor.shape) for tensor in rows) == sorted([(slots, F), (slots, F), (150, D), (150, K)])


def test_shapes_of_products_recur() -> None:
    """A processor's library compiles a product for each number of rows, which would differ in every layer and step."""
    seen = set()
    for tokens in range(200, 260, 7):
        x, chosen, weights = routed(tokens)
        with torch.profiler.profile(record_shapes=True) as profile:
            build()(x, chosen, weights, counts(chosen))
        seen |= {str(event.input_shapes) for event in profile.events() if event.name == "aten::mm"}
    assert 1 < len(seen) <= 2 * 3  # by 64, 128 or 192 rows: into the inner width, and out of it
