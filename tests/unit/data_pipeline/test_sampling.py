import json
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.corpus.config import CorpusConfig, InputConfig
from data_pipeline.corpus.document import Document
from data_pipeline.sampling import draw, sample_corpus


def documents(texts: list[str]) -> Iterator[Document]:
    return (Document(text, "file", index) for index, text in enumerate(texts))


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=40),
    st.integers(0, 120),
    st.integers(0, 9),
)
def test_it_is_the_documents_with_the_smallest_keys(texts: list[str], quota: int, seed: int) -> None:
    """Against the plain way: sort all by their keys, fill up the quota."""
    found = draw(documents(texts), quota, seed, "news")
    order = sorted(range(len(texts)), key=lambda at: (xxhash.xxh3_64_intdigest(f"news\0{at + 1}".encode(), seed), at))
    expected, room = {}, quota
    for at in order:
        if room <= 0:
            break
        content = texts[at].encode()[:room]
        expected[at] = content.decode(errors="ignore")
        room -= len(content)
    assert found.documents == [expected[at] for at in sorted(expected)]
    assert found.text_bytes == sum(len(text.encode()) for text in found.documents)
    assert quota - 3 <= found.text_bytes <= quota or found.text_bytes == found.seen_bytes
    assert (found.seen_documents, found.seen_bytes) == (len(texts), sum(len(text.encode()) for text in texts))


def test_each_document_is_as_likely_as_any_other() -> None:
    """Chi-square of how often each of 50 documents is among 10, over 2,000 seeds: 49 degrees of freedom, p = 0.001."""
    texts = [f"{number:02}" for number in range(50)]
    taken = Counter(text for seed in range(2000) for text in draw(documents(texts), 20, seed, "n").documents)
    assert sum(taken.values()) == 20_000
    # Draws without replacement vary less than independent ones, by (n - k) / (n - 1).
    assert sum((taken[text] - 400) ** 2 / 400 for text in texts) / (40 / 49) < 85.4


def test_memory_is_that_of_the_sample() -> None:
    tracemalloc.start()
    draw((Document("x" * 1000, "file", index) for index in range(20_000)), 100_000, 0, "n")
    peak = tracemalloc.get_traced_memory()[1]
    draw([Document("x" * 5_000_000, "file", 0)], 1000, 0, "n")
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    inputs = []
    for name, count, weight in (("large", 900, 3.0), ("small", 100, 1.0), ("tiny", 1, 4.0)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name}{at:05}"}) + "\n" for at in range(count)))
        inputs.append(InputConfig(path=str(path), weight=weight))
    return CorpusConfig(inputs=tuple(inputs))


def test_inputs_share_by_weight(corpus: CorpusConfig) -> None:
    samples = {sample.name: sample for sample in sample_corpus(corpus, 1600, seed=1)}
    assert [samples[name].text_bytes for name in ("large", "small", "tiny")] == [600, 200, len("tiny00000")]
    assert [samples[name].seen_documents for name in ("large", "small", "tiny")] == [900, 100, 1]
    assert all(text.startswith("large") for text in samples["large"].documents)
    assert samples["large"].documents == sorted(samples["large"].documents)


def test_seed_and_place(corpus: CorpusConfig, tmp_path: Path) -> None:
    """The sample depends on the seed, and not on where the files lie."""
    first = sample_corpus(corpus, 800, seed=1)
    assert sample_corpus(corpus, 800, seed=1) == first
    assert sample_corpus(corpus, 800, seed=2) != first
    (tmp_path / "moved").mkdir()
    for input_ in corpus.inputs:
        Path(input_.path).rename(tmp_path / "moved" / Path(input_.path).name)
    moved = [
        input_.model_copy(update={"path": str(tmp_path / "moved" / Path(input_.path).name)}) for input_ in corpus.inputs
    ]
    assert sample_corpus(CorpusConfig(inputs=tuple(moved)), 800, seed=1) == first


@pytest.mark.parametrize("sample_bytes", [0, -1, 1 << 40])
def test_bytes_that_are_none(sample_bytes: int, corpus: CorpusConfig) -> None:
    with pytest.raises(ValueError, match=f"--sample-bytes {sample_bytes}: .* give 1 to"):
        sample_corpus(corpus, sample_bytes)


def test_an_input_that_would_not_be_in_the_sample(corpus: CorpusConfig) -> None:
    light = corpus.inputs[1].model_copy(update={"weight": 1e-3})
    corpus = CorpusConfig(inputs=(corpus.inputs[0], light))
    assert [bool(sample.documents) for sample in sample_corpus(corpus, 12_004)] == [True, True]
    with pytest.raises(ValueError, match=r"small has weight 0.001 of 3.001, .* 3 of --sample-bytes 12000.*: raise"):
        sample_corpus(corpus, 12_000)
