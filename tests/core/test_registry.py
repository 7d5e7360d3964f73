"""Names find one class: the library's, a registered one, or one of an installed distribution."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.distributions import ADAPTER, METHOD, Site, site, source
from tokenprune.adapters.base import ADAPTERS, adapter_for, find_adapter, list_models
from tokenprune.catalog import Plugin, method_summaries
from tokenprune.core.recipe import Recipe
from tokenprune.core.registry import METHODS, find_method, list_methods, method
from tokenprune.errors import RecipeError, UnsupportedModelError
from tokenprune.methods.baselines import Random, Uniform
from tokenprune.session.file import identity, write
from tokenprune.session.session import Session
from tokenprune.testing.tiny import build


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site(tmp_path, monkeypatch)


# -- names of one's own


def test_a_class_is_found_by_its_name(place: Site) -> None:
    @method("brightest")
    @dataclass(frozen=True, kw_only=True)
    class Brightest(Uniform):
        """Keep the brightest."""

    assert Brightest.name == "brightest"
    assert find_method("brightest") is find_method("BrightEst") is Brightest
    assert list_methods()["brightest"] is Brightest
    assert str(Recipe.parse("brightest(keep=0.25)")) == "brightest(keep=0.25)"
    (added,) = METHODS.added()
    assert added == Plugin("method", "brightest", f"{__name__}.{Brightest.__qualname__}", "")


def test_a_class_that_is_written_again_replaces_the_first(place: Site) -> None:
    def write_it() -> type[Uniform]:
        @method("again")
        @dataclass(frozen=True, kw_only=True)
        class Again(Uniform):
            """Written twice, as in a notebook."""

        return Again

    first, second = write_it(), write_it()

    assert first is not second
    assert find_method("again") is second


@pytest.mark.parametrize("name", ["", "none", "Own", "a-b", "a.b", "1st", "zwölf", "a\n"])
def test_a_name_that_recipes_cannot_hold_fails(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"a lower-case identifier other than none, got .*@method"
    ):
        method(name)


def test_what_is_no_method_or_no_dataclass_fails(place: Site) -> None:
    class Other:
        """No method."""

    for cls in (Other, int):
        with pytest.raises(RecipeError, match=r"@method\('own'\) must stand above @dataclass on a"):
            method("own")(cls)  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["random", "mine"])
def test_a_name_that_two_claim_fails_when_it_is_used(name: str, place: Site) -> None:
    place.write("mine", source(METHOD, name))
    place.write("other", source(METHOD, name))
    for module in ("mine", "other"):
        __import__(module)
    error = rf"method '{name}' is claimed by .*mine\.{name.title()} and other\.{name.title()}; "

    with pytest.raises(RecipeError, match=error + "rename one, or use the class itself in Python"):
        Recipe.parse(f"{name}(keep=0.5)")
    assert Recipe.parse("uniform").methods == (Uniform(),)
    assert Recipe(Random(keep=0.5)).methods == (Random(keep=0.5),)
    with pytest.warns(RuntimeWarning, match=f"left out: method '{name}' is claimed by"):
        assert name not in list_methods()


# -- methods of distributions


@pytest.mark.parametrize("target", ["mine", "mine:Mine"])
def test_a_method_of_a_distribution_is_found(target: str, place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))
    place.install("mine", {"methods": {"mine": target}})

    assert Recipe.parse("MINE(keep=0.25)").methods[0].keep == 0.25  # type: ignore[attr-defined]
    assert list_methods()["mine"] is find_method("mine")
    assert METHODS.added() == ()


def test_the_name_of_an_entry_point_may_have_capitals(place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))
    place.install("mine", {"methods": {"Mine": "mine"}})

    assert find_method("mine").__module__ == "mine"


def test_a_distribution_that_comes_later_is_found(place: Site) -> None:
    known = ", ".join(method_summaries())
    with pytest.raises(RecipeError, match=f"no method 'mine'; known: {known}. A method"):
        find_method("mine")
    place.write("mine", source(METHOD, "mine"))
    place.install("mine", {"methods": {"mine": "mine"}})

    assert find_method("mine").__module__ == "mine"


def test_nothing_is_imported_unless_its_name_is_used(place: Site) -> None:
    for name in ("mine", "other"):
        place.write(name, source(METHOD, name))
        place.install(name, {"methods": {name: name}})

    find_method("random")
    known = ", ".join(sorted([*method_summaries(), "mine", "other"]))
    with pytest.raises(RecipeError, match=f"no method 'third'; known: {known}. A method .* --with"):
        find_method("third")
    assert place.imported() == set()
    find_method("other")
    assert place.imported() == {"other"}
    assert {"mine", "other"} <= list_methods().keys()
    assert place.imported() == {"mine", "other"}


def test_a_distribution_that_takes_a_name_of_ours_fails(place: Site) -> None:
    place.write("mine", source(METHOD, "random"))
    place.install("mine", {"methods": {"random": "mine"}})

    error = (
        r"'random' is claimed by tokenprune\.methods\.baselines\.Random and mine\.Random "
        r"\(mine 1\.0\); rename one"
    )
    with pytest.raises(RecipeError, match=error):
        find_method("random")
    assert find_method("uniform") is Uniform


def test_distributions_that_take_the_same_name_fail(place: Site) -> None:
    for name in ("one", "two"):
        place.write(name, source(METHOD, "mine"))
        place.install(name, {"methods": {"mine": f"{name}:Mine"}})

    error = r"claimed by one\.Mine \(one 1\.0\) and two\.Mine \(two 1\.0\)"
    with pytest.raises(RecipeError, match=error):
        find_method("mine")


@pytest.mark.parametrize(
    ("text", "target", "error"),
    [
        ("raise OSError('no card')", "mine", "cannot be loaded: no card; mend or uninstall that"),
        ("import sys; sys.exit(1)", "mine", "cannot be loaded: 1; mend or uninstall"),
        ("import nowhere", "mine", "cannot be loaded: No module named 'nowhere'; mend"),
        ("", "mine:Mine", "cannot be loaded: module 'mine' has no attribute 'Mine'; mend"),
        ("", "nowhere", "cannot be loaded: No module named 'nowhere'; mend or uninstall"),
        ("", "mine", "which registers nothing; name the entry point as what it registers"),
        ("Mine = 3", "mine:Mine", "which registers nothing; name the entry point"),
        ("class Mine: ...", "mine:Mine", "which registers nothing; name the entry point"),
        (source(METHOD, "own"), "mine", "which registers 'own'; name the entry point"),
        (source(METHOD, "own"), "mine:Own", "which registers 'own'; name the entry point"),
    ],
)
def test_a_broken_entry_point_breaks_its_name_alone(
    text: str, target: str, error: str, place: Site
) -> None:
    place.write("mine", text)
    place.install("mine", {"methods": {"mine": target}})

    declared = f"mine 1.0 declares method 'mine' as '{target}', "
    with pytest.raises(RecipeError) as caught:
        Recipe.parse("mine")
    assert str(caught.value).startswith(declared)
    assert error in str(caught.value)
    assert (caught.value.__cause__ is not None) == ("cannot be loaded" in error)
    assert find_method("random") is Random
    with pytest.warns(RuntimeWarning, match=f"left out: {declared}") as warned:
        listed = list_methods()
    assert "mine" not in listed and {"random", "uniform"} <= listed.keys()
    assert warned[0].filename == __file__


# -- texts


TEXTS = ["mine.stage", "mine:Mine", "mine.stage.Mine(keep=0.5)", "mine/stage", "mine", "../mine"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_text_of_a_recipe_imports_nothing(text: str, place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))

    with pytest.raises(RecipeError):
        Recipe.parse(text)
    assert place.imported() == set()


@pytest.mark.parametrize("name", ["mine.stage", "mine:Mine", "mine/stage", "../mine"])
def test_a_module_is_no_name(name: str, place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))

    with pytest.raises(RecipeError, match="names methods, and imports nothing, got .* --with MODU"):
        find_method(name)
    assert place.imported() == set()


@pytest.mark.parametrize("text", TEXTS)
def test_a_saved_session_imports_nothing(text: str, place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))
    model = build("qwen2_5_vl").model
    header = {"identity": identity(model), "recipe": text, "group": 2, "model": "x", "watched": {}}
    write(place.folder / "saved.safetensors", {}, header)

    with pytest.raises(RecipeError):
        Session.load(place.folder / "saved.safetensors", model, None)
    assert place.imported() == set()


# -- models of distributions


def model_of_type(name: str) -> Any:
    model = build("llava").model
    model.config.model_type = name
    return model


@pytest.mark.parametrize("target", ["mine", "mine:Mine"])
def test_a_model_of_a_distribution_is_served(target: str, place: Site) -> None:
    place.write("mine", source(ADAPTER, "mine_vl", "Mine"))
    place.write("other", source(ADAPTER, "other_vl", "Other"))
    place.install("mine", {"models": {"mine_vl": target, "other_vl": "other"}})

    assert type(adapter_for(build("llava").model)) is find_adapter("llava")
    assert place.imported() == set()
    assert type(adapter_for(model_of_type("mine_vl"))) is find_adapter("mine_vl")
    assert find_adapter("mine_vl").__module__ == "mine"
    assert place.imported() == {"mine"}
    assert list_models()["other_vl"].__module__ == "other"
    assert ADAPTERS.added() == ()


def test_a_model_type_is_as_it_is_written(place: Site) -> None:
    place.write("mine", source(ADAPTER, "mine_vl", "Mine"))
    place.install("mine", {"models": {"mine_vl": "mine"}})

    error = "no adapter for model_type 'Mine_VL'; known: .*mine_vl.*Add adapters/<family>.py"
    with pytest.raises(UnsupportedModelError, match=error):
        adapter_for(model_of_type("Mine_VL"))


def test_a_model_that_two_serve_fails_when_it_is_used(place: Site) -> None:
    place.write("mine", source(ADAPTER, "llava", "Mine"))
    place.install("mine", {"models": {"llava": "mine"}})

    error = (
        r"adapter for model_type 'llava' is claimed by tokenprune\.adapters\.llava\.Llava and "
        r"mine\.Mine \(mine 1\.0\); uninstall or rename one"
    )
    with pytest.raises(UnsupportedModelError, match=error):
        adapter_for(build("llava").model)
    assert adapter_for(build("vipllava").model)
    with pytest.warns(RuntimeWarning, match="left out: adapter for model_type 'llava' is claimed"):
        assert "llava" not in list_models()


def test_a_broken_model_breaks_its_name_alone(place: Site) -> None:
    place.write("mine", source(ADAPTER, "own_vl", "Own") + "raise OSError('no card')")
    place.install("mine", {"models": {"mine_vl": "mine"}})

    error = "mine 1.0 declares adapter for model_type 'mine_vl' as 'mine', which cannot be loaded"
    with pytest.raises(UnsupportedModelError, match=error):
        adapter_for(model_of_type("mine_vl"))
    assert adapter_for(build("llava").model)


def test_a_model_of_another_name_fails(place: Site) -> None:
    place.write("mine", source(ADAPTER, "own_vl", "Own"))
    place.install("mine", {"models": {"mine_vl": "mine:Own"}})

    with pytest.raises(UnsupportedModelError, match="which registers 'own_vl'; name the entry"):
        adapter_for(model_of_type("mine_vl"))
