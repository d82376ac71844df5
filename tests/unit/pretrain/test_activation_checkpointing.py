"""Activation checkpointing: the same gradients to the bit, and every operation run as often as it should."""

import copy
import functools
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop

from model import blockwise_attention
from model.decoder import Decoder
from model.init import initialise
from model.moe import MoE
from model.opaque_attention import OPERATOR
from pretrain.activation_checkpointing import KEPT, apply_activation_checkpointing
from pretrain.parallel_dims import ParallelDims
from pretrain.parallelize import parallelize
from tests.small_run import MODELS, VOCABULARY, small_config

LAYERS, BATCH, LENGTH = 3, 2, 24
DETACH = torch.ops.aten.detach.default  # how often depends on how autograd saves tensors


class Counting(TorchDispatchMode):
    """Counts operations as they run: one whose kept output is given again instead does not come this far."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += func is not DETACH
        return func(*args, **(kwargs or {}))


class Step(NamedTuple):
    """What one forward and backward gave, and the operations that ran in each."""

    loss: Tensor
    gradients: dict[str, Tensor]
    load: list[Tensor]
    forward: Counter[Any]
    backward: Counter[Any]


@functools.cache
def initialised(model: str) -> Decoder:
    decoder = Decoder(small_config(f"model={{num_layers: {LAYERS}, moe: {MODELS[model]}}}").model)
    initialise(decoder, 0)
    return decoder


def build(model: str, *overrides: str) -> Decoder:
    decoder = copy.deepcopy(initialised(model))
    apply_activation_checkpointing(decoder, small_config(*overrides).parallel)
    return decoder


def step(decoder: Decoder) -> Step:
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with Counting() as forward:
        sums = decoder(tokens, tokens.roll(-1, dims=1))
        loss = sums.total + sums.auxiliary
    with Counting() as backward:
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in decoder.named_parameters() if parameter.grad is not None}
    load = [layer.take_load() for layer in decoder.modules() if isinstance(layer, MoE)]
    return Step(loss.detach(), gradients, load, forward.counts, backward.counts)


def operations_of_blocks(decoder: Decoder, every: int) -> Counter[Any]:
    """What the forwards of every so many blocks run."""
    x_BTD = torch.randn(BATCH, LENGTH, decoder.config.hidden_size, requires_grad=True)
    rotary = decoder.rotary(torch.arange(LENGTH))
    with Counting() as counting:
        for block in list(decoder.layers)[::every]:
            block(x_BTD, *rotary)
    return counting.counts


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_the_same_bits(model: str, kind: str, every: int) -> None:
    """So is the experts' load, which counts a micro-batch once however often its forward runs."""
    plain = step(build(model))
    parallel = f"parallel={{activation_checkpointing: {kind}, activation_checkpointing_every: {every}}}"
    checkpointed = step(build(model, parallel))
    assert torch.equal(checkpointed.loss, plain.loss)
    assert checkpointed.gradients.keys() == plain.gradients.keys() == dict(build(model).named_parameters()).keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(checkpointed.gradients[name], gradient), name
    assert len(plain.load) == {"dense": 0, "moe": LAYERS, "moebias": LAYERS - 1}[model]
    assert all(torch.equal(a, b) for a, b in zip(checkpointed.load, plain.load, strict=True))


@pytest.mark.parametrize("every", [1, 2, 3])
@pytest.mark.parametrize("model", MODELS)
def test_what_runs_twice(model: str, every: int) -> None:
    """full: every operation of a checkpointed block; selective: all but the KEPT. The other blocks' run once.

    torch stops a recomputation as soon as backward has what it needs, before the block's last product or sum: here it
    goes on to the end, for whole numbers.
    """
    with set_checkpoint_early_stop(False):
        plain, of_blocks = step(build(model)), operations_of_blocks(build(model), every)
        kept = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ops.aten.mm.default}
        kept |= {torch.ops.aten._grouped_mm.default} if plain.load and (model == "moe" or every < LAYERS) else set()
        assert of_blocks.keys() & KEPT == kept
        for kind in ("selective", "full"):
            parallel = f"parallel={{activation_checkpointing: {kind}, activation_checkpointing_every: {every}}}"
            checkpointed = step(build(model, parallel))
            assert checkpointed.forward == plain.forward
            again = {op: count for op, count in of_blocks.items() if count and (kind == "full" or op not in KEPT)}
            assert checkpointed.backward - plain.backward == again, kind


@pytest.mark.parametrize(("kind", "times"), [("none", 1), ("selective", 1), ("full", 2)])
def test_matrix_products_of_a_step(kind: str, times: int) -> None:
    """As it runs, early stop and all: of a block's 7 products `full` runs 6 again, not the last."""
    counts = step(build("dense", f"parallel.activation_checkpointing={kind}"))
    product = torch.ops.aten.mm.default
    plain = step(build("dense"))
    assert counts.forward[product] == plain.forward[product]
    assert counts.backward[product] - plain.backward[product] == (times - 1) * 6 * LAYERS


def test_a_processors_attention_is_kept_as_one_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its products within, which are scores of all pairs, none is kept; the bits are those of no checkpointing."""

    def run(kind: str) -> Step:
        config = small_config(f"model.num_layers={LAYERS}", f"parallel.activation_checkpointing={kind}")
        decoder = parallelize(config, torch.device("cpu"), torch.bfloat16, ParallelDims.of_this_rank(config))
        initialise(decoder, 0)
        return step(decoder)

    monkeypatch.setattr(blockwise_attention, "TILED_DTYPES", frozenset())
    plain, selective = run("none"), run("selective")
    for product in (torch.ops.aten.baddbmm.default, torch.ops.aten.bmm.default):
        assert plain.forward[product] == LAYERS
        assert selective.forward[product] == selective.backward[product] == 0
    assert selective.backward[OPERATOR] == 0
    assert selective.forward[OPERATOR] == LAYERS
    assert torch.equal(selective.loss, plain.loss)
    assert all(torch.equal(selective.gradients[name], gradient) for name, gradient in plain.gradients.items())


def test_nothing_is_recomputed_without_gradients() -> None:
    decoder = build("moe", "parallel.activation_checkpointing=selective")
    tokens = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with Counting() as counting:
        losses = decoder.token_losses(tokens, tokens)
    assert torch.equal(losses, build("moe").token_losses(tokens, tokens))
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    assert counting.counts[attention] == LAYERS
