"""Writing a prompt group by group: the tokens that the processor would have written at once.

Processors write whole prompts only. How the tokens of groups join is learnt from the processor
itself, with a few black frames: two groups in one prompt, against each in a prompt of its own.
What stands before the media is the prefix, what follows them the suffix, question included. Text
may stand between two groups (the joint), and a clip may end in tokens that only its end has (end
tokens): the next group takes them back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.video_utils import VideoMetadata

from tokenprune.errors import TokenPruneError, UnsupportedModelError
from tokenprune.media import Clip, Timings
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media

__all__ = ["FrameGroup", "Pace", "Script", "Tokens", "temporal_patch"]

_TYPES = ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
"""Inputs with one entry a token, beside the tokens themselves."""
_WHOLE_CLIP = ("video_grid_thw", "second_per_grid_ts", "video_second_per_grid")
"""What positions rest on, and what pixels alone do not tell."""
_ANY_QUESTION = "?"


@dataclass(frozen=True)
class Pace:
    """How the frames of a session lie in time.

    Attributes:
        source_fps: Frames per second of the source; a frame's index counts these.
        sampled_fps: Frames per second that are watched.
    """

    source_fps: float
    sampled_fps: float


class _PartMetadata(VideoMetadata):  # type: ignore[misc]  # transformers is untyped
    """Metadata of some frames of a clip: their rate is that of the clip."""

    rate: float = 0.0

    @property
    def sampled_fps(self) -> float:
        return self.rate


@dataclass(frozen=True, eq=False, repr=False)
class FrameGroup(Clip):
    """Some frames of the clip that a session watches.

    Attributes:
        pace: How the frames of the whole clip lie in time.
        timings: How long it took to get these.
    """

    pace: Pace
    timings: Timings = Timings(0.0, 0.0)

    @classmethod
    def at_pace(cls, frames: Tensor, indices: Tensor, pace: Pace) -> FrameGroup:
        """Frames that are shown when their indices `[F]` say so."""
        return cls(frames, indices.double() / pace.source_fps, indices, pace)

    @property
    def source_fps(self) -> float:
        """Frames per second of the source: a frame's index counts these."""
        return self.pace.source_fps

    @property
    def even_indices(self) -> Tensor:
        """`[F]`, the same as `indices`: those of a session count by an even clock."""
        return self.indices

    @property
    def metadata(self) -> VideoMetadata:
        """As of any clip; the sampled rate is that of the whole clip."""
        plain = super().metadata
        part = _PartMetadata(**{name: getattr(plain, name) for name in plain})
        part.rate = self.pace.sampled_fps
        return part


@dataclass
class Tokens:
    """Tokens of a prompt, with what the model must be told about them.

    Attributes:
        ids: `[1, S]`.
        types: `[1, S]` each, by the name of the model's argument.
        media: Pixels and what belongs to them.
    """

    ids: Tensor
    types: dict[str, Tensor]
    media: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def none(cls) -> Tokens:
        """No tokens."""
        return cls(torch.zeros(1, 0, dtype=torch.int64), {})

    def __len__(self) -> int:
        return self.ids.shape[1]

    def first(self, count: int) -> Tokens:
        """The first tokens, media left out."""
        types = {name: one[:, :count] for name, one in self.types.items()}
        return Tokens(self.ids[:, :count], types, dict(self.media))

    def then(self, more: Tokens) -> Tokens:
        """These tokens and others after them, which continue the same clip."""
        ids = torch.cat([self.ids, more.ids], dim=1)
        types = {
            name: torch.cat([one, more.types[name]], dim=1) for name, one in self.types.items()
        }
        media = {name: self.media.get(name, more.media.get(name)) for name in _WHOLE_CLIP}
        grid, added = self.media.get("video_grid_thw"), more.media.get("video_grid_thw")
        if grid is not None and added is not None:
            media["video_grid_thw"] = torch.cat([grid[:, :1] + added[:, :1], grid[:, 1:]], dim=1)
        return Tokens(ids, types, {name: one for name, one in media.items() if one is not None})


