"""`synpo pairs`: from videos to judged preference pairs, and `synpo pairs check`: every problem of a file of pairs."""

import argparse
import json
import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..options import add_options, given_options, option
from .check import check_pairs
from .formats import VIDEO_PROMPT

logger = logging.getLogger(__name__)


@dataclass
class PairsConfig:
    """Options of `synpo pairs`."""

    videos: str = option("", "Folder of videos. Required.")
    video_list: str = option("", "Published list of a dataset whose videos are in the folder; see docs/pairs.md.")
    video_list_layout: str = option("auto", "auto, sharegpt4video, panda-70m, charades, vatex or msr-vtt.")
    max_videos: int | None = option(None, "Use the first so many videos only.")
    model: str = option("", "Captioner: a hub name or a folder; with captioner_url, a name at that server. Required.")
    captioner_url: str = option("", "OpenAI-compatible server that takes images, such as http://127.0.0.1:8000/v1.")
    captioner_key_file: str = option("", "File with the captioner server's key. Default: OPENAI_API_KEY.")
    captioner_options: str = option("{}", "JSON object of fields merged into each request of the captioner.")
    captioner_parallel: int = option(4, "Videos that are captioned at once, at a server.")
    dtype: str | None = option(None, "A local captioner's weights: float32, bfloat16, float16, auto.")
    videos_together: int = option(1, "Videos that a local captioner takes at once; fills up a GPU, or a tiny model.")
    ray: int = option(0, "Caption with so many workers over a Ray cluster (RAY_ADDRESS), else on this machine.")
    ray_cpus: float = option(1.0, "CPUs that each worker takes.")
    ray_gpus: float = option(0.0, "GPUs that each worker takes.")
    out: str = option("", "Folder to write to; the same command again goes on where a run stopped. Required.")

    instruction: str = option(VIDEO_PROMPT, "What the captions are asked to do; the prompt of the pairs.")
    candidates: int = option(8, "Sampled captions of each video.")
    num_frames: int | None = option(None, "Frames of each video and clip. Default: by fps.")
    fps: float | None = option(None, "Frames a second, within min_frames and max_frames. Default: 0.5.")
    min_frames: int = option(8, "Least frames of a video or clip, where it has them.")
    max_frames: int = option(16, "Most frames of a video or clip.")
    max_side: int | None = option(None, "Most pixels of a frame's longer side. Default: 1280, at a server 768.")
    temperature: float = option(0.9, "Sampling of the candidates.")
    top_p: float = option(0.95, "Sampling of the candidates.")
    top_k: int = option(32, "Sampling of the candidates by a local model.")
    max_new_tokens: int = option(512, "Longest caption.")
    seed: int = option(0, "Seed of the run; each caption's own is made from it.")

    judge: str = option("", "Judge: a name at the judge's server, or python:package.module:function. Required.")
    judge_url: str = option("https://api.openai.com/v1", "OpenAI-compatible server of the judge.")
    judge_key_file: str = option("", "File with the judge's key. Default: environment variable OPENAI_API_KEY.")
    judge_options: str = option("{}", "JSON object of fields merged into each request; null takes a field out.")
    judge_answers: str = option("", "Recorded answers (JSON lines), used instead of asking a server.")
    judge_temperature: float = option(0.0, "Temperature of the judge.")
    votes: int = option(1, "How often each question is asked, captions in another order; the median counts.")
    attempts: int = option(3, "Replies asked for until one can be read; after that the score is missing.")
    layout: str = option("captions-first", "captions-first, or references-first for servers with a prefix cache.")
    max_judge_tokens: int = option(1024, "Longest reply of the judge, reasoning included.")
    concurrency: int = option(16, "Judge requests under way at once.")
    timeout: float = option(120.0, "Seconds for one try of a request.")
    price_in: float = option(0.0, "Money per million tokens that the judge reads.")
    price_out: float = option(0.0, "Money per million tokens that the judge writes.")
    budget: float | None = option(None, "Stop before all answers of the judge together cost more than this.")

    weight_factuality: float = option(1.1, "Weight of factuality in a candidate's total.")
    weight_fluency: float = option(1.0, "Weight of fluency.")
    weight_consistency: float = option(1.0, "Weight of self-consistency.")
    min_score_gap: float = option(4.0, "Least difference between the totals of chosen and rejected.")
    balance_length: bool = option(False, "Drop pairs until the chosen caption is longer as often as shorter.")

    def __post_init__(self) -> None:
        for name in ("videos", "model", "judge", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing; give --{name} or set it in the config file")
        for name in ("captioner_options", "judge_options"):
            try:
                if not isinstance(json.loads(getattr(self, name)), dict):
                    raise ValueError
            except ValueError:
                raise ValueError(f"{name} is {getattr(self, name)!r}; a JSON object is needed") from None
        if self.ray and self.captioner_url:
            raise ValueError("ray and captioner_url: a server has its own workers; give one of the two")
        if self.videos_together != 1 and (self.ray or self.captioner_url):
            name = "ray" if self.ray else "captioner_url"
            raise ValueError(f"videos_together and {name}: it is for a captioner in this process; leave one out")
        if self.max_videos is not None and self.max_videos < 1:
            raise ValueError(f"max_videos is {self.max_videos}; it has to be at least 1")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`check FILE...`, --config, and a flag for every option."""
    parser.usage = (
        "synpo pairs --videos DIR --model NAME --judge NAME --out DIR [--config FILE.yaml] [--name value ...]\n"
        "       synpo pairs check FILE [FILE ...] [--min_score_gap G]"
    )
    parser.add_argument("words", nargs="*", metavar="check FILE", help="look for problems in files of pairs instead")
    groups = {
        "captions": ("instruction", "seed"),
        "judge": ("judge", "budget"),
        "pairs": ("weight_factuality", "balance_length"),
    }
    names = list(PairsConfig.__dataclass_fields__)

    def group_of(name: str) -> str:
        for title, (first, last) in groups.items():
            if names.index(first) <= names.index(name) <= names.index(last):
                return title
        return "videos and captioner"

    add_options(parser, PairsConfig, group_of=group_of)


def main(args: argparse.Namespace) -> int:
    """Build pairs, or check files of pairs; the exit code is 1 where something failed or is missing."""
    words = args.words
    del args.words
    given = given_options(args, PairsConfig)
    if words:
        if words[0] != "check" or len(words) < 2:
            raise ValueError(f"{' '.join(words)!r}: the only word is `check`, with the files to look at after it")
        if other := sorted(given.keys() - {"min_score_gap"}):
            raise ValueError(f"check takes --min_score_gap only, not --{other[0]}")
        report = check_pairs(words[1:], min_score_gap=given.get("min_score_gap"))
        print(report)
        return 0 if report.ok else 1
    return _build(PairsConfig(**given))


def _build(config: PairsConfig) -> int:
    # transformers, openai and av take seconds to import, and `check` needs none of them
    from ..judge import ModelJudge, Weights
    from ..judge.background import Background
    from ..video import FramePolicy
    from .build import PairRule, build_pairs
    from .captioning import CaptionPlan
    from .outputs import PAGE_FILE, PAIRS_FILE
    from .video_lists import folder_videos, listed_videos

    out = Path(config.out)
    folder = Path(config.videos)
    videos = (
        listed_videos(Path(config.video_list), folder, config.video_list_layout)
        if config.video_list
        else folder_videos(folder)
    )
    if config.max_videos is not None:
        del videos.items[config.max_videos :]
    if videos.missing:
        shown = ", ".join(videos.missing[:5]) + (", ..." if len(videos.missing) > 5 else "")
        logger.warning("%d videos of the list are not in %s: %s", len(videos.missing), folder, shown)
    fps = 0.5 if config.fps is None and config.num_frames is None else config.fps
    frames = FramePolicy(config.num_frames, fps, config.min_frames, config.max_frames)
    plan = CaptionPlan(config.instruction, config.candidates, frames, config.seed, config.videos_together)
    weights = Weights(config.weight_factuality, config.weight_fluency, config.weight_consistency)
    rule = PairRule(weights, config.min_score_gap, config.balance_length)
    with ExitStack() as stack:
        background = stack.enter_context(Background())
        judge = _judge(config, out, stack)
        captioner = _captioner(config, out, stack, background)
        result = build_pairs(videos, captioner, judge, out, plan, rule, background)
    statistics = result.statistics
    for reason, lost in statistics.lost.items():
        logger.info("%s: %d", reason, lost.count)
    for kind, count in sorted(judge.problems.items()):
        logger.info("judge: %s: %d", kind, count)
    failures = judge.client.failures if isinstance(judge, ModelJudge) else {}
    for kind, count in failures.items():
        logger.warning("judge: %d requests failed (%s); run again to ask them again", count, kind)
    if isinstance(judge, ModelJudge):
        logger.info("judge: %s", judge.client.spending)
    print(f"{statistics.pairs} pairs from {statistics.videos} videos: {out / PAIRS_FILE}; report: {out / PAGE_FILE}")
    failed = failures or "failed" in statistics.lost or videos.missing
    return 0 if result.finished and statistics.pairs and not failed else 1


def _captioner(config: PairsConfig, out: Path, stack: ExitStack, background: Any) -> Any:
    from ..caption import Sampling

    sampling = Sampling(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        alpha=0.0,
        max_new_tokens=config.max_new_tokens,
    )
    if not config.captioner_url:
        from .local_captioner import MAX_SIDE, LocalCaptioner, settings_of

        how = (config.model, config.dtype, sampling, config.max_side or MAX_SIDE)
        if not config.ray:
            return LocalCaptioner.load(*how)
        from .ray_captions import RayCaptioner

        make = partial(LocalCaptioner.load, *how)
        return RayCaptioner(make, settings_of(*how), config.ray, cpus=config.ray_cpus, gpus=config.ray_gpus)
    from ..judge import AnswerCache, ChatClient, read_key
    from .server_captioner import MAX_SIDE, ServerCaptioner

    client = ChatClient(
        config.model,
        stack.enter_context(closing(AnswerCache(out / "captioner.sqlite"))),
        url=config.captioner_url,
        key=read_key(Path(config.captioner_key_file) if config.captioner_key_file else None),
        timeout=config.timeout,
        options=json.loads(config.captioner_options),
    )
    return ServerCaptioner(
        client, background, sampling=sampling, max_side=config.max_side or MAX_SIDE, parallel=config.captioner_parallel
    )


def _judge(config: PairsConfig, out: Path, stack: ExitStack) -> Any:
    from ..judge import AnswerCache, ChatClient, ModelJudge, OracleJudge, Spending, read_key

    if config.judge.startswith("python:"):
        return OracleJudge.named(config.judge.removeprefix("python:"))
    recorded = config.judge_answers
    spending = Spending(config.price_in, config.price_out, config.budget)
    cache = AnswerCache.recorded(Path(recorded)) if recorded else AnswerCache(out / "judge.sqlite")
    client = ChatClient(
        config.judge,
        stack.enter_context(closing(cache)),
        url=config.judge_url,
        key=read_key(Path(config.judge_key_file) if config.judge_key_file else None),
        concurrency=config.concurrency,
        timeout=config.timeout,
        spending=spending,
        options=json.loads(config.judge_options),
        offline=bool(recorded),
    )
    return ModelJudge(
        client,
        votes=config.votes,
        attempts=config.attempts,
        temperature=config.judge_temperature,
        layout=config.layout,
        max_tokens=config.max_judge_tokens,
    )
