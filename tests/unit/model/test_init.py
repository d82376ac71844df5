"""Initial values: a function of (seed, name, global index), whatever the slicing."""

import math

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from model import init
from model.config import ModelConfig
from model.decoder import Decoder
from model.init import BLOCK_ELEMENTS, initial_slice, initial_value, initialise

CONFIG = ModelConfig(hidden_size=320, num_layers=2, num_heads=5, ffn_size=896, vocab_size=1000, qk_norm=True)
MOE = {"experts": 6, "experts_per_token": 2, "expert_ffn_size": 56, "balance": "bias", "shared_experts": 1}
MOE_CONFIG = ModelConfig.model_validate({**CONFIG.model_dump(), "moe": MOE})
NAME, SHAPE = "layers.0.mlp.gate_proj.weight", (896, 320)  # 4.4 blocks


@pytest.fixture(scope="module")
def whole() -> torch.Tensor:
    return initial_value(NAME, SHAPE, 0, CONFIG)


@settings(max_examples=30)
@given(st.data())
def test_any_box_has_the_bits_of_the_whole(whole: torch.Tensor, data: st.DataObject) -> None:
    box = []
    for size in SHAPE:
        start = data.draw(st.integers(0, size))
        box.append(slice(start, data.draw(st.integers(start, size))))
    assert torch.equal(initial_slice(NAME, SHAPE, box, 0, CONFIG), whole[tuple(box)])


STACKED_NAME, STACKED_SHAPE = "layers.1.mlp.experts.up_proj", (6, 56, 320)  # 1.6 blocks, which end within an expert


@pytest.fixture(scope="module")
def stacked() -> torch.Tensor:
    return initial_value(STACKED_NAME, STACKED_SHAPE, 0, MOE_CONFIG)


