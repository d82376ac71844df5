import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.corpus.config import InputConfig
from data_pipeline.corpus.listing import list_files
from data_pipeline.corpus.reading import read_file
from tests.unit.data_pipeline.corpus.hub_server import COMMIT, DATASET, HubServer, hub_server

SHARDS = 3
ROWS = [[{"text": f"{shard}-{row}", "lang": "de" if row == 1 else "en"} for row in range(4)] for shard in range(SHARDS)]
# The libraries read where the hub is when they are imported, so that each reader is a process of its own.
READER = """
import json, sys
from data_pipeline import retries
from data_pipeline.corpus.config import InputConfig
from data_pipeline.corpus.listing import list_files
from data_pipeline.corpus.reading import read_file
retries.FIRST_WAIT_SECONDS = 0.001
try:
    input_ = InputConfig.model_validate(json.loads(sys.argv[1]))
    files = list_files(input_)
    texts = [[document.text for document in read_file(file, input_)] for file in files]
    print(json.dumps({"tags": [file.tag for file in files], "texts": texts}))
except (ValueError, OSError) as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
"""


@pytest.fixture
def files() -> dict[str, bytes]:
    contents = {}
    for shard, rows in enumerate(ROWS):
        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
        contents[f"data/train-{shard:05}-of-{SHARDS:05}.parquet"] = bytes(sink.getvalue())
    return contents


@pytest.fixture
def server(files: dict[str, bytes]) -> Iterator[HubServer]:
    with hub_server(files) as server:
        yield server


def read_from(endpoint: str, home: Path, **words: Any) -> dict[str, Any]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-P", "-c", READER, json.dumps(words)]
    done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_a_dataset_of_the_hub_is_read_shard_by_shard_at_one_commit(server: HubServer, tmp_path: Path) -> None:
    server.busy[f"/api/datasets/{DATASET}"] = 2
    server.busy[f"/datasets/{DATASET}/resolve/{COMMIT}/data/train-00001-of-00003.parquet"] = 1
    answer = read_from(server.url, tmp_path, path=DATASET, where={"lang": "en"})
    assert answer == {"tags": [COMMIT] * SHARDS, "texts": [[f"{s}-{row}" for row in (0, 2, 3)] for s in range(SHARDS)]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"path": "owner/none"}, "ValueError: input owner/none is neither a path nor a Hugging Face dataset"),
        ({"path": DATASET, "split": "test"}, "a Hugging Face dataset with a split 'test'"),
        ({"path": DATASET, "subset": "none"}, "ValueError: input owner/name is neither"),
        ({"path": DATASET, "text_field": "body"}, "has no column 'body': name one of text, lang"),
    ],
)
def test_what_the_hub_does_not_have(server: HubServer, tmp_path: Path, words: dict[str, str], error: str) -> None:
    assert error in read_from(server.url, tmp_path, **words)["error"]


@pytest.mark.slow
def test_a_hub_that_does_not_answer(server: HubServer, tmp_path: Path) -> None:
    server.busy[f"/api/datasets/{DATASET}"] = 1000
    error = read_from(server.url, tmp_path, path=DATASET)["error"]
    assert error.startswith("RemoteError: asking the hub for owner/name failed 8 times")
    error = read_from("http://127.0.0.1:9", tmp_path, path=DATASET)["error"]
    assert error.startswith("RemoteError: input owner/name is no path here, and the Hugging Face hub does not answer")


@pytest.mark.slow
def test_a_table_that_cannot_be_read_is_not_quoted(server: HubServer, tmp_path: Path) -> None:
    for name in list(server.files):
        del server.files[name]
    server.files["data/train.jsonl"] = b'{"text": "Erika"}\n{"text": Mustermann}\n'
    error = read_from(server.url, tmp_path, path=DATASET)["error"]
    assert error.startswith("ValueError: input owner/name (shard 1 of 1) cannot be read: ")
    assert "Mustermann" not in error


@pytest.mark.slow
def test_a_copy_of_a_repository(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    input_ = InputConfig(path=str(tmp_path), format="hub")
    listed = list_files(input_)
    assert [(file.shard, file.shards, file.tag, file.is_local) for file in listed] == [
        (shard, SHARDS, None, False) for shard in range(SHARDS)
    ]
    assert listed[1].label == f"{tmp_path} (shard 2 of 3)"
    for file, rows in zip(listed, ROWS, strict=True):
        documents = list(read_file(file, input_))
        assert [(document.index, document.text) for document in documents] == [
            (place, row["text"]) for place, row in enumerate(rows)
        ]
    (tmp_path / "data" / "train-00002-of-00003.parquet").unlink()
    with pytest.raises(ValueError, match="has 2 shards, but had 3 when it was listed"):
        next(read_file(listed[0], input_))
