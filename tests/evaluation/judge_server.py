"""A chat endpoint on this machine that answers, or misbehaves, as a test says."""

import contextlib
import dataclasses
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from dro_jax.evaluation.llm_judge import REMINDER


@dataclasses.dataclass(frozen=True)
class Request:
    """What arrived, when, and the connection to answer on."""

    handler: BaseHTTPRequestHandler
    number: int
    arrived: float
    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> str:
        (message,) = self.body["messages"]
        assert message["role"] == "user"
        return message["content"]

    @property
    def reminded(self) -> bool:
        return self.question.endswith(REMINDER)

    @property
    def answers(self) -> tuple[str, str]:
        """The responses on the left and on the right."""
        _, _, rest = self.question.partition("\n[Response A]\n")
        left, _, rest = rest.partition("\n\n[Response B]\n")
        right, _, _ = rest.rpartition("\n\n[Your judgement]\n")
        return left, right

    def say(self, text: Any) -> None:
        """Answers with a chat completion."""
        self.send(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def send(self, status: int, body: Any, **headers: str) -> None:
        """Answers with a status and a JSON (or raw) body."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.handler.send_response_only(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(content)))
        self.handler.end_headers()
        self.handler.wfile.write(content)

    def reset(self) -> None:
        """Breaks the connection off."""
        self.handler.close_connection = True
        linger = struct.pack("ii", 1, 0)
        self.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.handler.connection.close()

    def send_half(self) -> None:
        """Promises more than it sends."""
        self.handler.send_response_only(200)
        self.handler.send_header("Content-Length", "1000")
        self.handler.end_headers()
        self.handler.wfile.write(b'{"choices": [{"message": {"content": "Verdict: A"')
        self.handler.close_connection = True

    def drip(self, seconds: float) -> None:
        """Sends a byte now and then."""
        self.handler.send_response_only(200)
        self.handler.send_header("Content-Length", "100000")
        self.handler.end_headers()
        self.handler.close_connection = True
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.handler.wfile.write(b" ")
            time.sleep(0.02)


class JudgeServer:
    """What arrived so far, in order, and the address."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self.requests: list[Request] = []
        self.most_at_once = 0

    @property
    def questions(self) -> list[str]:
        return [request.question for request in self.requests]


@contextlib.contextmanager
def serving(respond: Callable[[Request], None]) -> Iterator[JudgeServer]:
    """Serves /v1/chat/completions; each request is handled in a thread of its own."""
    lock = threading.Lock()
    at_once = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                at_once += 1
                served.most_at_once = max(served.most_at_once, at_once)
                request = Request(
                    self,
                    len(served.requests),
                    time.monotonic(),
                    self.path,
                    {name.lower(): value for name, value in self.headers.items()},
                    body,
                )
                served.requests.append(request)
            try:
                respond(request)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    at_once -= 1

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, *_: Any) -> None:
            # A client that was killed.
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        served = JudgeServer(f"http://127.0.0.1:{server.server_port}/v1")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def prefer_longer(request: Request) -> None:
    """A judge without faults: the longer answer, or a tie."""
    left, right = request.answers
    verdict = "A" if len(left) > len(right) else "B" if len(left) < len(right) else "tie"
    request.say(f"{left} and {right}.\nVerdict: {verdict}")
