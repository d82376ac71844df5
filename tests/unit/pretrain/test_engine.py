"""The step's one read by the host, counted; and the status that ranks agree on."""

from collections import Counter

import pytest
import torch

from pretrain.engine import StepStats, agree, build_decoder
from pretrain.engine_torch import TorchEngine
from tests.small_run import rank_batches, small_config

CPU = torch.device("cpu")
READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts every way in which the host can read a tensor's value."""
    counts: Counter[str] = Counter()
    for name in READS:
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: object, name: str = name, original: object = original) -> object:
            counts[name] += 1
            return original(self, *args)  # type: ignore[operator]

        monkeypatch.setattr(torch.Tensor, name, counted)
    return counts


def test_one_host_read_a_step(reads: Counter[str]) -> None:
    config = small_config("precision=fp32")
    engine = TorchEngine(build_decoder(config, CPU, torch.float32), config, CPU)
    batches = rank_batches(config, 0, 0, 1)
    reads.clear()
    agree(engine.train_step(batches, 1e-3))
    assert reads == {"tolist": 1}
    reads.clear()
    engine.train_step(batches, 1e-3)
    assert not reads


def test_status() -> None:
    stats = StepStats(torch.tensor(30.0), torch.tensor(10.0), torch.tensor(2.0))
    status = agree(stats, stop=True, data_seconds=0.5, memory_bytes=7)
    assert status == (3.0, 10, 2.0, True, False, 0.5, 7, [])
    assert status.finite
    assert not agree(stats._replace(grad_norm=torch.tensor(float("inf")))).finite
    assert not agree(stats._replace(nll=torch.tensor(float("nan")))).finite
