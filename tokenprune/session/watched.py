"""What a session knows of the frames it has watched: one state, saved as one."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tokenprune.engine.cache import new_cache
from tokenprune.engine.state import cache_from_state, cache_state
from tokenprune.errors import TokenPruneError
from tokenprune.models.loaded import LoadedModel
from tokenprune.report.change import Change, MediaTokens
from tokenprune.report.seconds import Phases, Seconds
from tokenprune.session.script import Pace, Script, Tokens

__all__ = ["Watched", "WatchedGroup"]


@dataclass(frozen=True)
class WatchedGroup:
    """What became of one group of frames.

    Attributes:
        first_frame: Number of its first frame among those watched, from 0.
        frames: How many it holds.
        media_tokens: Counts before and after pruning, and what each site let through.
        kv_bytes: Bytes of the whole cache after it: unpruned, and as measured.
        began_seconds: When the session began to wait for it, since the session was made.
        seconds: How long each part took: `index` of a file with its first group, `decode` for
            which its frames were waited; both are 0 for frames that were given.
        phases: When each part was under way. Decoding ran before the session waited.
    """

    first_frame: int
    frames: int
    media_tokens: MediaTokens
    kv_bytes: Change[int]
    began_seconds: float
    seconds: Seconds
    phases: Phases

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "first_frame": self.first_frame,
            "frames": self.frames,
            "media_tokens": self.media_tokens.as_dict(),
            "kv_bytes": self.kv_bytes.as_dict(),
            "began_seconds": self.began_seconds,
            **{f"{name}_seconds": spent for name, spent in self.seconds.as_dict().items()},
            "spans": self.phases.as_dict(),
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> WatchedGroup:
        """The group that `as_dict` wrote."""
        spent = {name.removesuffix("_seconds"): value for name, value in plain.items()}
        return cls(
            plain["first_frame"],
            plain["frames"],
            MediaTokens.from_dict(plain["media_tokens"]),
            Change(**plain["kv_bytes"]),
            plain["began_seconds"],
            Seconds(**{one.name: spent.get(one.name) for one in fields(Seconds)}),
            Phases.from_dict(plain["spans"]),
        )


@dataclass
class Watched:
    """The state of a session that has begun to watch.

    Attributes:
        script: How the processor writes groups of these frames; knows their size and rate.
        cache: The pruned cache of all groups.
        prompt: The prompt that it stands for, pruned tokens included.
        groups: What became of each group, in order.
        source_frames: Frames of the source that went by, watched or not.
        counted: Items, canvases and frames that layouts have numbered so far.
        pictures_decoded: Frames that decoders gave, of all files.
        bytes_read: Bytes of their packets that were read.
    """

    script: Script
    cache: Cache
    prompt: Tokens = field(default_factory=Tokens.none)
    groups: list[WatchedGroup] = field(default_factory=list)
    source_frames: int = 0
    counted: tuple[int, int, int] = (0, 0, 0)
    pictures_decoded: int = 0
    bytes_read: int = 0

    @classmethod
    def nothing(cls, loaded: LoadedModel, script: Script) -> Watched:
        """The state before the first group."""
        language_model: Any = loaded.adapter.language_model
        return cls(script, new_cache(language_model.config))

    @property
    def end_seconds(self) -> float:
        """When the last of what was timed ended, since the session was made."""
        ends = (end for group in self.groups for _, end in group.phases.spans)
        return max(ends, default=0.0)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What makes it up: tensors by name, and the rest as plain numbers, texts and lists."""
        tensors, cache = cache_state(self.cache)
        inputs = {"ids": self.prompt.ids, **self.prompt.types, **self.prompt.media}
        tensors |= {f"tokens.{name}": torch.as_tensor(one) for name, one in inputs.items()}
        script = self.script
        return tensors, {
            "cache": cache,
            "types": list(self.prompt.types),
            "groups": [group.as_dict() for group in self.groups],
            "pace": asdict(script.pace),
            "size": script.size,
            "sized": script.sized,
            "script": script.as_dict(),
            "source_frames": self.source_frames,
            "counted": self.counted,
            "pictures_decoded": self.pictures_decoded,
            "bytes_read": self.bytes_read,
        }

    @classmethod
    def from_state(
        cls, loaded: LoadedModel, tensors: dict[str, Tensor], plain: dict[str, Any]
    ) -> Watched:
        """The state of a session that watched with this model.

        Args:
            loaded: The model and its processor.
            tensors: As from `state`.
            plain: As from `state`.

        Raises:
            TokenPruneError: The processor writes prompts otherwise than the one that watched.
        """
        height, width = plain["size"]
        script = Script(loaded, (height, width), plain["sized"], Pace(**plain["pace"]))
        if script.as_dict() != plain["script"]:
            raise TokenPruneError(
                "it was saved with a processor that writes prompts otherwise; load the same "
                "processor, or watch the video again"
            )
        device = loaded.model.device
        inputs = {
            name.removeprefix("tokens."): one.to(device)
            for name, one in tensors.items()
            if name.startswith("tokens.")
        }
        types = {name: inputs.pop(name) for name in plain["types"]}
        language_model: Any = loaded.adapter.language_model
        items, canvases, frames = plain["counted"]
        return cls(
            script,
            cache_from_state(language_model.config, tensors, plain["cache"], device),
            Tokens(inputs.pop("ids"), types, inputs),
            [WatchedGroup.from_dict(group) for group in plain["groups"]],
            plain["source_frames"],
            (items, canvases, frames),
            plain["pictures_decoded"],
            plain["bytes_read"],
        )
