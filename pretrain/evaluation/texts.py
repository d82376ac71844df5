"""What an evaluation reads: documents with their domains, out of texts wherever they lie and out of token shards.

A domain is an input, or with grouping a part of it: the documents below one of its folders, or with one value of a
field. Domains of several inputs that are grouped are called INPUT/GROUP. No more is held than one document, or the few
that a table is read by; and nothing is left out, since then two evaluations would not be of the same texts.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from data_pipeline.corpus.config import CorpusConfig, load_corpus
from data_pipeline.corpus.document import Document, Grouping, OnBytes, Rejected, ignore
from data_pipeline.corpus.input_config import InputConfig, default_name
from data_pipeline.corpus.listing import HERE, InputFile, list_files
from data_pipeline.corpus.reading import read_documents
from data_pipeline.curation.config import CurationConfig
from data_pipeline.manifest import Manifest
from data_pipeline.remote import shown
from data_pipeline.tokenizer import Tokenizer
from pretrain.evaluation.token_texts import check_tokenizer, manifest_of, read_token_texts

TEXT_FIELD = "text"
MOST_DOMAINS = 1000
"""A field with more values, such as an address, tells documents apart rather than domains."""
WORD_CHARACTERS = 1 << 16
"""Split into words at once, since a list of all words of a book is many times the book."""


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationDocument:
    """One document, and its place over the whole evaluation: all inputs in turn, from 0.

    ids: its tokens `(n,)` without BOS and EOS if it comes out of token shards, whose text is what they decode to.
    """

    index: int
    domain: str
    text: str
    ids: np.ndarray | None = None

    @property
    def text_bytes(self) -> int:
        """Raw UTF-8 bytes of the text."""
        return len(self.text.encode())

    @property
    def words(self) -> int:
        """See `count_words`."""
        return count_words(self.text)


def count_words(text: str) -> int:
    """Runs of characters that are no white space, `len(text.split())`: much as `wc -w` counts."""
    words, inside = 0, False
    for start in range(0, len(text), WORD_CHARACTERS):
        piece = text[start : start + WORD_CHARACTERS]
        words += len(piece.split()) - (inside and not piece[0].isspace())
        inside = not piece[-1].isspace()
    return words


class TextsConfig(BaseModel):
    """Which documents, and what their domains are: plain values, which `model_dump(mode="json")` makes JSON of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inputs: tuple[InputConfig, ...]
    """Each has a name that no other has."""
    by_folder: bool = False
    by_field: str | None = None

    @property
    def grouping(self) -> Grouping:
        return Grouping(self.by_folder, self.by_field)


@dataclass(frozen=True)
class Survey:
    """How much there is to score: raw UTF-8 bytes and documents over all, and the bytes of each domain, in the order
    in which they are read."""

    bytes: int
    documents: int
    domains: Mapping[str, int]


def texts_config(
    data: Sequence[str] = (),
    corpus: Path | None = None,
    text_field: str = TEXT_FIELD,
    by_folder: bool = False,
    by_field: str | None = None,
) -> TextsConfig:
    """What `steppe eval` was asked to read: `--data PATH` or `--data NAME=PATH`, each an input, or `--corpus YAML`.

    Raises:
        ValueError: nothing is named, or a name twice, or what excludes each other; the YAML is wrong or curates.
    """
    if by_folder and by_field is not None:
        raise ValueError(f"--by-folder and --by-field {by_field} exclude each other: take one of them")
    if corpus is None:
        return TextsConfig(inputs=_inputs(data, text_field), by_folder=by_folder, by_field=by_field)
    if data:
        raise ValueError(f"--data {data[0]} and --corpus {corpus} exclude each other: name all texts in one of them")
    if text_field != TEXT_FIELD:
        raise ValueError(f"--text-field {text_field} is for --data: set text_field of the inputs in {corpus} instead")
    loaded = load_corpus(corpus)
    if loaded.curation != CurationConfig():
        raise ValueError(
            f"{corpus} curates, but a measurement leaves nothing out: take its curation out, or evaluate what "
            "`steppe data prepare` made of it"
        )
    return TextsConfig(inputs=loaded.inputs, by_folder=by_folder, by_field=by_field)


def _inputs(data: Sequence[str], text_field: str) -> tuple[InputConfig, ...]:
    """`NAME=PATH`, or a path that is called by its stem."""
    inputs: dict[str, InputConfig] = {}
    for argument in data:
        name, equals, path = argument.partition("=")
        # A name has no slash: INPUT/GROUP is how domains are called, and lang=en/* is a pattern.
        if not equals or "/" in name or Path(argument).exists():
            name, path = default_name(argument), argument
        if not name or not path:
            raise ValueError(f"--data {argument}: expected PATH or NAME=PATH")
        if name in inputs:
            raise ValueError(
                f"--data {shown(argument)}: the domain {name} is {shown(inputs[name].path)} already; tell them apart "
                "by NAME=PATH"
            )
        inputs[name] = InputConfig(path=path, name=name, text_field=text_field)
    if not inputs:
        raise ValueError("there is nothing to evaluate: name texts with --data PATH or --corpus YAML")
    return tuple(inputs.values())


def read_texts(config: TextsConfig, tokenizer: Tokenizer | None = None) -> Iterator[EvaluationDocument]:
    """Stream all documents, input by input in the order of their files.

    tokenizer: the model's, which that of token shards must be; that it is has been checked when this returns.

    Raises:
        ValueError: a path or field is missing, a record or an archive is broken, an input has no document, grouping
            gives too many domains, or token shards are of another tokenizer.
        OSError: a store did not answer in spite of retries.
    """
    shards = _token_shards(config)
    if tokenizer is not None:
        for input_ in config.inputs:
            if input_.name in shards:
                check_tokenizer(input_.path, shards[input_.name], tokenizer)
    return _read(config, shards, tokenizer)


