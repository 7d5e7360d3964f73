"""The public checks themselves: light, independent of the engine, and able to fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from unittest import SkipTest

import pytest
import torch

from tests.test_layers import MODULES, imports, room
from tokenprune.core.layout import TokenLayout
from tokenprune.testing import check_method
from tokenprune.testing.layouts import check_layout
from tokenprune.testing.mutants import Mutants, assert_caught
from tokenprune.testing.outcomes import Outcomes, Row
from tokenprune.testing.snapshot import differences, snapshot
from tokenprune.testing.tiny import UNUSABLE, build


def test_pytest_is_not_needed_to_check_a_method() -> None:
    program = (
        "import sys; sys.modules['pytest'] = None\n"
        "from tokenprune.testing import check_method\n"
        "print(check_method('uniform(keep=0.5)', ['llava'], attention=['sdpa']))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "llava   9 checks  passed", ran.stderr


def test_the_oracle_knows_nothing_of_the_engine() -> None:
    pending, seen = ["testing.oracle"], set()
    while pending:
        module = pending.pop()
        if module not in seen:
            seen.add(module)
            names = imports(MODULES[module])
            pending += [one[11:] for one in names if one.startswith("tokenprune.")]
    assert {room(one) for one in seen} == {"testing"}
    assert "testing.harness" not in seen


def test_a_family_that_cannot_be_built_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNUSABLE, "llava", "too old")
    found = check_method("random(keep=0.5)", ["llava", "internvl"], attention=["sdpa"])
    assert found.refused == {"llava": "too old"}
    with pytest.raises(SkipTest, match="too old"):
        build("llava")


def test_differences_name_what_has_changed() -> None:
    model = build("llava").model
    before = snapshot(model)
    assert differences(before, snapshot(model)) == []
    model.lm_head.register_forward_hook(lambda *_: None)
    model.config.added = True
    assert differences(before, snapshot(model)) == ["modules lm_head", "configs", "configs model"]


def test_outcomes_print_what_did_not_pass() -> None:
    found = Outcomes("mine", [Row("one", "oracle"), Row("one", "plan", "left out: why")])
    found.rows.append(Row("another", "all", "refused: because"))
    assert str(found).splitlines() == [
        "mine",
        "",
        "family   check   outcome",
        "one      oracle  passed",
        "one      plan    left out: why",
        "another  all     refused: because",
    ]
    assert found.passed == ("one",) and found.refused == {"another": "because"}


# -- mutants


@dataclass
class Adder:
    """What faults are put into."""

    def add(self, one: int, other: int) -> int:
        return one + other


def check_addition(one: int) -> None:
    assert Adder().add(one, 2) == one + 2


def subtract(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Adder, "add", lambda self, one, other: one - other)


def test_a_fault_is_put_in_and_taken_out() -> None:
    told: list[str] = []
    mutants = Mutants(forget=lambda: told.append("forget"))
    mutants.caught_by(check_addition, 3)(subtract)
    assert list(mutants) == ["subtract"] and len(mutants) == 1
    mutants.check("subtract")
    assert told == ["forget"] * 2
    check_addition(3)


def test_a_fault_that_no_check_sees_fails() -> None:
    def harmless(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Adder, "add", lambda self, one, other: other + one)

    with pytest.raises(AssertionError, match="the fault harmless was not seen"):
        assert_caught(harmless, lambda: check_addition(3))


def test_a_check_that_fails_without_the_fault_fails() -> None:
    def fails() -> None:
        raise AssertionError("always")

    with pytest.raises(AssertionError, match="always"):
        assert_caught(subtract, fails)


# -- layouts

PLACES = {
    "position": [4, 5, 6, 7],
    "modality": [1, 1, 1, 1],
    "item": [0, 0, 0, 0],
    "canvas": [0, 0, 0, 0],
    "frame": [-1, -1, -1, -1],
    "row": [0, 0, 1, 1],
    "column": [0, 1, 0, 1],
    "seconds": [float("nan")] * 4,
}
VIDEO = {"modality": [2, 2, 2, 2], "canvas": [0, 0, 1, 1], "row": [0, 0, 0, 0]}

WRONG = [
    ({"position": [4, 6, 5, 7]}, "positions do not increase"),
    ({"item": [1, 1, 1, 1]}, "item numbers are 1, not 0"),
    ({"canvas": [0, 0, 2, 2]}, "canvas numbers are 0, 2, not 0, 1"),
    ({"item": [0, 0, 1, 1]}, "canvas 0 has more than one item: 0, 1"),
    ({"frame": [0, 0, 0, 0]}, "item 0, image, must have -1 as frame"),
    ({"row": [-1, -1, -1, -1], "column": [0, 1, 2, 3]}, "item 0, image, has a row below 0"),
    ({"row": [0, 1, 0, 1], "column": [0, 0, 1, 1]}, "do not go row by row"),
    ({"row": [0, 0, 0, 1], "column": [0, 1, 1, 1]}, "two tokens of canvas 0 are in one place"),
    ({**VIDEO, "frame": [0, 0, 2, 2]}, "item 0, video, has frames 0, 2"),
    ({**VIDEO, "frame": [1, 1, 0, 0]}, "item 0, video, has frames that go backwards"),
    ({"modality": [3, 3, 3, 3], "frame": [0, 1, 2, 3]}, "item 0, audio, must have -1 as row"),
    ({"seconds": [0.0, 0.5, 0.4, 1.0]}, "seconds that go backwards"),
]


def layout(changes: dict[str, list[float]]) -> TokenLayout:
    columns = {name: torch.tensor(values) for name, values in {**PLACES, **changes}.items()}
    return TokenLayout(**columns)


@pytest.mark.parametrize("changes, message", WRONG)
def test_layouts_that_cannot_be_fail(changes: dict[str, list[float]], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_layout(layout(changes))


def test_layouts_that_can_be_pass() -> None:
    check_layout(layout({}))
    check_layout(layout({**VIDEO, "frame": [0, 0, 1, 1], "seconds": [0.0, 0.0, 0.5, 0.5]}))
    tiles = {"row": [0, 0, 0, 0], "column": [0, 1, 2, 3]}
    check_layout(layout(tiles))
