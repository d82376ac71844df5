"""Segments against the encoding in one piece, which sentencepiece itself gives."""

import base64
import io
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from data_pipeline import sentencepiece_codec
from data_pipeline.sentencepiece_codec import SEGMENT_BYTES, SPACE
from data_pipeline.tokenizer import Tokenizer

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
CODE = st.lists(st.sampled_from(["    ", " ", "\n", "\n\n", "\t", "def f(x):", "return", "天地", "<s>", SPACE, "12"]))
RUNS = st.lists(st.tuples(st.sampled_from(["e", " ", "\n", "\t", "the", "ab", "天"]), st.integers(1, 60)))
"""What has no border within, and pieces of the user whose match depends on where a run begins."""


def long_texts() -> dict[str, str]:
    rng = random.Random(0)

    def drawn(alphabet: str | list[str], count: int = 60_000) -> str:
        return "".join(rng.choice(alphabet) for _ in range(count))

    return {
        "one letter": "e" * 100_003,
        "one word": "the" * 33_001,
        "letters": drawn("abcdefghijklmnopqrstuvwxyz"),
        "few letters": drawn("aet"),
        "base64": base64.b64encode(rng.randbytes(60_000)).decode(),
        "Chinese": drawn("天地玄黄宇宙洪荒日月盈昃辰宿列张"),
        "unknown characters": drawn("𐎀𐎁𐎂e"),
        "spaces": " " * 100_007,
        "line ends": "\n" * 50_001,
        "mixed white space": drawn(["e", " ", "  ", "\n", "\t", "\t\t\t"]),
    }


def in_one_piece(tokenizer: Tokenizer, text: str) -> list[int]:
    """As sentencepiece encodes the parts between the characters U+2581, which ours spells in bytes."""
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    spelled = [whole.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]
    parts = [whole.encode(part) for part in text.split(SPACE)]
    return [i for n, part in enumerate(parts) for i in (spelled if n else []) + part]


def trained(path: Path, texts: list[str], **options: Any) -> Tokenizer:
    """A model of another kind than ours."""
    model = io.BytesIO()
    kind = {"model_type": "bpe", "vocab_size": 700, "byte_fallback": True, "minloglevel": 2}
    lines = iter([line for text in texts[:9] for line in text.split("\n")])
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **{**kind, **options})
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.mark.parametrize("name", [*long_texts(), "code", "one line", "the space character"])
def test_long_documents_have_the_ids_of_the_whole(name: str, tokenizer: Tokenizer, texts: list[str]) -> None:
    text = {
        **long_texts(),
        "code": "".join(texts),
        "one line": " ".join("".join(texts).split()),
        "the space character": f"a b{SPACE}{SPACE}c\n" * 10_000 + "e" * 20_000,
    }[name]
    assert len(text.encode()) > 4 * SEGMENT_BYTES
    assert tokenizer.encode(text) == in_one_piece(tokenizer, text)


@settings(max_examples=400)
@given(
    text=TEXT | CODE.map("".join) | RUNS.map(lambda runs: "".join(part * count for part, count in runs)),
    segment=st.integers(1, 20),
    overlap=st.integers(0, 3),
)
def test_any_cut_has_the_ids_of_the_whole(tokenizer: Tokenizer, text: str, segment: int, overlap: int) -> None:
    """Segments so short, and with so little overlap, that their first guess is often wrong."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_codec, "SEGMENT_BYTES", segment)
        patch.setattr(sentencepiece_codec, "OVERLAP_PIECES", overlap)
        found = tokenizer.encode(text)
    assert found == in_one_piece(tokenizer, text)


@pytest.fixture(scope="module")
def with_pieces(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A model with pieces of the user that overlap."""
    path = tmp_path_factory.mktemp("pieces") / "pieces.model"
    plain = {"add_dummy_prefix": False, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    return trained(path, texts, user_defined_symbols=["abcdab", "bc", "dab", "aab", "cda"], **plain)


@settings(max_examples=300)
@given(st.text("abcd", max_size=60), st.integers(1, 9))
def test_pieces_of_the_user_are_found_from_the_left(with_pieces: Tokenizer, text: str, segment: int) -> None:
    """Such a piece may begin well before the two pieces that meet at a cut."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sentencepiece_codec, "SEGMENT_BYTES", segment)
        patch.setattr(sentencepiece_codec, "OVERLAP_PIECES", 0)
        found = with_pieces.encode(text)
    assert found == in_one_piece(with_pieces, text)


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"add_dummy_prefix": True, "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["aba", "ab", "  "], "split_digits": True},
        {"model_type": "unigram"},
        {"byte_fallback": False},
        {"normalization_rule_name": "nfkc_cf", "vocabulary_output_piece_score": False},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_models_of_other_kinds(options: dict[str, Any], texts: list[str], tmp_path: Path) -> None:
    """Those that rewrite their text, and those whose texts cannot be cut."""
    tokenizer = trained(tmp_path / "other.model", texts, **options)
    whole = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    for text in ("", " ", "".join(texts), "  a  " * 9000, "ab" * 9000, "ﬁ ①  ｆｕｌｌ\u3000width " * 2000):
        assert tokenizer.encode(text) == whole.encode(text)


def test_pieces_that_are_not_used(texts: list[str], tmp_path: Path) -> None:
    """sentencepiece undoes the merges that make one, so what it had been made of depends on the whole text."""
    path = trained(tmp_path / "unused.model", texts, add_dummy_prefix=False).path
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(path.read_bytes())
    for piece in [piece for piece in spec.pieces if piece.type == piece.NORMAL and len(piece.piece) > 2][::2]:
        piece.type = piece.UNUSED
    path.write_bytes(spec.SerializeToString())
    whole = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert Tokenizer(path).encode("".join(texts)) == whole.encode("".join(texts))


def test_a_batch_of_all_sorts(tokenizer: Tokenizer, texts: list[str]) -> None:
    batch = ["", "short", "e" * 20_000, SPACE, f"a{SPACE}b", "".join(texts), "\n"]
    for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == in_one_piece(tokenizer, text)
    assert tokenizer.encode_batch([]) == []


@pytest.mark.slow
def test_time_grows_in_step_with_length(tokenizer: Tokenizer, texts: list[str]) -> None:
    text = "".join(texts)

    def seconds_a_byte(repeats: int) -> float:
        started = time.process_time()
        tokenizer.encode(text * repeats)
        return (time.process_time() - started) / repeats

    # In step with the square of it, this would be 8; a core that is shared may be half as fast.
    assert seconds_a_byte(8) < 3 * min(seconds_a_byte(1) for _ in range(3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["' '.join(open(path).read().split())", "base64.b64encode(random.Random(0).randbytes(n)).decode()"]
)
def test_memory_is_a_few_times_the_text(text: str, tokenizer: Tokenizer) -> None:
    """20 MB on one line; sentencepiece alone takes some hundred bytes for each byte of it."""
    script = (
        "import base64, random, resource, sys\nfrom data_pipeline.tokenizer import Tokenizer\n"
        f"path, n, tokenizer = sys.argv[1], 20_000_000, Tokenizer(sys.argv[2])\ntext = {text}\n"
        "text = (text * (n // len(text) + 1))[:n]\ntokenizer.encode(text[:50_000])\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\ntokenizer.encode_batch([text])\nprint((peak() - before) / n)"
    )
    words = [sys.executable, "-c", script, subprocess.__file__, str(tokenizer.path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 12
