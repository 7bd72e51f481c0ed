"""`python -m tests.pairs.real_server MODEL.gguf`: a real video, a tiny captioner, and llama.cpp's server as the judge.

Needs the package xllamacpp, which is no dependency of the tests. The captions are words without sense; what is tried is
the way from a video to scores through a server that nobody here wrote: schemas, refusals of forms, truncated answers.
"""

import json
import logging
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

import xllamacpp

from synpo import cli
from synpo.judge import AnswerCache
from tests.caption import tiny
from tests.video.films import real


def start(model: str) -> xllamacpp.Server:
    """Listens on a free port of the loopback; two requests at once."""
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.warmup = 8192, 2, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames, params.port = ["127.0.0.1"], 0
    return xllamacpp.Server(params)


def main(gguf: str) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("httpx", "httpx2", "openai"):
        logging.getLogger(name).setLevel(logging.WARNING)
    server = start(gguf)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        tiny.save_llava(root / "model")
        (root / "videos").mkdir()
        (root / "videos" / "bikes.mp4").symlink_to(real("bikes"))
        words = ["pairs", "--videos", str(root / "videos"), "--model", str(root / "model"), "--out", str(root / "out")]
        words += ["--judge", Path(gguf).stem, "--judge_url", f"{server.listening_address}/v1", "--concurrency", "2"]
        words += ["--judge_options", '{"max_tokens": 400}', "--candidates", "3", "--num_frames", "2"]
        words += ["--max_new_tokens", "12", "--min_score_gap", "0.1"]
        for run in ("first", "second"):
            code = cli.main(words)
            cache = AnswerCache(root / "out" / "judge.sqlite")
            print(f"{run} run: exit code {code}, {len(cache)} answers kept")
            cache.export(root / "answers.jsonl")
            cache.close()
        answers = [json.loads(line) for line in (root / "answers.jsonl").read_text().splitlines()]
        print("finish reasons:", dict(Counter(answer["finish_reason"] for answer in answers)))
        for answer in answers:
            print(f"{answer['purpose']}: {answer['finish_reason']}: {answer['text'][:160]!r}")
        report = json.loads((root / "out" / "report" / "statistics.json").read_text())
        print(json.dumps({name: report[name] for name in ("candidates", "scores", "lost", "judge_problems", "cost")}))
    sys.stdout.flush()
    os._exit(0)  # the server's threads do not end by themselves


if __name__ == "__main__":
    main(sys.argv[1])
