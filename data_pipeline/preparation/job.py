"""A corpus becomes a data folder: a job of many tasks for any number of processes, which goes on where it was."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from data_pipeline.config import DEFAULT_BLOCK_BYTES
from data_pipeline.corpus.config import CorpusConfig, corpus_of
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.pack_files import block_tokens_of
from data_pipeline.preparation.curation_phases import ContaminationPhase, DuplicatesPhase, SelectPhase
from data_pipeline.preparation.finish_phases import (
    FinishPhase,
    NothingLeftError,
    PackPhase,
    PlacePhase,
    missing_packs,
)
from data_pipeline.preparation.made_of import difference
from data_pipeline.preparation.phase import Job, Phase
from data_pipeline.preparation.plan import Plan, make_plan
from data_pipeline.preparation.read_phase import ReadPhase
from data_pipeline.preparation.work_folder import UNFINISHED_NAME, VanishedError, WorkFolder
from data_pipeline.preparation.workers import OnProgress, Progress, work_through
from data_pipeline.shards import DEFAULT_SHARD_BYTES, token_dtype
from data_pipeline.tokenizer import Tokenizer

LOGS_NAME = "prepare.logs"
"""Where a cluster's tasks write; a data folder may hold it from the start."""
AGAIN_SECONDS = 0.05
"""Between two looks at a work folder that others are about to remove."""


def no_progress(progress: Progress) -> None:
    """For whom it is nothing to know."""


@dataclass(frozen=True)
class Request:
    """What is asked for. Of the same request and the same input files comes the same folder, byte for byte.

    unit_bytes: stored bytes of a unit of work; None: what suits the files' sizes.
    packs: sequence lengths for which bins are planned.
    """

    corpus: CorpusConfig
    tokenizer_path: str
    out: Path
    shard_bytes: int = DEFAULT_SHARD_BYTES
    unit_bytes: int | None = None
    packs: tuple[int, ...] = ()


