"""A small tokenizer and data folders to work on, made once from text that every Python brings."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.manifest import Manifest
from data_pipeline.shards import ShardWriter
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_training import train_tokenizer

STDLIB = Path(json.__file__).parent.parent
EXTRA_TEXTS = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "天地玄黄,宇宙洪荒。日月盈昃,辰宿列张。" * 5,
    "if x:\n\tif y:\n\t\treturn 12345\r\n",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Some forty documents, 500 kB."""
    names = ["json/*.py", "email/*.py", "textwrap.py", "glob.py"]
    return [path.read_text(encoding="utf-8") for name in names for path in sorted(STDLIB.glob(name))] + EXTRA_TEXTS


@pytest.fixture(scope="session")
def tokenizer_path(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_tokenizer(texts, 1000, path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path: Path) -> Tokenizer:
    return Tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def corpus(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


WriteFolder = Callable[..., Path]


@pytest.fixture
def write_folder(tmp_path: Path, tokenizer_path: Path, tokenizer: Tokenizer) -> WriteFolder:
    """Writes a data folder of given documents, token by token, as `prepare` would."""

    def write(name: str, documents: list[list[int]], shard_bytes: int = 1 << 20, vocab_size: int = 1000) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lengths = np.array([len(document) for document in documents])
        with ShardWriter(folder, np.dtype("<u2"), shard_bytes) as writer:
            writer.append(np.array([token for document in documents for token in document], dtype="<u2"), lengths)
        (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
        Manifest(
            vocab_size=vocab_size,
            bos_id=1,
            eos_id=2,
            tokenizer_fingerprint=tokenizer.fingerprint,
            dtype="uint16",
            documents=len(documents),
            tokens=int(lengths.sum()),
            text_bytes=1,
            quarantined=0,
            skipped_files=0,
            shards=tuple(writer.shards),
        ).save(folder)
        return folder

    return write
