"""Watching: frames of files, or as they arrive, gathered in groups that are prefilled."""

from __future__ import annotations

import os
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from tokenprune.engine.patch import Patch
from tokenprune.errors import MediaError
from tokenprune.media import stream_video
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.processors import frame_size
from tokenprune.report.report import Report
from tokenprune.session.checks import check_group
from tokenprune.session.positions import check_positions
from tokenprune.session.prefill import GroupPrefill
from tokenprune.session.script import FrameGroup, Pace, Script
from tokenprune.session.watched import Watched, WatchedGroup

__all__ = ["Watcher"]


class Watcher:
    """Gathers frames in groups of one size and rate, and has each group prefilled.

    Args:
        loaded: The model and its processor.
        patch: What prunes; its hooks are in the model for each group.
        report: Is filled with each group.
        group: Frames of a group.

    Attributes:
        group: Frames of a group.
        watched: What was watched so far; None before the first frames.
    """

    def __init__(self, loaded: LoadedModel, patch: Patch, report: Report, group: int) -> None:
        check_group(group, loaded)
        self._loaded = loaded
        self._group_prefill = GroupPrefill(loaded, patch, report)
        self.group = group
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
        self._group_prefill.set_clock(watched.end_seconds)

    @property
    def groups(self) -> list[WatchedGroup]:
        """What became of each group, in order."""
        return [] if self.watched is None else self.watched.groups

    @property
    def frames(self) -> int:
        """Frames watched, those included that wait for their group to fill."""
        return sum(group.frames for group in self.groups) + sum(map(len, self._waiting))

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
                rate, length = info.clock
                pace = Pace(rate, planned / length * rate)
                watched = self._begin(video.frames, rule is not None, pace)
                if before is None:
                    before = replace(watched)
                first_pace, offset = watched.script.pace, before.source_frames
                scale = first_pace.source_fps / pace.source_fps
                # As `Video.even_indices` counts, at the rate of the session's first frames.
                indices = offset + (video.pts_seconds * first_pace.source_fps).round().long()
                end = offset + round(length * scale)
                watched.source_frames = max(end, int(indices[-1]) + 1)
                watched.pictures_decoded = before.pictures_decoded + video.pictures_decoded
                watched.bytes_read = before.bytes_read + video.bytes_read
                seconds = offset / first_pace.source_fps + video.pts_seconds
                group = FrameGroup(video.frames, seconds, indices, first_pace, video.timings)
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
        self._prefill(watched, FrameGroup.at_pace(frames[:count], indices, pace))
        self._waiting = [frames[count:]] if len(frames) > count else []
        watched.source_frames += round(count * step)

    def _prefill(self, watched: Watched, group: FrameGroup) -> None:
        try:
            self._group_prefill.append(watched, group)
        except BaseException:
            if not watched.groups:
                self.forget()
            raise
