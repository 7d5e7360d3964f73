"""Published methods and baselines, a file each; files whose names begin with _ are parts of them.

A method is used by its class, `VFlowOpt(keep=0.1)`, or by its name in the text of a recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenprune.methods.baselines import Random, Uniform
    from tokenprune.methods.plphp import PLPHP
    from tokenprune.methods.vflowopt import VFlowOpt

__all__ = ["PLPHP", "Random", "Uniform", "VFlowOpt"]

_MODULES = {
    "PLPHP": "plphp",
    "Random": "baselines",
    "Uniform": "baselines",
    "VFlowOpt": "vflowopt",
}
"""Where each method comes from when it is first used."""

if not TYPE_CHECKING:  # type checkers shall know the names above, and no others

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
