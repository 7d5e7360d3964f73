"""Registries: methods, and adapters too, by the names that recipes and checkpoints use.

A name is claimed by a class of the library, by one that was registered in this process, or by one
that an installed distribution declares:

    [project.entry-points."tokenprune.methods"]
    fastv = "my_package.fastv"              # the name of the method; a module, or module:Class

Texts never import: a recipe, on its own or in a saved session, can only name a method, never a
module. What is loaded for a name is what an installed distribution declares under that very name;
anything else is imported by the program itself, or by `tokenprune --with MODULE`.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING, Generic, TypeVar

from tokenprune.catalog import GROUPS, Plugin, find_plugins
from tokenprune.errors import RecipeError, TokenPruneError, first_line

if TYPE_CHECKING:
    from tokenprune.core.stage import Method

__all__ = ["METHODS", "Registry", "find_method", "list_methods", "method", "register"]

C = TypeVar("C")
M = TypeVar("M", bound="Method")

_NAME = re.compile(r"[a-z_][a-z0-9_]*")


@dataclass(eq=False)
class Registry(Generic[C]):
    """Classes by name, all claimants of a name included.

    A clash raises when that name is used, so that one package too many breaks no other name; so
    does an entry point that cannot be loaded.

    Attributes:
        kind: "method" or "model", a key of `catalog.GROUPS`.
        what: What a name is of, in messages.
        package: Where the library's own modules are: by name, since `core` imports none of them.
        error: What is raised.
        unknown: What to do about a name that nobody claims.
        clash: What to do about a name that several claim.
        claims: Classes by name, in the order in which they were registered.
    """

    kind: str
    what: str
    package: str
    error: type[TokenPruneError]
    unknown: str
    clash: str
    claims: dict[str, tuple[type[C], ...]] = field(default_factory=dict)

    def add(self, name: str, cls: type[C]) -> None:
        """Register a class; one of the same module and name, as of a reload, gives way."""
        others = (one for one in self.claims.get(name, ()) if _path(one) != _path(cls))
        self.claims[name] = (*others, cls)

    def find(self, name: str) -> type[C]:
        """The class of this name; of entry points those of this name alone are loaded.

        Raises:
            TokenPruneError: No class or several have this name, or an entry point is broken.
        """
        self._import_own()
        for plugin in self._plugins():
            if plugin.name == name:
                self._load(plugin)
        return self._only(name)

    def knows(self, name: str) -> bool:
        """Whether anybody claims a name; `find` may raise all the same."""
        self._import_own()
        return name in self.claims or any(one.name == name for one in self._plugins())

    def usable(self) -> dict[str, type[C]]:
        """All that can be used, by name, sorted; entry points are loaded.

        Warns:
            RuntimeWarning: For a name that is left out, since `find` would raise.
        """
        self._import_own()
        found, broken = {}, set()
        for plugin in self._plugins():
            try:
                self._load(plugin)
            except self.error as error:
                broken.add(plugin.name)
                _leave_out(error)
        for name in sorted(self.claims.keys() - broken):
            try:
                found[name] = self._only(name)
            except self.error as error:
                _leave_out(error)
        return found

    def added(self) -> tuple[Plugin, ...]:
        """What was registered in this process, and is neither the library's nor a plugin's."""
        return tuple(
            Plugin(self.kind, name, _path(cls), "")
            for name, classes in sorted(self.claims.items())
            for cls in classes
            if not cls.__module__.startswith(f"{self.package}.") and not self._package(name, cls)
        )

    def _plugins(self) -> tuple[Plugin, ...]:
        return tuple(one for one in _installed(_search_path()) if one.kind == self.kind)

    def _import_own(self) -> None:
        """Import the library's own modules, files dropped into its folder included."""
        package = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{self.package}.{module.name}")

    def _load(self, plugin: Plugin) -> None:
        """Load an entry point, and check that it registers what it declares."""
        declared = f"{plugin.package} declares {self.what} {plugin.name!r} as {plugin.target!r}"
        try:
            given: object = EntryPoint(plugin.name, plugin.target, GROUPS[self.kind]).load()
        except (Exception, SystemExit) as error:  # a foreign module may raise whatever it likes
            raise self.error(
                f"{declared}, which cannot be loaded: {first_line(error)}; mend or uninstall that "
                "package"
            ) from error
        names = [name for name, classes in self.claims.items() if _gives(given, classes)]
        if plugin.name not in names:
            instead = ", ".join(map(repr, names)) or "nothing"
            raise self.error(
                f"{declared}, which registers {instead}; name the entry point as what it registers"
            )

    def _only(self, name: str) -> type[C]:
        claimants = self.claims.get(name, ())
        if not claimants:
            known = ", ".join(sorted({*self.claims, *(one.name for one in self._plugins())}))
            raise self.error(f"no {self.what} {name!r}; known: {known}. {self.unknown}")
        if len(claimants) > 1:
            classes = " and ".join(f"{_path(cls)}{self._package(name, cls)}" for cls in claimants)
            raise self.error(f"{self.what} {name!r} is claimed by {classes}; {self.clash}")
        return claimants[0]

    def _package(self, name: str, cls: type[C]) -> str:
        """The distribution that declares a class under a name, in parentheses; "" if none does."""
        for plugin in self._plugins():
            if plugin.name == name and _root(plugin.target) == _root(cls.__module__):
                return f" ({plugin.package})"
        return ""


