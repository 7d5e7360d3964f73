"""FastV: after a few layers, media tokens that the last token does not look at leave."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tokenprune.core.context import Context
from tokenprune.core.registry import method
from tokenprune.core.signal import Attention
from tokenprune.core.site import Layer, Site
from tokenprune.core.stage import Budgeted, Scored
from tokenprune.errors import RecipeError

__all__ = ["FastV"]


@method("fastv")
@dataclass(frozen=True, kw_only=True)
class FastV(Scored, Budgeted):
    """Keep the tokens that the prompt's last token attends to most, from a layer on.

    Method: FastV (https://arxiv.org/abs/2403.06764). After `layer` decoder layers, a token's score
    is the attention that the prompt's last token pays to it in the last of these layers, averaged
    over heads. Only one row of attention is computed, whatever kernel the model runs with. Kept
    tokens stay at their original positions, and are chosen once, in prefill.

    Where we deviate: tokens are removed, not masked and chosen anew at each step, as in the
    authors' first release. Our reading: the paper counts layers from 1, so that `layer=2` scores
    by the second layer, number 1 here, and tokens leave before number 2. Our choices: budgets by
    group, and `rotary=False`, which scores without rotary positions, against the bias towards the
    end of an image or clip; then only tokens of the prompt at hand share the softmax.

    Args:
        keep: Share or number of tokens kept of each group of `per`, or one for each modality.
        per: "prompt", "item", "frame" (an image or sound is one too) or "second".
        on: Modalities that are pruned; None for all.
        layer: Decoder layers that see all tokens, at least 1 (the paper: 2 or 3).
        rotary: Whether queries and keys of the score are rotated, as in the paper.
    """

    layer: int = 2
    rotary: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.layer) is not int or self.layer < 1:
            raise RecipeError(
                "layer must be a number of decoder layers of at least 1, for fastv scores by the "
                f"last of them, got {self.layer!r}"
            )
        if not isinstance(self.rotary, bool):
            raise RecipeError(f"rotary must be true or false, got {self.rotary!r}")

    @property
    def site(self) -> Site:
        return Layer(self.layer)

    @property
    def needs(self) -> tuple[Attention]:
        return (Attention(layer=-1, rotary=self.rotary, reduce="mean", heads="mean"),)

    def score(self, context: Context) -> Tensor:
        return context[self.needs[0]]  # [N]
