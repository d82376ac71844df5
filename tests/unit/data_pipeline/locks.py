"""Locks as network file systems grant them, where there is none to try."""

import errno
import fcntl
import os

import pytest


def ask_as_nfs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on a lock is refused where NFSv4 refuses it, which takes flock's for locks of bytes (flock(2), NFS
    details): a shared one needs a file that is open for reading, an exclusive one a file that is open for writing."""
    flock = fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        access = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE
        refused = {fcntl.LOCK_SH: os.O_WRONLY, fcntl.LOCK_EX: os.O_RDONLY}
        if refused.get(operation & ~fcntl.LOCK_NB) == access:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
