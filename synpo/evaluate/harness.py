"""A model in the form that the text benchmarks take: AlpacaEval 2, MT-Bench, the Open LLM Leaderboard.

Their judges and their scoring are their own; here are the answers, in their files, and the commands to go on with.
`synpo evaluate export NAME --model DIR --questions FILE --out FOLDER` calls `export`.
"""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..caption import GREEDY, Captioner, Prompt, Sampling
from ..pretrained import ADAPTER, locate
from ..run_files import append_json_line, drop_torn_line, read_json_lines, write_atomically
from .command import HARNESSES

# MT-Bench's temperatures by category of question; every other is 0.7
MT_BENCH_TEMPERATURE = {
    "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
# The tasks of the Open LLM Leaderboard, first edition, and how many examples stand in the prompt; the second edition's
# are lm-eval's group `leaderboard`
LEADERBOARD = {
    "arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5,
}  # fmt: skip

Messages = list[dict[str, str]]


def answer(
    captioner: Captioner, conversations: Sequence[Messages], sampling: Sampling, seeds: Sequence[int]
) -> list[str]:
    """The model's next turn in each conversation, in its own chat format. Errors: ValueError for one that failed."""
    tokenizer = captioner.tokenizer
    if tokenizer.chat_template is None:
        raise ValueError("the model's tokenizer has no chat template; these benchmarks hold conversations")
    prompts = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append(Prompt(torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])))
    found = captioner.generate(prompts, sampling=sampling, seeds=list(seeds))
    for number, caption in enumerate(found):
        if caption.generated.failure:
            raise ValueError(f"answer {number} failed: {caption.generated.failure}")
    return [caption.text for caption in found]


