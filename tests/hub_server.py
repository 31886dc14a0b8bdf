"""A hub with one data set on 127.0.0.1: the file protocol behind loading by hub id.

Knows the requests that huggingface_hub makes for a data set, and counts the bytes of
files that it sends (GET /sent tells). Knows nothing of what the files hold.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """Serves `files` (path → content) as the data set `repo`.

    `endpoint` goes into HF_ENDPOINT; `sent` counts bytes of file content; `unknown`
    lists the requests that are not in its part of the protocol.
    """

    def __init__(self, repo: str, files: dict[str, bytes]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repo, self.files = repo, files
        self.sent, self.unknown, self.lock = 0, [], threading.Lock()

    def tree(self, folder: str) -> list[dict]:
        """How the API lists a folder: its files and the folders one level down."""
        start = folder + "/" if folder else ""
        names = [p.removeprefix(start) for p in self.files if p.startswith(start)]
        folders = {name.split("/")[0] for name in names if "/" in name}
        entries = [
            {"type": "directory", "path": start + name, "oid": COMMIT}
            for name in folders
        ]
        for name in names:
            if "/" not in name:
                size, oid = (
                    len(self.files[start + name]),
                    _oid(self.files[start + name]),
                )
                lfs = {"oid": oid, "size": size, "pointerSize": 130}
                entry = {"type": "file", "path": start + name, "size": size, "oid": oid}
                entries.append(entry | {"lfs": lfs})
        return entries


@contextmanager
def serve(repo: str, files: dict[str, bytes]) -> Iterator[HubServer]:
    """Run a `HubServer` in a thread of this process."""
    with HubServer(repo, files) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _oid(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        repo = re.fullmatch(r"/(?:api/)?datasets/([^/]+/[^/]+)(/.*)?", path)
        if path == "/sent":
            return self._json(hub.sent)
        if repo and repo[1] != hub.repo:  # what strangers are told of private ones too
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"})
        action, _, rest = (repo[2] or "")[1:].partition("/") if repo else ("?", "", "")
        name = rest.partition("/")[2]  # after the revision
        if action == "resolve":
            return self._file(name)
        if action == "tree":
            return self._json(hub.tree(name))
        if action in ("", "revision"):
            files = [{"rfilename": file} for file in hub.files]
            return self._json({"id": hub.repo, "sha": COMMIT, "siblings": files})
        hub.unknown.append(f"{self.command} {self.path}")
        self.close_connection = True  # a body may follow
        return self._send(501, b"", {})

    do_HEAD = do_POST = do_GET

    def _file(self, name: str):
        """A file, or the range of it that was asked for."""
        if name not in self.server.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        content = self.server.files[name]
        headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["ETag"] = f'"{_oid(content)}"'
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            first, last = int(asked[1]), int(asked[2] or len(content) - 1)
            part = content[first : last + 1]
            span = f"bytes {first}-{first + len(part) - 1}/{len(content)}"
            headers["Content-Range"] = span
        else:
            part = content
        if self.command == "GET":
            with self.server.lock:
                self.server.sent += len(part)
        return self._send(206 if asked else 200, part, headers)

    def _json(self, value):
        body, kind = json.dumps(value).encode(), {"Content-Type": "application/json"}
        self._send(200, body, kind)

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        """Requests are not news; `unknown` keeps those that are."""
