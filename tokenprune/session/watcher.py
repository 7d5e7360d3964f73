"""Watching: frames in, a pruned cache out, group by group."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tokenprune.engine.cache import CACHE_NAME, cache_bytes, full_cache_bytes
from tokenprune.engine.patch import Patch
from tokenprune.engine.prompt import Given
from tokenprune.engine.rollback import Bookmark
from tokenprune.errors import MediaError, UnsupportedModelError
from tokenprune.media import stream_video
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.processors import frame_size
from tokenprune.report.change import Change
from tokenprune.report.report import Report
from tokenprune.report.seconds import Seconds
from tokenprune.report.timing import Clock
from tokenprune.session.checks import check_group
from tokenprune.session.positions import check_positions, prompt_positions
from tokenprune.session.script import FrameGroup, Pace, Script, Tokens
from tokenprune.session.watched import Watched, WatchedGroup

__all__ = ["Watcher"]


class Watcher:
    """Sends groups of frames through a patched model.

    Args:
        loaded: The model and its processor.
        patch: What prunes; its hooks are in the model for each group.
        report: Is filled with each group.
        group: Frames of a group.

    Attributes:
        group: Frames of a group.
        clock: Shows the seconds since the session was made.
        watched: What was watched so far; None before the first frames.
    """

    def __init__(self, loaded: LoadedModel, patch: Patch, report: Report, group: int) -> None:
        check_group(group, loaded)
        self._loaded = loaded
        self._patch = patch
        self._report = report
        self.group = group
        self.clock = Clock(patch.adapter.language_model)
        self.watched: Watched | None = None
        self._waiting: list[Tensor] = []

    def forget(self) -> None:
        """Be as one that has watched nothing."""
        self.watched = None
        self._waiting = []

    def go_on(self, watched: Watched) -> None:
        """Go on where another watcher was.

        Raises:
            UnsupportedModelError: The model places frames or questions otherwise.
        """
        check_positions(self._loaded, watched.script)
        self.watched = watched
        self.clock = Clock(self._patch.adapter.language_model, at=watched.end_seconds)

    @property
    def groups(self) -> list[WatchedGroup]:
        """What became of each group, in order."""
        return [] if self.watched is None else self.watched.groups

    @property
    def frames(self) -> int:
        """Frames watched, those included that wait for their group to fill."""
        return sum(group.frames for group in self.groups) + sum(map(len, self._waiting))

    @property
    def pictures_decoded(self) -> int:
        """Frames that decoders gave, of all files."""
        return 0 if self.watched is None else self.watched.pictures_decoded

    @property
    def bytes_read(self) -> int:
        """Bytes of their packets that were read."""
        return 0 if self.watched is None else self.watched.bytes_read

    def watch_file(
        self,
        path: str | os.PathLike[str],
        frames: int | None,
        fps: float | None,
        workers: int | None,
        worker_kind: WorkerKind | None,
    ) -> None:
        """Prefill the chosen frames of a file, group by group, as they are decoded."""
        rule = frame_size(self._loaded.processor)
        planned = 0

        def size(height: int, width: int, count: int) -> tuple[int, int]:
            nonlocal planned
            planned = count
            if self.watched is not None:
                return self.watched.script.size
            return (height, width) if rule is None else rule(height, width, count)

        groups = stream_video(
            path,
            group=self.group,
            first_group=self.group,
            frames=frames,
            fps=fps,
            size=size,
            workers=workers,
            worker_kind=worker_kind,
        )
        before = None
        with closing(groups):  # or the workers would go on until an error is forgotten
            for video in groups:
                info = video.info
                pace = Pace(info.average_fps, planned / info.frame_count * info.average_fps)
                watched = self._begin(video.frames, rule is not None, pace)
                if before is None:
                    before = replace(watched)
                first_pace, offset = watched.script.pace, before.source_frames
                scale = first_pace.source_fps / pace.source_fps
                # As `Video.even_indices` counts, at the rate of the session's first frames.
                indices = offset + (video.pts_seconds * first_pace.source_fps).round().long()
                length = offset + round(info.frame_count * scale)
                watched.source_frames = max(length, int(indices[-1]) + 1)
                watched.pictures_decoded = before.pictures_decoded + video.pictures_decoded
                watched.bytes_read = before.bytes_read + video.bytes_read
                seconds = offset / first_pace.source_fps + video.pts_seconds
                group = FrameGroup.of(video.frames, indices, first_pace, video.timings, seconds)
                self._prefill(watched, group)

    def watch_frames(self, frames: Tensor, fps: float | None) -> None:
        """Prefill full groups of frames; what is left of them waits for more."""
        if (
            frames.dtype != torch.uint8
            or frames.ndim != 4
            or frames.shape[1] != 3
            or not len(frames)
        ):
            raise MediaError(
                f"frames must be [F, 3, H, W] uint8, got {list(frames.shape)} {frames.dtype}"
            )
        if fps is not None and not 0 < fps < float("inf"):
            raise MediaError(f"fps must be a number above 0, got {fps}")
        rule = frame_size(self._loaded.processor)
        if self.watched is None:
            if fps is None:
                raise MediaError("frames need their rate: give fps, such as fps=2.0")
            if rule is not None:
                height, width = frames.shape[-2:]
                frames = self._resize(frames, rule(height, width, len(frames)))
        elif fps is None:
            fps = self.watched.script.pace.sampled_fps
        watched = self._begin(frames, rule is not None, Pace(fps, fps))
        waited, groups = self._waiting, len(watched.groups)
        self._waiting = [*waited, self._resize(frames, watched.script.size)]
        try:
            while sum(map(len, self._waiting)) >= self.group:
                self._prefill_waiting(watched, self.group)
        except BaseException:
            # Frames of this call must not wait: a second try would watch them twice.
            kept = watched is self.watched and groups and len(watched.groups) == groups
            self._waiting = waited if kept else []
            raise
        # What waits must not keep alive what went by.
        self._waiting = [one.clone() for one in self._waiting]

    def _begin(self, frames: Tensor, sized: bool, pace: Pace) -> Watched:
        """Settle what all frames have in common, or check that these go on at the same rate."""
        if self.watched is None:
            height, width = frames.shape[-2:]
            script = Script(self._loaded, (height, width), sized, pace)
            check_positions(self._loaded, script)
            self.watched = Watched.nothing(self._loaded, script)
        first = self.watched.script.pace.sampled_fps
        if abs(pace.sampled_fps - first) > 1e-3 * first:
            raise MediaError(
                f"all frames of a session are one clip, watched at one rate: got "
                f"{pace.sampled_fps:g} frames per second after {first:g}; choose fps={first:g}, or "
                "a session of their own"
            )
        return self.watched

    def _resize(self, frames: Tensor, size: tuple[int, int]) -> Tensor:
        if tuple(frames.shape[-2:]) == tuple(size):
            return frames
        bicubic = InterpolationMode.BICUBIC  # what most processors do
        resized: Tensor = functional.resize(
            frames, list(size), interpolation=bicubic, antialias=True
        )
        return resized

    def flush(self) -> None:
        """Prefill the frames that wait for more."""
        waiting = sum(map(len, self._waiting))
        if waiting and self.watched is not None:
            self._prefill_waiting(self.watched, waiting)

    def _prefill_waiting(self, watched: Watched, count: int) -> None:
        frames = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        pace = watched.script.pace
        step = pace.source_fps / pace.sampled_fps
        indices = watched.source_frames + (torch.arange(count) * step).round().long()
        self._prefill(watched, FrameGroup.of(frames[:count], indices, pace))
        self._waiting = [frames[count:]] if len(frames) > count else []
        watched.source_frames += round(count * step)

    def _prefill(self, watched: Watched, group: FrameGroup) -> None:
        """Send a group through the model; if that fails, nothing of it is left."""
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
        given = Given(frame_seconds=self._loaded.frame_seconds(group))
        try:
            if end_tokens:
                watched.cache.crop(-end_tokens)
            self._forward(watched, prompt, new, given)
            self._check_end_tokens(len(prompt) - watched.script.end_tokens)
        except BaseException:
            del report.calls[calls:]
            if mark is None:
                self.forget()
            else:
                mark.restore()
            raise
        watched.prompt = prompt
        if calls:  # what the group before decided holds from here on
            report.calls[calls - 1].length -= end_tokens
        self._number(watched)
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

    def _number(self, watched: Watched) -> None:
        """Let the newest layout number items, canvases, frames and seconds of the whole session."""
        seconds = 0.0
        if self._patch.adapter.seconds_name in watched.prompt.media:  # from the group's start
            seconds = sum(one.frames for one in watched.groups) / watched.script.pace.sampled_fps
        call = self._report.last
        (layout,) = call.layouts
        items, canvases, frames = watched.counted
        clip = layout.frame >= 0
        layout = replace(
            layout,
            item=torch.where(clip, layout.item, layout.item + items),
            canvas=layout.canvas + canvases,
            frame=torch.where(clip, layout.frame + frames, -1),
            seconds=layout.seconds + seconds,
        )
        call.layouts = [layout]
        ends = (layout.item, layout.canvas, layout.frame)
        items, canvases, frames = (int(one.max()) + 1 for one in ends)
        watched.counted = items, canvases, frames
