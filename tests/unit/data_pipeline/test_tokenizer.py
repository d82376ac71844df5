from pathlib import Path

import pytest
import xxhash
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.sentencepiece_codec import SPACE
from data_pipeline.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
AWKWARD = st.text(st.sampled_from(" \n\r\t\0a1<s>/x▁▅é中😀\ufeff\ufffd\u2028\U0010ffff"))
CODE = st.lists(st.sampled_from(["    ", " ", "\n", "\n\n", "\t", "def f(x):", "return", "天地", "<s>", SPACE, "12"]))


@settings(max_examples=300)
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


def test_special_pieces_and_fingerprint(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_id == 2
    assert tokenizer.vocab_size == 1000
    assert tokenizer.fingerprint == xxhash.xxh3_64_hexdigest(tokenizer.path.read_bytes())
    assert tokenizer.decode([1, *tokenizer.encode("x"), 2]) == "x"


def test_indentation_is_cheap(tokenizer: Tokenizer) -> None:
    for indentation in ("\n", "\t", " " * 4, " " * 8, " " * 16, "\n\n", "\t\t"):
        assert len(tokenizer.encode(indentation)) == 1


def test_no_model(tmp_path: Path) -> None:
    for path in (tmp_path / "none.model", tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="does not exist: make one with"):
            Tokenizer(path)
    (tmp_path / "junk.model").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        Tokenizer(tmp_path / "junk.model")
