"""Frames out of one pass are those of a whole decode, whatever the container, the rate and the orientation."""

import io
import pickle
import struct

import av
import numpy as np
import pytest

from synpo.video import FramePolicy, PixelSpec, VideoError, clip_bounds, decode, probe
from synpo.video import decoding as module
from tests.video.films import HEIGHT, RATE, WIDTH, every_frame, film, picture, real

FILMS = {
    "mp4": ("mp4", "libx264", {}),
    "mp4-fragmented": ("mp4", "libx264", {"movflags": "frag_keyframe+empty_moov"}),
    "mp4-mjpeg": ("mp4", "mjpeg", {}),
    "hevc": ("mp4", "libx265", {}),
    "matroska": ("matroska", "libx264", {}),
    "webm-vp9": ("webm", "libvpx-vp9", {}),
    "avi": ("avi", "mpeg4", {}),
    "avi-h264": ("avi", "libx264", {}),
    "mpegts": ("mpegts", "libx264", {}),
    "flv": ("flv", "libx264", {}),
    "raw-h264": ("h264", "libx264", {}),
    "raw-mjpeg": ("mjpeg", "mjpeg", {}),
    "nut-ffv1": ("nut", "ffv1", {}),
}
QUIET = {"libx265": {"x265-params": "log-level=none"}, "libx264": {"g": "12", "bf": "2"}}


def expected(count: int, chosen: int) -> np.ndarray:
    return np.arange(chosen) * (count - 1) // (chosen - 1)


@pytest.mark.parametrize("name", FILMS)
def test_the_frames_of_a_whole_decode(name):
    container, codec, options = FILMS[name]
    data = film(container, codec, 40, container_options=options, codec_options=QUIET.get(codec))
    whole, _ = every_frame(data)
    assert len(whole) == 40
    video = decode(data, FramePolicy(num_frames=7), clips=clip_bounds, clip_policy=FramePolicy(num_frames=4), threads=1)
    rate = 25 if name == "raw-mjpeg" else RATE  # it does not store one
    np.testing.assert_array_equal(video.frames, whole[expected(40, 7)])
    np.testing.assert_allclose(video.times, expected(40, 7) / rate, atol=2e-3)
    assert [(clip.start, clip.end) for clip in video.clips] == clip_bounds(video.duration)
    for number, clip in enumerate(video.clips):
        np.testing.assert_array_equal(clip.frames, whole[20 * number + expected(20, 4)])
    assert video.damaged == 0
    assert (video.facts.frames, video.facts.width, video.facts.height) == (40, WIDTH, HEIGHT)
    assert video.duration == pytest.approx(40 / rate, abs=2e-3)
    assert not video.facts.variable_rate
    assert video.facts.timing == {"raw-h264": "count", "avi-h264": "order"}.get(name, "stamps")


@pytest.mark.parametrize("name", ["bigbuckbunny", "bikes", "carphone_pristine"])
def test_real_videos(name):
    path = real(name)
    whole, _ = every_frame(path)
    video = decode(path, FramePolicy(fps=0.5), clips=clip_bounds, clip_policy=FramePolicy(num_frames=3))
    np.testing.assert_array_equal(video.frames, whole[expected(len(whole), 8)])
    half = len(whole) // 2
    for number, clip in enumerate(video.clips):
        np.testing.assert_array_equal(clip.frames, whole[half * number + expected(half, 3)])
    assert video.path == str(path)
    assert probe(path) == video.facts


def test_threads_change_nothing():
    one, many = (decode(real("bikes"), FramePolicy(num_frames=9), threads=threads) for threads in (1, 4))
    np.testing.assert_array_equal(one.frames, many.frames)


def test_the_file_is_decoded_once(monkeypatch):
    """Views of every kind, and each frame goes through the decoder a single time."""
    given = []
    decoded = module._Reader._decoded

    def counted(self, context, packet):
        given.append(packet)
        return decoded(self, context, packet)

    monkeypatch.setattr(module._Reader, "_decoded", counted)
    video = decode(film(frames=50), clips=lambda seconds: [(0.1 * n, seconds) for n in range(20)])
    assert len(video.clips) == 20
    assert len([packet for packet in given if packet is not None]) == 50


