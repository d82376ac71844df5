"""The decoder's own promises: objective, document mask, cache, and independence of how it was built."""

import functools

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.decoder import Decoder
from model.init import initialise
from model.kv_cache import KVCache
from model.loss import LossSums

MOE = {"experts": 8, "experts_per_token": 2, "expert_ffn_size": 32, "first_layer": 1, "z_loss": 0.01}


def config(**fields: object) -> ModelConfig:
    small = {"hidden_size": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 96, "vocab_size": 200}
    return ModelConfig.model_validate({**small, **fields})


def build(**fields: object) -> Decoder:
    """Weights three times as large as at initialisation, so that attention is far from uniform."""
    decoder = Decoder(config(**fields))
    initialise(decoder, 0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3 if parameter.dim() >= 2 else 1)
    return decoder


def tokens(batch: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 200, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_objective_is_the_sum_over_valid_targets(tie_embeddings: bool) -> None:
    decoder = build(tie_embeddings=tie_embeddings)
    inputs, targets = tokens(), tokens().roll(-1, dims=1)
    targets[:, -1] = -100
    sums = decoder(inputs, targets, z_loss=0.01)
    assert isinstance(sums, LossSums)
    logits = decoder.logits(decoder.hidden(inputs))
    assert logits.shape == (2, 24, 200)
    nll = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 24)
    z = logits.logsumexp(dim=-1)[targets != -100].square().sum()
    torch.testing.assert_close(sums.nll, nll.sum())
    torch.testing.assert_close(sums.total, nll.sum() + 0.01 * z)
    torch.testing.assert_close(decoder.token_losses(inputs, targets), nll, rtol=1e-5, atol=1e-5)

    ours = torch.autograd.grad(sums.total, list(decoder.parameters()))
    plain = torch.autograd.grad(nll.sum() + 0.01 * z, list(decoder.parameters()))
    for (name, _), got, want in zip(decoder.named_parameters(), ours, plain, strict=True):
        assert (got - want).abs().max() <= 1e-5 * want.abs().max(), name


def test_later_tokens_do_not_reach_earlier_ones() -> None:
    decoder = build()
    changed = tokens()
    changed[:, 12:] += 1
    before, after = decoder.hidden(tokens()), decoder.hidden(changed % 200)
    torch.testing.assert_close(after[:, :12], before[:, :12])
    assert (after[:, 12:] - before[:, 12:]).abs().amax(dim=-1).min() > 1e-3


def test_document_mask_equals_each_document_alone() -> None:
    decoder = build(document_mask=True, qk_norm=True)
    lengths = [[5, 11, 8], [16, 8]]
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])
    packed = decoder.hidden(tokens(), positions, ids)
    for row, row_lengths in enumerate(lengths):
        for document, hidden in zip(tokens()[row].split(row_lengths), packed[row].split(row_lengths), strict=True):
            torch.testing.assert_close(decoder.hidden(document[None])[0], hidden, rtol=1e-5, atol=1e-5)


def test_document_ids_matter_only_if_the_config_asks() -> None:
    ids = torch.arange(24).div(8, rounding_mode="floor").expand(2, 24)
    plain, masked = build(), build(document_mask=True)
    assert torch.equal(plain.hidden(tokens(), document_ids_BT=ids), plain.hidden(tokens()))
    assert torch.equal(masked.hidden(tokens()), plain.hidden(tokens()))
    assert (masked.hidden(tokens(), document_ids_BT=ids) - plain.hidden(tokens()))[:, 8:].abs().max() > 1e-3


def test_positions_are_relative() -> None:
    decoder = build()
    shifted = torch.arange(1000, 1024).expand(2, 24)
    torch.testing.assert_close(decoder.hidden(tokens(), shifted), decoder.hidden(tokens()), rtol=1e-4, atol=1e-4)
    stretched = torch.arange(0, 48, 2).expand(2, 24)
    assert (decoder.hidden(tokens(), stretched) - decoder.hidden(tokens())).abs().max() > 1e-3


def test_routers_losses_are_summed_over_layers_and_sequences() -> None:
    decoder = build(moe=MOE)
    of_layers: list[Tensor] = []
    for layer in decoder.layers:
        layer.register_forward_hook(lambda _module, _inputs, outputs: of_layers.append(outputs[1]))
    sums = decoder(tokens(), tokens())
    assert of_layers[0].item() == 0
    assert len(of_layers) == 3
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in of_layers)
    torch.testing.assert_close(sums.auxiliary, torch.stack(of_layers).sum())
    rows = [decoder(row, row).auxiliary for row in tokens().split(1)]
    torch.testing.assert_close(sums.auxiliary, torch.stack(rows).sum())
    (grad,) = torch.autograd.grad(sums.auxiliary, decoder.layers[1].mlp.router.weight)
    assert grad.abs().max() > 0
    assert build()(tokens(), tokens()).auxiliary.item() == 0


