"""The registry: methods by the name that recipes use."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from tokenprune.errors import RecipeError

if TYPE_CHECKING:
    from tokenprune.core.stage import Method

T = TypeVar("T", bound="Method")

__all__ = ["find_method", "list_methods", "method", "register"]

_METHODS: dict[str, type[Method]] = {}

_PACKAGE = "tokenprune.methods"
"""Where methods are looked for: by name, since nothing in `core` knows any of them."""


_NAME = re.compile(r"[a-z_][a-z0-9_]*")


def method(name: str) -> Callable[[type[T]], type[T]]:
    """Name a method, above its `@dataclass`: recipes know it by this name from then on.

    Raises:
        RecipeError: The name cannot be written in a recipe, or is taken by its grammar.
    """
    if not _NAME.fullmatch(name) or name == "none":
        raise RecipeError(
            f"a method's name must be a lower-case identifier other than none, got {name!r}; "
            'write for example @method("fastv")'
        )

    def claim(cls: type[T]) -> type[T]:
        cls.name = name
        register(name, cls)
        return cls

    return claim


def register(name: str, cls: type[Method]) -> None:
    """Make a method known by a name."""
    _METHODS[name] = cls


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
