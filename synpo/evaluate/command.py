"""`synpo evaluate`: captions of files or of a model, alone or two of them compared; a model for other harnesses."""

import argparse
import asyncio
import json
import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from ..options import add_options, given_options, option
from ..run_files import write_atomically
from .bootstrap import Change, paired_bootstrap_of_sums
from .captions import Metric, measure
from .files import Quiz, read_hypotheses, read_quizzes, read_references
from .meteor import find
from .model import PROTOCOLS, caption_videos

logger = logging.getLogger(__name__)

HARNESSES = ("alpaca_eval", "mt_bench", "lm_eval")
METEOR = {"auto": None, "on": True, "off": False}


@dataclass
class EvaluateConfig:
    """Options of `synpo evaluate`."""

    captions: list[str] = option([], "One file of captions, or two: before and after. Or: export HARNESS.")
    references: str = option("", "File of references; see docs/evaluate.md for its layouts. Required.")
    split: str = option("", "Take references of this split alone; MSR-VTT's file tells them apart.")
    out: str = option("", "Write all numbers to this file, as JSON. With export: folder to write to.")
    partial: bool = option(False, "Leave out, counted, videos that have not all of captions and references.")
    meteor: str = option("auto", "METEOR, which needs Java: auto (where it can run), on, off.")
    resamples: int = option(2000, "Resamples of the bootstrap, with two files.")
    seed: int = option(0, "Seed of the bootstrap.")

    model: str = option("", "Model or adapter of `synpo train` that writes captions of --videos, or answers to export.")
    videos: list[str] = option([], "Files, folders, patterns: the model captions those that have references, into OUT.")
    protocol: str = option("short", f"How it captions them: {', '.join(PROTOCOLS)}; see docs/evaluate.md.")
    videos_together: int = option(1, "Videos that the model takes at once, as in `synpo caption`.")
    questions: str = option("", "export: file of the harness's questions.")
    max_new_tokens: int = option(1024, "export: longest answer.")

    detail: bool = option(False, "Let a judge score detail, 0 to 5, against the references (VDD).")
    quiz: str = option("", "File of questions; a judge's model answers them from the captions alone (VDC).")
    judge: str = option("", "Judge: a name at the judge's server. Needed for detail and quiz.")
    judge_url: str = option("https://api.openai.com/v1", "OpenAI-compatible server of the judge.")
    judge_key_file: str = option("", "File with the judge's key. Default: environment variable OPENAI_API_KEY.")
    judge_options: str = option("{}", "JSON object of fields merged into each request; null takes a field out.")
    judge_answers: str = option("", "Recorded answers (JSON lines), used instead of asking a server.")
    judge_cache: str = option("judge.sqlite", "Answers are kept here; what is in it is not asked for again.")
    attempts: int = option(3, "Replies asked for until one can be read; after that the score is missing.")
    concurrency: int = option(16, "Judge requests under way at once.")
    budget: float | None = option(None, "Stop before the judge's answers together cost more than this.")
    price_in: float = option(0.0, "Money per million tokens that the judge reads.")
    price_out: float = option(0.0, "Money per million tokens that the judge writes.")

    def __post_init__(self) -> None:
        if self.captions[:1] == ["export"]:
            self._check_export()
            return
        if not 1 <= len(self.captions) + bool(self.videos) <= 2:
            given = f"{len(self.captions)} files of captions{' and a model' if self.videos else ''}"
            raise ValueError(f"{given} are given; one or two in all are needed")
        if not self.references:
            raise ValueError("references is missing; give --references or set it in the config file")
        if bool(self.model) != bool(self.videos):
            raise ValueError("model and videos belong together; give both, or files of captions alone")
        if self.videos and not self.out:
            raise ValueError("out is missing; the model's captions are written beside it")
        for name, allowed in (("meteor", METEOR), ("protocol", PROTOCOLS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.resamples < 100:
            raise ValueError(f"resamples is {self.resamples}; it has to be at least 100")
        if bool(self.detail or self.quiz) != bool(self.judge):
            raise ValueError("a judge and something for it belong together; give --judge with --detail or --quiz")
        try:
            if not isinstance(json.loads(self.judge_options), dict):
                raise ValueError
        except ValueError:
            raise ValueError(f"judge_options is {self.judge_options!r}; a JSON object is needed") from None

    def _check_export(self) -> None:
        if len(self.captions) != 2:
            raise ValueError(f"export takes one word, the harness: {', '.join(HARNESSES)}")
        for name in ("model", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name} or set it in the config file")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, CAPTIONS..., and a flag for every option."""
    parser.usage = (
        "synpo evaluate CAPTIONS [CAPTIONS] --references FILE [--config FILE.yaml] [--name value ...]\n"
        "       synpo evaluate [CAPTIONS] --model DIR --videos VIDEO... --references FILE --out FILE.json\n"
        f"       synpo evaluate export {{{','.join(HARNESSES)}}} --model DIR --out FOLDER [--questions FILE]"
    )
    add_options(parser, EvaluateConfig, positional="captions", group_of=_group)


def _group(name: str) -> str:
    names = list(EvaluateConfig.__dataclass_fields__)
    firsts = {"detail": "judged scores", "model": "a model", "captions": "captions"}
    return next(title for first, title in firsts.items() if names.index(name) >= names.index(first))


def main(args: argparse.Namespace) -> int:
    """Print the numbers of the captions, and with two files the changes with their 95 % intervals."""
    config = EvaluateConfig(**given_options(args, EvaluateConfig))
    if config.captions[:1] == ["export"]:
        return _export(config)
    references = read_references(Path(config.references), config.split)
    quizzes = read_quizzes(Path(config.quiz)) if config.quiz else []
    files = list(config.captions)
    if config.videos:
        written = Path(config.out).with_suffix(".captions.jsonl")
        how = PROTOCOLS[config.protocol] | {"videos_together": config.videos_together}
        caption_videos(config.model, config.videos, references, written, how)
        files.append(str(written))
    sets, left_out = _aligned(files, references, dict.fromkeys(quiz.video for quiz in quizzes), config.partial)
    result: dict[str, Any] = {"captions": files, "references": config.references, "videos": len(sets[0])}
    for name, videos in left_out.items():
        logger.warning("left out: %d videos without %s, the first is %s", len(videos), name, videos[0])
    result["left_out"] = {name: len(videos) for name, videos in left_out.items()}
    wanted = {video: references[video] for video in sets[0]}
    measured = [measure(captions, wanted, METEOR[config.meteor]) for captions in sets]
    if "METEOR" not in measured[0]:
        reason = find().missing or "switched off"
        logger.warning("METEOR is left out: %s", reason)
        result["METEOR"] = reason
    judged = asyncio.run(_judged(config, sets, wanted, quizzes)) if config.judge else [{} for _ in sets]
    rows = [_row(name, [m[name] for m in measured], config) for name in measured[0]]
    rows += [_judged_row(name, [j[name] for j in judged], config) for name in judged[0]]
    result["metrics"] = {row.pop("name"): row for row in rows}
    print(table(result))
    if config.out:
        write_atomically(Path(config.out), json.dumps(result, indent=1) + "\n")
        print(config.out)
    return 0


def _export(config: EvaluateConfig) -> int:
    from .harness import export  # loads models, which takes seconds to import

    questions = Path(config.questions) if config.questions else None
    how = {"max_new_tokens": config.max_new_tokens, "seed": config.seed}
    commands = export(config.captions[1], config.model, Path(config.out), questions, **how)
    print("written; go on with:")
    for command in commands:
        print(shlex.join(command))
    return 0


def _aligned(
    names: Sequence[str], references: Mapping[str, list[str]], asked: Collection[str], partial: bool
) -> tuple[list[dict[str, str]], dict[str, list[str]]]:
    """The captions of the same videos from every file, in the references' order, and what was left out for what.

    asked: the videos that there are questions about; where there are any, every video has to have some.
    """
    files = [read_hypotheses(Path(name)) for name in names]
    needed: dict[str, Collection[str]] = {
        **{f"a caption in {name}": file.captions for name, file in zip(names, files, strict=True)},
        "references": references,
        **({"questions": asked} if asked else {}),
    }
    known = dict.fromkeys(chain(references, *needed.values(), *(file.failures for file in files)))
    left_out = {what: lacking for what, videos in needed.items() if (lacking := [v for v in known if v not in videos])}
    if left_out and not partial:
        what, lacking = next(iter(left_out.items()))
        reason = next((file.failures[lacking[0]] for file in files if lacking[0] in file.failures), None)
        raise ValueError(
            f"{len(lacking)} videos are without {what}, the first is {lacking[0]!r}{f' ({reason})' if reason else ''}; "
            "complete the files, or set partial to leave such videos out"
        )
    kept = [video for video in references if all(video in videos for videos in needed.values())]
    if not kept:
        raise ValueError(f"no video has all of {', '.join(needed)}; are they named alike?")
    return [{video: file.captions[video] for video in kept} for file in files], left_out


def _row(name: str, metrics: list[Metric], config: EvaluateConfig) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "values": [metric.value for metric in metrics]}
    if len(metrics) == 2:
        before, after = metrics
        change = paired_bootstrap_of_sums(
            before.parts, after.parts, before.of_sums, resamples=config.resamples, seed=config.seed
        )
        row["change"] = change._asdict()
    return row


def _judged_row(name: str, scores: list[Any], config: EvaluateConfig) -> dict[str, Any]:
    from .judged import compared

    row: dict[str, Any] = {
        "name": name,
        "values": [score.mean for score in scores],
        "valid": [score.valid for score in scores],
        "failed": [score.failed for score in scores],
    }
    if len(scores) == 2:
        row["compared"], change = compared(*scores, resamples=config.resamples, seed=config.seed)
        row |= {"change": change._asdict()} if change else {}
    return row


async def _judged(
    config: EvaluateConfig, sets: list[dict[str, str]], references: Mapping[str, list[str]], quizzes: list[Quiz]
) -> list[dict[str, Any]]:
    # openai takes a second to import
    from ..judge import AnswerCache, ChatClient, ModelJudge, Spending, read_key
    from .judged import answers_of, detail_score, quiz_score

    recorded = config.judge_answers
    client = ChatClient(
        config.judge,
        AnswerCache.recorded(Path(recorded)) if recorded else AnswerCache(Path(config.judge_cache)),
        url=config.judge_url,
        key=read_key(Path(config.judge_key_file) if config.judge_key_file else None),
        concurrency=config.concurrency,
        spending=Spending(config.price_in, config.price_out, config.budget),
        options=json.loads(config.judge_options),
        offline=bool(recorded),
    )
    judge = ModelJudge(client, attempts=config.attempts)
    found: list[dict[str, Any]] = []
    try:
        for captions in sets:
            scores: dict[str, Any] = {}
            if config.detail:
                scores["detail (VDD)"] = await detail_score(judge, captions, references)
            if config.quiz:
                asked = [quiz for quiz in quizzes if quiz.video in captions]
                for aspect, pair in (await quiz_score(judge, answers_of(client), captions, asked)).items():
                    scores[f"VDC accuracy, {aspect}"] = pair.accuracy
                    scores[f"VDC score, {aspect}"] = pair.closeness
            found.append(scores)
    finally:
        await judge.close()
    for kind, count in sorted((judge.problems + client.failures).items()):
        logger.warning("judge: %s: %d", kind, count)
    logger.info("judge: %s", client.spending)
    return found


def table(result: Mapping[str, Any]) -> str:
    """The result as text: a line for each metric, with two files the change and its interval."""
    two = len(result["captions"]) == 2
    head = ("before", "after", "change") if two else ("value",)
    title = f"videos: {result['videos']}"
    width = max(22, *(len(name) + 2 for name in result["metrics"]))
    lines = [f"{title:<{width}}" + "".join(f"{name:>10}" for name in head) + ("   95 % interval" if two else "")]
    for name, row in result["metrics"].items():
        cells = "".join(f"{'none':>10}" if value is None else f"{value:>10.4f}" for value in row["values"])
        if change := row.get("change"):
            cells += f"{Change(**change).mean:>+10.4f}   [{change['low']:+.4f}, {change['high']:+.4f}]"
        if "failed" in row:
            cells += f"   failed: {', '.join(map(str, row['failed']))}"
        lines.append(f"{name:<{width}}{cells}")
    return "\n".join(lines)
