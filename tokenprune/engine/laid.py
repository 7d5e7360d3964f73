"""A prompt whose media tokens are laid out, whole or in the parts that are prefilled in turn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenprune.adapters.base import Adapter
from tokenprune.core.group import Group
from tokenprune.core.layout import TokenLayout
from tokenprune.core.signal import EncoderSignal
from tokenprune.engine.layouts import lay_out
from tokenprune.engine.maps import EncoderMaps
from tokenprune.engine.pictures import deal_frames
from tokenprune.engine.prompt import Prompt
from tokenprune.engine.schedule import Schedule
from tokenprune.errors import RecipeError, UnsupportedModelError

__all__ = ["LaidPrompt", "holds_media", "parts_of"]


@dataclass(frozen=True)
class LaidPrompt:
    """A prompt, or a part of one.

    Attributes:
        layouts: The media tokens of each sample, on the CPU.
        encoders: For each sample a function that gives an encoder signal of these tokens.
        frames: For each sample the pictures that the caller gave.
        length: Its tokens, text included.
        device: Where stages work.
        group: Which part it is, from 0; None for the whole.
    """

    layouts: list[TokenLayout]
    encoders: list[Callable[[EncoderSignal], Tensor]]
    frames: list[list[Tensor]]
    length: int
    device: torch.device
    group: int | None = None

    @classmethod
    def of(cls, schedule: Schedule, prompt: Prompt, past: int) -> LaidPrompt:
        """Lay out a prompt.

        Args:
            schedule: Whose signals are read.
            prompt: The prompt.
            past: Logical length before it.

        Raises:
            UnsupportedModelError: Placeholders and encoded items do not fit together.
            MediaError: What the caller gave does not fit them.
        """
        ids, calls, given = prompt.input_ids, prompt.calls, prompt.given
        adapter = schedule.adapter
        laid_out = lay_out(adapter, ids, calls, prompt.arguments, past, given.frame_seconds)
        maps = EncoderMaps(adapter, calls, schedule.encoder)
        layouts = [layout for layout, _ in laid_out]
        return cls(
            layouts=layouts,
            encoders=[maps.of(layout, items, ids.device) for layout, items in laid_out],
            frames=deal_frames(layouts, given.frames if schedule.given else None),
            length=ids.shape[1],
            device=ids.device,
        )

    def part(self, start: int, stop: int, group: int) -> LaidPrompt:
        """The part of it that stands at `start` to `stop` of the unpruned sequence."""
        layouts, encoders = [], []
        for layout, encoder in zip(self.layouts, self.encoders, strict=True):
            inside = (layout.position >= start) & (layout.position < stop)
            layouts.append(layout[inside])
            encoders.append(_of_part(encoder, inside, layout.spans()[inside]))
        return LaidPrompt(layouts, encoders, self.frames, stop - start, self.device, group)


def _of_part(
    encoder: Callable[[EncoderSignal], Tensor], inside: Tensor, spans: Tensor
) -> Callable[[EncoderSignal], Tensor]:
    def of_part(signal: EncoderSignal) -> Tensor:
        found = encoder(signal)
        rows = inside if signal.per == "token" else torch.unique(spans)
        return found[rows.to(found.device)]

    return of_part


def parts_of(
    laid: LaidPrompt, group: Group | None, adapter: Adapter, past: int
) -> list[tuple[int, int]]:
    """Where the parts of a prompt begin and end in the unpruned sequence, in order.

    What stands between two groups goes with the later one, and what follows the last with it.

    Raises:
        RecipeError: The samples of a batch would be cut at different places, or images in two.
    """
    whole = [(past, past + laid.length)]
    if group is None:
        return whole
    cuts = [_cuts(layout, group, adapter) for layout in laid.layouts]
    if any(one != cuts[0] for one in cuts):
        raise RecipeError(
            f"the prompts of this batch end their groups of {group} at different places; prefill "
            "them one by one, or without groups"
        )
    edges = [past, *cuts[0], past + laid.length]
    return list(zip(edges, edges[1:], strict=False))


def _cuts(layout: TokenLayout, group: Group, adapter: Adapter) -> list[int]:
    if not len(layout):
        return []
    numbers, spans = group.numbers(layout, adapter.pictures_per_frame), layout.spans()
    last = numbers.diff().nonzero()[:, 0]
    if adapter.sees_ahead and bool((spans[last] == spans[last + 1]).any()):
        raise RecipeError(
            f"groups of {group} would cut images in two, whose tokens attend to each other in both "
            f"directions in {adapter.config.model_type}; count frames"
        )
    cuts: list[int] = (layout.position[last] + 1).tolist()
    return cuts


def holds_media(adapter: Adapter, ids: Tensor | None, length: int) -> bool:
    """Whether a prompt holds media tokens.

    Args:
        adapter: Of the model.
        ids: `[B, S]`; None if the model is given embeddings alone.
        length: Tokens that the language model is called with.

    Raises:
        UnsupportedModelError: It cannot be told, or there are more tokens than ids.
    """
    if ids is None:
        raise UnsupportedModelError(
            "pruning needs input_ids to find media tokens, got inputs_embeds only; "
            "pass input_ids and pixels or sound"
        )
    present = torch.zeros((), dtype=torch.bool, device=ids.device)
    for token in adapter.token_ids().values():
        present = present | (ids == token).any()
    if not bool(present):
        return False
    if ids.shape[1] != length:
        raise UnsupportedModelError(
            f"the prompt has {ids.shape[1]} tokens, but the language model was given {length}: "
            "the model expands placeholders itself; use the processor that expands them"
        )
    return True
