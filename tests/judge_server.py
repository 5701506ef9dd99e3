"""A judge on this machine: a real server that answers as a test says."""

import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

GOOD = {"supported": 5, "complete": 3, "self_contained": 4}


def completion(content):
    return 200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


@pytest.fixture
def server():
    """Yield a server that answers by its list `replies`, the last one again and again."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.requests.append((self.path, dict(self.headers), body))
            number = min(len(self.server.requests), len(self.server.replies)) - 1
            reply = self.server.replies[number]
            reply = reply(body) if callable(reply) else reply
            if reply is None:  # hang up
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            status, headers, data = reply
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments):
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.requests, found.replies = [], [completion(json.dumps(GOOD))]
    thread = threading.Thread(target=found.serve_forever, args=(0.01,))
    thread.start()
    yield found
    found.shutdown()
    thread.join()
    found.server_close()
