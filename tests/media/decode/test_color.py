"""Colours: high dynamic range is brought to BT.709; what cannot be converted is refused plainly."""

from pathlib import Path

import av
import numpy as np
import pytest

from tests.media.clips import X265, decode_sequentially, encode, x264
from tokenprune.errors import DecodeError
from tokenprune.media import Rendering, probe, read_video
from tokenprune.media.decode.color import check_matrix

TRANSFER = {"pq": "smpte2084", "hlg": "arib-std-b67"}


def write(path: Path, transfer: str, codes: list[tuple[float, float, float]]) -> Path:
    """Patches of Y, U, V from 0 to 1 (U and V from -0.5), beside each other, in 10 bits."""
    tags = f"colorprim=bt2020:transfer={TRANSFER.get(transfer, transfer)}:colormatrix=bt2020nc"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx265", rate=10)
        stream.options = {"x265-params": X265 + f"qp=2:keyint=5:{tags}"}
        stream.height, stream.width, stream.pix_fmt = 64, 64 * len(codes), "yuv420p10le"
        frame = av.VideoFrame(64 * len(codes), 64, "yuv420p10le")
        for channel, plane in enumerate(frame.planes):
            side = 64 >> (channel > 0)
            lines = np.zeros((plane.height, plane.line_size // 2), np.uint16)
            for patch, code in enumerate(codes):
                value = 64 + 876 * code[0] if channel == 0 else 512 + 896 * code[channel]
                lines[:, patch * side : (patch + 1) * side] = round(value)
            plane.update(lines.tobytes())
        for number in range(6):
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def patches(path: Path, count: int, **arguments) -> np.ndarray:
    """`[count, 3]` the colour in the middle of each patch."""
    frame = read_video(path, frames=1, **arguments).frames[0].numpy()
    return frame[:, 32, 32::64][:, :count].T.astype(int)


def pq(nits: float) -> float:
    power = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375


def hlg(light: float) -> float:
    if light <= 1 / 12:
        return (3 * light) ** 0.5
    return 0.17883277 * np.log(12 * light - 0.28466892) + 0.55991073


def expected(nits: float) -> float:
    """What a screen is sent for a grey: nothing changes up to half of the white of paper."""
    light, peak = nits / 203, 1000 / 203
    room = (peak - 0.5) * 0.5 / (peak - 1)
    if light > 0.5:
        light = 0.5 + (light - 0.5) * room / (room + light - 0.5)
    return 255 * min(light, 1) ** (1 / 2.4)


NITS = [0.0, 5.0, 36.5, 101.5, 203.0, 600.0, 1000.0, 4000.0]


def test_greys_of_pq(tmp_path):
    path = write(tmp_path / "a.mp4", "pq", [(pq(nits), 0, 0) for nits in NITS])
    assert probe(path).hdr == "pq"
    found = patches(path, len(NITS))
    for nits, colour in zip(NITS, found, strict=True):
        assert colour == pytest.approx(expected(nits), abs=3), nits
    assert abs(found[6] - 255).max() <= 1 and found[4].min() > 220  # white paper is nearly white


def test_greys_of_hlg(tmp_path):
    lights = [0.0, 0.01, 0.05, 0.26496, 0.6, 1.0]  # of the scene
    path = write(tmp_path / "a.mp4", "hlg", [(hlg(light), 0, 0) for light in lights])
    assert probe(path).hdr == "hlg"
    for light, colour in zip(lights, patches(path, len(lights)), strict=True):
        assert colour == pytest.approx(expected(1000 * light**1.2), abs=3), light


def test_colours_keep_their_hue_and_gain_what_the_wider_primaries_hid(tmp_path):
    """A colour that BT.709 has, as HDR codes it, comes out as BT.709 codes it."""
    bt709 = np.array([0.4, 0.1, 0.05])  # linear light, with the white of paper as 1
    to_bt2020 = np.array(
        [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    )
    red, green, blue = (pq(203 * light) for light in to_bt2020 @ bt709)
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    path = write(tmp_path / "a.mp4", "pq", [(luma, (blue - luma) / 1.8814, (red - luma) / 1.4746)])
    assert patches(path, 1)[0] == pytest.approx(255 * bt709 ** (1 / 2.4), abs=4)


def test_frames_as_they_are(tmp_path):
    path = write(tmp_path / "a.mp4", "pq", [(pq(203), 0, 0)])
    plain = read_video(path, frames=6, rendering=Rendering(tone_map=False))
    assert np.array_equal(plain.frames.numpy(), decode_sequentially(path))
    assert plain.frames[0, 0, 32, 32] == pytest.approx(255 * pq(203), abs=2)


def test_other_transfers_are_left_alone(tmp_path):
    path = write(tmp_path / "a.mp4", "bt2020-10", [(0.6, 0.1, 0.05)])
    assert probe(path).hdr is None
    assert np.array_equal(read_video(path, frames=6).frames.numpy(), decode_sequentially(path))


def test_workers_and_sizes_change_nothing(tmp_path):
    path = write(tmp_path / "a.mp4", "pq", [(pq(nits), 0, 0) for nits in NITS])
    whole = read_video(path, frames=6)
    for kind in ("thread", "process"):
        again = read_video(path, frames=6, workers=2, worker_kind=kind)
        assert np.array_equal(again.frames, whole.frames)
    half = read_video(path, frames=1, size=(32, 32 * len(NITS))).frames[0].numpy()
    assert half[:, 16, 16::32] == pytest.approx(whole.frames[0].numpy()[:, 32, 32::64], abs=1)


@pytest.mark.parametrize(
    ("matrix", "name"), [("ycgco", "YCgCo"), ("bt2020c", "BT.2020 with constant luminance")]
)
def test_matrices_that_are_not_known_are_refused_plainly(matrix, name, tmp_path):
    clip = encode(tmp_path / "a.mp4", numbers=range(4), options=x264(f"colormatrix={matrix}"))
    wanted = rf"the colours of .*a\.mp4' are coded as {name}, which cannot .*; convert the file"
    with pytest.raises(DecodeError, match=wanted):
        read_video(clip.path, frames=2)


@pytest.mark.parametrize(("matrix", "left"), [(3, 2), (40, 2), (9, 9), (1, 1), (0, 0)])
def test_tags_that_say_nothing_are_passed_over(matrix, left):
    frame = av.VideoFrame(16, 16, "yuv420p")
    frame.colorspace, frame.color_range = matrix, 7
    check_matrix(frame, "x")
    assert (frame.colorspace, frame.color_range) == (left, 0)
    frame.reformat(format="gbrp", width=8, height=8)


def test_rgb_needs_no_matrix():
    frame = av.VideoFrame(16, 16, "gbrp")
    frame.colorspace = 8
    check_matrix(frame, "x")
    assert frame.colorspace == 8
