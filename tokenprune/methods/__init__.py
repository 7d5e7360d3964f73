"""Published methods and baselines, a file each; files whose names begin with _ are parts of them.

A method is used by its class, `VFlowOpt(keep=0.1)`, or by its name in the text of a recipe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tokenprune._lazy import lazy_names

if TYPE_CHECKING:
    from tokenprune.methods.baselines import Random, Uniform
    from tokenprune.methods.divprune import DivPrune
    from tokenprune.methods.fastv import FastV
    from tokenprune.methods.groups import Groups
    from tokenprune.methods.knorm import Knorm
    from tokenprune.methods.plphp import PLPHP
    from tokenprune.methods.pyramiddrop import PyramidDrop
    from tokenprune.methods.snapkv import SnapKV
    from tokenprune.methods.vflowopt import VFlowOpt
    from tokenprune.methods.visionzip import VisionZip

__all__ = [
    "PLPHP",
    "DivPrune",
    "FastV",
    "Groups",
    "Knorm",
    "PyramidDrop",
    "Random",
    "SnapKV",
    "Uniform",
    "VFlowOpt",
    "VisionZip",
]

_MODULES = {
    "PLPHP": "plphp",
    "DivPrune": "divprune",
    "FastV": "fastv",
    "Groups": "groups",
    "Knorm": "knorm",
    "PyramidDrop": "pyramiddrop",
    "Random": "baselines",
    "SnapKV": "snapkv",
    "Uniform": "baselines",
    "VFlowOpt": "vflowopt",
    "VisionZip": "visionzip",
}
"""Where each method comes from when it is first used."""

if not TYPE_CHECKING:  # type checkers shall know the names above, and no others
    __getattr__, __dir__ = lazy_names(__name__, _MODULES)
