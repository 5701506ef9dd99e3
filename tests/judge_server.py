"""A judge, or a writer, on this machine: a real server that answers as a test says."""

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

import pytest

GOOD = {"supported": 5, "complete": 3, "self_contained": 4}


def completion(content):
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


def written(text, finish="stop", **more):
    """Return a writer's answer, as endpoints give them."""
    choice = {
        "index": 0,
        "finish_reason": finish,
        "message": {"role": "assistant", "content": text},
    }
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    answer = {"model": "m-2026", "choices": [choice], "usage": usage, **more}
    return 200, {}, json.dumps(answer).encode()


class Drip(NamedTuple):
    """A response that comes byte by byte from some byte on, until the client is gone."""

    at_once: bytes
    slowly: bytes


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        self.server.requests.append((self.path, dict(self.headers), body))
        number = min(len(self.server.requests), len(self.server.replies)) - 1
        reply = self.server.replies[number]
        reply = reply(body) if callable(reply) else reply
        if reply is None:  # hang up
            self.connection.shutdown(socket.SHUT_RDWR)
        elif isinstance(reply, Drip):
            self.drip(reply)
        else:
            status, headers, data = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # it has read enough
                self.wfile.write(data)

    do_GET = do_POST  # what becomes of a POST that is redirected

    def drip(self, reply):
        try:
            self.wfile.write(reply.at_once)
            for byte in reply.slowly:
                self.wfile.write(bytes([byte]))
                self.server.gone.wait(0.02)
        except ConnectionError:
            self.server.gone.set()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def serving():
    """Yield a server that answers by its list `replies`, the last one again and again."""
    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.replies = [], [completion(json.dumps(GOOD))]
    found.gone = threading.Event()
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield found
    finally:
        found.shutdown()
        thread.join()
        found.server_close()


@pytest.fixture
def server():
    with serving() as found:
        yield found


@pytest.fixture
def other_server():
    with serving() as found:
        yield found
