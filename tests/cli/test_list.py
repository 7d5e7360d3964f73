"""`tokenprune list`, and what `--with` adds to it and to other verbs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Files, Ran
from tests.distributions import ADAPTER, METHOD, Site, site, source

Command = Callable[..., Ran]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    yield from site(tmp_path, monkeypatch)


def test_plugins_are_listed_and_not_imported(command: Command, place: Site) -> None:
    place.write("mine", source(METHOD, "mine") + source(ADAPTER, "mine_vl", "Own"))
    place.install("mine", {"methods": {"mine": "mine"}, "models": {"mine_vl": "mine:Own"}})
    text, found = command("list").out, json.loads(command("list", "--json").out)

    assert "\nplugins\n  method mine, of mine (mine 1.0)\n" in text
    assert "\n  model mine_vl, of mine:Own (mine 1.0)\n" in text
    assert "clashes" not in text and found["clashes"] == []
    assert [one["name"] for one in found["plugins"]] == ["mine", "mine_vl"]
    assert place.imported() == set()


def test_both_sides_of_a_clash_are_listed(command: Command, place: Site) -> None:
    place.write("mine", source(METHOD, "random"))
    place.install("mine", {"methods": {"random": "mine"}, "models": {"llava": "mine", "x": "mine"}})
    place.install("other", {"models": {"x": "other:X"}})
    text, found = command("list").out, json.loads(command("list", "--json").out)

    start, _, clashes = text.partition("\nclashes: names that cannot be used, since several ")
    assert "Keep tokens at random" in start
    assert "\n  method random, of mine (mine 1.0)" in start
    assert clashes.splitlines()[1:] == [
        "  method random: tokenprune, mine (mine 1.0)",
        "  model llava: tokenprune, mine (mine 1.0)",
        "  model x: mine (mine 1.0), other:X (other 1.0)",
    ]
    assert [one["claimants"][0] for one in found["clashes"]] == ["tokenprune"] * 2 + [
        "mine (mine 1.0)"
    ]
    assert place.imported() == set()


# -- modules by name


def test_what_a_module_registers_is_listed(command: Command, place: Site) -> None:
    place.write("mine", source(METHOD, "mine") + source(METHOD, "random"))
    place.write("other", source(ADAPTER, "other_vl", "Other"))
    text = command("--with", "mine", "--with", "other", "list").out

    assert "\n  method mine, of mine.Mine\n" in text
    assert "\n  model other_vl, of other.Other\n" in text
    assert "\n  method random: tokenprune, mine.Random" in text


def test_what_is_installed_is_listed_once(command: Command, place: Site) -> None:
    place.write("mine", source(METHOD, "mine"))
    place.install("mine", {"methods": {"mine": "mine:Mine"}})
    text = command("--with", "mine", "list").out

    assert text.count("method mine") == 1 and "clashes" not in text


def test_a_module_is_there_for_a_recipe(
    command: Command, place: Site, files: Files, checkpoint: Callable[[str], Path]
) -> None:
    place.write("mine", source(METHOD, "mine"))
    model = ["--model", checkpoint("qwen2_5_vl"), "--frames", 2]
    asked = ["ask", files.video, "?", *model, "--max-new-tokens", 1, "--json"]
    own = ["--recipe", "mine(keep=0.5)"]

    assert "no method 'mine'; known: divprune, " in command(*asked, *own).error
    answer = json.loads(command("--with", "mine", *asked, *own).out)
    assert answer["recipe"] == "mine(keep=0.5)"
    planned = command("--with", "mine", "plan", files.video, *model, "--json", *own)
    assert json.loads(planned.out)["recipe"] == "mine(keep=0.5)"


def test_a_module_in_the_working_folder_is_found(
    command: Command, place: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    place.modules.add("nearby")
    (tmp_path / "here" / "nearby.py").write_text(source(METHOD, "nearby"))
    (tmp_path / "here" / "json.py").write_text("raise AssertionError('hides another module')")
    monkeypatch.chdir(tmp_path / "here")

    assert "method nearby, of nearby.Nearby" in command("--with", "nearby", "list").out


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("nowhere", "", "--with nowhere cannot be imported: No module named 'nowhere'; give a"),
        ("mine.part", "", "--with mine.part cannot be imported: No module named 'mine.part'"),
        ("mine.py", "", "cannot be imported: No module named 'mine.py'"),
        ("", "", "cannot be imported: Empty module name; give a module that is installed"),
        (".mine", "", "cannot be imported: the 'package' argument is required"),
        ("mine", "raise OSError('no card\\nnor any')", "--with mine cannot be imported: no card;"),
        ("mine", "import sys; sys.exit(0)", "--with mine cannot be imported: 0; give a module"),
        ("mine", "def", "--with mine cannot be imported: invalid syntax"),
        ("mine", source(METHOD, "Bad"), "a lower-case identifier other than none, got 'Bad'"),
    ],
)
def test_a_module_that_cannot_be_imported_fails(
    name: str, text: str, error: str, command: Command, place: Site
) -> None:
    place.write("mine", text)
    ran = command("--with", name, "list")

    assert (ran.code, ran.out) == (2, "")
    assert error in ran.error


def test_a_module_without_a_verb_is_a_usage_error(command: Command, place: Site) -> None:
    place.write("mine", "")
    ran = command("--with", "mine")

    assert ran.code == 2 and "Missing command" in ran.err and ran.out == ""
    assert place.imported() == set()
