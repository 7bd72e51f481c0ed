"""How many frames, which moments, which clips, which contrast frames."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synpo.video import FramePolicy, clip_bounds, contrast_subset
from synpo.video.policy import choose_times


@pytest.mark.parametrize(
    ("policy", "duration", "count"),
    [
        (FramePolicy(), 100.0, 16),
        (FramePolicy(num_frames=5), 100.0, 5),
        (FramePolicy(fps=0.5), 3.0, 8),  # the release's numbers: below the least,
        (FramePolicy(fps=0.5), 17.9, 8),
        (FramePolicy(fps=0.5), 18.0, 9),  # between,
        (FramePolicy(fps=0.5), 100.0, 16),  # and above the most
        (FramePolicy(fps=2.0, min_frames=1, max_frames=1000), 30.0, 60),
    ],
)
def test_frames_for_a_duration(policy, duration, count):
    assert policy.count(duration) == count


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_frames": 0}, "num_frames must be at least 1, not 0"),
        ({"fps": 0.0}, "fps must be positive"),
        ({"fps": float("nan")}, "fps must be positive"),
        ({"num_frames": 4, "fps": 1.0}, "give one of them"),
        ({"min_frames": 9, "max_frames": 8}, "not 9 and 8"),
        ({"min_frames": 0}, "not 0 and 16"),
    ],
)
def test_a_policy_out_of_range_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        FramePolicy(**values)


@pytest.mark.parametrize(
    ("duration", "count"),
    [(0.04, 2), (9.99, 2), (19.99, 2), (20.0, 3), (95.0, 10), (149.9, 15), (150.0, 16), (3600.0, 16)],
)
def test_clips_are_as_many_as_the_paper_says_and_equal(duration, count):
    bounds = clip_bounds(duration)
    assert len(bounds) == count
    assert (bounds[0][0], bounds[-1][1]) == (0.0, duration)
    assert all(end == start for (_, end), (start, _) in pairwise(bounds))
    np.testing.assert_allclose([end - start for start, end in bounds], duration / count)


@pytest.mark.parametrize("duration", [0.0, -1.0, float("nan")])
def test_no_clips_without_a_duration(duration):
    with pytest.raises(ValueError, match="duration must be positive"):
        clip_bounds(duration)


@pytest.mark.parametrize(
    ("count", "kept"), [(1, [0]), (2, [1]), (3, [1]), (4, [2]), (8, [0, 3, 7]), (16, [0, 3, 7, 11, 15])]
)
def test_a_third_of_the_frames(count, kept):
    assert contrast_subset(count).tolist() == kept


@given(st.integers(1, 500), st.floats(0.001, 1.0))
def test_the_contrast_view_is_a_spread_subset(count, share):
    kept = contrast_subset(count, share)
    assert len(kept) == max(1, round(count * share))
    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    assert kept.min() >= 0
    assert kept.max() < count
    if len(kept) > 1:
        assert np.ptp(np.diff(kept)) <= 1


def test_a_contrast_view_out_of_range_is_refused():
    with pytest.raises(ValueError, match="count must be at least 1"):
        contrast_subset(0)
    with pytest.raises(ValueError, match="share must be in"):
        contrast_subset(4, 1.5)


def test_moments_at_a_constant_rate_are_evenly_spaced_frames():
    ticks = [512 * n for n in range(132)]
    for count in (1, 2, 5, 16, 131, 132, 200):
        chosen = choose_times(ticks, 0, 512 * 132, 5.28, FramePolicy(num_frames=count))
        frames = [max(n for n, tick in enumerate(ticks) if tick <= moment) for moment in chosen]
        expected = np.linspace(0, 131, min(count, 132)).astype(int).tolist() if count > 1 else [65]
        assert frames == expected


def test_moments_at_a_variable_rate_are_even_in_time():
    ticks = [0, 1, 2, 3, 4, 100, 101, 200]  # one frame stays for half of the film
    chosen = choose_times(ticks, 0, 210, 2.1, FramePolicy(num_frames=5))
    assert chosen == [0, 50, 100, 150, 200]


def test_clips_share_no_frame_and_lose_none():
    ticks = list(range(0, 1000, 7))
    edges = [0, 250, 500, 750, 1000]
    frames = [choose_times(ticks, a, b, 1.0, FramePolicy(num_frames=1000)) for a, b in pairwise(edges)]
    held = [max(tick for tick in ticks if tick <= moment) for clip in frames for moment in clip]
    assert held == ticks


def test_a_stretch_in_which_no_frame_begins_shows_what_is_on_screen():
    assert choose_times([0, 1, 100], 40, 60, 0.2, FramePolicy()) == [40]
