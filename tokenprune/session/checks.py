"""What a session refuses before any work."""

from __future__ import annotations

from typing import Final

from tokenprune.core.recipe import Recipe
from tokenprune.errors import RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.models.loaded import LoadedModel
from tokenprune.session.script import temporal_patch

__all__ = ["check_group", "check_session", "check_watches", "frames_of"]

_FRAMES: Final = 8


def check_session(recipe: Recipe) -> None:
    """Check that a recipe can be followed group by group.

    Raises:
        RecipeError: It asks for the question.
    """
    for method in recipe.methods:
        if method.text_dependent:
            raise RecipeError(
                f"{method.name} decides by the question, but a session prunes before there is one; "
                "use a method that reads the media only, such as vflowopt"
            )


def check_watches(loaded: LoadedModel) -> None:
    """Check that a model sees.

    Raises:
        UnsupportedModelError: It understands sound only.
    """
    if not set(loaded.adapter.modalities) - {"audio"}:
        raise UnsupportedModelError(
            f"{loaded.name} understands sound only, and a session watches; use `prune`"
        )


def check_group(group: int, loaded: LoadedModel) -> None:
    """Check that groups of so many frames can be watched.

    Raises:
        TokenPruneError: The model joins frames across their borders.
    """
    patch = temporal_patch(loaded)
    if group < 1 or group % patch:
        raise TokenPruneError(
            f"group must be a multiple of {patch}, the frames that this model joins to one, "
            f"got {group}"
        )


def frames_of(recipe: Recipe) -> int:
    """Frames that a session prefills at once, if it is not told."""
    wanted = recipe.group
    return wanted.size if wanted is not None and wanted.per == "frame" else _FRAMES
