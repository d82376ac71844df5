"""How each contender of `steppe bench checkpoint` saves durably, in the training's thread or beside it, and loads.

All save the same tensors: live views of the engine's masters and moments under their logical names, which is what a
checkpoint that any layout can load has to hold. A save ends when files and folder are on the disk; a load ends when the
values are in the engine and a step could be made.
"""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse
from torch.serialization import get_crc32_options, set_crc32_options

from launch.bench.contenders import LOADERS, SAVERS
from pretrain.checkpoint.folder import list_checkpoints
from pretrain.checkpoint.load import load_checkpoint
from pretrain.checkpoint.rank_file import tensor_key
from pretrain.checkpoint.save import CheckpointSaver, Saved, save_checkpoint
from pretrain.config import RunConfig
from pretrain.device import detect, init_process_group, new_cpu_group
from pretrain.engine import agree
from pretrain.parallel_dims import ParallelDims
from pretrain.random_batch import random_batch
from pretrain.run_dir import sync_folder
from pretrain.state import TrainState

CHUNK_BYTES = 4 << 20
TAG = "state"


class Subject:
    """An engine that trains and is saved, with what the contenders keep from one save to the next."""

    def __init__(self, config: RunConfig) -> None:
        # It speaks on stdout when imported, and so not before a contender has put that aside.
        from pretrain.engine_deepspeed import DeepSpeedEngine

        device = detect()
        init_process_group(device)
        self.config = config
        self.engine = DeepSpeedEngine(config, device, ParallelDims.of_this_rank(config))
        self.state = TrainState()
        self.buffer = torch.empty(sum(tensor.numel() for tensor in self.tensors().values()))
        self.saved: list[Saved] = []
        self.saver = CheckpointSaver(Path(), self.engine, config, None, None, report=self.saved.append)
        self.group = new_cpu_group()
        gpu = device.type != "cpu"
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu, use_shared_memory=False, use_async_staging=True, use_non_blocking_copy=gpu
            )
        )
        self.thread = ThreadPoolExecutor(1)

    def tensors(self) -> dict[str, Tensor]:
        """Live views of all that is to be saved, by the names that our own files give them."""
        return {
            tensor_key(kind, piece.name, piece.box): view
            for piece in self.engine.pieces()
            for kind, view in piece.views.items()
        }

    def step(self, before_update: Callable[[], None] = lambda: None) -> float:
        """Train one step; returns its seconds."""
        began = time.perf_counter()
        batch = random_batch(self.config, self.state.step)
        agree(self.engine.train_step([batch], self.config.optimizer.lr, before_update))
        self.state.advance(len(batch.tokens), batch.tokens.size)
        return time.perf_counter() - began

    def fill_buffer(self) -> None:
        """Put all that is to be saved into the one buffer that `raw` writes."""
        for part, tensor in self._parts():
            part.copy_(tensor)

    def take_buffer(self) -> None:
        """The inverse of `fill_buffer`."""
        for part, tensor in self._parts():
            tensor.copy_(part)
        self.renew()

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        at = 0
        for tensor in self.tensors().values():
            yield self.buffer[at : at + tensor.numel()].view(tensor.shape), tensor
            at += tensor.numel()

    def take(self, values: dict[str, Tensor]) -> None:
        """Copy loaded values into the engine."""
        for key, tensor in self.tensors().items():
            tensor.copy_(values[key])
        self.renew()

    def renew(self) -> None:
        """The masters were written to: renew the weights that forward uses."""
        self.engine.restored(self.engine.scalars())


class UnderWay(NamedTuple):
    """A save beside training.

    staged: waits until the state may be updated. over: whether it is durable by now. durable_at: waits for that;
    returns when it was, on the clock of `time.perf_counter`.
    """

    staged: Callable[[], object]
    over: Callable[[], bool]
    durable_at: Callable[[], float]


# ------------------------------------------------------------------------------------------------------ saving


def save_raw(subject: Subject, folder: Path) -> None:
    data, digest = _bytes(subject.buffer), xxhash.xxh3_64()
    folder.mkdir()
    with open(folder / "raw", "wb", buffering=0) as file:
        for at in range(0, len(data), CHUNK_BYTES):
            digest.update(data[at : at + CHUNK_BYTES])
            _write_all(file.fileno(), data[at : at + CHUNK_BYTES])
        _write_all(file.fileno(), memoryview(digest.digest()))
        os.fsync(file.fileno())
    sync_folder(folder)


def save_steppe(subject: Subject, folder: Path) -> None:
    settings = subject.config.checkpoint.model_copy(update={"asynchronous": False})
    config = subject.config.model_copy(update={"checkpoint": settings})
    save_checkpoint(folder, subject.engine, subject.state, config, None, None)


def save_torch(subject: Subject, folder: Path) -> None:
    folder.mkdir()
    with open(folder / "state.pt", "wb") as file:
        torch.save(subject.tensors(), file)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def save_dcp(subject: Subject, folder: Path) -> None:
    dcp.save(subject.tensors(), storage_writer=dcp.FileSystemWriter(folder), process_group=subject.group)
    sync_folder(folder)


