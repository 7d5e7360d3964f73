"""What is known without imports is what is there."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from tests.distributions import Site, site
from tokenprune import list_methods, list_models
from tokenprune.catalog import (
    Clash,
    Plugin,
    find_clashes,
    find_plugins,
    method_summaries,
    model_types,
)


def test_methods_are_those_of_the_registry() -> None:
    registered = {
        name: (method.__doc__ or "").splitlines()[0]
        for name, method in list_methods().items()
        if method.__module__.startswith("tokenprune.methods.")
    }

    assert method_summaries() == registered
    assert list(method_summaries()) == sorted(registered)


def test_model_types_are_those_of_the_registry() -> None:
    assert model_types() == list(list_models())


def test_methods_are_told_by_their_decorator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "own" / "methods.py").write_text(
        "@dataclass(frozen=True)\nclass _Base(Stage):\n    '''A part.'''\n"
        "@method('deep')\n@dataclass\nclass Deepest(_Base):\n"
        "    '''\n    Go deep.\n\n    And on.\n    '''\n"
        "@registry.method('flat')\nclass Flat(Method): ...\n"
        "@method(NAME)\nclass Unknown(Method): ...\n"
        "@other('helper')\nclass Helper(NamedTuple):\n    '''No method.'''\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tokenprune.catalog.METHODS", "own")

    assert method_summaries() == {"deep": "Go deep.", "flat": ""}
    assert "own" not in sys.modules


def test_plugins_are_read_from_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    points = EntryPoints(
        [
            EntryPoint("own", "nowhere.models", "tokenprune.models"),
            EntryPoint("mine", "nowhere.mine", "tokenprune.methods"),
            EntryPoint("other", "nowhere:main", "console_scripts"),
        ]
    )
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: points.select(group=group)
    )

    assert find_plugins() == [
        Plugin("method", "mine", "nowhere.mine", ""),
        Plugin("model", "own", "nowhere.models", ""),
    ]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site(tmp_path, monkeypatch)


def test_plugins_of_a_distribution_are_found(place: Site) -> None:
    place.install("mine", {"methods": {"Mine": "mine:Mine"}, "models": {"Mine_VL": "mine.models"}})

    assert find_plugins() == [
        Plugin("method", "mine", "mine:Mine", "mine 1.0"),
        Plugin("model", "Mine_VL", "mine.models", "mine 1.0"),
    ]
    assert list(map(str, find_plugins())) == ["mine:Mine (mine 1.0)", "mine.models (mine 1.0)"]
    assert find_clashes({"method": ["random"]}, find_plugins()) == []


def test_clashes_are_found_by_kind() -> None:
    plugins = [
        Plugin("method", "random", "mine", "mine 1.0"),
        Plugin("method", "llava", "mine", "mine 1.0"),
        Plugin("model", "own", "mine", "mine 1.0"),
        Plugin("model", "own", "other.Own", ""),
    ]
    own = {"method": ["random", "uniform"], "model": ["llava"]}

    assert find_clashes(own, plugins) == [
        Clash("method", "random", ("tokenprune", "mine (mine 1.0)")),
        Clash("model", "own", ("mine (mine 1.0)", "other.Own")),
    ]
