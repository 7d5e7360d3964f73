"""Layouts, maps and pixels of every family, against the model's own packing.

A patch is painted: the tower's chosen block is made to output numbers of our choice, and what
follows passes them on unmixed. Where they turn up among the embeddings says what each placeholder
stands for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.beams import failure_of_beams
from tests.contract.cases import NO_BEAMS, SOUND_ONLY, TORN_BY_BEAMS
from tests.releases import NEWEST
from tokenprune import prune
from tokenprune.adapters.base import Adapter, MediaCall, adapter_for, list_models
from tokenprune.adapters.qwen2_audio import audio_items
from tokenprune.core.layout import AUDIO, MODALITIES, VIDEO, TokenLayout
from tokenprune.core.layout import IMAGE as PICTURE
from tokenprune.engine.layouts import lay_out
from tokenprune.errors import UnsupportedModelError
from tokenprune.testing.tiny import (
    FAMILIES,
    IMAGE,
    NAMES,
    VISION_END,
    VISION_START,
    Tiny,
    build,
    decoder_of,
    family_of,
    pad_batch,
)
from tokenprune.testing.tiny.grids import VIDEO_END, VIDEO_START
from tokenprune.testing.tiny.releases import RELEASE
from tokenprune.testing.tiny.tiles import GLOBAL

CHANNELS = 4
CLASS_TOKEN = 999.0
NEWLINE = -1.0

QWEN = (
    "glm4v",
    "qwen2_5_omni",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_omni_moe",
    "qwen3_vl",
    "qwen3_vl_moe",
)
GRIDS = (*QWEN, "video_llama_3")
"""Families whose towers put pictures of any size into one sequence."""
OMNI = ("qwen2_5_omni", "qwen3_omni_moe")
IDEFICS = ("idefics3", "smolvlm")
PIXTRAL = ("llava_pixtral", "mistral3")
PERCEIVING = ("longva", "perception_lm")
PAINTED = [name for name in NAMES if name not in SOUND_ONLY]


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

        @functools.wraps(encode)  # generate looks at the signature
        def watched(*args: Any, **kwargs: Any) -> Any:
            if inside:
                return encode(*args, **kwargs)
            bound = signature.bind(*args, **kwargs).arguments
            arguments = {**bound, **bound.pop("kwargs", {})}
            call = MediaCall(adapter.modality(modality, arguments, seen.prompt), arguments)
            seen.calls.append(call)
            inside.append(call)
            try:
                return encode(*args, **kwargs)
            finally:
                inside.pop()

        return watched

    def on_prompt(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.prompt = {"input_ids": args[0] if args else None, **kwargs}

    def on_embeddings(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.embeddings = kwargs.get("inputs_embeds")

    def on_first_layer(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if seen.embeddings is None:  # the language model was given ids
            seen.embeddings = args[0]

    with ExitStack() as stack:
        for path, modality in adapter.encoders().items():
            *inner, name = path.split(".")
            owner = adapter.base_model.get_submodule(".".join(inner))
            setattr(owner, name, watch(owner, name, modality))
            stack.callback(delattr, owner, name)
        for module, hook in (
            (adapter.base_model, on_prompt),
            (adapter.language_model, on_embeddings),
            (adapter.language_model.layers[0], on_first_layer),
        ):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        with torch.no_grad():
            yield seen


def look(tiny: Tiny, inputs: dict[str, Any]) -> tuple[Adapter, Seen]:
    with watching(tiny) as seen:
        tiny.model(**inputs)
    return adapter_for(tiny.model), seen


def layouts(adapter: Adapter, seen: Seen, inputs: dict[str, Any]) -> list[TokenLayout]:
    return [one for one, _ in lay_out(adapter, inputs["input_ids"], seen.calls, seen.prompt)]


# -- painting


def passed_on(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values[..., :CHANNELS], (0, width - CHANNELS))


def inner(tower: Any) -> Any:
    """What holds the blocks; older releases of transformers wrap it once more."""
    return getattr(tower, "vision_model", tower)


def pictures_in(inputs: dict[str, Any]) -> str:
    """What inputs call their images; releases of transformers differ for Video-LLaVA."""
    return "pixel_values_images" if "pixel_values_images" in inputs else "pixel_values"


class Paint:
    """Numbers `[patches, 4]` for all patches of a call, in the order of its pixels."""

    def __init__(self, tiny: Tiny, values: dict[str, Tensor]) -> None:
        self.tiny = tiny
        self.values = values
        self.encoded: dict[str, Tensor] = {}  # as the block puts them out, per modality
        self.base: Any = adapter_for(tiny.model).base_model
        self.width = decoder_of(tiny.model).config.hidden_size

    def __enter__(self) -> Paint:
        self.hooks: list[Any] = []
        adapter = adapter_for(self.tiny.model)
        tower = adapter.tower("video" if "video" in self.values else "image")
        assert tower is not None
        self.tower = tower
        family = family_of(self.tiny.name)
        if family in QWEN:
            visual = self.base.visual
            if hasattr(visual, "pos_embed"):
                visual.pos_embed.weight.zero_()
            self.hook(visual.patch_embed, self.begin)
            for block in visual.blocks:
                self.hook(block, self.leave)
            self.hook(tower.block, self.note)
            if family == "glm4v":
                for norm in (visual.post_conv_layernorm, visual.embeddings, visual.post_layernorm):
                    self.hook(norm, self.leave)
                self.hook(visual.downsample, self.shrink)
                self.hook(visual.merger, self.leave)
            else:
                self.hook(visual.merger, self.merge)
        elif family == "video_llama_3":
            vision = self.base.vision_model
            self.hook(vision.embeddings, self.begin)
            for block in vision.encoder.layers:
                self.hook(block, self.leave)
            self.hook(tower.block, self.note)
            self.hook(vision.post_layernorm, self.leave)
            self.hook(self.base.projector, lambda x, y: passed_on(x, self.width))
        elif family in IDEFICS:
            self.hook(tower.block, self.cover)
            self.hook(self.base.vision_model.post_layernorm, self.leave)
            self.hook(self.base.connector.modality_projection, self.project)
        elif family == "gemma3":
            self.hook(tower.block, self.cover)
            self.hook(inner(self.base.vision_tower).post_layernorm, self.leave)
            projector = self.base.multi_modal_projector
            self.hook(projector.mm_soft_emb_norm, self.leave)
            torch.nn.init.eye_(projector.mm_input_projection_weight)
        elif family == "mistral3":
            projector = self.base.multi_modal_projector
            self.hook(tower.block, self.cover)
            self.hook(projector.patch_merger.merging_layer, self.unfold)
            self.hook(projector.linear_1, lambda x, y: passed_on(x, self.width))
            for module in (projector.norm, projector.act, projector.linear_2):
                self.hook(module, self.leave)
        elif family == "aya_vision":
            projector = self.base.multi_modal_projector
            self.hook(tower.block, self.cover)
            self.hook(projector.layernorm, self.leave)
            self.hook(projector.linear_1, self.keep)
            self.hook(projector.linear_2, self.give)
        elif family in PERCEIVING:
            projector = self.base.multi_modal_projector
            self.hook(tower.block, self.cover)
            if hasattr(self.base.vision_tower, "timm_model"):
                self.hook(self.base.vision_tower.timm_model.norm, self.leave)
            self.hook(projector.linear_1, lambda x, y: passed_on(x, self.width))
            for module in (projector.gelu, projector.linear_2):
                self.hook(module, self.leave)
        elif family == "phi4_multimodal":
            images = self.base.embed_tokens_extend.image_embed
            self.hook(tower.block, self.cover)
            self.hook(images.img_projection_up, self.hold)
            self.hook(images.img_projection_down, self.give)
            images.sub_img_feature_extensor.fill_(NEWLINE)
            images.global_img_feature_extensor.fill_(NEWLINE)
        elif family == "video_llava":
            for modality in self.values:
                self.hook(adapter.tower(modality).block, self.cover)
            self.hook(self.base.multi_modal_projector, self.project)
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

    def begin(self, hidden: Tensor, output: Tensor) -> Tensor:
        return passed_on(self.next_values(), output.shape[-1])

    def leave(self, hidden: Tensor, output: Tensor) -> Tensor:
        return hidden

    def shrink(self, hidden: Tensor, output: Tensor) -> Tensor:
        return passed_on(hidden.mean(dim=(2, 3)), self.width)

    def cover(self, hidden: Tensor, output: Tensor) -> Tensor:
        values = self.next_values().reshape(len(output), -1, CHANNELS)
        self.encoded[self.modality] = values
        start = torch.full((len(output), self.tower.prefix_tokens, CHANNELS), CLASS_TOKEN)
        return passed_on(torch.cat([start, values], dim=1), output.shape[-1])

    def note(self, hidden: Tensor, output: Tensor) -> Tensor:
        self.encoded[self.modality] = output[..., :CHANNELS]
        return output

    def unfold(self, hidden: Tensor, output: Tensor) -> Tensor:
        return passed_on(hidden.unflatten(1, (-1, 4)).mean(dim=2), output.shape[1])

    def keep(self, hidden: Tensor, output: Tensor) -> Tensor:
        self.kept = passed_on(hidden.unflatten(3, (4, -1)).mean(dim=3), self.width)
        return output

    def hold(self, hidden: Tensor, output: Tensor) -> Tensor:
        self.kept = passed_on(hidden, self.width)
        return output

    def give(self, hidden: Tensor, output: Tensor) -> Tensor:
        return self.kept

    def project(self, hidden: Tensor, output: Tensor) -> Tensor:
        if family_of(self.tiny.name) in ("internvl", *IDEFICS):
            # The channels of four patches lie side by side.
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


def grid_values(inputs: dict[str, Any]) -> dict[str, Tensor]:
    values = {}
    for name in ("image", "video"):
        parts: list[tuple[int, Tensor]] = []
        merges = inputs.get(f"{name}_merge_sizes", torch.tensor([2])).tolist()
        order = merged_raster if merges[0] == 2 else raster
        for grid in inputs.get(f"{name}_grid_thw", torch.empty(0)).tolist():
            parts += per_frame(order(*grid), len(parts))
        if parts:
            values[name] = numbered(parts)
    return values


def idefics_values(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Two rows of three tiles and the whole image, then an image in one piece; or one tiling."""
    views = (inputs["pixel_values"] != 0).flatten(2).any(dim=2).sum(dim=1).tolist()
    parts = []
    for count in views:
        tilings = [(0, 0)] * count if name.endswith("_frames") else TILINGS[count]
        for rows, columns in tilings:
            tiles = [
                raster(1, 4, 4) + torch.tensor([0, 4 * y, 4 * x])
                for y in range(rows)
                for x in range(columns)
            ]
            if tiles:
                parts.append((len(parts), torch.cat(tiles)))
            parts.append((len(parts), raster(1, 4, 4)))
    return {"image": numbered(parts)}


