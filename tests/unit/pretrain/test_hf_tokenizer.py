"""The fast tokenizer that transformers loads, beside ours: the same ids for every text, or a refusal."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from data_pipeline.sentencepiece_codec import SPACE
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.hf import config_to_hf
from pretrain.hf_tokenizer import check_fast_tokenizer, write_fast_tokenizer
from tests.conftest import STDLIB
from tests.hf_parity import config
from tests.tiny_hf import TEXTS

CORPUS = [path.read_text() for path in sorted((STDLIB / "email").glob("*.py"))]
UNSEEN = [
    path.read_text() for folder in ("json", "concurrent/futures") for path in sorted((STDLIB / folder).glob("*.py"))
]
ODD = [
    "",
    " ",
    SPACE,
    f"a{SPACE}b {SPACE} {SPACE * 3}",
    "\t" * 11 + " " * 37 + "x" + "\n" * 7,
    "a\r\nb\rc\x0b\x0c\x1c\x85\u2028",
    "nul\x00nul\x00\x00",
    "👩\u200d👩\u200d👧 🇨🇦 😀😀",
    "草原は広い。𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301\u0323 ÅÅ \ufeff\uffff\U0010ffff",
    "<s></s><unk> <s>\n<s> <0x0A><0xE2>",
    "word " * 20_000,
    "x" * 50_000,
]
Pair = tuple[Tokenizer, Any]


def trained(path: Path, **options: Any) -> Path:
    """A sentencepiece model of another kind than ours; Llama 2's by default."""
    model = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 700,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
    }
    lines = iter([line for text in CORPUS[:4] for line in text.split("\n")])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines, model_writer=model, minloglevel=2, **{**llama, **options}
    )
    path.write_bytes(model.getvalue())
    return path


def both(folder: Path, sentencepiece_model: Path, **fields: Any) -> Pair:
    (folder / "config.json").write_text(json.dumps(config_to_hf(config(vocab_size=2000, **fields))))
    write_fast_tokenizer(sentencepiece_model, folder, 64)
    check_fast_tokenizer(folder)
    return Tokenizer(sentencepiece_model), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("fast")
    train_tokenizer(CORPUS + TEXTS, 1500, folder / "own.model")
    return both(folder, folder / "own.model")


@pytest.fixture(scope="module")
def llama_pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("llama")
    return both(folder, trained(folder / "llama.model"))


@pytest.mark.slow
def test_ids_of_a_corpus(pair: Pair, llama_pair: Pair) -> None:
    for ours, theirs in (pair, llama_pair):
        for text in CORPUS + UNSEEN:
            ids = ours.encode(text)
            assert theirs.encode(text) == ids
            assert theirs.decode(ids) == text == ours.decode(ids)


@pytest.mark.parametrize("text", ODD, ids=lambda text: ascii(text[:12]))
def test_ids_of_odd_texts(text: str, pair: Pair, llama_pair: Pair) -> None:
    for ours, theirs in (pair, llama_pair):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert pair[1].decode(pair[1].encode(text)) == text


PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
    st.sampled_from([SPACE, " ", "  ", "\n", "\t", "\x00", "<s>", "</s>", "<unk>", "<0x41>", "the", "self", "1", "é"]),
    st.integers(0, 40).map(lambda count: " " * count),
)


@settings(max_examples=150)
@given(parts=st.lists(PARTS, max_size=20))
def test_ids_of_any_text(parts: list[str], pair: Pair, llama_pair: Pair) -> None:
    text = "".join(parts)
    for ours, theirs in (pair, llama_pair):
        ids = ours.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert pair[1].decode(pair[1].encode(text)) == text


@pytest.mark.parametrize("fields", [{}, {"qk_norm": True}, {"moe": True}, {"qk_norm": True, "moe": True}])
def test_every_architecture_takes_it(fields: dict[str, Any], pair: Pair, tmp_path: Path) -> None:
    """transformers chooses a tokenizer by the model's type, too."""
    if "moe" in fields:
        fields = {**fields, "moe": {"experts": 4, "experts_per_token": 2, "expert_ffn_size": 96}}
    ours, theirs = both(tmp_path, pair[0].path, **fields)
    assert type(theirs).__name__ == "TokenizersBackend"
    assert all(theirs.encode(text) == ours.encode(text) for text in ODD)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert theirs.model_max_length == 64
    assert len(theirs) == ours.vocab_size


