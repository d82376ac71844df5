"""What is counted, and that it adds up in any parts."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.preparation.counts import RATIO_BINS, Counts, InputCounts, Tally

Document = tuple[str, int, int, str | None, int]
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.integers(1, 1 << 30),
        st.integers(0, 1 << 31),
        st.none() | st.sampled_from(["x", "y"]),
        st.integers(0, 100),
    ),
    max_size=30,
)


def counted(documents: list[Document]) -> Counts:
    """(input, tokens, bytes, rule that removes it, bytes that were taken out of it) of each."""
    counts = Counts()
    for name, tokens, text_bytes, rule, trimmed in documents:
        part = counts.inputs[name]
        if rule is not None:
            part.read.add(1, text_bytes)
            part.remove(rule, 1, text_bytes)
        else:
            part.read.add(1, text_bytes + trimmed)
            part.trimmed_bytes += trimmed
            part.keep(np.array([tokens], np.int32), np.array([text_bytes], np.uint32))
    return counts


@given(DOCUMENTS, st.integers(0, 30))
def test_parts_add_up_to_the_whole(documents: list[Document], cut: int) -> None:
    whole = counted(documents)
    merged = counted(documents[:cut])
    merged.merge(counted(documents[cut:]))
    assert {name: part for name, part in merged.to_json().items() if part["read"]["documents"]} == whole.to_json()
    for counts in (*whole.inputs.values(), whole.total):
        counts.check()
    assert Counts.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert whole.total.kept.documents == sum(rule is None for *_, rule, _ in documents)


def test_histograms_have_the_bins_they_say() -> None:
    counts = InputCounts()
    counts.keep(np.array([1, 2, 3, 4, 1023, 1024]), np.array([0, 2, 3, 5, 4092, 1 << 20]))
    assert {i: n for i, n in enumerate(counts.lengths) if n} == {0: 1, 1: 2, 2: 1, 9: 1, 10: 1}
    assert {i: n for i, n in enumerate(counts.ratios) if n} == {0: 1, 4: 2, 5: 1, 16: 1, RATIO_BINS - 1: 1}


def test_a_document_that_got_lost_is_noticed() -> None:
    with pytest.raises(AssertionError):
        InputCounts(read=Tally(1, 10)).check()
