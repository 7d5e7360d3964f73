"""Prune the visual and audio tokens that multimodal language models do not need.

```python
with prune(model, VFlowOpt(keep=0.1)) as report:
    output = model.generate(**inputs, max_new_tokens=64)
print(report)
```
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune._lazy import lazy_names
from tokenprune._version import __version__ as __version__

if TYPE_CHECKING:
    from tokenprune.adapters.base import adapter_for, list_models
    from tokenprune.asking import ask
    from tokenprune.core.layout import TokenLayout
    from tokenprune.core.recipe import Recipe
    from tokenprune.core.registry import list_methods
    from tokenprune.core.selection import Selection
    from tokenprune.engine.patch import prune
    from tokenprune.errors import (
        DecodeError,
        MediaError,
        MissingExtraError,
        NoVideoStreamError,
        RecipeError,
        TokenPruneError,
        UnsupportedModelError,
    )
    from tokenprune.inputs import read_media
    from tokenprune.models.load import load_model
    from tokenprune.models.loaded import LoadedModel
    from tokenprune.models.media import Media
    from tokenprune.report.answer import Answer
    from tokenprune.report.report import Report
    from tokenprune.session.session import Session

__all__ = [
    "Answer",
    "DecodeError",
    "LoadedModel",
    "Media",
    "MediaError",
    "MissingExtraError",
    "NoVideoStreamError",
    "Recipe",
    "RecipeError",
    "Report",
    "Selection",
    "Session",
    "TokenLayout",
    "TokenPruneError",
    "UnsupportedModelError",
    "adapter_for",
    "ask",
    "list_methods",
    "list_models",
    "load_model",
    "prune",
    "read_media",
]

_MODULES = {
    "Answer": "report.answer",
    "DecodeError": "errors",
    "LoadedModel": "models.loaded",
    "Media": "models.media",
    "MediaError": "errors",
    "MissingExtraError": "errors",
    "NoVideoStreamError": "errors",
    "Recipe": "core.recipe",
    "RecipeError": "errors",
    "Report": "report.report",
    "Selection": "core.selection",
    "Session": "session.session",
    "TokenLayout": "core.layout",
    "TokenPruneError": "errors",
    "UnsupportedModelError": "errors",
    "adapter_for": "adapters.base",
    "ask": "asking",
    "list_methods": "core.registry",
    "list_models": "adapters.base",
    "load_model": "models.load",
    "prune": "engine.patch",
    "read_media": "inputs",
}
"""Where each name comes from when it is first used: torch alone takes seconds to import."""

if not TYPE_CHECKING:  # type checkers shall know the names above, and no others
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
