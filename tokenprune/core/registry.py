"""The registry: methods by the name that recipes use."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from tokenprune.errors import RecipeError

if TYPE_CHECKING:
    from tokenprune.core.stage import Method

__all__ = ["find_method", "list_methods", "register"]

_METHODS: dict[str, type[Method]] = {}

_PACKAGE = "tokenprune.methods"
"""Where methods are looked for: by name, since nothing in `core` knows any of them."""


def register(name: str, method: type[Method]) -> None:
    """Make a method known by a name."""
    _METHODS[name] = method


def list_methods() -> dict[str, type[Method]]:
    """All methods by name, those of files dropped into `tokenprune/methods/` included."""
    package = importlib.import_module(_PACKAGE)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{_PACKAGE}.{module.name}")
    return dict(sorted(_METHODS.items()))


def find_method(name: str) -> type[Method]:
    """The method of this name.

    Raises:
        RecipeError: There is none.
    """
    methods = list_methods()
    if name.lower() not in methods:
        raise RecipeError(f"no method {name!r}; known: {', '.join(methods)}")
    return methods[name.lower()]
