"""Messages as people of the Qwen ecosystem write them: lists of frames, and files of all names."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from tests.media.clips import draw, read_number
from tokenprune.errors import MediaError
from tokenprune.media import FrameList, Video, read_message, read_video

SAME = {"resized_height": 112, "resized_width": 196}


def numbers(clip) -> list[int]:
    """What is drawn on frames that were scaled from 192 to 196 columns."""
    frames = torch.nn.functional.interpolate(clip.frames.float(), (112, 192), mode="area")
    return [read_number(frame) for frame in frames.byte().numpy()]


def pictures(count: int = 6) -> list[Image.Image]:
    return [Image.fromarray(draw(n)) for n in range(count)]


def encoded(picture: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    picture.save(file, form, quality=95)
    return file.getvalue()


def test_a_video_of_any_name(clip):
    path = clip("h264_bframes").path
    plain = read_message({"video": str(path), "nframes": 4})
    data = "data:video/mp4;base64," + base64.b64encode(path.read_bytes()).decode()
    with path.open("rb") as opened:
        for source in (path, path.as_uri(), path.read_bytes(), data, opened):
            video = read_message({"type": "video", "video": source, "nframes": 4})
            assert isinstance(video, Video) and torch.equal(video.frames, plain.frames)
    fetched = read_message(
        {"video": "https://example.org/a.mp4", "nframes": 4}, fetch=lambda url: path
    )
    assert torch.equal(fetched.frames, plain.frames)


def test_one_frame_at_most_is_one(clip):
    path = clip("h264_bframes").path
    for most in (1, np.int64(1), 1.5):
        assert read_message({"video": path, "max_frames": most}).indices.tolist() == [0]
    assert len(read_message({"video": path, "max_frames": 2})) == 2
    assert len(read_message({"video": path, "max_frames": 3})) == 2
    with pytest.raises(MediaError, match="max_frames must be at least 1, got 0.5"):
        read_message({"video": path, "max_frames": 0.5})
    assert len(read_message({"video": pictures(), "max_frames": 1})) == 1


@pytest.mark.parametrize("number", [np.float32, np.int64, torch.tensor, np.array])
def test_numbers_of_all_kinds(number, clip):
    path = clip("h264_bframes").path
    video = read_message({"video": path, "fps": number(4), "max_pixels": number(20_000)})
    assert len(video) == 8 and tuple(video.frames.shape[2:]) == (84, 168)
    assert (
        read_message({"video": path, "nframes": 2}, multiple=np.array(32)).frames.shape[2] % 32 == 0
    )
    for wrong in (True, np.float32("nan"), torch.tensor(True)):
        with pytest.raises(MediaError, match="fps must be a number above 0, got"):
            read_message({"video": path, "fps": wrong})


def test_frames_of_all_kinds(tmp_path):
    """All of them give the same clip."""
    drawn = pictures()
    files = []
    for n, picture in enumerate(drawn):
        files.append(tmp_path / f"{n}.png")
        picture.save(files[-1])
    arrays = [np.asarray(picture) for picture in drawn]
    tensors = [torch.from_numpy(array.copy()).permute(2, 0, 1) for array in arrays]
    coded = [encoded(picture) for picture in drawn]
    uris = ["data:image;base64," + base64.b64encode(one).decode() for one in coded]
    plain = read_message({"video": drawn} | SAME)
    assert isinstance(plain, FrameList) and numbers(plain) == list(range(6))
    kinds = [
        files,
        list(map(str, files)),
        [file.as_uri() for file in files],
        arrays,
        tensors,
        coded,
    ]
    kinds += [uris, [io.BytesIO(one) for one in coded], tuple(drawn), np.stack(arrays)]
    kinds += [torch.stack(tensors), [array.transpose(2, 0, 1) for array in arrays]]
    kinds += [[np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]) for array in arrays]]
    kinds += [[files[0], drawn[1], arrays[2], tensors[3], coded[4], uris[5]]]
    for given in kinds:
        assert torch.equal(read_message({"video": given} | SAME).frames, plain.frames)


def test_frames_as_jpegs_in_one_uri():
    jpegs = [base64.b64encode(encoded(one, "JPEG")).decode() for one in pictures()]
    clip = read_message({"video": "data:video/jpeg;base64," + ",".join(jpegs)} | SAME)
    assert numbers(clip) == list(range(6))


def test_grey_and_transparent_frames():
    grey = np.full((56, 84), 90, np.uint8)
    clear = np.zeros((56, 84, 4), np.uint8)
    clip = read_message(
        {"video": [grey, grey[..., None], grey[None], clear, Image.new("LA", (84, 56))]}
    )
    assert [frame.unique().tolist() for frame in clip.frames] == [[90]] * 3 + [[255]] * 2


def test_times_follow_from_the_rate():
    clip = read_message({"video": pictures()})
    assert clip.pts_seconds.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]  # 2 a second
    assert clip.source_fps == 2 and clip.indices.tolist() == list(range(6))
    for keys in ({"sample_fps": 4}, {"fps": 4}, {"sample_fps": np.float32(4)}):
        clip = read_message({"video": pictures()} | keys)
        assert clip.pts_seconds.tolist() == [0, 0.25, 0.5, 0.75, 1, 1.25]
    clip = read_message({"video": pictures(), "sample_fps": 2, "raw_fps": 30})
    assert clip.source_fps == 30 and clip.indices.tolist() == [0, 15, 30, 45, 60, 75]
    metadata = clip.metadata
    assert (metadata.fps, metadata.frames_indices) == (30, [0, 15, 30, 45, 60, 75])
    assert [n / metadata.fps for n in metadata.frames_indices] == clip.pts_seconds.tolist()


def test_fewer_of_the_frames():
    def ranks(**keys: float) -> list[int]:
        return read_message({"video": pictures(12)} | keys).indices.tolist()

    assert ranks() == list(range(12))
    assert ranks(nframes=4) == [0, 4, 7, 11]
    assert ranks(max_frames=3) == [0, 6, 11]
    assert ranks(sample_fps=4, fps=2) == [0, 2, 4, 7, 9, 11]
    assert ranks(sample_fps=4, fps=100) == list(range(12))
    assert ranks(sample_fps=4, video_start=1, video_end=2) == [4, 5, 6, 7, 8]
    assert len(read_message({"video": pictures(1000)[:1] * 1000})) == 1000  # no limit of its own


def test_sizes_follow_the_same_rule(clip):
    def size(**keys: object) -> tuple[int, ...]:
        file = read_message({"video": clip("h264_bframes").path, "nframes": 6} | keys)
        listed = read_message({"video": pictures()} | keys)
        assert file.frames.shape == listed.frames.shape
        return tuple(listed.frames.shape[2:])

    assert size() == (252, 420)
    assert size(max_pixels=20_000) == (84, 168)
    assert size(min_pixels=1, total_pixels=30_000) == (56, 112)


def test_pictures_are_scaled_as_frames_are(clip):
    path = clip("h264_bframes").path
    whole = read_video(path, frames=4).frames
    scaled = read_video(path, frames=4, size=(252, 420)).frames
    listed = read_message({"video": whole}).frames
    assert (listed.int() - scaled.int()).abs().float().mean() < 3


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"video": None}, "must be a path, a file: or data: URI, bytes, .*, got None"),
        ({"video": 5}, "a source must be a path"),
        ({"video": []}, "a list of frames must hold at least one, got none"),
        ({"video": [None]}, "a source must be a path"),
        ({"video": ["missing.jpg"]}, "no such file: 'missing.jpg'"),
        ({"video": ["https://example.org/a.jpg"]}, "only local files are read.*fetch="),
        ({"video": "data:" + "x" * 300}, "a data: URI needs a comma"),
        ({"video": "x" * 300}, "no such file: 'xxx"),
        ({"video": [np.zeros((8, 8, 3))]}, r"frame 0 must be bytes .* got float64 \[8, 8, 3\]"),
        ({"video": [np.zeros((8, 8, 5), np.uint8)]}, r"frame 0 must be bytes .*\[8, 8, 5\]"),
        ({"video": [[Image.new("L", (9, 9))]]}, "frame 0 must be one picture, got"),
        (
            {"video": [Image.new("L", (9, 8)), Image.new("L", (8, 9))]},
            "frames of one clip must have one size, got 9x8 after 8x9",
        ),
        (
            {"video": [Image.new("L", (9, 8))], "sample_fps": 0},
            "sample_fps must be a number above 0",
        ),
        (
            {"video": [Image.new("L", (9, 8))], "sample_fps": 4, "raw_fps": 2},
            r"raw_fps must be at least sample_fps \(4\), got 2",
        ),
    ],
)
def test_wrong_frames_fail(keys, message):
    with pytest.raises(MediaError, match=message):
        read_message({"type": "video"} | keys)


def test_the_rate_of_a_list_is_not_that_of_a_file(clip, files):
    for name in ("sample_fps", "raw_fps"):
        with pytest.raises(MediaError, match=f"{name} is for a list of frames, got a file"):
            read_message({"video": clip("h264_bframes").path, name: 2})
    with pytest.raises(MediaError, match="frame 0 must be a picture, but .*animation.gif' is none"):
        read_message({"video": [files.animation]})
