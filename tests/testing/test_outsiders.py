"""Methods and adapters of another package, good and bad, under the public checks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.contract.cases import THREE
from tests.distributions import Site, site
from tokenprune.testing import FAMILIES, build, check_adapter, check_method

METHOD = """
from dataclasses import dataclass, replace

import torch

from tokenprune.core.budget import Budget
from tokenprune.core.registry import method
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.selectors import top_per_group
from tokenprune.core.signal import EncoderSignal, Frames, Question
from tokenprune.core.site import Cache, Input, Layer
from tokenprune.core.stage import Budgeted, Scored, Selective, Stage
from tokenprune.engine.patch import _PATCHED

CALLS = []
BEFORE = {{}}

@method("mine")
@dataclass(frozen=True, kw_only=True)
class Mine({bases}):
    \"\"\"Keep what is largest.\"\"\"

    site = Input()

    def largest(self, context):
        return context.features.float().square().sum(dim=-1)

{body}
"""

SCORE = """
    def score(self, context):
        return self.largest(context)
"""


def of(body: str, bases: str = "Budgeted") -> str:
    return METHOD.format(bases=bases if "def select" in body else f"Scored, {bases}", body=body)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """Where a package is installed, with a module `mine` that is to be written."""
    for found in site(tmp_path, monkeypatch):
        found.install("mine", {"methods": {"mine": "mine"}})
        yield found


# -- methods


def test_a_good_method_passes(place: Site) -> None:
    place.write("mine", of(SCORE))
    found = check_method("mine(keep=0.5 per=frame)", ["llava", "qwen2_audio"])
    assert found.passed == ("llava", "qwen2_audio") and not found.refused
    assert {one.outcome for one in found.rows} == {"passed"}
    assert {one.check for one in found.rows} == {
        "batch as alone",
        "everything kept",
        "everything kept, eager",
        "model as before",
        "model as before, eager",
        "oracle",
        "oracle, batch",
        "oracle, batch, eager",
        "oracle, eager",
        "plan",
        "promised budget",
        "same decisions twice",
        "second turn",
    }
    assert str(found).splitlines() == [
        "mine(keep=0.5 per=frame)",
        "",
        "family       check      outcome",
        "llava        13 checks  passed",
        "qwen2_audio  13 checks  passed",
    ]


@pytest.mark.full
def test_a_good_method_passes_on_all_families(place: Site) -> None:
    place.write("mine", of(SCORE))
    assert check_method("mine(keep=0.5)").passed == tuple(FAMILIES)


def test_families_that_refuse_are_told_with_the_reason(place: Site) -> None:
    place.write("mine", of('    modalities = frozenset({"image"})\n' + SCORE))
    found = check_method("mine(keep=0.5)", ["qwen2_audio", "llava"], attention=["sdpa"])
    assert found.passed == ("llava",)
    assert "has only audio tokens" in found.refused["qwen2_audio"]
    assert "qwen2_audio  all       refused: mine prunes" in str(found)
    with pytest.raises(AssertionError, match="no family can run this method:\n.*\n.*\n.*\nqwen2_"):
        check_method("mine(keep=0.5)", ["qwen2_audio"])


def test_a_method_may_ask_for_question_and_frames(place: Site) -> None:
    body = """
    needs = (Question(), Frames())

    def score(self, context):
        assert context[self.needs[0]] and context[self.needs[1]][0].shape[1] == 3
        return self.largest(context)
"""
    place.write("mine", of(body))
    check_method("mine(keep=0.5)", ["llava", "llava_onevision"], attention=["sdpa"])


ADAPTIVE = """
    above: float = 1.0

    def select(self, context):
        scores = self.largest(context)
        return Selection((scores >= self.above * scores.mean()).nonzero()[:, 0])
