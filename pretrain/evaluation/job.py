"""One evaluation from request to result, on one rank or on several that a launcher starts with this module."""

import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_pipeline.corpus.config import corpus_of
from data_pipeline.corpus.document import Document, Rejected
from data_pipeline.corpus.input_config import default_name
from data_pipeline.corpus.listing import list_files
from data_pipeline.corpus.reading import read_documents
from data_pipeline.manifest import MANIFEST_NAME
from pretrain.device import detect, init_process_group, new_cpu_group
from pretrain.engine import DTYPES
from pretrain.evaluation.evaluate import Evaluation, Score, Windowing, score
from pretrain.evaluation.progress import ProgressDisplay
from pretrain.load_model import LoadedModel, load_model
from pretrain.run_dir import read_json, write_json

PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class EvaluationJob:
    """What to evaluate, as plain values, so that it can travel to ranks as JSON.

    data: {domain: path}, see `parse_domains`. Windows are in targets, None for the model's own (see `Windowing.of`).
    total_bytes: of the text, if `survey` counted it; only the display of progress uses it.
    """

    model: str
    data: dict[str, str]
    window: int | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    step: int | None = None
    tokenizer: str | None = None
    precision: str = "fp32"
    text_field: str = "text"
    total_bytes: int | None = None


def parse_domains(arguments: list[str]) -> dict[str, str]:
    """`name=path`, or a path whose stem is the name, as {name: path}. Raises ValueError for a name given twice."""
    domains: dict[str, str] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or Path(argument).exists():
            name, path = default_name(argument), argument
        if not name or not path:
            raise ValueError(f"--data {argument}: expected PATH or NAME=PATH")
        if name in domains:
            raise ValueError(
                f"--data {argument}: the domain {name} is {domains[name]} already; tell them apart by NAME=PATH"
            )
        domains[name] = path
    if not domains:
        raise ValueError("there is nothing to evaluate: name a corpus with --data PATH")
    return domains


def documents_of(path: str, text_field: str) -> Iterator[Document]:
    """The documents of one domain. Raises ValueError at the first broken record: a measurement leaves nothing out."""

    def refuse(record: Rejected) -> None:
        if record.raw is not None:
            where = f"{record.path}:{record.line}" if record.line else record.path
            raise ValueError(f"{where}: {record.reason}; repair or remove it, a measurement leaves nothing out")

    if (Path(path) / MANIFEST_NAME).is_file():
        raise ValueError(f"{path} is a folder of token shards: name the text that it was made from")
    return read_documents(corpus_of([path], text_field), on_bad=refuse)


def survey(data: dict[str, str], text_field: str) -> int | None:
    """Read everything once, which is quick beside scoring it: bytes of text, so that what is broken or empty shows
    before the model runs and the time left is known. None where a corpus is not local, and would be fetched twice.

    Raises ValueError for a corpus that is missing, broken or has no text.
    """
    total = 0
    for name, path in data.items():
        if not all(file.is_local for input_ in corpus_of([path]).inputs for file in list_files(input_)):
            return None
        text_bytes = sum(len(document.text.encode("utf-8")) for document in documents_of(path, text_field))
        if not text_bytes:
            raise ValueError(f"{name}: the documents of {path} hold no text, there is nothing to measure")
        total += text_bytes
    return total


def run_job(job: EvaluationJob) -> dict[str, Any]:
    """Evaluate in this process; returns what `--json` prints: the model, `Evaluation.as_dict()` and the precision.

    Raises ValueError for whatever is wrong with the model, the corpus or the windows.
    """
    share = _score_share(job, rank=0, world=1)
    return _result(job, share.model, Evaluation.of(share.model, share.windowing, [share.scores]))


@dataclass(frozen=True)
class _Share:
    """What one rank scored, and with what."""

    model: LoadedModel
    windowing: Windowing
    scores: dict[str, Score]


def _score_share(job: EvaluationJob, rank: int, world: int) -> _Share:
    if job.precision not in PRECISIONS:
        raise ValueError(f"precision={job.precision}: an evaluation runs in {' or '.join(PRECISIONS)}")
    tokenizer = Path(job.tokenizer) if job.tokenizer else None
    model = load_model(Path(job.model), job.step, tokenizer, DTYPES[job.precision])
    windowing = Windowing.of(model.context_length, job.window, job.stride, job.batch_tokens)
    domains = {name: documents_of(path, job.text_field) for name, path in job.data.items()}
    with ProgressDisplay(job.total_bytes, world, shown=rank == 0) as display:
        return _Share(model, windowing, score(model, domains, windowing, rank, world, display.update))


def _result(job: EvaluationJob, model: LoadedModel, evaluation: Evaluation) -> dict[str, Any]:
    return {
        "model": model.name,
        "step": model.step,
        "passed_over": list(model.passed_over),
        **evaluation.as_dict(),
        "precision": job.precision,
    }


def main() -> None:
    """One of several ranks: `python -m pretrain.evaluation.job JOB.json RESULT.json`.

    A user's mistake is a result, too: every rank brings its share or its error to one gathering, none leaves alone, and
    rank 0 writes {"result": ...} or {"error": ...}.
    """
    job = EvaluationJob(**read_json(Path(sys.argv[1])))
    init_process_group(detect())
    rank, world = dist.get_rank(), dist.get_world_size()
    share: _Share | None = None
    failure: str | None = None
    try:
        share = _score_share(job, rank, world)
    except (ValueError, FileNotFoundError) as error:
        failure = str(error)
    everyone: list[Any] = [None] * world
    mine = (None, None) if share is None else (share.scores, share.model.step)
    dist.all_gather_object(everyone, (*mine, failure), group=new_cpu_group())
    if rank == 0:
        write_json(Path(sys.argv[2]), _verdict(job, share, everyone))
    dist.barrier()
    dist.destroy_process_group()


def _verdict(job: EvaluationJob, share: _Share | None, everyone: list[Any]) -> dict[str, Any]:
    failures = [failure for _, _, failure in everyone if failure is not None]
    if failures:
        return {"error": failures[0]}
    steps = {step for _, step, _ in everyone}
    if len(steps) > 1:  # the run went on meanwhile
        return {"error": f"the ranks found different checkpoints of {job.model} to be the newest: choose one by --step"}
    assert share is not None
    try:
        evaluation = Evaluation.of(share.model, share.windowing, [scores for scores, _, _ in everyone])
    except ValueError as error:
        return {"error": str(error)}
    return {"result": _result(job, share.model, evaluation)}


def run_job_on_ranks(job: EvaluationJob, nproc: int, start: Callable[[str, list[str], int], None]) -> dict[str, Any]:
    """`run_job`, shared by `nproc` local ranks that `start(module, arguments, nproc)` starts and waits for."""
    with tempfile.TemporaryDirectory(prefix="steppe-eval-") as scratch:
        job_path, result_path = Path(scratch) / "job.json", Path(scratch) / "result.json"
        write_json(job_path, asdict(job))
        start("pretrain.evaluation.job", [str(job_path), str(result_path)], nproc)
        verdict = read_json(result_path)
    if "error" in verdict:
        raise ValueError(verdict["error"])
    return verdict["result"]


if __name__ == "__main__":
    main()
