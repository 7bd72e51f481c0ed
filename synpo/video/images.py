"""Decoded frames as upright RGB arrays."""

import struct
from collections.abc import Callable

import av
import numpy as np
from PIL import Image

from .source import VideoError

MATRIX = "9i"  # FFmpeg's display matrix: int32, row by row, see oriented()
IDENTITY = (1, 0, 0, 0, 1, 0, 0, 0, 1)


class Images:
    """Decoded frames as arrays of one shape, within max_bytes."""

    def __init__(self, each: Callable[[np.ndarray], np.ndarray] | None, max_bytes: int, name: str) -> None:
        self.each = each
        self.left = max_bytes
        self.max_bytes = max_bytes
        self.name = name
        self.shape: tuple[int, ...] | None = None

    def of(self, frame: av.VideoFrame) -> np.ndarray:
        """(H, W, 3) uint8, RGB, upright."""
        try:
            image = oriented(frame.to_ndarray(format="rgb24"), display_matrix(frame))
        except (av.FFmpegError, ValueError) as error:
            raise VideoError(self.name, f"has pixels that cannot be shown as RGB ({error})") from error
        if self.each is not None:
            image = self.each(image)
        if self.shape is None:
            self.shape = image.shape
        elif image.shape != self.shape:  # the resolution changes within the stream: the first frame's is kept
            height, width, _ = self.shape
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
        self.left -= image.nbytes
        if self.left < 0:
            raise VideoError(
                self.name,
                f"its chosen frames take more than max_bytes={self.max_bytes}; shrink each frame or take fewer",
            )
        return np.ascontiguousarray(image)


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
