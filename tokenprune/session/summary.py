"""`Summary`: what a session has watched and what it cost, to be read at any time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tokenprune.core.recipe import Recipe
from tokenprune.report.answer import Answer
from tokenprune.report.change import Change, MediaTokens, total
from tokenprune.report.report import Report
from tokenprune.report.seconds import Seconds
from tokenprune.report.timeline import Timeline
from tokenprune.session.watched import WatchedGroup
from tokenprune.session.watcher import Watcher

__all__ = ["Summary"]


class Summary:
    """A read-only view of what was watched.

    Args:
        recipe: What is pruned.
        model_name: What the model is called in answers and files.
        watcher: Knows what was watched.

    Attributes:
        recipe: What is pruned.
    """

    def __init__(self, recipe: Recipe, model_name: str, watcher: Watcher) -> None:
        self.recipe = recipe
        self._model_name = model_name
        self._watcher = watcher

    @property
    def model_name(self) -> str:
        """What the model is called in answers and files."""
        return self._model_name

    @property
    def groups(self) -> list[WatchedGroup]:
        """What became of each group, in order."""
        return list(self._watcher.groups)

    @property
    def frames(self) -> int:
        """Frames watched, those included that wait for their group to fill."""
        return self._watcher.frames

    @property
    def media_tokens(self) -> MediaTokens:
        """Media tokens of all groups, before and after."""
        return total([group.media_tokens for group in self.groups])

    @property
    def kv_bytes(self) -> Change[int]:
        """Bytes of the cache that is kept: unpruned, and as measured."""
        groups = self._watcher.groups
        return groups[-1].kv_bytes if groups else Change(0, 0)

    @property
    def timeline(self) -> Timeline:
        """When each group was decoded, processed, encoded and prefilled."""
        return Timeline(tuple(group.phases for group in self._watcher.groups))

    @property
    def pictures_decoded(self) -> int:
        """Pictures that came out of decoders: the frames watched, and those they are built on."""
        watched = self._watcher.watched
        return 0 if watched is None else watched.pictures_decoded

    @property
    def bytes_read(self) -> int:
        """Bytes of video packets that were read from files."""
        watched = self._watcher.watched
        return 0 if watched is None else watched.bytes_read

    def as_dict(self) -> dict[str, Any]:
        """What was watched and what it cost, group by group."""
        groups = [group.as_dict() for group in self.groups]
        return {
            "frames": self.frames,
            "media_tokens": self.media_tokens.as_dict(),
            "kv_bytes": self.kv_bytes.as_dict(),
            "pictures_decoded": self.pictures_decoded,
            "bytes_read": self.bytes_read,
            "recipe": str(self.recipe),
            "model": self.model_name,
            "groups": [{k: v for k, v in group.items() if k != "spans"} for group in groups],
            "timeline": self.timeline.as_list(),
        }

    def __str__(self) -> str:
        tokens, size, groups = self.media_tokens, self.kv_bytes, self.groups
        nothing = Seconds(decode=0.0, process=0.0, encode=0.0, prefill=0.0)
        spent = replace(sum((group.seconds for group in groups), nothing), index=None).as_dict()
        mebibytes = [f"{count / 2**20:.1f} MiB" for count in (size.before, size.after)]
        lines = [
            f"recipe        {self.recipe}",
            f"frames        {self.frames} in {len(groups)} groups",
            f"decoded       {self.pictures_decoded} pictures, {self.bytes_read / 2**20:.1f} MiB",
            f"media tokens  {tokens.before} -> {tokens.after}",
            f"KV cache      {' -> '.join(mebibytes)}",
            "seconds       " + ", ".join(f"{name} {value:.3f}" for name, value in spent.items()),
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.model_name}, {self.recipe}, {self.frames} frames)"

    def _answered(self, words: str, report: Report) -> Answer:
        """An answer, with what was watched when it was given.

        Args:
            words: Of the answer.
            report: Of watching and of the question.
        """
        media_tokens, kv_bytes = self.media_tokens, self.kv_bytes
        calls = report.calls
        if calls and calls[-1].kv_bytes_after != kv_bytes.after:  # pruned for this question alone
            media_tokens = total([call.media_tokens for call in calls])
            kv_bytes = Change(calls[-1].kv_bytes_before, calls[-1].kv_bytes_after)
        return Answer(
            answer=words,
            media_tokens=media_tokens,
            seconds=Seconds.zero() + report.turn_seconds,
            kv_bytes=kv_bytes,
            frames=self.frames,
            recipe=str(self.recipe),
            model=self.model_name,
            report=report,
            pictures=torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
            timeline=self.timeline,
            pictures_decoded=self.pictures_decoded,
            bytes_read=self.bytes_read,
        )
