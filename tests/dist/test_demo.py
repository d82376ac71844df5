"""The demo, shortened: every stage of the road, by the commands that a user would type."""

from pathlib import Path

import pytest

from pretrain.run_dir import read_events
from tests.conftest import Steppe

pytestmark = pytest.mark.slow


def test_demo(steppe: Steppe, tmp_path: Path) -> None:
    done = steppe("demo", "--dir", tmp_path / "demo", "--steps", 20)
    for stage in ("text", "tokenizer", "shards", "train", "resume", "evaluate", "generate", "tensorboard --logdir"):
        assert stage in done.stdout
    steps = read_events(tmp_path / "demo" / "run" / "events.jsonl", "step")
    assert [event["step"] for event in steps] == list(range(1, 21))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    assert "class Stack:\n    def __init__(self):\n" in done.stderr  # newlines and indentation intact


def test_a_folder_that_is_no_demo_is_left_alone(steppe: Steppe, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "not an earlier demo" in steppe("demo", "--dir", tmp_path, code=2).stderr
    assert "--steps 5" in steppe("demo", "--dir", tmp_path / "demo", "--steps", 5, code=2).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
