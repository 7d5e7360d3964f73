"""Contracts for methods and adapters of other packages, on tiny random models.

```python
from tokenprune.testing import check_adapter, check_method

def test_my_method():
    check_method("mine(keep=0.5)")
```

`pip install "tokenprune-mm[testing]"` brings what it needs besides. Nothing here needs pytest, but
for mutants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune._lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.testing.adapters import check_adapter
    from tokenprune.testing.methods import check_method
    from tokenprune.testing.mutants import Mutants, assert_caught
    from tokenprune.testing.oracle import (
        Replay,
        assert_close,
        dense_logits,
        positions_logged,
        read_decisions,
    )
    from tokenprune.testing.outcomes import Outcomes, Row
    from tokenprune.testing.tiny import FAMILIES, VARIANTS, Tiny, build

__all__ = [
    "FAMILIES",
    "VARIANTS",
    "Mutants",
    "Outcomes",
    "Replay",
    "Row",
    "Tiny",
    "assert_caught",
    "assert_close",
    "build",
    "check_adapter",
    "check_method",
    "dense_logits",
    "positions_logged",
    "read_decisions",
]

_MODULES = {
    "FAMILIES": "tiny",
    "VARIANTS": "tiny",
    "Mutants": "mutants",
    "Outcomes": "outcomes",
    "Replay": "oracle",
    "Row": "outcomes",
    "Tiny": "tiny",
    "assert_caught": "mutants",
    "assert_close": "oracle",
    "build": "tiny",
    "check_adapter": "adapters",
    "check_method": "methods",
    "dense_logits": "oracle",
    "positions_logged": "oracle",
    "read_decisions": "oracle",
}
"""Where each name comes from when it is first used: tiny models need all of transformers."""

if not TYPE_CHECKING:  # type checkers shall know the names above, and no others
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
