"""Distributions that are installed for a test: modules that add methods and models."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tokenprune.adapters.base import ADAPTERS
from tokenprune.core.registry import METHODS

METHOD = '''
from dataclasses import dataclass
from tokenprune.core.registry import method
from tokenprune.methods.baselines import Uniform

@method("{name}")
@dataclass(frozen=True, kw_only=True)
class {cls}(Uniform):
    """{cls}, of another package."""
'''

ADAPTER = """
from tokenprune.adapters.llava import Llava

class {cls}(Llava):
    model_types = ("{name}",)
"""


def source(template: str, name: str, cls: str | None = None) -> str:
    """A module with one class; a method's is called as the method."""
    return template.format(name=name, cls=cls or name.title())


@dataclass
class Site:
    """A folder on the search path.

    Attributes:
        folder: Where modules and metadata lie.
        modules: Modules that were written.
    """

    folder: Path
    modules: set[str] = field(default_factory=set)

    def write(self, name: str, text: str) -> None:
        """Write a module that leaves a mark when it is imported."""
        mark = f"open({str(self.folder / name)!r} + '.imported', 'w').close()\n"
        (self.folder / f"{name}.py").write_text(mark + text)
        self.modules.add(name)
        importlib.invalidate_caches()

    def install(self, distribution: str, points: Mapping[str, Mapping[str, str]]) -> None:
        """Write the metadata of a distribution.

        Args:
            distribution: Its name; its version is 1.0.
            points: By kind, "methods" or "models": targets by name of entry point.
        """
        metadata = self.folder / f"{distribution}-1.0.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n"
        )
        lines = []
        for kind, targets in points.items():
            lines.append(f"[tokenprune.{kind}]")
            lines += [f"{name} = {target}" for name, target in targets.items()]
        (metadata / "entry_points.txt").write_text("\n".join(lines) + "\n")

    def imported(self) -> set[str]:
        """Modules that were imported, also those that failed to be."""
        return {path.stem for path in self.folder.glob("*.imported")}


def site(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Put a folder on the search path, and forget afterwards what it has registered."""
    METHODS.usable(), ADAPTERS.usable()  # the library's own, which stay
    monkeypatch.syspath_prepend(folder)
    for registry in (METHODS, ADAPTERS):
        monkeypatch.setattr(registry, "claims", dict(registry.claims))
    found = Site(folder)
    yield found
    for name in found.modules:
        sys.modules.pop(name, None)
