"""What pruning did: counts, seconds, bytes, and which tokens were kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenprune.core.layout import TokenLayout
from tokenprune.core.selection import Merge
from tokenprune.core.site import Cache, Site
from tokenprune.errors import TokenPruneError
from tokenprune.report.change import Change, MediaTokens
from tokenprune.report.seconds import Phases, Seconds, Span
from tokenprune.report.timing import Clock, Mark

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Call", "Decision", "Report"]


@dataclass(frozen=True)
class Decision:
    """One selection by one stage for one sample, in positions of the unpruned sequence.

    Attributes:
        method: Name of the stage.
        site: Where it acted.
        layer: First decoder layer that sees the result: 0 at the input, `l` at layer `l`; at a
            cache site the one layer whose cache it is.
        sample: Row of the batch.
        candidates: `N`, tokens it could choose from (of each head, at a cache site).
        kept: `[K]` positions of surviving candidates, or `[H, K]` at a cache site.
        merge: Who absorbs whom, in positions, `[M]`, or `[H, M]` at a cache site, where pairs of
            weight 0 are filling; None if nothing was merged.
        step: Which step of the recipe decided, from 0.
        length: Tokens of the unpruned sequence when it decided: queries from there on see the
            result. None for those of the call.
        group: The group of a grouped prefill whose tokens it chose from; None for the whole prompt.
        of_sequence: Whether it chose from all prompts that the sequence holds.
    """

    method: str
    site: Site
    layer: int
    sample: int
    candidates: int
    kept: Tensor
    merge: Merge | None = None
    step: int = 0
    length: int | None = None
    group: int | None = None
    of_sequence: bool = False

    def __repr__(self) -> str:
        kept = self.kept.shape[-1]
        return f"Decision({self.method} at {self.site}: {kept} of {self.candidates})"


@dataclass
class Call:
    """One prefill that brought media.

    Attributes:
        layouts: The media tokens of each sample.
        length: Tokens of the unpruned sequence at the end of this prefill, text included.
        decisions: All selections, in the order in which they were made.
        media_entries: `[B, L, H]` media entries in the cache of each layer and head at the end of
            this prefill; None without a cache.
        kv_bytes_before: Bytes that the unpruned cache takes.
        kv_bytes_after: Bytes that the cache takes, measured on its tensors.
        warnings: What the user should know.
        groups: For each sample `[N]` int64, the group in which each media token was prefilled; None
            if the prompt was prefilled whole.
        logit_rows: `[B, Q]` int64, which token of the unpruned sequence each row of the model's
            logits is of, -1 for holes. The row of token `p` predicts token `p + 1`.
    """

    layouts: list[TokenLayout]
    length: int
    decisions: list[Decision] = field(default_factory=list)
    media_entries: Tensor | None = None
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    warnings: list[str] = field(default_factory=list)
    groups: list[Tensor] | None = None
    logit_rows: Tensor | None = None

    def take_back(self, tokens: int) -> None:
        """The last tokens of the prompt, all text, are forgotten for others."""
        end, self.length = self.length, self.length - tokens
        self.decisions = [
            replace(one, length=self.length) if one.length == end else one for one in self.decisions
        ]

    @property
    def media_tokens(self) -> MediaTokens:
        """Media tokens of this prefill, summed over the batch."""
        before = sum(map(len, self.layouts))
        if self.media_entries is None:
            after = before
        else:
            after = round(float(self.media_entries.double().mean(dim=(1, 2)).sum()))
        return MediaTokens(before, after, self._per_site())

    def _per_site(self) -> dict[Site, float]:
        """Tokens left after each site, exact; at caches the mean over layers and heads."""
        last: dict[Site, dict[tuple[int, int], dict[int | None, int]]] = {}
        for decision in self.decisions:
            site = decision.site
            if isinstance(site, Cache):
                # Stages at the caches of different layers are one site in the path of a token.
                site = Cache(after=site.after)
            place = decision.sample, decision.layer
            kept = last.setdefault(site, {}).setdefault(place, {})
            kept[decision.group] = decision.kept.shape[-1]
        # In the order in which a token meets the sites, caches last.
        order = {"layer": 1, "prefill": 2, "decode": 3}
        last = dict(
            sorted(
                last.items(),
                key=lambda one: (
                    order[one[0].after] if isinstance(one[0], Cache) else 0,
                    min(one[1])[1],
                ),
            )
        )
        return {
            site: round(_sum(kept) * len(self.layouts) / len(kept), 2)
            if isinstance(site, Cache)
            else _sum(kept)
            for site, kept in last.items()
        }

    def presence(self, sample: int = 0) -> Tensor:
        """How present each media token still is at the end of prefill.

        Returns:
            `[N]` float32 in [0, 1]: the share of layers and heads whose cache holds the token.
        """
        layout = self.layouts[sample]
        if self.media_entries is None:
            return torch.ones(len(layout))
        _, layers, heads = self.media_entries.shape
        held = torch.ones(layers, heads, len(layout))
        for decision in self.decisions:
            if decision.sample != sample:
                continue
            kept = (
                decision.kept.cpu().expand(heads, -1)
                if decision.kept.ndim == 1
                else decision.kept.cpu()
            )
            kept = kept[:, torch.isin(kept[0], layout.position)] if decision.of_sequence else kept
            rows = torch.searchsorted(layout.position, kept.contiguous())
            mask = torch.zeros(heads, len(layout))
            if decision.group is not None and self.groups is not None:
                mask[:, self.groups[sample] != decision.group] = 1.0  # it chose from others
            mask = mask.scatter_(1, rows, 1.0)
            at_cache = isinstance(decision.site, Cache)
            held[decision.layer : decision.layer + 1 if at_cache else None] *= mask
        return held.mean(dim=(0, 1))


def _sum(kept: dict[tuple[int, int], dict[int | None, int]]) -> int:
    return sum(sum(groups.values()) for groups in kept.values())


class Report:
    """What happened inside one `with prune(...)`; it fills as the model runs.

    It holds neither caches nor inputs. Figures that are one number describe the last prefill that
    brought media; `calls` has them all.

    Attributes:
        recipe: The recipe, as text.
        calls: One record for each prefill that brought media.
    """

    def __init__(self, recipe: str) -> None:
        self.recipe = recipe
        self.calls: list[Call] = []
        self._encoding: list[tuple[Mark, Mark]] = []
        self._prefill: tuple[Mark, Mark] | None = None
        self._steps: list[tuple[Mark, Mark]] = []
        self._count = 0
        self._fallbacks: set[str] = set()

    # -- filled by the engine

    def encoding(self, started: Mark, finished: Mark) -> None:
        """An encoder ran."""
        if self._prefill is not None:
            self._encoding, self._prefill = [], None
        self._encoding.append((started, finished))

    def prefill(self, call: Call, started: Mark, finished: Mark) -> None:
        """A prompt with media went through the language model."""
        self.calls.append(call)
        self._prefill = started, finished
        self._steps = []
        self._tell_fallbacks()

    def step(self, started: Mark, finished: Mark) -> None:
        """The language model ran without new media."""
        # The first and the last suffice for the mean; marks of a long answer are not piled up.
        self._steps = [*self._steps[:1], (started, finished)]
        self._count = 1 if len(self._steps) == 1 else self._count + 1
        self._tell_fallbacks()

    def _tell_fallbacks(self) -> None:
        for warnings in (call.warnings for call in self.calls[-1:]):
            warnings.extend(one for one in sorted(self._fallbacks) if one not in warnings)

    def kernel(self, wanted: str, used: str) -> None:
        """An attention kernel was chosen."""
        if wanted != used:
            self._fallbacks.add(f"{wanted} cannot express the pruned mask: {used} served instead")

    # -- read by the user

    @property
    def last(self) -> Call:
        """The last prefill that brought media.

        Raises:
            LookupError: There was none.
        """
        if not self.calls:
            raise LookupError(
                "nothing was recorded: no prompt with images, video or sound ran inside "
                "`with prune(...)`"
            )
        return self.calls[-1]

    @property
    def media_tokens(self) -> MediaTokens:
        """Media tokens before and after, and what each site let through."""
        return self.last.media_tokens

    @property
    def kv_bytes(self) -> Change[int]:
        """Bytes of the cache at the end of prefill."""
        return Change(self.last.kv_bytes_before, self.last.kv_bytes_after)

    @property
    def seconds(self) -> Seconds:
        """Seconds of `encode` and `prefill`, and the mean `per_token` of decoding.

        What ran compiled is not timed.
        """
        encode = sum((end.seconds_since(begin) for begin, end in self._encoding), 0.0)
        prefill = per_token = math.nan
        if self._prefill is not None:
            prefill = self._prefill[1].seconds_since(self._prefill[0])
        if self._steps:
            per_token = self._steps[-1][1].seconds_since(self._steps[0][0]) / self._count
        return _measured(encode=encode, prefill=prefill, per_token=per_token)

    @property
    def turn_seconds(self) -> Seconds:
        """Seconds of an answer without new media: `prefill` of its text, and mean `per_token`."""
        if not self._steps:
            return Seconds()
        text, last = self._steps[0], self._steps[-1]
        prefill, per_token = text[1].seconds_since(text[0]), math.nan
        if self._count > 1:
            per_token = last[1].seconds_since(text[1]) / (self._count - 1)
        return _measured(prefill=prefill, per_token=per_token)

    def spans(self, clock: Clock) -> Phases:
        """When the last prefill that brought media was under way: `encode` and `prefill`.

        What ran compiled is not timed.
        """

        def timed(pairs: list[tuple[Mark, Mark]]) -> tuple[Span, ...]:
            spans = ((clock.of(begin), clock.of(end)) for begin, end in pairs)
            return tuple(span for span in spans if not math.isnan(span[1] - span[0]))

        prefill = [] if self._prefill is None else [self._prefill]
        return Phases(encode=timed(self._encoding), prefill=timed(prefill))

    def scatter_logits(self, logits: Tensor, fill: float = math.nan) -> Tensor:
        """Put the logits of the last prefill that brought media where an unpruned model has them.

        Args:
            logits: `[B, Q, V]`, as the model returned them.
            fill: What tokens without logits get.

        Returns:
            `[B, S, V]`, as large as the logits of an unpruned model.
        """
        rows, length = self.last.logit_rows, self.last.length
        if rows is None or rows.shape != logits.shape[:2]:
            shape = None if rows is None else tuple(rows.shape)
            raise TokenPruneError(
                f"logits must be those of the last prefill, [B, Q, V] for the rows {shape}, "
                f"got {tuple(logits.shape)}"
            )
        where = torch.where(rows < 0, length, rows).to(logits.device)[..., None]
        out = logits.new_full((len(logits), length + 1, logits.shape[2]), fill)
        return out.scatter(1, where.expand_as(logits), logits)[:, :-1]  # holes were put last

    def overlay(self, frames: Any, *, sample: int = 0, columns: int | None = None) -> Image:
        """A picture of the frames in which dropped tokens are dark.

        Args:
            frames: The frames or images that the model was given, `[F, 3, H, W]` uint8, or a
                sequence of PIL images.
            sample: Row of the batch.
            columns: Frames side by side; by default about as wide as high.
        """
        from tokenprune.report.pictures import overlay

        return overlay(self.last.layouts[sample], self.last.presence(sample), frames, columns)

    def __str__(self) -> str:
        if not self.calls:
            return f"{self.recipe}: no prompt with media yet"
        tokens, size, seconds = self.media_tokens, self.kv_bytes, self.seconds.as_dict()
        sites = ", ".join(f"{site} {left:g}" for site, left in tokens.per_site.items())
        lines = [
            f"recipe        {self.recipe}",
            f"media tokens  {tokens.before} -> {tokens.after}" + (f"  ({sites})" if sites else ""),
            f"KV cache      {_mebibytes(size.before)} -> {_mebibytes(size.after)}",
            "seconds       " + ", ".join(f"{name} {value:.3f}" for name, value in seconds.items()),
        ]
        return "\n".join(lines + [f"warning       {text}" for text in self.last.warnings])

    def __repr__(self) -> str:
        return f"Report({self.recipe}, {len(self.calls)} prefills)"


def _measured(**seconds: float) -> Seconds:
    """Seconds without those that are of no time."""
    return Seconds(**{name: one for name, one in seconds.items() if not math.isnan(one)})


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
