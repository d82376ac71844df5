"""What `deterministic: true` sets; that it changes no bit between ranks is in tests/dist/test_communication.py."""

import os
import re
from collections.abc import Iterator

import pytest
import torch

from pretrain.device import (
    DETERMINISTIC_SETTINGS,
    is_processor,
    make_deterministic,
    overlaps_communication,
)
from pretrain.environment import describe_environment

PROCESSOR, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither torch nor the environment asks for anything, before and after."""
    for name in DETERMINISTIC_SETTINGS:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def test_kinds_of_devices() -> None:
    assert is_processor(PROCESSOR)
    assert not overlaps_communication(PROCESSOR)
    assert not is_processor(GPU)
    assert overlaps_communication(GPU)


@pytest.mark.usefixtures("clean")
def test_deterministic_kernels_and_communication() -> None:
    assert not describe_environment(PROCESSOR, 1)["deterministic"]
    make_deterministic()
    assert describe_environment(PROCESSOR, 1)["deterministic"]
    # Warnings alone would leave flash attention's backward as it is.
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch._inductor.config.deterministic
    assert {name: os.environ[name] for name in DETERMINISTIC_SETTINGS} == {
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "NCCL_ALGO": "Ring",
        "NCCL_PROTO": "Simple",
    }


@pytest.mark.usefixtures("clean")
def test_the_environment_may_choose_what_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_PROTO", "LL128")
    make_deterministic()
    assert os.environ["NCCL_PROTO"] == "LL128"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [("NCCL_ALGO", "NVLS", "Ring"), ("NCCL_ALGO", "Tree", "Ring"), ("NCCL_PROTO", "^LL", "Simple or LL or LL128")],
)
@pytest.mark.usefixtures("clean")
def test_an_environment_that_asks_for_the_contrary_is_refused(
    name: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    told = re.escape(f"does not go with {name}={value} in the environment: unset it, or make it {remedy}")
    with pytest.raises(ValueError, match=f"deterministic=true {told}$"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
