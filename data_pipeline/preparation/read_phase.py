"""The phase that does most of the work: files are read, their documents judged, tokenized and written, unit by unit."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.reading import read_file
from data_pipeline.curation.curator import Curator
from data_pipeline.curation.decontamination import EvaluationNgrams
from data_pipeline.curation.sketch import Sketcher
from data_pipeline.curation.sketch_file import SketchWriter
from data_pipeline.manifest import QUARANTINE_NAME
from data_pipeline.preparation.counts import Counts, InputCounts
from data_pipeline.preparation.encoding import ChosenText, Encoder, require_storable, utf8_bytes
from data_pipeline.preparation.phase import Job, OnBytes, Phase
from data_pipeline.preparation.plan import PlannedFile
from data_pipeline.preparation.quarantine import Quarantine
from data_pipeline.preparation.unit import UnitResult, count_kept
from data_pipeline.preparation.work_folder import fresh_folder, sync_files
from data_pipeline.shards import ShardWriter

SKETCHES_NAME = "sketches"
LEFT_OUT_RULE = "where"
"""Removes what does not meet the conditions that the input puts on its records."""


class ReadPhase(Phase):
    """A task is a unit of the plan."""

    name: ClassVar[str] = "read"

    def sizes(self) -> list[int | None]:
        return [self.job.plan.unit_bytes(unit) for unit in range(len(self.job.plan.units))]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        folder = fresh_folder(self.job.work.unit_path(task))
        with (
            _Reader(self.job, folder, on_bytes) as reader,
            ShardWriter(folder, self.job.dtype, self.job.plan.shard_bytes) as writer,
        ):
            for chunk in Encoder(self.job.tokenizer, threads).encode(reader.documents(task)):
                writer.append(chunk.tokens, chunk.lengths, chunk.origins)
        shards, counts = tuple(writer.shards), reader.counts
        if not self.job.plan.corpus.curation.finds_duplicates:
            count_kept(counts, self.job.plan, folder, shards)
        sync_files(folder)
        return UnitResult(folder.name, shards, counts).to_json()


class _Reader:
    """Reads a unit's files, and counts and sets aside what does not come through."""

    def __init__(self, job: Job, folder: Path, on_bytes: OnBytes) -> None:
        self.counts = Counts()
        self._plan = job.plan
        self._on_bytes = on_bytes
        self._quarantine = Quarantine(folder / QUARANTINE_NAME)
        curation = job.plan.corpus.curation
        ngrams = EvaluationNgrams(job.work.contamination_path) if curation.decontaminate else None
        self._curator = Curator(curation, ngrams)
        self._sketcher = Sketcher.of(curation)
        self._sketches: SketchWriter | None = None
        if curation.finds_duplicates:
            path = folder / SKETCHES_NAME
            self._sketches = SketchWriter(path, self._sketcher.permutations, self._sketcher.bands)
        self._open = ExitStack()

    def __enter__(self) -> "_Reader":
        self._open.enter_context(self._quarantine)
        if self._sketches is not None:
            self._open.enter_context(self._sketches)
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def documents(self, unit: int) -> Iterator[ChosenText]:
        """The documents of the unit that are chosen, in order."""
        for number, planned in self._plan.unit_files(unit):
            yield from self._file_documents(number, planned)

    def _file_documents(self, number: int, planned: PlannedFile) -> Iterator[ChosenText]:
        input_ = self._plan.input_of(planned)
        counts = self.counts.inputs[input_.name]

        def reject(rejected: Rejected) -> None:
            counts.quarantined += rejected.raw is not None
            counts.skipped_files += rejected.raw is None
            self._quarantine.add(rejected)

        def leave_out(text_bytes: int) -> None:
            counts.read.add(1, text_bytes)
            counts.remove(LEFT_OUT_RULE, 1, text_bytes)

        for document in read_file(planned.file, input_, reject, self._on_bytes, leave_out):
            text_bytes = utf8_bytes(document.text)
            require_storable(text_bytes, document.source, document.index)
            text = self._judged(document.text, text_bytes, counts)
            if text is not None:
                yield ChosenText(text, number, document.index)

    def _judged(self, text: str, text_bytes: int, counts: InputCounts) -> str | None:
        """What of a document goes on, None if nothing does."""
        counts.read.add(1, text_bytes)
        verdict = self._curator.judge(text)
        if verdict.rule is not None:
            counts.remove(verdict.rule, 1, text_bytes)
            return None
        if verdict.text is not text:
            counts.trimmed_bytes += text_bytes - utf8_bytes(verdict.text)
        if self._sketches is not None:
            self._sketches.append(self._sketcher.sketch(verdict.text))
        return verdict.text
