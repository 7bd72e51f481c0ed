"""Files that are not what they seem: each is read as far as it can be, or refused with its name and the cause."""

import os
import struct
from fractions import Fraction

import numpy as np
import pytest

from synpo.video import FramePolicy, VideoError, clip_bounds, decode, probe
from synpo.video.source import Deadline, _timeline, scan
from tests.video.damage import damaged
from tests.video.films import RATE, every_frame, film, real, sound

JUNK = bytes(np.random.default_rng(0).integers(0, 256, 5000, np.uint8))


def write(folder, data, name="film.mp4"):
    path = folder / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "is empty"),
        (b"\0" * 4096, "cannot be read as a video"),
        (JUNK, "cannot be read as a video"),
        (b"hello, this is a text\n" * 100, "cannot be read as a video"),
        (film()[:200], "cannot be read as a video"),  # the index of this container is at its end
    ],
    ids=["empty", "zeros", "junk", "text", "half a header"],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, data, cause):
    path = write(tmp_path, data)
    for read in (probe, decode):
        with pytest.raises(VideoError, match=cause) as caught:
            read(path)
        assert caught.value.name == str(path)
        assert str(caught.value) == f"{path}: {caught.value.cause}"
    with pytest.raises(VideoError, match=f"video of {len(data)} bytes: {cause}"):
        decode(data)


