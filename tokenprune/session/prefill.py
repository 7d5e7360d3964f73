"""Sending one group of frames after the other through a patched model."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from tokenprune.core.layout import TokenLayout
from tokenprune.engine.cache import CACHE_NAME, cache_bytes, full_cache_bytes
from tokenprune.engine.patch import Patch
from tokenprune.engine.prompt import Given
from tokenprune.engine.rollback import Bookmark
from tokenprune.errors import UnsupportedModelError
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.report.change import Change
from tokenprune.report.report import Report
from tokenprune.report.seconds import Seconds
from tokenprune.report.timing import Clock
from tokenprune.session.positions import prompt_positions
from tokenprune.session.script import FrameGroup, Tokens
from tokenprune.session.watched import Watched, WatchedGroup

__all__ = ["GroupPrefill"]


class GroupPrefill:
    """Appends groups of frames to what was watched, pruned.

    Args:
        loaded: The model and its processor.
        patch: What prunes; its hooks are in the model for each group.
        report: Is filled with each group.

    Attributes:
        clock: Shows the seconds since the session was made.
    """

    def __init__(self, loaded: LoadedModel, patch: Patch, report: Report) -> None:
        self._loaded = loaded
        self._patch = patch
        self._report = report
        self.clock = Clock(patch.adapter.language_model)

    def set_clock(self, seconds: float) -> None:
        """Let the clock go on from there."""
        self.clock = Clock(self._patch.adapter.language_model, at=seconds)

    def append(self, watched: Watched, group: FrameGroup) -> None:
        """Send a group through the model; if that fails, nothing of it is left.

        Args:
            watched: What the group continues. If its first group fails, it is of no use any more.
            group: Its frames.

        Raises:
            UnsupportedModelError: The end of a clip holds tokens that stand for frames.
        """
        opening = not watched.groups
        began = time.perf_counter()
        new = watched.script.write(group, opening=opening)
        processed = time.perf_counter()
        end_tokens = 0 if opening else watched.script.end_tokens
        so_far = watched.prompt.first(len(watched.prompt) - end_tokens)
        prompt = new if opening else so_far.then(new)
        mark = None if opening else Bookmark(watched.cache, margin=end_tokens)
        report = self._report
        calls = len(report.calls)
        given = Given(
            frames=self._loaded.frames_by_clip(Media(group.frames, video=group)),
            frame_seconds=self._loaded.frame_seconds(group),
            continues=not opening,
            more=True,
        )
        try:
            if end_tokens:
                watched.cache.crop(-end_tokens)
            self._forward(watched, prompt, new, given)
            self._check_end_tokens(len(prompt) - watched.script.end_tokens)
        except BaseException:
            del report.calls[calls:]
            if mark is not None:
                mark.restore()
            raise
        watched.prompt = prompt
        if calls:  # what the group before decided holds from here on
            report.calls[calls - 1].take_back(end_tokens)
        (layout,) = report.last.layouts
        report.last.layouts = [self._numbered(layout, watched)]
        watched.groups.append(self._summary(watched, group, began, processed))

    def _summary(
        self, watched: Watched, group: FrameGroup, began: float, processed: float
    ) -> WatchedGroup:
        """What became of the group that was prefilled last.

        Args:
            watched: With its tokens in the cache.
            group: Its frames.
            began: When the processor began to work on it, by `time.perf_counter`.
            processed: When the processor was done.
        """
        report, timings, host = self._report, group.timings, self.clock.of_host
        cache = watched.cache
        reading = Seconds(
            index=timings.index_seconds,
            decode=timings.decode_seconds,
            process=processed - began,
        )
        return WatchedGroup(
            first_frame=sum(one.frames for one in watched.groups),
            frames=len(group.frames),
            media_tokens=report.last.media_tokens,
            kv_bytes=Change(full_cache_bytes(cache), cache_bytes(cache)),
            began_seconds=host(began - timings.decode_seconds),
            seconds=reading + replace(report.seconds, per_token=None),
            phases=replace(
                report.spans(self.clock),
                decode=tuple((host(start), host(end)) for start, end in timings.effort),
                process=((host(began), host(processed)),),
            ),
        )

    def _forward(self, watched: Watched, prompt: Tokens, new: Tokens, given: Given) -> None:
        """Append tokens to the cache.

        Args:
            watched: Whose cache it is.
            prompt: All tokens up to and with the new ones.
            new: Those that are not in the cache yet.
            given: What the model is not told of them.
        """
        model: Any = self._loaded.model
        # The logits of a group are of no use.
        least = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        # Some families find the end of a clip by what follows it.
        positions = prompt_positions(self._loaded, prompt.then(watched.script.ending))
        # Masks look these up by a token's place in the whole sequence (Gemma 3).
        types = new.types | {
            name: prompt.types[name] for name in ("token_type_ids",) if name in prompt.types
        }
        with torch.no_grad(), self._patch.run(self._report, given):
            model(
                input_ids=new.ids,
                position_ids=positions[..., len(prompt) - len(new) : len(prompt)],
                use_cache=True,
                **{CACHE_NAME: watched.cache},
                **types,
                **new.media,
                **least,
            )

    def _check_end_tokens(self, end: int) -> None:
        position = self._report.last.layouts[0].position
        if len(position) and int(position[-1]) >= end:
            raise UnsupportedModelError(
                f"{self._loaded.name} ends a video in tokens that stand for frames, so its frames "
                "cannot be watched one by one; ask about the file at once"
            )

    def _numbered(self, layout: TokenLayout, watched: Watched) -> TokenLayout:
        """A group's layout with items, canvases, frames and seconds of the whole session.

        Args:
            layout: Of the group, whose items, canvases and frames are counted from here on.
            watched: What was watched before it.
        """
        seconds = 0.0
        if self._patch.adapter.seconds_name in watched.prompt.media:  # from the group's start
            seconds = sum(one.frames for one in watched.groups) / watched.script.pace.sampled_fps
        items, canvases, frames = watched.counted
        clip = layout.frame >= 0
        layout = replace(
            layout,
            item=torch.where(clip, layout.item, layout.item + items),
            canvas=layout.canvas + canvases,
            frame=torch.where(clip, layout.frame + frames, -1),
            seconds=layout.seconds + seconds,
        )
        ends = (layout.item, layout.canvas, layout.frame)
        items, canvases, frames = (int(one.max()) + 1 for one in ends)
        watched.counted = items, canvases, frames
        return layout
