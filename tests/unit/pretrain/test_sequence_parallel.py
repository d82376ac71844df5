"""Key and value heads under sequence parallelism: each rank is sent those that its query heads attend with."""

import pytest
import torch

from model.attention import CausalAttention
from pretrain.sequence_parallel import key_value_copies

# (query heads, key and value heads, ranks) of a tensor shard, all that `check_layout` lets through.
SMALL = [
    (heads, kv_heads, ranks)
    for heads in range(1, 33)
    for kv_heads in range(1, heads + 1)
    for ranks in range(1, heads + 1)
    if heads % kv_heads == 0 and heads % ranks == 0
]


def finds_its_own(heads: int, kv_heads: int, ranks: int, copies: int) -> bool:
    """Whether every query head meets its own key and value head, if each of these is there `copies` times and an equal
    share goes to every rank, where attention again serves query heads in equal groups."""
    sent = [head for head in range(kv_heads) for _ in range(copies)]
    if len(sent) % ranks:
        return False
    queries, keys = heads // ranks, len(sent) // ranks
    return queries % keys == 0 and all(
        sent[rank * keys + local // (queries // keys)] == (rank * queries + local) // (heads // kv_heads)
        for rank in range(ranks)
        for local in range(queries)
    )


def test_copies_are_the_fewest_that_serve_every_query_head() -> None:
    assert len(SMALL) > 500
    for heads, kv_heads, ranks in SMALL:
        working = (copies for copies in range(1, heads + 1) if finds_its_own(heads, kv_heads, ranks, copies))
        assert key_value_copies(kv_heads, ranks) == next(working), (heads, kv_heads, ranks)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ranks", "copies"),
    [(8, 8, 4, 1), (8, 4, 4, 1), (8, 2, 4, 2), (8, 1, 8, 8), (12, 3, 2, 2), (12, 2, 6, 3), (24, 4, 6, 3)],
)
def test_attention_of_parts_is_a_part_of_attention(heads: int, kv_heads: int, ranks: int, copies: int) -> None:
    """What each rank computes from its share of heads, after as many copies, is its share of the whole."""
    assert key_value_copies(kv_heads, ranks) == copies
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, count, 4, generator=random) for count in (heads, kv_heads, kv_heads))
    core = CausalAttention()
    shares = [x.chunk(ranks, dim=2) for x in (q, *(x.repeat_interleave(copies, dim=2) for x in (k, v)))]
    parts = [core(*(share[rank] for share in shares)) for rank in range(ranks)]
    torch.testing.assert_close(torch.cat(parts, dim=2), core(q, k, v), rtol=1e-6, atol=1e-6)