def test_recomputed_blocks_route_alike() -> None:
    """As `pretrain.parallelize` recomputes them: equal losses, gradients and loads, bit for bit."""
    results = []
    for recompute in (False, True):
        decoder = build(moe={**MOE, "router": "sigmoid", "groups": 4, "groups_per_token": 2, "shared_experts": 1})
        for block in decoder.layers if recompute else ():
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        sums = decoder(tokens(), tokens().roll(-1, dims=1))
        (sums.total / 48 + sums.auxiliary / 2).backward()
        loads = [layer.mlp.take_load() for layer in decoder.layers[1:]]
        assert [load.sum().item() for load in loads] == [96, 96]
        results.append([sums.total, sums.auxiliary, *loads, *(p.grad for p in decoder.parameters())])
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("pieces", [[1] * 24, [10] + [1] * 14, [8, 8, 8], [24]])
def test_reading_with_a_cache_equals_reading_at_once(pieces: list[int], moe: dict[str, object] | None) -> None:
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    decoder = build(qk_norm=True, rope_scaling=yarn, moe=moe)
    cache = KVCache(decoder.config, batch_size=2, max_tokens=24)
    with torch.no_grad():
        read = [decoder.hidden(piece, cache=cache) for piece in tokens().split(pieces, dim=1)]
        torch.testing.assert_close(torch.cat(read, dim=1), decoder.hidden(tokens()), rtol=1e-5, atol=1e-5)
    assert cache.length == 24
    with pytest.raises(AssertionError, match="25 tokens in a cache of 24"):
        decoder.hidden(tokens()[:, :1], cache=cache)


def test_built_on_meta_it_is_the_same_model() -> None:
    """No buffer, table or constant is lost between the meta device and the weights' arrival."""
    direct = build()
    with torch.device("meta"):
        filled, assigned = Decoder(config()), Decoder(config())
    assert all(parameter.is_meta for parameter in filled.parameters())
    assert not list(filled.buffers())
    filled.to_empty(device="cpu").load_state_dict(direct.state_dict())
    assigned.load_state_dict(direct.state_dict(), assign=True)
    for decoder in (filled, assigned):
        assert torch.equal(decoder.hidden(tokens()), direct.hidden(tokens()))


def test_built_on_meta_a_router_has_its_bias() -> None:
    direct = build(moe={**MOE, "balance": "bias"})
    direct.layers[2].mlp.router.bias[5] = 3
    with torch.device("meta"):
        filled = Decoder(direct.config)
    initialise(filled.to_empty(device="cpu"), 1)
    filled.load_state_dict(direct.state_dict())
    assert torch.equal(filled.hidden(tokens()), direct.hidden(tokens()))
    direct.layers[2].mlp.router.bias.zero_()
    assert not torch.equal(filled.hidden(tokens()), direct.hidden(tokens()))


@pytest.mark.parametrize("moe", [None, MOE])
def test_bf16_follows_fp32(moe: dict[str, object] | None) -> None:
    decoder = build(moe=moe)
    exact = decoder(tokens(), tokens().roll(-1, dims=1)).nll
    rough = decoder.bfloat16()(tokens(), tokens().roll(-1, dims=1))
    assert rough.total.dtype == torch.float32
    assert rough.nll.item() == pytest.approx(exact.item(), rel=3e-3)
    rough.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in decoder.parameters())


def test_training_after_inference_mode() -> None:
    """Tables made under inference mode must not be what training saves for its backward pass."""
    decoder = build()
    with torch.inference_mode():
        decoder.hidden(tokens())
    decoder(tokens(), tokens()).total.backward()
    assert decoder.layers[0].self_attn.q_proj.weight.grad is not None


def test_tied_weight_collects_both_gradients() -> None:
    """The embedding's gradient by tokens, and the head's by targets: tokens never read still get the second."""
    decoder = build(tie_embeddings=True)
    inputs = torch.zeros(1, 4, dtype=torch.int64)
    decoder(inputs, inputs).total.backward()
    grad = decoder.embed_tokens.weight.grad
    assert grad is not None
    assert grad[:200].abs().amax(dim=1).min() > 0
    assert grad[200:].count_nonzero() == 0
