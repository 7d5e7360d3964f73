"""The page on writing methods runs, block by block, and tells the truth about the library."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenprune import prune
from tokenprune.core import signal
from tokenprune.core.registry import METHODS, find_method, list_methods
from tokenprune.core.signal import Signal
from tokenprune.testing.tiny import build

PAGE = (Path(__file__).parent.parent / "docs" / "writing-methods.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def own_names() -> Iterator[None]:
    """The methods of the page are there for these tests only."""
    list_methods()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(METHODS, "claims", dict(METHODS.claims))
        yield


@pytest.fixture(scope="module")
def namespace(own_names: None) -> dict[str, Any]:
    """What the blocks leave, run in order; `model` and `inputs` are those of a tiny model."""
    tiny = build("llava")
    tiny.model.generation_config.suppress_tokens = tiny.suppress
    names: dict[str, Any] = {"model": tiny.model, "inputs": tiny.inputs()}
    with redirect_stdout(StringIO()) as printed:
        for number, block in enumerate(BLOCKS):
            exec(compile(block, f"writing-methods.md, block {number}", "exec"), names)
    return {**names, "printed": printed.getvalue().splitlines()}


def test_all_blocks_run(namespace: dict[str, Any]) -> None:
    recipe, *printed = namespace["printed"]
    [said] = re.findall(r"print\(error\)  # (.*)", PAGE)
    assert said in printed
    assert "short_keys(keep=0.25 on=image per=item)" in recipe
    assert printed.count("llava   9 checks  passed") == 3


@pytest.mark.parametrize(
    ("mine", "published"),
    [
        ("short_keys(keep=3)", "knorm(keep=3)"),
        ("short_keys(keep=0.3 per=item)", "knorm(keep=0.3 per=item)"),
        ("last_look(keep=3)", "fastv(keep=3)"),
        ("last_look(keep=0.3 layer=1)", "fastv(keep=0.3 layer=1)"),
    ],
)
@torch.no_grad()
def test_its_methods_choose_as_the_published_ones(
    namespace: dict[str, Any], mine: str, published: str
) -> None:
    kept = []
    for recipe in (mine, published):
        with prune(namespace["model"], recipe) as report:
            namespace["model"](**namespace["inputs"])
        kept.append([one.kept.tolist() for one in report.calls[0].decisions])
    assert kept[0] == kept[1]


def test_the_absorbed_weigh_as_much_as_who_absorbs(namespace: dict[str, Any]) -> None:
    """Each kept token becomes a mean: its weights sum to 1."""
    merges = []

    class Watched(namespace["Absorb"]):  # type: ignore[misc]
        name = "watched"

        def select(self, context: Any) -> Any:
            selection = super().select(context)
            merges.append(selection)
            return selection

    with torch.no_grad(), prune(namespace["model"], Watched(keep=3)):
        namespace["model"](**namespace["inputs"])
    [selection] = merges
    sums = torch.zeros(len(selection.merge.source)).index_add(
        0, selection.merge.target, selection.merge.weight
    )
    assert set(selection.merge.target.tolist()) == set(selection.index.tolist())
    torch.testing.assert_close(sums[selection.index], torch.ones(3))


def test_settings_are_checked(namespace: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="layer must be 1 or 2, got 3; use last_look for others"):
        namespace["FirstLook"](layer=3)


def test_every_signal_is_listed() -> None:
    rows = re.findall(r"^\| (.*?) \| .*? \| .*? \|$", PAGE, re.MULTILINE)
    listed = set(re.findall(r"\b[A-Z]\w+", " ".join(rows)))
    known = {
        name
        for name in signal.__all__
        if isinstance(getattr(signal, name), type) and issubclass(getattr(signal, name), Signal)
    }
    assert known - {"Signal"} <= listed


def test_the_methods_it_names_are_there() -> None:
    for name in ("knorm", "fastv", "visionzip", "pyramiddrop", "vflowopt", "plphp"):
        assert f"`{name}`" in PAGE
        assert find_method(name).name == name
