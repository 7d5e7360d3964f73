"""Watching: frames in, a pruned cache out, group by group."""

from __future__ import annotations

import os
import time
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional
from transformers.cache_utils import Cache

from tokenprune.engine.cache import CACHE_NAME, cache_bytes, full_cache_bytes, new_cache
from tokenprune.engine.patch import Patch
from tokenprune.engine.rollback import Bookmark
from tokenprune.errors import MediaError, TokenPruneError, UnsupportedModelError
from tokenprune.media import stream_video
from tokenprune.media.decode.pool import WorkerKind
from tokenprune.models.loading import LoadedModel, frame_size
from tokenprune.report.report import KVBytes, MediaTokens
from tokenprune.report.timeline import Phases
from tokenprune.report.timing import Clock
from tokenprune.session.script import Group, Pace, Script, Tokens, temporal_patch

__all__ = ["WatchedGroup", "Watcher"]


@dataclass(frozen=True)
class WatchedGroup:
    """What became of one group of frames.

    Attributes:
        first_frame: Number of its first frame among those watched, from 0.
        frames: How many it holds.
        media_tokens: Counts before and after pruning, and what each site let through.
        kv_bytes: Bytes of the whole cache after it: unpruned, and as measured.
        began_seconds: When the session began to wait for it, since the session was made.
        index_seconds: The time to index a file, with its first group.
        decode_seconds: The time waited for its frames; 0 for frames that were given.
        process_seconds: The processor's time.
        encode_seconds: The encoder's time.
        prefill_seconds: The language model's time, pruning included.
        spans: When what was under way, see `Timeline`. Decoding ran before the session waited.
    """

    first_frame: int
    frames: int
    media_tokens: MediaTokens
    kv_bytes: KVBytes
    began_seconds: float
    index_seconds: float
    decode_seconds: float
    process_seconds: float
    encode_seconds: float
    prefill_seconds: float
    spans: Phases


