"""Size rules against the processors that they stand for; the keys of chat messages."""

import math

import numpy as np
import pytest

from tests.media.clips import encode, read_number, x264
from tokenprune.errors import MediaError
from tokenprune.media import PixelLimits, ShortestEdge, VolumeLimits, read_message, read_video
from tokenprune.media.message import _check, _size

SHAPES = [(112, 192), (1080, 1920), (1920, 1080), (33, 5000), (720, 1280), (57, 57), (28, 2800)]


@pytest.mark.parametrize("multiple", [28, 32])
@pytest.mark.parametrize("limits", [(56 * 56, 200_000), (100_352, 602_112), (1, 10_000)])
def test_pixel_limits_are_those_of_transformers(multiple, limits):
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

    rule = PixelLimits(multiple=multiple, min_pixels=limits[0], max_pixels=limits[1])
    random = np.random.default_rng(0)
    shapes = [*SHAPES, *random.integers(multiple, 2500, (300, 2)).tolist()]
    for height, width in shapes:
        if max(height, width) < 200 * min(height, width):
            expected = smart_resize(height, width, multiple, *limits)
            assert rule(height, width, 8) == expected, (height, width)


@pytest.mark.parametrize("frames", [2, 64, 400, 768, 5000])
def test_frames_share_pixels_as_in_transformers(frames):
    import torch
    from transformers import Qwen2VLVideoProcessor

    processor = Qwen2VLVideoProcessor(cap_pixels_per_frame=True)
    total = int(processor.max_video_tokens * 28 * 28 * 0.9)
    rule = PixelLimits(total_pixels=total)
    for height, width in SHAPES[:3]:
        video = torch.empty(frames, 3, height, width, dtype=torch.uint8, device="meta")
        made = processor(videos=[video], do_sample_frames=False, return_tensors="pt")
        grid = made["video_grid_thw"][0].tolist()
        assert rule(height, width, frames) == (grid[1] * 14, grid[2] * 14)


@pytest.mark.parametrize("frames", [1, 2, 3, 5, 8, 9, 64, 700])
@pytest.mark.parametrize("limits", [(128 * 1024, 768 * 1024), (4096, 25_165_824), (10, 100_000)])
def test_volume_limits_are_those_of_transformers(limits, frames):
    from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

    rule = VolumeLimits(min_pixels=limits[0], max_pixels=limits[1])
    shapes = [*SHAPES, (20, 900), *np.random.default_rng(0).integers(8, 2500, (300, 2)).tolist()]
    for height, width in shapes:
        if max(height, width) < 200 * min(height, width):
            expected = smart_resize(max(2, frames), height, width, 2, 32, *limits)
            assert rule(height, width, frames) == expected, (height, width)


def test_no_share_lifts_a_frame_above_its_limit():
    rule = PixelLimits(multiple=2, min_pixels=10_000, max_pixels=10_000, total_pixels=1)
    assert rule(1000, 1000, 64) == (100, 100)
    rule = PixelLimits(multiple=2, min_pixels=10_000, max_pixels=20_000, total_pixels=1)
    assert rule(1000, 1000, 64) == (102, 102)  # 1.05 times the least


def test_shortest_edge_is_that_of_transformers():
    import torch
    from transformers import LlavaNextVideoVideoProcessor

    processor = LlavaNextVideoVideoProcessor(do_center_crop=False)
    for height, width in [(112, 192), (1080, 1920), (1920, 1080), (500, 500), (333, 1000)]:
        video = torch.empty(2, 3, height, width, dtype=torch.uint8, device="meta")
        made = processor(
            videos=[video], do_sample_frames=False, do_center_crop=False, return_tensors="pt"
        )["pixel_values_videos"]
        edge = processor.size["shortest_edge"]
        assert ShortestEdge(edge)(height, width, 2) == tuple(made.shape[-2:])


def test_rules_are_applied_in_the_decoder(clip):
    rule = PixelLimits(min_pixels=1, max_pixels=10_000)
    video = read_video(clip("h264_rotated").path, indices=[33], size=rule)
    assert video.frames.shape == (1, 3, 56, 112)
    assert read_number(video.frames[0].numpy()) == 33
    assert read_video(clip("hevc").path, frames=1, size=ShortestEdge(56)).frames.shape[2:] == (
        56,
        96,
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PixelLimits(min_pixels=5, max_pixels=4), "0 < min_pixels <= max_pixels.*5 and 4"),
        (lambda: VolumeLimits(min_pixels=5, max_pixels=4), "0 < min_pixels <= max_pixels.*5 and 4"),
        (lambda: VolumeLimits()(10, 4000, 1), "at most 200 times .*32x12800"),
        (lambda: PixelLimits(multiple=0), "multiple must be at least 1, got 0"),
        (lambda: PixelLimits(total_pixels=0), "total_pixels must be at least 1, got 0"),
        (lambda: PixelLimits()(10, 4000, 1), "at most 200 times .*10x4000"),
        (lambda: ShortestEdge(0), "pixels must be at least 1, got 0"),
    ],
)
def test_wrong_rule_fails(make, message):
    with pytest.raises(MediaError, match=message):
        make()


