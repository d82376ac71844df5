import itertools
import time
from pathlib import Path

import pytest
import sentencepiece
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import SEGMENT_CHARACTERS, SPACE, Tokenizer, train_tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = st.text(st.sampled_from(" \n\r\t\0a1<s>/x▁▅é中😀\ufeff\ufffd\u2028\U0010ffff"))
CODE = st.lists(st.sampled_from(["    ", " ", "\n", "\n\n", "\t", "def f(x):", "return", "天地", "<s>", SPACE, "12"]))


@settings(deadline=None, max_examples=300)
@given(TEXT | AWKWARD | CODE.map("".join))
@example("")
@example("\n")
@example("\r\n")
@example("\0")
@example("a\0b")
@example(SPACE)
@example(f"a{SPACE}b {SPACE}{SPACE} ")
@example("   leading and trailing   ")
@example("\t\tindented\n\n\n\n")
@example("👨‍👩‍👧 天地玄黄 \u202e")
@example("<s></s><unk><0x0A><pad>")
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {0, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_every_document_comes_back(tokenizer: Tokenizer, texts: list[str]) -> None:
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert ids.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("alphabet", ["code", "one line", "no boundary", "space character"])
def test_long_documents_have_the_ids_of_the_whole(tokenizer: Tokenizer, texts: list[str], alphabet: str) -> None:
    text = {
        "code": "".join(texts),
        "one line": " ".join("".join(texts).split()),
        "no boundary": "e" * 40_000,
        "space character": f"a b{SPACE}c\n" * 10_000,
    }[alphabet]
    assert len(text) > 2 * SEGMENT_CHARACTERS
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    spelled = [reference.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    parts = [reference.encode(part) for part in text.split(SPACE)]
    assert ids == [i for n, part in enumerate(parts) for i in (spelled if n else []) + part]


@settings(deadline=None, max_examples=200)
@given(text=TEXT | CODE.map("".join), segment=st.integers(1, 20))
def test_any_cut_has_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, segment: int) -> None:
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.tokenizer.SEGMENT_CHARACTERS", segment)
        assert tokenizer.encode(text) == whole


@pytest.mark.slow
def test_time_grows_in_step_with_length(tokenizer: Tokenizer, texts: list[str]) -> None:
    text = "".join(texts)

    def seconds_a_byte(repeats: int) -> float:
        started = time.process_time()
        tokenizer.encode(text * repeats)
        return (time.process_time() - started) / repeats

    assert seconds_a_byte(8) < 1.5 * min(seconds_a_byte(1) for _ in range(3))


def test_special_pieces_and_fingerprint(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_id == 2
    assert tokenizer.vocab_size == 1000
    assert tokenizer.fingerprint == xxhash.xxh3_64_hexdigest(tokenizer.path.read_bytes())
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"


def test_indentation_is_cheap(tokenizer: Tokenizer) -> None:
    for indentation in ("\n", "\t", " " * 4, " " * 8, " " * 16, "\n\n", "\t\t"):
        assert len(tokenizer.encode(indentation)) == 1


def test_digits_are_split_however_frequent(tmp_path: Path) -> None:
    train_tokenizer(["in 2024 and 2025, " * 100], 295, tmp_path / "t.model")
    assert len(Tokenizer(tmp_path / "t.model").encode("2024")) == 4


def test_training_is_deterministic(texts: list[str], tokenizer_path: Path, tmp_path: Path) -> None:
    train_tokenizer(iter(texts), 1000, tmp_path / "elsewhere" / "again.model")
    assert (tmp_path / "elsewhere" / "again.model").read_bytes() == tokenizer_path.read_bytes()


def test_long_documents_are_trained_on_to_their_end(tmp_path: Path) -> None:
    """sentencepiece's default would skip this one sentence whole: it has more than 4,192 bytes."""
    text = "some words here\n" * 1000 + "zebrafish " * 100
    stats = train_tokenizer([text], 330, tmp_path / "t.model")
    assert stats.text_bytes == len(text)
    assert stats.documents == 1
    assert len(Tokenizer(tmp_path / "t.model").encode(" zebrafish")) == 1


def test_documents_larger_than_a_sentence_are_all_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenizer.MAX_SENTENCE_CHARACTERS", 1000)
    text = "some words here\n" * 1000 + "zebrafish " * 1000
    train_tokenizer([text], 330, tmp_path / "t.model")
    assert len(Tokenizer(tmp_path / "t.model").encode(" zebrafish")) == 1


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        ([], 1000, "no text to train"),
        ([""], 1000, "no text to train"),
        (["a few words"], 5000, r"use at most \d+, or more text"),
        (["天地玄黄" * 9], 281, "cannot hold the characters of this corpus: use at least 2"),
        (["a few words"], 3, "use at least 2"),
    ],
)
def test_unsuitable_corpora(documents: list[str], vocab_size: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(documents, vocab_size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_too_much_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.tokenizer.MAX_TRAINING_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="give --input a sample"):
        train_tokenizer(itertools.repeat("some words here\n" * 1000), 330, tmp_path / "t.model")


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist: make one with"):
        Tokenizer(tmp_path / "none.model")
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "junk.model")
