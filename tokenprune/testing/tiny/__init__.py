"""Tiny random models of every family, and prompts for them.

`build("qwen2_vl")` returns a model of five decoder layers and grouped key-value heads, whose
weights are lively enough that dropping tokens visibly moves its logits, and prompts with media.
Names are those of `FAMILIES` (the default prompt of a family) and `VARIANTS` (other prompts),
gathered from the modules of this package.
"""

from __future__ import annotations

import importlib
import pkgutil
from unittest import SkipTest

from tokenprune.testing.tiny.base import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    PAD,
    PINPOINTS,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    Builder,
    Tiny,
    decoder_of,
    pad_batch,
)
from tokenprune.testing.tiny.releases import UNUSABLE

__all__ = [
    "AUDIO",
    "AUDIO_END",
    "AUDIO_START",
    "FAMILIES",
    "IMAGE",
    "NAMES",
    "PAD",
    "PINPOINTS",
    "VARIANTS",
    "VIDEO",
    "VISION_END",
    "VISION_START",
    "VOCABULARY",
    "Tiny",
    "build",
    "decoder_of",
    "family_of",
    "pad_batch",
]

_MODULES = [
    importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)
]


def _gather(attribute: str) -> dict[str, Builder]:
    found: dict[str, Builder] = {}
    for module in _MODULES:
        found |= getattr(module, attribute, {})
    return dict(sorted(found.items()))


FAMILIES = _gather("FAMILIES")
VARIANTS = _gather("VARIANTS")
NAMES = sorted({**FAMILIES, **VARIANTS})


def build(name: str, *, attention: str = "sdpa") -> Tiny:
    """Build the tiny model of this name; the same name always gives the same weights.

    Raises:
        SkipTest: The release of transformers at hand cannot build it, or a package is missing;
            pytest and unittest take it for a test that is left out.
    """
    if reason := UNUSABLE.get(family_of(name)):
        raise SkipTest(reason)
    return {**FAMILIES, **VARIANTS}[name](name, attention)


def family_of(name: str) -> str:
    """The family that a name of `FAMILIES` or `VARIANTS` belongs to."""
    return max((family for family in FAMILIES if name.startswith(family)), key=len)
