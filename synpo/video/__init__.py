"""Videos: decoded once, their frames chosen by time, turned into the pixels that a vision tower takes.

video = decode("film.mp4", FramePolicy(fps=0.5), clips=clip_bounds)
video.frames                                     # (F, H, W, 3) uint8: the whole
video.clips[0].frames                            # of each clip, from the same pass over the file
video.frames[contrast_subset(len(video.times))]  # contrastive decoding's poorer view
"""

from .decoding import Facts, Video, View, decode, probe
from .pixels import PixelSpec, pixels
from .policy import FramePolicy, clip_bounds, contrast_subset
from .source import VideoError

__all__ = [
    "Facts", "FramePolicy", "PixelSpec", "Video", "VideoError", "View", "clip_bounds", "contrast_subset", "decode",
    "pixels", "probe",
]  # fmt: skip
