"""Servers of chat completions: one that says what it is told to, and transformers' own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Chat completions on a free port.

    `say(body, count)` is asked for the count-th time about the same messages and gives
    a text, or (status, body), or bytes that are sent with too great a length.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, say):
        super().__init__(("127.0.0.1", 0), Handler)
        self.say, self.bodies, self.lock = say, [], threading.Lock()
        self.asked: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, address):
        """A client that hung up or was killed is what these tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps(body["messages"])
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.asked[key] += 1
            count = self.server.asked[key]
        said = self.server.say(body, count)
        status, content, length = 200, said, None
        if isinstance(said, tuple):
            status, content = said
        elif isinstance(said, bytes):
            length = len(said) + 1000
        else:
            message = {"role": "assistant", "content": said}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            content = json.dumps({"choices": [choice]}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def transformers_server(log: Path, *arguments: str):
    """`transformers serve` on a free port, its output in `log`; gives the base URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", "127.0.0.1", "--port", port, "--device", "cpu", *arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen, log: Path, seconds: int = 180):
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError):
            return urllib.request.urlopen(url, timeout=5).read()
        stopped = server.poll() is not None
        assert not stopped and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.5)
