"""Releases of transformers: what tiny models of older ones are built without."""

from __future__ import annotations

import transformers
from packaging.version import Version

__all__ = ["OLD", "RELEASE", "UNUSABLE"]

RELEASE = Version(transformers.__version__)
OLD = RELEASE < Version("5.10")
"""Whether this is one of the releases for which tiny models and prompts are built otherwise."""

UNUSABLE: dict[str, str] = {}
"""Families that the release at hand cannot build, or whose prompts it cannot take: why."""
if OLD:
    UNUSABLE["aya_vision"] = "transformers refuses its own default for use_cache of Cohere 2"
    UNUSABLE["granite_speech"] = "transformers takes one sound a prompt, and these hold two"
