import errno
import time

import pytest

from data_pipeline import retries
from data_pipeline.retries import MissingFileError, RemoteError, retried


def failing(calls: list[Exception], error: Exception) -> int:
    calls.append(error)
    raise error


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_SECONDS", 0.001)
    monkeypatch.setattr(retries, "ATTEMPTS", 4)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("error", "raised", "times"),
    [
        (ZeroDivisionError("ours"), ZeroDivisionError, 1),
        (ValueError("theirs"), ValueError, 1),
        (FileNotFoundError("gone"), MissingFileError, 1),
        (PermissionError(errno.EACCES, "no"), ValueError, 1),
        (OSError(errno.EIO, "disk"), RemoteError, 4),
        (TimeoutError(), RemoteError, 4),
        (ConnectionResetError(), RemoteError, 4),
    ],
)
def test_retries_are_for_networks_and_disks_only(error: Exception, raised: type[Exception], times: int) -> None:
    calls: list[Exception] = []
    with pytest.raises(raised) as caught:
        retried("working", lambda: failing(calls, error))
    assert caught.type is raised
    assert len(calls) == times


@pytest.mark.usefixtures("quick")
def test_what_was_retried_is_not_retried_again() -> None:
    calls: list[Exception] = []
    with pytest.raises(RemoteError, match="^inner failed 4 times"):
        retried("outer", lambda: retried("inner", lambda: failing(calls, OSError("disk"))))
    assert len(calls) == 4


def test_waits_grow_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    with pytest.raises(RemoteError):
        retried("working", lambda: failing([], TimeoutError()))
    assert len(waits) == retries.ATTEMPTS - 1
    full = [min(retries.FIRST_WAIT_SECONDS * 2**i, retries.LONGEST_WAIT_SECONDS) for i in range(len(waits))]
    assert all(wait / 2 <= waited <= wait for waited, wait in zip(waits, full, strict=True))
    assert len({waited / wait for waited, wait in zip(waits, full, strict=True)}) > 1


@pytest.mark.usefixtures("quick")
def test_what_takes_long_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(RemoteError):
        retried("reading s3://b/x", lambda: failing([], TimeoutError()))
    (record,) = caplog.records
    assert record.getMessage().startswith("reading s3://b/x failed: no answer in 30 s; trying again")
