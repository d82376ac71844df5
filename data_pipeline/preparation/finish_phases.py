"""The last phases of a preparation: shards get their final names, and the folder its manifest."""

import contextlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, ClassVar

import xxhash

from data_pipeline.config import DEFAULT_BLOCK_BYTES
from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.manifest import QUARANTINE_NAME, Manifest
from data_pipeline.origins import ORIGINS_NAME, OriginFile, serialized_origins
from data_pipeline.pack_files import (
    PackedShard,
    block_tokens_of,
    finish_packing,
    pack_shard,
    with_pack,
)
from data_pipeline.preparation.counts import Counts, InputCounts
from data_pipeline.preparation.curation_phases import ContaminationPhase, SelectPhase
from data_pipeline.preparation.made_of import REPORT_NAME, made_of
from data_pipeline.preparation.phase import Job, OnBytes, Phase
from data_pipeline.preparation.quarantine import join_quarantines
from data_pipeline.preparation.read_phase import ReadPhase
from data_pipeline.preparation.unit import UnitResult
from data_pipeline.remote import shown
from data_pipeline.shards import ShardInfo, fault_of, sync_folder, write_atomically


class PlacePhase(Phase):
    """One task: the shards of all units go into the data folder, numbered in the order of the units."""

    name: ClassVar[str] = "place"

    @cached_property
    def units(self) -> list[UnitResult]:
        """All units as the phase before has left them."""
        last = SelectPhase if self.job.plan.corpus.curation.finds_duplicates else ReadPhase
        return [UnitResult.from_json(result) for result in last(self.job).results()]

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """All shards, by their final names."""
        shards = (shard for unit in self.units for shard in unit.shards)
        return tuple(replace(shard, name=f"shard_{number:05d}") for number, shard in enumerate(shards))

    @property
    def counts(self) -> Counts:
        """Of all units."""
        total = Counts()
        for input_, hidden in zip(self.job.plan.corpus.inputs, self.job.plan.hidden_files, strict=True):
            total.inputs[input_.name].skipped_files += hidden
        for unit in self.units:
            total.merge(unit.counts)
        for counts in total.inputs.values():
            counts.check()
        return total

    def sizes(self) -> list[int | None]:
        return [0]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        counts = self.counts.total
        if not counts.kept.documents:
            raise NothingLeftError(_nothing_left(self.job.plan.corpus.inputs, counts))
        old_names = ((unit.folder, shard) for unit in self.units for shard in unit.shards)
        for (folder, old), new in zip(old_names, self.shards, strict=True):
            source = self.job.work.path / "units" / folder
            for old_file, new_file in zip(old.file_sizes(), new.file_sizes(), strict=True):
                # An attempt that died may have moved some already.
                with contextlib.suppress(FileNotFoundError):
                    os.replace(source / old_file, self.job.out / new_file)
            self._require(new)
        sync_folder(self.job.out)
        plan = self.job.plan
        quarantines = [self.job.work.unit_path(unit) / QUARANTINE_NAME for unit in range(len(plan.units))]
        join_quarantines(quarantines, self.job.out / QUARANTINE_NAME)
        write_atomically(self.job.out / ORIGINS_NAME, _origins(self.job))
        self.job.tokenizer.files.write(self.job.out)
        return {}

    def _require(self, shard: ShardInfo) -> None:
        if fault := fault_of(self.job.out, shard):
            raise ValueError(
                f"{fault}, though it was written: a file system lost it, or somebody removed it; remove "
                f"{self.job.work.path} and start again"
            )


