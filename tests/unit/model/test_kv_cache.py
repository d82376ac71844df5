"""The cache: rows of different lengths read as each alone, rows chosen anew, and nothing beyond what was asked for."""

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from model.kv_cache import KVCache
from tests.unit.model.test_decoder import MOE, build, tokens

LENGTHS = [20, 5, 13]


def read_alone(decoder: Decoder, row: Tensor) -> Tensor:
    """Hidden states (T, D)."""
    with torch.no_grad():
        return decoder.hidden(row[None])[0]


def padded_rows() -> tuple[list[Tensor], Tensor, list[int]]:
    """Rows of different lengths, the same with padding on the left (B, T), and how much there is."""
    rows = [row[:length] for row, length in zip(tokens(3, 20), LENGTHS, strict=True)]
    padding = [max(LENGTHS) - length for length in LENGTHS]
    padded_BT = torch.stack([torch.cat([torch.full((pad,), 7), row]) for pad, row in zip(padding, rows, strict=True)])
    return rows, padded_BT, padding


@pytest.mark.parametrize("moe", [None, MOE])
@pytest.mark.parametrize("pieces", [[20], [1] * 20, [4, 9, 7]])
def test_padding_on_the_left_changes_nothing(moe: dict[str, object] | None, pieces: list[int]) -> None:
    decoder = build(qk_norm=True, moe=moe)
    rows, padded_BT, padding = padded_rows()
    cache = KVCache(decoder.config, 3, 20, padding=padding)
    with torch.no_grad():
        read_BTD = torch.cat([decoder.hidden(piece, cache=cache) for piece in padded_BT.split(pieces, dim=1)], dim=1)
    assert read_BTD.isfinite().all()
    for row, pad, read_TD in zip(rows, padding, read_BTD, strict=True):
        torch.testing.assert_close(read_TD[pad:], read_alone(decoder, row), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", [[2, 0], [1], [1, 2], [0, 0, 2, 2, 1], [2, 1, 0]])
def test_rows_go_on_as_if_they_had_been_alone(chosen: list[int]) -> None:
    decoder = build()
    rows, padded_BT, padding = padded_rows()
    more = tokens(len(chosen), 4)
    cache = KVCache(decoder.config, 3, 24, padding=padding)
    with torch.no_grad():
        decoder.hidden(padded_BT, cache=cache)
        cache.select(chosen)
        read = torch.cat([decoder.hidden(piece, cache=cache) for piece in more.split([1, 3], dim=1)], dim=1)
    for row, new, read_TD in zip(chosen, more, read, strict=True):
        torch.testing.assert_close(read_TD, read_alone(decoder, torch.cat([rows[row], new]))[-4:], rtol=1e-5, atol=1e-5)


def test_every_token_sees_one() -> None:
    mask = KVCache(build().config, 3, 20, padding=[0, 15, 7]).mask(20)
    assert mask is not None
    assert mask.shape == (3, 1, 20, 20)
    assert mask.any(dim=-1).all()


def test_padding_that_all_rows_have_is_dropped() -> None:
    decoder = build()
    _, padded_BT, padding = padded_rows()
    cache = KVCache(decoder.config, 3, 24, padding=padding)
    with torch.no_grad():
        decoder.hidden(padded_BT, cache=cache)
    cache.select([1, 2])
    assert (cache.length, cache.padding) == (13, [8, 0])
    cache.select([0])
    assert (cache.length, cache.padding) == (5, [0])
    assert cache.mask(1) is None


def test_the_same_rows_are_not_copied() -> None:
    cache = KVCache(build().config, 3, 24)
    before = cache.layers[0].key
    cache.select([0, 1, 2])
    assert cache.layers[0].key is before
    cache.select([0, 2, 1])
    assert cache.layers[0].key is not before


def test_it_takes_what_it_says() -> None:
    config = build().config
    cache = KVCache(config, 5, 24, dtype=torch.bfloat16)
    numbers = sum(layer.key.numel() + layer.value.numel() for layer in cache.layers)
    assert numbers == 2 * config.num_layers * 5 * config.num_kv_heads * 24 * config.head_size
    assert {layer.key.dtype for layer in cache.layers} == {torch.bfloat16}


def test_wrong_padding_is_ours() -> None:
    with pytest.raises(AssertionError, match="padding of 2 rows, there are 3"):
        KVCache(build().config, 3, 24, padding=[0, 1])
