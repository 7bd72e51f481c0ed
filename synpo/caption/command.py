"""`synpo caption`: from videos to a file of captions."""

import argparse
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..options import add_options, given_options, option
from ..pretrained import DTYPES
from ..run_files import append_json_line
from ..video import FramePolicy, Video, VideoError, decode
from .captioner import Captioner, UnusableFrames
from .decoding import OnTokens
from .features import family_of
from .files import video_files
from .load import load_captioner
from .prompts import DESCRIBE
from .records import Record, failure, read_records, record_of, seeds_of
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
    videos_together: int = option(1, "Videos that the model takes at once; fills up a GPU, or a tiny model.")
    batch_size: int | None = option(None, "Most rows that go through the model at once, two a caption with a contrast.")

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("model is missing; give --model or set it in the config file")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")
        for name, least in (("candidates", 1), ("retrospective", 0), ("videos_together", 1), ("batch_size", 1)):
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
    done = read_records(out, config.settings())
    failed = sum(failure(done[file]) is not None for file in files if file in done)
    missing = [file for file in files if file not in done]
    logger.info("%d videos, %d of them done before", len(files), len(files) - len(missing))
    # How many go together decides the last bits of a model's numbers, so a group that was stopped is made as a whole.
    groups = [files[first : first + config.videos_together] for first in range(0, len(files), config.videos_together)]
    groups = [group for group in groups if not done.keys() >= set(group)]
    if groups:
        captioner = load_captioner(config.model, config.dtype, device=config.device, batch_size=config.batch_size)
        family_of(captioner.model)
        out.parent.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(missing), unit="video", disable=None, dynamic_ncols=True) as bar:
            for videos in _decoded(groups, config.frames()):
                good = {file: video for file, video in videos.items() if isinstance(video, Video)}
                made = {} if done.keys() >= good.keys() else _captioned(captioner, good, config, bar)
                for file, found in ((file, made.get(file, videos[file])) for file in videos if file not in done):
                    if isinstance(found, dict):
                        append_json_line(out, found)
                    problem = failure(found) if isinstance(found, dict) else f"{found}; skipped"
                    if problem:
                        failed += 1
                        tqdm.write(f"synpo caption: {file}: {problem}", file=sys.stderr)
                    bar.update()
    print(f"{len(files) - failed} of {len(files)} videos captioned; {out}")
    return 1 if failed else 0


def _decoded(groups: Sequence[Sequence[str]], policy: FramePolicy) -> Iterator[dict[str, Video | str]]:
    """The videos of each group by file, decoded while the group before is captioned; of a bad one, what is wrong."""

    def read(group: Sequence[str]) -> dict[str, Video | str]:
        return {file: attempt(file) for file in group}

    def attempt(file: str) -> Video | str:
        try:
            return decode(file, policy)
        except VideoError as error:
            return error.cause

    with ThreadPoolExecutor(1, thread_name_prefix="synpo-decode") as pool:
        ahead = pool.submit(read, groups[0])
        for following in [*groups[1:], None]:
            videos = ahead.result()  # one group in memory beside the one that is captioned, not more
            if following is not None:
                ahead = pool.submit(read, following)
            yield videos


def _captioned(
    captioner: Captioner, videos: Mapping[str, Video], config: CaptionConfig, bar: tqdm
) -> dict[str, Record | str]:
    """A group's lines by file, or why there is none of one. Where the group's call fails, each is tried alone."""
    try:
        return {**caption_videos(captioner, videos, config, _counting(bar, list(videos)))}
    except UnusableFrames as error:
        if len(videos) == 1:
            return dict.fromkeys(videos, str(error))
    return {file: _captioned(captioner, {file: video}, config, bar)[file] for file, video in videos.items()}


def caption_videos(
    captioner: Captioner, videos: Mapping[str, Video], config: CaptionConfig, on_tokens: OnTokens | None = None
) -> dict[str, Record]:
    """Lines of the file of captions, by video file: the video, its captions, and what they were made with."""
    captions = captioner.captions(
        [video.whole for video in videos.values()],
        config.instruction,
        sampling=config.sampling(),
        candidates=config.candidates,
        seeds=[seed for file in videos for seed in seeds_of(config.seed, file, config.candidates)],
        contrast=contrast_view(config.contrast),
        retrospective=config.retrospective,
        on_tokens=on_tokens,
    )
    settings = config.settings()
    return {
        file: record_of(file, video, told, settings)
        for (file, video), told in zip(videos.items(), captions, strict=True)
    }


def _counting(bar: tqdm, files: Sequence[str]) -> OnTokens:
    """Shows how many tokens of a group of videos have been written."""
    name = Path(files[0]).name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    written = 0

    def on_tokens(newest: dict[int, int]) -> None:
        nonlocal written
        written += len(newest)
        bar.set_postfix_str(f"{name}: {written} tokens")

    return on_tokens
