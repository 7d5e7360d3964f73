"""What a file is: told by its content, never by its name.

The rule, from top to bottom:

1. What begins as a document, an archive or a pointer is none of ours; the message says what it is.
2. What begins as a picture (a format that Pillow knows, or HEIC) is one, or several:

   - one picture is a picture;
   - several with times of their own (GIF, APNG, animated WebP, AVIF sequences, FLI) are a video;
   - several without times (pages of a TIFF, the pictures of an MPO or a HEIC file) are a picture:
     the first, or the one that the file calls its primary. A warning says how many are left out.
     Layers of a PSD and sizes of an icon are views of one picture, and need none;
   - tiles of one picture (HEIC) are that picture, put together;
   - the preview in a camera's raw photograph is none: such files are refused;
   - JPEGs of one size, one right behind the other, are a video (a raw stream of MJPEG).

3. All else is for FFmpeg: a picture if its format is one of pictures (OpenEXR, DPX), a video if it
   holds a video stream that is no cover picture, else a sound.

Where a video is wanted, a picture is a video of one frame; where a picture is wanted, a video is
none.
"""

import re

from tokenprune.errors import DecodeError

__all__ = [
    "HEAD_BYTES",
    "PICTURE",
    "check_kind",
    "check_readable",
    "is_avif",
    "is_heic",
    "is_media",
    "is_mjpeg",
    "is_still_container",
]

HEAD_BYTES = 4096
PICTURE = "picture"  # the container of pictures that are read as a video

FOREIGN = (
    (b"%PDF-", "a PDF document", "give a picture of its page"),
    (b"%!PS", "a PostScript drawing", "give it as PNG"),
    (b"\xc5\xd0\xd3\xc6", "a PostScript drawing", "give it as PNG"),
    (b"PK\x03\x04", "a ZIP archive, or a document in one", "take the media file out of it"),
    (b"\x1f\x8b", "a gzip archive", "take the media file out of it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "take the media file out of it"),
    (b"Rar!\x1a\x07", "a RAR archive", "take the media file out of it"),
    (b"version https://git-lfs", "a pointer of Git LFS", "fetch the file with `git lfs pull`"),
    (b"\x7fELF", "a program", "give a media file"),
)
UNREADABLE = (  # pictures that neither Pillow nor FFmpeg opens without a plugin
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"gimp xcf", "GIMP"),
    (b"AT&TFORM", "DjVu"),
    (b"BPG\xfb", "BPG"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
)
MEDIA = (
    b"\x1aE\xdf\xa3",
    b"OggS",
    b"FLV",
    b"ID3",
    b"fLaC",
    b"\0\0\1\xb3",
    b"\0\0\1\xba",
    b"\0\0\0\1",
    b"0&\xb2u\x8ef\xcf\x11",
)
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"mif1"}
STILL_BRANDS = HEIC_BRANDS | {b"avif", b"avis", b"mif2", b"miaf", b"msf1", b"jp2 ", b"crx "}
SKIPPED = re.compile(rb"(?:\s+|<\?.*?\?>|<!--.*?-->)*", re.DOTALL)
SVG = re.compile(rb"(?:<!DOCTYPE\s+svg\b.*?>\s*)?<(?:\w+:)?svg\b", re.DOTALL | re.IGNORECASE)
HTML = re.compile(rb"<(?:!DOCTYPE\s+html|html|head|body)\b", re.IGNORECASE)


def check_kind(name: str, head: bytes) -> None:
    """Check that a file may be media.

    Args:
        name: of the file.
        head: its first bytes.

    Raises:
        DecodeError: it is something else; the message says what, and what to do.
    """
    if foreign := _foreign_kind(head):
        what, remedy = foreign
        raise DecodeError(f"{name!r} is {what}, and no media file; {remedy}")


def _foreign_kind(head: bytes) -> tuple[str, str] | None:
    for magic, what, remedy in FOREIGN:
        if head.startswith(magic):
            return what, remedy
    text = _as_text(head)
    match = SKIPPED.match(text)
    text = text[match.end() :] if match else text
    if HTML.match(text):
        return "an HTML page", "give the media file itself, not the page that shows it"
    if SVG.match(text):
        return "an SVG drawing", "give it as PNG"
    return None


def _as_text(head: bytes) -> bytes:
    for mark, encoding in ((b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be")):
        if head.startswith(mark):
            return head[2:].decode(encoding, "ignore").encode()
    return head.removeprefix(b"\xef\xbb\xbf")


def check_readable(name: str, head: bytes) -> None:
    """Check that a file that Pillow does not open is no picture of a kind that nobody here reads.

    Args:
        name: of the file.
        head: its first bytes.

    Raises:
        DecodeError: it is one.
    """
    for magic, what in UNREADABLE:
        if head.startswith(magic):
            raise DecodeError(
                f"{name!r} is a {what} picture, which cannot be read; give it as JPEG or PNG"
            )


def is_still_container(container: str) -> bool:
    """Whether FFmpeg names a file format so that holds a picture, such as `exr_pipe`."""
    return container.endswith("_pipe") or container in ("image2", PICTURE)


def is_media(head: bytes) -> bool:
    """Whether a file surely is for FFmpeg, so that Pillow need not be asked."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in STILL_BRANDS
    if head.startswith(b"RIFF"):
        return head[8:12] != b"WEBP"
    return head.startswith(MEDIA) or (head[:1] == head[188:189] == b"G" and head[:3] != b"GIF")


def is_heic(head: bytes) -> bool:
    """Whether a file is a HEIC picture: its major brand decides, since many hold a video too."""
    return head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS


def is_avif(head: bytes) -> bool:
    """Whether a file is an AVIF picture, or a sequence of them."""
    return head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis")


def is_mjpeg(content: bytes) -> bool:
    """Whether a file that begins as a JPEG is a row of JPEGs of one size, and no photograph.

    A photograph may be followed by others too: by a map of its gain, say, which is smaller.
    """
    size, end = _jpeg_size_and_end(content)
    if size is None or content[end : end + 3] != b"\xff\xd8\xff":
        return False
    return _jpeg_size_and_end(content[end:])[0] == size


def _jpeg_size_and_end(content: bytes) -> tuple[bytes | None, int]:
    """The bytes that hold height and width of the JPEG at the start, and where it ends."""
    at, size = 2, None
    while at + 9 <= len(content) and content[at] == 0xFF:
        kind = content[at + 1]
        if kind == 0xFF:  # a fill byte
            at += 1
            continue
        if kind == 0xDA:
            end = content.find(b"\xff\xd9", at)
            return size, len(content) if end < 0 else end + 2
        if 0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC):
            size = content[at + 5 : at + 9]
        at += 2 + int.from_bytes(content[at + 2 : at + 4])
    return size, len(content)
