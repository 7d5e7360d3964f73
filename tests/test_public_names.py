"""What can be imported from the package is what it says."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

import pytest

import tokenprune


def modules() -> list[str]:
    walk = pkgutil.walk_packages(tokenprune.__path__, "tokenprune.")
    return ["tokenprune", *(one.name for one in walk if ".eval" not in one.name)]


def order(name: str) -> tuple[int, str]:
    """Constants, classes, functions."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


def test_the_package_exports_all_its_public_names():
    names = {
        name
        for name, value in vars(tokenprune).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert tokenprune.__all__ == sorted(names)


@pytest.mark.parametrize("name", modules())
def test_exports_are_sorted_and_exist(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])

    assert exported == sorted(exported, key=order)
    assert [one for one in exported if not hasattr(module, one)] == []
