"""What a failure of a store is, and whether and how often the same is tried again.

The libraries below raise what they like for a connection that breaks or a status of 503; here each is told apart.
"""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

READ_SECONDS = 30
"""For the next bytes to come, not for a whole body."""
ATTEMPTS = 8
FIRST_WAIT_SECONDS = 0.5
LONGEST_WAIT_SECONDS = 30.0
"""Waits double from the first up to this: 8 attempts wait for 60 s in all, which most outages of a store end within."""

SAID_FROM = 3
"""The attempt whose failure is told, though there will be others."""
LOG = logging.getLogger("steppe")

NETWORK_LIBRARIES = ("aiohttp", "aiobotocore", "botocore", "urllib3", "requests", "gcsfs", "http")
"""Errors of these are failures of the network, unless they carry a status that says otherwise."""
PASSING_STATUSES = (408, 409, 425, 429)
"""Client errors that a retry may mend: time-out, conflict, too early, too many requests. Those from 500 on do, too."""

Result = TypeVar("Result")


class RemoteError(OSError):
    """A file could not be read although it was tried again and again; a later run may succeed."""


class MissingFileError(ValueError):
    """A path names nothing."""


def retried(what: str, call: Callable[[], Result]) -> Result:
    """Call until it succeeds, with exponentially growing and jittered waits between the attempts.

    Args:
        what: what the call does, as an error says it: "reading s3://bucket/name".
        call: what is done; it may raise anything. Time-outs, connections that break, short bodies and statuses from
            500 on are tried again, statuses that say that asking again is useless are not, nor is what is no failure
            of a network or a disk.

    Raises:
        ValueError: there is no such file (`MissingFileError`), or access to it is refused.
        RemoteError: the last attempt failed, too.
    """
    began = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return call()
        except Exception as error:
            if permanent := _permanent(error):
                raise permanent(f"{what} failed: {_cause(error)}") from error
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS:
                seconds = time.monotonic() - began
                raise RemoteError(
                    f"{what} failed {ATTEMPTS} times in {seconds:.0f} s, at last by: {_cause(error)}"
                ) from error
            if attempt == SAID_FROM:  # the first may pass unseen; then a person wonders what takes so long
                LOG.warning("%s failed: %s; trying again, %d times at most", what, _cause(error), ATTEMPTS)
        wait = min(FIRST_WAIT_SECONDS * 2 ** (attempt - 1), LONGEST_WAIT_SECONDS)
        time.sleep(random.uniform(wait / 2, wait))  # so that the ranks of a cluster do not all come back at once
    raise AssertionError("unreachable: the last attempt returns or raises")


def _permanent(error: BaseException) -> type[ValueError] | None:
    """The error to raise at once, where another attempt would end the same way."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return MissingFileError
    if isinstance(error, PermissionError | IsADirectoryError | NotADirectoryError):
        return ValueError
    if "Credentials" in type(error).__name__:  # botocore's NoCredentialsError and its kin
        return ValueError
    if status is not None and 400 <= status < 500 and status not in PASSING_STATUSES:
        return ValueError
    return None


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, OSError):  # TimeoutError and ConnectionError among them
        return not isinstance(error, RemoteError)  # which has been retried already
    return any(base.__module__.partition(".")[0] in NETWORK_LIBRARIES for base in type(error).__mro__)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error stands for: aiohttp's, gcsfs's, or botocore's below s3fs's translation."""
    for name in ("status", "code"):
        if isinstance(status := getattr(error, name, None), int) and 100 <= status < 600:
            return status
    response = getattr(error, "response", getattr(error.__cause__, "response", None))
    if isinstance(response, dict):
        found: int | None = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found
    return None


def _cause(error: BaseException) -> str:
    """One line. aiohttp's own words for a status would show the URL with its signature."""
    status = status_of(error)
    if isinstance(error, FileNotFoundError) or status in (404, 410):
        return "there is no such file"
    if isinstance(error, PermissionError) or status in (401, 403):
        return "access is refused; check the permissions and the credentials"
    if status is not None:
        return f"HTTP status {status}"
    if isinstance(error, TimeoutError):
        return f"no answer in {READ_SECONDS} s"
    return " ".join(str(error).split()) or type(error).__name__
