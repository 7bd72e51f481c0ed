"""Jobs in a process of their own: one that crashes, hangs or breaks the GPU's context costs itself alone.

A worker is started once, since importing torch and making a CUDA context takes longer than most measurements; it
takes jobs as lines of JSON and answers each with a line. It is replaced after a crash, after a job that passed its
limit, and after an error that left the device unusable.
"""

import contextlib
import gc
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO


class Worker:
    """Runs functions by name, ``module:function``, one at a time; their arguments and results pass through JSON."""

    def __init__(self, log: TextIO, environment: dict[str, str]) -> None:
        """log: where the worker's own output goes; environment: of its process."""
        self._log, self._environment = log, environment
        self._process: subprocess.Popen[str] | None = None

    def run(self, call: str, arguments: dict[str, Any], limit: float) -> tuple[Any, str]:
        """The function's result and "", or None and what went wrong. limit: seconds until the job is given up."""
        process = self._ready()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"call": call, "arguments": arguments}) + "\n")
        process.stdin.flush()
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if not selector.select(max(limit, 0.0)):
                self.close()
                return None, f"given up after {limit:.0f} s"
        line = process.stdout.readline()
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            self.close()
            return None, f"its process ended with status {process.returncode}; the log has its last words"
        reply = json.loads(line)
        if reply.get("broken"):
            self.close()
        return reply.get("answer"), reply.get("error", "")

    def _ready(self) -> "subprocess.Popen[str]":
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.gpu_jobs"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                text=True,
                cwd=Path(__file__).parent.parent,
                env=self._environment,
                start_new_session=True,  # torch.compile starts processes of its own: they go with it
            )
        return self._process

    def close(self) -> None:
        """Ends the worker and what it started."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()
            self._process = None


def call(name: str, arguments: dict[str, Any]) -> Any:
    """What ``module:function`` gives for these arguments."""
    module, function = name.split(":")
    return getattr(importlib.import_module(module), function)(**arguments)


def _release() -> None:
    """Gives back what the job left; raises where the device no longer works."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def serve() -> None:
    """Answers jobs until standard input ends; whatever else prints goes to standard error."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            job = json.loads(line)
            try:
                reply = {"answer": call(job["call"], job["arguments"])}
            except Exception as error:
                traceback.print_exc()
                text = (str(error).strip().splitlines() or [""])[0]
                reply = {"error": f"{type(error).__name__}: {text}"[:300]}
            try:
                _release()
            except RuntimeError:  # what CUDA raises once a kernel has failed, at every call from then on
                traceback.print_exc()
                reply["broken"] = True
            print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    serve()
