"""`Change`: a figure without pruning and with it; `MediaTokens` tells it for each site as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tokenprune.core.site import Cache, Input, Layer, Site

__all__ = ["Change", "MediaTokens", "total"]

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True)
class Change(Generic[_Number]):
    """A figure without pruning and with it.

    Attributes:
        before: Without.
        after: With.
    """

    before: _Number
    after: _Number

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {"before": self.before, "after": self.after}


@dataclass(frozen=True)
class MediaTokens(Change[int]):
    """Counts of media tokens.

    Attributes:
        before: What the encoder made.
        after: What the cache holds at the end of prefill, averaged over layers and heads.
        per_site: What each site let through, in the order in which a token meets them. All cache
            stages are one site, `Cache()`, whatever their layers.
    """

    per_site: Mapping[Site, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints: sites by their text."""
        sites = {str(site): left for site, left in self.per_site.items()}
        return super().as_dict() | {"per_site": sites}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> MediaTokens:
        """The counts that `as_dict` wrote."""
        sites = {_site(text): left for text, left in plain["per_site"].items()}
        return cls(plain["before"], plain["after"], sites)


def total(counts: Sequence[MediaTokens]) -> MediaTokens:
    """The media tokens of several prefills together."""
    sites = dict.fromkeys(site for one in counts for site in one.per_site)
    return MediaTokens(
        before=sum(one.before for one in counts),
        after=sum(one.after for one in counts),
        per_site={
            site: round(sum(one.per_site.get(site, 0) for one in counts), 2) for site in sites
        },
    )


def _site(text: str) -> Site:
    """The site of which `str` gives this text."""
    layer = text.removeprefix(_LAYER)
    return Layer(int(layer)) if layer != text else _SITES[text]


_LAYER = "layer "
_SITES: dict[str, Site] = {
    str(site): site for site in (Input(), Cache(), Cache(after="prefill"), Cache(after="decode"))
}
