"""What a session watched and what it cost, as plain data and as text."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tokenprune.report.seconds import Seconds

if TYPE_CHECKING:
    from tokenprune.session.session import Session

__all__ = ["as_dict", "as_text"]


def as_dict(session: Session) -> dict[str, Any]:
    """What was watched and what it cost, group by group."""
    groups = [group.as_dict() for group in session.groups]
    return {
        "frames": session.frames,
        "media_tokens": session.media_tokens.as_dict(),
        "kv_bytes": session.kv_bytes.as_dict(),
        "pictures_decoded": session.pictures_decoded,
        "bytes_read": session.bytes_read,
        "recipe": str(session.recipe),
        "model": session.model_name,
        "groups": [{k: v for k, v in group.items() if k != "spans"} for group in groups],
        "timeline": session.timeline.as_list(),
    }


def as_text(session: Session) -> str:
    """The same as a few lines of text."""
    tokens, size, groups = session.media_tokens, session.kv_bytes, session.groups
    nothing = Seconds(decode=0.0, process=0.0, encode=0.0, prefill=0.0)
    spent = replace(sum((group.seconds for group in groups), nothing), index=None).as_dict()
    mebibytes = [f"{count / 2**20:.1f} MiB" for count in (size.before, size.after)]
    lines = [
        f"recipe        {session.recipe}",
        f"frames        {session.frames} in {len(groups)} groups",
        f"decoded       {session.pictures_decoded} pictures, {session.bytes_read / 2**20:.1f} MiB",
        f"media tokens  {tokens.before} -> {tokens.after}",
        f"KV cache      {' -> '.join(mebibytes)}",
        "seconds       " + ", ".join(f"{name} {value:.3f}" for name, value in spent.items()),
    ]
    return "\n".join(lines)