"""


def test_a_method_without_keep_says_how_everything_is_kept(place: Site) -> None:
    place.write("mine", of(ADAPTIVE, "Selective"))
    left = {
        one.check: one.outcome for one in check_method("mine", ["llava"], attention=["sdpa"]).rows
    }
    assert "give keep_all" in left["everything kept"]
    assert "decides how many stay" in left["plan"]
    found = check_method("mine", ["llava"], keep_all="mine(above=0.0)", attention=["sdpa"]).rows
    assert {one.check: one.outcome for one in found}["everything kept"] == "passed"
    with pytest.raises(AssertionError, match=r"everything kept: mine\(above=0.9\) drops: Decision"):
        check_method("mine", ["llava"], keep_all="mine(above=0.9)")


def test_a_merge_where_nothing_is_dropped_fails(place: Site) -> None:
    body = """
    def select(self, context):
        both = torch.arange(2)
        merge = Merge(both, both * 0, torch.tensor([0.5, 0.5]))
        return Selection(torch.arange(len(context)), merge)
"""
    place.write("mine", of(body, "Selective"))
    with pytest.raises(AssertionError, match="mine is not bit-identical .*: logits differ by"):
        check_method("mine", ["llava"], keep_all="mine")


BAD = {
    "a budget that is not kept": (
        """
    def select(self, context):
        return Selection(top_per_group(self.largest(context), self.budget(context))[1:])
""",
        r"mine\(keep=0.5\) on llava, first answer: RecipeError: mine promised to keep 16 of 32 "
        "tokens and kept 15",
    ),
    "a budget that says something else later": (
        """
    def budget(self, candidates):
        CALLS.append(1)
        return replace_count(super().budget(candidates), len(CALLS))

    def select(self, context):
        return Selection(top_per_group(self.largest(context), self.budget(context)))

