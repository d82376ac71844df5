"""Where prompts come from: one place, whole, and as they are."""

import json
from pathlib import Path

import pytest

from launch.prompts import read_prompts
from launch.step_word import step_of_word


def test_prompts_are_taken_as_they_are(tmp_path: Path) -> None:
    text = "def f(x):\r\n    return 🙂 \u2028"
    (tmp_path / "one.txt").write_bytes(text.encode())
    lines = [{"prompt": text, "text": "not this"}, {"text": " b", "id": 3}, {"prompt": ""}]
    (tmp_path / "many.jsonl").write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert read_prompts([text, "b"], None, None) == [text, "b"]
    assert read_prompts(None, tmp_path / "one.txt", None) == [text]
    assert read_prompts([], None, tmp_path / "many.jsonl") == [text, " b", ""]


def test_they_come_from_one_place(tmp_path: Path) -> None:
    for given in ((None, None, None), (["x"], tmp_path / "a", None), (["x"], None, tmp_path / "b")):
        with pytest.raises(ValueError, match="by one of --prompt TEXT, --prompt-file FILE and --prompts FILE.jsonl"):
            read_prompts(*given)


@pytest.mark.parametrize("option", ["--prompt-file", "--prompts"])
def test_a_file_must_be_there_in_utf8(tmp_path: Path, option: str) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for name, message in (("missing", "does not exist"), ("latin", r"is not UTF-8 \(byte 3\)")):
        place = (tmp_path / name, None) if option == "--prompt-file" else (None, tmp_path / name)
        with pytest.raises(ValueError, match=rf"{option} .*{name} {message}"):
            read_prompts(None, *place)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b"', r":2: not a JSON object"),
        ('\n["a"]', r":2: a JSON object with a text in the field prompt or text"),
        ('{"prompt": 3}', r":1: a JSON object with a text"),
        ('{"other": "a"}', r":1: a JSON object with a text"),
        ('{"prompt": "\\ud800"}', r":1: half a surrogate pair"),
        ("\n\n", "holds no prompt"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(None, None, tmp_path / "prompts.jsonl")


def test_a_prompt_that_the_terminal_garbled_is_refused() -> None:
    with pytest.raises(ValueError, match="--prompt is not valid UTF-8"):
        read_prompts(["caf\udce9"], None, None)


def test_a_step_is_a_number_or_the_best() -> None:
    assert [step_of_word(word) for word in (None, "best", "0", "1200")] == [None, "best", 0, 1200]
    for wrong in ("latest", "-1", "1.5", "", "²"):
        with pytest.raises(ValueError, match="must be a number of steps, or best"):
            step_of_word(wrong)
