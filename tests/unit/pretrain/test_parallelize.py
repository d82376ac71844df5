"""A rank's part of the model where the rank is alone: names, dtypes, memory. Real ranks are in tests/dist."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from model.decoder import Decoder
from model.init import initialise
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.boxes import Box
from pretrain.kernels import apply_kernels
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize, placements
from tests.small_run import MODELS, VOCABULARY, small_config

CPU = torch.device("cpu")


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", MODELS)
def test_parameters_are_real_and_keep_their_names(
    model: str, dtype: torch.dtype, tied: bool, checkpointing: str
) -> None:
    config = small_config(
        f"model={{moe: {MODELS[model]}, tie_embeddings: {tied}, qk_norm: true}}",
        f"parallel.activation_checkpointing={checkpointing}",
    )
    decoder = parallelize(config, CPU, dtype, ParallelDims.of_this_rank(config))
    parameters, buffers = dict(decoder.named_parameters()), dict(decoder.named_buffers())
    shapes = parameter_shapes(config.model)
    assert {name: tuple(parameter.shape) for name, parameter in parameters.items()} == shapes
    assert list(parameters) == list(shapes)
    assert not any(tensor.is_meta for tensor in (parameters | buffers).values())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in parameters.values())
    routers = {name for name, parameter in parameters.items() if ".router." in name}
    assert len(routers) == {"dense": 0, "moe": 2, "moebias": 1}[model]
    assert all(p.dtype == (torch.float32 if name in routers else dtype) for name, p in parameters.items())
    assert decoder.state_dict().keys() == shapes.keys() | buffer_shapes(config.model).keys()
    assert not any(buffer.any() for buffer in buffers.values())
    dtypes = {name.rpartition(".")[2]: buffer.dtype for name, buffer in buffers.items()}
    load, bias = {"load_E": torch.int64}, {"bias": torch.float32}
    assert dtypes == {"dense": {}, "moe": load, "moebias": load | bias}[model]


@pytest.mark.parametrize("model", MODELS)
def test_it_computes_what_the_plain_decoder_does(model: str) -> None:
    config = small_config(f"model.moe={MODELS[model]}", "parallel.activation_checkpointing=selective")
    ours, plain = parallelize(config, CPU, torch.float32, ParallelDims.of_this_rank(config)), Decoder(config.model)
    apply_kernels(plain, CPU)
    tokens = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))
    sums = []
    for decoder in (ours, plain):
        initialise(decoder, 0)
        sums.append(decoder(tokens, tokens.roll(-1, dims=1)))
        (sums[-1].total + sums[-1].auxiliary).backward()
    assert all(torch.equal(a, b) for a, b in zip(*sums, strict=True))
    for (name, a), (_, b) in zip(ours.named_parameters(), plain.named_parameters(), strict=True):
        assert a.grad is not None, name
        assert b.grad is not None, name
        assert torch.equal(a.grad, b.grad), name


class Allocations(TorchDispatchMode):
    """Notes every tensor that takes memory without values."""

    def __init__(self, events: list[object]) -> None:
        super().__init__()
        self.events = events

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and not out.is_meta:
            self.events.append(("memory", tuple(out.shape)))
        return out


def test_each_parameter_is_handed_over_before_the_next_has_memory() -> None:
    config = small_config(f"model.moe={MODELS['moebias']}")
    dims, events, handed = ParallelDims.of_this_rank(config), list[object](), dict[str, nn.Parameter]()

    def made(name: str, parameter: nn.Parameter) -> None:
        events.append(("made", name))
        handed[name] = parameter

    with Allocations(events):
        decoder = parallelize(config, CPU, torch.float32, dims, made)
    shapes = parameter_shapes(config.model)
    assert events == [event for name, shape in shapes.items() for event in (("memory", shape), ("made", name))]
    assert all(handed[name] is parameter for name, parameter in decoder.named_parameters())


def test_one_rank_holds_all_parameters_and_persistent_buffers_whole() -> None:
    config = small_config(f"model.moe={MODELS['moebias']}")
    places = placements(config.model, ParallelDims.of_this_rank(config))
    state = Decoder(config.model).state_dict()
    whole = {name: Box((0,) * value.dim(), tuple(value.shape)) for name, value in state.items()}
    assert {name: place.box for name, place in places.items()} == whole
    assert {place.copies for place in places.values()} == {None}
