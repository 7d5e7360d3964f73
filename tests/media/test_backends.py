"""Other libraries as decoders: the same frames as ours, or a refusal; and what if they lack.

The libraries are extras. Where one does not load, its tests are skipped, or fail if
`FAIL_WITHOUT_BACKENDS` is set.
"""

import os
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from tests.media.clips import KINDS, read_number
from tokenprune.errors import DecodeError, MediaError, MissingExtraError
from tokenprune.media import read_video, stream_video
from tokenprune.media.backends import check_backend

EASY = ["h264_bframes", "h264_sound", "h264_one_keyframe", "h264_uneven", "hevc", "vp9"]
HARD = [
    "h264_open_gop",  # frames shown before their keyframe
    "h264_ts_offset",
    "h264_ts_joined",
    "h264_avi",
    "h264_raw",
    "h264_edit_list",
    "mpeg4",  # its groups are open, too
    "mpeg4_avi",
    "mjpeg_avi",
]


@pytest.fixture(params=["decord", "torchcodec"])
def backend(request):
    try:
        check_backend(request.param)
    except MissingExtraError as error:
        if "FAIL_WITHOUT_BACKENDS" in os.environ:
            raise
        pytest.skip(str(error))
    return request.param


@pytest.mark.parametrize("kind", EASY)
def test_same_frames_as_ours(kind, clip, backend):
    path = clip(kind).path
    ours = read_video(path, frames=20)
    theirs = read_video(path, frames=20, backend=backend)

    assert torch.equal(ours.indices, theirs.indices)
    assert torch.equal(ours.pts_seconds, theirs.pts_seconds)
    assert [read_number(f) for f in theirs.frames.numpy()] == theirs.indices.tolist()
    # They interpolate colour otherwise, which tells on grain and at edges.
    off = (ours.frames.int() - theirs.frames.int()).abs().float()
    assert off.mean() < 2.5


def test_any_order_and_scaled(clip, backend):
    path, wanted = clip("h264_bframes").path, [40, 3, 3, 71, 0]
    theirs = read_video(path, indices=wanted, size=(56, 98), backend=backend)
    ours = read_video(path, indices=wanted, size=(56, 98))

    assert theirs.frames.shape == (5, 3, 56, 98) and theirs.indices.tolist() == wanted
    assert (ours.frames.int() - theirs.frames.int()).abs().float().mean() < 3
    assert [read_number(frame) for frame in theirs.frames.numpy()] == wanted


def test_turned_upright(clip, backend):
    theirs = read_video(clip("h264_rotated").path, indices=[5], backend=backend)
    assert read_number(theirs.frames[0].numpy()) == 5


def test_groups(clip, backend):
    path = clip("h264_bframes").path
    groups = list(stream_video(path, frames=50, group=20, first_group=3, backend=backend))

    assert [len(group) for group in groups] == [3, 20, 20, 7]
    whole = read_video(path, frames=50, backend=backend)
    assert torch.equal(torch.cat([group.frames for group in groups]), whole.frames)
    assert torch.cat([group.indices for group in groups]).tolist() == whole.indices.tolist()


@pytest.mark.parametrize("kind", HARD)
def test_what_they_get_wrong_is_refused(kind, clip, backend):
    path = clip(kind).path
    with pytest.raises(DecodeError, match=f"{backend} cannot be used for .*{path.name}") as caught:
        read_video(path, frames=4, backend=backend)
    assert 'use backend="pyav"' in str(caught.value)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
def test_never_a_wrong_frame(kind, clip, backend):
    """Every kind is either refused, or every frame of it is right, in any order."""
    numbers = clip(kind).numbers
    wanted = np.random.default_rng(2).permutation(len(numbers))[:24].tolist()
    try:
        video = read_video(clip(kind).path, indices=wanted, backend=backend)
    except DecodeError as error:
        assert str(error).startswith(f"{backend} cannot be used for")
        return
    assert [read_number(f) for f in video.frames.numpy()] == [numbers[rank] for rank in wanted]


def test_unknown_backend_fails(clip):
    message = 'backend must be one of "pyav", "decord", "torchcodec", got \'opencv\''
    for reader in (read_video, stream_video):
        with pytest.raises(MediaError, match=message):
            reader(clip("h264_bframes").path, backend="opencv")


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_missing_library_fails(name, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(MissingExtraError, match=rf'pip install "tokenprune-mm\[{name}\]"'):
        read_video(clip("h264_bframes").path, frames=2, backend=name)


class Liar:
    """Stands in for decord's reader, with one thing wrong."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def __len__(self) -> int:
        return 71 if self.fault == "count" else 72

    def get_batch(self, ranks):
        if self.fault == "failure":
            raise RuntimeError("decode failed\nstack trace")
        shape = (len(ranks), 112, 190 if self.fault == "size" else 192, 3)
        return ModuleType("array") if self.fault == "nonsense" else Batch(np.zeros(shape, "uint8"))

    def get_frame_timestamp(self, ranks):
        late = 0.1 if self.fault == "time" else 0.0
        late = float("nan") if self.fault == "no time" else late
        return np.array([[rank / 30 + late, 0] for rank in ranks])


class Batch:
    def __init__(self, array):
        self.array = array

    def asnumpy(self):
        return self.array


class LiarOfTorch(Liar):
    """Stands in for torchcodec's decoder."""

    def get_frames_at(self, ranks):
        frames = self.get_batch(ranks).asnumpy()
        times = torch.from_numpy(self.get_frame_timestamp(ranks)[:, 0])
        return SimpleNamespace(data=torch.from_numpy(frames).permute(0, 3, 1, 2), pts_seconds=times)


def pretend(name, fault, monkeypatch):
    """Have a library that has one thing wrong."""
    library = ModuleType(name)
    if name == "decord":
        library.VideoReader = lambda path, num_threads: Liar(fault)
    else:
        library.decoders = ModuleType(f"{name}.decoders")
        library.decoders.VideoDecoder = lambda path, num_ffmpeg_threads: LiarOfTorch(fault)
        monkeypatch.setitem(sys.modules, f"{name}.decoders", library.decoders)
    monkeypatch.setitem(sys.modules, name, library)


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("count", "it counts 71 frames, not 72"),
        ("failure", "decode failed; use"),
        ("size", r"it gives frames \[2, 3, 112, 190\]"),
        ("time", "it gives frame .* at another time"),
        ("no time", "it gives frame .* at another time"),
        ("nonsense", "has no attribute"),
    ],
)
def test_what_they_deliver_is_compared(fault, message, name, clip, monkeypatch):
    pretend(name, fault, monkeypatch)
    with pytest.raises(DecodeError, match=message) as caught:
        read_video(clip("h264_bframes").path, frames=2, backend=name)
    assert "\n" not in str(caught.value) and "b.mp4" in str(caught.value)


@pytest.mark.parametrize("name", ["decord", "torchcodec"])
def test_their_frames_are_delivered(name, clip, monkeypatch):
    pretend(name, "", monkeypatch)
    video = read_video(clip("h264_bframes").path, indices=[5, 70, 3], backend=name)
    assert video.frames.shape == (3, 3, 112, 192) and not video.frames.any()
    assert video.indices.tolist() == [5, 70, 3] and video.damaged == 0