def test_sound_alone_is_refused():
    with pytest.raises(VideoError, match="has no video stream, only audio"):
        decode(sound())
    with pytest.raises(VideoError, match="has no video stream, only audio"):
        decode(sound("matroska"))


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(VideoError, match="does not exist"):
        decode(tmp_path / "absent.mp4")
    with pytest.raises(VideoError, match="is not a regular file"):
        decode(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    with pytest.raises(VideoError, match="is not a regular file"):
        decode(tmp_path / "pipe")
    with pytest.raises(VideoError, match="does not exist"):
        decode("http://127.0.0.1:9/film.mp4")


@pytest.mark.parametrize(
    "playlist",
    [
        "ffconcat version 1.0\nfile {film}\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{film}\n#EXT-X-ENDLIST\n",
    ],
)
def test_a_playlist_cannot_open_other_files(tmp_path, playlist):
    """FFmpeg would: a downloaded "video" could then read any file and any address."""
    write(tmp_path, film("mpegts"), "other.ts")
    with pytest.raises(VideoError, match="cannot be read as a video"):
        decode(write(tmp_path, playlist.format(film="other.ts").encode(), "list.mp4"))


def test_a_header_without_frames_is_refused():
    whole = film(container_options={"movflags": "frag_keyframe+empty_moov"})
    with pytest.raises(VideoError, match="has no frame of video"):
        decode(whole[: whole.index(b"moof") - 4])


@pytest.mark.parametrize("container", ["matroska", "flv", "mpegts"])
def test_a_truncated_film_gives_what_is_there(container):
    data = film(container, frames=60, codec_options={"g": "6"})
    whole, _ = every_frame(data)
    video = decode(data[: len(data) * 6 // 10], FramePolicy(num_frames=8), clips=clip_bounds)
    assert 1.5 < video.duration < 5.0
    assert video.times[-1] == pytest.approx(video.duration - 1 / RATE, abs=0.31)  # a cut frame, and two that need it
    shown = [round(time * RATE) for time in video.times]
    np.testing.assert_array_equal(video.frames[:-1], whole[shown[:-1]])
    if container != "mpegts":  # which states no duration
        assert video.facts.header_duration >= 6.0


def test_an_undecodable_end_shows_the_last_frame():
    data = bytearray(film("avi", "mjpeg", frames=20))
    pictures = [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]
    for at in pictures[15:20]:
        data[at : at + 600] = bytes(600)
    whole, _ = every_frame(film("avi", "mjpeg", frames=15))
    video = decode(bytes(data), FramePolicy(num_frames=20), tolerance=0.3)
    assert video.damaged == 5
    assert (video.frames[14:] == whole[14]).all()
    with pytest.raises(VideoError, match=r"5 of 20 frames are damaged, more than tolerance=0\.1"):
        decode(bytes(data))


def test_a_damaged_film_gives_the_same_frames_every_time():
    """A resumed run must write what an undisturbed one would. With threads=4, seven of eight of these do not."""
    rng = np.random.default_rng(5)
    whole = real("carphone_pristine").read_bytes()
    for _ in range(4):
        data = damaged(whole, "few bits", rng)
        first, second, third = (decode(data, FramePolicy(num_frames=6), tolerance=1.0) for _ in range(3))
        assert first.damaged == second.damaged == third.damaged > 0
        np.testing.assert_array_equal(first.frames, second.frames)
        np.testing.assert_array_equal(first.frames, third.frames)


def test_nothing_that_can_be_decoded_is_refused():
    data = bytearray(film("avi", "mjpeg", frames=4))
    for at in [at for at in range(len(data)) if data[at : at + 3] == b"\xff\xd8\xff"]:
        data[at : at + 600] = bytes(600)
    for read in (probe, decode):
        with pytest.raises(VideoError, match="none of its frames can be decoded"):
            read(bytes(data))


def test_frames_that_are_too_large_are_refused(monkeypatch):
    monkeypatch.setattr("synpo.video.source.MAX_PIXELS", 1000)
    with pytest.raises(VideoError, match="has frames of 96x64; 1000 pixels are the limit"):
        decode(film())
    data = bytearray(film("avi", "mjpeg"))
    for at in [at for at in range(len(data)) if data[at : at + 4] == b"\xff\xc0\x00\x11"]:
        data[at + 5 : at + 9] = struct.pack(">HH", 30000, 30000)  # the container says 96 x 64, the picture gigapixels
    monkeypatch.undo()
    with pytest.raises(VideoError, match="none of its frames can be decoded"):
        decode(bytes(data))


def test_stamps_that_start_again_are_counted():
    """Two recordings in one transport stream: sorted by time they would alternate."""
    data = film("mpegts", frames=20) + film("mpegts", frames=20)
    whole, times = every_frame(data)
    assert sorted(times) != times
    video = decode(data, FramePolicy(num_frames=40))
    assert video.facts.timing == "count"
    np.testing.assert_array_equal(video.frames, whole)


def test_a_stream_without_header_is_timed_at_its_rate():
    facts = probe(film("h264"))
    assert (facts.timing, facts.header_duration) == ("count", None)
    assert facts.duration == pytest.approx(3.0)


SECOND = Fraction(1, 1000)


@pytest.mark.parametrize(
    ("packets", "timing", "ticks"),
    [
        ([(0, 0), (200, 100), (100, 200)], "stamps", (0, 100, 200)),
        ([(0, None), (200, None), (100, 200)], "stamps", (0, 100, 200)),
        ([(None, 0), (None, 100), (None, 300)], "order", (0, 100, 300)),
        ([(0, 0), (None, 100), (None, 300)], "order", (0, 100, 300)),
        ([(None, None), (None, None), (None, None)], "count", (0, 1, 2)),
        ([(0, 0), (None, None), (200, 200)], "count", (0, 1, 2)),
        ([(5, 5), (5, 5), (5, 5)], "count", (0, 1, 2)),  # a zero duration
        ([(0, 0), (100, 100), (0, 0)], "count", (0, 1, 2)),
        ([(0, 0), (10**9, 100), (200, 200)], "count", (0, 1, 2)),  # a flipped bit: eleven days
    ],
)
def test_the_timeline_of_packets(packets, timing, ticks):
    found = [(pts, dts, 0, True) for pts, dts in packets]
    timeline = _timeline(found, SECOND, Fraction(RATE), None, "")
    assert (timeline.timing, timeline.ticks) == (timing, ticks)
    assert timeline.seconds > 0


@pytest.mark.parametrize("rate", [None, Fraction(0), Fraction(90000)])
def test_without_a_usable_rate_25_is_taken(rate):
    timeline = _timeline([(None, None, 0, True)] * 50, None, rate, None, "")
    assert timeline.seconds == pytest.approx(2.0)


def test_the_last_frame_stays_as_long_as_its_packet_says():
    found = [(0, 0, 100, True), (100, 100, 100, False), (200, 200, 700, False)]
    assert _timeline(found, SECOND, None, None, "").seconds == pytest.approx(0.9)


def test_a_scan_reads_no_pixel(monkeypatch):
    data = film()
    monkeypatch.setattr("av.codec.context.CodecContext.decode", None, raising=False)
    assert len(scan(data, Deadline("film", 10.0)).ticks) == 30