@settings(max_examples=60)
@given(st.data())
def test_any_box_of_stacked_experts_has_the_bits_of_the_whole(stacked: torch.Tensor, data: st.DataObject) -> None:
    box = []
    for size in STACKED_SHAPE:
        start = data.draw(st.sampled_from([0, 0, size // 2]) | st.integers(0, size))
        box.append(slice(start, data.draw(st.just(size) | st.integers(start, size))))
    made = initial_slice(STACKED_NAME, STACKED_SHAPE, box, 0, MOE_CONFIG)
    assert made.shape == stacked[tuple(box)].shape
    assert torch.equal(made, stacked[tuple(box)])


def test_a_stack_is_drawn_as_the_matrix_of_its_rows(stacked: torch.Tensor) -> None:
    """Whatever the number of dimensions, an element's value comes from its place in the flat tensor."""
    assert torch.equal(stacked.view(-1, 320), initial_value(STACKED_NAME, (6 * 56, 320), 0, MOE_CONFIG))


def test_a_rank_draws_its_own_experts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """128 experts of 24 blocks each: four of them cost 96 blocks, a column of one of them its 24, each drawn once."""
    drawn: list[int] = []
    monkeypatch.setattr(init, "_block", lambda _name, _seed, block: drawn.append(block) or np.zeros(BLOCK_ELEMENTS))
    shape = (128, 768, 2048)
    initial_slice(STACKED_NAME, shape, [slice(8, 12), slice(0, 768), slice(0, 2048)], 0, MOE_CONFIG)
    assert drawn == list(range(8 * 24, 12 * 24))
    drawn.clear()
    initial_slice(STACKED_NAME, shape, [slice(9, 10), slice(0, 768), slice(5, 7)], 0, MOE_CONFIG)
    assert drawn == list(range(9 * 24, 10 * 24))


def test_a_small_box_of_a_huge_tensor_costs_a_block() -> None:
    shape = (1 << 20, 8192)  # 32 GiB in fp32
    box = [slice(1_000_000, 1_000_002), slice(8000, 8100)]
    assert initial_slice("layers.7.mlp.up_proj.weight", shape, box, 0, CONFIG).shape == (2, 100)


def test_values_depend_on_seed_and_name(whole: torch.Tensor) -> None:
    others = (initial_value(NAME, SHAPE, 1, CONFIG), initial_value(NAME.replace("gate", "up"), SHAPE, 0, CONFIG))
    for other in others:
        assert abs(np.corrcoef(other.flatten(), whole.flatten())[0, 1]) < 0.01
    blocks = whole.flatten()[: 4 * BLOCK_ELEMENTS].view(4, -1)
    correlations = np.corrcoef(blocks) - np.eye(4)
    assert np.abs(correlations).max() < 0.02


def test_values_are_the_same_on_every_machine() -> None:
    """A new numpy or xxhash that draws other numbers must not pass unseen."""
    drawn = initial_slice(NAME, SHAPE, [slice(895, 896), slice(316, 320)], 0, CONFIG)
    torch.testing.assert_close(
        drawn, torch.tensor([[-0.021221986, -0.0221031569, -0.0176641047, 0.00136765174]]), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("name", "shape", "hash_of_bits"),
    [
        ("layers.0.mlp.gate_proj.weight", (896, 320), "a8d5ad0a35603314"),
        ("layers.1.mlp.down_proj.weight", (320, 896), "be9a4c9b2d363e5b"),
        ("embed_tokens.weight", (1024, 320), "acaaaab4eaafe657"),
        ("layers.1.self_attn.o_proj.weight", (320, 320), "d7d7bc9f41608d18"),
        ("norm.weight", (320,), "7ba71d95f07da467"),
    ],
)
def test_bits_never_change(name: str, shape: tuple[int, ...], hash_of_bits: str) -> None:
    """Stored before the rule grew to stacked tensors: a resumed or repeated run must start as it did."""
    assert xxhash.xxh3_64_hexdigest(initial_value(name, shape, 7, CONFIG).numpy().tobytes()) == hash_of_bits


@pytest.mark.parametrize(
    ("name", "shape", "std"),
    [
        ("embed_tokens.weight", (1024, 320), 0.02),
        ("lm_head.weight", (1024, 320), 0.02),
        ("layers.0.self_attn.q_proj.weight", (320, 320), 0.02),
        ("layers.1.self_attn.o_proj.weight", (320, 320), 0.01),  # 0.02 / sqrt(2 x 2 layers)
        ("layers.1.mlp.down_proj.weight", (320, 896), 0.01),
        ("layers.0.mlp.router.weight", (6, 320), 0.02),
        ("layers.0.mlp.experts.gate_proj", (6, 56, 320), 0.02),
        ("layers.0.mlp.experts.down_proj", (6, 320, 56), 0.01),
        ("layers.0.mlp.shared_experts.down_proj.weight", (320, 56), 0.01),
    ],
)
def test_std_as_stated(name: str, shape: tuple[int, ...], std: float) -> None:
    value = initial_value(name, shape, 3, MOE_CONFIG)[: CONFIG.vocab_size]
    assert value.dtype == torch.float32
    assert value.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * value.numel()))
    assert abs(value.mean().item()) < 5 * std / math.sqrt(value.numel())
    assert value.abs().max() > 3 * std  # a normal, not a truncated one


def test_norms_are_one_and_padding_zero() -> None:
    for name in ("norm.weight", "layers.0.input_layernorm.weight", "layers.1.self_attn.k_norm.weight"):
        assert torch.equal(initial_value(name, (64,), 0, CONFIG), torch.ones(64))
    embedding = initial_value("embed_tokens.weight", (1024, 320), 0, CONFIG)
    assert embedding[1000:].count_nonzero() == 0
    assert embedding[:1000].count_nonzero() > 0.999 * 1000 * 320
    assert initial_slice("lm_head.weight", (1024, 320), [slice(990, 1024), slice(0, 320)], 0, CONFIG)[10:].eq(0).all()


def test_initialise_from_meta_and_in_bf16() -> None:
    with torch.device("meta"):
        decoder = Decoder(CONFIG)
    with pytest.raises(AssertionError, match="to_empty"):
        initialise(decoder, 0)
    decoder.to_empty(device="cpu")
    initialise(decoder, 0)
    direct = Decoder(CONFIG).bfloat16()
    initialise(direct, 0)
    for (name, ours), theirs in zip(decoder.named_parameters(), direct.parameters(), strict=True):
        assert torch.equal(ours.bfloat16(), theirs), name
        assert torch.equal(ours, initial_value(name, ours.shape, 0, CONFIG)), name


def test_buffers_start_at_zero() -> None:
    """Memory that `to_empty` hands out holds anything."""
    with torch.device("meta"):
        decoder = Decoder(MOE_CONFIG)
    decoder.to_empty(device="cpu")
    for buffer in decoder.buffers():
        buffer.fill_(7)
    initialise(decoder, 0)
    buffers = dict(decoder.named_buffers())
    assert sorted(buffers) == [f"layers.{i}.mlp.{name}" for i in range(2) for name in ("load_E", "router.bias")]
    assert all(buffer.count_nonzero() == 0 for buffer in buffers.values())


def test_an_unknown_tensor_is_not_guessed() -> None:
    with pytest.raises(AssertionError, match="no rule"):
        initial_value("layers.0.mlp.bias", (64,), 0, CONFIG)
