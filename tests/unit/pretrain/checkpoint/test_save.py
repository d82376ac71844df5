"""Saving while training goes on: what is saved is the state at the start, whole or not at all."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer_files import fingerprint_of
from pretrain.boxes import Box, Piece
from pretrain.checkpoint.folder import checkpoint_path, list_checkpoints, newest_checkpoint
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.load import load_newest
from pretrain.checkpoint.read import read_weights
from pretrain.checkpoint.save import CheckpointError, CheckpointSaver, Saved, Staging, save_checkpoint
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.state import TrainState
from tests.small_run import small_config
from tests.unit.pretrain.checkpoint.made import (
    CPU,
    RANK_FILE,
    contents,
    differing,
    new_engine,
    save,
    state_of,
    stored_in,
    train,
)

DELAY_SECONDS = 0.2


class HeldStaging(Staging):
    """Does not begin before it is told to, takes its time, and notes where it has copied to."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.released = threading.Event()
        self.buffers: list[int] = []

    def copied(self, views: list[Tensor]) -> list[Tensor]:
        assert self.released.wait(60)
        time.sleep(DELAY_SECONDS)
        buffer = super().copied(views)
        self.buffers.append(buffer[0].data_ptr())
        return buffer


class Run:
    """A saver, its staging and its reports."""

    def __init__(self, folder: Path, engine: TorchEngine, *overrides: str, tokenizer: Path | None = None) -> None:
        self.reports: list[Saved] = []
        self.losses: dict[int, float] = {}
        config = small_config("precision=fp32", *overrides)
        self.saver = CheckpointSaver(folder, engine, config, tokenizer, None, self.losses, self.reports.append)
        self.staging = self.saver.staging = HeldStaging(CPU)


def save_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def run(folder: Path, engine: TorchEngine) -> Iterator[Run]:
    """Asynchronous, as a run is by default."""
    made = Run(folder, engine)
    with closing(made.saver):
        yield made
        made.staging.released.set()


@pytest.mark.parametrize("waits", [True, False])
def test_what_is_saved_is_the_state_at_the_start(waits: bool, run: Run, engine: TorchEngine, folder: Path) -> None:
    """And would not be, if the update did not wait for staging."""
    state, at_start = TrainState(step=2, position=16, tokens=384), state_of(engine)
    run.saver.start(state)

    def before_update() -> None:
        run.staging.released.set()
        run.saver.staged()

    state.advance(8, 8 * 24)
    train(engine, 2, before_update if waits else lambda: None)
    run.staging.released.set()
    train(engine, 3, run.saver.staged)
    run.saver.wait()
    checkpoint = checkpoint_path(folder, 2)
    stored, (report,) = stored_in(checkpoint, at_start), run.reports
    assert (differing(stored, at_start) == []) == waits
    assert differing(stored, state_of(engine)) != []
    index = read_index(checkpoint)
    assert (index.trainer, index.engine) == (TrainState(2, 16, 384).state_dict(), {"optimizer_steps": 2})
    assert report.failure is None
    assert report.stall_seconds > DELAY_SECONDS / 2
    assert report.seconds > DELAY_SECONDS


def test_training_goes_on_while_it_is_written(run: Run, engine: TorchEngine, folder: Path) -> None:
    run.saver.start(TrainState(step=2))
    assert len(save_threads()) == 1
    run.saver.poll()
    assert run.reports == []
    assert not folder.exists()
    run.staging.released.set()
    run.saver.staged()
    deadline = time.monotonic() + 60
    while not run.reports and time.monotonic() < deadline:
        train(engine, 2)
        run.saver.poll()
    (report,) = run.reports
    assert report == Saved(
        2, checkpoint_path(folder, 2), None, None, report.stall_seconds, report.seconds, report.size_bytes
    )
    assert report.size_bytes == (checkpoint_path(folder, 2) / RANK_FILE).stat().st_size
    assert save_threads() == []
    for again in (run.saver.poll, run.saver.wait, run.saver.staged, run.saver.close):
        again()
    assert run.reports == [report]