def test_what_a_reader_may_ask_for(pair: Pair) -> None:
    ours, theirs = pair
    folder = ours.path.parent
    ids = ours.encode("x = 1")
    assert AutoTokenizer.from_pretrained(folder, add_bos_token=True).encode("x = 1") == [1, *ids]
    assert theirs.encode("<s>x = 1</s>", split_special_tokens=False) == [1, *ids, 2]
    assert theirs.decode([1, *ids, 2], skip_special_tokens=True) == "x = 1"
    assert theirs.decode([1, *ids]) == "<s>x = 1"
    assert theirs(["x = 1"], return_tensors="pt").input_ids.tolist() == [ids]


def test_it_survives_being_saved_by_transformers(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = pair
    theirs.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert all(again.encode(text) == ours.encode(text) for text in ODD + UNSEEN[:5])


def test_pieces_of_the_user(tmp_path: Path) -> None:
    """Longest first, from left to right, never part of a merge; with and without spaces in them."""
    symbols = ["ab", "abc", "<|end|>", "a b", f"b{SPACE}a", SPACE * 2]
    model = trained(tmp_path / "user.model", add_dummy_prefix=False, user_defined_symbols=symbols)
    ours, theirs = both(tmp_path, model)
    for text in ("abcabab a b  ab c", "<|end|><|end|> x<|end", "   a  b a b", *ODD, *UNSEEN[:5]):
        assert theirs.encode(text) == ours.encode(text)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram"}, "model_type is not bpe"),
        ({"byte_fallback": False}, "no byte_fallback"),
        ({"normalization_rule_name": "nmt_nfkc"}, "rewrites its text .normalization rule nmt_nfkc"),
        ({"remove_extra_whitespaces": True}, "removes spaces"),
        ({"treat_whitespace_as_suffix": True}, "takes a space for a suffix"),
        ({"user_defined_symbols": ["ab"]}, "both add_dummy_prefix and user_defined_symbols"),
        ({"user_defined_symbols": ["s>x"], "add_dummy_prefix": False}, "begins with the end of a control piece"),
        ({"user_defined_symbols": ["unk"], "add_dummy_prefix": False}, "or within one"),
    ],
)
def test_kinds_that_cannot_be_equal(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*--no-tokenizer"):
        write_fast_tokenizer(trained(tmp_path / "other.model", **options), tmp_path, 64)
    assert not (tmp_path / "tokenizer.json").exists()


@contextmanager
def changed(path: Path) -> Iterator[Any]:
    """The model's own description, written back in the end."""
    spec = sentencepiece_model_pb2.ModelProto()
    spec.ParseFromString(path.read_bytes())
    yield spec
    path.write_bytes(spec.SerializeToString())


def test_pieces_that_no_ranking_of_merges_can_follow(tmp_path: Path) -> None:
    for what, reason in (
        ("score", "equal scores"),
        ("unused", "marked as unused"),
        ("character", "no pieces them"),
        ("space", "differ only in how they spell a space"),
    ):
        path = trained(tmp_path / f"{what}.model")
        with changed(path) as spec:
            merged = [piece for piece in spec.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1]
            if what == "score":
                merged[3].score = merged[4].score
            elif what == "unused":
                merged[3].type = merged[3].UNUSED
            elif what == "character":
                merged[3].piece = "\u4e00\u4e01"
            else:
                merged[3].piece, merged[4].piece = "t ", f"t{SPACE}"
        with pytest.raises(ValueError, match=reason):
            write_fast_tokenizer(path, tmp_path, 64)


def test_a_tokenizer_that_differs_is_found(pair: Pair, tmp_path: Path) -> None:
    both(tmp_path, pair[0].path)
    file = tmp_path / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(RuntimeError, match="the fast tokenizer differs from tokenizer.model: after"):
        check_fast_tokenizer(tmp_path)
