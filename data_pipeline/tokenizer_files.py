"""A tokenizer as files: a sentencepiece `tokenizer.model`, or a Hugging Face `tokenizer.json`.

The second does not say which of its tokens are BOS and EOS; `tokenizer_config.json` beside it does. Both are copied
together, and the fingerprint covers both.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import xxhash

from data_pipeline.remote import is_local, open_path, read_whole, shown
from data_pipeline.retries import MissingFileError

SENTENCEPIECE_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
JSON_CONFIG_NAME = "tokenizer_config.json"
JSON_SPECIAL_NAME = "special_tokens_map.json"
"""Where older folders of Hugging Face name BOS and EOS."""
TOKENIZER_NAMES = (SENTENCEPIECE_NAME, JSON_NAME)
"""What a folder's tokenizer may be called, the first one that is there."""


@dataclass(frozen=True)
class TokenizerFiles:
    """All that the ids of a text depend on."""

    path: str
    """Where it was read, as errors name it."""
    name: str
    """As it is called in a data folder, a run and a checkpoint: one of `TOKENIZER_NAMES`."""
    content: bytes
    bos_token: str | None = None
    """Of a `tokenizer.json`, whose own content does not name it; None if it has none."""
    eos_token: str | None = None

    @classmethod
    def read(cls, path: str | Path) -> "TokenizerFiles":
        """Read a tokenizer's file, here or in an object store; `.json` is Hugging Face's, all else sentencepiece's.

        Raises:
            ValueError: it does not exist, or what lies beside a `tokenizer.json` is damaged.
            OSError: it cannot be read now.
        """
        path = str(path)
        content = _content(path)
        if content is None:
            raise ValueError(
                f"tokenizer {shown(path)} does not exist: make one with `steppe data train-tokenizer`, or name a "
                "sentencepiece model or a tokenizer.json"
            )
        if not path.endswith(".json"):
            return cls(shown(path), SENTENCEPIECE_NAME, content)
        special: dict[str, str | None] = {}
        for name in (JSON_SPECIAL_NAME, JSON_CONFIG_NAME):  # the latter is the one that counts
            beside = "".join([*path.rpartition("/")[:2], name])
            said = _content(beside)
            special |= {} if said is None else _special_of(shown(beside), said)
        return cls(shown(path), JSON_NAME, content, special.get("bos_token"), special.get("eos_token"))

    @property
    def fingerprint(self) -> str:
        """xxh3-64 of the files as `write` makes them, in hexadecimal."""
        return xxhash.xxh3_64_hexdigest(b"".join(self.contents.values()))

    def write(self, folder: Path) -> Path:
        """Copy it into a folder, durably, in place of the tokenizer there; returns where.

        Raises:
            OSError: the disk is full or the like.
        """
        from data_pipeline.shards import write_atomically  # and numpy, which `steppe --help` need not wait for

        contents = self.contents
        for name in reversed(contents):
            write_atomically(folder / name, contents[name])
        for other in {*TOKENIZER_NAMES, JSON_CONFIG_NAME} - contents.keys():
            if (folder / other).exists():
                (folder / other).unlink()
        return folder / self.name

    @property
    def contents(self) -> dict[str, bytes]:
        """The files of a copy, by name."""
        if self.name == SENTENCEPIECE_NAME:
            return {self.name: self.content}
        special = {"bos_token": self.bos_token, "eos_token": self.eos_token}
        return {self.name: self.content, JSON_CONFIG_NAME: (json.dumps(special) + "\n").encode()}


def tokenizer_in(folder: Path) -> Path:
    """The tokenizer's file in a folder of this machine; where there is none, what its usual name would be."""
    return next((folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()), folder / SENTENCEPIECE_NAME)


def fingerprint_of(path: str | Path) -> str | None:
    """The fingerprint of a tokenizer; None if it is missing or, as far as that shows, damaged."""
    try:
        return TokenizerFiles.read(path).fingerprint
    except ValueError:
        return None


def _content(path: str) -> bytes | None:
    """All of a file; None if there is none."""
    try:
        if is_local(path) and "://" not in path:
            return Path(path).read_bytes()
        return read_whole(*open_path(path))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, MissingFileError):
        return None


def _special_of(path: str, content: bytes) -> dict[str, str | None]:
    """BOS and EOS, where the file says something of them: a token is named by its text, or described with its text as
    `content`."""
    try:
        said = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    if not isinstance(said, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object): fetch it again")
    special = {}
    for role in ("bos_token", "eos_token"):
        if role in said:
            token = said[role]["content"] if isinstance(said[role], dict) and "content" in said[role] else said[role]
            if not isinstance(token, str | None):
                raise ValueError(f"{path} is damaged (its {role} is no text but {token!r}): fetch it again")
            special[role] = token
    return special
