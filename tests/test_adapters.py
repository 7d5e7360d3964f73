"""Layouts, maps and pixels of every family, against the model's own packing.

A patch is painted: the tower's chosen block is made to output numbers of our choice, and what
follows passes them on unmixed. Where they turn up among the embeddings says what each placeholder
stands for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import NAMES, Tiny, build, family_of
from tokenprune.adapter import Adapter, MediaCall, adapter_for
from tokenprune.layout import AUDIO, MODALITIES, TokenLayout
from tokenprune.layout import IMAGE as IMAGES

CHANNELS = 4
CLASS_TOKEN = 999.0
NEWLINE = -1.0

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen2_5_omni")
PAINTED = [name for name in NAMES if name not in ("qwen2_audio", "llava_pixtral")]


@dataclass
class Seen:
    """What a forward of the model let us see."""

    calls: list[MediaCall]
    prompt: dict[str, Any]
    embeddings: Tensor


@contextmanager
def watching(tiny: Tiny) -> Iterator[Seen]:
    """Record encoder calls as an engine would, and the embeddings that enter the decoder."""
    adapter = adapter_for(tiny.model)
    seen = Seen([], {}, torch.empty(0))
    inside: list[MediaCall] = []

    def watch(owner: nn.Module, name: str, modality: Any) -> Callable[..., Any]:
        encode = getattr(owner, name)
        signature = inspect.signature(encode)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return encode(*args, **kwargs)
            call = MediaCall(modality, dict(signature.bind(*args, **kwargs).arguments))
            seen.calls.append(call)
            inside.append(call)
            try:
                return encode(*args, **kwargs)
            finally:
                inside.pop()

        return watched

    def on_prompt(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.prompt = kwargs

    def on_embeddings(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.embeddings = kwargs["inputs_embeds"]

    with ExitStack() as stack:
        for path, modality in adapter.encoders().items():
            *inner, name = path.split(".")
            owner = adapter.base_model.get_submodule(".".join(inner))
            setattr(owner, name, watch(owner, name, modality))
            stack.callback(delattr, owner, name)
        for module, hook in (
            (adapter.base_model, on_prompt),
            (adapter.language_model, on_embeddings),
        ):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with torch.no_grad():
            yield seen


def look(tiny: Tiny, inputs: dict[str, Any]) -> tuple[Adapter, Seen]:
    with watching(tiny) as seen:
        tiny.model(**inputs)
    return adapter_for(tiny.model), seen


def layouts(adapter: Adapter, seen: Seen, inputs: dict[str, Any]) -> list[TokenLayout]:
    return [one for one, _ in adapter.layouts(inputs["input_ids"], seen.calls, seen.prompt)]


# -- painting


def passed_on(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values[..., :CHANNELS], (0, width - CHANNELS))


class Paint:
    """Numbers `[patches, 4]` for all patches of a call, in the order of its pixels."""

    def __init__(self, tiny: Tiny, values: dict[str, Tensor]) -> None:
        self.tiny = tiny
        self.values = values
        self.encoded: dict[str, Tensor] = {}  # as the block puts them out, per modality
        self.base: Any = tiny.model.model
        self.width = tiny.model.get_decoder().config.hidden_size

    def __enter__(self) -> Paint:
        self.hooks: list[Any] = []
        adapter = adapter_for(self.tiny.model)
        tower = adapter.tower("video" if "video" in self.values else "image")
        assert tower is not None
        self.tower = tower
        if family_of(self.tiny.name) in QWEN:
            visual = self.base.visual
            if hasattr(visual, "pos_embed"):
                visual.pos_embed.weight.zero_()
            self.hook(visual.patch_embed, lambda x, y: passed_on(self.next_values(), y.shape[-1]))
            for block in visual.blocks:
                self.hook(block, lambda x, y: x)
            self.hook(tower.block, self.note)
            self.hook(visual.merger, self.merge)
        else:
            self.hook(tower.block, self.cover)
            self.hook(self.base.multi_modal_projector, self.project)
            newline = getattr(self.base, "image_newline", None)
            if newline is not None:
                newline.fill_(NEWLINE)
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def hook(self, module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        def changed(module: nn.Module, args: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (change(args[0], output[0]), *output[1:])
            return change(args[0], output)

        self.hooks.append(module.register_forward_hook(changed))

    def next_values(self) -> Tensor:
        """Images are encoded before videos."""
        self.modality = next(name for name in ("image", "video") if name in self.values)
        return self.values.pop(self.modality)

    def cover(self, hidden: Tensor, output: Tensor) -> Tensor:
        values = self.next_values().reshape(len(output), -1, CHANNELS)
        self.encoded[self.modality] = values
        start = torch.full((len(output), self.tower.prefix_tokens, CHANNELS), CLASS_TOKEN)
        return passed_on(torch.cat([start, values], dim=1), output.shape[-1])

    def note(self, hidden: Tensor, output: Tensor) -> Tensor:
        self.encoded[self.modality] = output[..., :CHANNELS]
        return output

    def project(self, hidden: Tensor, output: Tensor) -> Tensor:
        if self.tiny.name == "internvl":  # the channels of four patches lie side by side
            hidden = hidden.reshape(*hidden.shape[:2], 4, -1).mean(dim=2)
        return passed_on(hidden, self.width)

    def merge(self, hidden: Tensor, output: Tensor) -> Tensor:
        return passed_on(hidden.reshape(-1, 4, hidden.shape[-1]).mean(dim=1), self.width)


def raster(frames: int, rows: int, columns: int) -> Tensor:
    """Frame, row and column of each patch, row by row: `[patches, 3]`."""
    return torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))


def merged_raster(frames: int, rows: int, columns: int) -> Tensor:
    """The same in the order of Qwen's processors: the four patches of a token together."""
    order = [
        (frame, row + y, column + x)
        for frame in range(frames)
        for row in range(0, rows, 2)
        for column in range(0, columns, 2)
        for y in range(2)
        for x in range(2)
    ]
    return torch.tensor(order)


