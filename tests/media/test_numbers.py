"""Numbers of NumPy and torch are numbers; `True` and NaN are none, wherever a number is taken."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from tokenprune.errors import MediaError
from tokenprune.media import PixelLimits, ShortestEdge, VolumeLimits, read_video, stream_video
from tokenprune.media.numbers import numbers_of, parse_number, parse_whole

WHOLE = [np.int64, np.uint8, torch.tensor, np.array, lambda n: torch.tensor(n, dtype=torch.int16)]
BROKEN = [*WHOLE, np.float32, lambda n: torch.tensor(float(n)), Fraction]
WRONG = [True, False, np.True_, torch.tensor(True), math.nan, np.float32("nan"), "2", 1j]
WRONG += [torch.tensor(math.nan), torch.tensor([2]), np.array([2]), b"2"]

WHOLE_ARGUMENTS = ["frames", "workers", "stream"]
ARGUMENTS = ["fps", "start", "end", "timeout_seconds"]


@pytest.fixture
def path(clip):
    return clip("h264_bframes").path


@pytest.mark.parametrize("make", BROKEN)
def test_scalars_are_numbers(make, path):
    assert parse_number("x", make(2)) == 2.0
    plain = read_video(path, fps=2, start=1, end=2)
    same = read_video(path, fps=make(2), start=make(1), end=make(2), timeout_seconds=make(9))
    assert same.indices.tolist() == plain.indices.tolist()


@pytest.mark.parametrize("make", WHOLE)
def test_scalars_are_whole_numbers(make, path):
    video = read_video(path, frames=make(3), workers=make(1), size=(make(8), make(9)))
    assert video.frames.shape == (3, 3, 8, 9)
    groups = stream_video(path, frames=make(3), group=make(2), first_group=make(1))
    assert [len(group) for group in groups] == [1, 2]
    assert PixelLimits(make(28), make(100), make(200), make(250)) == PixelLimits(28, 100, 200, 250)
    assert VolumeLimits(make(28), make(100), make(200)) == VolumeLimits(28, 100, 200)
    assert ShortestEdge(make(56))(100, 200, 1) == (56, 112)


@pytest.mark.parametrize("make", [np.array, torch.tensor, tuple, list])
def test_lists_may_be_arrays(make, path):
    assert read_video(path, indices=make([4, 2])).indices.tolist() == [4, 2]
    assert len(read_video(path, seconds=make([0.5, 1.0]))) == 2
    assert read_video(path, frames=1, size=make([8, 9])).frames.shape == (1, 3, 8, 9)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_number_is_refused(wrong, path):
    for name in WHOLE_ARGUMENTS + ARGUMENTS:
        for attempt in (read_video, stream_video):
            with pytest.raises(MediaError, match=rf"^{name} must be .*, got "):
                attempt(path, **{name: wrong})
    for name in ("group", "first_group"):
        with pytest.raises(MediaError, match=rf"^{name} must be .*, got "):
            stream_video(path, **{name: wrong})
    for name in ("indices", "seconds"):
        with pytest.raises(MediaError, match=rf"^{name} must "):
            read_video(path, **{name: [wrong]})
    with pytest.raises(MediaError, match="^size must be "):
        read_video(path, size=(8, wrong))
    for name in ("multiple", "min_pixels", "max_pixels", "total_pixels"):
        with pytest.raises(MediaError, match=rf"^{name} must be a whole number, got"):
            PixelLimits(**{name: wrong})
    with pytest.raises(MediaError, match="^pixels must be a whole number, got"):
        ShortestEdge(wrong)


@pytest.mark.parametrize("wrong", [2.0, 2.5, np.float64(2)])
def test_what_is_not_whole_is_refused(wrong, path):
    for name in WHOLE_ARGUMENTS:
        with pytest.raises(MediaError, match=rf"^{name} must be a whole number"):
            read_video(path, **{name: wrong})


def test_bounds():
    assert parse_number("x", math.inf, infinite=True) == math.inf
    assert parse_number("x", -math.inf, infinite=True) == -math.inf
    for wrong in (math.inf, -math.inf):
        with pytest.raises(MediaError, match="x must be a number, got"):
            parse_number("x", wrong)
    with pytest.raises(MediaError, match="x must be above 1, got 1"):
        parse_number("x", 1, above=1, rule="be above 1")
    with pytest.raises(MediaError, match="x must be a whole number of at least 2, got 1"):
        parse_whole("x", 1, least=2)
    with pytest.raises(MediaError, match="x must be a list of numbers, got 5"):
        numbers_of("x", 5)
    with pytest.raises(MediaError, match="x must be a number, got tensor"):
        parse_number("x", torch.empty((), device="meta"))