def prepare(
    inputs: Sequence[str | Path],
    tokenizer_path: str | Path,
    out: str | Path,
    text_field: str = "text",
    workers: int | None = None,
    progress: OnProgress = no_progress,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Manifest:
    """Tokenize plain inputs into the folder `out`, as `prepare_corpus` does."""
    corpus = corpus_of(inputs, text_field)
    return prepare_corpus(Request(corpus, str(tokenizer_path), Path(out), shard_bytes), workers, progress)


def prepare_corpus(request: Request, workers: int | None = None, progress: OnProgress = no_progress) -> Manifest:
    """Curate and tokenize a corpus into a data folder, each document as `BOS t1 .. tn EOS`; no BOS if there is none.

    Other processes may be at it already, on this machine or another, or may have been killed at it: what they have
    finished is not done again. The files are the same for every number of workers. A folder that is finished, of the
    same request, stays as it is, but for bins that it has not yet.

    Args:
        request: what is asked for.
        workers: processes and threads that work here; by default, one a core.
        progress: told how far the current phase is.

    Raises:
        ValueError: an input does not exist, is damaged or changes; no document is left; the tokenizer has no EOS; or
            the folder is of another request or holds something else.
        OSError: the disk is full, a store does not answer, a worker died. What was finished is kept.
    """
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers is {workers}, but at least 1 is needed")
    work = WorkFolder(request.out)
    try:
        with open_job(request) as job:
            for phase in phases_of(job) if job is not None else ():
                work_through(phase, workers, progress)
    except NothingLeftError:
        # Nothing of worth is in it, and a corrected request would be refused by it.
        work.remove_unless_in_use()
        with contextlib.suppress(OSError):
            request.out.rmdir()
        raise
    work.remove_unless_in_use()
    return Manifest.load(request.out)


def phases_of(job: Job) -> list[Phase]:
    """What a job goes through, in order."""
    if job.is_written:
        return [PackPhase(job), FinishPhase(job)]
    curation = job.plan.corpus.curation
    phases: list[Phase] = []
    if curation.decontaminate is not None:
        phases.append(ContaminationPhase(job))
    phases.append(ReadPhase(job))
    if curation.finds_duplicates:
        phases += [DuplicatesPhase(job), SelectPhase(job)]
    return [*phases, PlacePhase(job), PackPhase(job), FinishPhase(job)]


@contextmanager
def open_job(request: Request) -> Iterator[Job | None]:
    """Begin a job or join it, holding for as long as this context lasts that somebody works on it.

    None: the folder is finished, by this request.

    Raises:
        ValueError: as `prepare_corpus`.
    """
    tokenizer = Tokenizer(request.tokenizer_path)
    if tokenizer.eos_id is None:
        raise ValueError(
            f"tokenizer {request.tokenizer_path} has no EOS piece, but every document ends with one: train another, or "
            "lay a tokenizer_config.json with its eos_token beside a tokenizer.json"
        )
    _check_folder(request.out)
    for sequence_length in request.packs:
        block_tokens_of(token_dtype(tokenizer.vocab_size), sequence_length, DEFAULT_BLOCK_BYTES)
    with contextlib.ExitStack() as working:
        yield _Planned(request, tokenizer.fingerprint).begin_or_join(working)


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not a folder: choose another --out")
    names: list[str] = []
    with contextlib.suppress(FileNotFoundError):
        names = os.listdir(out)
    is_ours = all(name == LOGS_NAME or name.startswith(UNFINISHED_NAME) for name in names)
    # In this order: a job that wrote some of these files has had its work folder since, or has left a manifest.
    if not is_ours and not WorkFolder(out).path.exists() and not (out / MANIFEST_NAME).exists():
        raise ValueError(f"folder {out} exists and holds other files: choose another --out")


@dataclass(frozen=True)
class _Planned:
    """A request, which becomes a plan only where it must: listing a million files takes its time."""

    request: Request
    tokenizer_fingerprint: str

    @cached_property
    def plan(self) -> Plan:
        request = self.request
        return make_plan(
            request.corpus, self.tokenizer_fingerprint, request.shard_bytes, request.packs, request.unit_bytes
        )

    def is_finished(self) -> bool:
        """Whether nothing is left to do.

        Raises ValueError where the folder is finished, but by another request or of other files.
        """
        out = self.request.out
        if not (out / MANIFEST_NAME).exists():
            return False
        differing = difference(out, self.plan)
        if differing is not None:
            raise ValueError(
                f"data folder {out} exists and is finished, of {differing}: choose another --out or remove it"
            )
        return not missing_packs(Manifest.load(out), self.request.packs)

    def begin_or_join(self, working: contextlib.ExitStack) -> Job | None:
        """The job, which `working` then says that this process works on; None if it is finished."""
        work = WorkFolder(self.request.out)
        while not self.is_finished():
            # Who came to the end may be removing the folder.
            with contextlib.suppress(VanishedError):
                work.make()
                with work.planning():
                    # Somebody may have finished it since.
                    plan = None if self.is_finished() else self._begun_or_joined(work)
                    if plan is not None:
                        working.enter_context(work.working())
                        return Job(self.request.out, plan, self.request.tokenizer_path)
            time.sleep(AGAIN_SECONDS)
        return None

    def _begun_or_joined(self, work: WorkFolder) -> Plan | None:
        """The plan to work by, which is written down; None while others leave a job that is finished."""
        if not work.job_path.exists():
            work.begin(self.plan)
            return self.plan
        begun = work.read_plan()
        with work.alone() as alone:
            if self._is_finished(begun):
                if not alone:
                    return None
                # Who finished it died before he could remove it.
                work.begin(self.plan)
                return self.plan
            # Who joins others believes their list: not each of a thousand tasks lists a million files.
            differing = begun.difference(self.plan if alone else self._on_files_of(begun))
            if differing is None:
                return begun
            if alone and not work.tasks_done():
                work.begin(self.plan)
                return self.plan
        raise ValueError(
            f"{work.out} holds the unfinished preparation of {differing}: finish that one, or remove {work.path} to "
            "start again"
        )

    def _is_finished(self, begun: Plan) -> bool:
        out = self.request.out
        return (out / MANIFEST_NAME).exists() and not missing_packs(Manifest.load(out), begun.packs)

    def _on_files_of(self, begun: Plan) -> Plan:
        return replace(
            begun,
            corpus=self.request.corpus,
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            shard_bytes=self.request.shard_bytes,
            packs=tuple(sorted(set(self.request.packs))),
        )
