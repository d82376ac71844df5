"""Real servers of files with real faults: over HTTP, and with the S3 protocol."""

import math
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

import pytest
import xxhash

Fault = Literal["503", "403", "404", "429", "reset", "truncated", "short", "stalled", "none"]
STALL_SECONDS = 3.0
PATIENCE_SECONDS = 60.0
"""For what is sure to happen."""


@dataclass(frozen=True)
class Request:
    """One that the server got."""

    method: str
    path: str
    range: str | None


@dataclass
class FileServer:
    """Serves a folder. What it does may be changed at any time."""

    folder: Path
    url: str
    faults: deque[Fault] = field(default_factory=deque)
    """What befalls the next GETs, one each."""
    always: Fault = "none"
    """What befalls all other requests."""
    ranges: bool = True
    sizes: bool = True
    """Whether a whole file is announced with its size; otherwise it ends with the connection."""
    head: bool = True
    latency_seconds: float = 0.0
    etags: dict[str, str] = field(default_factory=dict)
    """By path, where not a hash of the content."""
    requests: list[Request] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _answers: float = math.inf
    """GETs of shards that are answered before others wait."""
    _waiting: int = 0

    def gets(self, suffix: str = "") -> list[Request]:
        return [r for r in self.requests if r.method == "GET" and r.path.endswith(suffix)]

    def hold(self, after: float = 0) -> None:
        """Answer so many more GETs of shards; others wait for `release`."""
        with self._changed:
            self._answers = after

    def release(self) -> None:
        """Answer all that wait, and all to come."""
        with self._changed:
            self._answers = math.inf
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: not self._waiting, PATIENCE_SECONDS)

    def wait_for_gets(self, count: int, suffix: str = "") -> None:
        """Until there have been so many, answered or not."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.gets(suffix)) >= count, PATIENCE_SECONDS)

    def take(self, request: Request) -> None:
        """Note a request; returns when it is to be answered."""
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            if request.method == "GET" and request.path.endswith(".bin"):
                self._waiting += 1
                self._changed.wait_for(lambda: self._answers > 0, PATIENCE_SECONDS)
                self._answers -= 1
                self._waiting -= 1
                self._changed.notify_all()


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """The URL of a server that answers until the end of the context."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def file_server(folder: Path) -> Iterator[FileServer]:
    """A server on a port of its own, until the end of the context."""

    class Handler(_Handler):
        pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            """A connection that breaks is what the tests are about."""

    with serving(Server(("127.0.0.1", 0), Handler)) as url:
        Handler.files = FileServer(folder, url)
        yield Handler.files


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: FileServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.files.head:
            self._answer(body=False)
        else:
            self._refuse(405)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.files.take(Request(self.command, path, self.headers.get("Range")))
        time.sleep(self.files.latency_seconds)
        fault = self.files.faults.popleft() if self.files.faults and body else self.files.always
        if fault.isdecimal():
            return self._refuse(int(fault))
        if fault == "stalled":
            time.sleep(STALL_SECONDS)
        if fault in ("stalled", "reset"):
            # Closed with unsent data thrown away, which is what resets a connection.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return None
        file = self.files.folder / path.lstrip("/")
        if not file.is_file():
            return self._refuse(404)
        return self._send(path, file.read_bytes(), fault, body)

    def _send(self, path: str, whole: bytes, fault: Fault, body: bool) -> None:
        first, last = self._range(len(whole))
        if first is not None and first >= len(whole):
            return self._refuse(416)
        content = whole if first is None else whole[first : last + 1]
        if fault == "short" and body:
            content = content[: len(content) // 2]
        self.send_response(200 if first is None else 206)
        if first is not None:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{len(whole)}")
        self.send_header("ETag", self.files.etags.get(path) or f'"{xxhash.xxh3_64_hexdigest(whole)}"')
        if self.files.sizes:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.close_connection = True
            self.send_header("Connection", "close")
        self.end_headers()
        if not body:
            return None
        if fault == "truncated":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)
        return None

    def _range(self, size: int) -> tuple[int | None, int]:
        asked = self.headers.get("Range")
        if asked is None or not self.files.ranges:
            return None, 0
        first, _, last = asked.removeprefix("bytes=").partition("-")
        return int(first), min(int(last), size - 1) if last else size - 1

    def _refuse(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def s3_server() -> Iterator[str]:
    """An S3 server; its endpoint. `point_at_s3` makes s3fs use it."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def point_at_s3(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """Set what s3fs looks up, as a user would."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