def _seed(seed: int, name: str) -> int:
    """A question's own seed: of the run's seed and the question alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


class _Answers:
    """The answers that a folder holds already, and how they were made: answers made otherwise are not gone on with."""

    def __init__(self, out: Path, model: str, sampling: Sampling, seed: int) -> None:
        self._file = out / "answers.jsonl"
        self._settings = {"model": model, "seed": seed, "max_new_tokens": sampling.max_new_tokens}
        self.turns: dict[str, list[str]] = {}
        out.mkdir(parents=True, exist_ok=True)
        drop_torn_line(self._file)
        for row in read_json_lines(self._file) if self._file.exists() else []:
            former = row.get("settings")
            if former != self._settings:
                raise ValueError(
                    f"{self._file} has answers of {former}, now it is {self._settings}; give another --out"
                )
            self.turns[row["question"]] = row["turns"]

    def add(self, question: str, turns: list[str]) -> None:
        append_json_line(self._file, {"question": question, "turns": turns, "settings": self._settings})
        self.turns[question] = turns


def _generator(model: str) -> str:
    """What a harness knows a model by."""
    return Path(model).resolve().name


def alpaca_eval(
    captioner: Captioner, questions: Path, out: Path, model: str, sampling: Sampling, seed: int = 0
) -> list[str]:
    """AlpacaEval's model outputs in out/model_outputs.json; returns the command that judges them.

    questions: its evaluation set, a list of {"instruction", "dataset"}. model: its name or path. Goes on where it
    stopped. Errors: ValueError where `out` holds answers of another model, seed or length.
    """
    given = _read_list(questions, ("instruction",))
    answers = _Answers(out, model, sampling, seed)
    for question in tqdm(given, unit="question", disable=None):
        if (instruction := question["instruction"]) not in answers.turns:
            seeds = [_seed(seed, instruction)]
            answers.add(instruction, answer(captioner, [[{"role": "user", "content": instruction}]], sampling, seeds))
    outputs = [
        {**question, "output": answers.turns[question["instruction"]][0], "generator": _generator(model)}
        for question in given
    ]
    file = out / "model_outputs.json"
    write_atomically(file, json.dumps(outputs, indent=1, ensure_ascii=False) + "\n")
    return ["alpaca_eval", "--model_outputs", str(file), "--output_path", str(out / "judged")]


def mt_bench(
    captioner: Captioner, questions: Path, out: Path, model: str, sampling: Sampling, seed: int = 0
) -> list[str]:
    """MT-Bench's answers in out/data/mt_bench/model_answer/NAME.jsonl; returns the command that judges them.

    questions: its question.jsonl of {"question_id", "category", "turns"}; a turn is answered with those before it in
    view, at the temperature of its category. model, and going on: as for alpaca_eval.
    """
    given = _read_list(questions, ("question_id", "category", "turns"))
    answers, generator = _Answers(out, model, sampling, seed), _generator(model)
    for question in tqdm(given, unit="question", disable=None):
        name = str(question["question_id"])
        if name in answers.turns:
            continue
        law = replace(sampling, temperature=MT_BENCH_TEMPERATURE.get(question["category"], 0.7))
        messages: Messages = []
        for turn, text in enumerate(question["turns"]):
            messages.append({"role": "user", "content": text})
            (reply,) = answer(captioner, [messages], law, [_seed(seed, f"{name}/{turn}")])
            messages.append({"role": "assistant", "content": reply})
        answers.add(name, [message["content"] for message in messages[1::2]])
    rows = [
        {
            "question_id": question["question_id"],
            "answer_id": hashlib.sha256(f"{generator}/{question['question_id']}".encode()).hexdigest()[:22],
            "model_id": generator,
            "choices": [{"index": 0, "turns": answers.turns[str(question["question_id"])]}],
        }
        for question in given
    ]
    file = out / "data" / "mt_bench" / "model_answer" / f"{generator}.jsonl"
    write_atomically(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return ["python", "-m", "fastchat.llm_judge.gen_judgment", "--model-list", generator, "--parallel", "4"]


def lm_eval(
    model: str,
    out: Path,
    tasks: dict[str, int] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    include: Path | None = None,
) -> list[list[str]]:
    """The commands of lm-evaluation-harness for a model or an adapter of `synpo train`, one a task, also in
    out/lm_eval.sh.

    tasks: name -> examples in the prompt; None: the Open LLM Leaderboard's first edition. include: folder of tasks.
    """
    where = locate(model).where
    arguments = {"pretrained": where}
    if (settings := Path(where) / ADAPTER).exists():
        base = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        arguments = {"pretrained": base, "peft": where}
    arguments["dtype"] = dtype
    commands = []
    for task, shots in (LEADERBOARD if tasks is None else tasks).items():
        command = ["lm_eval", "--model", "hf", "--tasks", task, "--num_fewshot", str(shots), "--batch_size", "auto"]
        command += ["--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())]
        command += ["--output_path", str(out / task), *(["--device", device] if device else [])]
        commands.append(command + (["--include_path", str(include)] if include else []))
    lines = ["#!/bin/sh", "set -e", *map(shlex.join, commands)]
    write_atomically(out / "lm_eval.sh", "\n".join(lines) + "\n")
    return commands


def _read_list(path: Path, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Questions, checked. Errors: FileNotFoundError; ValueError naming file, entry and what it lacks."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    rows = read_json_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: a list of questions is needed")
    for number, row in enumerate(rows, start=1):
        lacks = [name for name in needed if not isinstance(row, dict) or not row.get(name)]
        if lacks:
            raise ValueError(f"{path}:{number}: the question has no {lacks[0]}")
    return rows


def export(
    harness: str, model: str, out: Path, questions: Path | None = None, *, max_new_tokens: int = 1024, seed: int = 0
) -> list[list[str]]:
    """The files of a harness in `out`, and the commands that go on from them.

    Errors: ValueError for an unknown harness, or questions that are missing; what loading and generating raise.
    """
    if harness not in HARNESSES:
        raise ValueError(f"harness is {harness!r}; allowed: {', '.join(HARNESSES)}")
    if harness == "lm_eval":
        return lm_eval(model, out)
    if questions is None:
        raise ValueError(f"questions is missing; give --questions, the file of {harness}'s questions")
    # transformers takes seconds to load a model
    from ..caption.load import load_captioner

    _read_list(questions, ())
    captioner = load_captioner(model)
    write = alpaca_eval if harness == "alpaca_eval" else mt_bench
    sampling = replace(GREEDY, alpha=0.0, max_new_tokens=max_new_tokens)
    return [write(captioner, questions, out, model, sampling, seed)]
