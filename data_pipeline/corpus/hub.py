"""Datasets of the Hugging Face hub, streamed shard by shard through `datasets`, at one commit."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.corpus.input_config import InputConfig
from data_pipeline.corpus.tables import ROWS_PER_READ
from data_pipeline.retries import RemoteError, retried

if TYPE_CHECKING:
    import pyarrow

    from data_pipeline.corpus.listing import InputFile

PASSING_STATUSES = (429, 500, 502, 503, 504)
"""Of the hub, which is busy or down for a moment."""

Answer = TypeVar("Answer")


def hub_shards(input_: InputConfig) -> tuple[str | None, int]:
    """The commit that the input's revision is now, and the number of shards of its split there.

    A path may also be a folder that holds a copy of a dataset's repository; it has no commit.

    Raises:
        ValueError: there is no such dataset, subset or split.
        OSError: the hub did not answer.
    """
    commit = None if Path(input_.path).is_dir() else _commit(input_)
    return commit, _dataset(input_, commit).num_shards


def hub_tables(file: "InputFile", input_: InputConfig) -> "Iterator[pyarrow.Table]":
    """The rows of one of the shards that `hub_shards` counted, as arrow tables. Raises as `hub_shards` does."""
    dataset = _dataset(input_, file.tag)
    if dataset.num_shards != file.shards:
        raise ValueError(
            f"input {input_.path} has {dataset.num_shards} shards, but had {file.shards} when it was listed: start anew"
        )
    tables = dataset.shard(file.shards, file.shard).with_format("arrow").iter(batch_size=ROWS_PER_READ)
    while True:
        try:
            table = next(tables, None)
        except Exception as error:
            # By its type only: the words of a parser may quote what it read. `datasets` has retried already.
            kind = RemoteError if _got_no_answer(error) else ValueError
            raise kind(f"input {file.label} cannot be read: {type(error).__name__}") from error
        if table is None:
            return
        yield table


def _commit(input_: InputConfig) -> str | None:
    import huggingface_hub

    api = huggingface_hub.HfApi()
    return _asked(input_, lambda: api.dataset_info(input_.path, revision=input_.revision).sha)


def _dataset(input_: InputConfig, commit: str | None) -> Any:
    import datasets

    return _asked(
        input_,
        lambda: datasets.load_dataset(input_.path, input_.subset, split=input_.split, revision=commit, streaming=True),
    )


def _asked(input_: InputConfig, ask: Callable[[], Answer]) -> Answer:
    def try_once() -> Answer:
        try:
            return ask()
        except Exception as error:
            if _status(error) in PASSING_STATUSES:
                raise OSError(f"HTTP status {_status(error)}") from error
            reason = str(error).partition("\n")[0] or type(error).__name__
            if _got_no_answer(error):
                raise RemoteError(
                    f"input {input_.path} is no path here, and the Hugging Face hub does not answer: {reason}"
                ) from error
            raise ValueError(
                f"input {input_.path} is neither a path nor a Hugging Face dataset with a split {input_.split!r}: "
                f"{reason}"
            ) from error

    return retried(f"asking the hub for {input_.path}", try_once)


def _got_no_answer(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if (status := _status(error)) is not None:
        return status in PASSING_STATUSES
    # By name, since the hub's client has changed its HTTP library before.
    names = {base.__name__ for base in type(error).__mro__}
    return isinstance(error, ConnectionError | TimeoutError) or "TransportError" in names


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)
