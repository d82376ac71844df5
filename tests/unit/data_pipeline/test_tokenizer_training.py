from pathlib import Path

import pytest

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer


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
    monkeypatch.setattr("data_pipeline.tokenizer_training.MAX_SENTENCE_CHARACTERS", 1000)
    text = "some words here\n" * 1000 + "zebrafish " * 1000
    train_tokenizer([text], 330, tmp_path / "t.model")
    assert len(Tokenizer(tmp_path / "t.model").encode(" zebrafish")) == 1


def test_special_tokens_are_never_read_out_of_a_text(texts: list[str], tmp_path: Path) -> None:
    special = ["<|user|>", "<|tool,call|>", '"quoted"']
    train_tokenizer([*texts, " <|user|> says" * 999], 900, tmp_path / "t.model", special)
    tokenizer = Tokenizer(tmp_path / "t.model")
    text = "<|user|>" + "".join(special) + "<s></s>"
    ids = tokenizer.encode(text)
    assert not {0, 1, 2, 3, 4, 5} & set(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([3, 4, 5]) == ""
    assert tokenizer.vocab_size == 900


@pytest.mark.parametrize(
    ("special", "message"),
    [
        (["a b"], "'a b': a special token is of printable characters without white space"),
        ([""], "'': a special token is of printable"),
        (["▁x"], "printable"),
        (["<s>"], "<s>: there is such a piece already"),
        (["<0x41>"], "there is such a piece already"),
        (["<x>", "<y>", "<x>"], "--special <x>: there is such a piece already"),
    ],
)
def test_what_no_special_token_can_be(special: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(["text"], 300, tmp_path / "t.model", special)


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
