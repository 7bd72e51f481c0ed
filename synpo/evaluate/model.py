"""A model's captions of a data set's videos, written as papers write them."""

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import video_name

GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "contrast": "off", "alpha": 0.0, "retrospective": 0}
# Options of `synpo caption`. short: VATEX, MSR-VTT, whose references are single sentences. detailed: VDD, VDC.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "short": {**GREEDY, "instruction": "Describe this video in one sentence.", "max_new_tokens": 64},
    "detailed": {**GREEDY, "instruction": "Describe this video in detail.", "max_new_tokens": 512},
}


def caption_videos(
    model: str, videos: Sequence[str], wanted: Collection[str], out: Path, options: Mapping[str, Any]
) -> None:
    """Captions of those videos whose names are in `wanted`, in the file that `synpo caption` would write with these
    options; gone on with if it is there. A video that cannot be captioned is told, and has none.

    videos: files, folders, patterns. Errors: ValueError where none of them is wanted; what `synpo caption` raises.
    """
    # transformers takes seconds to load a model
    from ..caption.command import main
    from ..caption.files import video_files

    files = [file for file in video_files(videos) if video_name(file) in wanted]
    if not files:
        raise ValueError(f"none of {', '.join(videos)} has references; are they named alike?")
    main(argparse.Namespace(config=None, model=model, videos=files, out=str(out), **options))