def replace_count(budget, number):
    return Budget.of(budget.groups, budget.counts - number // 2)
""",
        r"on llava, (first answer|same decisions twice|promised budget): ",
    ),
    "a draw from the global generator": (
        """
    def score(self, context):
        return torch.rand(len(context))
""",
        r"on llava, same decisions twice: the second time \d+ of 16 kept tokens differ",
    ),
    "a counter": (
        """
    def score(self, context):
        CALLS.append(1)
        return self.largest(context).roll(len(CALLS))
""",
        r"on llava, same decisions twice: the second time \d+ of 16 kept tokens differ",
    ),
    "what the prompt before was like": (
        """
    def score(self, context):
        own = self.largest(context)
        last = BEFORE.get("tokens", len(own))
        BEFORE["tokens"] = len(own)
        return own.roll(last)
""",
        r"on llava, same decisions twice: the second time \d+ of 16 kept tokens differ",
    ),
    "weights that change": (
        SCORE.replace(
            "        return",
            "        for model in _PATCHED:\n"
            "            model.get_output_embeddings().weight.mul_(1.5)\n"
            "        return",
        ),
        "on llava, model as before: the model has changed: parameters lm_head.weight",
    ),
    "a hook that stays": (
        SCORE.replace(
            "        return",
            "        for model in _PATCHED:\n"
            "            model.get_decoder().register_forward_hook(lambda *_: None)\n"
            "        return",
        ),
        "on llava, model as before: the model has changed: modules model.language_model",
    ),
    "an error of its own": (
        """
    def score(self, context):
        return self.largest(context)[self.absent]
""",
        "on llava, first answer: AttributeError: 'Mine' object has no attribute 'absent'",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_method_fails(fault: str, place: Site) -> None:
    body, message = BAD[fault]
    place.write("mine", of(body))
    with pytest.raises(AssertionError, match=message):
        check_method("mine(keep=0.5)", ["llava"], attention=["sdpa"])


def test_settings_that_do_not_fit_fail(place: Site) -> None:
    place.write("mine", of(SCORE.replace("    def", "    site = Layer(9)\n\n    def")))
    with pytest.raises(AssertionError, match="first answer: RecipeError: mine acts at layer 9"):
        check_method("mine(keep=0.5)", ["llava"])
    for recipe, told in {
        "mine(keep=2.0)": "keep must be a share",
        "none": "no method in it",
    }.items():
        with pytest.raises(AssertionError, match=f"on any family, recipe: .*{told}"):
            check_method(recipe, ["llava"])


# -- adapters

ADAPTER = """
from dataclasses import replace

import torch

from tokenprune.adapters.base import Item
from tokenprune.adapters.llava_next import LlavaNext

class Mine(LlavaNext):
    model_types = ("mine_vl",)

{body}
"""

WRONG = {
    "rows and columns swapped": (
        """
    def items(self, *args):
        return [replace(one, row=one.column, column=one.row) for one in super().items(*args)]
""",
        r"layout: tokens of canvas 0 do not go row by row: \(0, 0\), \(1, 0\)",
    ),
    "one canvas for all": (
        """
    def items(self, *args):
        return [replace(one, canvas=one.canvas * 0) for one in super().items(*args)]
""",
        "layout: two tokens of canvas 0 are in one place",
    ),
    "newlines that count": (
        """
    def items(self, *args):
        return [Item.grid(1, 1, len(one.real), video=False) for one in super().items(*args)]
""",
        "separators: tokens at 28, .* have rows in the layout and show no patch",
    ),
    "too few placeholders": (
        """
    def items(self, *args):
        return [Item.grid(1, 2, 2, video=False)]
""",
        "layout: UnsupportedModelError: the prompt holds 70 image placeholders, but 4 image tokens",
    ),
    "maps upside down": (
        """
    def align(self, call, maps):
        return super().align(call, [one.flip(0) for one in maps])
""",
        "align: patch 0 reaches the tokens at 4, but align gives it to those at ",
    ),
    "maps that lose weight": (
        """
    def align(self, call, maps):
        return [one / 2 for one in super().align(call, maps)]
""",
        "align: a map of ones is not one at every token",
    ),
}


def adapter(place: Site, body: str = "") -> Any:
    place.write("mine_models", ADAPTER.format(body=body))
    place.install("mine_models", {"models": {"mine_vl": "mine_models"}})
    model = build("llava_next").model
    model.config.model_type = "mine_vl"
    return model


def test_a_good_adapter_passes(place: Site) -> None:
    found = check_adapter(adapter(place), build("llava_next").batch())
    assert found.what == "Mine" and found.passed == ("mine_vl",)
    assert str(found).splitlines()[2:] == [
        "family   check     outcome",
        "mine_vl  8 checks  passed",
    ]


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_adapter_fails(fault: str, place: Site) -> None:
    body, message = WRONG[fault]
    with pytest.raises(AssertionError, match=message):
        check_adapter(adapter(place, body), build("llava_next").inputs())


def test_an_adapter_may_stand_in_for_another(place: Site) -> None:
    adapter(place, WRONG["one canvas for all"][0])
    from mine_models import Mine  # type: ignore[import-not-found]

    tiny = build("llava_next")
    with pytest.raises(AssertionError, match="^Mine on llava_next, layout: two tokens of canvas 0"):
        check_adapter(tiny.model, tiny.inputs(), Mine)
    assert check_adapter(tiny.model, tiny.inputs()).what == "LlavaNext"


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one in THREE else (pytest.mark.full,)) for one in FAMILIES],
)
@pytest.mark.parametrize("kind", ["inputs", "batch"])
def test_adapters_of_the_library_pass(name: str, kind: str) -> None:
    tiny = build(name)
    assert check_adapter(tiny.model, getattr(tiny, kind)()).passed


def test_a_model_without_an_adapter_fails() -> None:
    tiny = build("llava")
    tiny.model.config.model_type = "unknown_vl"
    with pytest.raises(AssertionError, match="on unknown_vl, adapter: .*no adapter for model_type"):
        check_adapter(tiny.model, tiny.inputs())
