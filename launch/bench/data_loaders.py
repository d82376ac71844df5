"""How each contender of `steppe bench data --part loader` makes batches out of the same tokens.

All but the limit hand over inputs and targets, int64 `(B, T)` each, as a training step takes them: next to what a
library reads, windows of T + 1 tokens, what turns them into that is made here, in the process that reads.
"""

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.config import DataConfig, Packing, SourceConfig
from data_pipeline.loader import Loader
from data_pipeline.manifest import Manifest
from data_pipeline.order import Stage

LITDATA_ITEM_TOKENS = 1 << 20
LITDATA_CHUNK_BYTES = 64 << 20
"""Both of the size that litdata's documentation has for tokens."""


class Work(NamedTuple):
    """What is read, and how."""

    data: Path
    """The data folder, of one shard."""
    scratch: Path
    """For what a contender must write first."""
    sequence_length: int
    """T."""
    micro_batch_size: int
    """B."""

    @property
    def tokens_path(self) -> Path:
        return self.data / "shard_00000.bin"


Open = Callable[[], Generator[Any, None, None]]
"""Begins to read anew; closing what it returns ends that."""


def limit(work: Work) -> Open:
    """Random windows `(B, T + 1)` as they are stored, out of mapped memory that is a plain array."""
    T, B = work.sequence_length, work.micro_batch_size

    def batches() -> Generator[Any, None, None]:
        tokens = np.memmap(work.tokens_path, dtype="<u2", mode="r").view(np.ndarray)
        random = np.random.default_rng(0)
        while True:
            yield np.stack([tokens[start : start + T + 1] for start in random.integers(0, len(tokens) - T, B)])

    return batches


def memmap(work: Work) -> Open:
    """Random windows out of `np.memmap`."""
    T, B = work.sequence_length, work.micro_batch_size

    def batches() -> Generator[Any, None, None]:
        tokens = np.memmap(work.tokens_path, dtype="<u2", mode="r")
        random = np.random.default_rng(0)
        while True:
            windows = np.stack([tokens[start : start + T + 1] for start in random.integers(0, len(tokens) - T, B)])
            yield windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    return batches


def steppe(work: Work, packing: Packing = "concatenate", document_mask: bool = False, micro_batches: int = 1) -> Open:
    """The product's loader over an epoch, from its first position. `micro_batches`: of a step."""
    T, B = work.sequence_length, work.micro_batch_size
    manifest = Manifest.load(work.data)
    source = SourceConfig(name="tokens", path=str(work.data))
    data = DataConfig(sequence_length=T, sources=(source,), packing=packing)
    packs = {pack.sequence_length: pack.samples for pack in manifest.packs}
    samples = packs[T] if packing == "best_fit" else (manifest.tokens - 1) // T
    step = B * micro_batches

    def batches() -> Generator[Any, None, None]:
        plan = ((number * step, step) for number in range(samples // step))
        loader = Loader(data, 0, [Stage(0, {"tokens": 1.0}, T)], 0, 1, B, document_mask, plan)
        try:
            for global_batch in loader:
                yield from global_batch
        finally:
            loader.close()

    return batches


def litdata(work: Work, workers: int) -> Open:
    """TokensLoader, shuffled, through its own data loader."""
    import litdata
    import torch

    written = work.scratch / f"litdata-{workers}"
    litdata.optimize(
        fn=partial(_items, dtype="<u2"),
        inputs=[str(work.tokens_path)],
        output_dir=str(written),
        chunk_bytes=LITDATA_CHUNK_BYTES,
        item_loader=litdata.TokensLoader(),
        num_workers=1,
    )

    def batches() -> Generator[Any, None, None]:
        windows = litdata.StreamingDataset(
            str(written),
            item_loader=litdata.TokensLoader(block_size=work.sequence_length + 1),
            shuffle=True,
            drop_last=True,
        )
        loader = litdata.StreamingDataLoader(windows, batch_size=work.micro_batch_size, num_workers=workers)
        for each in loader:
            yield each[:, :-1].to(torch.int64), each[:, 1:].to(torch.int64)

    return batches


def _items(path: str, dtype: str) -> Iterator[np.ndarray]:
    tokens = np.fromfile(path, dtype=dtype)
    for start in range(0, len(tokens), LITDATA_ITEM_TOKENS):
        yield tokens[start : start + LITDATA_ITEM_TOKENS]


def arrow(work: Work) -> Open:
    """Rows of T + 1 tokens in arrow files, shuffled by indices, in batches of numpy arrays."""
    import datasets
    import pyarrow

    width = work.sequence_length + 1
    tokens = np.fromfile(work.tokens_path, dtype="<u2")
    flat = pyarrow.array(tokens[: len(tokens) // width * width])
    table = pyarrow.table({"tokens": pyarrow.FixedSizeListArray.from_arrays(flat, width)})
    written = work.scratch / "arrow"
    datasets.Dataset(table).save_to_disk(written)

    def batches() -> Generator[Any, None, None]:
        rows = datasets.load_from_disk(written).shuffle(seed=0, keep_in_memory=True).with_format("numpy")
        for each in rows.iter(work.micro_batch_size, drop_last_batch=True):
            windows = each["tokens"]
            yield windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)

    return batches


BUILDERS: dict[str, Callable[[Work], Open]] = {
    "limit": limit,
    "memmap": memmap,
    "steppe": steppe,
    "steppe-8": partial(steppe, micro_batches=8),
    "steppe-mask": partial(steppe, document_mask=True),
    "steppe-best-fit": partial(steppe, packing="best_fit"),
    "steppe-best-fit-mask": partial(steppe, packing="best_fit", document_mask=True),
    "litdata-0": partial(litdata, workers=0),
    "litdata-2": partial(litdata, workers=2),
    "datasets": arrow,
}
