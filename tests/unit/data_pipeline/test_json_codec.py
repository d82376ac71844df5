"""Long texts through a `tokenizer.json` in pieces, against the library's encoding of the whole."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from tokenizers import Tokenizer as JsonTokenizer

from data_pipeline import json_codec
from data_pipeline.json_codec import can_be_cut
from data_pipeline.tokenizer import Tokenizer
from tests.json_tokenizers import BOS, EOS, SPLITS, byte_level, trained, write

PARTS = st.lists(
    st.sampled_from(
        [
            "word",
            "x",
            "A",
            "天",
            "й",
            " ",
            "  ",
            "\n",
            " \n",
            ",",
            ".",
            "-",
            "_",
            "'s",
            "'",
            "1",
            "é",
            "，x",
            "<tool>",
            BOS,
        ]
    )
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
)
Library = dict[str, Tokenizer]


def in_one_piece(path: Path, text: str) -> list[int]:
    whole = JsonTokenizer.from_file(str(path))
    whole.encode_special_tokens = True
    return whole.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def library(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Library:
    folder = tmp_path_factory.mktemp("json")
    made = {name: trained(texts, split) for name, split in SPLITS.items()}
    made["normalized"] = trained(
        texts, SPLITS["qwen 2"], normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    )
    made["compatible"] = trained(texts, SPLITS["llama 3"], normalizers.NFKC())
    return {name: Tokenizer(write(folder / name, tokenizer)) for name, tokenizer in made.items()}


def test_every_kind_is_cut(library: Library) -> None:
    for name, tokenizer in library.items():
        assert can_be_cut(json.loads(tokenizer.files.content)), name


@settings(max_examples=200)
@given(PARTS.map("".join), st.integers(1, 6))
def test_any_cut_has_the_ids_of_the_whole(library: Library, text: str, segment: int) -> None:
    for name, tokenizer in library.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(json_codec, "SEGMENT_CHARACTERS", segment)
            patch.setattr(json_codec, "CALL_SEGMENTS", 3)
            found = tokenizer.encode(text)
        assert found == in_one_piece(tokenizer.path, text), name


def test_long_documents_have_the_ids_of_the_whole(
    library: Library, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "".join(texts)[:80_000]
    one_line = " ".join(text.split())
    calls: list[int] = []
    encode = json_codec.JsonCodec._encode
    monkeypatch.setattr(json_codec, "SEGMENT_CHARACTERS", 5000)
    monkeypatch.setattr(
        json_codec.JsonCodec,
        "_encode",
        lambda self, batch, parts: (calls.append(len(batch)), encode(self, batch, parts)),
    )
    for tokenizer in library.values():
        for long in (one_line, text, "天地玄黄，宇宙洪荒。" * 3000, "e" * 20_000):
            assert tokenizer.encode(long) == in_one_piece(tokenizer.path, long)
    assert max(calls) > 10


def test_round_trip_and_special_tokens(library: Library) -> None:
    tokenizer = library["llama 3"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 601)
    for text in ("", " naïve 草原\r\n\t  ", f"{BOS}literal{EOS}", "a <tool> b", "\x00\u2581"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1} & set(ids)
        assert tokenizer.decode([0, *ids, 1]) == text
    assert [ids.tolist() for ids in tokenizer.encode_batch(["x", "", "y"])][1] == []


def edited(path: Path, edit: Callable[[dict[str, Any]], None]) -> Path:
    spec = json.loads(path.read_bytes())
    edit(spec)
    path.write_text(json.dumps(spec))
    return path


@pytest.mark.parametrize(
    "unknown",
    [
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.Split(Regex(r"\w+ \w+|."), "isolated")),
        lambda made: setattr(
            made, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), byte_level()])
        ),
        lambda made: setattr(made, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)),
        lambda made: setattr(made, "normalizer", normalizers.Prepend("x")),
        lambda made: setattr(made, "normalizer", normalizers.Replace("word x", "y")),
        lambda made: setattr(made, "normalizer", normalizers.NFD()),
        lambda made: made.add_tokens([AddedToken("word ,x", normalized=False)]),
        lambda made: made.add_tokens([AddedToken("x", rstrip=True)]),
    ],
)
def test_what_is_not_known_is_encoded_whole(
    unknown: Callable[[JsonTokenizer], None], texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained(texts, SPLITS["gpt-2"])
    unknown(made)
    path = write(tmp_path, made)
    assert not can_be_cut(json.loads(path.read_bytes()))
    monkeypatch.setattr(json_codec, "SEGMENT_CHARACTERS", 3)
    text = "a word x, word ,x y é,e" * 9
    assert Tokenizer(path).encode(text) == in_one_piece(path, text)


def test_padding_and_truncation_are_no_part_of_a_text(texts: list[str], tmp_path: Path) -> None:
    made = trained(texts, SPLITS["gpt-2"])
    made.enable_padding()
    made.enable_truncation(4)
    tokenizer = Tokenizer(write(tmp_path, made))
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(["some words of text " * 9, "x"])] == [
        "some words of text " * 9,
        "x",
    ]


def test_files_that_are_no_tokenizer(texts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, trained(texts, SPLITS["gpt-2"]), eos_token="<none>")
    with pytest.raises(
        ValueError, match="has no token '<none>', but tokenizer_config.json beside it names that as its eos"
    ):
        Tokenizer(path)
    edited(path, lambda spec: spec["model"].update(dropout=0.1))
    with pytest.raises(ValueError, match="chooses pieces by chance .dropout 0.1.*set model.dropout to null"):
        Tokenizer(path)
    for content in ("{", "[]", '{"model": {}}', ""):
        path.write_text(content)
        with pytest.raises(ValueError, match=re.escape(f"tokenizer {path} is not a Hugging Face tokenizer.json")):
            Tokenizer(path)


@pytest.mark.slow
def test_memory_is_a_few_times_the_text(library: Library) -> None:
    """20 MB of English on one line; whole, the library takes some hundred bytes for each token."""
    script = (
        "import resource, sys\nfrom data_pipeline.tokenizer import Tokenizer\n"
        "n, tokenizer = 20_000_000, Tokenizer(sys.argv[2])\ntext = ' '.join(open(sys.argv[1]).read().split())\n"
        "text = (text * (n // len(text) + 1))[:n]\ntokenizer.encode(text[:50_000])\n"
        "peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak()\ntokenizer.encode_batch([text])\nprint((peak() - before) / n)"
    )
    words = [sys.executable, "-c", script, subprocess.__file__, str(library["llama 3"].path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 60
