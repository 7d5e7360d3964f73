"""Real processors in front of the tiny models: what they make of media, adapters understand.

Pictures are slanted planes of grey. Grey levels of the tower's patches, sent through the model's
packing, must again be that plane at the rows and columns of the layout.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

from tests.adapters.test_adapters import layouts, watching
from tests.checkpoints import CHECKPOINTS, HEARING, SEEING, WATCHING
from tokenprune.adapters.base import adapter_for, list_models
from tokenprune.core.layout import AUDIO, TokenLayout
from tokenprune.models.load import auto_class
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.models.processors import call_processor
from tokenprune.testing.tiny.base import SPECIAL, Tiny

TILES_UNKNOWN = ("aya_vision", "internvl", "perception_lm")
"""Families whose models are not told how the tiles of an image lie."""

DOWN, ACROSS, LATER, START = 120.0, 60.0, 4.0, 30.0
"""Grey levels from top to bottom, from left to right, from frame to frame, and at the start."""

Checkpoint = Callable[[str], Path]


def plane(rows: int, columns: int, frame: float = 0.0) -> Tensor:
    """Grey levels at the centres of a grid laid over the picture: `[rows, columns]`."""
    down = (torch.arange(rows) + 0.5) / rows * DOWN
    across = (torch.arange(columns) + 0.5) / columns * ACROSS
    return down[:, None] + across + START + LATER * frame


def picture(height: int, width: int, frame: int = 0) -> Tensor:
    return plane(height, width, frame).round().to(torch.uint8).expand(3, -1, -1)


@functools.cache
def load(folder: Path) -> tuple[Tiny, Any]:
    """The model and the processor of a checkpoint."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config = getattr(config, "thinker_config", config)
    config = list_models()[config.model_type].fix_config(config)
    model, found = auto_class(config).from_pretrained(
        folder, config=config, output_loading_info=True
    )
    assert not any(found.values())
    processor = transformers.AutoProcessor.from_pretrained(folder)
    return Tiny(folder.name, model, SPECIAL, lambda *_: {}), processor


def ask(processor: Any, kind: str, **media: Any) -> dict[str, Any]:
    text = LoadedModel(None, processor, "tiny").prompt([{"type": kind}], "What is it?")
    return dict(call_processor(processor, text=[text], **media))


def look(tiny: Tiny, inputs: dict[str, Any]) -> tuple[TokenLayout, Tensor]:
    """The layout of a prompt, and the grey level below each of its tokens."""
    adapter = adapter_for(tiny.model)
    with watching(tiny) as seen:
        tiny.model(**inputs)
    (layout,) = layouts(adapter, seen, inputs)
    (call,) = seen.calls
    grey = adapter.grey(call)
    assert grey is not None
    levels = adapter.align(call, [one.mean(dim=1) for one in grey])
    return layout, torch.cat(levels)


def check_plane(layout: TokenLayout, levels: Tensor, canvas: int, frame: float = 0.0) -> None:
    held = layout.canvas == canvas
    row, column = layout.row[held], layout.column[held]
    rows, columns = int(row.max()) + 1, int(column.max()) + 1
    assert len(row) == rows * columns
    wanted = plane(rows, columns, frame)[row, column]
    torch.testing.assert_close(levels[held], wanted, rtol=0, atol=3)


@pytest.mark.parametrize("name", SEEING)
def test_an_image_s_layout_follows_the_picture(name: str, checkpoint: Checkpoint) -> None:
    tiny, processor = load(checkpoint(name))
    pixels = picture(112, 112).permute(1, 2, 0).numpy()
    inputs = ask(processor, "image", images=[Image.fromarray(pixels)])
    layout, levels = look(tiny, inputs)
    canvases = layout.canvas.unique().tolist()
    if name == "longva":  # it shows tiles alone, line after line
        assert canvases == [0, 1, 2, 3]
        whole = plane(4, 4)
        for canvas in canvases:
            held = layout.canvas == canvas
            row = canvas // 2 * 2 + layout.row[held]
            column = canvas % 2 * 2 + layout.column[held]
            torch.testing.assert_close(levels[held], whole[row, column], rtol=0, atol=3)
        return
    # Where tiles lie is not always known; the first canvas is the whole picture.
    for canvas in canvases[:1] if name in TILES_UNKNOWN else canvases:
        check_plane(layout, levels, canvas)


@pytest.mark.parametrize("name", ["llava_next", "llava_next_video", "llava_onevision"])
@pytest.mark.parametrize("size", [(80, 112), (112, 70), (50, 112), (112, 40)])
def test_padding_of_tiles_is_no_part_of_the_layout(
    name: str, size: tuple[int, int], checkpoint: Checkpoint
) -> None:
    tiny, processor = load(checkpoint(name))
    pixels = picture(*size).permute(1, 2, 0).numpy()
    layout, levels = look(tiny, ask(processor, "image", images=[Image.fromarray(pixels)]))
    held = layout.canvas == 1
    rows, columns = int(layout.row[held].max()) + 1, int(layout.column[held].max()) + 1
    assert (rows > columns) == (size[0] > size[1])
    # The outermost patches are partly padding.
    inner = held & (layout.row > 0) & (layout.row < rows - 1)
    inner &= (layout.column > 0) & (layout.column < columns - 1)
    wanted = plane(rows, columns)[layout.row[inner], layout.column[inner]]
    torch.testing.assert_close(levels[inner], wanted, rtol=0, atol=12)