def save_deepspeed(subject: Subject, folder: Path) -> None:
    subject.engine.engine.save_checkpoint(str(folder), tag=TAG)
    for path in [*folder.rglob("*"), folder]:
        sync_folder(path)  # a file as well


def without_crc(save: Callable[[Subject, Path], None]) -> Callable[[Subject, Path], None]:
    """The same save without the CRC that torch.save computes."""

    def saved(subject: Subject, folder: Path) -> None:
        with _crc(False):
            save(subject, folder)

    return saved


@contextmanager
def _crc(computed: bool) -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(computed)
    try:
        yield
    finally:
        set_crc32_options(before)


def begin_raw(subject: Subject, folder: Path) -> UnderWay:
    def saved() -> float:
        save_raw(subject, folder)
        return time.perf_counter()

    durable = subject.thread.submit(saved)
    return UnderWay(lambda: None, durable.done, durable.result)


def begin_steppe(subject: Subject, folder: Path) -> UnderWay:
    saver, before, began = subject.saver, len(subject.saved), time.perf_counter()
    saver.folder = folder
    saver.start(subject.state)

    def over() -> bool:
        saver.poll()
        return len(subject.saved) > before

    def durable_at() -> float:
        saver.close()
        saved = subject.saved[-1]
        assert saved.failure is None, saved.failure
        return began + saved.seconds

    return UnderWay(saver.staged, over, durable_at)


def begin_dcp(subject: Subject, folder: Path) -> UnderWay:
    response = dcp.async_save(
        subject.tensors(),
        storage_writer=dcp.FileSystemWriter(folder),
        process_group=subject.group,
        async_stager=subject.stager,
    )
    assert isinstance(response, AsyncSaveResponse)
    durable: Future[float] = Future()

    def written(upload: Future) -> None:
        problem = upload.exception()
        if problem is not None:
            durable.set_exception(problem)
            return
        sync_folder(folder)
        durable.set_result(time.perf_counter())

    response.upload_completion.add_done_callback(written)
    return UnderWay(response.staging_completion.result, durable.done, durable.result)


SAVE: dict[str, Callable[[Subject, Path], None]] = {
    "raw": save_raw,
    "steppe-blocking": save_steppe,
    "torch-save": save_torch,
    "torch-save-no-crc": without_crc(save_torch),
    "torch-dcp": save_dcp,
    "torch-dcp-no-crc": without_crc(save_dcp),
    "deepspeed": save_deepspeed,
}
BEGIN: dict[str, Callable[[Subject, Path], UnderWay]] = {
    "raw-beside": begin_raw,
    "steppe-async": begin_steppe,
    "torch-dcp-async": begin_dcp,
}
assert SAVE.keys() | BEGIN.keys() == SAVERS.keys()


# ----------------------------------------------------------------------------------------------------- loading


def load_raw(subject: Subject, folder: Path) -> None:
    data, digest = _bytes(subject.buffer), xxhash.xxh3_64()
    with open(folder / "raw", "rb", buffering=0) as file:
        for at in range(0, len(data), CHUNK_BYTES):
            chunk = data[at : at + CHUNK_BYTES]
            filled = 0
            while filled < len(chunk):
                count = file.readinto(chunk[filled:])
                assert count, f"{file.name} is too short"
                filled += count
            digest.update(chunk)
        assert file.read(8) == digest.digest(), f"{file.name} is damaged"
    subject.take_buffer()


def load_steppe(subject: Subject, folder: Path) -> None:
    load_checkpoint(list_checkpoints(folder)[-1], subject.engine)


def load_safetensors(subject: Subject, folder: Path) -> None:
    values: dict[str, Tensor] = {}
    for path in sorted(list_checkpoints(folder)[-1].glob("*.safetensors")):
        values |= load_file(path)
    subject.take(values)


def load_torch(subject: Subject, folder: Path) -> None:
    subject.take(torch.load(folder / "state.pt", map_location="cpu", weights_only=True))


def load_torch_mmap(subject: Subject, folder: Path) -> None:
    subject.take(torch.load(folder / "state.pt", map_location="cpu", weights_only=True, mmap=True))


def load_dcp(subject: Subject, folder: Path) -> None:
    reader = dcp.FileSystemReader(folder)
    dcp.load(subject.tensors(), storage_reader=reader, process_group=subject.group)
    subject.renew()


def load_deepspeed(subject: Subject, folder: Path) -> None:
    subject.engine.engine.load_checkpoint(str(folder), tag=TAG)


LOAD: dict[str, Callable[[Subject, Path], None]] = {
    "raw": load_raw,
    "steppe": load_steppe,
    "safetensors": load_safetensors,
    "torch-load": load_torch,
    "torch-load-mmap": load_torch_mmap,
    "torch-dcp": load_dcp,
    "deepspeed": load_deepspeed,
}
assert LOAD.keys() == LOADERS.keys()


def _bytes(buffer: Tensor) -> memoryview:
    return memoryview(buffer.view(torch.uint8).numpy().data)


def _write_all(handle: int, data: memoryview) -> None:
    while data:
        data = data[os.write(handle, data) :]
