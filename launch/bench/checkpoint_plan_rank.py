"""A process of `steppe bench checkpoint --plan`.

`python -P -m launch.bench.checkpoint_plan_rank ROLE CONFIG.json RANKS FOLDER`, where ROLE is one of

    parts  what each of RANKS ranks brings to a save; the messages are left in the folder, as they would arrive
    save   the first rank: from these to index.json
    load   a rank of another layout: from index.json to what it has to read of which file

Each answers with one JSON line. Memory is that of the process, as the kernel counts it: by how much its peak in a phase
is above what it held before. What an earlier phase has let go of may be used again, so `peak_bytes` of the whole, from
after the imports on, is the number to plan with.
"""

import gc
import pickle
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from launch.bench.turns import Answers
from launch.bench.zero_boxes import pieces_of
from pretrain.boxes import Piece
from pretrain.checkpoint.index import (
    INDEX_NAME,
    CheckpointIndex,
    StoredFile,
    packed_boxes,
    parse_index,
    stored_parameters,
    write_index,
)
from pretrain.checkpoint.rank_file import BLOCK_BYTES
from pretrain.checkpoint.read import plan_copies
from pretrain.config import RunConfig
from pretrain.device import peak_resident_bytes
from pretrain.layout import Layout
from pretrain.state import TrainState

T = TypeVar("T")
PARTS = "parts"
VALUE_BYTES = 12  # an fp32 master and two moments


class Phases:
    """Seconds and memory of one phase after the other."""

    def __init__(self) -> None:
        self.measured: dict[str, dict[str, float]] = {}
        self._base = _peak_from_now()
        self.peak_bytes = 0

    def run(self, name: str, act: Callable[[], T]) -> T:
        before, began, worked = _peak_from_now(), time.perf_counter(), time.process_time()
        value = act()
        seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - worked, peak_resident_bytes()
        self.measured[name] = {"seconds": seconds, "cpu_seconds": cpu_seconds, "additional_bytes": peak - before}
        self.peak_bytes = max(self.peak_bytes, peak - self._base)
        return value


def _peak_from_now() -> int:
    """Let the kernel count the peak anew; returns what is in memory now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_resident_bytes()


def parts(config: RunConfig, ranks: int, folder: Path) -> dict[str, Any]:
    """Make what every rank brings; seconds and memory are those of one of them, in the middle."""
    layout, phases = Layout.of(config, ranks), Phases()
    sizes, boxes_count, values = [], 0, 0
    with open(folder / PARTS, "wb") as file:
        for rank in range(ranks):
            pieces = [piece for piece in pieces_of(config, layout, rank) if piece.writer]

            def brought(rank: int = rank, pieces: list[Piece] = pieces) -> bytes:
                boxes = packed_boxes(rank, ((piece.name, piece.shape, piece.box) for piece in pieces))
                numel = sum(piece.box.numel for piece in pieces)
                return pickle.dumps((boxes, StoredFile(size_bytes=VALUE_BYTES * numel, xxh3=f"{rank:016x}")))

            part = phases.run("pack the boxes", brought) if rank == ranks // 2 else brought()
            file.write(struct.pack("<Q", len(part)) + part)
            sizes.append(len(part))
            boxes_count += len(pieces)
            values += sum(piece.box.numel for piece in pieces)
    return {
        "phases": phases.measured,
        "boxes": boxes_count,
        "state_bytes": VALUE_BYTES * values,
        "largest_part_bytes": max(sizes),
        "parts_bytes": sum(sizes),
    }


def save(config: RunConfig, ranks: int, folder: Path) -> dict[str, Any]:
    """What the first rank does when all have written their files."""
    phases = Phases()

    def received() -> list[tuple[bytes, StoredFile]]:
        everyone = []
        with open(folder / PARTS, "rb") as file:
            while head := file.read(8):
                everyone.append(pickle.loads(file.read(*struct.unpack("<Q", head))))
        return everyone

    everyone = phases.run("receive", received)
    parameters = phases.run("unpack, merge", lambda: stored_parameters(boxes for boxes, _ in everyone))
    index = phases.run(
        "check",
        lambda: CheckpointIndex(
            step=1,
            model=config.model,
            sequence_length=config.data.sequence_length,
            trainer=TrainState().state_dict(),
            engine={},
            config=config,
            block_bytes=BLOCK_BYTES,
            files=[stored for _, stored in everyone],
            parameters=parameters,
        ),
    )
    phases.run("serialise, hash, fsync", lambda: write_index(folder, index))
    return {
        "phases": phases.measured,
        "peak_bytes": phases.peak_bytes,
        "index_bytes": (folder / INDEX_NAME).stat().st_size,
    }


def load(config: RunConfig, ranks: int, folder: Path) -> dict[str, Any]:
    """What each rank of a resume does before it reads its values; here one in the middle."""
    pieces = pieces_of(config, Layout.of(config, ranks), ranks // 2)
    path, phases = folder / INDEX_NAME, Phases()
    raw = phases.run("read", path.read_bytes)
    index = phases.run("hash, parse, check", lambda: parse_index(raw, path))
    copies = phases.run("plan the copies of one rank", lambda: plan_copies(index, pieces))
    return {
        "phases": phases.measured,
        "peak_bytes": phases.peak_bytes,
        "pieces": len(pieces),
        "copies": sum(len(of_file) for of_file in copies.values()),
        "files": len(copies),
    }


ROLES: dict[str, Callable[[RunConfig, int, Path], dict[str, Any]]] = {"parts": parts, "save": save, "load": load}


def main() -> None:
    """Play one role."""
    answers = Answers()
    role, config_path, ranks, folder = sys.argv[1:]
    config = RunConfig.model_validate_json(Path(config_path).read_text(encoding="utf-8"))
    answers.say(**ROLES[role](config, int(ranks), Path(folder)))


if __name__ == "__main__":
    main()
