"""Checks that several verbs make: what can be known before a model is loaded is said before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tokenprune.errors import MediaError, TokenPruneError

if TYPE_CHECKING:
    from tokenprune.core.recipe import Recipe

__all__ = ["check_frames", "check_group", "check_outputs", "parse_recipe"]


def check_frames(frames: int | None, fps: float | None) -> None:
    """Check `--frames` and `--fps`.

    Raises:
        MediaError: Both are given, or a number that no video could give.
    """
    from tokenprune.media.sampling import check_amount

    if frames is not None and fps is not None:
        raise MediaError(f"give --frames or --fps, got both ({frames} and {fps})")
    check_amount(frames, fps)


def check_group(group: int | None, overlay: Path | None = None) -> None:
    """Check `--group`.

    Raises:
        TokenPruneError: It is below 1, or an overlay is wanted as well.
    """
    if group is None:
        return
    if group < 1:
        raise TokenPruneError(f"--group must be at least 1, got {group}")
    if overlay is not None:
        raise TokenPruneError(
            "an overlay needs all frames, but groups are let go once they are watched: leave out "
            "--overlay or --group"
        )


def check_outputs(overlay: Path | None = None, timeline: Path | None = None) -> None:
    """Check that pictures can be drawn and written.

    Raises:
        MediaError: A path that no picture can be written to.
        MissingExtraError: A timeline is wanted, but matplotlib is not installed.
    """
    wanted = [path for path in (overlay, timeline) if path is not None]
    if not wanted:
        return
    from tokenprune.report.pictures import check_chart, check_picture

    for path in wanted:
        check_picture(path)
    if timeline is not None:
        check_chart()


def parse_recipe(text: str | None, *, in_groups: bool) -> Recipe | None:
    """Read `--recipe`; None if it is left to the model.

    Args:
        text: As it was given.
        in_groups: Whether groups of frames are prefilled one after the other.

    Raises:
        RecipeError: It is malformed, or cannot be followed group by group.
    """
    from tokenprune.core.recipe import Recipe
    from tokenprune.session.checks import check_session

    recipe = None if text is None else Recipe.parse(text)
    if in_groups and recipe is not None:
        check_session(recipe)
    return recipe
