"""Loading: the newest that verifies, wholly; older ones after it; and never from scratch unasked."""

import functools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.tokenizer_files import fingerprint_of
from model.parameters import buffer_shapes, parameter_shapes
from pretrain.checkpoint.commit import write_weights
from pretrain.checkpoint.folder import list_checkpoints, list_damaged
from pretrain.checkpoint.index import DamagedError, read_index
from pretrain.checkpoint.load import load_checkpoint, load_initial_weights, load_newest
from pretrain.checkpoint.read import read_weights
from pretrain.checkpoint.save import save_checkpoint
from pretrain.data_stages import DataStage, Place
from pretrain.engine_torch import TorchEngine
from pretrain.state import TrainState
from tests.checkpoint_edit import edit_index
from tests.small_run import MODELS
from tests.unit.pretrain.checkpoint.made import (
    DAMAGE,
    State,
    contents,
    differing,
    new_engine,
    save,
    state_of,
    train,
)

FP32 = "precision=fp32"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, State]]:
    """A folder with the checkpoints of steps 2 and 3, which no test changes, and the states at these steps."""
    folder, engine, states = tmp_path_factory.mktemp("saved"), new_engine(FP32), {}
    (folder / "tokenizer").write_bytes(b"a tokenizer")
    for step in (1, 2, 3):
        train(engine, step - 1)
        if step > 1:
            save(folder / "checkpoints", engine, step, folder / "tokenizer")
            states[step] = state_of(engine)
    return folder / "checkpoints", states


