"""Which parameters are treated alike, and the state that is kept of them."""

from typing import Any

import pytest
import torch
from torch import nn

from model.config import ModelConfig
from model.decoder import Decoder
from model.parameters import is_decayed
from pretrain.optimizers import build_optimizer, ensure_state, parameter_groups, state_kinds
from tests.small_run import small_config

DENSE = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "ffn_size": 24, "vocab_size": 100, "qk_norm": True}
MOE = {**DENSE, "moe": {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 8, "shared_experts": 1}}
SHAPES = {"layers.0.mlp.up_proj.weight": (3, 4), "norm.weight": (4,)}


def named_parameters(model: dict[str, Any]) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(Decoder(ModelConfig(**model)).named_parameters())


def names_of_groups(named: dict[str, nn.Parameter], optimizer: str) -> list[tuple[dict[str, Any], list[str]]]:
    """Each group without its parameters, and their names."""
    name_of = {parameter: name for name, parameter in named.items()}
    groups = parameter_groups(named.items(), small_config(f"optimizer.name={optimizer}").optimizer)
    return [
        ({key: value for key, value in group.items() if key != "params"}, [name_of[p] for p in group["params"]])
        for group in groups
    ]


def test_dense_adamw_has_the_decayed_and_the_spared() -> None:
    named = named_parameters(DENSE)
    (decayed, matrices), (spared, rest) = names_of_groups(named, "adamw")
    assert decayed == {"algorithm": "adamw", "weight_decay": 0.1}
    assert spared == {"algorithm": "adamw", "weight_decay": 0.0}
    assert matrices == [name for name in named if is_decayed(name)]
    assert rest == [name for name in named if not is_decayed(name)]


def test_an_empty_group_is_left_out() -> None:
    named = {name: value for name, value in named_parameters(DENSE).items() if not is_decayed(name)}
    assert len(names_of_groups(named, "adamw")) == 1


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    (head, heads), (spared, rest), (muon, matrices) = names_of_groups(named_parameters(DENSE), "muon")
    assert heads == ["lm_head.weight"]
    assert head["algorithm"] == spared["algorithm"] == "adamw"
    assert muon == {"algorithm": "muon", "weight_decay": 0.1, "momentum": 0.95}
    assert matrices == [
        f"layers.{layer}.{matrix}_proj.weight"
        for layer in range(2)
        for matrix in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert all("norm" in name or name == "embed_tokens.weight" for name in rest)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_router_is_apart_and_last(optimizer: str) -> None:
    """It stays fp32, where DeepSpeed wants one dtype a group and takes the run's from the first group."""
    *_, (last, routers) = names_of_groups(named_parameters(MOE), optimizer)
    assert last == {"algorithm": "adamw", "weight_decay": 0.1}
    assert routers == [f"layers.{layer}.mlp.router.weight" for layer in range(2)]


def test_muon_takes_experts_and_shared_experts() -> None:
    groups = names_of_groups(named_parameters(MOE), "muon")
    (matrices,) = (names for group, names in groups if group["algorithm"] == "muon")
    assert {"layers.1.mlp.experts.up_proj", "layers.0.mlp.shared_experts.down_proj.weight"} < set(matrices)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_shared_out_experts_have_groups_that_deepspeed_knows(optimizer: str) -> None:
    named = named_parameters(MOE)
    experts = [name for name in named if ".experts." in name]
    for name in experts:
        named[name].allreduce, named[name].group_name = False, "ep_size_2"  # type: ignore[attr-defined]
    groups = names_of_groups(named, optimizer)
    ((group, names),) = ((group, names) for group, names in groups if "moe" in group)
    momentum = {"momentum": 0.95} if optimizer == "muon" else {}
    assert group == {"algorithm": optimizer, "weight_decay": 0.1, "moe": True, "name": "ep_size_2", **momentum}
    assert names == experts
    assert sorted(name for _, names in groups for name in names) == sorted(named)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_made_as_the_first_step_would(optimizer: str) -> None:
    """Two optimizers, one with state made beforehand: they keep the same kinds, and step alike."""
    config = small_config(f"optimizer.name={optimizer}", "precision=fp32")

    def stepped(ensured: bool) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
        parameters = {name: nn.Parameter(torch.ones(shape)) for name, shape in SHAPES.items()}
        made = build_optimizer(parameter_groups(parameters.items(), config.optimizer), config)
        for group in made.param_groups:
            group["lr"] = 0.1
            for parameter in group["params"]:
                parameter.grad = torch.arange(parameter.numel()).view_as(parameter).float()
                if ensured:
                    state = ensure_state(made, parameter, group)
                    assert tuple(state) == state_kinds(group)
                    assert all(value.shape == parameter.shape and not value.any() for value in state.values())
        made.step()
        return list(parameters.values()), [made.state[parameter] for parameter in parameters.values()]

    (values, states), (expected, expected_states) = stepped(True), stepped(False)
    assert all(map(torch.equal, values, expected))
    for state, other in zip(states, expected_states, strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[key], other[key]) and state[key].dtype == other[key].dtype for key in state)
