"""Positions of a prompt that is written in parts: those that `generate` gives the whole."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tokenprune.errors import UnsupportedModelError
from tokenprune.models.loaded import LoadedModel
from tokenprune.session.script import Script, Tokens

__all__ = ["check_positions", "prompt_positions"]


def prompt_positions(loaded: LoadedModel, prompt: Tokens) -> Tensor:
    """The positions that `generate` gives to a prompt: `[..., 1, S]`."""
    model: Any = loaded.model
    known = {
        "input_ids": prompt.ids,
        "attention_mask": torch.ones_like(prompt.ids),
        **prompt.types,
        **prompt.media,
    }
    positions: Tensor = model._prepare_position_ids_for_generation(prompt.ids, known)
    return positions


def check_positions(loaded: LoadedModel, script: Script) -> None:
    """Check that frames stay where they are when others follow them, and a question behind.

    Raises:
        UnsupportedModelError: They do not: an older release of transformers places the frames of
            a clip by the size of the whole, or a question as if nothing were before it.
    """
    once, twice = script.black()
    stay = len(once) - script.end_tokens
    early, late = (prompt_positions(loaded, one.then(script.ending)) for one in (once, twice))
    if not torch.equal(early[..., :stay], late[..., :stay]):
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} gives the frames of {loaded.name} positions "
            "that depend on how many follow, so they cannot be watched one by one; install a newer "
            "release, or ask about the file at once"
        )
    model: Any = loaded.model
    ids = once.ids
    given = {"attention_mask": torch.ones_like(ids), "position_ids": early[..., : ids.shape[1]]}
    if model.prepare_inputs_for_generation(ids, **given).get("position_ids") is None:
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not let {loaded.name} be told the "
            "positions of a question, so none can be asked about what was watched; install a newer "
            "release, or ask about the file at once"
        )