def test_one_save_at_a_time(run: Run, engine: TorchEngine, folder: Path) -> None:
    """And the second is staged in the memory of the first."""
    run.saver.start(TrainState(step=2))
    threading.Timer(0.1, run.staging.released.set).start()
    began = time.perf_counter()
    run.saver.start(TrainState(step=3))
    waited = time.perf_counter() - began
    assert [report.step for report in run.reports] == [2]
    assert newest_checkpoint(folder) == checkpoint_path(folder, 2)
    assert len(save_threads()) <= 1
    run.saver.wait()
    assert [(report.step, report.failure) for report in run.reports] == [(2, None), (3, None)]
    assert min(waited, run.reports[1].stall_seconds) > DELAY_SECONDS / 2
    assert len(run.staging.buffers) == 2
    assert len(set(run.staging.buffers)) == 1
    assert differing(stored_in(checkpoint_path(folder, 3), state_of(engine)), state_of(engine)) == []


def test_a_saver_that_is_closed_has_saved(folder: Path, engine: TorchEngine) -> None:
    run = Run(folder, engine)
    run.staging.released.set()
    with closing(run.saver):
        run.saver.start(TrainState(step=2))
    assert newest_checkpoint(folder) == checkpoint_path(folder, 2)
    assert [report.step for report in run.reports] == [2]


@pytest.mark.parametrize("model", ["null", "{experts: 4, experts_per_token: 2, expert_ffn_size: 16, balance: bias}"])
def test_asynchronous_or_not_the_files_are_the_same(model: str, tmp_path: Path, tokenizer: Path) -> None:
    engine = new_engine("precision=bf16", f"model.moe={model}")
    train(engine, 0)
    saved = []
    for asynchronous in ("true", "false"):
        settings = ("precision=bf16", f"model.moe={model}", f"checkpoint.asynchronous={asynchronous}")
        saved.append(save(tmp_path / asynchronous, engine, 1, tokenizer, *settings))
    one, other = (contents(path) for path in saved)
    assert one.keys() == other.keys() == {"index.json", RANK_FILE, "tokenizer.model"}
    assert one[RANK_FILE] == other[RANK_FILE]
    assert one["tokenizer.model"] == other["tokenizer.model"] == tokenizer.read_bytes()
    indices = [read_index(path).model_dump() for path in saved]
    assert [index["config"]["checkpoint"].pop("asynchronous") for index in indices] == [True, False]
    assert indices[0] == indices[1]
    assert indices[0]["tokenizer_fingerprint"] == fingerprint_of(tokenizer)


def test_a_blocking_save_is_over_when_it_returns(folder: Path, engine: TorchEngine) -> None:
    run = Run(folder, engine, "checkpoint.asynchronous=false")
    run.saver.start(TrainState(step=2))
    assert newest_checkpoint(folder) == checkpoint_path(folder, 2)
    run.saver.poll()
    (report,) = run.reports
    assert report.stall_seconds >= report.seconds > 0
    assert run.staging.buffers == []  # no memory of its own


@pytest.fixture(params=["true", "false"], ids=["asynchronous", "blocking"])
def either(request: pytest.FixtureRequest, folder: Path, engine: TorchEngine) -> Run:
    """A run of either kind, whose saves nothing holds."""
    made = Run(folder, engine, f"checkpoint.asynchronous={request.param}", "checkpoint.keep=9")
    made.staging.released.set()
    return made


def check_failed_and_then_succeeds(either: Run, folder: Path, words: str, remedy: Callable[[], object]) -> None:
    """A save of step 3 fails beside the checkpoint of step 2, one of step 4 does not."""
    untouched = contents(checkpoint_path(folder, 2)) if folder.is_dir() else None
    either.saver.start(TrainState(step=3))
    either.saver.staged()
    with pytest.raises(CheckpointError, match=f"rank 0 could not write the checkpoint of step 3: {words}") as caught:
        either.saver.wait()
    assert isinstance(caught.value, OSError)
    assert "\n" not in str(caught.value)
    report = either.reports[-1]
    assert (report.step, report.failure, report.size_bytes) == (3, str(caught.value), 0)
    assert save_threads() == []
    either.saver.close()  # says nothing more
    remedy()
    assert newest_checkpoint(folder) == checkpoint_path(folder, 2)
    assert untouched is None or contents(checkpoint_path(folder, 2)) == untouched
    either.saver.start(TrainState(step=4))
    either.saver.wait()
    assert either.reports[-1].failure is None
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002", "step_00000004"]
    assert list(folder.glob("*.tmp")) == []


