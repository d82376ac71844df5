"""A server with the part of the Hugging Face hub's interface through which a dataset is streamed."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.unit.data_pipeline.servers import serving

DATASET = "owner/name"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Holds one dataset, as `files` at one commit. Paths in `busy` answer 503 so many times."""

    url: str

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.busy: Counter[str] = Counter()
        self.requests: list[str] = []


@contextmanager
def hub_server(files: dict[str, bytes]) -> Iterator[HubServer]:
    server = HubServer(files)
    with serving(server) as server.url:
        yield server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *arguments: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        self.server.requests.append(path)
        if self.server.busy[path]:
            self.server.busy[path] -= 1
            self._send(503, b"")
        elif path.startswith(f"/datasets/{DATASET}/resolve/{COMMIT}/"):
            self._file(path.partition(f"{COMMIT}/")[2])
        elif path.startswith(f"/api/datasets/{DATASET}/tree/{COMMIT}"):
            self._tree(path.partition(COMMIT)[2].strip("/"))
        elif path in (f"/api/datasets/{DATASET}", f"/api/datasets/{DATASET}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self.server.files]
            self._json({"id": DATASET, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        else:
            self._send(404, b"", {"X-Error-Code": "RepoNotFound"})

    def _tree(self, folder: str) -> None:
        names = [name for name in self.server.files if name.startswith(folder)]
        if folder:
            self._json([self._entry(name) for name in names])
        else:
            folders = sorted({name.partition("/")[0] for name in names})
            self._json([{"type": "directory", "path": name, "size": 0, "oid": name} for name in folders])

    def _entry(self, name: str) -> dict[str, Any]:
        content = self.server.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def _file(self, name: str) -> None:
        if name not in self.server.files:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        content, status = self.server.files[name], 200
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            whole, content = len(content), content[int(first) : int(last) + 1]
            headers["Content-Range"] = f"bytes {first}-{int(first) + len(content) - 1}/{whole}"
            status = 206
        self._send(status, content, headers)

    def _json(self, tree: Any) -> None:
        self._send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
