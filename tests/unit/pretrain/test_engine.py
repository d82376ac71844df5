"""The step's one read by the host, counted; updates that are left out; and the status that ranks agree on."""

from typing import Any

import pytest
import torch

from pretrain.engine import StepStats, agree, build_decoder
from pretrain.engine_torch import TorchEngine
from tests.small_run import MODELS, rank_batches, small_config
from tests.step_counts import host_reads

CPU = torch.device("cpu")


def test_one_host_read_a_step() -> None:
    config = small_config("precision=fp32")
    engine = TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    batches = rank_batches(config, 0, 0, 1)
    with host_reads() as reads:
        agree(engine.train_step(batches, 1e-3))
    assert reads == {"tolist": 1}
    with host_reads() as reads:
        engine.train_step(batches, 1e-3)
        engine.train_step(batches, 1e-3, skip=True)
    assert not reads


def state(engine: TorchEngine) -> list[torch.Tensor]:
    """All that a step changes."""
    views = [view for piece in engine.pieces() for view in piece.views.values()]
    steps = [state["step"] for state in engine.optimizer.state.values()]
    return [tensor.clone() for tensor in (*views, *steps, *engine.decoder.parameters())]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("how", ["asked", "gradient", "loss"])
def test_a_skipped_update_changes_nothing(how: str, optimizer: str, precision: str) -> None:
    config = small_config(f"precision={precision}", f"optimizer.name={optimizer}", f"model.moe={MODELS['moebias']}")
    engine = TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    batches = rank_batches(config, 0, 0, 1)
    for step in range(3):
        before = state(engine)
        norm = engine.decoder.norm.weight
        broken: Any = []
        if how == "gradient" and step < 2:
            broken = [norm.register_hook(lambda gradient: gradient * torch.inf)]
        if how == "loss" and step < 2:
            hook = engine.decoder.register_forward_hook(lambda *call: call[2]._replace(nll=call[2].nll * torch.nan))
            broken = [hook]
        status = agree(engine.train_step(batches, 0.1, skip=how == "asked" and step < 2))
        for handle in broken:
            handle.remove()
        assert status.finite == (how == "asked" or step == 2)
        assert sum(map(sum, status.expert_load)) == 2 * 8 * 24
        unchanged = [torch.equal(a, b) for a, b in zip(before, state(engine), strict=True)]
        assert all(unchanged) if step < 2 else not any(unchanged)
    assert engine.scalars() == {"optimizer_steps": 1}


def test_status() -> None:
    stats = StepStats(torch.tensor(30.0), torch.tensor(10.0), torch.tensor(2.0))
    status = agree(stats, stop=True, data_seconds=0.5, memory_bytes=7)
    assert status == (3.0, 10, 2.0, True, False, False, 0.5, 7, [])
    assert status.finite
    assert not agree(stats._replace(grad_norm=torch.tensor(float("inf")))).finite
    assert not agree(stats._replace(nll=torch.tensor(float("nan")))).finite