class PackPhase(Phase):
    """A task is a shard and a sequence length for which its documents are packed into bins."""

    name: ClassVar[str] = "pack"

    @cached_property
    def manifest(self) -> Manifest:
        """Of the folder as it is without the bins that are asked for."""
        return Manifest.load(self.job.out) if self.job.is_written else written_manifest(self.job)

    @cached_property
    def lengths(self) -> list[int]:
        """Sequence lengths for which there are no bins yet."""
        return missing_packs(self.manifest, self.job.plan.packs)

    def sizes(self) -> list[int | None]:
        return [shard.bin_bytes for _ in self.lengths for shard in self.manifest.shards]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        length, number = divmod(task, len(self.manifest.shards))
        shard, sequence_length = self.manifest.shards[number], self.lengths[length]
        return asdict(pack_shard(self.job.out, shard, sequence_length, self._block_tokens(sequence_length)))

    def packed_manifest(self) -> Manifest:
        """The manifest with all bins. Every task must be done."""
        manifest, shards = self.manifest, self.manifest.shards
        results = [PackedShard(**result) for result in self.results()]
        for number, sequence_length in enumerate(self.lengths):
            of_length = results[number * len(shards) : (number + 1) * len(shards)]
            block_tokens = self._block_tokens(sequence_length)
            info = finish_packing(self.job.out, shards, of_length, sequence_length, block_tokens)
            manifest = with_pack(manifest, info)
        return manifest

    def _block_tokens(self, sequence_length: int) -> int:
        return block_tokens_of(self.manifest.numpy_dtype, sequence_length, DEFAULT_BLOCK_BYTES)


class FinishPhase(Phase):
    """One task: the report and, last of all, the manifest."""

    name: ClassVar[str] = "finish"

    def sizes(self) -> list[int | None]:
        return [0]

    def do(self, task: int, threads: int, on_bytes: OnBytes) -> dict[str, Any]:
        if not self.job.is_written:
            (sets,) = ContaminationPhase(self.job).results() if self.job.plan.evaluation_files else ({},)
            counts = PlacePhase(self.job).counts.to_json()
            report = {"plan": made_of(self.job.plan), "inputs": counts, "evaluation_sets": sets}
            write_atomically(self.job.out / REPORT_NAME, (json.dumps(report, indent=1) + "\n").encode())
        PackPhase(self.job).packed_manifest().save(self.job.out)
        return {}


def missing_packs(manifest: Manifest, sequence_lengths: Sequence[int]) -> list[int]:
    """Those of the lengths for which a data folder has no bins."""
    known = {pack.sequence_length for pack in manifest.packs}
    return [length for length in sequence_lengths if length not in known]


def written_manifest(job: Job) -> Manifest:
    """What the shards of a job make, once they are in their places."""
    placed, tokenizer = PlacePhase(job), job.tokenizer
    shards, total = placed.shards, placed.counts.total
    assert tokenizer.eos_id is not None
    assert total.kept.documents == sum(shard.documents for shard in shards)
    assert total.tokens == sum(shard.tokens for shard in shards)
    return Manifest(
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        dtype=job.dtype.name,
        documents=total.kept.documents,
        tokens=total.tokens,
        text_bytes=total.kept.text_bytes,
        quarantined=total.quarantined,
        skipped_files=total.skipped_files,
        shards=shards,
        tokenizer_file=tokenizer.files.name,
        origins_xxh3=xxhash.xxh3_64_hexdigest(_origins(job)),
    )


def _origins(job: Job) -> bytes:
    """The content of `origins.json`."""
    plan = job.plan
    return serialized_origins([OriginFile(file.file.label, plan.input_of(file).name) for file in plan.files])


class NothingLeftError(ValueError):
    """No document came through."""


def _nothing_left(inputs: Sequence[InputConfig], counts: InputCounts) -> str:
    names = ", ".join(shown(input_.path) for input_ in inputs)
    fields = ", ".join(sorted({repr(input_.text_field) for input_ in inputs}))
    gone = "".join(f", {tally.documents} removed by {rule}" for rule, tally in counts.removed.items())
    return (
        f"no document in {names} ({counts.quarantined} broken records, {counts.skipped_files} files passed over"
        f"{gone}): check the path and --text-field (now {fields})" + (" and the rules" if gone else "")
    )
