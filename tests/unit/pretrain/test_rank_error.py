"""What a rank says when it cannot go on; memory that runs out, however that is raised."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.hang import HANG
from pretrain.rank_error import OUT_OF_MEMORY, is_out_of_memory, memory_hint, write_rank_error
from pretrain.recipe import dump_config, load_config
from pretrain.run_dir import RunDir, read_json, write_json
from tests.small_run import RECIPE, SMALL


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir(tmp_path)
    made.logs.mkdir()
    dump_config(load_config(RECIPE, [*SMALL]), made.config_path)
    return made


def raised_by(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        act()
    return caught.value


def more_than_any_machine_has() -> object:
    return torch.empty(1 << 55, dtype=torch.float32)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(raised_by(more_than_any_machine_has), id="torch's allocator on the host"),
        pytest.param(raised_by(lambda: bytearray(1 << 62)), id="Python's"),
        pytest.param(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), id="a GPU's"),
        pytest.param(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), id="CUDA"),
        pytest.param(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), id="the kernel"),
    ],
)
def test_memory_that_runs_out(run: RunDir, error: Exception) -> None:
    write_rank_error(run, 1, error)
    said = read_json(run.rank_error(1))
    assert (said["type"], said["exit_code"]) == (OUT_OF_MEMORY, 1)
    assert "`steppe plan` says what a rank needs" in said["message"]
    assert "batch.micro_batch_size (now 2)" in said["message"]
    assert said["message"].count("\n") == 0


def test_what_torch_says_of_its_allocator_is_left_out(run: RunDir) -> None:
    long = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
        "free. Of the allocated memory 70.00 GiB is allocated by PyTorch. If reserved but unallocated memory is large "
        "try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
    )
    write_rank_error(run, 0, torch.OutOfMemoryError(long))
    message = read_json(run.rank_error(0))["message"]
    assert message.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB")
    assert "1.00 GiB is free; `steppe plan`" in message


def test_the_hint_names_only_what_can_be_changed() -> None:
    config = load_config(RECIPE, [*SMALL])
    assert memory_hint(config) == (
        "`steppe plan` says what a rank needs; less with a higher parallel.zero_stage (now 1), "
        "parallel.activation_checkpointing=full (now none), a smaller batch.micro_batch_size (now 2), "
        "more ranks, or a higher parallel.tensor"
    )
    least = ("parallel={zero_stage: 3, activation_checkpointing: full}", "batch.micro_batch_size=1")
    assert memory_hint(load_config(RECIPE, [*SMALL, *least])).endswith(
        "less with more ranks, or a higher parallel.tensor"
    )


def test_other_errors_are_told_as_they_are(run: RunDir) -> None:
    for error in (RuntimeError("connection closed by peer"), OSError(errno.ENOSPC, "No space left on device")):
        assert not is_out_of_memory(error)
        run.rank_error(0).unlink(missing_ok=True)
        write_rank_error(run, 0, error)
        assert read_json(run.rank_error(0)) == {"exit_code": 1, "type": type(error).__name__, "message": str(error)}


def test_without_a_config_there_is_no_hint(run: RunDir) -> None:
    run.config_path.unlink()
    write_rank_error(run, 0, MemoryError())
    assert read_json(run.rank_error(0))["message"] == "MemoryError"


def test_what_the_watchdog_has_written_stays(run: RunDir) -> None:
    """The complaint of a rank whose peers its own hang has ended is not the cause."""
    write_json(run.rank_error(0), {"type": HANG})
    write_rank_error(run, 0, RuntimeError("connection closed by peer"))
    assert read_json(run.rank_error(0)) == {"type": HANG}