class Watcher:
    """Sends groups of frames through a patched model.

    Args:
        loaded: The model and its processor.
        patch: What prunes; entered for each group.
        group: Frames of a group.

    Attributes:
        groups: What became of each group.
        cache: The pruned cache; None before the first group.
        told: The tokens that it stands for, pruned ones included; None before the first group.
        script: How the processor writes groups; None before the first frames, as the next two.
        pace: How frames lie in time.
        size: Height and width of the frames.
        sized: Whether that is the size to which the processor would bring them.
        source_frames: Frames of the source that went by, watched or not.
        counted: Items, canvases and frames that layouts have told so far.
        pictures_decoded: Pictures that decoders gave, of all files.
        bytes_read: Bytes of their packets that were read.
        clock: Shows the seconds since the session was made.
    """

    def __init__(self, loaded: LoadedModel, patch: Patch, group: int) -> None:
        _check_group(group, temporal_patch(loaded))
        self._loaded = loaded
        self._patch = patch
        self.group = group
        self.clock = Clock(patch.adapter.language_model)
        self.forget()

    def forget(self) -> None:
        """Be as one that has watched nothing."""
        self.groups: list[WatchedGroup] = []
        self.cache: Cache | None = None
        self.told: Tokens | None = None
        self.script: Script | None = None
        self.pace: Pace | None = None
        self.size: tuple[int, int] | None = None
        self.sized = False
        self.source_frames = 0
        self.counted = (0, 0, 0)
        self.pictures_decoded = self.bytes_read = 0
        self._waiting: list[Tensor] = []

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
            if self.size is not None:
                return self.size
            return (height, width) if rule is None else rule(height, width, count)

        offset = self.source_frames
        pictures, size_bytes = self.pictures_decoded, self.bytes_read
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
        with closing(groups):  # or the workers would go on until an error is forgotten
            for video in groups:
                info = video.info
                pace = Pace(info.average_fps, planned / info.frame_count * info.average_fps)
                if self.pace is None:
                    self._begin(video.frames, rule is not None, pace)
                self._check_rate(pace.sampled_fps)
                assert self.pace is not None
                scale = self.pace.source_fps / pace.source_fps
                # As `Video.even_indices` counts, at the rate of the session's first frames.
                indices = offset + (video.pts_seconds * self.pace.source_fps).round().long()
                length = offset + round(info.frame_count * scale)
                self.source_frames = max(length, int(indices[-1]) + 1)
                self.pictures_decoded = pictures + video.pictures_decoded
                self.bytes_read = size_bytes + video.bytes_read
                seconds = offset / self.pace.source_fps + video.pts_seconds
                self._prefill(Group.of(video.frames, indices, self.pace, video.timings, seconds))

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
        if self.pace is None:
            if fps is None:
                raise MediaError("frames need their rate: give fps, such as fps=2.0")
            if rule is not None:
                height, width = frames.shape[-2:]
                frames = self._resize(frames, rule(height, width, len(frames)))
            self._begin(frames, rule is not None, Pace(fps, fps))
        elif fps is not None:
            self._check_rate(fps)
        assert self.size is not None
        waited, groups = self._waiting, len(self.groups)
        self._waiting = [*waited, self._resize(frames, self.size)]
        try:
            while sum(map(len, self._waiting)) >= self.group:
                self._prefill_waiting(self.group)
        except BaseException:
            # Frames of this call must not wait: a second try would watch them twice.
            kept = self.told is not None and len(self.groups) == groups
            self._waiting = waited if kept else []
            raise
        # What waits must not keep alive what went by.
        self._waiting = [one.clone() for one in self._waiting]

    def _begin(self, frames: Tensor, sized: bool, pace: Pace) -> None:
        """Settle what all frames have in common."""
        height, width = frames.shape[-2:]
        script = Script(self._loaded, (height, width), sized, pace)
        self.check_positions(script)
        self.script, self.size, self.sized, self.pace = script, (height, width), sized, pace

    def check_positions(self, script: Script) -> None:
        """Check that frames stay where they are when others follow them, and a question behind.

        Raises:
            UnsupportedModelError: They do not: an older release of transformers places the frames
                of a clip by the size of the whole, or a question as if nothing were before it.
        """
        once, twice = script.black()
        stay = len(once) - script.closing
        early, late = (self.positions(told.then(script.ending)) for told in (once, twice))
        if not torch.equal(early[..., :stay], late[..., :stay]):
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} gives the frames of {self._loaded.name} "
                "positions that depend on how many follow, so they cannot be watched one by one; "
                "install a newer release, or ask about the file at once"
            )
        model: Any = self._loaded.model
        ids = once.ids
        given = {"attention_mask": torch.ones_like(ids), "position_ids": early[..., : ids.shape[1]]}
        if model.prepare_inputs_for_generation(ids, **given).get("position_ids") is None:
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} does not let {self._loaded.name} be told "
                "the positions of a question, so none can be asked about what was watched; install "
                "a newer release, or ask about the file at once"
            )

    def _check_rate(self, fps: float) -> None:
        assert self.pace is not None
        first = self.pace.sampled_fps
        if abs(fps - first) > 1e-3 * first:
            raise MediaError(
                f"all frames of a session are one clip, watched at one rate: got {fps:g} frames "
                f"per second after {first:g}; choose fps={first:g}, or a session of their own"
            )

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
        if waiting:
            self._prefill_waiting(waiting)

    def _prefill_waiting(self, count: int) -> None:
        assert self.pace is not None
        frames = torch.cat(self._waiting) if len(self._waiting) > 1 else self._waiting[0]
        step = self.pace.source_fps / self.pace.sampled_fps
        indices = self.source_frames + (torch.arange(count) * step).round().long()
        self._prefill(Group.of(frames[:count], indices, self.pace))
        self._waiting = [frames[count:]] if len(frames) > count else []
        self.source_frames += round(count * step)

    def _prefill(self, group: Group) -> None:
        """Send a group through the model; if that fails, nothing of it is left."""
        assert self.script is not None
        began = time.perf_counter()
        new = self.script.write(group, opening=self.told is None)
        processed = time.perf_counter()
        told, closing = new, self.script.closing
        if self.told is not None:
            told = self.told.first(len(self.told) - closing).then(new)
        language_model: Any = self._patch.adapter.language_model
        cache = new_cache(language_model.config) if self.cache is None else self.cache
        mark = None if self.cache is None else Bookmark(cache, margin=closing)
        calls = len(self._patch.report.calls)
        self._patch.frame_seconds = self._loaded.frame_seconds(group)
        try:
            if mark is not None and closing:
                cache.crop(-closing)
            self._forward(told, new, cache)
            self._check_closing(len(told) - closing)
        except BaseException:
            del self._patch.report.calls[calls:]
            if mark is None:
                self.forget()
            else:
                mark.restore()
            raise
        self.cache, self.told = cache, told
        if calls:  # what the group before decided holds from here on
            self._patch.report.calls[calls - 1].length -= closing
        self._locate()
        seconds, timings = self._patch.report.seconds, group.timings
        spans = {
            "decode": [(self.clock.of_host(a), self.clock.of_host(b)) for a, b in timings.effort],
            "process": [(self.clock.of_host(began), self.clock.of_host(processed))],
            **self._patch.report.spans(self.clock),
        }
        self.groups.append(
            WatchedGroup(
                first_frame=sum(one.frames for one in self.groups),
                frames=len(group.frames),
                media_tokens=self._patch.report.last.media_tokens,
                kv_bytes={"before": full_cache_bytes(cache), "after": cache_bytes(cache)},
                began_seconds=self.clock.of_host(began - timings.decode_seconds),
                index_seconds=timings.index_seconds,
                decode_seconds=timings.decode_seconds,
                process_seconds=processed - began,
                encode_seconds=seconds["encode"],
                prefill_seconds=seconds["prefill"],
                spans=spans,
            )
        )

    def _forward(self, told: Tokens, new: Tokens, cache: Cache) -> None:
        model: Any = self._loaded.model
        # The logits of a group are of no use.
        least = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        assert self.script is not None
        # Some families find the end of a clip by what follows it.
        positions = self.positions(told.then(self.script.ending))
        # Masks look these up by a token's place in the whole sequence (Gemma 3).
        types = new.types | {
            name: told.types[name] for name in ("token_type_ids",) if name in told.types
        }
        with torch.no_grad(), self._patch:
            model(
                input_ids=new.ids,
                position_ids=positions[..., len(told) - len(new) : len(told)],
                use_cache=True,
                **{CACHE_NAME: cache},
                **types,
                **new.media,
                **least,
            )

    def positions(self, told: Tokens) -> Tensor:
        """The positions that `generate` gives to a prompt: `[..., 1, S]`."""
        model: Any = self._loaded.model
        known = {
            "input_ids": told.ids,
            "attention_mask": torch.ones_like(told.ids),
            **told.types,
            **told.media,
        }
        positions: Tensor = model._prepare_position_ids_for_generation(told.ids, known)
        return positions

    def _check_closing(self, end: int) -> None:
        position = self._patch.report.last.layouts[0].position
        if len(position) and int(position[-1]) >= end:
            raise UnsupportedModelError(
                f"{self._loaded.name} ends a video in tokens that stand for frames, so its frames "
                "cannot be watched one by one; ask about the file at once"
            )

    def _locate(self) -> None:
        """Let the newest layout tell items, canvases, frames and seconds of the whole session."""
        assert self.pace is not None
        assert self.told is not None
        seconds = 0.0
        if self._patch.adapter.seconds_name in self.told.media:  # counted from the group's start
            seconds = sum(one.frames for one in self.groups) / self.pace.sampled_fps
        call = self._patch.report.last
        (layout,) = call.layouts
        items, canvases, frames = self.counted
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
        self.counted = items, canvases, frames


def _check_group(group: int, patch: int) -> None:
    if group < 1 or group % patch:
        raise TokenPruneError(
            f"group must be a multiple of {patch}, the frames that this model joins to one, "
            f"got {group}"
        )
