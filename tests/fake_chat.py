"""OpenAI-compatible chat endpoint on loopback, with faults on request."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeChat:
    """Server whose `reply(message, body)` returns the answer's text, and `fault(n, body)` a fault of the n-th call.

    A fault is a status, `(status, headers)`, `"drop"`, `"html"`, or seconds as a float to wait.
    """

    def __init__(self, reply: Callable[[str, dict], str]) -> None:
        self.reply = reply
        self.fault: Callable[[int, dict], Any] = lambda n, body: None
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.busy = self.busiest = 0
        self.lock = threading.Lock()
        server = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 128, "handle_error": lambda *_: None})
        self._http = server(("127.0.0.1", 0), _handler(self))
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def _handler(fake: FakeChat) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                number = len(fake.bodies)
                fake.bodies.append(body)
                fake.headers.append(dict(self.headers))
                fake.paths.append(self.path)
                fake.busy += 1
                fake.busiest = max(fake.busy, fake.busiest)
            try:
                self.answer(body, fake.fault(number, body))
            finally:
                fake.busy -= 1

        def answer(self, body: dict, fault: Any) -> None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            if isinstance(status, float):
                time.sleep(status)
            if status == "drop":
                self.close_connection = True
                return
            if isinstance(status, int):
                told = f"on purpose, with {self.headers.get('Authorization')}"
                self.send(status, json.dumps({"error": {"message": told}}), headers)
                return
            content = fake.reply(body["messages"][-1]["content"], body)
            answer = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
            self.send(200, "<html>" if status == "html" else json.dumps(answer), {})

        def send(self, status: int, text: str, headers: dict[str, str]) -> None:
            payload = text.encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waited
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

    return Handler


@contextmanager
def chatting(reply: Callable[[str, dict], str]) -> Iterator[FakeChat]:
    fake = FakeChat(reply)
    try:
        yield fake
    finally:
        fake.stop()