@pytest.fixture
def two(saved: tuple[Path, dict[int, State]], tmp_path: Path) -> tuple[Path, dict[int, State]]:
    """A copy of it, to damage."""
    return shutil.copytree(saved[0], tmp_path / "checkpoints"), saved[1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", MODELS)
def test_what_is_saved_is_what_is_loaded(model: str, precision: str, tokenizer: Path, tmp_path: Path) -> None:
    overrides = (f"model.moe={MODELS[model]}", f"precision={precision}")
    engine, fresh = new_engine(*overrides), new_engine(*overrides, "seed=9")
    for step in range(2):
        train(engine, step)
    stages = [
        DataStage(Place(), {"a": 0.25, "b": 0.75}, 24, 8, ((100, 4),), {"a": 2}),
        DataStage(Place(1, 9, 216), {"a": 1.0}, 48, 4, ()),
    ]
    state = TrainState(2, 17, 408, stages)
    path = save_checkpoint(tmp_path, engine, state, engine.config, tokenizer, None)
    assert path.name == "step_00000002"
    index = read_index(path)
    assert (index.step, index.tokenizer_fingerprint, index.config) == (2, fingerprint_of(tokenizer), engine.config)
    assert (path / "tokenizer.model").read_bytes() == tokenizer.read_bytes()
    assert len(differing(state_of(engine), state_of(fresh))) > 20
    assert load_checkpoint(path, fresh) == state
    assert differing(state_of(engine), state_of(fresh)) == []
    assert fresh.scalars() == engine.scalars() == {"optimizer_steps": 2}
    train(engine, 2)
    train(fresh, 2)
    assert differing(state_of(engine), state_of(fresh)) == []
    assert torch.equal(engine.decoder.norm.weight, fresh.decoder.norm.weight)


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_passed_over_and_set_aside(kind: str, two: tuple[Path, dict[int, State]]) -> None:
    """What goes on is wholly the older one, though some of the newer had been loaded when the damage was found."""
    folder, states = two
    old, new = list_checkpoints(folder)
    untouched = contents(old)
    damage, words = DAMAGE[kind]
    damage(new)
    damaged = contents(new) if new.is_dir() else None
    alone, engine = new_engine(FP32, "seed=8"), new_engine(FP32, "seed=9")
    if new.is_dir():
        with pytest.raises(DamagedError) as caught:
            load_checkpoint(new, engine)
        assert words in str(caught.value)
    assert load_checkpoint(old, alone) == TrainState(step=2)
    restored = load_newest(folder, engine, None)
    assert (restored.state, restored.checkpoint) == (TrainState(step=2), old)
    (reason,) = restored.passed_over
    assert words in reason
    assert str(new) in reason
    assert "\n" not in reason
    assert differing(state_of(engine), states[2]) == []
    assert engine.scalars() == {"optimizer_steps": 2}
    for each in (engine, alone):
        train(each, 2)
    assert differing(state_of(engine), state_of(alone)) == []
    assert contents(old) == untouched
    assert list_checkpoints(folder) == [old]
    (aside,) = list_damaged(folder)
    assert aside.name == "step_00000003.damaged"
    assert damaged is None or contents(aside) == damaged


def test_another_versions_checkpoint_is_neither_passed_over_nor_set_aside(two: tuple[Path, dict[int, State]]) -> None:
    """It is no damage: an older Steppe must not go back, and in time remove what a newer one has learnt."""
    folder, _ = two
    edit_index(list_checkpoints(folder)[1], lambda index: index.update(format=3))
    before = contents(folder)
    with pytest.raises(ValueError, match="checkpoint format 3, this version of Steppe reads 2"):
        load_newest(folder, new_engine(FP32), None)
    assert contents(folder) == before


def test_the_newest_is_taken_and_nothing_is_renamed(two: tuple[Path, dict[int, State]]) -> None:
    folder, states = two
    before = contents(folder)
    fresh = new_engine(FP32, "seed=9")
    restored = load_newest(folder, fresh, None)
    assert (restored.state.step, restored.checkpoint, restored.passed_over) == (3, list_checkpoints(folder)[1], [])
    assert differing(state_of(fresh), states[3]) == []
    assert contents(folder) == before


def test_one_that_had_made_way_is_loaded(two: tuple[Path, dict[int, State]]) -> None:
    """Killed between the two renames of a save that replaces a checkpoint, a run still has it."""
    folder, states = two
    newest = list_checkpoints(folder)[1]
    newest.rename(folder / f"{newest.name}.replaced.tmp")
    fresh = new_engine(FP32)
    assert load_newest(folder, fresh, None).checkpoint == newest
    assert differing(state_of(fresh), states[3]) == []


def test_several_are_passed_over(two: tuple[Path, dict[int, State]], engine: TorchEngine, tokenizer: Path) -> None:
    folder, states = two
    for step, kind in ((4, "value"), (5, "index")):
        DAMAGE[kind][0](save(folder, engine, step, tokenizer, "checkpoint.keep=9"))
    DAMAGE["no-file"][0](list_checkpoints(folder)[1])
    (folder / "step_00000006.tmp").mkdir()
    fresh = new_engine(FP32)
    restored = load_newest(folder, fresh, None)
    assert restored.state.step == 2
    words = ["index.json is damaged", "fails its hash", "is missing, expected"]
    # In the order in which they were found: an index is looked at before any value is read.
    assert all(any(word in reason for reason in restored.passed_over) for word in words)
    assert [path.name for path in list_damaged(folder)] == [f"step_0000000{step}.damaged" for step in (3, 4, 5)]
    assert differing(state_of(fresh), states[2]) == []


@pytest.mark.parametrize("kinds", [("value", "value"), ("no-index", "value"), ("value", "no-index"), ("cut", "index")])
def test_none_is_whole(kinds: tuple[str, str], two: tuple[Path, dict[int, State]]) -> None:
    """What was learnt is not thrown away unasked, and nothing is renamed."""
    folder, _ = two
    checkpoints = list_checkpoints(folder)
    for checkpoint, kind in zip(checkpoints, kinds, strict=True):
        DAMAGE[kind][0](checkpoint)
    before = contents(folder)
    with pytest.raises(ValueError, match="none of the checkpoints in .* can be used") as caught:
        load_newest(folder, new_engine(FP32), None)
    for checkpoint, kind in zip(checkpoints, kinds, strict=True):
        assert str(checkpoint) in str(caught.value)
        assert DAMAGE[kind][1] in str(caught.value)
    assert "or move the folder away to train from scratch" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


def test_without_checkpoints_a_run_begins(engine: TorchEngine, tmp_path: Path) -> None:
    before = state_of(engine)
    (tmp_path / "step_00000004.tmp").mkdir()
    (tmp_path / "step_00000003.damaged").mkdir()
    (tmp_path / "latest").write_text("step_00000004\n")
    for folder in (tmp_path, tmp_path / "nowhere"):
        restored = load_newest(folder, engine, None)
        assert (restored.state, restored.checkpoint, restored.passed_over) == (TrainState(), None, [])
    assert differing(state_of(engine), before) == []


def test_another_model_is_refused_not_passed_over(two: tuple[Path, dict[int, State]]) -> None:
    folder, _ = two
    before = contents(folder)
    wider = new_engine(FP32, "model.ffn_size=64")
    newest = list_checkpoints(folder)[1]
    words = rf"{newest} does not fit: it holds shape \[48, 32\] for .*, the model's config says \[64, 32\]"
    for load in (
        lambda: load_newest(folder, wider, None),
        lambda: load_checkpoint(newest, wider),
        lambda: load_initial_weights(newest, wider, None),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            load()
        assert not isinstance(caught.value, DamagedError)
    assert contents(folder) == before


def put_norm(stored: dict[str, list[int]], index: dict[str, Any]) -> None:
    index["parameters"]["norm.weight"] = stored


def test_what_an_index_lacks(engine: TorchEngine, tmp_path: Path) -> None:
    path = save(tmp_path, engine, 1)
    lacking: list[tuple[dict[str, list[int]], str]] = [
        ({"shape": [3], "boxes": []}, r"does not fit: it holds shape \[3\] for norm.weight"),
        ({"shape": [32], "boxes": []}, "covers 0 of 32 values of norm.weight"),
        ({"shape": [32], "boxes": [0, 4, 28]}, "covers 28 of 32 values of norm.weight"),
        ({"shape": [32], "boxes": [0, 0, 4, 0, 4, 28]}, r"does not hold fp32/norm.weight@0 of shape \[4\]"),
    ]
    for stored, words in lacking:
        edit_index(path, functools.partial(put_norm, stored))
        with pytest.raises(ValueError, match=words):
            load_checkpoint(path, engine)
    edit_index(path, lambda index: index["parameters"].pop("norm.weight"))
    with pytest.raises(ValueError, match="does not fit: it holds nothing for norm.weight"):
        load_checkpoint(path, engine)


@pytest.fixture
def weights_alone(tokenizer: Path, tmp_path: Path) -> tuple[Path, TorchEngine]:
    """A checkpoint as an import makes one, and the engine whose weights it holds."""
    source = new_engine(FP32, f"model.moe={MODELS['moebias']}", "seed=5")
    train(source, 0)
    weights = {piece.name: piece.views["fp32"] for piece in source.pieces()}
    path = tmp_path / "imported" / "step_00000000"
    model = source.config.model
    asked: list[str] = []

    def tensors(name: str) -> Tensor:
        asked.append(name)
        return weights[name]

    write_weights(path, model, 24, tokenizer, tensors)
    assert asked == [*parameter_shapes(model), *buffer_shapes(model)]
    return path, source


def test_weights_alone_are_what_was_given(weights_alone: tuple[Path, TorchEngine], tokenizer: Path) -> None:
    path, source = weights_alone
    index = read_index(path)
    assert (index.step, index.trainer, index.engine, index.config) == (0, None, None, None)
    assert (index.model, index.tokenizer_fingerprint) == (source.config.model, fingerprint_of(tokenizer))
    weights = read_weights(path)
    assert weights.keys() == {piece.name for piece in source.pieces()}
    for piece in source.pieces():
        assert torch.equal(weights[piece.name], piece.views["fp32"])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_weights_alone_are_no_run_to_resume(weights_alone: tuple[Path, TorchEngine]) -> None:
    path, engine = weights_alone
    before, untouched = state_of(engine), contents(path)
    words = f"{path} holds weights alone: start a run from it with --set init_from={path}"
    for load in (lambda: load_checkpoint(path, engine), lambda: load_newest(path.parent, engine, None)):
        with pytest.raises(ValueError, match=words) as caught:
            load()
        assert not isinstance(caught.value, DamagedError)
    assert differing(state_of(engine), before) == []
    assert contents(path) == untouched


def test_a_run_starts_from_weights(weights_alone: tuple[Path, TorchEngine], tmp_path: Path) -> None:
    """An imported checkpoint's, and a run's, of which the optimizer's state stays behind."""
    imported, source = weights_alone
    for path in (imported, save(tmp_path, source, 1)):
        engine = new_engine("precision=bf16", f"model.moe={MODELS['moebias']}", "seed=6")
        load_initial_weights(path, engine, None)
        assert engine.scalars() == {"optimizer_steps": 0}
        for got, expected in zip(engine.pieces(), source.pieces(), strict=True):
            assert torch.equal(got.views["fp32"], expected.views["fp32"]), got.name
            assert all(not view.any() for kind, view in got.views.items() if kind != "fp32")
        for name, parameter in engine.decoder.named_parameters():
            assert torch.equal(parameter, source.masters[name].to(parameter.dtype)), name


@pytest.mark.parametrize("kind", ["value", "hash", "no-file", "index", "no-tokenizer"])
def test_damaged_weights_are_refused(kind: str, weights_alone: tuple[Path, TorchEngine]) -> None:
    path, engine = weights_alone
    damage, words = DAMAGE[kind]
    damage(path)
    with pytest.raises(DamagedError) as caught:
        load_initial_weights(path, engine, None)
    assert words in str(caught.value)
