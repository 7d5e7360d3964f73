"""Pixels of every mode and depth as a person sees them: RGB, upright, on a background."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor

from tokenprune.errors import MediaError
from tokenprune.media.numbers import parse_whole

__all__ = ["WHITE", "Background", "orientation_of", "parse_background", "to_rgb"]

Background = str | tuple[int, int, int]
"""A colour, by a name that Pillow knows, as `#ffffff`, or as three numbers from 0 to 255."""

WHITE = "white"
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, UNSIGNED, FLOAT = 0, 1, 3


def parse_background(background: Background) -> tuple[int, int, int]:
    """A colour as red, green and blue.

    Raises:
        MediaError: there is no such colour.
    """
    try:
        colour = ImageColor.getrgb(background) if isinstance(background, str) else background
        drop = 3 if isinstance(background, str) else None  # the alpha of "#ffffff00"
        red, green, blue = (parse_whole("background", value) for value in colour[:drop])
    except (TypeError, ValueError):  # `MediaError` is one
        red = green = blue = -1
    if not all(0 <= value <= 255 for value in (red, green, blue)):
        raise MediaError(
            'background must be a colour such as "white", "#ffffff" or (255, 255, 255), got'
            f" {background!r:.80}"
        )
    return red, green, blue


def to_rgb(picture: Any, background: tuple[int, int, int]) -> Image.Image:
    """Decode a picture, lay it on a background, and turn it upright: mode RGB.

    Raises:
        MediaError: nobody knows how bright its values are.
    """
    if picture.format == "HEIC":  # what EXIF says of the orientation does not count there
        return _laid_on(picture.decode(), "", background)
    raw = _raw_mode(picture)
    picture.load()
    turn = TURNS.get(orientation_of(picture))
    flat = _laid_on(picture, raw, background)
    return flat if turn is None else flat.transpose(turn)


def _raw_mode(picture: Any) -> str:
    """How samples are stored, as Pillow names it; known until the picture is decoded."""
    tiles = getattr(picture, "tile", None) or [()]
    arguments = tiles[0][3] if len(tiles[0]) > 3 else ""
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def orientation_of(picture: Any) -> int:
    """How EXIF says a picture is to be turned, from 1 (not at all) to 8."""
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # broken EXIF says nothing
        return 1


def _laid_on(picture: Any, raw: str, background: tuple[int, int, int]) -> Image.Image:
    key = picture.info.get("transparency")
    alpha = None if key is None or isinstance(key, bytes) else _key_alpha(picture, key, raw)
    _check_known(picture)
    if picture.mode[0] in "IF":
        picture = _eight_bits(picture)
    elif picture.mode == "LAB":
        picture = _from_lab(picture)
    if alpha is None and (picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or key is not None):
        if picture.mode in ("La", "RGBa"):  # premultiplied
            picture = picture.convert(picture.mode.upper())
        picture = picture.convert("RGBA")
        alpha = picture.getchannel("A")
    rgb: Image.Image = picture if picture.mode == "RGB" else picture.convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    under = Image.new("RGB", rgb.size, background)
    under.paste(rgb, mask=alpha)
    return under


def _key_alpha(picture: Any, key: Any, raw: str) -> Image.Image | None:
    """The alpha of a picture of which one colour is transparent; None where Pillow makes it."""
    if picture.mode not in ("1", "L", "RGB") and picture.mode[0] != "I":
        return None
    # The key is as it is stored, but Pillow scales samples to bytes.
    scale = {"L;2": 85, "L;4": 17}.get(raw, 1)
    values = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
    wanted = np.array(key) // 256 if raw.startswith("RGB;16") else np.array(key) * scale
    equal = values == wanted
    clear = equal.all(-1) if picture.mode == "RGB" else equal
    return Image.fromarray(np.where(clear, 0, 255).astype(np.uint8))


def _check_known(picture: Any) -> None:
    """Check that the brightness of each value is known.

    Raises:
        MediaError: values are signed.
    """
    if picture.format == "TIFF" and _tag(picture, SAMPLE_FORMAT, UNSIGNED) not in (UNSIGNED, FLOAT):
        raise MediaError(_unknown(picture, "signed values"))


def _unknown(picture: Any, what: str) -> str:
    return (
        f"{getattr(picture, 'filename', '')!r}: this {picture.format or 'picture'} of mode"
        f" {picture.mode} holds {what}, of which nobody knows how bright they are; scale them, and"
        " save them as 8 or 16 bits without a sign"
    )


def _tag(picture: Any, number: int, default: int) -> int:
    value = picture.tag_v2.get(number, default)
    return int(value[0] if isinstance(value, tuple) else value)


def _eight_bits(picture: Any) -> Image.Image:
    """A grey picture of modes I;16, I or F as mode L, scaled by its depth."""
    values: NDArray[Any] = np.asarray(picture)
    if picture.mode == "F":
        if not (values.size and 0 <= values.min() and values.max() <= 1):
            raise MediaError(_unknown(picture, "values beyond 0 to 1"))
        shares: NDArray[Any] = values
    else:
        bits = _depth(picture)
        unsigned = values.view(np.uint32) if bits == 32 else values
        shares = unsigned / np.float32(2**bits - 1)
    if picture.format == "TIFF" and _tag(picture, PHOTOMETRIC, 1) == WHITE_IS_ZERO:
        shares = 1 - shares
    return Image.fromarray(np.rint(np.clip(shares, 0, 1) * 255).astype(np.uint8))


def _depth(picture: Any) -> int:
    """Bits of a grey picture of more than 8.

    Raises:
        MediaError: it is not known what white is.
    """
    if picture.format == "TIFF":
        return _tag(picture, BITS, 16)
    if picture.format in ("JPEG2000", "PNG", "PPM", None) and picture.mode[0] == "I":
        return 16  # Pillow scales JPEG 2000 and PPM to that
    raise MediaError(_unknown(picture, "values of unknown depth"))


def _from_lab(picture: Any) -> Image.Image:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(picture, lab, srgb, outputMode="RGB")
    if made is None:  # only where it is changed in place
        raise MediaError(_unknown(picture, "colours"))
    return made
