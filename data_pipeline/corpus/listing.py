"""The files of an input, in order: the same on every machine that sees the same store."""

import re
from dataclasses import dataclass
from typing import Any

import fsspec

from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.corpus.document import OnBad, Rejected, ignore
from data_pipeline.corpus.formats import Format, format_of, looks_like_file
from data_pipeline.corpus.hub import hub_shards
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.manifest import MANIFEST_NAME
from data_pipeline.remote import identity, identity_in, is_http, is_local, open_path, shown
from data_pipeline.retries import retried

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PATTERN_CHARACTERS = re.compile(r"[*?\[]")
SAVED_DATASET_FILES = ("dataset_info.json", "state.json")
"""Beside the arrow files of a dataset that `datasets` saved; they hold no text."""
SAVED_SPLITS_FILE = "dataset_dict.json"
HERE = "."


@dataclass(frozen=True, slots=True)
class InputFile:
    """One file of an input, or one shard of a hub dataset: what `read_file` reads and lists of work are made of."""

    path: str
    """A local path, a URL with its signature, or the name of a hub dataset."""
    format: Format
    size: int | None
    """Stored bytes; None where a hub dataset or a server does not say."""
    tag: str | None
    """What changes when the content does: an ETag or a time; the commit of a hub dataset."""
    shard: int = 0
    shards: int = 1

    @property
    def label(self) -> str:
        """What it is called where people read it: without the signature of a URL, with the shard of a hub dataset."""
        return f"{self.path} (shard {self.shard + 1} of {self.shards})" if self.format == "hub" else shown(self.path)

    @property
    def is_local(self) -> bool:
        return self.format != "hub" and is_local(self.path)


def list_files(input_: InputConfig, on_bad: OnBad = ignore) -> list[InputFile]:
    """The files that an input names, sorted by path; a folder, bucket prefix or pattern costs one listing.

    In a folder, hidden files are passed over; `on_bad` is told of each.

    Raises:
        ValueError: there is no such path, no file that matches, or no such hub dataset.
        OSError: the store did not answer.
    """
    if input_.format == "hub":
        return _hub_files(input_)
    fs, root = open_path(input_.path)
    path = shown(input_.path)
    if is_http(fs):
        if root.endswith("/"):
            raise ValueError(f"input {path} is a folder of a web server, which cannot be listed: name its files")
        is_ = identity(fs, root)
        return [InputFile(input_.path, _format(path, input_), is_.size, is_.tag)]
    found = retried(f"listing {path}", lambda: _find(fs, root))
    if not found:
        if input_.format == "auto" and _may_be_hub_name(input_.path, fs):
            return _hub_files(input_)
        if PATTERN_CHARACTERS.search(root):
            raise ValueError(f"input {path} matches no file: check the pattern (`/**` reaches into folders)")
        if not retried(f"looking for {path}", lambda: fs.exists(root)):
            raise ValueError(f"input {path} does not exist: check the path")
    files = []
    for file in sorted(found):
        name = file if is_local(input_.path) else fs.unstrip_protocol(file)
        if any(part.startswith(".") for part in _inner(file, root).split("/")):
            on_bad(Rejected(name, 0, "hidden file", None))
        elif input_.format == "auto" and _describes_shards(file, found):
            raise ValueError(
                f"input {path} holds token shards, which are no text: name the text that they were made from, or for "
                f"an evaluation {shown(name).rpartition('/')[0]} itself"
            )
        elif input_.format != "auto" or not _describes_saved_dataset(file, found):
            is_ = identity_in(found[file])
            files.append(InputFile(name, _format(file, input_), is_.size, is_.tag))
    return files


def first_folder(file: InputFile, input_: InputConfig) -> str:
    """The folder below the input's path that a file of it lies in, the first of several; `.` if in none."""
    if file.format == "hub":
        return HERE
    (_, root), (_, path) = open_path(input_.path), open_path(file.path)
    folder, slash, _ = _inner(path, root).lstrip("/").partition("/")
    return folder if slash else HERE


def _format(file: str, input_: InputConfig) -> Format:
    return format_of(file) if input_.format == "auto" else input_.format


def corpus_bytes(corpus: CorpusConfig) -> int | None:
    """Bytes of the files that `read_documents` will read; None where a hub dataset or a server does not say."""
    sizes = [file.size for input_ in corpus.inputs for file in list_files(input_)]
    known = [size for size in sizes if size is not None]
    return sum(known) if len(known) == len(sizes) else None


def _find(fs: fsspec.AbstractFileSystem, root: str) -> dict[str, dict[str, Any]]:
    """Path -> what the store says of it: of one file, of all in a folder, of all that match."""
    fs.invalidate_cache()
    found = fs.find(root, detail=True)
    if not found and PATTERN_CHARACTERS.search(root):
        found = fs.glob(root, detail=True)
    # Object stores keep empty objects in the place of folders.
    return {path: info for path, info in found.items() if info["type"] != "directory" and not path.endswith("/")}


def _inner(path: str, root: str) -> str:
    """The part of a path that the user did not write himself."""
    pattern = PATTERN_CHARACTERS.search(root)
    written = root[: pattern.start()].rpartition("/")[0] if pattern and not path.startswith(root) else root
    return path[len(written) :]


def _may_be_hub_name(path: str, fs: fsspec.AbstractFileSystem) -> bool:
    # Beside a folder of the owner's name, a path with a typing error is likelier.
    return HUB_NAME.fullmatch(path) is not None and not looks_like_file(path) and not fs.exists(path.partition("/")[0])


def _hub_files(input_: InputConfig) -> list[InputFile]:
    commit, shards = hub_shards(input_)
    return [InputFile(input_.path, "hub", None, commit, shard, shards) for shard in range(shards)]


def _describes_saved_dataset(path: str, found: dict[str, dict[str, Any]]) -> bool:
    """Raises ValueError for a saved dataset of several splits: none of them is meant by chance."""
    folder, _, name = path.rpartition("/")
    if name == SAVED_SPLITS_FILE:
        splits = sorted({split for split in (p[len(folder) + 1 :].partition("/")[0] for p in found) if split != name})
        raise ValueError(f"input {folder} holds a dataset's splits: choose one, such as {folder}/{splits[0]}")
    return name in SAVED_DATASET_FILES and all(f"{folder}/{other}" in found for other in SAVED_DATASET_FILES)


def _describes_shards(path: str, found: dict[str, dict[str, Any]]) -> bool:
    folder, _, name = path.rpartition("/")
    return name == MANIFEST_NAME and any(p.startswith(f"{folder}/") and p.endswith(".idx") for p in found)
