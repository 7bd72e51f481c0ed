"""A server on 127.0.0.1 that speaks OpenAI's chat API: it judges by hashes of the captions, or fails as it is told."""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from synpo.judge import CRITERIA, Criterion

FENCED = re.compile(r"<<< (caption|reference|instruction) (\S+)\n(.*?)\n>>> \1 \2\n", re.DOTALL)
Reply = tuple[int, dict[str, str], bytes]  # status, headers, body


def read_question(messages: list[dict[str, Any]]) -> tuple[Criterion, dict[str, str]]:
    """The criterion, and caption by identifier, of a question as a model sees it."""
    prompt = messages[-1]["content"]
    criterion = next(c for c in CRITERIA.values() if c.rubric in prompt)
    return criterion, {name: text for kind, name, text in FENCED.findall(prompt) if kind == "caption"}


def true_score(criterion: Criterion, text: str) -> int:
    """What this judge thinks of a text."""
    number = hashlib.sha256(f"{criterion.name}:{text}".encode()).digest()[0]
    return criterion.scale[number % len(criterion.scale)]


def verdict(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """A right answer."""
    criterion, captions = read_question(messages)
    scores = [{"id": name, "score": true_score(criterion, text)} for name, text in captions.items()]
    return {"reason": "as seen", "scores": scores}


def completion(text: str | None, finish_reason: str = "stop", refusal: str | None = None, usage: Any = True) -> Reply:
    """A chat completion as OpenAI's servers send it."""
    message = {"role": "assistant", "content": text, "refusal": refusal}
    body: dict[str, Any] = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "loopback",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
    }
    if usage:
        body["usage"] = {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120} if usage is True else usage
    return 200, {}, json.dumps(body).encode()


def judged(request: dict[str, Any], headers: dict[str, str]) -> Reply:
    return completion(json.dumps(verdict(request["messages"])))


class Loopback(ThreadingHTTPServer):
    """`handle_chat` makes the reply; `requests` are the bodies that came in, `busiest` how many were open at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, handle_chat: Callable[[dict[str, Any], dict[str, str]], Reply], keep: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.handle_chat, self.keep = handle_chat, keep
        self.requests: list[dict[str, Any]] = []
        self.count = self.open = self.busiest = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Loopback

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.count += 1
            server.open += 1
            server.busiest = max(server.busiest, server.open)
            if server.keep:
                server.requests.append(request)
        try:
            status, headers, body = server.handle_chat(
                request, {name.lower(): value for name, value in self.headers.items()}
            )
        finally:
            with server.lock:
                server.open -= 1
        head = {"Content-Type": "application/json", "Content-Length": str(len(body))} | headers
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in head.items()), "", ""]
        self.wfile.write("\r\n".join(lines).encode() + body)
        if len(body) != int(head["Content-Length"]):
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving(
    handle_chat: Callable[[dict[str, Any], dict[str, str]], Reply] = judged, **options: Any
) -> Iterator[Loopback]:
    server = Loopback(handle_chat, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
