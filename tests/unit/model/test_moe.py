"""The layer of experts: equal to DeepSeek-V3's, counted once, without a read by the host."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

from model.config import ModelConfig
from model.moe import MoE

D, E, F = 32, 8, 24


def config(**moe: object) -> ModelConfig:
    shape = {"hidden_size": D, "num_layers": 1, "num_heads": 2, "ffn_size": 16, "vocab_size": 100}
    return ModelConfig.model_validate(
        {**shape, "moe": {"experts": E, "experts_per_token": 2, "expert_ffn_size": F, **moe}}
    )


def build(**moe: object) -> MoE:
    made = MoE(config(**moe))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3, generator=generator)
    return made


def tokens(batch: int = 2, length: int = 15) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(0))


def deepseek(ours: MoE) -> DeepseekV3MoE:
    moe = ours.moe
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=D,
            moe_intermediate_size=F,
            n_routed_experts=E,
            num_local_experts=E,
            num_experts_per_tok=moe.experts_per_token,
            n_shared_experts=moe.shared_experts,
            n_group=moe.groups,
            topk_group=moe.groups_per_token,
            norm_topk_prob=moe.normalize_weights,
            routed_scaling_factor=moe.routed_scaling_factor,
        )
    )
    state = ours.state_dict()
    names = {f"shared_experts.{name}.weight": None for name in ("gate_proj", "up_proj", "down_proj")}
    theirs.load_state_dict(
        {
            "gate.weight": state["router.weight"],
            "gate.e_score_correction_bias": state["router.bias"],
            "experts.gate_up_proj": torch.cat([state["experts.gate_proj"], state["experts.up_proj"]], dim=1),
            "experts.down_proj": state["experts.down_proj"],
            **{name: state[name] for name in names},
        }
    )
    return theirs


def test_it_equals_deepseek_v3() -> None:
    """Output, and every gradient: sigmoid, biased choice, groups, scaling, shared experts."""
    ours = build(
        router="sigmoid",
        balance="bias",
        shared_experts=2,
        groups=4,
        groups_per_token=2,
        experts_per_token=3,
        routed_scaling_factor=2.5,
    )
    assert ours.router.bias is not None
    ours.router.bias.copy_(torch.linspace(-0.3, 0.3, E))
    theirs, (x, their_x) = deepseek(ours), [tokens().requires_grad_() for _ in range(2)]
    (y, auxiliary), expected = ours(x), theirs(their_x)
    assert auxiliary.item() == 0
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(y, ours.shared_experts(x), atol=0.1)  # type: ignore[misc]

    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * direction).sum().backward()
    (expected * direction).sum().backward()
    gate_up = theirs.experts.gate_up_proj.grad
    pairs = {
        "x": (x.grad, their_x.grad),
        "router": (ours.router.weight.grad, theirs.gate.weight.grad),
        "gate": (ours.experts.gate_proj.grad, gate_up[:, :F]),
        "up": (ours.experts.up_proj.grad, gate_up[:, F:]),
        "down": (ours.experts.down_proj.grad, theirs.experts.down_proj.grad),
    }
    for name, (got, want) in pairs.items():
        assert got is not None
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_experts_without_tokens() -> None:
    moe = build()
    y, auxiliary = moe(tokens(1, 1))
    (y.square().sum() + auxiliary).backward()
    used = moe.take_load() > 0
    assert used.sum() == 2
    for parameter in moe.experts.parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad.flatten(1).count_nonzero(dim=1) > 0, used)


def test_it_runs_in_bf16() -> None:
    moe = build(shared_experts=1)
    exact, _ = moe(tokens())
    rough, auxiliary = moe.bfloat16()(tokens().bfloat16())
    assert (rough.dtype, auxiliary.dtype) == (torch.bfloat16, torch.float32)
    assert (rough - exact).abs().mean() < 0.02 * exact.abs().mean()
    (rough.float().square().sum() + auxiliary).backward()
    assert {name: p.grad.dtype for name, p in moe.named_parameters() if p.grad is not None} == {
        name: p.dtype for name, p in moe.named_parameters()
    }


def loss(moe: MoE, x: Tensor, recompute: bool = False) -> Tensor:
    y, auxiliary = checkpoint(moe, x, use_reentrant=False) if recompute else moe(x)
    return y.square().sum() + auxiliary


def test_load_is_counted_once_under_recomputation() -> None:
    moe, x = build(z_loss=0.01), tokens()
    calls = []
    moe.router.register_forward_hook(lambda *_: calls.append(1))
    loss(moe, x).backward()
    plain_load, plain_grads = moe.take_load(), [p.grad for p in moe.parameters()]
    assert plain_load.sum() == 2 * 30
    assert plain_load.dtype == torch.int64
    moe.zero_grad()
    loss(moe, x, recompute=True).backward()
    assert len(calls) == 3
    assert torch.equal(moe.take_load(), plain_load)
    for parameter, grad in zip(moe.parameters(), plain_grads, strict=True):
        assert torch.equal(parameter.grad, grad)  # type: ignore[arg-type]


def test_load_adds_up_over_micro_batches_and_skips_validation() -> None:
    moe = build()
    with torch.no_grad():
        moe(tokens())
    moe(tokens())  # never learned from
    assert moe.take_load().sum() == 0
    loads = []
    for batch in tokens().split(1):
        loss(moe, batch).backward()
        loads.append(moe.load_E.clone())
    assert 0 < loads[0].sum() < loads[1].sum()
    assert torch.equal(moe.take_load(), loads[1])
    assert moe.take_load().sum() == 0
    assert "load_E" not in moe.state_dict()


def test_counts_of_a_sequence_are_asked_for_once_and_only_if_needed() -> None:
    asked: list[Tensor] = []
    for balance, z_loss, times in (("aux_loss", 0.0, 1), ("none", 0.1, 1), ("bias", 0.0, 0)):
        moe = build(balance=balance, z_loss=z_loss)
        moe.sum_over_sequence = lambda counts: asked.append(counts) or counts  # type: ignore[func-returns-value]
        moe(tokens())
        assert len(asked) == times
        assert all(counts.sum(-1).tolist() == [30, 30] for counts in asked)
        _, auxiliary = moe.eval()(tokens())  # of which nobody learns
        assert len(asked) == times
        assert auxiliary == 0
        asked.clear()


class _HostReads(TorchDispatchMode):
    """Counts the operations whose result, or its shape, the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "bincount", "masked_select", "unique"):
            self.operators.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_host_reads_nothing(score: str) -> None:
    moe = build(router=score, z_loss=0.1, groups=2, groups_per_token=1, shared_experts=1)
    with _HostReads() as reads:
        loss(moe, tokens()).backward()
        moe.take_load()
    assert reads.operators == []
    with _HostReads() as reads:
        moe.load_E.max().item()
    assert reads.operators != []
