"""SnapKV: what the end of the prompt attends to is what the answer will need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.context import Context
from tokenprune.core.registry import method
from tokenprune.core.signal import Attention
from tokenprune.errors import RecipeError
from tokenprune.methods._caches import ScoredCache

__all__ = ["SnapKV"]


@method("snapkv")
@dataclass(frozen=True, kw_only=True)
class SnapKV(ScoredCache):
    """Keep the cache entries that the last tokens of the prompt attend to, smoothed.

    Method: SnapKV (https://arxiv.org/abs/2404.14469). An entry's score is the attention that it
    gets from the last `window` tokens of the prompt, averaged over them and over the query heads
    of its key-value head, then over the `kernel` entries around it. Each key-value head keeps its
    own.

    Where we deviate: only media tokens are candidates, and `keep` counts these alone. Text stays,
    and so does the part of the window that is text; media inside the window are candidates like
    others, since after a short question they would take the whole budget. `window="text"` asks
    with the text after the media alone, which sees all of them. A prompt shorter than the window
    shrinks it. Our choices: neighbours are those among the candidates of one modality, in the
    order of the sequence, as if the text between them and entries that are gone were not there;
    at the ends the mean is over the neighbours that there are. `keep` is our choice, too; windows
    of 64 and kernels of 5 are what a reference implementation takes.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
        layers: Decoder layers, from 0, whose caches are pruned; None for all.
        window: How many tokens at the end of the prompt ask; "text" for all after the media.
        kernel: How many neighbours, an odd number; 1 for the entry alone.
    """

    window: int | Literal["text"] = 64
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = type(self.window) is int and self.window >= 1
        if not whole and self.window != "text":
            raise RecipeError(
                f'window must be a number of tokens of at least 1, or "text", got {self.window!r}'
            )
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise RecipeError(f"kernel must be an odd number of neighbours, got {self.kernel!r}")

    @property
    def needs(self) -> tuple[Attention]:
        return (Attention(queries=self.window, reduce="mean", heads="mean"),)

    def score(self, context: Context) -> Tensor:
        kinds = context.layout.modality.to(context.rows.device)[context.rows]  # [H, N]
        return _smooth(context[self.needs[0]], kinds, self.kernel)


def _smooth(scores: Tensor, kinds: Tensor, kernel: int) -> Tensor:
    """The mean of each score and its neighbours of the same kind, `[H, N]`.

    Args:
        scores: `[H, N]`.
        kinds: `[H, N]` int64, above 0.
        kernel: How many are averaged, fewer at the ends.
    """
    order = kinds.argsort(dim=-1, stable=True)
    side = (kernel // 2, kernel // 2)
    near, near_kinds = (
        functional.pad(one.gather(-1, order), side).unfold(-1, kernel, 1)  # [H, N, kernel]
        for one in (scores, kinds)
    )
    alike = near_kinds == kinds.gather(-1, order)[..., None]
    mean = near.where(alike, 0.0).sum(dim=-1) / alike.sum(dim=-1)
    return torch.empty_like(mean).scatter(-1, order, mean)
