"""An evaluation's folder: of one request, for one writer, with facts once it is finished."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.evaluation.folder import (
    Cost,
    Facts,
    check_request,
    is_finished,
    locked,
    read_facts,
    write_facts,
    write_request,
)

REQUEST: dict[str, Any] = {
    "step": 3,
    "window": 64,
    "texts": {"inputs": [{"name": "a"}, {"name": "b"}], "by_field": None},
}
FACTS = Facts(
    model="run",
    step=3,
    passed_over=("step_4 is damaged",),
    precision="fp32",
    offload=None,
    window="document",
    stride=None,
    context_length=64,
    start_token="bos",
    eos_scored=True,
    tokenizer="abc",
    domains=("a", "b"),
    notes=(),
    cost=Cost(1.5, 100.25, 1 << 30, 2),
)


def test_facts_come_back(tmp_path: Path) -> None:
    write_facts(tmp_path, FACTS)
    assert is_finished(tmp_path)
    assert read_facts(tmp_path) == FACTS
    write_facts(tmp_path, replace(FACTS, window=64, stride=32))
    assert read_facts(tmp_path).window == 64


def test_a_folder_without_facts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no evaluation"):
        read_facts(tmp_path)
    write_request(tmp_path, REQUEST)
    with pytest.raises(ValueError, match="interrupted: finish it by the command"):
        read_facts(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": 4}, "step=3, and this one has 4"),
        ({"window": "document"}, "window=64, and this one has document"),
        ({"texts": {"inputs": [{"name": "a"}, {"name": "c"}], "by_field": None}}, "texts.inputs[1].name=b, and"),
        ({"texts": {"inputs": [{"name": "a"}], "by_field": None}}, "texts.inputs[1].name=b, and this one has None"),
        ({"files": [{"size": 3}]}, "files[0].size=None, and this one has 3"),
    ],
)
def test_another_request_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    check_request(tmp_path, REQUEST)
    write_request(tmp_path, REQUEST)
    check_request(tmp_path, REQUEST)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_request(tmp_path, REQUEST | change)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder), pytest.raises(ValueError, match="another evaluation is writing"), locked(folder):
        pass
    with locked(folder):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="holds something else"), locked(tmp_path):
        pass
    with pytest.raises(ValueError, match="no evaluation can be kept there"), locked(tmp_path / "thesis.txt"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