def _read(
    config: TextsConfig, shards: Mapping[str, Manifest], tokenizer: Tokenizer | None
) -> Iterator[EvaluationDocument]:
    domains: set[str] = set()
    index = 0
    for input_ in config.inputs:
        for domain, text, ids in _read_input(config, input_, shards.get(input_.name), tokenizer):
            domains.add(domain)
            _check_number(len(domains), config)
            yield EvaluationDocument(index, domain, text, ids)
            index += 1


def _read_input(
    config: TextsConfig, input_: InputConfig, manifest: Manifest | None, tokenizer: Tokenizer | None
) -> Iterator[tuple[str, str, np.ndarray | None]]:
    """(domain, text, ids) of each document."""
    if manifest is None:
        for document in _documents(config, input_):
            yield _domain(config, input_, document.group), document.text, None
    else:
        domain = _domain(config, input_, HERE)
        for text, ids in read_token_texts(input_.path, manifest, tokenizer):
            yield domain, text, ids


def _documents(config: TextsConfig, input_: InputConfig, on_bytes: OnBytes = ignore) -> Iterator[Document]:
    """The documents of an input of text. Raises ValueError at the first broken record."""

    def refuse(record: Rejected) -> None:
        if record.raw is not None:
            where = f"{record.path}:{record.line}" if record.line else record.path
            other = ", or name another field (--text-field, --by-field)" if record.reason.startswith("no field") else ""
            raise ValueError(f"{where}: {record.reason}; repair or remove it{other}: a measurement leaves nothing out")

    return read_documents(CorpusConfig(inputs=(input_,)), refuse, on_bytes, grouping=config.grouping)


def _domain(config: TextsConfig, input_: InputConfig, group: str | None) -> str:
    if group is None or not (config.by_folder or config.by_field):
        return input_.name
    if len(config.inputs) == 1:
        return group
    return input_.name if group == HERE else f"{input_.name}/{group}"


def _check_number(domains: int, config: TextsConfig) -> None:
    if domains > MOST_DOMAINS:
        by = "--by-folder" if config.by_folder else f"--by-field {config.by_field}"
        raise ValueError(f"{by} gives more than {MOST_DOMAINS:,} domains: group by something of fewer values")


def _token_shards(config: TextsConfig) -> dict[str, Manifest]:
    """The manifests of the inputs that are data folders, by the inputs' names."""
    found = {input_.name: (input_.path, manifest_of(input_)) for input_ in config.inputs}
    shards = {name: manifest for name, (_, manifest) in found.items() if manifest is not None}
    if config.by_field is not None and shards:
        path, _ = found[next(iter(shards))]
        raise ValueError(
            f"{shown(path)} holds token shards, which have no field {config.by_field!r} to group by: name the text "
            "that they were made from"
        )
    return shards


def survey(config: TextsConfig, on_bytes: OnBytes = ignore) -> Survey | None:
    """Read all texts once, which is quick beside scoring them, so that what is broken or empty shows before the model
    runs and the time left is known. Of token shards the manifest says it. None where texts are not local: they would be
    fetched twice.

    on_bytes: is told of stored bytes as they are read, as many in all as `survey_bytes` says.

    Raises:
        ValueError: as `read_texts`, or a domain has no text.
    """
    shards = _token_shards(config)
    if not all(file.is_local for _, file in _text_files(config, shards)):
        return None
    text_bytes: Counter[str] = Counter()
    documents = 0
    for input_ in config.inputs:
        manifest = shards.get(input_.name)
        if manifest is not None:
            text_bytes[_domain(config, input_, HERE)] += manifest.text_bytes
            documents += manifest.documents
            continue
        for document in _documents(config, input_, on_bytes):
            text_bytes[_domain(config, input_, document.group)] += len(document.text.encode())
            _check_number(len(text_bytes), config)
            documents += 1
    for domain, count in text_bytes.items():
        if not count:
            raise ValueError(f"the documents of {domain} hold no text: there is nothing to measure")
    return Survey(text_bytes.total(), documents, dict(text_bytes))


def survey_bytes(config: TextsConfig) -> int:
    """Stored bytes of the texts, as far as their stores say; without token shards, which a survey need not read.

    Raises:
        ValueError: a path does not exist or matches no file.
        OSError: a store did not answer in spite of retries.
    """
    return sum(file.size or 0 for _, file in _text_files(config, _token_shards(config)))


def identities(config: TextsConfig) -> list[dict[str, Any]]:
    """What tells whether two evaluations read the same: input, path, size and tag of each file, as JSON values, and of
    a data folder those of the folder, where the tag covers every byte.

    Raises:
        ValueError: a path does not exist or matches no file.
        OSError: a store did not answer in spite of retries.
    """
    shards = _token_shards(config)
    rows = [(input_.name, file.label, file.size, file.tag) for input_, file in _text_files(config, shards)]
    for input_ in config.inputs:
        if manifest := shards.get(input_.name):
            size = sum(shard.bin_bytes for shard in manifest.shards)
            rows.append((input_.name, shown(input_.path), size, manifest.fingerprint))
    return [dict(zip(("input", "path", "size", "tag"), row, strict=True)) for row in rows]


def _text_files(config: TextsConfig, shards: Mapping[str, Manifest]) -> Iterator[tuple[InputConfig, InputFile]]:
    for input_ in config.inputs:
        if input_.name not in shards:
            for file in list_files(input_):
                yield input_, file
