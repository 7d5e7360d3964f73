"""Prune the visual and audio tokens that multimodal language models do not need.

```python
with prune(model, VFlowOpt(keep=0.1)) as report:
    output = model.generate(**inputs, max_new_tokens=64)
print(report)
```
"""

from tokenprune._version import __version__ as __version__
from tokenprune.adapters.base import adapter_for, list_models
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
from tokenprune.report.report import Report
from tokenprune.session.session import Session

__all__ = [
    "DecodeError",
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
    "list_methods",
    "list_models",
    "prune",
]
