"""The choice of experts, its two losses, and the precision it keeps."""

import pytest
import torch
from torch import Tensor

from model.config import ModelConfig
from model.router import Router, auxiliary_loss, count_pairs


def config(**moe: object) -> ModelConfig:
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "ffn_size": 16, "vocab_size": 100}
    fields = {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 8, **moe}
    return ModelConfig.model_validate({**shape, "moe": fields})


def router(std: float = 0.5, **moe: object) -> Router:
    made = Router(config(**moe))
    with torch.no_grad():
        made.weight.normal_(std=std, generator=torch.Generator().manual_seed(1))
    return made


def tokens(batch: int = 3, length: int = 10) -> Tensor:
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(0))


def unchanged(counts_BE: Tensor) -> Tensor:
    return counts_BE


def auxiliary(made: Router, x: Tensor) -> Tensor:
    routing = made(x)
    return auxiliary_loss(routing, count_pairs(routing.experts, made.moe.experts), made.moe, unchanged)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_best_scores_are_chosen_and_weigh(score: str) -> None:
    made = router(router=score, normalize_weights=False, routed_scaling_factor=2.5)
    routing = made(tokens())
    logits = tokens() @ made.weight.T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    best = scores.topk(2)
    assert torch.equal(routing.experts, best.indices)
    torch.testing.assert_close(routing.weights, 2.5 * best.values)
    normalized = router(router=score, routed_scaling_factor=2.5)(tokens())
    torch.testing.assert_close(normalized.weights.sum(-1), torch.full((3, 10), 2.5))
    torch.testing.assert_close(normalized.weights, 2.5 * best.values / best.values.sum(-1, keepdim=True))


def test_groups_limit_the_choice() -> None:
    made = router(router="sigmoid", groups=4, groups_per_token=1)
    scores = made(tokens()).scores
    sums = scores.unflatten(-1, (4, 2)).sum(-1)  # groups of two: the two best are both
    assert torch.equal(made(tokens()).experts // 2, sums.argmax(-1, keepdim=True).expand(3, 10, 2))
    singles = router(router="sigmoid", groups=8, groups_per_token=3, experts_per_token=3)(tokens())
    assert torch.equal(singles.experts, singles.scores.topk(3).indices)


def test_the_bias_enters_the_choice_and_not_the_weights() -> None:
    made = router(router="sigmoid", balance="bias", normalize_weights=False)
    assert made.bias is not None
    made.bias[3] = 10
    routing = made(tokens())
    assert (routing.experts == 3).any(-1).all()
    torch.testing.assert_close(routing.weights, routing.scores.gather(-1, routing.experts))


def test_the_bias_moves_against_the_load() -> None:
    made = router(balance="bias", bias_update_rate=0.25)
    load = torch.tensor([4, 0, 9, 4, 3, 5, 4, 3])  # mean 4
    made.update_bias(load)
    made.update_bias(load)
    assert made.bias is not None
    assert made.bias.tolist() == [0, 0.5, -0.5, 0, 0.5, -0.5, 0, 0.5]
    exact = torch.full((8,), 1 << 40)  # beyond what fp32, or fp64 with another summand, tells apart
    exact[0] += 1
    made.update_bias(exact)
    assert made.bias.tolist() == [-0.25, 0.75, -0.25, 0.25, 0.75, -0.25, 0.25, 0.75]
    with pytest.raises(AssertionError, match="only balance=bias"):
        router().update_bias(load)


def test_biases_even_out_a_load() -> None:
    made = router(router="sigmoid", balance="bias", bias_update_rate=0.02)
    x, spread = tokens(8, 64) + 0.3 * made.weight[2], []  # tokens that lean towards one expert
    for _ in range(100):
        load = count_pairs(made(x).experts, 8).sum(0)
        spread.append((load.max() / load.float().mean()).item())
        made.update_bias(load)
    assert spread[0] > 1.5
    assert spread[-1] < 1.1


def test_the_balance_loss_by_its_formula() -> None:
    for score in ("softmax", "sigmoid"):
        made = router(router=score, balance_coefficient=0.3)
        routing = made(tokens())
        expected = 0.0
        for b in range(3):
            probabilities = routing.scores[b] / routing.scores[b].sum(-1, keepdim=True)
            shares = torch.bincount(routing.experts[b].flatten(), minlength=8) / 20
            expected += 0.3 * 8 * (shares * probabilities.mean(0)).sum().item()
        assert auxiliary(made, tokens()).item() == pytest.approx(expected, rel=1e-6)


def test_equal_scores_cost_one_a_sequence() -> None:
    made = router(balance_coefficient=0.3)
    torch.nn.init.zeros_(made.weight)
    assert auxiliary(made, tokens()).item() == pytest.approx(3 * 0.3)


def test_the_z_loss_by_its_formula() -> None:
    made = router(balance="none", z_loss=0.1)
    expected = 0.1 * (tokens() @ made.weight.T).logsumexp(-1).square().mean(1).sum()
    torch.testing.assert_close(auxiliary(made, tokens()), expected)


@pytest.mark.parametrize("balance", ["bias", "none"])
def test_the_coefficient_is_of_the_loss_alone(balance: str) -> None:
    made = router(balance=balance, balance_coefficient=7.0)
    assert auxiliary(made, tokens()).item() == 0


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_parts_of_a_sequence_add_up_to_the_whole(score: str) -> None:
    """Values and gradients, in the scores and in the tokens, with parts of unequal length."""
    made = router(router=score, z_loss=0.01, balance_coefficient=0.5)
    whole = tokens().requires_grad_()
    parts = [part.detach().requires_grad_() for part in tokens().split([7, 3], dim=1)]
    counts = [count_pairs(made(part).experts, 8) for part in parts]
    of_whole = auxiliary(made, whole)
    of_parts = [
        auxiliary_loss(made(part), counts[i], made.moe, lambda own, other=counts[1 - i]: own + other)  # type: ignore[misc]
        for i, part in enumerate(parts)
    ]
    torch.testing.assert_close(sum(of_parts), of_whole)
    assert of_parts[0] > 1.5 * of_parts[1]
    expected = torch.autograd.grad(of_whole, [whole, made.weight])
    each = [torch.autograd.grad(loss, [part, made.weight]) for loss, part in zip(of_parts, parts, strict=True)]
    torch.testing.assert_close(torch.cat([grads[0] for grads in each], dim=1), expected[0])
    torch.testing.assert_close(each[0][1] + each[1][1], expected[1])
    alone = auxiliary(made, parts[0]) + auxiliary(made, parts[1])
    assert (alone - of_whole).abs() > 0.1  # the test would see parts that know nothing of each other


def test_casts_pass_by_and_moves_do_not() -> None:
    made = router(balance="bias")
    before = made.weight.detach().clone()
    for cast in (made.bfloat16, made.half, made.double, lambda: made.to(torch.bfloat16)):
        cast()
        assert made.bias is not None
        assert made.weight.dtype == made.bias.dtype == torch.float32
        assert torch.equal(made.weight, before)
    routing = made(tokens().bfloat16())
    assert routing.weights.dtype == routing.scores.dtype == torch.float32
    torch.testing.assert_close(routing.logits, tokens().bfloat16().float() @ before.T)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(tokens()).logits, router(balance="bias")(tokens()).logits)
    made.to("meta", torch.bfloat16)
    assert made.weight.is_meta
    assert made.weight.dtype == torch.float32
    assert made.to_empty(device="cpu").weight.device.type == "cpu"
