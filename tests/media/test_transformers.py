"""The reader behind transformers' `load_video`."""

import io

import numpy as np
import pytest
from transformers import video_utils

from tests.media.clips import decode_sequentially, read_number
from tests.media.decode.test_damage import wound
from tokenprune.errors import MediaError
from tokenprune.media import register_with_transformers


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(video_utils, "VIDEO_DECODERS", dict(video_utils.VIDEO_DECODERS))
    register_with_transformers()
    register_with_transformers()


def test_nothing_is_registered_unasked(monkeypatch):
    monkeypatch.undo()
    assert "tokenprune" not in video_utils.VIDEO_DECODERS


@pytest.mark.parametrize("kind", ["h264_bframes", "h264_open_gop", "mpeg4"])
def test_same_frames_as_the_decoder_beside_it(kind, clip):
    path = str(clip(kind).path)
    for settings in ({"num_frames": 9}, {"fps": 5}, {}):
        ours, our_metadata = video_utils.load_video(path, backend="tokenprune", **settings)
        theirs, metadata = video_utils.load_video(path, backend="pyav", **settings)
        assert our_metadata.frames_indices == list(metadata.frames_indices)
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype == np.uint8
        assert np.abs(ours.astype(int) - theirs).mean() < 2.5
        assert our_metadata.total_num_frames == 72
        assert our_metadata.fps == pytest.approx(30, abs=0.02)
        assert our_metadata.timestamps == pytest.approx(metadata.timestamps, abs=2e-3)
    truth = decode_sequentially(clip(kind).path).transpose(0, 2, 3, 1)
    assert np.array_equal(ours, truth[list(metadata.frames_indices)])


@pytest.mark.parametrize("kind", ["h264_rotated", "vp9", "h264_mkv"])
def test_what_the_decoder_beside_it_cannot(kind, clip):
    """It leaves pictures as they lie, and finds no frames where the file declares no number."""
    ours, metadata = video_utils.load_video(
        str(clip(kind).path), backend="tokenprune", num_frames=3
    )
    assert ours.shape == (3, 112, 192, 3)
    numbers = [read_number(frame) for frame in ours.transpose(0, 3, 1, 2)]
    assert numbers == metadata.frames_indices


def test_own_choice_of_frames(clip):
    video, metadata = video_utils.load_video(
        str(clip("h264_uneven").path),
        backend="tokenprune",
        sample_indices_fn=lambda metadata, **_: np.array([70, 3, metadata.total_num_frames - 1]),
    )
    assert [read_number(frame) for frame in video.transpose(0, 3, 1, 2)] == [70, 3, 71]
    assert metadata.frames_indices == [70, 3, 71]


def test_damage_is_told(clip):
    path = wound(clip("h264_bframes"), "told")
    with pytest.warns(UserWarning, match=r"told\.mp4': \d+ of 72 frames are damaged"):
        video_utils.load_video(str(path), backend="tokenprune")


def test_bad_input_fails(clip, tmp_path):
    broken = tmp_path / "words.mp4"
    broken.write_text("no video " * 99)
    with pytest.raises(MediaError, match=r"words\.mp4"):
        video_utils.load_video(str(broken), backend="tokenprune")
    with pytest.raises(MediaError, match="reads local files only, got BytesIO; save"):
        video_utils.VIDEO_DECODERS["tokenprune"](io.BytesIO(b""), lambda metadata: [0])