@pytest.mark.parametrize("name", WATCHING)
def test_a_video_s_layout_follows_its_frames(name: str, checkpoint: Checkpoint) -> None:
    tiny, processor = load(checkpoint(name))
    frames = torch.stack([picture(112, 112, frame) for frame in range(8)])
    metadata = transformers.video_utils.VideoMetadata(
        total_num_frames=80, fps=40.0, frames_indices=list(range(0, 80, 10))
    )
    inputs = ask(
        processor, "video", videos=[[frames]], video_metadata=[metadata], do_sample_frames=False
    )
    layout, levels = look(tiny, inputs)
    merged = name.startswith(("qwen", "glm"))  # two frames are one
    assert len(layout.canvas.unique()) == (4 if merged else 8)
    for canvas in layout.canvas.unique().tolist():
        check_plane(layout, levels, canvas, 2 * canvas + 0.5 if merged else canvas)
    if name not in ("internvl", "smolvlm"):  # whose frames are images
        assert torch.equal(layout.frame, layout.canvas)
    told = inputs.get("second_per_grid_ts", inputs.get("video_second_per_grid"))
    if told is None:
        assert layout.seconds.isnan().all()
    else:
        torch.testing.assert_close(layout.seconds, layout.frame.double() * float(told[0]))


RATES = {
    # Tokens a second; those of a Q-Former's window begin together.
    "audioflamingo3": 25,
    "granite_speech": 10,
    "phi4_multimodal": 12.5,
    "qwen2_5_omni": 25,
    "qwen2_audio": 25,
    "qwen3_omni_moe": 13,
    "voxtral": 12.5,
}


def hear(name: str, seconds: float, checkpoint: Checkpoint) -> TokenLayout:
    """The layout of a sound of this length."""
    tiny, processor = load(checkpoint(name))
    sound = torch.sin(torch.arange(int(16_000 * seconds)) / 20)
    media = Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=sound)
    inputs = LoadedModel(tiny.model, processor, name).encode(media, "What is it?")
    with watching(tiny) as seen:
        tiny.model(**inputs)
    (layout,) = layouts(adapter_for(tiny.model), seen, inputs)
    assert layout.modality.unique().tolist() == [AUDIO]
    assert layout.item.unique().tolist() == [0]
    return layout


@pytest.mark.parametrize("name", HEARING)
def test_a_sound_s_layout_follows_its_length(name: str, checkpoint: Checkpoint) -> None:
    layout = hear(name, 0.75, checkpoint)
    if name == "voxtral":  # a window is full of silence, if not of sound
        assert len(layout) == 30 * RATES[name] and layout.seconds[-1] == pytest.approx(29.92)
        return
    assert len(layout) == pytest.approx(0.75 * RATES[name], abs=2)
    assert layout.seconds[-1] < 0.75


WHOLE = ("audioflamingo3", "granite_speech", "phi4_multimodal", "qwen3_omni_moe")
"""Families whose processor takes a sound of any length, in windows if need be."""


@pytest.mark.parametrize("name", WHOLE)
def test_a_sound_longer_than_a_window_goes_on_counting(name: str, checkpoint: Checkpoint) -> None:
    """70 seconds: two windows of 30 seconds and part of a third, or more than one of 40."""
    layout = hear(name, 70, checkpoint)
    assert len(layout) == pytest.approx(70 * RATES[name], abs=2)
    assert torch.equal(layout.column, torch.arange(len(layout)))
    assert layout.seconds[0] == 0
    steps = layout.seconds.diff()
    assert (steps >= 0).all() and steps.max() < 0.31
    assert 69.69 < layout.seconds[-1] < 70
    # Each second has its share, also where windows meet.
    per_second = torch.bincount(layout.seconds.floor().long())
    assert len(per_second) == 70
    assert (per_second - RATES[name]).abs().max() <= (2 if name == "granite_speech" else 1)


@pytest.mark.skipif("voxtral" not in CHECKPOINTS, reason="its tokenizer is one of mistral-common")
def test_windows_of_silence_go_on_counting(checkpoint: Checkpoint) -> None:
    layout = hear("voxtral", 70, checkpoint)
    torch.testing.assert_close(layout.seconds, torch.arange(3 * 375).double() * 0.08)


OTHER_TEMPLATES = ("granite_speech", "phi4_multimodal", "voxtral")
"""Families whose chat template takes no parts, or is none."""


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name not in OTHER_TEMPLATES])
def test_chat_template_takes_media(name: str, checkpoint: Checkpoint) -> None:
    tiny, processor = load(checkpoint(name))
    if name not in SEEING:
        part = {"type": "audio", "audio": numpy.zeros(8_000, dtype=numpy.float32)}
    else:
        part = {"type": "image", "image": Image.new("RGB", (90, 60))}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    output = tiny.model.generate(**inputs, max_new_tokens=5)
    new = output[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (1, 5)
    assert processor.batch_decode(new, skip_special_tokens=True)[0].strip()


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "voxtral"])
def test_tokenizer_gives_text_back(name: str, checkpoint: Checkpoint) -> None:
    tokenizer = transformers.AutoProcessor.from_pretrained(checkpoint(name)).tokenizer
    text = "What is it?\nA red (big) circle, 2 seconds."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
