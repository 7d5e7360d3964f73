"""The main job with every family: its real processor, a tiny random model, real files."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints import HEARING, SEEING, WATCHING
from tokenprune import prune
from tokenprune.core.layout import AUDIO, VIDEO
from tokenprune.media import Timings, Video, VideoInfo
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.models.processors import frame_size
from tokenprune.testing.tiny import decoder_of

BOTH = [name for name in HEARING if name in SEEING]
# A model that only hears takes the sound track of a video.
SOUNDS = [*((name, "sound") for name in HEARING), ("qwen2_audio", "video")]

CROPPING = ("llava", "video_llava", "vipllava")
"""Families whose processors crop images to a square."""

KEYS = ["answer", "media_tokens", "seconds", "kv_bytes", "frames", "pictures_decoded"]
KEYS += ["bytes_read", "recipe", "model", "timeline"]
SECONDS = ["index", "decode", "encode", "prefill", "per_token"]


def check_answer(found: dict[str, Any]) -> None:
    """What `--json` prints for one recipe."""
    assert list(found) == KEYS
    assert list(found["media_tokens"]) == ["before", "after", "per_site"]
    assert list(found["seconds"]) == SECONDS
    assert list(found["kv_bytes"]) == ["before", "after"]
    assert isinstance(found["answer"], str)
    (group,) = found["timeline"]
    assert list(group) == ["decode", "process", "encode", "prefill"]
    assert bool(group["decode"]) == (found["bytes_read"] > 0) == (found["pictures_decoded"] > 0)
    assert all(found["seconds"][name] > 0 for name in ("encode", "prefill", "per_token"))
    tokens, size = found["media_tokens"], found["kv_bytes"]
    if found["recipe"] == "none":
        assert tokens == {"before": tokens["before"], "after": tokens["before"], "per_site": {}}
        assert size["after"] == size["before"] > 0
    else:
        assert 0 < tokens["after"] < tokens["before"]
        assert 0 < size["after"] < size["before"]


@pytest.mark.parametrize("name", SEEING)
def test_ask_about_an_image(name, checkpoint, command, files, tmp_path):
    overlay = tmp_path / "kept.png"
    folder = checkpoint(name)
    ran = command(
        *("ask", files.image, "what is this?", "--model", folder, "--max-new-tokens", 2),
        *("--json", "--compare", "--overlay", overlay),
    )

    assert ran.code == 0
    found = json.loads(ran.out)
    unpruned = found.pop("unpruned")
    check_answer(found)
    check_answer(unpruned)
    assert (found["recipe"], unpruned["recipe"]) == ("vflowopt(keep=0.25)", "none")
    assert found["media_tokens"]["before"] == unpruned["media_tokens"]["before"]
    before, after = (found["media_tokens"][name] for name in ("before", "after"))
    assert after == pytest.approx(0.25 * before, abs=1)
    assert found["seconds"]["index"] == found["seconds"]["decode"] == 0
    assert (found["frames"], found["model"]) == (1, str(folder))
    with Image.open(overlay) as picture:
        # A square that a processor crops to, or a tile, is small enough to be enlarged.
        tiles = 2 * 4 * 56 + 4  # two by two, with a gap
        sizes = dict.fromkeys(CROPPING, (180, 180)) | {"longva": (tiles, tiles)}
        assert picture.size == sizes.get(name, (160, 90))


@pytest.mark.parametrize("name", SEEING)
def test_ask_about_a_video(name, checkpoint, command, files, tmp_path):
    overlay = tmp_path / "kept.png"
    arguments = "ask", files.video, "what happens?", "--model", checkpoint(name), "--frames", 5
    arguments += "--json", "--max-new-tokens", 2
    pruned = command(*arguments, "--overlay", overlay)
    plain = command(*arguments, "--recipe", "none")

    assert (pruned.code, plain.code) == (0, 0)
    found, unpruned = json.loads(pruned.out), json.loads(plain.out)
    check_answer(found)
    check_answer(unpruned)
    assert found["recipe"] == "vflowopt(keep=0.25)"
    assert found["media_tokens"]["before"] == unpruned["media_tokens"]["before"]
    assert found["frames"] == unpruned["frames"] == 5
    assert found["seconds"]["index"] > 0 and found["seconds"]["decode"] > 0
    with Image.open(overlay) as picture:
        assert min(picture.size) > 50


@pytest.mark.parametrize("name, file", SOUNDS)
def test_ask_about_a_sound(name, file, checkpoint, command, files):
    arguments = "ask", getattr(files, file), "what is heard?", "--model", checkpoint(name)
    ran = command(*arguments, "--max-new-tokens", 2, "--json", "--compare")

    assert ran.code == 0
    found = json.loads(ran.out)
    unpruned = found.pop("unpruned")
    check_answer(found)
    check_answer(unpruned)
    assert (found["recipe"], found["frames"]) == ("plphp(keep=0.5)", 0)
    assert list(found["media_tokens"]["per_site"]) == ["cache"]


RATES = {"phi4_multimodal": 12.5, "qwen2_5_omni": 25, "qwen3_omni_moe": 13}
"""Tokens a second of sound."""


@pytest.mark.parametrize("name", BOTH)
def test_ask_about_a_video_with_its_sound(name, checkpoint, command, files):
    arguments = "--model", checkpoint(name), "--frames", 4, "--json", "--max-new-tokens", 2
    recipe = "--recipe", "plphp(keep=0.5)"

    def tokens(file: Any, *more: str) -> int:
        ran = command("ask", file, "what is it?", *arguments, *recipe, *more)
        assert ran.code == 0, ran.err
        found = json.loads(ran.out)
        check_answer(found)
        assert found["frames"] == 4
        return int(found["media_tokens"]["before"])

    # The coder adds up to a frame of silence to the second of sound.
    heard = tokens(files.video) - tokens(files.video, "--no-sound")
    assert RATES[name] - 1 <= heard <= 1.07 * RATES[name] + 1
    assert tokens(files.silent) == tokens(files.silent, "--no-sound")


@pytest.mark.parametrize("name", [name for name in BOTH if name != "phi4_multimodal"])
def test_sound_stands_between_the_frames_of_its_time(name, loaded):
    """Also beyond the longest sound that the processor takes alone: 30 seconds."""
    model = loaded(name)
    clip = made_video(56, 56, 360)  # 36 seconds, a grid each 0.2
    media = Media(clip.frames, video=clip, audio=torch.linspace(0, 1, 16000 * 36).sin())
    inputs = model.encode(media, "what?")
    positions = []
    handle = decoder_of(model.model).register_forward_pre_hook(
        lambda module, args, kwargs: positions.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad(), prune(model.model) as report:
        model.model(**inputs)
    handle.remove()
    layout = report.calls[0].layouts[0]
    heard, seen = layout[layout.modality == AUDIO], layout[layout.modality == VIDEO]
    assert len(heard) == pytest.approx(36 * RATES[name], abs=1)
    assert (layout.item.unique().tolist(), seen.frame.max()) == ([0, 1], 179)
    torch.testing.assert_close(seen.seconds, seen.frame.double() * 0.2)
    assert heard.seconds[-1] == pytest.approx(36, abs=0.1)
    # The model's own clock: a position of time for each token of sound.
    clock = positions[0][-3, 0, layout.position].double()
    torch.testing.assert_close(
        clock - clock[0], layout.seconds * RATES[name], rtol=0, atol=1.0 + 1e-6
    )
    # What stands beside each other in the prompt is of one chunk of two seconds.
    chunk = (layout.seconds / 2 + 1e-6).floor()
    assert (chunk.diff() >= 0).all()


def made_video(height: int, width: int, frames: int) -> Video:
    """Frames of a size, 10 of which would last a second."""
    pictures = torch.zeros(frames, 3, height, width, dtype=torch.uint8)
    info = VideoInfo(
        path="made",
        duration_seconds=frames / 10,
        frame_count=frames,
        average_fps=10.0,
        width=width,
        height=height,
        codec="h264",
        container="mp4",
        has_audio=False,
        rotation=0,
        start_seconds=0.0,
    )
    return Video(
        frames=pictures,
        pts_seconds=torch.arange(frames, dtype=torch.float64) / 10,
        indices=torch.arange(frames),
        info=info,
        substituted=torch.zeros(frames, dtype=torch.bool),
        pictures_decoded=frames,
        timings=Timings(0.0, 0.0),
    )


def shapes(inputs: dict[str, Any]) -> dict[str, Any]:
    """All that depends on the size of the frames: placeholders, grids, and shapes of pixels."""
    return {
        name: value.tolist() if "pixel" not in name else value.shape
        for name, value in inputs.items()
        if isinstance(value, Tensor)
    }


@pytest.fixture(scope="module")
def loaded(checkpoint):
    models: dict[str, LoadedModel] = {}

    def load(name: str) -> LoadedModel:
        if name not in models:
            models[name] = load_model(str(checkpoint(name)), device="cpu")
        return models[name]

    return load


# Upright and lying, square, tiny and far beyond the limits; the last is the thinnest one.
SOURCES = [(36, 64), (90, 160), (160, 90), (120, 120), (360, 640), (30, 300), (17, 500)]


@pytest.mark.parametrize("name", WATCHING)
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_frames_decoded_at_the_rules_size_give_the_processors_grid(name, frames, loaded):
    model = loaded(name)
    rule = frame_size(model.processor)
    sources = SOURCES if name != "qwen2_5_omni" else SOURCES[1:]  # its frames are large
    for height, width in sources:
        whole = made_video(height, width, frames)
        small = made_video(*rule(height, width, frames), frames)
        expected = model.encode(Media(whole.frames, video=whole), "what?")
        found = model.encode(Media(small.frames, video=small, sized=True), "what?")

        assert shapes(found) == shapes(expected), (height, width)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_families_that_take_images_have_no_rule(name, loaded):
    assert frame_size(loaded(name).processor) is None
    clip = made_video(40, 60, 3)
    inputs = loaded(name).encode(Media(clip.frames, video=clip), "what?")

    assert len(inputs["pixel_values"]) == 3


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen2_5_omni"])
def test_models_that_count_time_are_told_the_sampled_rate(name, loaded):
    clip = made_video(60, 60, 10)  # ten frames of one second
    inputs = loaded(name).encode(Media(clip.frames, video=clip), "what?")
    seconds = inputs.get("second_per_grid_ts", inputs.get("video_second_per_grid"))

    assert torch.as_tensor(seconds).tolist() == pytest.approx([0.2])  # two frames a grid
