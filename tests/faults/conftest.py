"""The run that nothing befalls, which those that something does are held against."""

from pathlib import Path

import pytest

from tests.conftest import Corpus, Steppe


@pytest.fixture(scope="session")
def undisturbed(steppe: Steppe, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on 2 ranks in bf16, ZeRO 1, saved after 4, 8 and 12."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    steppe("train", "58m", "--nproc", 2, "--run-dir", run, *corpus.settings())
    return run
