"""What pruning did: counts, seconds, bytes, and which tokens were kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokenprune.layout import TokenLayout
from tokenprune.selection import Merge
from tokenprune.stage import Cache, Input, Site

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
        merge: Who absorbs whom, in positions; None if nothing was merged.
    """

    method: str
    site: Site
    layer: int
    sample: int
    candidates: int
    kept: Tensor
    merge: Merge | None = None

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
        seconds: "encode" and "prefill".
        warnings: What the user should know.
    """

    layouts: list[TokenLayout]
    length: int
    decisions: list[Decision] = field(default_factory=list)
    media_entries: Tensor | None = None
    kv_bytes_before: int = 0
    kv_bytes_after: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
