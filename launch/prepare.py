"""`steppe data prepare`: from the words of the command line to a corpus that is prepared here or on a cluster."""

import errno
import json
import sys
from pathlib import Path
from typing import Self

from data_pipeline.corpus.config import CorpusConfig, corpus_of, load_corpus
from data_pipeline.manifest import MANIFEST_NAME, Manifest
from data_pipeline.preparation.counts import Counts
from data_pipeline.preparation.job import Request, prepare_corpus
from data_pipeline.preparation.made_of import REPORT_NAME
from data_pipeline.preparation.workers import Progress
from data_pipeline.remote import is_local
from data_pipeline.shards import fault_of
from launch.byte_progress import ByteProgress


def chosen_corpus(paths: list[str], corpus: Path | None, text_field: str) -> CorpusConfig:
    """Of plain paths or of a YAML file. Raises ValueError where there are both or neither, or something is wrong."""
    if bool(paths) == (corpus is not None):
        raise ValueError("which text? Give either --input PATH ... or --corpus FILE")
    return corpus_of(paths, text_field) if corpus is None else load_corpus(corpus)


def local_folder(out: str) -> Path:
    """The folder to write. Raises ValueError for a URL."""
    if not is_local(out):
        raise ValueError(
            f"--out {out}: a data folder is written on a file system of this machine; name a folder, and copy it to "
            "the store once it is finished"
        )
    return Path(out.removeprefix("file://"))


def prepare_here(request: Request, workers: int | None) -> Manifest:
    """Prepare on this machine, and say on stderr how far it is. Raises as `prepare_corpus`."""
    before = Manifest.load(request.out) if (request.out / MANIFEST_NAME).exists() else None
    if before is not None:
        _check_files(request.out, before)
    try:
        with PhaseProgress() as line:
            manifest = prepare_corpus(request, workers, line.tell)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = "the disk is full: make room and run the same command again, which goes on where it was"
        raise OSError(errno.ENOSPC, what, str(request.out)) from error
    if before is None:
        for note in lost_inputs(request.out):
            print(f"steppe: {note}", file=sys.stderr)
    elif manifest == before:
        words = f"was finished before, and stays as it is (is it whole? `steppe data verify {request.out}`)"
        print(f"steppe: {request.out} {words}", file=sys.stderr)
    return manifest


def _check_files(folder: Path, manifest: Manifest) -> None:
    """Raise ValueError if a file of a finished folder is not there in full."""
    for shard in manifest.shards:
        if fault := fault_of(folder, shard):
            raise ValueError(
                f"data folder {folder} was finished, but {fault}: copy it again from where it was whole, or remove the "
                "folder and prepare it again"
            )


def lost_inputs(folder: Path) -> list[str]:
    """A line for each input of which nothing was kept."""
    counts = Counts.from_json(json.loads((folder / REPORT_NAME).read_bytes())["inputs"])
    lines = []
    for name, of_input in counts.inputs.items():
        if of_input.read.documents and not of_input.kept.documents:
            rules = sorted(of_input.removed.items(), key=lambda item: -item[1].documents)
            why = ", ".join(f"{rule} {tally.documents:,}" for rule, tally in rules)
            lines.append(
                f"of input {name} nothing was kept: all {of_input.read.documents:,} documents removed by {why}"
            )
    return lines


def queue_preparation(
    request: Request,
    workers: int | None,
    cluster: str,
    tasks: int | None,
    time_limit: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Queue the same command as an array on a cluster, or show how. Raises ValueError, OSError."""
    from launch.cluster.preparation import PreparationArray
    from launch.cluster.slurm import NoSlurmError, SlurmError

    if tasks is None:
        raise ValueError("--cluster needs --tasks N: of how many tasks is the array to be?")
    array = PreparationArray(cluster, tasks, request, workers, time_limit)
    if dry_run:
        try:
            answer = array.tested()
        except (NoSlurmError, SlurmError) as error:
            answer = f"not tested: {error}"
        if as_json:
            print(json.dumps({"script": array.script(), "slurm": answer}))
        else:
            print(array.script(), end="")
            print(f"steppe: {answer}", file=sys.stderr)
        return
    job_id = array.submit()
    if as_json:
        print(json.dumps({"job_id": job_id, "tasks": tasks, "cluster": cluster, "path": str(request.out)}))
    elif job_id is None:
        print(f"{request.out} was finished before: nothing is queued")
    else:
        print(f"job {job_id}: {tasks} task{'s' * (tasks > 1)} on {cluster}, which write {request.out}")


class PhaseProgress:
    """A context in which a preparation tells how far it is: a line or bar for each of its phases."""

    def __init__(self) -> None:
        self._phase: str | None = None
        self._line: ByteProgress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._line is not None:
            self._line.__exit__(*exception)

    def tell(self, progress: Progress) -> None:
        """So far is the current phase."""
        if self._line is None or progress.phase != self._phase:
            self.__exit__()
            self._phase = progress.phase
            self._line = ByteProgress(progress.phase, progress.total_bytes)
            self._line.__enter__()
        self._line.reach(progress.done_bytes)
