"""One rank's checkpoints: committed or absent, checked before use, pruned from the oldest."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain import checkpoint as module
from pretrain.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    read_index,
    read_weights,
    save_checkpoint,
)
from pretrain.engine import build_decoder
from pretrain.engine_torch import TorchEngine
from pretrain.state import TrainState
from tests.small_run import rank_batches, small_config

CPU = torch.device("cpu")


@pytest.fixture
def engine() -> TorchEngine:
    """After two steps."""
    config = small_config("precision=fp32")
    made = TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    for step in range(2):
        made.train_step(rank_batches(config, step, 0, 1), 1e-2)
    return made


def save(folder: Path, engine: TorchEngine, step: int) -> Path:
    return save_checkpoint(folder, engine, TrainState(step=step), engine.config, "fingerprint", None)


def edit(checkpoint: Path, **changes: Any) -> None:
    path = checkpoint / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_is_saved_is_what_is_loaded(engine: TorchEngine, tmp_path: Path) -> None:
    path = save(tmp_path, engine, 2)
    assert path.name == "step_00000002"
    index = read_index(path)
    assert (index.step, index.tokenizer_fingerprint, index.config) == (2, "fingerprint", engine.config)
    fresh = TorchEngine(build_decoder(engine.config, CPU, torch.float32), engine.config, CPU)
    assert load_checkpoint(path, fresh) == TrainState(step=2)
    for saved, loaded in zip(engine.pieces(), fresh.pieces(), strict=True):
        for kind in ("fp32", "exp_avg", "exp_avg_sq"):
            assert torch.equal(saved.views[kind], loaded.views[kind]), (saved.name, kind)
    assert fresh.scalars() == engine.scalars() == {"optimizer_steps": 2}
    for name, weight in read_weights(path).items():
        assert torch.equal(weight, engine.masters[name])


def test_any_reader_opens_it(engine: TorchEngine, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(save(tmp_path, engine, 2) / "rank-00000.safetensors")
    assert torch.equal(tensors["fp32/norm.weight@0"], engine.masters["norm.weight"])
    assert (tmp_path / "step_00000002" / "rank-00000.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_failed_save_leaves_the_older_one(
    engine: TorchEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save(tmp_path, engine, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="rank 0 could not write the checkpoint: No space left"):
        save(tmp_path, engine, 2)
    assert newest_checkpoint(tmp_path) == old
    monkeypatch.undo()
    new = save(tmp_path, engine, 3)
    assert newest_checkpoint(tmp_path) == new
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]


def test_a_step_made_again_replaces_its_checkpoint(engine: TorchEngine, tmp_path: Path) -> None:
    save(tmp_path, engine, 2)
    engine.train_step(rank_batches(engine.config, 2, 0, 1), 1e-2)
    path = save(tmp_path, engine, 2)
    assert torch.equal(read_weights(path)["norm.weight"], engine.masters["norm.weight"])


def test_pruning_keeps_the_newest(engine: TorchEngine, tmp_path: Path) -> None:
    for step in (9, 10, 11, 100_000_000):
        save(tmp_path, engine, step)  # keeps 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000011", "step_100000000"]


def test_pruning_never_takes_a_torn_future_for_the_newest(engine: TorchEngine, tmp_path: Path) -> None:
    """Resumed before a torn checkpoint: it is not what is kept when the run saves again."""
    for step in (8, 12):
        save(tmp_path, engine, step)
    (tmp_path / "step_00000012" / "rank-00000.safetensors").unlink()
    (tmp_path / "step_00000012.tmp").mkdir()
    save(tmp_path, engine, 10)
    prune_checkpoints(tmp_path, 10, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000010"]


def test_no_usable_checkpoint_is_an_error(engine: TorchEngine, tmp_path: Path) -> None:
    path = save(tmp_path, engine, 8)
    for content, words in (("[]", "is not a checkpoint's index"), ('{"format": 1}', "it lacks"), ("{", "is damaged")):
        (path / "index.json").write_text(content)
        with pytest.raises(ValueError, match="none of the checkpoints") as caught:
            newest_checkpoint(tmp_path)
        assert words in str(caught.value)


def test_the_newest_that_is_whole_is_found(engine: TorchEngine, tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none") is None
    engine.config = small_config("checkpoint.keep=9")
    paths = [save(tmp_path, engine, step) for step in (1, 2, 3, 4)]
    shutil.copytree(paths[3], tmp_path / "step_00000005.tmp")
    (paths[3] / "index.json").write_text('{"format": 1, "st')
    (paths[2] / "rank-00000.safetensors").unlink()
    passed_over: list[str] = []
    assert newest_checkpoint(tmp_path, passed_over) == paths[1]
    assert "index.json is damaged" in passed_over[0]
    assert "rank-00000.safetensors is missing" in passed_over[1]


def test_what_does_not_fit_is_refused(engine: TorchEngine, tmp_path: Path) -> None:
    path = save(tmp_path, engine, 1)
    index = json.loads((path / "index.json").read_text())
    edit(path, format=99)
    with pytest.raises(ValueError, match="has checkpoint format 99, this version reads 1"):
        read_index(path)
    edit(path, format=1, parameters={**index["parameters"], "norm.weight": {"shape": [3], "boxes": []}})
    with pytest.raises(ValueError, match=r"holds shape \[3\] for norm.weight"):
        load_checkpoint(path, engine)
    edit(path, parameters={**index["parameters"], "norm.weight": {"shape": [32], "boxes": []}})
    with pytest.raises(ValueError, match="covers 0 of 32 values of norm.weight"):
        load_checkpoint(path, engine)
    edit(path, parameters={key: value for key, value in index["parameters"].items() if key != "norm.weight"})
    with pytest.raises(ValueError, match="holds nothing for norm.weight"):
        load_checkpoint(path, engine)
