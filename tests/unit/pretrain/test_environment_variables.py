"""Variables come and go together, also where what they are for fails."""

import os

import pytest

from pretrain.environment_variables import added_to_environment


def fails_inside(variables: dict[str, str]) -> None:
    with added_to_environment(variables):
        assert {name: os.environ[name] for name in variables} == variables
        raise RuntimeError("inside")


def test_what_was_there_before_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPPE_TEST_SET", "before")
    monkeypatch.delenv("STEPPE_TEST_UNSET", raising=False)
    before, outer = dict(os.environ), {"STEPPE_TEST_SET": "1", "STEPPE_TEST_UNSET": "1"}
    with added_to_environment(outer):
        with pytest.raises(RuntimeError, match="inside"):
            fails_inside({"STEPPE_TEST_SET": "2", "STEPPE_TEST_UNSET": "2"})
        assert {name: os.environ[name] for name in outer} == outer
    assert dict(os.environ) == before
