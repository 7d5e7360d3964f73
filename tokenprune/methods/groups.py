"""Groups: a prompt is prefilled part by part, with nothing pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tokenprune.core.context import ModelShape
from tokenprune.core.group import Group
from tokenprune.core.registry import method
from tokenprune.core.stage import Method, Stage

__all__ = ["Groups"]


@method("groups")
@dataclass(frozen=True, kw_only=True)
class Groups(Method):
    """Prefill a prompt in groups, so that activations take the memory of one group.

    Nothing is pruned by it: answers are those of the prompt prefilled at once, up to rounding. With
    stages beside it, those that look at media act on each group as if it were the prompt, and those
    that depend on the text act with the last group, which holds the question: at caches on all
    media entries, elsewhere on the tokens of that group. Media are encoded at once all the same.

    Args:
        size: How much is prefilled at once.
        per: "frame" (a picture as the processor is given it), "second", or media "token".
    """

    size: int = 16
    per: Literal["frame", "second", "token"] = "frame"

    def __post_init__(self) -> None:
        Group(self.size, self.per)

    @property
    def group(self) -> Group:
        return Group(self.size, self.per)

    def stages(self, shape: ModelShape) -> tuple[Stage, ...]:
        return ()
