"""The oracle behind OpenAI's chat API, on this machine alone: for trying everything that talks to a judge's server.

`python -m synpo.miniature.server --port 8010`, then `--judge oracle --judge_url http://127.0.0.1:8010/v1`.
It reads the judge's questions as a language model does: criterion, captions and references from the words of the
prompt. For factuality the references are the truth: what most of them tell.
"""

import argparse
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ..judge import CRITERIA
from .oracle import common_facts, rate
from .world import FACTS

_FENCED = re.compile(r"<<< (caption|reference|instruction) (\S+)\n(.*?)\n>>> \1 \2\n", re.DOTALL)
_LARGEST = 10_000_000  # bytes of a request


def reply(messages: Sequence[Mapping[str, Any]]) -> str:
    """The answer to a judge's question, as JSON. Errors: ValueError for anything that is no such question."""
    prompt = messages[-1]["content"] if messages else None
    criterion = None
    if isinstance(prompt, str):
        criterion = next((c for c in CRITERIA.values() if prompt.startswith(c.rubric)), None)
    if criterion is None:
        raise ValueError("the last message is no question of synpo.judge about a criterion known here")
    fenced = _FENCED.findall(prompt)
    captions = {name: text for kind, name, text in fenced if kind == "caption"}
    truth = common_facts([text for kind, _, text in fenced if kind == "reference"])
    if criterion.references and truth.keys() != FACTS.keys():
        raise ValueError(f"the references tell nothing about {sorted(FACTS.keys() - truth.keys())}")
    scores = rate(criterion.name, list(captions.values()), truth)
    given = [{"id": name, "score": score} for name, score in zip(captions, scores, strict=True)]
    return json.dumps({"reason": "read off the captions", "scores": given})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        try:
            length = int(self.headers.get("Content-Length", ""))
            if not 0 < length <= _LARGEST:
                raise ValueError(f"a request has 1 to {_LARGEST} bytes")
            request = json.loads(self.rfile.read(length))
            text = reply(request["messages"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self.close_connection = True  # what was not read of the request would be taken for the next one
            self._send(400, {"error": {"message": f"{type(error).__name__}: {error}", "type": "invalid_request"}})
            return
        message = {"role": "assistant", "content": text}
        usage = dict.fromkeys(("prompt_tokens", "completion_tokens", "total_tokens"), 0)
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        kind = {"id": "oracle", "object": "chat.completion", "created": 0, "model": "oracle"}
        self._send(200, {**kind, "choices": choices, "usage": usage})

    def _send(self, status: int, body: Mapping[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """One line a request would drown everything else."""


def make_server(port: int = 0) -> ThreadingHTTPServer:
    """A server on 127.0.0.1; port 0 takes a free one. Call its serve_forever, shutdown, server_close."""
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.daemon_threads = True
    return server


@contextmanager
def serving() -> Iterator[str]:
    """The server in a thread, for as long as the context lasts; yields the address for --judge_url."""
    server = make_server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8010, help="port on 127.0.0.1 (default 8010; 0: a free one)")
    server = make_server(parser.parse_args().port)
    print(f"http://127.0.0.1:{server.server_port}/v1", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


if __name__ == "__main__":
    main()
