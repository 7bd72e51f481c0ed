"""`python -m tests.judge.throughput`: judge calls per second, through a server process that answers at once."""

import asyncio
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synpo.judge import FLUENCY, AnswerCache, ChatClient, ModelJudge, Question

from .loopback import Loopback, completion


def at_once(request: dict[str, Any], headers: dict[str, str]):
    """The identifier is read off the prompt's end; finding out what is asked would be the server's time, not ours."""
    prompt = request["messages"][-1]["content"]
    name = prompt[prompt.rindex("<<< caption ") + 12 :].split("\n", 1)[0]
    return completion(f'{{"reason": "as seen", "scores": [{{"id": "{name}", "score": 4}}]}}')


def serve(url: "multiprocessing.Queue[str]") -> None:
    server = Loopback(at_once, keep=False)
    url.put(server.url)
    server.serve_forever()


async def calls_per_second(url: str, cache: AnswerCache, calls: int, concurrency: int) -> float:
    """Each question is another one; scores are checked."""
    judge = ModelJudge(ChatClient("loopback", cache, url=url, concurrency=concurrency))
    await judge.judge(Question(FLUENCY, "Describe.", ("The first request opens a connection.",)))
    began = time.perf_counter()
    questions = [Question(FLUENCY, "Describe.", (f"A cat jumps {number} times. " * 20,)) for number in range(calls)]
    verdicts = await asyncio.gather(*(judge.judge(question) for question in questions))
    seconds = time.perf_counter() - began
    assert all(verdict.scores == (4,) for verdict in verdicts)
    await judge.close()
    return calls / seconds


def main(calls: int = 2000, concurrency: int = 32) -> None:
    context = multiprocessing.get_context("spawn")
    url: multiprocessing.Queue[str] = context.Queue()
    server = context.Process(target=serve, args=(url,), daemon=True)
    server.start()
    with tempfile.TemporaryDirectory() as folder:
        cache = AnswerCache(Path(folder) / "judge.sqlite")
        rate = asyncio.run(calls_per_second(url.get(timeout=30), cache, calls, concurrency))
        print(f"{calls} calls, {concurrency} at once: {rate:.0f} calls/s, {len(cache)} answers on disk")
        cache.close()
    server.terminate()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
