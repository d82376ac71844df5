"""Documents out of files, wherever they lie: streamed, in the order of the files, one record in memory at a time.

What cannot be read is reported record by record and never ends a job; what would silently shorten a corpus, such as a
truncated archive, does. Nothing that is raised, and no reason that is reported, quotes a document.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any

from data_pipeline.corpus.compression import decompressed
from data_pipeline.corpus.config import CorpusConfig
from data_pipeline.corpus.crawls import warc_records, wet_records
from data_pipeline.corpus.document import Document, Grouping, OnBad, OnBytes, OnLeftOut, Rejected, ignore
from data_pipeline.corpus.hub import hub_tables
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.corpus.listing import InputFile, first_folder, list_files
from data_pipeline.corpus.records import Records, field_of
from data_pipeline.corpus.stored import opened
from data_pipeline.corpus.tables import arrow_tables, parquet_tables, table_records
from data_pipeline.corpus.texts import json_records, line_records, whole_text
from data_pipeline.remote import shown

UNGROUPED = Grouping()


def read_file(
    file: InputFile,
    input_: InputConfig,
    on_bad: OnBad = ignore,
    on_bytes: OnBytes = ignore,
    on_left_out: OnLeftOut = ignore,
    grouping: Grouping = UNGROUPED,
) -> Iterator[Document]:
    """Stream the documents of one file of `input_`, as `list_files` gave it.

    `on_bad` is told of each record that is no UTF-8, no JSON, or has no text or no group; `on_bytes` of the stored
    bytes read since the last call, which add up to `file.size` where that is known; `on_left_out` of the UTF-8 bytes of
    each document that does not meet `input_.where`. A document's source is `file.label`; its group is a folder, or the
    text or number (as JSON writes it) that a field holds.

    Raises:
        ValueError: an archive or a table is damaged, has not the fields asked for, or changed since it was listed.
        OSError: a store did not answer in spite of retries; to try again later may help.
    """
    source, field = file.label, grouping.by_field
    group = first_folder(file, input_) if grouping.by_folder else None
    if field is not None and file.format in ("text", "lines"):
        raise ValueError(f"input {source} is plain text, which has no field {field!r} to group by: group by folder")
    beside = {*input_.where} if field is None else {*input_.where, field}
    for record in _records(file, input_, source, beside, on_bytes):
        if isinstance(record, Rejected):
            on_bad(record)
        elif not all(condition.holds(field_of(record.fields, name)) for name, condition in input_.where.items()):
            on_left_out(len(record.text.encode()))
        elif field is None:
            yield Document(record.text, source, record.index, group)
        elif isinstance(value := field_of(record.fields, field), str | int | float) and value != "":
            yield Document(record.text, source, record.index, value if isinstance(value, str) else json.dumps(value))
        else:
            on_bad(Rejected(source, record.index + 1, _no_group(field, value), record.text.encode()))


def _no_group(field: str, value: Any) -> str:
    if value is None:
        return f"no field {field!r} to group by"
    what = "empty" if value == "" else f"no text or number but {type(value).__name__}"
    return f"field {field!r}, to group by, is {what}"


def _records(file: InputFile, input_: InputConfig, source: str, beside: Collection[str], on_bytes: OnBytes) -> Records:
    """`beside`: the fields that are needed beside the text."""
    if file.format == "hub":
        yield from table_records(hub_tables(file, input_), source, input_.text_field, beside)
        return
    with opened(file, on_bytes) as stored:
        if file.format in ("parquet", "arrow"):
            columns = {input_.text_field, *beside}
            tables = (parquet_tables if file.format == "parquet" else arrow_tables)(stored, source, columns)
            yield from table_records(tables, source, input_.text_field, beside)
            return
        stream = decompressed(stored, source)
        if file.format == "jsonl":
            yield from json_records(stream, source, input_.text_field)
        elif file.format == "lines":
            yield from line_records(stream, source)
        elif file.format == "warc":
            yield from warc_records(stream, source)
        elif file.format == "wet":
            yield from wet_records(stream, source)
        else:
            assert file.format == "text"
            yield from whole_text(stream, source)


def read_documents(
    corpus: CorpusConfig,
    on_bad: OnBad = ignore,
    on_bytes: OnBytes = ignore,
    on_left_out: OnLeftOut = ignore,
    grouping: Grouping = UNGROUPED,
) -> Iterator[Document]:
    """Stream the documents of all inputs in turn, uncurated; see `read_file`.

    Raises:
        ValueError: as `list_files` and `read_file` do, all paths being looked up first; or no document was found.
        OSError: a store did not answer in spite of retries.
    """
    documents = rejected = skipped = left_out = 0

    def reject(record: Rejected) -> None:
        nonlocal rejected, skipped
        rejected, skipped = rejected + (record.raw is not None), skipped + (record.raw is None)
        on_bad(record)

    def leave_out(text_bytes: int) -> None:
        nonlocal left_out
        left_out += 1
        on_left_out(text_bytes)

    files = [(file, input_) for input_ in corpus.inputs for file in list_files(input_, reject)]
    for file, input_ in files:
        for document in read_file(file, input_, reject, on_bytes, leave_out, grouping):
            documents += 1
            yield document
    if not documents:
        paths = ", ".join(shown(input_.path) for input_ in corpus.inputs)
        fields = ", ".join(sorted({repr(input_.text_field) for input_ in corpus.inputs}))
        conditions = f", {left_out} documents left out by where" if left_out else ""
        raise ValueError(
            f"no document in {paths} ({rejected} broken records, {skipped} files passed over{conditions}): "
            f"check the path and --text-field (now {fields})"
        )
