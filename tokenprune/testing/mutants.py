"""Mutants: faults that are put into code for a moment, which a check must see."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenprune.errors import MissingExtraError

if TYPE_CHECKING:
    import pytest

__all__ = ["Check", "Fault", "Mutants", "assert_caught"]

Check = Callable[[], object]
"""Passes, or raises AssertionError."""
Fault = Callable[["pytest.MonkeyPatch"], Callable[[], None] | None]
"""Puts the fault in place; returns what cleans up after it, if undoing the patch is not enough."""


def assert_caught(fault: Fault, check: Check, forget: Callable[[], None] | None = None) -> None:
    """Hold a check to its purpose: without the fault it passes, with it it fails.

    Args:
        fault: Puts the fault in place, by the patch it is given, which is undone afterwards.
        check: The check.
        forget: Is called before and after the fault, so that runs which the check remembers are
            made anew.

    Raises:
        AssertionError: The check passes with the fault, or fails without it.
        MissingExtraError: pytest is not installed.
    """
    try:
        from pytest import MonkeyPatch
    except ImportError as error:
        raise MissingExtraError(
            'mutants need pytest: pip install "tokenprune-mm[testing]"'
        ) from error
    check()
    if forget is not None:
        forget()
    with MonkeyPatch.context() as patch:
        clean = fault(patch)
        try:
            check()
        except AssertionError:
            return
        finally:
            if forget is not None:
                forget()
            if clean is not None:
                clean()
    raise AssertionError(f"the fault {getattr(fault, '__name__', fault)} was not seen")


class Mutants(Collection[str]):
    """Faults by name, each with the check that must see it.

    ```python
    mutants = Mutants()

    @mutants.caught_by(check_method, "mine(keep=0.5)", ["llava"])
    def scores_reversed(patch):
        patch.setattr(Mine, "score", lambda self, context: -score(self, context))

    def test_mutants():
        for name in mutants:
            mutants.check(name)
    ```

    Args:
        forget: As `assert_caught` takes it.
    """

    def __init__(self, forget: Callable[[], None] | None = None) -> None:
        self._faults: dict[str, tuple[Fault, Check]] = {}
        self._forget = forget

    def __iter__(self) -> Iterator[str]:
        return iter(self._faults)

    def __len__(self) -> int:
        return len(self._faults)

    def __contains__(self, name: object) -> bool:
        return name in self._faults

    def caught_by(self, check: Callable[..., object], *args: Any) -> Callable[[Fault], Fault]:
        """Register a fault, as a decorator, with the check that must see it.

        Args:
            check: Called with `args`.
        """

        def register(fault: Fault) -> Fault:
            name = getattr(fault, "__name__", repr(fault))
            self._faults[name] = fault, partial(check, *args)
            return fault

        return register

    def check(self, name: str) -> None:
        """Hold the check of a fault to seeing it.

        Raises:
            AssertionError: It does not.
        """
        fault, check = self._faults[name]
        assert_caught(fault, check, self._forget)