def kin_values(name: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Views in the order of encoding; those of a Pixtral tower have any size."""
    values = {}
    if pictures_in(inputs) in inputs:
        count = inputs[pictures_in(inputs)].shape[:-3].numel()
        sides = inputs["image_sizes"] // 14 if name in PIXTRAL else torch.full((count, 2), 4)
        parts = [(n, raster(1, *side)) for n, side in enumerate(sides.tolist())]
        values["image"] = numbered(parts)
    if "pixel_values_videos" in inputs:
        count = inputs["pixel_values_videos"].shape[:2].numel()
        clips = len(inputs["pixel_values_videos"])
        values["video"] = numbered(per_frame(raster(count, 4, 4), 0))
        values["video"][:, 1] %= count // clips
    return values


def phi4_values(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Of each image all of it, its tiles, and what fills up its views."""
    views = inputs["image_pixel_values"].shape[1]
    parts = []
    for number, (height, width) in enumerate(inputs["image_sizes"].tolist()):
        tiles = tiled(height // 56, width // 56)
        blank = torch.zeros(16 * views - len(tiles), 3)
        parts += [(3 * number, tiles[:16]), (3 * number + 1, tiles[16:]), (3 * number + 2, blank)]
    return {"image": numbered(parts)}


TILINGS = {8: [(2, 3), (0, 0)], 3: [(2, 1)]}
"""Rows and columns of tiles of each image of a prompt, by its number of views."""


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
    if family_of(name) in GRIDS:
        return grid_values(inputs)
    if family_of(name) in IDEFICS:
        return idefics_values(name, inputs)
    if name in PIXTRAL or family_of(name) in (*PERCEIVING, "aya_vision", "video_llava"):
        return kin_values(name, inputs)
    if family_of(name) == "phi4_multimodal":
        return phi4_values(inputs)
    return vit_values(name, inputs)


def expected(name: str, inputs: dict[str, Any], layout: TokenLayout, b: int) -> Tensor:
    """Frame, row and column of the patches below each token, on average: `[N, 3]`."""
    place = torch.stack([layout.row, layout.column], dim=1).float()
    halved = (*QWEN, *IDEFICS, *PERCEIVING, "aya_vision", "gemma3", "internvl", "mistral3")
    halved += ("phi4_multimodal",)
    if family_of(name) in halved or name in ("llava_onevision", "llava_next_video"):
        place = 2 * place + 0.5
    elif family_of(name) == "video_llama_3":  # frames are merged, images are not
        merged = (layout.modality == VIDEO)[:, None]
        place = torch.where(merged, 2 * place + 0.5, place)
    elif "image_sizes" in inputs and name not in ("llava_onevision_images", "llava_pixtral"):
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
        # All other placeholders are newlines, or class tokens.
        ids = inputs["input_ids"][b]
        others = torch.zeros(len(ids), dtype=torch.bool)
        for modality, token in tokens.items():
            others |= (ids == token) & (modality != "audio")
        others[seeing.position] = False
        separator = CLASS_TOKEN if family_of(name) == "video_llava" else NEWLINE
        assert (seen.embeddings[b, others, :CHANNELS] == separator).all()


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
        int((inputs["input_ids"] == token).sum()) for token in set(adapter.token_ids().values())
    )
    assert layout.item.unique().numel() == ITEMS[name]
    assert (layout.frame >= 0).eq(layout.modality != PICTURE).all()
    assert (layout.row >= 0).eq(layout.modality != AUDIO).all()


NEWLINES = {
    "llava_next": 6,
    "llava_next_video_image": 6,
    "llava_onevision": 1,
    "llava_onevision_image": 4,
    "llava_onevision_images": 3,
    "phi4_multimodal": 6,
    "phi4_multimodal_sounds": 6,
    "video_llava": 2,
    "video_llava_video": 3,
}
ITEMS = {
    "audioflamingo3": 2,
    "aya_vision": 3,
    "aya_vision_windows": 3,
    "gemma3": 4,
    "gemma3_long": 24,
    "glm4v": 2,
    "glm4v_video": 1,
    "granite_speech": 2,
    "idefics3": 2,
    "internvl": 4,
    "llava": 2,
    "llava_next": 1,
    "llava_next_video": 1,
    "llava_next_video_image": 1,
    "llava_onevision": 1,
    "llava_onevision_image": 1,
    "llava_onevision_images": 3,
    "llava_pixtral": 2,
    "longva": 2,
    "longva_image": 2,
    "mistral3": 2,
    "perception_lm": 2,
    "perception_lm_image": 2,
    "phi4_multimodal": 2,
    "phi4_multimodal_sounds": 3,
    "qwen2_5_omni": 2,
    "qwen2_5_omni_interleaved": 2,
    "qwen2_5_vl": 2,
    "qwen2_5_vl_video": 1,
    "qwen2_audio": 2,
    "qwen2_vl": 2,
    "qwen3_omni_moe": 2,
    "qwen3_omni_moe_interleaved": 2,
    "qwen3_vl": 2,
    "qwen3_vl_moe": 2,
    "qwen3_vl_video": 1,
    "smolvlm": 2,
    "smolvlm_frames": 5,
    "video_llama_3": 1,
    "video_llama_3_compressed": 1,
    "video_llama_3_image": 3,
    "video_llava": 3,
    "video_llava_video": 1,
    "vipllava": 2,
    "voxtral": 2,
}


# -- maps


def views_of(values: Tensor, name: str, inputs: dict[str, Any], modality: str) -> list[Tensor]:
    """A map's values view by view: a view is an image, a tile or a frame."""
    if name in PIXTRAL:
        return list(values.flatten(0, 1).split((inputs["image_sizes"] // 14).prod(dim=1).tolist()))
    if family_of(name) not in GRIDS:
        return list(values)
    grids = inputs[f"{modality}_grid_thw"].tolist()
    return list(values.split([h * w for t, h, w in grids for _ in range(t)]))


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("name", PAINTED)
def test_align_packs_a_map_as_the_model_packs_a_feature(name: str, batched: bool) -> None:
    tiny = build(name)
    inputs = tiny.batch() if batched else tiny.inputs()
    values = {key: torch.rand(one.shape) for key, one in patches_of(name, inputs).items()}
    with watching(tiny) as seen, Paint(tiny, values) as paint:
        tiny.model(**inputs)
    adapter = adapter_for(tiny.model)
    rows = lay_out(adapter, inputs["input_ids"], seen.calls, seen.prompt)
    aligned = {}
    for number, call in enumerate(seen.calls):
        if call.modality != "audio":
            maps = views_of(paint.encoded[call.modality][..., 0], name, inputs, call.modality)
            aligned[number] = adapter.align(call, maps)
    assert aligned
    for b, (layout, items) in enumerate(rows):
        for number, (call, place) in enumerate(items):
            if call not in aligned:
                continue
            position = layout.position[layout.item == number]
            packed = seen.embeddings[b, position, 0]
            torch.testing.assert_close(aligned[call][place], packed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PAINTED)
def test_align_keeps_a_constant(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    layouts(adapter, seen, inputs)
    for call in seen.calls:
        if call.modality == "audio":
            continue
        patches = patches_of(name, inputs)[call.modality]
        ones = torch.ones(len(patches), CHANNELS)
        if name in PIXTRAL:
            ones = ones[None]
        elif family_of(name) not in GRIDS:
            ones = ones.reshape(-1, 36 if name == "internvl" else 16, CHANNELS)
        for one in adapter.align(call, views_of(ones[..., 0], name, inputs, call.modality)):
            torch.testing.assert_close(one, torch.ones_like(one))


@pytest.mark.parametrize("batched", [False, True], ids=["one", "batch"])
@pytest.mark.parametrize("name", PAINTED)
def test_align_takes_each_channel_by_itself(name: str, batched: bool) -> None:
    tiny = build(name)
    inputs = tiny.batch() if batched else tiny.inputs()
    values = {key: torch.rand(one.shape) for key, one in patches_of(name, inputs).items()}
    with watching(tiny) as seen, Paint(tiny, values) as paint:
        tiny.model(**inputs)
    adapter = adapter_for(tiny.model)
    lay_out(adapter, inputs["input_ids"], seen.calls, seen.prompt)
    for call in seen.calls:
        if call.modality == "audio":
            continue
        maps = views_of(paint.encoded[call.modality], name, inputs, call.modality)
        together = adapter.align(call, maps)
        deeper = adapter.align(call, [one.unflatten(-1, (2, -1)) for one in maps])
        assert [len(one) for one in together] == [len(item.row) for item in call.items]
        for channel in range(CHANNELS):
            alone = adapter.align(call, [one[:, channel] for one in maps])
            for one, several, nested in zip(alone, together, deeper, strict=True):
                torch.testing.assert_close(several[:, channel], one, rtol=0, atol=1e-6)
                assert torch.equal(nested.flatten(1), several)


def test_order_of_windows_is_the_model_s() -> None:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    adapter: Any = adapter_for(build("qwen2_5_vl").model)
    grids = [(1, 8, 12), (3, 6, 10), (2, 4, 4)]
    if not hasattr(modeling_qwen2_5_vl, "get_vision_window_index"):
        pytest.skip("this release of transformers has no function for it")
    order, _ = modeling_qwen2_5_vl.get_vision_window_index(torch.tensor(grids), 2, 56, 14)
    assert adapter._order(grids).tolist() == order.tolist()


def test_a_windowed_last_block_is_no_tower_to_read() -> None:
    tiny = build("qwen2_5_vl")
    tiny.model.config.vision_config.fullatt_block_indexes = [0]
    assert adapter_for(tiny.model).tower("image") is None


@pytest.mark.parametrize(("layer", "block"), [(-2, 1), (-1, 2), (1, 0), (3, 2), ([-2, 1], 1)])
def test_tower_is_the_block_behind_the_features(layer: int | list[int], block: int) -> None:
    tiny = build("llava")
    tiny.model.config.vision_feature_layer = layer
    tower = adapter_for(tiny.model).tower("image")
    assert tower is not None
    assert tower.block is inner(tiny.model.model.vision_tower).encoder.layers[block]
    assert tower.prefix_tokens == 1


def test_embeddings_as_features_have_no_tower_to_read() -> None:
    tiny = build("llava")
    tiny.model.config.vision_feature_layer = 0
    assert adapter_for(tiny.model).tower("image") is None


# -- pixels

OPENAI = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
STATISTICS = {
    "internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "aya_vision": HALF,
    "gemma3": HALF,
    "idefics3": HALF,
    "llava_onevision": HALF,
    "perception_lm": HALF,
    "phi4_multimodal": HALF,
    "qwen3_omni_moe": HALF,
    "qwen3_vl": HALF,
    "qwen3_vl_moe": HALF,
    "smolvlm": HALF,
    "video_llama_3": HALF,
}


def test_grey_undoes_the_normalisation_of_released_processors() -> None:
    """Means and deviations that are written here are those of the processors."""
    import transformers

    for processor in ("CLIPImageProcessor", "LlavaNextImageProcessor", "Qwen2VLImageProcessor"):
        one = getattr(transformers, processor)()
        assert (tuple(one.image_mean), tuple(one.image_std)) == OPENAI
    one = transformers.SiglipImageProcessor()
    assert (tuple(one.image_mean), tuple(one.image_std)) == HALF
    one = transformers.Qwen3VLVideoProcessor()
    assert (tuple(one.image_mean), tuple(one.image_std)) == HALF


def normalised(levels: Tensor, family: str) -> Tensor:
    """Pictures `[..., 3, h, w]` of 0..255 as a processor hands them over."""
    mean, std = (torch.tensor(one)[:, None, None] for one in STATISTICS.get(family, OPENAI))
    return (levels / 255 - mean) / std


def cut(levels: Tensor, patches: Tensor) -> Tensor:
    """Grey pixels of patches, given by (frame, row, column), of pictures `[F, T, 3, h, w]`."""
    grey = levels.mean(dim=2).round()
    return torch.stack(
        [
            grey[frame, :, 14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)].flatten()
            for frame, row, column in patches.int().tolist()
        ]
    )


@pytest.mark.parametrize("name", PAINTED)
def test_grey_gives_the_pixels_below_each_token(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    values = patches_of(name, inputs)
    family = family_of(name)
    key = {"image": pictures_in(inputs), "video": "pixel_values_videos"}
    if family == "phi4_multimodal":
        key = {"image": "image_pixel_values"}
    truth: dict[str, list[Tensor]] = {}
    with watching(tiny) as seen:
        if family in GRIDS:
            moments = 1 if family == "video_llama_3" else 2
            for modality, patches in values.items():
                # One picture of these moments for each canvas, all of one size.
                rows, columns = (int(patches[:, n].max()) + 1 for n in (2, 3))
                canvases = int(patches[:, 0].max()) + 1
                levels = torch.randint(256, (canvases, moments, 3, 14 * rows, 14 * columns)).float()
                truth[modality] = [levels]
                pixels = normalised(levels, family)
                inputs[key[modality]] = torch.stack(
                    [
                        pixels[n, :, :, 14 * row :, 14 * column :][..., :14, :14]
                        .transpose(0, 1)
                        .flatten()
                        for n, _, row, column in patches.int().tolist()
                    ]
                )
        else:
            for modality in values:
                levels = torch.randint(256, inputs[key[modality]].shape).float()
                truth[modality] = list(levels.flatten(end_dim=-4))
                inputs[key[modality]] = normalised(levels, family)
        with Paint(tiny, dict(values)) as paint:
            tiny.model(**inputs)
    adapter = adapter_for(tiny.model)
    for call in seen.calls:
        if call.modality == "audio":
            continue
        grey = adapter.grey(call)
        encoded = paint.encoded[call.modality]
        assert grey is not None
        if family in GRIDS:
            (levels,) = truth[call.modality]
            wanted = list(cut(levels, encoded[:, [0, 2, 3]]).split([len(one) for one in grey]))
            assert len(grey) == len(levels)
        else:
            parts = [one.shape[-2:] for one in truth[call.modality]]
            if name in PIXTRAL:
                parts = inputs["image_sizes"].tolist()
            wanted = [
                cut(one[None, None], raster(1, height // 14, width // 14))
                for one, (height, width) in zip(truth[call.modality], parts, strict=True)
            ]
            assert len(grey) == len(wanted)
        for one, other in zip(grey, wanted, strict=True):
            assert torch.equal(one, other)


def test_grey_stays_within_bounds() -> None:
    tiny = build("llava")
    inputs = tiny.inputs()
    inputs["pixel_values"] *= 10
    adapter, seen = look(tiny, inputs)
    grey = torch.stack(adapter.grey(seen.calls[0]) or [])
    assert grey.shape == (2, 16, 196)
    assert (grey.min(), grey.max()) == (0, 255)
    assert torch.equal(grey, grey.round())


# -- rows of a batch


@pytest.mark.parametrize("name", NAMES)
def test_layout_of_a_batch_is_that_of_its_samples(name: str) -> None:
    tiny = build(name)
    alone = [tiny.inputs(0, 7), tiny.inputs(1, 4, short=True)]
    inputs = tiny.batch(0)
    adapter, seen = look(tiny, inputs)
    together = layouts(adapter, seen, inputs)
    for one, found in zip(alone, together, strict=True):
        _, seen = look(tiny, one)
        (layout,) = layouts(adapter, seen, one)
        padding = inputs["input_ids"].shape[1] - one["input_ids"].shape[1]
        assert_same(found, layout, padding)


def assert_same(one: TokenLayout, other: TokenLayout, shift: int = 0) -> None:
    assert torch.equal(one.position, other.position + shift)
    for column in ("modality", "item", "canvas", "frame", "row", "column"):
        assert torch.equal(getattr(one, column), getattr(other, column)), column
    torch.testing.assert_close(one.seconds, other.seconds, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NO_BEAMS])
def test_beams_share_the_media_of_their_sample(name: str) -> None:
    tiny = build(name)
    inputs = tiny.batch(0)
    if name in TORN_BY_BEAMS:  # generate repeats each sound: one a row
        inputs = pad_batch(tiny.inputs(0, 7, short=True), tiny.inputs(1, 4, short=True))
    elif RELEASE < NEWEST and failure_of_beams(name, "batch") is not None:
        pytest.skip("this release of transformers repeats each picture, and not those of a prompt")
    adapter, seen = look(tiny, inputs)
    alone = layouts(adapter, seen, inputs)
    found: list[TokenLayout] = []
    with watching(tiny) as seen:

        def on_prefill(*_: Any) -> None:
            if not found:
                found.extend(layouts(adapter, seen, seen.prompt))

        # Here all media are encoded, also by models that embed them late.
        hook = decoder_of(tiny.model).layers[0].register_forward_pre_hook(on_prefill)
        tiny.model.generate(
            **inputs,
            num_beams=3,
            max_new_tokens=1,
            do_sample=False,
            suppress_tokens=tiny.suppress,
        )
        hook.remove()
    assert len(found) == 3 * len(alone)
    for b, layout in enumerate(found):
        assert_same(layout, alone[b // 3])


@pytest.mark.parametrize("name", NAMES)
def test_placeholders_without_media_fail(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    fewer = inputs["input_ids"].clone()
    fewer[0, layout.position[3]] = 7
    for calls, ids in (([], inputs["input_ids"]), (seen.calls, fewer)):
        with pytest.raises(UnsupportedModelError, match=r"placeholders.*expand the placeholders"):
            lay_out(adapter, ids, calls, {**seen.prompt, "input_ids": ids})


def test_media_that_straddle_rows_fail() -> None:
    tiny = build("llava")
    adapter, seen = look(tiny, tiny.inputs())
    ids = torch.full((2, 20), 7)
    ids[0, :12] = ids[1, :] = IMAGE
    with pytest.raises(UnsupportedModelError, match="whole images, clips or sounds"):
        lay_out(adapter, ids, seen.calls, {})


@pytest.mark.parametrize("name", ["llava", "internvl", *SOUND_ONLY])
def test_text_alone_has_no_media(name: str) -> None:
    """Not even what an earlier prompt left behind."""
    tiny = build(name)
    adapter, seen = look(tiny, tiny.inputs())
    ids = torch.full((1, 9), 7)
    for calls in ([], seen.calls):
        ((layout, items),) = lay_out(adapter, ids, calls, {"input_ids": ids})
        assert len(layout) == 0
        assert items == []


def test_offset_moves_positions() -> None:
    tiny = build("qwen2_vl")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    ((moved, _),) = lay_out(adapter, inputs["input_ids"], seen.calls, seen.prompt, offset=100)
    assert_same(moved, layout, 100)


# -- what is particular to a family


@pytest.mark.parametrize(
    ("name", "step"),
    [("qwen2_5_vl_video", 1.0), ("qwen2_5_omni", 1.0), ("qwen3_omni_moe", 1.0), ("qwen2_vl", None)],
)
def test_seconds_of_frames(name: str, step: float | None) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    clip = layout[layout.modality == VIDEO]
    if step is None:
        assert clip.seconds.isnan().all()
    else:
        assert torch.equal(clip.seconds, clip.frame * step)
    assert layout[layout.modality == PICTURE].seconds[1:].isnan().all()


@pytest.mark.parametrize("name", ["qwen2_audio", "qwen2_5_omni"])
def test_sounds_have_25_tokens_a_second(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    heard = layout[layout.modality == AUDIO]
    for item in heard.item.unique():
        sound = heard[heard.item == item]
        assert torch.equal(sound.column, torch.arange(len(sound)))
        assert torch.equal(sound.frame, sound.column)
        torch.testing.assert_close(sound.seconds, sound.column.double() / 25)


def test_tokens_of_a_sound_are_as_many_as_the_tower_says() -> None:
    tower: Any = adapter_for(build("qwen2_audio").model).base_model.audio_tower
    lengths = torch.arange(4, 100)
    _, tokens = tower._get_feat_extract_output_lengths(lengths)
    assert [len(sound.real) for sound in audio_items(lengths)] == tokens.tolist()


def test_one_placeholder_a_sound_fails() -> None:
    tiny = build("qwen2_audio")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    prompt = {**seen.prompt, "input_ids": torch.tensor([[5, 157, 6, 155, 7]])}
    with pytest.raises(UnsupportedModelError, match="expand the placeholders"):
        lay_out(adapter, prompt["input_ids"], seen.calls, prompt)


def test_sound_of_unknown_length_fails() -> None:
    tiny = build("qwen2_audio")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    with pytest.raises(UnsupportedModelError, match="feature_attention_mask"):
        lay_out(adapter, inputs["input_ids"], seen.calls, {"input_ids": inputs["input_ids"]})


def test_pixtral_pictures_keep_their_shapes() -> None:
    tiny = build("llava_pixtral")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    rows = torch.cat([raster(1, 4, 5), raster(1, 2, 3)])
    assert torch.equal(torch.stack([layout.row, layout.column], dim=1), rows[:, 1:])


def test_class_token_among_the_features_is_no_patch() -> None:
    tiny = build("llava")
    tiny.model.config.vision_feature_select_strategy = "full"
    inputs = tiny.inputs()
    ids = [5, *[IMAGE] * 17, 6, *[IMAGE] * 17, 7]
    inputs |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids))}
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert layout.position.tolist() == [*range(2, 18), *range(20, 36)]


def test_tiles_of_an_unbroken_run_are_one_image() -> None:
    tiny = build("internvl")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert torch.bincount(layout.item).tolist() == [27, 9, 9, 9]
    assert torch.bincount(layout.canvas).tolist() == [9] * 6


def test_tiles_up_to_the_whole_picture_are_one_image() -> None:
    """Aya Vision: text stands between the tiles, and the whole picture comes last."""
    tiny = build("aya_vision")
    adapter, seen = look(tiny, inputs := tiny.inputs())
    (layout,) = layouts(adapter, seen, inputs)
    assert torch.bincount(layout.item).tolist() == [20, 4, 12]
    assert layout.canvas[::4].tolist() == [1, 2, 3, 4, 0, 5, 7, 8, 6]


def test_tiles_without_a_mark_after_them_are_images_of_their_own() -> None:
    tiny = build("aya_vision")
    adapter, seen = look(tiny, tiny.inputs())
    ids = torch.tensor([[IMAGE] * 36])
    ((layout, _),) = lay_out(adapter, ids, seen.calls, {"input_ids": ids})
    assert torch.bincount(layout.item).tolist() == [4] * 9


def test_class_tokens_of_frames_are_no_patches() -> None:
    tiny = build("video_llava_video")
    adapter, seen = look(tiny, inputs := tiny.inputs())
    (layout,) = layouts(adapter, seen, inputs)
    first = (inputs["input_ids"][0] == tiny.model.config.video_token_id).nonzero()[0]
    expected = [n for n in range(3 * 17) if n % 17]
    assert (layout.position - first).tolist() == expected


def test_each_modality_has_its_own_tower() -> None:
    tiny = build("video_llava")
    adapter, base = adapter_for(tiny.model), tiny.model.model
    for modality, tower in (("image", base.image_tower), ("video", base.video_tower)):
        found = adapter.tower(modality)
        assert found is not None
        assert found.block is inner(tower).encoder.layers[1]


def test_of_several_feature_layers_the_deepest_is_read() -> None:
    tiny = build("vipllava")  # layers -2 and 1 of three
    found = adapter_for(tiny.model).tower("image")
    assert found is not None
    assert found.block is inner(tiny.model.model.vision_tower).encoder.layers[1]


@pytest.mark.parametrize("name", PERCEIVING)
def test_images_and_clips_of_one_method_are_told_apart_prompt_after_prompt(name: str) -> None:
    tiny = build(name)
    with prune(tiny.model, "vflowopt(keep=0.5)") as report:
        for seed in (0, 1):
            tiny.model.generate(
                **tiny.inputs(seed), max_new_tokens=1, suppress_tokens=tiny.suppress
            )
    assert len(report.calls) == 2
    for call in report.calls:
        (layout,) = call.layouts
        assert torch.bincount(layout.modality).tolist() == [0, 8, 24]
        assert layout.frame[layout.modality == VIDEO].unique().tolist() == list(range(6))


def test_a_tower_that_attends_by_hand_fails() -> None:
    tiny = build("perception_lm")
    tower = adapter_for(tiny.model).tower("image")
    assert tower is not None
    for module in tower.block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    with pytest.raises(UnsupportedModelError, match="by hand.*TIMM_FUSED_ATTN=1"):
        with torch.no_grad(), prune(tiny.model, "vflowopt(keep=0.5)"):
            tiny.model(**tiny.inputs())
    # Nothing of the reading is left behind.
    with torch.no_grad(), prune(tiny.model, "random(keep=0.5)"):
        tiny.model(**tiny.inputs())


def test_frames_of_a_clip_stand_within_its_marks() -> None:
    """GLM-4.1V has one placeholder for images and frames."""
    adapter = adapter_for(build("glm4v").model)
    frame = [VISION_START, IMAGE, IMAGE, VISION_END]
    ids = torch.tensor([[5, *frame, VIDEO_START, *frame, 10, *frame, 11, VIDEO_END, 6, *frame]])
    held = {name: one.nonzero()[:, 1].tolist() for name, one in adapter.placeholders(ids).items()}
    assert held == {"image": [2, 3, 19, 20], "video": [7, 8, 12, 13]}
    # Frames that come later have no marks of their own, but types.
    ids = torch.tensor([[*frame, 10]])
    for kind, modality in ((1, "image"), (2, "video")):
        found = adapter.placeholders(ids, (ids == IMAGE).int() * kind)
        assert {name for name, one in found.items() if one.any()} == {modality}


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tiles_lie_side_by_side(name: str) -> None:
    """Canvas 0 of an image is all of it and comes last; an image in one piece has no other."""
    tiny = build(name)
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert torch.bincount(layout.canvas).tolist() == [4, 24, 4]
    assert torch.equal(layout.canvas[:24], torch.ones(24, dtype=torch.int64))
    tiles = layout[layout.canvas == 1]
    assert (int(tiles.row.max()), int(tiles.column.max())) == (3, 5)
    assert len(set(zip(tiles.row.tolist(), tiles.column.tolist(), strict=True))) == 24


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_views_whose_marks_say_nothing_are_images_of_their_own(name: str) -> None:
    tiny = build(name)
    inputs = tiny.inputs()
    marks = (inputs["input_ids"] >= GLOBAL) & (inputs["input_ids"] < IMAGE)
    inputs["input_ids"][marks] = GLOBAL
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert torch.bincount(layout.item).tolist() == [4] * 8
    assert layout.canvas.tolist() == layout.item.tolist()


def test_views_with_padding_inside_have_no_map() -> None:
    tiny = build("smolvlm")
    inputs = tiny.inputs()
    inputs["pixel_attention_mask"][0, 2, 40:] = 0
    with pytest.raises(UnsupportedModelError, match="padding inside"):
        with torch.no_grad(), prune(tiny.model, "vflowopt(keep=0.5)"):
            tiny.model(**inputs)


def test_what_a_processor_left_out_of_a_clip_has_no_token() -> None:
    """Of 8 tokens a frame, all of the first and five of each later one are in the prompt."""
    tiny = build("video_llama_3_compressed")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert torch.bincount(layout.frame).tolist() == [8, 5, 5, 5]
    later = layout[layout.frame == 2]
    assert (later.row * 4 + later.column).tolist() == [0, 2, 3, 5, 6]


@pytest.mark.parametrize("name", OMNI)
def test_sound_track_inside_a_clip(name: str) -> None:
    """`use_audio_in_video`: chunks of frames and of sound take turns."""
    tiny = build(f"{name}_interleaved")
    inputs = tiny.inputs()
    adapter, seen = look(tiny, inputs)
    (layout,) = layouts(adapter, seen, inputs)
    assert layout.modality.diff().count_nonzero() > 1
    assert layout.item.unique().tolist() == [0, 1]
    for modality, (column, count) in {VIDEO: ("frame", 3), AUDIO: ("column", 30)}.items():
        of = layout[layout.modality == modality]
        assert getattr(of, column).unique().tolist() == list(range(count))
        assert (of.seconds.diff() >= 0).all()
    # With a frame a second, what stands in the prompt between two frames is what is heard.
    assert (layout.seconds.floor().diff() >= 0).all()


def test_registry_lists_each_family() -> None:
    known = list_models()
    for name in FAMILIES:
        model = build(name).model
        assert type(adapter_for(model)) is known[model.config.model_type]


def test_unknown_model_type_fails() -> None:
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(UnsupportedModelError, match="no adapter for model_type 'qwen2'; known: "):
        adapter_for(transformers.Qwen2ForCausalLM(config))
