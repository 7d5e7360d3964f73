"""Pictures of all modes and depths, on white, within limits; what is a picture and what a video."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from tests.media import clips
from tests.media.heic import Heic
from tokenprune.errors import DecodeError, MediaError
from tokenprune.media import Limits, index_video, read_picture, read_video, use_limits
from tokenprune.media.stills import read_picture as read

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(3, 0)


def grey(path: Path, **settings: object) -> NDArray[np.uint8]:
    """A picture that must have three equal channels, `[H, W]`."""
    picture = read_picture(path, **settings)
    assert picture is not None and (picture == picture[:1]).all()
    return picture[0].numpy()


def pixels(path: Path) -> NDArray[np.uint8]:
    picture = read_picture(path)
    assert picture is not None
    return picture.permute(1, 2, 0).numpy()


# -- modes and depths


@pytest.mark.parametrize("ending", ["png", "tif", "jp2", "pgm"])
def test_sixteen_bits_are_scaled(ending, tmp_path):
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    deep.save(tmp_path / f"a.{ending}")
    assert np.array_equal(grey(tmp_path / f"a.{ending}"), RAMP)


@pytest.mark.parametrize(
    ("kind", "tags", "scale"),
    [
        ("<u2", {}, 257),
        (">u2", {}, 257),
        ("<u2", {258: 12}, 0),
        ("<u2", {262: 0}, -257),
        ("<u4", {}, 257 * 65537),
        ("<f4", {339: 3}, 1 / 255),
    ],
)
def test_deep_tiffs(kind, tags, scale, tmp_path):
    """12 bits are packed; in the fourth, white is zero."""
    if 258 in tags:
        values = RAMP.astype(np.uint32) * 4095 // 255
        pairs = values.reshape(3, -1, 2)
        packed = (pairs[..., 0] << 12 | pairs[..., 1]).astype(">u4").view(np.uint8)
        data = packed.reshape(3, -1, 4)[..., 1:].tobytes()
    else:
        values = (255.0 - RAMP) * -scale if scale < 0 else RAMP * float(scale)
        data = values.astype(kind).tobytes()
    path = tmp_path / "a.tif"
    bits = 258 in tags and 12 or np.dtype(kind).itemsize * 8
    path.write_bytes(tiff(data, 256, 3, kind[0], {258: bits, 262: 1, 339: 1} | tags))

    assert np.abs(grey(path).astype(int) - RAMP).max() <= (1 if 258 in tags else 0)


def tiff(data: bytes, width: int, height: int, order: str, tags: dict[int, int]) -> bytes:
    """A TIFF of one grey strip."""
    entries = {256: width, 257: height, 259: 1, 277: 1, 278: height, 279: len(data)} | tags
    entries[273] = 8 + 2 + 12 * (len(entries) + 1) + 4
    mark = b"II" if order == "<" else b"MM"
    out = mark + struct.pack(order + "HI", 42, 8) + struct.pack(order + "H", len(entries))
    for tag, value in sorted(entries.items()):
        out += struct.pack(order + "HHII", tag, 4, 1, value)
    return out + bytes(4) + data


def test_values_of_unknown_brightness_are_refused(tmp_path):
    Image.fromarray(np.full((4, 4), -7, np.int32)).save(tmp_path / "signed.tif")
    with pytest.raises(MediaError, match=r"signed.tif'.*signed values.*save them as 8 or 16 bits"):
        read_picture(tmp_path / "signed.tif")
    Image.fromarray(np.full((4, 4), 300, np.float32)).save(tmp_path / "far.tif")
    with pytest.raises(MediaError, match=r"far.tif'.*values beyond 0 to 1"):
        read_picture(tmp_path / "far.tif")
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(MediaError, match="values beyond 0 to 1"):
        read_picture(tmp_path / "nan.tif")


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("LA", (77, 255), (77, 77, 77)),
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("RGBA", (1, 2, 3, 255), (1, 2, 3)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ],
)
def test_modes_are_read_as_they_look(mode, colour, seen, tmp_path):
    Image.new(mode, (4, 3), colour).save(tmp_path / "a.tif")
    assert np.abs(pixels(tmp_path / "a.tif").astype(int) - seen).max() <= 1


# -- transparency


def test_transparent_pictures_lie_on_white(tmp_path):
    """Black text on a transparent ground, say."""
    drawn = np.zeros((10, 20, 4), np.uint8)
    drawn[3:5, :, 3] = 255
    drawn[6, :, 3] = 51
    path = tmp_path / "a.png"
    Image.fromarray(drawn).save(path)

    seen = grey(path)
    assert (seen[3:5] == 0).all() and (seen[0] == 255).all() and (seen[6] == 204).all()
    assert (grey(path, background="black") == 0).all()
    assert read_picture(path, background=(9, 8, 7))[:, 0, 0].tolist() == [9, 8, 7]
    assert read_picture(path, background="#090807")[:, 0, 0].tolist() == [9, 8, 7]
    for wrong in ("no colour", (256, 0, 0), (1, 2), 7, (True,)):
        with pytest.raises(MediaError, match='background must be a colour such as "white"'):
            read_picture(path, background=wrong)


@pytest.mark.parametrize("ending", ["webp", "tif", "avif", "ico", "tga", "jp2", "gif"])
def test_every_form_of_transparency(ending, tmp_path):
    path = tmp_path / f"a.{ending}"
    drawn = np.zeros((32, 32, 4), np.uint8)
    drawn[:16] = (10, 20, 30, 255)
    Image.fromarray(drawn).save(path, **({"lossless": True} if ending == "webp" else {}))
    seen = pixels(path).astype(int)
    assert np.abs(seen[:14] - (10, 20, 30)).max() < 12 and (seen[18:] > 243).all()


@pytest.mark.parametrize(
    ("depth", "kind", "key", "samples", "scale"),
    [
        (1, 0, b"\0\0", [0, 1], 255),
        (2, 0, b"\0\2", [0, 1, 2, 3], 85),
        (4, 0, b"\0\7", list(range(16)), 17),
        (8, 0, b"\0\7", list(range(16)), 1),
        (16, 0, b"\7\7", [n * 257 for n in range(16)], 1 / 257),
        (8, 2, b"\0\1\0\1\0\1", [0, 1, 2], 1),
        (16, 2, b"\1\1\1\1\1\1", [0, 257, 514], 1 / 257),
    ],
)
def test_a_colour_of_a_png_may_be_transparent(depth, kind, key, samples, scale, tmp_path):
    channels = 3 if kind == 2 else 1
    bits = "".join(format(value, f"0{depth}b") * channels for value in samples)
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    path = tmp_path / "a.png"
    path.write_bytes(png(len(samples), 1, depth, kind, b"\0" + row, key))

    wanted = [round(value * scale) for value in samples]
    wanted[samples.index(int.from_bytes(key[:2], "big"))] = 255
    assert grey(path)[0].tolist() == wanted


def png(width: int, height: int, depth: int, kind: int, rows: bytes, key: bytes = b"") -> bytes:
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))]
    parts += [(b"tRNS", key)] * bool(key) + [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


# -- limits


def test_bombs_are_refused_before_memory_is_taken(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(14_000, 14_000, 1, 0, b""))
    for attempt in (read_picture, index_video, read_video):
        with pytest.raises(MediaError, match=r"bomb.png' is 14000x14000: 196,000,000 pixels, more"):
            attempt(path)
    path.write_bytes(png(10_000, 10_000, 1, 0, b""))  # of which Pillow alone warns
    with warnings.catch_warnings(), pytest.raises(DecodeError, match="cannot read"):
        warnings.simplefilter("error")
        read_picture(path)


def test_limits_are_settings(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("L", (40, 30)).save(path)
    with (
        use_limits(Limits(pixels=1199)),
        pytest.raises(
            MediaError,
            match="1,200 pixels, more than the limit of 1,199.*TOKENPRUNE_MAX_PIXELS=1200",
        ),
    ):
        read_picture(path)
    assert read_picture(path) is not None
    monkeypatch.setenv("TOKENPRUNE_MAX_PIXELS", "1199")
    with pytest.raises(MediaError, match="more than the limit of 1,199"):
        read_picture(path)
    with use_limits(Limits()):
        assert read_picture(path) is not None


# -- what is a picture


def test_several_pictures_in_a_photograph_are_one_picture(tmp_path):
    first, second = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (40, 30), "blue")
    first.save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match="phone.jpg' holds 2 pictures; the first is used, and 1 "):
        picture = read_picture(tmp_path / "phone.jpg")
    assert picture is not None and picture[0].min() > 250 and picture[2].max() < 5


def test_the_first_page_is_read(tmp_path):
    pages = [Image.new("L", (40, 30), 10 * n) for n in range(3)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    with pytest.warns(UserWarning, match="holds 3 pictures; the first is used, and 2 left out"):
        assert (grey(tmp_path / "a.tif") == 0).all()


def quarters(height: int, width: int) -> NDArray[np.uint8]:
    made = np.zeros((height, width, 3), np.uint8)
    made[: height // 2, : width // 2] = (255, 0, 0)
    made[height // 2 :, : width // 2] = (0, 255, 0)
    made[: height // 2, width // 2 :] = (0, 0, 255)
    made[height // 2 :, width // 2 :] = (200, 200, 200)
    return made


def near(path: Path, expected: NDArray[np.uint8]) -> bool:
    seen = pixels(path)
    return seen.shape == expected.shape and np.abs(seen.astype(int) - expected).max() <= 2


def test_tiles_are_put_together(tmp_path):
    """FFmpeg gives a picture for each."""
    drawn, made = quarters(100, 150), Heic()
    path = made.save(tmp_path / "phone.jpg", made.grid(drawn, 2, 2, 96))
    with av.open(str(path)) as container:
        assert len(container.streams.video) == 4
    assert near(path, drawn)
    video = read_video(path)
    assert video.frames.shape == (1, 3, 100, 150) and video.info.frame_count == 1


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("mirror", [None, 0, 1])
def test_a_heic_picture_is_turned(turns, mirror, tmp_path):
    drawn, made = quarters(96, 160), Heic()
    number = made.grid(drawn, 1, 2, 96)
    made.property(number, b"irot", bytes([turns]))
    seen = np.rot90(drawn, turns)
    if mirror is not None:
        made.property(number, b"imir", bytes([mirror]))
        seen = seen[:, ::-1] if mirror else seen[::-1]
    path = made.save(tmp_path / "a.heic", number)
    assert near(path, seen)
    assert (index_video(path).info.height, index_video(path).info.width) == seen.shape[:2]


def test_a_heic_picture_is_cropped(tmp_path):
    drawn, made = quarters(96, 96), Heic()
    number = made.coded(drawn)
    sizes = struct.pack(">8i", 40, 1, 60, 1, -8, 1, 3, 1)  # the centre, 8 left and 3 down
    made.property(number, b"clap", sizes)
    assert near(made.save(tmp_path / "a.heic", number), drawn[21:81, 20:60])


def test_a_heic_picture_with_others_beside_it(tmp_path):
    """A preview and a mask are part of it; other pictures are told."""
    drawn, made = quarters(96, 96), Heic()
    made.coded(np.zeros((64, 64, 3), np.uint8))
    number = made.coded(drawn)
    mask = np.full((96, 96, 3), 255, np.uint8)
    mask[:, 48:] = 0
    hidden = made.coded(mask, hidden=True)
    made.property(hidden, b"auxC", bytes(4) + b"urn:mpeg:hevc:2015:auxid:1\0")
    made.references.append((b"auxl", hidden, [number]))
    made.references.append((b"thmb", made.coded(mask[:64, :64].copy()), [number]))
    path = made.save(tmp_path / "a.heic", number)

    expected = drawn.copy()
    expected[:, 48:] = 255
    with pytest.warns(UserWarning, match="holds 2 pictures"):
        assert near(path, expected)


@pytest.mark.parametrize("brand", [b"mif1", b"heix"])
def test_the_major_brand_decides(brand, tmp_path):
    made = Heic()
    path = made.save(tmp_path / "a", made.coded(quarters(64, 64)), brand)
    assert near(path, quarters(64, 64))


def test_damaged_heic_fails(tmp_path):
    made = Heic()
    whole = made.save(tmp_path / "a.heic", made.grid(quarters(64, 64), 1, 2, 64)).read_bytes()
    for end in range(100, len(whole), 23):
        (tmp_path / "cut.heic").write_bytes(whole[:end])
        with pytest.raises(DecodeError, match=r"cut.heic' as an image"):
            read_picture(tmp_path / "cut.heic")
    with use_limits(Limits(pixels=4000)), pytest.raises(MediaError, match="64x64: 4,096 pixels"):
        read_picture(tmp_path / "a.heic")


def test_photographs_with_something_behind_them_are_pictures(tmp_path):
    """A short video, or a map of gain; JPEGs of one size in a row are a video."""
    files = []
    for size in ((64, 48), (32, 24)):
        file = io.BytesIO()
        Image.new("RGB", size, "gray").save(file, "JPEG")
        files.append(file.getvalue())
    (tmp_path / "gain.jpg").write_bytes(files[0] + files[1])
    (tmp_path / "moving.jpg").write_bytes(files[0] + b"\0\0\0\x18ftypmp42" + bytes(99))
    (tmp_path / "row.bin").write_bytes(files[0] * 3)

    assert read_picture(tmp_path / "gain.jpg") is not None
    assert read_picture(tmp_path / "moving.jpg") is not None
    assert read_picture(tmp_path / "row.bin") is None
    assert len(read_video(tmp_path / "row.bin")) == 3


def test_raw_photographs_are_refused(tmp_path):
    """What Pillow finds in them is a preview."""
    data = bytes(40 * 30)
    for tags in ({254: 1}, {50706: 1}):
        (tmp_path / "a.dng").write_bytes(tiff(data, 40, 30, "<", {258: 8, 262: 1} | tags))
        with pytest.raises(MediaError, match=r"a.dng' is a camera's raw photograph.*as JPEG"):
            read_picture(tmp_path / "a.dng")


@pytest.mark.parametrize("shape", [(30, 50), (300, 500)])
def test_avif_needs_no_new_pillow(shape, tmp_path, monkeypatch):
    path = tmp_path / "a.avif"
    Image.fromarray(quarters(*shape)).save(path, quality=100, subsampling="4:4:4")
    expected = pixels(path)
    monkeypatch.setattr(Image, "ID", [form for form in Image.ID if form != "AVIF"])
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert np.abs(pixels(path).astype(int) - expected).max() <= 2


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.pgm", b"P5 2 1 4095\n" + struct.pack(">2H", 4095, 2048), [255, 128]),
        ("a.pgm", b"P2 3 1 7\n0 7 3\n", [0, 255, 109]),
        ("a.pfm", b"Pf 2 1 -1.0\n" + struct.pack("<2f", 1, 0.5), [255, 128]),
        ("a.png", png(2, 1, 16, 4, b"\0" + struct.pack(">4H", 0, 65535, 0, 32896)), [0, 127]),
        ("a.png", png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 32896, 32896, 32896)), [128]),
        ("a.png", png(1, 1, 16, 6, b"\0" + struct.pack(">4H", 0, 0, 0, 0)), [255]),
    ],
)
def test_more_depths(name, content, expected, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert grey(tmp_path / name)[0].tolist() == expected


def test_a_picture_has_no_streams(tmp_path):
    Image.new("L", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(MediaError, match="is a picture: it has no stream 1"):
        read_video(tmp_path / "a.png", stream=1)


def test_videos_and_sounds_are_no_pictures(clip, files):
    for path in (clip("h264_bframes").path, clip("mjpeg_avi").path, files.sound):
        assert read(path) is None


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"<!DOCTYPE html>\n<html><body>404</body></html>", "an HTML page"),
        (b"\xef\xbb\xbf\n<!-- made by hand -->\n<HTML>", "an HTML page"),
        ("<html>".encode("utf-16"), "an HTML page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b'<?xml version="1.0"?>\n<!DOCTYPE svg PUBLIC "x">\n<svg/>', "an SVG drawing"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "a PostScript drawing"),
        (b"PK\x03\x04" + bytes(50), "a ZIP archive"),
        (b"\x1f\x8b\x08" + bytes(50), "a gzip archive"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
    ],
)
def test_what_is_no_media_is_named(content, what, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for attempt in (read_picture, read_video, index_video):
        with pytest.raises(DecodeError, match=rf"a.jpg' is {what}.*, and no media file; \w+"):
            attempt(path)


@pytest.mark.parametrize(
    ("head", "kind"),
    [(b"\xff\x0a", "JPEG XL"), (b"\0\0\0\x0cJXL \r\n", "JPEG XL"), (b"gimp xcf v011", "GIMP")],
)
def test_pictures_that_nobody_reads_are_named(head, kind, tmp_path):
    (tmp_path / "a.jpg").write_bytes(head + bytes(200))
    for attempt in (read_picture, read_video):
        with pytest.raises(DecodeError, match=rf"a.jpg' is a {kind} picture, which cannot be read"):
            attempt(tmp_path / "a.jpg")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "AVIF", "TIFF", "BMP"])
def test_broken_pictures_are_called_pictures(form, tmp_path):
    path = tmp_path / "a"
    Image.fromarray(clips.draw(5)).save(path, form)
    whole = path.read_bytes()
    for end in (30, 60, len(whole) // 2):
        path.write_bytes(whole[:end])
        with pytest.raises(DecodeError, match="as an image"):
            read_picture(path)


def test_tiny_files_fail(tmp_path):
    path = tmp_path / "a"
    for content in (b"a", b"II", b"\xff\xd8\xff", b"BM", b"\0\0\0\x18ftyp", b"RIFF"):
        path.write_bytes(content)
        for attempt in (read_picture, read_video):
            if attempt is read_video or content in (b"\xff\xd8\xff", b"BM"):
                with pytest.raises(DecodeError, match="cannot read"):
                    attempt(path)


def test_orientation_of_pictures(tmp_path):
    """As EXIF or TIFF tells it; the size that is told is that of the upright picture."""
    drawn = quarters(30, 50)
    for number, turned in {
        1: drawn,
        2: drawn[:, ::-1],
        3: drawn[::-1, ::-1],
        4: drawn[::-1],
        5: drawn.transpose(1, 0, 2),
        6: np.rot90(drawn, 1),
        7: np.rot90(drawn, 2).transpose(1, 0, 2),
        8: np.rot90(drawn, -1),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = number
        for ending in ("png", "tif", "webp"):
            path = tmp_path / f"{number}.{ending}"
            lossless = {"lossless": True} if ending == "webp" else {}
            Image.fromarray(np.ascontiguousarray(turned)).save(path, exif=exif, **lossless)
            assert np.array_equal(pixels(path), drawn), (number, ending)
            video = read_video(path)
            assert np.array_equal(video.frames[0].permute(1, 2, 0).numpy(), drawn)


def test_broken_exif_turns_nothing(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(quarters(30, 50)).save(path, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert np.array_equal(pixels(path), quarters(30, 50))


def test_text_bombs_are_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    for _ in range(80):
        info.add_text("a", "b" * (1 << 20), zip=True)
    Image.new("L", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    with pytest.raises(DecodeError, match="as an image"):
        read_picture(tmp_path / "a.png")
