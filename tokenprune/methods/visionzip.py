"""VisionZip: the tokens that the encoder looks at, and a few that stand for the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tokenprune.core.budget import Keep
from tokenprune.core.context import Context, EncoderView
from tokenprune.core.layout import Modality, Per
from tokenprune.core.registry import method
from tokenprune.core.selection import Merge, Selection
from tokenprune.core.selectors import top
from tokenprune.core.signal import EncoderSignal
from tokenprune.core.site import Input
from tokenprune.core.stage import Budgeted
from tokenprune.errors import RecipeError, UnsupportedModelError

__all__ = ["Dominance", "EncoderKeys", "VisionZip"]

Average = Literal["sum", "mean"]


@dataclass(frozen=True)
class Dominance(EncoderSignal):
    """The attention that each token of a view gets.

    Args:
        by: "class" for that of the class token; "received" for that of all tokens; None for
            that of the class token where there is one, else of all tokens.
    """

    by: Literal["class", "received"] | None = None

    @property
    def class_token(self) -> bool:
        return self.by == "class"

    def of(self, view: EncoderView) -> Tensor:
        of_class = view.has_class if self.by is None else self.class_token
        return view.class_row() if of_class else view.received()


@dataclass(frozen=True)
class EncoderKeys(EncoderSignal):
    """The keys of the tokens of a view."""

    def of(self, view: EncoderView) -> Tensor:
        return view.keys()


@method("visionzip")
@dataclass(frozen=True, kw_only=True)
class VisionZip(Budgeted):
    """Keep the tokens that the encoder attends to most, and merge the others into a few.

    Method: VisionZip (https://arxiv.org/abs/2412.04467). In each image or frame the dominant tokens
    are those that get most of the attention of the encoder's class token, or of all its tokens
    where it has none. Of the others every so-many-th is a target; each other one goes to the target
    whose key, averaged over heads, has the highest cosine with its own. A contextual token is its
    target plus the mean of what went there, their sum; a target to which nothing went stays as it
    is. The question plays no part.

    Where we deviate: the class token is no media token, so none of the dominant ones is it (one of
    the paper's 54 is); tokens are merged as they enter the language model, after the projector,
    not before it; keys and attention of tokens that a model pools are averaged; kept tokens stay at
    their original positions in their original order, contextual ones at that of their target, while
    the authors' code appends them; and it is the block whose output the model uses that is read.
    Our choices: one share `targets` for all budgets, from the paper's 10 of 64, 20 of 128 and 30 of
    192 (its Qwen settings differ between releases); `dominance="received"` for towers with a class
    token, too; and `contextual="mean"`, the true average of a target and what went there.

    Args:
        keep: Share or number of tokens kept of each group of `per`, contextual ones included, or
            one for each modality. 0.111 is the paper's 64 of 576.
        per: "prompt", "item", "frame" (an image is one too) or "second".
        on: "image" or "video" to prune these alone; None for both.
        dominance: "class" for the attention of the class token, which towers such as CLIP have;
            "received" for that of all tokens; None for "class" where there is a class token, else
            "received".
        targets: Share of the kept tokens that are contextual; 0 merges nothing.
        contextual: "sum" as in the paper, or "mean".

    Raises:
        UnsupportedModelError: The encoder's attention or keys hold nan.
    """

    keep: Keep = 0.111
    per: Per = "frame"
    dominance: Literal["class", "received"] | None = None
    targets: float = 0.15625
    contextual: Average = "sum"

    site = Input()
    modalities = frozenset[Modality]({"image", "video"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dominance not in (None, "class", "received"):
            raise RecipeError(
                'dominance must be "class" or "received", or none for what the tower has, '
                f"got {self.dominance!r}"
            )
        if type(self.targets) not in (int, float) or not 0 <= self.targets <= 1:
            raise RecipeError(f"targets must be a share in [0, 1], got {self.targets!r}")
        if self.contextual not in ("sum", "mean"):
            raise RecipeError(f'contextual must be "sum" or "mean", got {self.contextual!r}')

    @property
    def needs(self) -> tuple[Dominance, EncoderKeys]:
        return Dominance(self.dominance), EncoderKeys()

    def select(self, context: Context) -> Selection:
        scores, keys = (context[signal] for signal in self.needs)  # [N], [N, d]
        if scores.isnan().any() or keys.isnan().any():
            raise UnsupportedModelError(
                "visionzip reads nan from the encoder: this model's adapter reads none for some of "
                "the tokens, or the encoder overflowed; load the model in bfloat16 or float32"
            )
        budget, unit = self.budget(context), functional.normalize(keys, dim=-1)
        kept, merges = [], []
        for group, count in enumerate(budget.counts.tolist()):
            rows = (budget.groups == group).nonzero()[:, 0]
            number = int(self.targets * count + 0.5) if count < len(rows) else 0
            dominant = rows[top(scores[rows], count - number)]
            rest = rows[~torch.isin(rows, dominant)]
            targets = rest[:: len(rest) // number][:number] if number else rest[:0]
            kept += [dominant, targets]
            if number:
                merges.append(_merge(unit, rest, targets, self.contextual))
        return Selection(torch.cat(kept).sort().values, _join(merges), scores)


def _merge(unit: Tensor, rest: Tensor, targets: Tensor, average: Average) -> Merge:
    """Merge tokens into the targets that are most like them.

    Args:
        unit: `[N, d]`, directions of the keys.
        rest: `[M]`, all tokens that are not dominant.
        targets: `[T]`, some of these.
        average: What a target becomes.
    """
    others = rest[~torch.isin(rest, targets)]
    nearest = (unit[others] @ unit[targets].T).argmax(dim=1)  # [M - T]
    sizes = torch.bincount(nearest, minlength=len(targets))  # [T]
    own = torch.ones(len(targets), device=rest.device) if average == "sum" else 1 / (sizes + 1)
    given = 1 / sizes[nearest] if average == "sum" else own[nearest]
    return Merge(
        torch.cat([targets, others]),
        torch.cat([targets, targets[nearest]]),
        torch.cat([own, given]),
    )


def _join(merges: list[Merge]) -> Merge | None:
    if not merges:
        return None
    return Merge(
        torch.cat([one.source for one in merges]),
        torch.cat([one.target for one in merges]),
        torch.cat([one.weight for one in merges]),
    )
