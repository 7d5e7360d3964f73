"""What can be imported from the package is what it says."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

import tokenprune
from tokenprune import media, methods, testing


def modules() -> list[str]:
    walk = pkgutil.walk_packages(tokenprune.__path__, "tokenprune.")
    return ["tokenprune", *(one.name for one in walk if ".eval" not in one.name)]


def order(name: str) -> tuple[int, str]:
    """Constants, classes, functions."""
    return 0 if name.isupper() else 1 if name[0].isupper() else 2, name


def names_for_type_checkers(package: ModuleType) -> dict[str, str]:
    """What a lazy package imports for type checkers alone, and from which of its modules."""
    tree = ast.parse(inspect.getsource(package))
    branch = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(branch.test) == "TYPE_CHECKING"
    return {
        one.name: str(node.module).removeprefix(f"{package.__name__}.")
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
        for one in node.names
    }


@pytest.mark.parametrize("name", modules())
def test_exports_are_sorted_and_exist(name):
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", [])

    assert exported == sorted(exported, key=order)
    assert [one for one in exported if not hasattr(module, one)] == []


@pytest.mark.parametrize(
    "package", [tokenprune, media, methods, testing], ids=lambda package: package.__name__
)
def test_a_lazy_package_gives_what_it_lists(package):
    where = names_for_type_checkers(package)

    assert sorted(where) == sorted(package.__all__)
    assert where == package._MODULES
    assert set(package.__all__) <= set(dir(package))
    for name, module in where.items():
        home = importlib.import_module(f"{package.__name__}.{module}")
        assert getattr(package, name) is getattr(home, name)
        assert name in home.__all__
    unknown = "nothing"
    with pytest.raises(AttributeError, match=f"has no attribute '{unknown}'"):
        getattr(package, unknown)


@pytest.mark.parametrize(
    "package", [tokenprune, media, methods, testing], ids=lambda package: package.__name__
)
def test_no_module_hides_a_name(package):
    """`import tokenprune.asking` sets `tokenprune.asking`: `ask` must not be such a module."""
    parts = {one.name for one in pkgutil.iter_modules(package.__path__)}

    assert not {"adapters", "demos", "eval", *parts} & set(package.__all__)


def test_the_package_exports_all_errors_and_methods():
    registered = tokenprune.list_methods().values()
    own = [cls.__name__ for cls in registered if cls.__module__.startswith(methods.__name__)]

    assert set(importlib.import_module("tokenprune.errors").__all__) <= set(tokenprune.__all__)
    assert methods.__all__ == sorted(own, key=order)


def test_the_version_is_that_of_the_distribution():
    project = Path(__file__).parent.parent / "pyproject.toml"

    assert tokenprune.__version__ == tomllib.loads(project.read_text())["project"]["version"]
