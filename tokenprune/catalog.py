"""What there is to use, read from source text and package metadata: nothing of it is imported.

`list_methods()` and `list_models()` give the classes themselves, for which torch must be imported;
that takes seconds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

__all__ = [
    "ADAPTERS",
    "GROUPS",
    "METHODS",
    "Clash",
    "Plugin",
    "find_clashes",
    "find_plugins",
    "method_summaries",
    "model_types",
]

METHODS, ADAPTERS = "tokenprune.methods", "tokenprune.adapters"
"""Packages whose source is read."""

GROUPS = {"method": "tokenprune.methods", "model": "tokenprune.models"}
"""Groups of entry points by which other packages add methods and model families."""


@dataclass(frozen=True)
class Plugin:
    """Something that another package adds, by an entry point or when it is imported.

    Attributes:
        kind: "method" or "model".
        name: The entry point's name; that of a method in lower case, as recipes are read.
        target: What it names: a module, or an object in one.
        package: The distribution that declares it, with its version; "" if none does.
    """

    kind: str
    name: str
    target: str
    package: str

    def __str__(self) -> str:
        return f"{self.target} ({self.package})" if self.package else self.target


@dataclass(frozen=True)
class Clash:
    """A name that cannot be used, since several claim it.

    Attributes:
        kind: "method" or "model".
        name: The name.
        claimants: What claims it, "tokenprune" for the library itself.
    """

    kind: str
    name: str
    claimants: tuple[str, ...]


def method_summaries() -> dict[str, str]:
    """The first docstring line of each method of the library, by name, sorted."""
    named = {name: node for node in _classes(METHODS) if (name := _declared_name(node))}
    found = {
        name: (ast.get_docstring(node) or "").partition("\n")[0] for name, node in named.items()
    }
    return dict(sorted(found.items()))


def model_types() -> list[str]:
    """The `model_type` of each family that the library has an adapter for, sorted."""
    return sorted(
        model_type
        for node in _classes(ADAPTERS)
        for line in node.body
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "model_types"
        for model_type in ast.literal_eval(line.value)
    )


def find_plugins() -> list[Plugin]:
    """What installed packages add, sorted by kind and name."""
    from importlib.metadata import entry_points  # takes a while, and serves this alone

    found = [
        Plugin(
            kind,
            _folded(kind, one.name),
            one.value,
            f"{one.dist.name} {one.dist.version}" if one.dist else "",
        )
        for kind, group in GROUPS.items()
        for one in entry_points(group=group)
    ]
    return sorted(found, key=lambda one: (one.kind, one.name, one.package))


def find_clashes(own: Mapping[str, Iterable[str]], plugins: Iterable[Plugin]) -> list[Clash]:
    """Names that several claim, sorted by kind and name.

    Args:
        own: The library's own names by kind.
        plugins: What is added to them.
    """
    claims = {(kind, name): ["tokenprune"] for kind, names in own.items() for name in names}
    for one in plugins:
        claims.setdefault((one.kind, one.name), []).append(str(one))
    return [Clash(*key, tuple(found)) for key, found in sorted(claims.items()) if len(found) > 1]


def _folded(kind: str, name: str) -> str:
    return name.lower() if kind == "method" else name


def _classes(package: str) -> Iterator[ast.ClassDef]:
    """The classes at the top level of a package's modules, private ones included."""
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations if spec else None) or ():
        for path in sorted(Path(folder).glob("*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            yield from (node for node in tree.body if isinstance(node, ast.ClassDef))


def _declared_name(node: ast.ClassDef) -> str | None:
    """The name that a decorator `@method("name")` gives a class."""
    for one in node.decorator_list:
        match one:
            case ast.Call(
                func=ast.Name(id="method") | ast.Attribute(attr="method"),
                args=[ast.Constant(value=str(name))],
            ):
                return name
    return None
