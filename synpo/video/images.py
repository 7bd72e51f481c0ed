"""Decoded frames as upright RGB arrays."""

import struct
from collections.abc import Callable

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from PIL import Image

from .source import VideoError

MATRIX = "9i"  # FFmpeg's display matrix: int32, row by row, see oriented()
IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)


class Images:
    """Decoded frames as arrays, those of views of one size in one shape, within max_bytes."""

    def __init__(self, each: Callable[[np.ndarray, int], np.ndarray] | None, max_bytes: int, name: str) -> None:
        self.each = each
        self.left = self.max_bytes = max_bytes
        self.name = name
        self.shapes: dict[int, tuple[int, ...]] = {}
        self.latest: tuple[av.VideoFrame, np.ndarray] | None = None
        self.reformatter = VideoReformatter()  # its tables serve every frame; making them anew costs 0.3 ms and more

    def of(self, frame: av.VideoFrame, count: int) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright, of a frame in a view of `count` frames."""
        image = self._upright(frame)
        if self.each is not None:
            try:
                image = self.each(image, count)
            except ValueError as error:  # a shape that the model cannot take
                raise VideoError(self.name, str(error)) from error
        shape = self.shapes.setdefault(count, image.shape)
        if image.shape != shape:  # the resolution changes within the stream: the first frame's is kept
            image = np.asarray(Image.fromarray(image).resize((shape[1], shape[0]), Image.Resampling.BICUBIC))
        self.left -= image.nbytes
        if self.left < 0:
            raise VideoError(
                self.name, f"chosen frames take more than max_bytes={self.max_bytes}; give `each` or take fewer frames"
            )
        return image

    def _upright(self, frame: av.VideoFrame) -> np.ndarray:
        if self.latest is None or self.latest[0] is not frame:
            try:
                rgb = self.reformatter.reformat(frame, format="rgb24").to_ndarray()
                image = oriented(rgb, display_matrix(frame))
            except (av.FFmpegError, ValueError) as error:
                raise VideoError(self.name, f"has pixels that cannot be shown as RGB ({error})") from error
            self.latest = frame, np.ascontiguousarray(image)
        return self.latest[1]


def display_matrix(frame: av.VideoFrame) -> tuple[int, ...]:
    """The nine numbers with which a file asks for rotation or mirroring; the identity where it does not."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return struct.unpack(MATRIX, bytes(data))
    return IDENTITY


def oriented(image: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """An image (H, W, C) the way it is to be seen; other angles than quarter turns go to the nearest one.

    FFmpeg's matrix maps a stored pixel (x, y) to the shown (a x + c y, b x + d y).
    """
    a, b, _, c, d, *_ = matrix
    turned = abs(b) > abs(a)
    if turned:
        image = image.transpose(1, 0, 2)
    across, down = (c, b) if turned else (a, d)
    return image[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1]
