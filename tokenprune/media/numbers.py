"""Numbers as callers give them: Python's, and scalars of NumPy and torch; checked in one place.

Neither NumPy nor torch is imported: a scalar of theirs is known by its empty `shape`.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real

from tokenprune.errors import MediaError

__all__ = ["Number", "numbers_of", "parse_number", "parse_whole", "plain"]

Number = float | Real
"""Anything that counts: `int`, `float`, `Fraction`, and scalars of NumPy and torch."""


def plain(value: object) -> object:
    """A scalar of NumPy or torch as the Python number it holds; other objects as they are."""
    if getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return value
    try:
        held: object = value.item()
    except (RuntimeError, ValueError, NotImplementedError):  # a tensor without data
        return value
    return held


def parse_number(
    name: str,
    value: object,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    rule: str = "be a number",
    infinite: bool = False,
) -> float:
    """A number as a `float`; `True` and `False` are none, and neither is NaN.

    Args:
        name: of the argument.
        value: what was given.
        least: the least that is allowed.
        above: what it must exceed.
        most: the most that is allowed.
        rule: completes "must" in the message.
        infinite: whether infinity is allowed.

    Raises:
        MediaError: it is no number, or not in the range.
    """
    held = plain(value)
    if isinstance(held, Real) and not isinstance(held, bool):
        number = float(held)
        known = not math.isnan(number) and (infinite or math.isfinite(number))
        if known and least <= number <= most and (number > above or above == -math.inf):
            return number
    raise MediaError(f"{name} must {rule}, got {held!r:.80}")


def parse_whole(name: str, value: object, *, least: int | None = None, rule: str = "") -> int:
    """A whole number as an `int`; `True` and `False` are none.

    Args:
        name: of the argument.
        value: what was given.
        least: the least that is allowed; None for any.
        rule: completes "must" in the message; made from `least` if it is left out.

    Raises:
        MediaError: it is no whole number, or below the least.
    """
    held = plain(value)
    if isinstance(held, Integral) and not isinstance(held, bool):
        number = int(held)
        if least is None or number >= least:
            return number
    if not rule:
        rule = "be a whole number" + ("" if least is None else f" of at least {least}")
    raise MediaError(f"{name} must {rule}, got {held!r:.80}")


def numbers_of(name: str, values: object) -> list[object]:
    """The entries of a sequence, an array or a tensor of one dimension, as Python has them.

    Raises:
        MediaError: it is no such thing.
    """
    if hasattr(values, "tolist") and hasattr(values, "shape"):
        values = values.tolist()
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise MediaError(f"{name} must be a list of numbers, got {values!r:.80}")
    return [plain(value) for value in values]