def part(clip, **keys):
    return {"type": "video", "video": str(clip("h264_bframes").path), **keys}


def test_message_keys_choose_frames(clip):
    def ranks(**keys):
        return read_message(part(clip, **keys)).indices.tolist()

    assert ranks(nframes=4) == [0, 24, 47, 71]
    assert ranks(nframes=5) == ranks(nframes=4)  # to even numbers, halves too
    assert ranks() == ranks(fps=2.0) == ranks(nframes=4)  # 2.4 seconds
    assert len(ranks(fps=10)) == 24
    assert len(ranks(fps=10, max_frames=9)) == 8
    assert len(ranks(fps=0.1, min_frames=7)) == 8
    assert len(ranks(fps=1000)) == 72
    assert ranks(nframes=2, video_start=1, video_end=2) == [30, 60]
    assert ranks(nframes=2, video_start=0.99) == [30, 71]
    assert read_message(part(clip) | {"video": f"file://{clip('hevc').path}"}).damaged == 0


def test_a_rounded_rate_costs_no_frames(tmp_path):
    """Ten seconds of 24 frames each, in ticks of which the last frame has one less."""
    clip = encode(tmp_path / "24.mp4", numbers=range(240), rate=24, options=x264("keyint=48"))
    assert len(read_message({"video": str(clip.path), "fps": 2})) == 20


def test_one_limit_moves_the_other(clip):
    """If it was not given."""
    assert len(read_message(part(clip, max_frames=2))) == 2

    def size(multiple=28, frames=8, **keys):
        return _size(_check(part(clip, **keys)), multiple)(1080, 1920, frames)

    assert size(max_pixels=1_003_520) == size() == (560, 1008)  # no more than 768 tokens
    assert size(multiple=32) == (640, 1152)
    assert size(min_pixels=700_000) == (616, 1120)  # up to 1.05 times
    assert size(frames=2000) == (224, 420)  # a share of 115,200 tokens, but no less than that


def test_message_keys_choose_sizes(clip):
    def size(**keys):
        return tuple(read_message(part(clip, nframes=2, **keys)).frames.shape[2:])

    assert size() == (252, 420)  # enlarged to 128 tokens
    assert size(max_pixels=20_000) == (84, 168)
    assert size(min_pixels=1, max_pixels=10_000) == (56, 112)
    assert size(min_pixels=1, total_pixels=10_000) == (56, 112)
    assert size(resized_height=60, resized_width=111) == (56, 112)
    assert size(resized_height=28, resized_width=28) == (56, 56)  # four tokens at least
    assert size(resized_height=0.5, resized_width=0.5) == (56, 56)
    assert size(min_pixels=200_000)[0] * size(min_pixels=200_000)[1] >= 200_000
    large = read_message(part(clip, nframes=2, min_pixels=1), multiple=32)
    assert [side % 32 for side in large.frames.shape[2:]] == [0, 0]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"fsp": 1}, "no key 'fsp'; known: video, fps"),
        ({"video": ["a.jpg"]}, "no such file: 'a.jpg'; give the path"),
        ({"video": "https://example.org/a.mp4"}, "only local files are read, got 'https:"),
        ({"fps": 1, "nframes": 2}, "give fps or nframes, got both"),
        ({"fps": 0}, "fps must be a number above 0, got 0"),
        ({"fps": math.inf}, "fps must be a number above 0, got inf"),
        ({"max_pixels": "many"}, "max_pixels must be a number above 0, got 'many'"),
        ({"nframes": 74}, "nframes must be from 2 to 72, the frames in the range, got 74"),
        ({"nframes": 1e-3}, "nframes must be from 2 to 72"),
        ({"min_frames": 8, "max_frames": 4}, "min_frames must not exceed max_frames, got 8 and 4"),
        ({"video_start": 2, "video_end": 1}, "must leave at least two frames .*got 2 and 1"),
        ({"video_start": 5}, "must leave at least two frames .*got 5 and inf"),
        ({"resized_height": 56}, "give resized_height and resized_width together"),
        ({"min_pixels": 9, "max_pixels": 8}, "0 < min_pixels <= max_pixels.*9 and 8"),
    ],
)
def test_wrong_message_fails(keys, message, clip):
    with pytest.raises(MediaError, match=message):
        read_message(part(clip) | keys)
