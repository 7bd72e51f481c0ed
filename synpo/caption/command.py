"""`synpo caption`: from videos to a file of captions."""

import argparse
import hashlib
import logging
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..options import add_options, given_options, option
from ..pretrained import DTYPES
from ..run_files import append_json_line, drop_torn_line, read_json_lines
from ..video import FramePolicy, Video, VideoError, decode
from .captioner import Caption, Captioner, UnusableFrames
from .decoding import OnTokens
from .features import family_of
from .files import video_files
from .load import load_captioner
from .prompts import DESCRIBE
from .sampling import Sampling
from .views import VIEWS, contrast_view

logger = logging.getLogger(__name__)

# What does not change a caption, and may differ when a file of captions is gone on with.
NOT_SETTINGS = ("videos", "out", "device", "batch_size")


@dataclass
class CaptionConfig:
    """Options of `synpo caption`; the defaults are the SynPO release's (arXiv 2506.00835)."""

    videos: list[str] = option([], "Files, folders, patterns such as 'films/*.mp4'.")
    model: str = option("", "Captioner: a hub name, a folder, or what `synpo train` has written. Required.")
    out: str = option("captions.jsonl", "File of captions, a line of JSON for each video; gone on with if it exists.")
    instruction: str = option(DESCRIBE, "What the captions are asked to do.")
    contrast: str = option("third", f"View that the full view is contrasted with: off, {', '.join(VIEWS)}.")
    candidates: int = option(1, "Captions of each video.")
    retrospective: int = option(1, "How often the model sees the video again with its caption and writes a better one.")
    seed: int = option(0, "Seed of the run; each caption's own is made from it and the file's name.")
    temperature: float = option(0.5, "0: greedy.")
    top_p: float = option(0.9, "Keep the likeliest tokens up to this mass; 1: all.")
    top_k: int = option(32, "Keep so many of the likeliest tokens; 0: all.")
    alpha: float = option(0.5, "Weight of the contrast view.")
    plausibility: float = option(0.0, "Drop tokens less likely than this share of the likeliest; 0: none.")
    max_new_tokens: int = option(512, "Longest caption, in tokens.")
    stop: list[str] = option([], "Strings that a caption ends before.")
    num_frames: int | None = option(None, "Frames of each video.")
    fps: float | None = option(None, "Frames for each second instead. Default where num_frames is not given: 0.5.")
    min_frames: int = option(8, "Fewest frames, with fps.")
    max_frames: int = option(16, "Most frames, with fps.")
    dtype: str | None = option(
        None, "Model weights: float32, bfloat16, float16, auto. Default: float32 on a CPU, else auto."
    )
    device: str | None = option(None, "Where the model runs, such as cuda:1. Default: an accelerator, or the CPU.")
    batch_size: int | None = option(None, "Most rows that go through the model at once, two a caption with a contrast.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is missing; give --model or set it in the config file")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for name, least in (("candidates", 1), ("retrospective", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it has to be at least {least}")
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError(f"{self.candidates} greedy candidates would all be the same; set a temperature above 0")
        if self.num_frames is None and self.fps is None:
            self.fps = 0.5
        contrast_view(self.contrast)

    def sampling(self) -> Sampling:
        """The law that tokens are drawn from."""
        return Sampling(
            self.temperature, self.top_p, self.top_k, self.alpha, self.plausibility, self.max_new_tokens, self.stop
        )

    def frames(self) -> FramePolicy:
        """Which frames the model sees."""
        return FramePolicy(self.num_frames, self.fps, self.min_frames, self.max_frames)

    def settings(self) -> dict[str, Any]:
        """Everything that captions depend on but the video, as JSON types."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_SETTINGS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--config, VIDEO..., and a flag for every option."""
    parser.usage = "synpo caption VIDEO... --model DIR_OR_NAME [--config FILE.yaml] [--name value ...]"
    add_options(parser, CaptionConfig, positional="videos")


def main(args: argparse.Namespace) -> int:
    """Caption every video that has no line in the file yet; 0 when all have good captions, 1 when some have not."""
    config = CaptionConfig(**given_options(args, CaptionConfig))
    config.sampling()
    config.frames()
    files = video_files(config.videos)
    out = Path(config.out)
    done = _done(out, config.settings())
    waiting = [file for file in files if file not in done]
    failed = sum(_problem(done[file]) is not None for file in files if file in done)
    logger.info("%d videos, %d of them done before", len(files), len(files) - len(waiting))
    if waiting:
        captioner = load_captioner(config.model, config.dtype, device=config.device, batch_size=config.batch_size)
        family_of(captioner.model)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(waiting), unit="video", disable=None, dynamic_ncols=True) as bar:
            for file, decoding in _decoded(waiting, config.frames()):
                try:
                    record = caption_video(captioner, file, decoding.result(), config, _counting(bar, Path(file).name))
                    append_json_line(out, record)
                    problem = _problem(record)
                except VideoError as error:
                    problem = f"{error.cause}; skipped"
                except UnusableFrames as error:
                    problem = f"{error}; skipped"
                if problem:
                    failed += 1
                    tqdm.write(f"synpo caption: {file}: {problem}", file=sys.stderr)
                bar.update()
    print(f"{len(files) - failed} of {len(files)} videos captioned; {out}")
    return 1 if failed else 0


def _decoded(files: Sequence[str], policy: FramePolicy) -> Iterator[tuple[str, Future[Video]]]:
    """Each file with its video, decoded while the one before is captioned."""
    with ThreadPoolExecutor(1, thread_name_prefix="synpo-decode") as pool:
        ahead = pool.submit(decode, files[0], policy)
        for file, following in zip(files, [*files[1:], None], strict=True):
            current = ahead
            wait([current])  # one video in memory beside the one that is captioned, not more
            if following is not None:
                ahead = pool.submit(decode, following, policy)
            yield file, current


def caption_video(
    captioner: Captioner, file: str, video: Video, config: CaptionConfig, on_tokens: OnTokens | None = None
) -> dict[str, Any]:
    """One line of the file of captions: the video, its captions, and what they were made with."""
    seeds = caption_seeds(config.seed, file, config.candidates)
    (captions,) = captioner.captions(
        [video.whole],
        config.instruction,
        sampling=config.sampling(),
        candidates=config.candidates,
        seeds=seeds,
        contrast=contrast_view(config.contrast),
        retrospective=config.retrospective,
        on_tokens=on_tokens,
    )
    return {
        "video": file,
        "duration": round(video.duration, 3),
        "times": [round(float(time), 3) for time in video.times],
        "captions": [_caption_record(caption) for caption in captions],
        "settings": config.settings(),
        "versions": {name: version(name) for name in ("synpo", "torch", "transformers")},
    }


def caption_seeds(seed: int, file: str, count: int) -> list[int]:
    """Seeds of a file's captions: of the run's seed and the file's name alone, so that they do not depend on where in
    a list of files it stands, or in which folder.
    """
    digest = hashlib.sha256(f"{seed}/{Path(file).name}".encode()).digest()
    first = int.from_bytes(digest[:8], "big") >> 2
    return list(range(first, first + count))


def _caption_record(caption: Caption) -> dict[str, Any]:
    """A caption as JSON types. logp, model_logp: means over its tokens in nats, None where it has none."""
    generated = caption.generated
    tokens = len(generated.tokens)
    drafts = []
    while (draft := (caption if not drafts else drafts[-1]).draft) is not None:
        drafts.append(draft)
    return {
        "text": caption.text,
        "seed": caption.seed,
        "tokens": tokens,
        "finish": generated.finish,
        "failure": caption.failure,
        "logp": float(generated.logps.mean()) if tokens else None,
        "model_logp": float(generated.model_logps.mean()) if tokens else None,
        "drafts": [draft.text for draft in reversed(drafts)],
    }


def _done(out: Path, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The records that the file holds, by video. Errors: ValueError where they were made with other settings."""
    if not out.exists():
        return {}
    drop_torn_line(out)
    records = read_json_lines(out)
    for number, record in enumerate(records, start=1):
        former = record.get("settings")
        if not isinstance(former, dict) or "video" not in record:
            raise ValueError(f"{out}:{number} is not a line of `synpo caption`; choose another --out")
        for name in settings:
            if former.get(name) != settings[name]:
                raise ValueError(
                    f"{out} holds captions made with other settings ({name}: {former.get(name)!r} then, "
                    f"{settings[name]!r} now); choose another --out"
                )
    return {record["video"]: record for record in records}


def _problem(record: dict[str, Any]) -> str | None:
    """What is wrong with the captions of a record, if anything."""
    reasons = [caption["failure"] for caption in record["captions"] if caption["failure"]]
    return f"{len(reasons)} of {len(record['captions'])} captions failed: {reasons[0]}" if reasons else None


def _counting(bar: tqdm, name: str) -> OnTokens:
    """Shows how many tokens of a video have been written."""
    written = 0

    def on_tokens(newest: dict[int, int]) -> None:
        nonlocal written
        written += len(newest)
        bar.set_postfix_str(f"{name}: {written} tokens")

    return on_tokens
