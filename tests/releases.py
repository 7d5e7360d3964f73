"""Releases of transformers: what older ones get wrong by themselves.

Nothing here can make such tests pass, for it is the unpruned model, or the processor, that fails
or answers otherwise. The newest release has no entry, and `test_releases.py` keeps it so.
"""

from __future__ import annotations

import re

import transformers
from packaging.specifiers import SpecifierSet
from packaging.version import Version

__all__ = ["NEWEST", "OLD", "QUIRKS", "RELEASE", "UNUSABLE", "quirk"]

RELEASE = Version(transformers.__version__)
NEWEST = Version("5.23")
"""From here on nothing is known to be wrong but what `contract/cases.py` lists."""
OLD = RELEASE < Version("5.10")
"""Whether this is one of the releases for which tiny models and prompts are built otherwise."""

UNUSABLE: dict[str, str] = {}
"""Families that the release at hand cannot build, or whose prompts it cannot take: why."""
if OLD:
    UNUSABLE["aya_vision"] = "transformers refuses its own default for use_cache of Cohere 2"
    UNUSABLE["granite_speech"] = "transformers takes one sound a prompt, and these hold two"

QUIRKS: list[tuple[str, str, str]] = [
    # Releases, tests (a pattern of their names), and what transformers does there.
    (
        "<5.10",
        r"test_sessions\.py::test_(?!releases|processors).*\[qwen2(_5)?_vl\b",
        "frames of a clip get positions that depend on how many follow; sessions refuse it",
    ),
]


def quirk(test: str) -> str | None:
    """Why a test cannot pass on the release at hand; None if it must.

    Args:
        test: Its name, with its module and parameters, as pytest writes it.
    """
    for releases, pattern, reason in QUIRKS:
        if RELEASE in SpecifierSet(releases) and re.search(pattern, test):
            return f"transformers {RELEASE}: {reason}"
    return None
