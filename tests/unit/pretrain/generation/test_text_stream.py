"""Text in pieces: whole characters, the same whole text, and stop strings that are neither shown nor missed."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer
from pretrain.generation.text_stream import TextStream
from tests.json_tokenizers import SPLITS, trained, write
from tests.tiny_hf import TEXTS, VOCAB_SIZE

WRITTEN = [
    "\n    return a\n\n\n\tif x:\n        y",
    " leading space",
    "  two ",
    "草原は広い naïve",
    "in bytes: 🙂🙂 żółć",
    "ends in bytes 🙂",
    "\n",
    "",
]


@pytest.fixture(scope="module", params=["sentencepiece", "json"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    if request.param == "json":
        write(folder, trained(TEXTS * 9, SPLITS["llama 3"], vocab_size=VOCAB_SIZE))
        return Tokenizer(folder / "tokenizer.json")
    train_tokenizer(TEXTS, VOCAB_SIZE, folder / "tokenizer.model")
    return Tokenizer(folder / "tokenizer.model")


def pieces(stream: TextStream, ids: list[int]) -> list[str]:
    """What is given out after each token, and at the end."""
    given_out = []
    for token in ids:
        if not stream.stopped:
            given_out.append(stream.add([token]))
    return [*given_out, stream.finish()]


@pytest.mark.parametrize("text", WRITTEN)
@pytest.mark.parametrize("prompt", ["def f():\n    ", "", "x  ", "🙂"])
def test_pieces_are_whole_characters_and_add_up(tokenizer: Tokenizer, prompt: str, text: str) -> None:
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    given_out = pieces(stream, tokenizer.encode(text))
    assert "".join(given_out) == stream.text == text
    assert not any("\ufffd" in piece for piece in given_out)
    assert given_out[-1] == "", "nothing that was certain before is kept for the end"


@settings(max_examples=60)
@given(text=st.text(max_size=30), prompt=st.text(max_size=10))
def test_any_text_comes_out_as_it_was_written(tokenizer: Tokenizer, text: str, prompt: str) -> None:
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    assert "".join(pieces(stream, tokenizer.encode(text))) == text == stream.text


def test_text_comes_as_early_as_it_can(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("for i in range(10):\n")
    stream = TextStream(tokenizer, tokenizer.encode("x"))
    assert all(stream.add([token]) for token in ids)


def test_half_a_character_waits_and_comes_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂")
    stream = TextStream(tokenizer, [])
    assert "".join(stream.add([token]) for token in ids[:-1]) == stream.text == "a"
    assert "\ufffd" in stream.finish(), "the bytes that there are, as text that says so"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one two three", ("three", "two"), "one "),
        ("one two three", ("e t",), "on"),
        ("one two", ("one",), ""),
        ("one tw", ("two",), "one tw"),
        ("a###b", ("####", "###b"), "a"),
        ("naïve 🙂 smile", ("🙂",), "naïve "),
    ],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_a_stop_string_ends_the_text_and_is_never_shown(
    tokenizer: Tokenizer, text: str, stop: tuple[str, ...], expected: str, at_once: bool
) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("prompt: "), stop)
    ids = tokenizer.encode(text)
    if at_once:
        given_out = [stream.add(ids), stream.finish()]
    else:
        given_out = pieces(stream, ids)
    assert "".join(given_out) == stream.text == expected
    assert stream.stopped == (expected != text)


def test_a_stop_string_is_seen_with_the_token_that_completes_it(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("one two\n\nthree")
    stream = TextStream(tokenizer, [], ("\n\n",))
    read = 0
    while not stream.stopped:
        stream.add([ids[read]])
        read += 1
    assert "\n\n" in tokenizer.decode(ids[:read])
    assert "\n\n" not in tokenizer.decode(ids[: read - 1])


def test_a_stop_string_in_the_prompt_is_none(tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer, tokenizer.encode("one\n"), ("\n\n", "one"))
    assert "".join(pieces(stream, tokenizer.encode("\ntwo"))) == "\ntwo"
    assert not stream.stopped