class Script:
    """How a processor writes a clip whose frames come in groups.

    Args:
        loaded: The model and its processor.
        size: Height and width of all frames.
        sized: Whether that is the size to which the processor would bring them.
        pace: How they lie in time.

    Attributes:
        size: Height and width of all frames.
        sized: Whether that is the size to which the processor would bring them.
        pace: How they lie in time.
        end_tokens: Tokens at the end of a clip that only its end has.
        ending: What follows the media, with some question.

    Raises:
        UnsupportedModelError: The processor writes groups otherwise than the whole.
    """

    def __init__(self, loaded: LoadedModel, size: tuple[int, int], sized: bool, pace: Pace) -> None:
        self._loaded = loaded
        self.size, self.sized, self.pace = size, sized, pace
        self._length = 2 * self.patch
        black = self._encode(self._black(0, self._length), _ANY_QUESTION)
        self._before, self._after = self._around(black["input_ids"][0].tolist())
        self._probe = self._inner(black)
        self._joint, self.end_tokens = self._join()
        self.ending = self._rest(black)

    @property
    def patch(self) -> int:
        """Frames that the model joins to one."""
        return temporal_patch(self._loaded)

    def write(self, group: FrameGroup, *, opening: bool) -> Tokens:
        """The tokens of a group and its media, without the suffix.

        Args:
            opening: Whether it is the first one, so that the prefix goes before it.
        """
        inputs = self._encode(group, _ANY_QUESTION)
        written = self._inner(inputs)
        ids = inputs["input_ids"]
        lead = self._before if opening else self._joint
        start, stop = len(self._before), len(self._before) + len(written)
        types = {}
        for name in _TYPES:
            if name in inputs:
                ahead = inputs[name][:, :start] if opening else ids.new_zeros(1, len(lead))
                types[name] = torch.cat([ahead.to(inputs[name]), inputs[name][:, start:stop]], 1)
        media = {
            name: value
            for name, value in inputs.items()
            if name not in ("input_ids", "attention_mask", *_TYPES)
        }
        return Tokens(ids.new_tensor([lead + written]), types, media)

    def black(self) -> tuple[Tokens, Tokens]:
        """A clip of black frames, and the same with as many after them."""
        first = self.write(self._black(0, self._length), opening=True)
        second = self.write(self._black(self._length, self._length), opening=False)
        return first, first.first(len(first) - self.end_tokens).then(second)

    def suffix(self, question: str) -> Tokens:
        """The tokens after the media, with a question.

        Raises:
            TokenPruneError: The question is empty, or holds a placeholder.
        """
        inputs = self._encode(self._black(0, self._length), question)
        ids = inputs["input_ids"]
        start = len(self._before) + len(self._probe)
        held = self._loaded.adapter.placeholders(ids[:, start:]).values()
        if ids[0, :start].tolist() != self._before + self._probe or any(map(torch.any, held)):
            raise TokenPruneError(
                f"a question about what was watched cannot hold media, got {question!r}; "
                "ask in words"
            )
        return self._rest(inputs)

    def as_dict(self) -> dict[str, Any]:
        """What was learnt, to be compared."""
        return {
            "before": self._before,
            "after": self._after,
            "probe": self._probe,
            "joint": self._joint,
            "end_tokens": self.end_tokens,
        }

    # -- how it is learnt

    def _encode(self, group: FrameGroup, question: str) -> dict[str, Any]:
        return self._loaded.encode(Media(group.frames, video=group, sized=self.sized), question)

    def _black(self, first: int, frames: int) -> FrameGroup:
        pictures = torch.zeros(1, 3, *self.size, dtype=torch.uint8).expand(frames, -1, -1, -1)
        return FrameGroup.at_pace(pictures, torch.arange(first, first + frames), self.pace)

    def _around(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """What of the text before and after the media the processor leaves as it is."""
        processor, loaded = self._loaded.processor, self._loaded
        kind = "video" if loaded.takes_video else "image"
        parts = 1 if loaded.takes_video else self._length
        content = [{"type": kind}] * parts + [{"type": "text", "text": _ANY_QUESTION}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        # Before transformers 5.11 Gemma 3 has another name for what stands for a picture in a chat.
        names = (f"{kind}_token", "boi_token")
        marks = [str(getattr(processor, name, None)) for name in names]
        mark = next((one for one in marks if one in text), marks[0])
        before, _, rest = text.partition(mark)
        after = rest.rpartition(mark)[2]
        tokenizer = processor.tokenizer
        opening = tokenizer(before)["input_ids"]
        ending = tokenizer(after, add_special_tokens=False)["input_ids"]
        start = _common(ids, opening)
        stop = _common(ids[:start:-1], ending[::-1])
        return ids[:start], ids[len(ids) - stop :]

    def _inner(self, inputs: dict[str, Any]) -> list[int]:
        """The tokens of the media, and those among them."""
        ids: list[int] = inputs["input_ids"][0].tolist()
        start, stop = len(self._before), len(ids) - len(self._after)
        if ids[:start] != self._before or ids[stop:] != self._after:
            raise self._refused()
        return ids[start:stop]

    def _rest(self, inputs: dict[str, Any]) -> Tokens:
        """The tokens after the media of a prompt that holds the probe."""
        start = len(self._before) + len(self._probe)
        types = {name: inputs[name][:, start:] for name in _TYPES if name in inputs}
        return Tokens(inputs["input_ids"][:, start:], types)

    def _join(self) -> tuple[list[int], int]:
        """The joint of two groups, and how many tokens close a clip."""
        second = self._inner(self._encode(self._black(self._length, self._length), _ANY_QUESTION))
        both = self._inner(self._encode(self._black(0, 2 * self._length), _ANY_QUESTION))
        extra = len(both) - len(self._probe) - len(second)
        end = len(self._probe) + min(extra, 0)
        joint = both[end : end + max(extra, 0)]
        if both != self._probe[:end] + joint + second:
            raise self._refused()
        return joint, max(-extra, 0)

    def _refused(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"the processor of {self._loaded.name} writes groups of frames otherwise than the "
            "whole video (it numbers or compares them), so they cannot be watched one by one; "
            "ask about the file at once, with `prune` or `tokenprune ask`"
        )


def temporal_patch(loaded: LoadedModel) -> int:
    """Frames that a model joins to one."""
    pictures = getattr(loaded.processor, "video_processor", None)
    return int(getattr(pictures, "temporal_patch_size", None) or 1)


def _common(one: list[int], other: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = zip(one, other, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