METHODS: Registry[Method] = Registry(
    kind="method",
    what="method",
    package="tokenprune.methods",
    error=RecipeError,
    unknown="A method of your own is imported first, or by tokenprune --with MODULE",
    clash="rename one, or use the class itself in Python",
)


def method(name: str) -> Callable[[type[M]], type[M]]:
    """Name a method, above its `@dataclass`: recipes know it by this name from then on.

    Raises:
        RecipeError: The name cannot be written in a recipe, or the class is no method.
    """
    if not _NAME.fullmatch(name) or name == "none":  # "none" is the text of the empty recipe
        raise RecipeError(
            f"a method's name must be a lower-case identifier other than none, got {name!r}; "
            'write for example @method("fastv")'
        )

    def claim(cls: type[M]) -> type[M]:
        from tokenprune.core.stage import Method  # which may need names of this module

        if not issubclass(cls, Method) or not is_dataclass(cls):
            raise RecipeError(
                f"@method({name!r}) must stand above @dataclass on a subclass of Stage or Method, "
                f"got {_path(cls)}; write both lines above the class, in this order"
            )
        cls.name = name
        register(name, cls)
        return cls

    return claim


def register(name: str, cls: type[Method]) -> None:
    """Make a method known by a name; others that claim it stay, and the name becomes ambiguous."""
    METHODS.add(name, cls)


def list_methods() -> dict[str, type[Method]]:
    """All methods that recipes can use, by name: built-in, installed and registered ones.

    Warns:
        RuntimeWarning: For a name that several methods claim, or whose package is broken.
    """
    return METHODS.usable()


def find_method(name: str) -> type[Method]:
    """The method of this name, in upper or lower case.

    Raises:
        RecipeError: There is none, several claim the name, or its package is broken.
    """
    if not name.isidentifier():
        raise RecipeError(
            f"a recipe names methods, and imports nothing, got {name!r}; import the module in "
            "Python or by tokenprune --with MODULE, and write the name it gives its method"
        )
    return METHODS.find(name.lower())


def _path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _root(path: str) -> str:
    """The top-level package of a dotted path, or of an entry point's target."""
    return path.partition(":")[0].partition(".")[0].strip()


def _gives(given: object, classes: tuple[type, ...]) -> bool:
    """Whether an entry point's target is one of the classes, or a module of their package."""
    if isinstance(given, ModuleType):
        return any(_root(cls.__module__) == _root(given.__name__) for cls in classes)
    return isinstance(given, type) and _path(given) in map(_path, classes)


def _leave_out(error: TokenPruneError) -> None:
    # Above are `Registry.usable` and the function that users call.
    warnings.warn(f"left out: {error}", RuntimeWarning, stacklevel=4)


@lru_cache(maxsize=1)
def _installed(path: tuple[tuple[str, int], ...]) -> tuple[Plugin, ...]:
    """All plugins. To read the metadata takes some ten milliseconds, and each recipe asks."""
    return tuple(find_plugins())


def _search_path() -> tuple[tuple[str, int], ...]:
    """Folders in which distributions are found, and when something was last added to each."""
    return tuple((folder, _changed(folder or os.curdir)) for folder in sys.path)


def _changed(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:  # folders that are not there, and what only an importer knows
        return 0