def test_frames_that_views_share_are_kept_once():
    video = decode(film(), FramePolicy(num_frames=6), clips=lambda seconds: [(0.0, seconds)])
    assert all(a is b for a, b in zip(video.whole.images, video.clips[0].images, strict=True))


VARIABLE = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 50, 51, 52, 53, 54, 90, 91, 92, 93, 99]


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_variable_rate_is_sampled_by_time(container):
    data = film(container, pts=VARIABLE)
    whole, _ = every_frame(data)
    video = decode(data, FramePolicy(num_frames=12))
    on_screen = [max(n for n, pts in enumerate(VARIABLE) if pts <= moment) for moment in np.arange(12) * 99 // 11]
    assert len(set(on_screen)) < 12
    np.testing.assert_array_equal(video.frames, whole[on_screen])
    np.testing.assert_allclose(video.times, [VARIABLE[n] / RATE for n in on_screen], atol=2e-3)
    assert video.facts.variable_rate


def test_a_clip_in_which_nothing_moves_shows_one_frame():
    video = decode(film(pts=VARIABLE), clips=lambda seconds: [(1.5, 4.0), (5.0, 5.5)])
    assert [len(clip) for clip in video.clips] == [1, 5]
    assert video.clips[0].times[0] == pytest.approx(0.9)


def test_fewer_frames_than_asked_for_are_each_given_once():
    video = decode(film(frames=5), FramePolicy(num_frames=16))
    np.testing.assert_allclose(video.times, np.arange(5) / RATE)


def test_a_single_frame_has_a_duration_and_clips():
    video = decode(film(frames=1), clips=clip_bounds)
    assert video.frames.shape == (1, HEIGHT, WIDTH, 3)
    assert video.duration == pytest.approx(1 / RATE)
    assert [len(clip) for clip in video.clips] == [1, 1]


@pytest.mark.parametrize(("angle", "turns"), [(0, 0), (90, 1), (180, 2), (-90, 3)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_frames_are_upright(angle, turns, mirrored):
    data = film(rotation=angle, mirrored=mirrored)
    stored, _ = every_frame(data)
    video = decode(data, FramePolicy(num_frames=2))
    shown = np.rot90(stored[0], turns)  # both count against the clock
    candidates = [shown[:, ::-1], shown[::-1]] if mirrored else [shown]
    assert any(np.array_equal(video.frames[0], candidate) for candidate in candidates)
    assert (video.facts.height, video.facts.width) == shown.shape[:2]
    assert video.facts == probe(data)


def test_a_section_is_a_video_of_its_own():
    data = film(frames=100, codec_options={"g": "10", "bf": "2"})
    whole, _ = every_frame(data)
    video = decode(
        data, FramePolicy(num_frames=6), section=(4.05, 6.0), clips=clip_bounds, clip_policy=FramePolicy(num_frames=99)
    )
    np.testing.assert_array_equal(video.frames, whole[41 + expected(19, 6)])
    np.testing.assert_allclose(video.times, (41 + expected(19, 6)) / RATE - 4.05)
    assert video.duration == pytest.approx(1.95)
    assert [clip.start for clip in video.clips] == pytest.approx([0.0, 0.975])
    assert [round(float(t + 4.05) * RATE) for clip in video.clips for t in clip.times] == list(range(41, 60))


def test_a_late_section_decodes_little_before_it(monkeypatch):
    reads = []
    collect = module._collect

    def watched(reader, *rest):
        shown = collect(reader, *rest)
        reads.append(reader.read)
        return shown

    monkeypatch.setattr(module, "_collect", watched)
    data = film(frames=100, codec_options={"g": "10", "bf": "0", "sc_threshold": "0"})
    decode(data, FramePolicy(num_frames=2), section=(7.5, 8.0), threads=1)
    assert reads[0] <= 25  # a keyframe at 6.0, one at 7.0, and the decoder's own delay


@pytest.mark.parametrize(
    ("section", "error", "message"),
    [
        ((2.0, 1.0), ValueError, "0 <= start < end"),
        ((-1.0, 1.0), ValueError, "0 <= start < end"),
        ((3.0, 4.0), VideoError, "begins after its end at 3.000 s"),
    ],
)
def test_a_section_out_of_range_is_refused(section, error, message):
    with pytest.raises(error, match=message):
        decode(film(), section=section)


def test_clips_out_of_range_are_refused():
    with pytest.raises(ValueError, match="clips: 0 <= start < end"):
        decode(film(), clips=lambda seconds: [(0.0, 1.0), (2.0, 2.0)])
    with pytest.raises(VideoError, match=r"clip \(3\.0, 4\.0\) begins after its end at 3\.000 s"):
        decode(film(), clips=lambda seconds: [(0.0, 1.0), (seconds, seconds + 1)])


def test_each_frame_is_shrunk_as_it_is_decoded_by_the_size_of_its_view():
    seen = []

    def shrink(image, count):
        seen.append(count)
        return np.ascontiguousarray(image[::count, ::count])

    video = decode(
        film(), FramePolicy(num_frames=4), clips=clip_bounds, clip_policy=FramePolicy(num_frames=2), each=shrink
    )
    assert video.frames.shape == (4, 16, 24, 3)
    assert video.clips[0].frames.shape == (2, 32, 48, 3)
    assert sorted(seen) == [2] * 4 + [4] * 4


def test_frames_that_a_model_cannot_take_are_refused_by_name(tmp_path):
    (tmp_path / "flat.mp4").write_bytes(film(size=(2, 602), codec="mpeg4"))
    with pytest.raises(VideoError, match=r"flat\.mp4: frames of 602x2 are too oblong"):
        decode(tmp_path / "flat.mp4", each=PixelSpec.of("qwen2_vl").resize)


def test_a_change_of_resolution_keeps_the_first():
    data = film("mpegts", frames=10) + film("mpegts", frames=10, size=(128, 192))
    video = decode(data, FramePolicy(num_frames=20))
    assert video.frames.shape == (20, HEIGHT, WIDTH, 3)
    assert video.facts.timing == "count"  # the time stamps start again in the middle
    assert abs(video.frames[-1].astype(int) - picture(9)).mean() < 8


def test_memory_is_bounded():
    with pytest.raises(VideoError, match="more than max_bytes=100000; give `each` or take fewer frames"):
        decode(film(), max_bytes=100_000)


def test_a_time_limit_ends_the_work():
    with pytest.raises(VideoError, match=r"video of \d+ bytes: not done after time_limit=1e-09 s"):
        decode(film(), time_limit=1e-9)
    with pytest.raises(ValueError, match="time_limit must be positive"):
        decode(film(), time_limit=0.0)


def test_a_header_with_another_duration_is_not_believed():
    data = bytearray(film("matroska"))
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration, a double of 8 bytes, in milliseconds
    data[at : at + 8] = struct.pack(">d", 3.6e6)
    video = decode(bytes(data))
    assert video.duration == pytest.approx(3.0, abs=2e-3)
    assert video.facts.header_duration == pytest.approx(3600)


def test_a_video_can_be_sent_to_another_process():
    video = decode(film(), clips=clip_bounds)
    again = pickle.loads(pickle.dumps(video))
    np.testing.assert_array_equal(again.frames, video.frames)
    assert again.facts == video.facts


def test_cover_art_is_no_video():
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as target:
        cover = target.add_stream("mjpeg", rate=1)
        cover.height, cover.width, cover.pix_fmt = HEIGHT, WIDTH, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        target.mux(cover.encode(av.VideoFrame.from_ndarray(picture(0), format="rgb24")))
        target.mux(cover.encode(None))
    with pytest.raises(VideoError, match="has no video stream"):
        decode(out.getvalue())
