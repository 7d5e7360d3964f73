"""What the engine holds a stage to, before anything is cut."""

from __future__ import annotations

from torch import Tensor

from tokenprune.core.budget import Budget
from tokenprune.core.context import Candidates
from tokenprune.core.selection import Selection
from tokenprune.core.site import Cache
from tokenprune.core.stage import Stage
from tokenprune.engine.merges import check_merge
from tokenprune.errors import RecipeError

__all__ = ["check_selection", "of_kinds"]


def check_selection(
    stage: Stage, selection: Selection, candidates: Candidates, budget: Budget
) -> None:
    """Hold a stage to what it promised.

    Raises:
        RecipeError: It keeps more or fewer, or in a form that its site does not take.
    """
    shape, total = selection.index.shape, len(candidates)
    at_cache = isinstance(stage.site, Cache)
    heads = len(candidates.rows) if at_cache else None
    if (selection.index.ndim == 2 and shape[0] != heads) or shape[-1] > total:
        form = f"[K] or [{heads}, K]" if at_cache else "[K]"
        raise RecipeError(
            f"{stage.name} at {stage.site} must keep 0 to {total} tokens, {form}; "
            f"got {tuple(shape)}"
        )
    if not budget.least <= shape[-1] <= budget.most:
        promised = budget.total if budget.exact else f"{budget.least} to {budget.most}"
        raise RecipeError(
            f"{stage.name} promised to keep {promised} of {total} tokens and kept {shape[-1]}"
        )
    check_merge(stage, selection, heads, total)


def of_kinds(stage: Stage, on: Tensor, rows: Tensor) -> Tensor:
    """Of the rows `[H, N]` that heads hold, those that a stage may look at, `[H, M]`.

    Args:
        stage: The stage.
        on: `[P]` bool, which tokens are of a kind that it acts on.
        rows: What each head holds.

    Raises:
        RecipeError: Heads hold different numbers of them.
    """
    mine = on[rows]  # [H, N]
    counts = mine.sum(dim=1)
    if bool((counts != counts[0]).any()):
        raise RecipeError(
            f"{stage.name} at {stage.site} acts on {' and '.join(sorted(stage.acts_on))} alone, of "
            f"which key-value heads hold {int(counts.min())} to {int(counts.max())} tokens after "
            "the stages before it, and all heads of a cache must go on with equally many; put the "
            "stage that acts on some modalities first"
        )
    if rows.stride(0) == 0:  # all heads hold the same
        return rows[0][mine[0]].expand(len(rows), -1)
    return rows if bool(mine.all()) else rows[mine].view(len(rows), -1)
