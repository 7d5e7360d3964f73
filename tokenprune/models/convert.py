"""From checkpoints that transformers does not know to ones that it does."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path

from tokenprune.errors import UnsupportedModelError

__all__ = ["Converter", "find_converter"]

Converter = Callable[[Path, Path, Path | None], None]
"""Reads an original checkpoint, writes a folder; the third is the checkpoint of its tower."""


def find_converter(family: str) -> Converter:
    """The converter of a family: the function `convert` of its file in `adapters/`.

    Raises:
        UnsupportedModelError: There is none.
    """
    import tokenprune.adapters as package

    found: dict[str, Converter] = {}
    for one in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{one.name}")
        if hasattr(module, "convert"):
            found[one.name] = module.convert
    if family not in found:
        raise UnsupportedModelError(
            f"no converter for {family!r}; known: {', '.join(found)}. Models that transformers "
            "knows need none"
        )
    return found[family]
