"""How matrices in pieces find each other: every element goes where it is needed, once, and the work is spread out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pretrain.boxes import Box, boxes_of_range
from pretrain.muon import Direction, newton_schulz, update_scale
from pretrain.muon_sharded import HeldBox, Part, ShardedOrthogonalizer, owners_and_rounds, parts_of, planned

SHAPES = {"q": (6, 4), "k": (2, 4), "experts": (3, 4, 5)}


def flat_shares(shapes: dict[str, tuple[int, ...]], ranks: int, padding: int = 0) -> list[list[HeldBox]]:
    """What each of some ranks holds of the parameters laid end to end and cut into equal shares, as ZeRO does."""
    total = sum(map(math.prod, shapes.values())) + padding
    share = -(-total // ranks)
    found = []
    for rank in range(ranks):
        low, fragments, begin = rank * share, [], 0
        for name, shape in shapes.items():
            end = begin + math.prod(shape)
            at = max(begin, low) - low
            for box in boxes_of_range(shape, max(begin, low) - begin, min(end, low + share) - begin):
                fragments.append(HeldBox(name, shape, box, at))
                at += box.numel
            begin = end
        found.append(fragments)
    return found


shapes_of_parameters = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.integers(1, 5), min_size=2, max_size=3).map(tuple),
    min_size=1,
    max_size=5,
)


@settings(max_examples=60)
@given(shapes_of_parameters, st.integers(1, 5), st.integers(1, 2), st.integers(0, 7), st.integers(1, 30))
def test_what_one_rank_sends_the_other_expects(
    shapes: dict[str, tuple[int, ...]], ranks: int, copies: int, padding: int, capacity: int
) -> None:
    parts = [list(parts_of(fragments, 0)) for fragments in flat_shares(shapes, ranks, padding)] * copies
    rounds_of_ranks = [planned(parts, rank, capacity) for rank in range(len(parts))]
    assert len({len(rounds) for rounds in rounds_of_ranks}) == 1
    for rounds in zip(*rounds_of_ranks, strict=True):
        for a, ours in enumerate(rounds):
            for b, theirs in enumerate(rounds):
                assert ours.gives[b] == theirs.takes[a]
                assert ours.returns[b] == theirs.regains[a]
    for rank, rounds in enumerate(rounds_of_ranks):
        regained = [part for each in rounds for held in each.regains for part in held]
        assert sorted(regained, key=repr) == sorted(parts[rank], key=repr)
    taken = [part for rounds in rounds_of_ranks for each in rounds for held in each.takes for part in held]
    assert sum(part.box.numel for part in taken) == sum(map(math.prod, shapes.values())), "each element once"


def test_work_is_spread_evenly_and_rounds_are_bounded() -> None:
    shapes = {("wide", n): (64, 256) for n in range(40)} | {("square", n): (64, 64) for n in range(41)}
    plan = owners_and_rounds(shapes, world=8, capacity=32768)
    assert plan.keys() == shapes.keys()
    loads = [sum(64 * 64 * (2 * shapes[m][1] + 64) for m, (owner, _) in plan.items() if owner == r) for r in range(8)]
    assert max(loads) - min(loads) <= 64 * 64 * (2 * 64 + 64), "even, to within the smallest matrix"
    for owner, index in set(plan.values()):
        elements = [math.prod(shapes[matrix]) for matrix, place in plan.items() if place == (owner, index)]
        assert sum(elements) - max(elements) < 32768


def test_a_matrix_not_wholly_held_is_noticed() -> None:
    parts = [Part(("q", 0), (2, 4), Box((0, 0), (1, 4)), 0, 0)]
    with pytest.raises(AssertionError, match="ranks hold 4 elements"):
        planned([parts, parts], 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_rank_by_itself(dtype: torch.dtype) -> None:
    """A flat tensor with padding: the directions cover all but the padding, with whole matrices' results."""
    (fragments,) = flat_shares(SHAPES, 1)
    total = sum(map(math.prod, SHAPES.values()))
    flat = nn.Parameter(torch.zeros(total + 3))
    update = torch.randn(total + 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        moves: list[Direction] = list(ShardedOrthogonalizer({flat: fragments}, None)([flat], [update]))
        for move in moves:
            assert move.update.dtype == dtype
            move.target.add_(move.update, alpha=move.scale)
    begin = 0
    for shape in SHAPES.values():
        end = begin + math.prod(shape)
        expected = newton_schulz(update[begin:end].view(shape)).float() * update_scale(shape)
        torch.testing.assert_close(flat.detach()[begin:end].view(shape), expected, rtol=0, atol=1e-6)
        begin = end
    assert torch.equal(flat.detach()[total:], torch.zeros(3))