def test_a_failed_save_leaves_the_older_one(either: Run, folder: Path, tmp_path: Path) -> None:
    either.saver.start(TrainState(step=2))
    either.saver.wait()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("not a folder")

    def remedy() -> None:
        folder.unlink()
        (tmp_path / "elsewhere").rename(folder)

    check_failed_and_then_succeeds(either, folder, f"{folder}: File exists", remedy)


def test_a_full_disk_leaves_the_older_one(small_disk: Path, either: Run, engine: TorchEngine) -> None:
    """There is room for two: with the ballast, for one and a part."""
    either.saver.folder = folder = small_disk / "checkpoints"
    either.saver.start(TrainState(step=2))
    either.saver.wait()
    size = either.reports[0].size_bytes
    assert 2 * size < 1 << 20
    (small_disk / "ballast").write_bytes(bytes((1 << 20) - 3 * size // 2))
    words = f"{folder / 'step_00000003.tmp' / RANK_FILE}: No space left on device"
    check_failed_and_then_succeeds(either, folder, words, (small_disk / "ballast").unlink)


def test_a_tokenizer_that_is_gone_is_named(either: Run, folder: Path, tokenizer: Path, tmp_path: Path) -> None:
    either.saver.tokenizer = tokenizer
    either.saver.start(TrainState(step=2))
    either.saver.wait()
    gone = tokenizer.rename(tmp_path / "gone")
    words = f"{tokenizer}: No such file or directory"
    check_failed_and_then_succeeds(either, folder, words, lambda: gone.rename(tokenizer))


def test_a_mistake_of_ours_is_told_like_the_rest(either: Run, folder: Path, engine: TorchEngine) -> None:
    """Whatever it is: training goes on, and the next save may do better."""
    either.saver.start(TrainState(step=2))
    either.saver.wait()
    config, either.saver.config = either.saver.config, small_config("precision=fp32")
    either.saver.config = config.model_copy(update={"data": None})
    words = "AttributeError: 'NoneType' object has no attribute 'sequence_length'"
    check_failed_and_then_succeeds(either, folder, words, lambda: vars(either.saver).update(config=config))


def test_what_cannot_be_removed_is_a_note(either: Run, folder: Path) -> None:
    either.saver.config = small_config("precision=fp32", "checkpoint.keep=1")
    folder.mkdir()
    (folder / "step_00000001").write_text("no folder, and so not removed like one")
    either.saver.start(TrainState(step=2))
    either.saver.wait()
    (report,) = either.reports
    assert report.failure is None
    assert report.note is not None
    assert "Not a directory" in report.note
    assert "step_00000001" in report.note
    assert newest_checkpoint(folder) == checkpoint_path(folder, 2)
    either.saver.start(TrainState(step=3))
    either.saver.wait()
    assert (either.reports[-1].failure, either.reports[-1].note) == (None, None)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000003"]


def test_a_step_made_again_replaces_its_checkpoint(either: Run, engine: TorchEngine, folder: Path) -> None:
    for step in (2, 2):
        train(engine, 5)
        either.saver.start(TrainState(step=step))
        either.saver.wait()
    assert differing(stored_in(checkpoint_path(folder, 2), state_of(engine)), state_of(engine)) == []
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002"]


def test_losses_that_come_later_are_seen(engine: TorchEngine, folder: Path) -> None:
    """A checkpoint is saved before its validation loss is known; and a run begins with none."""
    run = Run(
        folder,
        engine,
        "evaluation={every_steps: 1, sources: [{name: a, path: b}]}",
        "schedule.total_steps=9",
        "checkpoint={every_steps: 1, keep: 1, keep_best: true, asynchronous: false}",
    )
    for step, loss in ((1, 5.0), (2, 3.0), (3, float("nan")), (4, 4.0), (5, 3.5)):
        run.saver.start(TrainState(step=step))
        run.saver.poll()
        run.losses[step] = loss
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000002", "step_00000005"]
    assert all(report.note is None for report in run.reports)


def test_leftovers_of_a_save_that_was_cut_short_go(engine: TorchEngine, folder: Path) -> None:
    for name in ("step_00000002.tmp", "step_00000007.tmp"):
        (folder / name).mkdir(parents=True)
        (folder / name / RANK_FILE).write_text("torn")
    save(folder, engine, 2)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002"]
    fresh = new_engine("precision=fp32")
    assert load_newest(folder, fresh, None).state == TrainState(step=2)
    assert differing(state_of(fresh), state_of(engine)) == []


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_permissions_are_the_ones_of_the_users_umask(
    umask: int, engine: TorchEngine, folder: Path, tokenizer: Path
) -> None:
    before = os.umask(umask)
    try:
        checkpoint = save(folder, engine, 2, tokenizer)
    finally:
        os.umask(before)
    assert checkpoint.stat().st_mode & 0o777 == 0o777 & ~umask
    for path in checkpoint.iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask, path.name


def test_the_blocking_form(engine: TorchEngine, folder: Path) -> None:
    path = save_checkpoint(folder, engine, TrainState(step=2), engine.config, None, None)
    assert path == checkpoint_path(folder, 2)
    assert read_index(path).tokenizer_fingerprint is None
    for name, weight in read_weights(path).items():
        assert torch.equal(weight, engine.masters[name])
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("")
    with pytest.raises(CheckpointError, match="rank 0 could not write the checkpoint of step 3"):
        save_checkpoint(folder, engine, TrainState(step=3), engine.config, None, None)


def test_staging_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Staging, "PIECE", 100)
    views = [torch.randn(size) for size in ((7, 9), (1,), (250,), (3, 4, 5), (99,))]
    staging = Staging(CPU)
    for _ in range(2):
        pieces = staging.copied(views)
        assert torch.equal(torch.cat(pieces), torch.cat([view.flatten() for view in views]))
        assert [len(piece) for piece in pieces] == [100, 100, 100, 100, 73]


class Forgetful(TorchEngine):
    """Does not show all that it holds."""

    def pieces(self) -> list[Piece]:
        return [piece for piece in super().pieces() if piece.name != "norm.weight"]


class Greedy(TorchEngine):
    """Shows a part as if it were the whole."""

    def pieces(self) -> list[Piece]:
        first, *rest = super().pieces()
        box = Box(first.box.offset, (first.box.size[0] - 1, *first.box.size[1:]))
        return [Piece(first.name, first.shape, box, True, {k: v[:-1] for k, v in first.views.items()}), *rest]


@pytest.mark.parametrize(("kind", "words"), [(Forgetful, "not of the model"), (Greedy, "values in boxes, of")])
def test_what_could_not_be_loaded_is_never_committed(
    kind: type[TorchEngine], words: str, engine: TorchEngine, folder: Path
) -> None:
    """A fault of ours fails the save, not the resume."""
    older = save(folder, engine, 1)
    faulty = kind(build_decoder(engine.config, CPU, torch.float32), engine.config, CPU)
    with pytest.raises(CheckpointError, match=words):
        save(folder, faulty, 2)
    assert list_checkpoints(folder) == [older]


def test_a_thread_that_does_not_start_leaves_nothing_to_wait_for(
    run: Run, engine: TorchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", failing)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            run.saver.start(TrainState(step=1))
    run.saver.close()


def test_ranks_that_lost_touch_end_the_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unlike a failure that they have agreed on: the group that they talk over is dead for good."""

    def broken(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr("pretrain.checkpoint.save.gathered_by_first", broken)
    run.staging.released.set()
    run.saver.start(TrainState(step=1))
    with pytest.raises(CheckpointError, match="Connection closed by peer"):
        until(run.saver.poll)


def until(act: Callable[[], None]) -> None:
    """Do it again and again; it is to raise."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        act()
        time.sleep(0.01)
