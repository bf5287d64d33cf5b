"""A real HTTP server on loopback that gives files out, and misbehaves as it is told."""

from __future__ import annotations

import contextlib
import gzip
import re
import socket
import struct
import threading
import urllib.parse
from collections import Counter, deque
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class FaultyServer(ThreadingHTTPServer):
    """Serves the files of `root`. The faults of a path, one per request, are used up in order:

    a number     that status
    reset        half of the bytes, then a TCP reset
    truncate     half of the bytes, then an orderly end
    trickle      one byte at a time, for ever (until the server ends)
    hang         no answer (until the server ends)
    gate         half of the bytes; the rest when `gate` is set
    wrong        as many other bytes
    longer       one byte more
    gzip         compressed, though nobody asked for it
    elsewhere    a redirect to the same path under /elsewhere, with a signature
    fine         no fault
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, root: Path, ranges: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.ranges = root, ranges
        self.faults: dict[str, deque[str]] = {}
        self.gets: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        self.queries: set[str] = set()
        self.most_at_once = self._at_once = 0
        self.gate, self.half_sent, self.stopped = threading.Event(), threading.Event(), threading.Event()
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def misbehave(self, path: str, *faults: str) -> None:
        self.faults[path] = deque(faults)

    def begin(self, path: str, headers: dict[str, str]) -> str:
        with self._lock:
            self.gets[path] += 1
            self.requests.append((path, headers.get("Range", "")))
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            faults = self.faults.get(path)
            return faults.popleft() if faults else "fine"

    def end(self) -> None:
        with self._lock:
            self._at_once -= 1

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        asked = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(asked.path).lstrip("/")
        self.server.queries.add(asked.query)
        fault = self.server.begin(path, dict(self.headers))
        try:
            self._answer(path, fault)
        finally:
            self.server.end()

    def _answer(self, path: str, fault: str) -> None:
        if fault == "hang":
            self.server.stopped.wait()
            return
        if fault == "elsewhere":
            self.send_response(302)
            self.send_header("Location", f"{self.server.url}/elsewhere/{path}?sig=siGnEd")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        file = self.server.root / path.removeprefix("elsewhere/")
        if fault.isdecimal() or not file.is_file():
            self.send_response(int(fault) if fault.isdecimal() else 404)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"oh!\n")
            return
        body = file.read_bytes()
        if fault == "wrong":
            body = bytes(255 - byte for byte in body)
        if fault == "longer":
            body += b"!"
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.server.ranges:
            start, last = int(asked[1]), int(asked[2] or len(body) - 1)
            self.send_response(206)
            last = min(last, len(body) - 1)
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(body)}")
            body = body[start : last + 1]
        else:
            self.send_response(200)
        if fault == "gzip":
            body = gzip.compress(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(body, fault)

    def _send(self, body: bytes, fault: str) -> None:
        half = len(body) // 2
        if fault in ("fine", "wrong", "longer", "gzip"):
            self.wfile.write(body)
            return
        if fault == "trickle":
            for byte in body:
                if self.server.stopped.wait(0.01):
                    return
                self.wfile.write(bytes([byte]))
            return
        self.wfile.write(body[:half])
        self.wfile.flush()
        self.server.half_sent.set()
        if fault == "gate":
            self.server.gate.wait()
            self.wfile.write(body[half:])
            return
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_WR) if fault == "truncate" else self.connection.close()


@contextlib.contextmanager
def serving(root: Path, ranges: bool = True) -> Iterator[FaultyServer]:
    server = FaultyServer(root, ranges)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.gate.set()
        server.shutdown()
        server.server_close()
        thread.join()
