"""Checkpoints of tiny random models with the real processor of their family, made offline.

`save_checkpoint("qwen2_5_vl", folder)` writes what a hub would deliver: weights, configuration,
tokenizer, image, video and sound processors, and a chat template. `AutoProcessor` and
`AutoModelForMultimodalLM` read it. The tokenizer knows characters; answers are noise. Names are
those of `CHECKPOINTS`, gathered from the modules of this package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from tests.checkpoints.base import SPECIAL, Maker, Saver
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.testing.tiny import build

__all__ = ["CHECKPOINTS", "HEARING", "SEEING", "WATCHING", "loader", "save_checkpoint"]

_MODULES = [
    importlib.import_module(f"{__name__}.{one.name}") for one in pkgutil.iter_modules(__path__)
]


def _gather(attribute: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for module in _MODULES:
        found |= getattr(module, attribute, {})
    return dict(sorted(found.items()))


CHECKPOINTS: dict[str, Maker] = _gather("CHECKPOINTS")
_SAVERS: dict[str, Saver] = _gather("SAVERS")


def _taking(part: str) -> list[str]:
    """The families whose processor has this part."""
    return [name for name, make in CHECKPOINTS.items() if hasattr(make(), part)]


SEEING = _taking("image_processor")
WATCHING = _taking("video_processor")
HEARING = sorted({*_taking("feature_extractor"), *_taking("audio_processor")})


def save_checkpoint(name: str, folder: str | Path) -> Path:
    """Save the tiny model of a family with its processor; returns the folder."""
    folder = Path(folder)
    tiny = build(name)
    # An answer of special tokens would read as an empty one.
    tiny.model.generation_config.suppress_tokens = sorted({*tiny.suppress, *SPECIAL})
    if name in _SAVERS:
        _SAVERS[name](tiny.model, folder)
    else:
        tiny.model.save_pretrained(folder)
    if not (folder / "processor_config.json").exists():  # a converter writes its own
        CHECKPOINTS[name]().save_pretrained(folder)
    return folder


def loader(checkpoint: Callable[[str], Path]) -> Callable[[str], LoadedModel]:
    """A function that loads the tiny model of a family on the CPU, each family once.

    Args:
        checkpoint: Gives the folder of a family's checkpoint.
    """
    return cache(lambda name: load_model(str(checkpoint(name)), device="cpu"))
