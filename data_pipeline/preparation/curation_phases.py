"""The phases of a preparation that a corpus needs whose documents are compared, with evaluation sets or each other."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipeline.corpus.document import Rejected
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.corpus.reading import read_file
from data_pipeline.curation.decontamination import collect_ngrams
from data_pipeline.curation.duplicates import DOCUMENT_BYTES, EXACT, NEAR, DuplicateSearch
from data_pipeline.preparation.phase import OnBytes, Phase
from data_pipeline.preparation.plan import total_bytes
from data_pipeline.preparation.read_phase import SKETCHES_NAME, ReadPhase
from data_pipeline.preparation.unit import UnitResult, count_kept, shard_arrays
from data_pipeline.preparation.work_folder import fresh_folder, sync_files
from data_pipeline.shards import ShardWriter

STEP_TOKENS = 4 << 20
RULES = {EXACT: "exact_duplicates", NEAR: "near_duplicates"}
"""What the codes of duplicates are called in counts: as the settings that ask for their removal."""


class ContaminationPhase(Phase):
    """One task: the n-grams of the evaluation sets are gathered, for all units to look into."""

    name: ClassVar[str] = "evaluation-sets"

    def sizes(self) -> list[int | None]:
        return [total_bytes([planned.file for planned in self.job.plan.evaluation_files])]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        decontaminate = self.job.plan.corpus.curation.decontaminate
        assert decontaminate is not None
        sets = {set_.name: self._texts(number, set_, on_bytes) for number, set_ in enumerate(decontaminate.against)}
        ngrams = collect_ngrams(sets, decontaminate.ngram, fresh_folder(self.job.work.contamination_path))
        return {name: asdict(counts) for name, counts in ngrams.counts.items()}

    def _texts(self, number: int, set_: InputConfig, on_bytes: OnBytes) -> Iterator[str]:
        """Every text of an evaluation set: one that is lost would let documents pass that hold it."""

        def refuse(rejected: Rejected) -> None:
            place = f"record {rejected.line} of {rejected.path}" if rejected.line else rejected.path
            raise ValueError(
                f"evaluation set {set_.name}: {place} is no text ({rejected.reason}), and what it holds would not be "
                "found: mend it, name its field (decontaminate.against: {path: PATH, text_field: FIELD}), or leave it "
                "out by path or where"
            )

        for planned in self.job.plan.evaluation_files:
            if planned.input == number:
                for document in read_file(planned.file, set_, refuse, on_bytes):
                    yield document.text


class DuplicatesPhase(Phase):
    """A task is a partition of the search for duplicates, a part of what all sketches say."""

    name: ClassVar[str] = "duplicates"

    @cached_property
    def search(self) -> DuplicateSearch:
        work, plan = self.job.work, self.job.plan
        sketches = [work.unit_path(unit) / SKETCHES_NAME for unit in range(len(plan.units))]
        return DuplicateSearch(plan.corpus.curation, sketches, work.duplicates_path, plan.duplicates_memory_bytes)

    def worker_bytes(self) -> int:
        return min(self.job.plan.duplicates_memory_bytes, DOCUMENT_BYTES * self.search.documents)

    def sizes(self) -> list[int | None]:
        # A partition reads one key of every document, and some signatures.
        return [8 * self.search.documents // partition.parts for partition in self.search.partitions]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        self.search.find(self.search.partitions[task])
        return {}


class SelectPhase(Phase):
    """A task is a unit, whose shards are written again without the documents that are duplicates."""

    name: ClassVar[str] = "select"

    @cached_property
    def _read(self) -> list[UnitResult]:
        return [UnitResult.from_json(result) for result in ReadPhase(self.job).results()]

    @cached_property
    def _search(self) -> DuplicateSearch:
        return DuplicatesPhase(self.job).search

    def sizes(self) -> list[int | None]:
        return [sum(shard.bin_bytes for shard in unit.shards) for unit in self._read]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        unit, codes = self._read[task], self._search.removed(task)
        source = self.job.work.unit_path(task)
        self._count_removed(unit, source, codes)
        folder, shards = source, unit.shards
        if codes.any():
            folder = fresh_folder(self.job.work.selected_path(task))
            with ShardWriter(folder, self.job.dtype, self.job.plan.shard_bytes) as writer:
                for tokens, lengths, origins in self._kept(unit, source, codes == 0, on_bytes):
                    writer.append(tokens, lengths, origins)
            shards = tuple(writer.shards)
            sync_files(folder)
        count_kept(unit.counts, self.job.plan, folder, shards)
        return UnitResult(folder.name, shards, unit.counts).to_json()

    def _count_removed(self, unit: UnitResult, folder: Path, codes: np.ndarray) -> None:
        input_of_file = np.array([planned.input for planned in self.job.plan.files])
        first = 0
        for _, origins in shard_arrays(folder, unit.shards):
            removed = codes[first : first + len(origins)]
            first += len(origins)
            inputs = input_of_file[origins["file"]]
            for code, rule in RULES.items():
                for number in np.unique(inputs[removed == code]).tolist():
                    gone = origins[(removed == code) & (inputs == number)]
                    counts = unit.counts.inputs[self.job.plan.corpus.inputs[number].name]
                    counts.remove(rule, len(gone), int(gone["text_bytes"].sum(dtype=np.int64)))
        assert first == len(codes)

    def _kept(
        self, unit: UnitResult, folder: Path, keep: np.ndarray, on_bytes: OnBytes
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Tokens, lengths and origins of documents that stay, some megabytes at a time."""
        first = 0
        for shard, (lengths, origins) in zip(unit.shards, shard_arrays(folder, unit.shards), strict=True):
            ends = np.cumsum(lengths, dtype=np.int64)
            kept = keep[first : first + len(lengths)]
            first += len(lengths)
            with open(folder / f"{shard.name}.bin", "rb", buffering=0) as file:
                start = 0
                while start < len(lengths):
                    begin = int(ends[start - 1]) if start else 0
                    end = max(start + 1, int(np.searchsorted(ends, begin + STEP_TOKENS, side="right")))
                    tokens = np.fromfile(file, dtype=self.job.dtype, count=int(ends[end - 1]) - begin)
                    chosen = kept[start:end]
                    yield (
                        tokens[np.repeat(chosen, lengths[start:end])],
                        lengths[start:end][chosen],
                        origins[start:end][chosen],
                    )
                    on_bytes(tokens.nbytes)
                    start = end
