"""What a block keeps for backward, against the tensors that autograd really saves."""

import pytest
import torch
from torch import nn

from model import blockwise_attention, loss, token_rows
from model.attention import Attention
from model.blockwise_attention import BlockwiseAttention, document_spans
from model.config import ModelConfig
from model.decoder import Block, Decoder
from model.norm import RMSNorm, rms_norm_in_pieces
from model.rope import RotaryTables
from pretrain.activations import (
    EXPERT_SLOT_MULTIPLE,
    LOSS_CHUNK_TOKENS,
    LOSS_GRADIENT_COLUMNS,
    LOSS_GRADIENT_ROWS,
    LOSS_SOFTMAX_ELEMENTS,
    MOST_TILED_QUERIES,
    Work,
    activation_bytes,
    block_activations,
    loss_bytes,
)

B, T = 2, 64
SHAPE = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "ffn_size": 176, "vocab_size": 512}
EXPERTS = {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 48, "shared_experts": 1}


def work(dtype: torch.dtype, **degrees: int) -> Work:
    return Work(B * T, T, torch.finfo(dtype).bits // 8, fused=False, **degrees)


def kernels_for_processors(module: nn.Module) -> None:
    """As `pretrain/kernels.py` chooses them."""
    for part in module.modules():
        if isinstance(part, RMSNorm):
            part.function = rms_norm_in_pieces
        elif isinstance(part, Attention):
            part.core = BlockwiseAttention()


def saved_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of the distinct tensors that a block's graph holds, its parameters and the rotation's angles left out."""
    block = Block(config, layer=0).to(dtype)
    kernels_for_processors(block)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.02)
    cos, sin = RotaryTables(config)(torch.arange(T))
    mask = document_spans(torch.arange(T).expand(B, T) // 20) if config.document_mask else None
    known = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), cos, sin)}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    x_BTD = torch.randn(B, T, config.hidden_size, dtype=dtype, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x_BTD, cos, sin, mask)
    return sum(seen.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields",
    [{}, {"num_kv_heads": 2}, {"qk_norm": True, "num_kv_heads": 1}, {"document_mask": True}],
    ids=["plain", "gqa", "qk_norm", "mask"],
)
def test_a_block_keeps_what_autograd_saves(dtype: torch.dtype, fields: dict[str, object]) -> None:
    config = ModelConfig.model_validate(SHAPE | fields)
    assert block_activations(config, 0, work(dtype)).kept == saved_bytes(config, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [0, 1])
def test_a_block_of_experts_keeps_what_autograd_saves(dtype: torch.dtype, shared: int) -> None:
    config = ModelConfig.model_validate(SHAPE | {"moe": EXPERTS | {"shared_experts": shared}})
    kept = block_activations(config, 0, work(dtype)).kept
    assert kept == pytest.approx(saved_bytes(config, dtype), rel=0.02)  # but for some numbers a token


def test_a_gpu_keeps_no_mask() -> None:
    plain, masked = (ModelConfig.model_validate({"preset": "7b", "document_mask": mask}) for mask in (False, True))
    tokens = Work(4096, 4096, element_bytes=2)
    assert block_activations(masked, 0, tokens) == block_activations(plain, 0, tokens)


def test_recomputation_keeps_less_and_makes_the_rest_again() -> None:
    config = ModelConfig.model_validate({"preset": "7b"})
    tokens = Work(4096, 4096, element_bytes=2)
    none, selective, full = (block_activations(config, 0, tokens, mode) for mode in ("none", "selective", "full"))
    assert none.kept > selective.kept > full.kept == 2 * 4096 * 4096
    assert none.recomputed == 0 < selective.recomputed < full.recomputed == none.kept


def test_tensor_parallelism_divides_all_but_the_gathered_inputs() -> None:
    """Korthikanti et al. 2022, equation 4: with sequence-parallel regions everything is divided by the degree; the
    inputs of the two groups of projections are not gathered again in backward here, and so stay whole."""
    config = ModelConfig.model_validate({"preset": "7b"})
    one, eight = (block_activations(config, 0, Work(4096, 4096, 2, tensor=degree)).kept for degree in (1, 8))
    gathered = 2 * 2 * 4096 * 4096
    assert eight - gathered == (one - gathered) // 8


def test_sequence_parallelism_divides_and_keeps_attention_once_more() -> None:
    config = ModelConfig.model_validate({"preset": "7b"})
    one, four = (block_activations(config, 0, Work(4096, 4096, 2, sequence=degree)).kept for degree in (1, 4))
    assert four == one // 4 + 2 * 1024 * 4096


def test_every_nth_block_is_recomputed() -> None:
    config = ModelConfig.model_validate({"preset": "7b", "num_layers": 4})
    tokens = Work(4096, 4096, 2)
    none, full = (activation_bytes(config, tokens, mode).kept for mode in ("none", "full"))
    half = activation_bytes(config, tokens, "full", every=2).kept
    assert half == (none + full) // 2


def test_forward_holds_what_is_accounted() -> None:
    """The whole decoder with its loss, by the allocator's own record."""
    from torch.profiler import ProfilerActivity, profile

    config = ModelConfig.model_validate(SHAPE | {"vocab_size": 2048})
    decoder, tokens = Decoder(config), torch.zeros(B, T, dtype=torch.int64)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.02)
    kernels_for_processors(decoder)
    decoder(tokens, tokens).total.backward()
    decoder.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        sums = decoder(tokens, tokens)
        sums.total.backward()
    events = recorded.profiler.kineto_results.events()
    held = peak = 0
    for _, size in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        held += size
        peak = max(peak, held)
    accounted = activation_bytes(config, work(torch.float32)).kept + loss_bytes(config, work(torch.float32))
    assert accounted == pytest.approx(peak, rel=0.03)


def test_the_constants_are_those_of_the_loss() -> None:
    ours = LOSS_CHUNK_TOKENS, LOSS_SOFTMAX_ELEMENTS, LOSS_GRADIENT_COLUMNS, LOSS_GRADIENT_ROWS
    assert ours == (loss.CHUNK_TOKENS, loss.SOFTMAX_ELEMENTS, loss.GRADIENT_COLUMNS, loss.GRADIENT_ROWS)


def test_the_constant_is_that_of_attention() -> None:
    assert MOST_TILED_QUERIES == blockwise_attention.MOST_TILED_QUERIES


def test_the_constant_is_that_of_the_experts() -> None:
    assert EXPERT_SLOT_MULTIPLE == token_rows.SLOT_MULTIPLE
