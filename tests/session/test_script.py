"""Groups of frames: how a session tells processors of them."""

from __future__ import annotations

import pytest
import torch

from tokenprune.media import Clip, Timings, Video
from tokenprune.session.script import FrameGroup, Pace

PACE = Pace(source_fps=30.0, sampled_fps=2.0)


def frames(count: int) -> torch.Tensor:
    return torch.zeros(count, 3, 8, 12, dtype=torch.uint8)


def test_a_group_is_a_clip_of_no_file() -> None:
    group = FrameGroup.at_pace(frames(2), torch.tensor([30, 45]), PACE)

    assert isinstance(group, Clip) and not isinstance(group, Video)
    assert group.pts_seconds.tolist() == [1.0, 1.5]
    assert group.pts_seconds.dtype == torch.float64
    assert group.timings == Timings(0.0, 0.0)


def test_processors_are_told_the_rate_of_the_whole_clip() -> None:
    metadata = FrameGroup.at_pace(frames(2), torch.tensor([30, 45]), PACE).metadata

    assert metadata.sampled_fps == 2.0 and metadata.fps == 30.0
    assert metadata.timestamps == [1.0, 1.5]
    assert (metadata.total_num_frames, metadata.duration) == (46, pytest.approx(46 / 30))


def test_indices_of_a_group_are_even_whatever_its_seconds() -> None:
    seconds = torch.tensor([0.0, 0.4], dtype=torch.float64)
    group = FrameGroup(frames(2), seconds, torch.tensor([0, 15]), PACE)

    assert group.even_indices.tolist() == group.metadata.frames_indices == [0, 15]