def tiled(rows: int, columns: int) -> Tensor:
    """A base view of 4x4 patches, then tiles of as many, placed on one canvas."""
    views = [raster(1, 4, 4)]
    for row in range(rows):
        for column in range(columns):
            views.append(raster(1, 4, 4) + torch.tensor([0, 4 * row, 4 * column]))
    return torch.cat(views)


def numbered(parts: list[tuple[int, Tensor]]) -> Tensor:
    """Put the number of its canvas before frame, row and column of each patch."""
    rows = [torch.cat([torch.full((len(part), 1), n), part], dim=1) for n, part in parts]
    return torch.cat(rows).float()


def per_frame(patches: Tensor, first: int) -> list[tuple[int, Tensor]]:
    frames = patches[:, 0].unique().tolist()
    return [(first + frame, patches[patches[:, 0] == frame]) for frame in frames]


def qwen_values(inputs: dict[str, Any]) -> dict[str, Tensor]:
    values = {}
    for name in ("image", "video"):
        parts: list[tuple[int, Tensor]] = []
        for grid in inputs.get(f"{name}_grid_thw", torch.empty(0)).tolist():
            parts += per_frame(merged_raster(*grid), len(parts))
        if parts:
            values[name] = numbered(parts)
    return values


def vit_values(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    if "pixel_values_videos" in inputs:
        clips, frames = inputs["pixel_values_videos"].shape[:2]
        parts = [
            part for clip in range(clips) for part in per_frame(raster(frames, 4, 4), clip * frames)
        ]
        return {"video": numbered(parts)}
    side = 6 if name == "internvl" else 4
    if "image_sizes" not in inputs or name == "llava_onevision_images":
        views = len(inputs["pixel_values"])
        return {"image": numbered([(view, raster(1, side, side)) for view in range(views)])}
    parts = []
    for image, size in enumerate(inputs["image_sizes"].tolist()):
        patches = tiled(*TILES[tuple(size)])
        parts += [(2 * image, patches[:16]), (2 * image + 1, patches[16:])]
    return {"image": numbered(parts)}


TILES = {(90, 112): (2, 2), (50, 112): (1, 2), (180, 112): (4, 2), (56, 56): (1, 2)}
"""Rows and columns of tiles, by size of the image."""

CROPPED = {(90, 112): (1, 0), (50, 112): (0, 0), (180, 112): (2, 0), (56, 56): (0, 2)}
"""Rows and columns of patches that are padding, above and left of the picture."""


def patches_of(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    if family_of(name) in QWEN:
        return qwen_values(inputs)
    return vit_values(name, inputs)


def expected(name: str, inputs: dict[str, Any], layout: TokenLayout, b: int) -> Tensor:
    """Frame, row and column of the patches below each token, on average: `[N, 3]`."""
    place = torch.stack([layout.row, layout.column], dim=1).float()
    if family_of(name) in QWEN or name in ("internvl", "llava_onevision", "llava_next_video"):
        place = 2 * place + 0.5
    elif "image_sizes" in inputs and name != "llava_onevision_images":
        size = tuple(inputs["image_sizes"][b].tolist())
        on_tiles = layout.canvas == 1
        if size == (180, 112) and name == "llava_onevision_image":  # 12x8 is shrunk to 4x3
            shrunk = (place + 0.5) * torch.tensor([12 / 4, 8 / 3]) - 0.5
            place = torch.where(on_tiles[:, None], shrunk, place)
        place[on_tiles] += torch.tensor(CROPPED[size]).float()
    return torch.cat([layout.frame.clamp(min=0)[:, None].float(), place], dim=1)


def first_seen(*columns: Tensor) -> list[int]:
    """Number equal rows in the order in which they appear."""
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    order = {row: number for number, row in enumerate(dict.fromkeys(rows))}
    return [order[row] for row in rows]


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("name", PAINTED)
def test_layout_says_where_each_token_comes_from(name: str, batched: bool) -> None:
    tiny = build(name)
    inputs = tiny.batch() if batched else tiny.inputs()
    with watching(tiny) as seen, Paint(tiny, patches_of(name, inputs)):
        tiny.model(**inputs)
    found = layouts(adapter_for(tiny.model), seen, inputs)
    tokens = adapter_for(tiny.model).token_ids()
    for b, layout in enumerate(found):
        seeing = layout[layout.modality != AUDIO]
        painted = seen.embeddings[b, seeing.position, :CHANNELS]
        torch.testing.assert_close(
            painted[:, 1:], expected(name, inputs, seeing, b), rtol=0, atol=2e-5
        )
        assert first_seen(seeing.canvas) == first_seen(seeing.modality, painted[:, 0].round())
        # All other placeholders are newlines.
        ids = inputs["input_ids"][b]
        others = torch.zeros(len(ids), dtype=torch.bool)
        for modality, token in tokens.items():
            others |= (ids == token) & (modality != "audio")
        others[seeing.position] = False
        assert (seen.embeddings[b, others, :CHANNELS] == NEWLINE).all()


@pytest.mark.parametrize("name", NAMES)
def test_layout_counts_media_in_order(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    ids = inputs["input_ids"][0, layout.position]
    for modality, token in adapter.token_ids().items():
        assert (ids[layout.modality == MODALITIES[modality]] == token).all()
    assert (layout.position.diff() > 0).all()
    assert layout.item.unique().tolist() == list(range(int(layout.item.max()) + 1))
    assert layout.canvas.unique().tolist() == list(range(int(layout.canvas.max()) + 1))
    newlines = NEWLINES.get(name, 0)
    assert len(layout) + newlines == sum(
        int((inputs["input_ids"] == token).sum()) for token in adapter.token_ids().values()
    )
    assert layout.item.unique().numel() == ITEMS[name]
    assert (layout.frame >= 0).eq(layout.modality != IMAGES).all()
    assert (layout.row >= 0).eq(layout.modality != AUDIO).all()


NEWLINES = {
    "llava_next": 6,
    "llava_next_video_image": 6,
    "llava_onevision": 1,
    "llava_onevision_image": 4,
    "llava_onevision_images": 3,
}
ITEMS = {
    "internvl": 4,
    "llava": 2,
    "llava_next": 1,
    "llava_next_video": 1,
    "llava_next_video_image": 1,
    "llava_onevision": 1,
    "llava_onevision_image": 1,
    "llava_onevision_images": 3,
    "llava_pixtral": 2,
    "qwen2_5_omni": 2,
    "qwen2_5_vl": 2,
    "qwen2_5_vl_video": 1,
    "qwen2_audio": 2,
    "qwen2_vl": 2,
    "qwen3_vl": 2,
    "qwen3_vl_video": 1,
}
