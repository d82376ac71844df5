"""One evaluation from request to recorded scores, on one rank or on several that a launcher starts with this module.

It may take several sittings: what is recorded in its folder when one ends, however it ends, the next does not repeat.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from pretrain.device import peak_memory_bytes
from pretrain.engine import DTYPES
from pretrain.evaluation.evaluate import Scored, score_documents
from pretrain.evaluation.folder import (
    Cost,
    Facts,
    check_request,
    is_finished,
    locked,
    read_facts,
    write_facts,
    write_request,
)
from pretrain.evaluation.progress import ProgressDisplay
from pretrain.evaluation.ranks import Ranks, Start, rank_main, run_on_ranks
from pretrain.evaluation.record import DocumentSet, RecordsWriter, done
from pretrain.evaluation.texts import TextsConfig, identities, read_texts
from pretrain.evaluation.windows import WHOLE_DOCUMENT, Windowing
from pretrain.host_memory import keep_freed_memory
from pretrain.load_model import LoadedModel, load_model

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, as plain values, so that it can travel to ranks as JSON.

    window, stride: in targets, see `Windowing.of`. tokenizer: one to use rather than that beside the model.
    total_bytes: of the text, if `texts.survey` counted it; only the display of progress uses it.
    """

    model: str
    texts: TextsConfig
    window: int | Literal["document"] | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    step: int | Literal["best"] | None = None
    tokenizer: str | None = None
    precision: str = "fp32"
    offload: Literal["cpu", "disk"] | None = None
    total_bytes: int | None = None


def evaluate_job(job: EvaluationJob, folder: Path, nproc: int = 1, start: Start | None = None) -> Facts:
    """Score the documents that `folder` does not hold yet, and leave there what `record` and `folder` describe.

    A folder that is finished is only compared with the job. start: starts ranks, if there are to be more than one.

    Raises:
        ValueError: something is wrong with the model, the text or the windows, the folder is of another request, or
            another process writes to it.
        OSError: a store did not answer in spite of retries; what is scored is kept.
    """
    if job.precision not in PRECISIONS:
        raise ValueError(f"precision={job.precision}: an evaluation runs in {' or '.join(PRECISIONS)}")
    with locked(folder):
        files = identities(job.texts)
        if nproc == 1:
            _sit(job, folder, files, Ranks())
        else:
            assert start is not None, "several ranks have to be started"
            plain = {"job": _JOB.dump_python(job, mode="json"), "folder": str(folder), "files": files}
            run_on_ranks("pretrain.evaluation.job", plain, nproc, start)
        return read_facts(folder)


_JOB = TypeAdapter(EvaluationJob)


def main() -> None:
    """One of several ranks."""
    rank_main(
        lambda plain, ranks: _sit(_JOB.validate_python(plain["job"]), Path(plain["folder"]), plain["files"], ranks)
    )


@dataclass(frozen=True)
class _Prepared:
    """What a rank has before it scores. request: what decides the scores."""

    model: LoadedModel
    windowing: Windowing
    request: dict[str, Any]
    done: DocumentSet
    done_bytes: int


def _sit(job: EvaluationJob, folder: Path, files: Sequence[Mapping[str, Any]], ranks: Ranks) -> None:
    """One rank's part of a sitting."""
    prepared = ranks.together(lambda: _prepare(job, folder, files))
    if any(request != prepared.request for request in ranks.gather(prepared.request)):  # the run went on meanwhile
        raise ValueError(f"the ranks found different checkpoints of {job.model} to be the newest: choose one by --step")
    if is_finished(folder):
        return
    if ranks.rank == 0:
        write_request(folder, prepared.request)
        if prepared.done:
            print(f"eval: {len(prepared.done):,} documents are scored already", file=sys.stderr, flush=True)
    began = time.monotonic()
    scored = ranks.together(lambda: _score(job, folder, prepared, ranks))
    seconds = time.monotonic() - began
    tokens = sum(ranks.gather(scored.tokens))
    peak_bytes = max(ranks.gather(peak_memory_bytes(prepared.model.model.device)))
    cost = Cost(seconds, tokens / seconds, peak_bytes, ranks.world)
    ranks.together(lambda: _finish(folder, scored.read, _facts(job, prepared, scored.domains, cost), ranks.rank))


def _finish(folder: Path, documents: int, facts: Facts, rank: int) -> None:
    """Say that the evaluation is finished. Raises ValueError unless each of so many documents is recorded, and once."""
    if rank != 0:
        return
    recorded, _ = done(folder)
    if len(recorded) != documents:
        raise ValueError(
            f"{folder} holds {len(recorded):,} of {documents:,} documents, though all were scored: something else has "
            "written to it; remove it, and evaluate anew"
        )
    write_facts(folder, facts)


def _prepare(job: EvaluationJob, folder: Path, files: Sequence[Mapping[str, Any]]) -> _Prepared:
    tokenizer = Path(job.tokenizer) if job.tokenizer else None
    model = load_model(Path(job.model), job.step, tokenizer, DTYPES[job.precision], job.offload)
    windowing = Windowing.of(model.context_length, job.window, job.stride, job.batch_tokens)
    if windowing.window is not None and model.longest_context is not None and windowing.window > model.longest_context:
        raise ValueError(
            f"window={windowing.window}: {model.name} sees at most {model.longest_context} tokens at once; use "
            f"--window {model.longest_context}"
        )
    _, start_token = model.start_token
    request = {
        "step": model.step,
        "model": model.fingerprint,
        "tokenizer": model.tokenizer.fingerprint,
        "start_token": start_token,
        "precision": job.precision,
        "window": windowing.window or WHOLE_DOCUMENT,
        "stride": windowing.stride,
        "texts": job.texts.model_dump(mode="json"),
        "files": [dict(file) for file in files],
    }
    check_request(folder, request)
    return _Prepared(model, windowing, request, *done(folder))


def _score(job: EvaluationJob, folder: Path, prepared: _Prepared, ranks: Ranks) -> Scored:
    texts = read_texts(job.texts, prepared.model.tokenizer)
    if job.offload is None:  # else memory is what there is little of
        keep_freed_memory()
    with (
        ProgressDisplay(job.total_bytes, prepared.done_bytes, ranks.world, shown=ranks.rank == 0) as display,
        RecordsWriter(folder, ranks.rank) as records,
    ):
        return score_documents(
            prepared.model,
            texts,
            prepared.windowing,
            records,
            ranks.rank,
            ranks.world,
            prepared.done,
            display.update,
        )


def _facts(job: EvaluationJob, prepared: _Prepared, domains: Sequence[str], cost: Cost) -> Facts:
    model, windowing = prepared.model, prepared.windowing
    _, start_token = model.start_token
    notes = list(model.notes)
    if windowing.window is not None and windowing.window > model.context_length:
        notes.append(f"The window is longer than the {model.context_length} tokens that the model was trained to see.")
    return Facts(
        model=model.name,
        step=model.step,
        passed_over=model.passed_over,
        precision=job.precision,
        offload=job.offload,
        window=windowing.window or WHOLE_DOCUMENT,
        stride=windowing.stride,
        context_length=model.context_length,
        start_token=start_token,
        eos_scored=model.tokenizer.eos_id is not None,
        tokenizer=model.tokenizer.fingerprint,
        domains=tuple(domains),
        notes=tuple(notes),
        cost=cost,
    )


if __name__ == "__main__":
    main()
