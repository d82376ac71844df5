"""A checkpoint of any layout loads into any other, and the run goes on as if it had never changed.

The layouts of `reshard_pairs.py`, on 1, 2 and 4 ranks, are trained on real shards with a changing mixture, and saved.
Each goes on from its own checkpoint and from those of others: with all of the state equal in every bit, and then with
the losses and gradient norms of the run that was saved, had it gone on.

fp32: 1e-5. Where rounding to bf16 or fp16 differs, a factor of a gradient is off by up to a unit roundoff u, and so
much was seen on the norm, to which all elements contribute; 4 u are allowed, for a token that goes to another expert.
The loss is a mean, in which most of it cancels (0.01 u was seen): u / 4.
"""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.parameters import buffer_shapes, is_block_matrix, parameter_shapes
from pretrain.checkpoint.folder import checkpoint_path
from pretrain.checkpoint.index import read_index
from pretrain.checkpoint.read import CheckpointReader
from pretrain.optimizers import STATE_KINDS
from tests.conftest import Corpus
from tests.dist.harness import run_cases
from tests.dist.reshard_pairs import LAYOUTS, LOADS, SAME, SAVED_AFTER, Load, SavedLayout, launches

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]  # the first test waits for all the ranks
UNIT_ROUNDOFF = {"fp16": 2.0**-11, "bf16": 2.0**-9}
State = dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reshard")


@pytest.fixture(scope="module")
def results(folder: Path, corpus: Corpus) -> dict[str, Any]:
    """Of every case of every launch, by name."""
    sources = [{"name": "first", "path": str(corpus.train)}, {"name": "second", "path": str(corpus.held_out)}]
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RESHARD_FOLDER", str(folder))
        patch.setenv("RESHARD_CORPUS", f"data.sources={sources}\nmodel.vocab_size=600")
        for number, (world, names) in enumerate(launches()):
            patch.setenv("RESHARD_CASES", "\n".join(names))
            launch = folder / f"launch-{number}"
            launch.mkdir()
            found |= run_cases("tests.dist.reshard_cases", world, launch)
    return found


def read_state(checkpoint: Path) -> State:
    """{(kind, name): tensor} of all that a checkpoint has to hold."""
    with CheckpointReader(checkpoint) as reader:
        index = reader.index
        assert index.config is not None
        parameters, buffers = parameter_shapes(index.model), buffer_shapes(index.model)
        state = {("fp32", name): reader.tensor(name) for name in (*parameters, *buffers)}
        for name, shape in parameters.items():
            muon = index.config.optimizer.name == "muon" and is_block_matrix(name, len(shape))
            for kind in STATE_KINDS["muon" if muon else "adamw"]:
                state[kind, name] = reader.tensor(name, kind)
    return state


def checkpoint_of(folder: Path, case: SavedLayout | Load) -> Path:
    """What a layout saved on its way, or right after a load."""
    return checkpoint_path(folder / case.name, SAVED_AFTER)


@functools.cache
def saved_state(folder: Path, layout: SavedLayout) -> State:
    return read_state(checkpoint_of(folder, layout))


def named(cases: tuple[Any, ...]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("load", named((*SAME, *LOADS)))
def test_all_of_the_state_arrives(results: dict[str, Any], folder: Path, load: Load) -> None:
    saved, found = saved_state(folder, load.source), read_state(checkpoint_of(folder, load))
    assert found.keys() == saved.keys()
    for key, tensor in saved.items():
        assert found[key].view(torch.int32).equal(tensor.view(torch.int32)), key
    index, loaded = read_index(checkpoint_of(folder, load.source)), results[load.name]
    assert index.engine is not None
    assert loaded["trainer"] == index.trainer
    assert loaded["trainer"]["position"] == 8 * SAVED_AFTER
    assert len(loaded["trainer"]["stages"]) == 2
    scaler, saved_scaler = loaded["engine"]["loss_scaler"], index.engine["loss_scaler"]  # of which only fp16 has one
    assert loaded["engine"] | {"loss_scaler": saved_scaler} == index.engine
    assert loaded["engine"]["optimizer_steps"] == SAVED_AFTER
    if load.target.precision == load.source.precision:
        assert scaler == saved_scaler
    if load.target.precision == "fp16":
        assert (scaler["cur_scale"] == 2.0**16) == (load.source.precision != "fp16")  # the first loss scale


@pytest.mark.parametrize("layout", named(LAYOUTS))
def test_the_same_layout_goes_on_bit_for_bit(results: dict[str, Any], layout: SavedLayout) -> None:
    assert results[Load(layout, layout).name]["curve"] == results[layout.name]["curve"][SAVED_AFTER:]


@pytest.mark.parametrize("load", named(LOADS))
def test_another_layout_goes_on_as_the_first_would(results: dict[str, Any], load: Load) -> None:
    found = torch.tensor(results[load.name]["curve"])
    expected = torch.tensor(results[load.source.name]["curve"][SAVED_AFTER:])
    u = max(UNIT_ROUNDOFF.get(layout.precision, 0.0) for layout in load)
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=max(1e-5, u / 4), atol=0)
    torch.testing.assert_close(found[:, 1], expected[:, 1], rtol=max(1e-5, 4 * u), atol=0)


@pytest.mark.parametrize("layout", named(LAYOUTS))
def test_every_layout_saves_the_same_state(results: dict[str, Any], folder: Path, layout: SavedLayout) -> None:
    """Of each tensor by itself, moments and routers too; so what one layout misplaces in the same way when it saves and
    when it loads is found. In bf16 and fp16 a token may go to another expert, of the few that an expert sees here."""
    reference = next(other for other in LAYOUTS if other.family == layout.family and other.precision == "fp32")
    expected, found = saved_state(folder, reference), saved_state(folder, layout)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        rounded = 0.2 if key[0] == "exp_avg_sq" else 0.1  # a square is twice as far off
        limit = 1e-5 if layout.precision == "fp32" else rounded
        assert tensor.norm() > 0
        assert (found[key] - tensor).norm() <= limit * tensor.norm(), key
