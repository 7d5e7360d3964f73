"""What came out of checks: a small table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from tokenprune.errors import first_line

__all__ = ["PASSED", "Outcomes", "Row", "failing", "hold", "some"]

PASSED = "passed"


@dataclass(frozen=True)
class Row:
    """The outcome of one check.

    Attributes:
        family: The tiny model, or the model's type.
        check: What was checked; "all" if nothing could be.
        outcome: "passed", "left out: ..." or, if nothing could be checked, "refused: ...". What
            fails raises instead.
    """

    family: str
    check: str
    outcome: str = PASSED


@dataclass
class Outcomes:
    """The outcomes of checks, in the order in which they ran.

    Attributes:
        what: What was checked.
        rows: One for each family and check.
    """

    what: str
    rows: list[Row] = field(default_factory=list)

    @property
    def passed(self) -> tuple[str, ...]:
        """The families that passed at least one check."""
        return tuple(dict.fromkeys(one.family for one in self.rows if one.outcome == PASSED))

    @property
    def refused(self) -> dict[str, str]:
        """The families that were not checked at all, with the reason."""
        return {
            one.family: one.outcome.partition(": ")[2] for one in self.rows if one.check == "all"
        }

    def run(self, family: str, check: str, function: Callable[[], str | None]) -> None:
        """Run a check and note its outcome.

        Args:
            family: On what.
            check: The name of the check.
            function: The check; it returns why it was left out, or None.

        Raises:
            AssertionError: It failed.
        """
        with failing(self.what, family, check):
            left_out = function()
        outcome = PASSED if left_out is None else f"left out: {left_out}"
        self.rows.append(Row(family, check, outcome))

    def __str__(self) -> str:
        lines = [self.what, ""]
        cells = [("family", "check", "outcome"), *self._cells()]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        for family, check, outcome in cells:
            lines.append(f"{family:<{widths[0]}}  {check:<{widths[1]}}  {outcome}")
        return "\n".join(lines)

    def _cells(self) -> Iterator[tuple[str, str, str]]:
        """Lines to print: those that passed are counted."""
        for family in dict.fromkeys(one.family for one in self.rows):
            mine = [one for one in self.rows if one.family == family]
            good = [one for one in mine if one.outcome == PASSED]
            if len(good) == 1:
                yield family, good[0].check, PASSED
            elif good:
                yield family, f"{len(good)} checks", PASSED
            yield from ((family, one.check, one.outcome) for one in mine if one not in good)


@contextmanager
def failing(what: str, family: str, check: str) -> Iterator[None]:
    """Whatever goes wrong inside is an AssertionError that says what was checked.

    Args:
        what: The method or adapter.
        family: On which model.
        check: The name of the check.
    """
    try:
        yield
    except Exception as error:  # of another's code, which may raise whatever it likes
        told = str(error) if isinstance(error, AssertionError) else _named(error)
        raise AssertionError(f"{what} on {family}, {check}: {told}") from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def hold(condition: bool, otherwise: str) -> None:
    """Fail with a message, unless a condition holds."""
    if not condition:
        raise AssertionError(otherwise)


def some(values: Sequence[object], most: int = 6) -> str:
    """The first few of some values, in words."""
    rest = ", ..." if len(values) > most else ""
    return ", ".join(map(str, values[:most])) + rest if values else "none"
