"""Reading files as a model can use them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import loader
from tokenprune.inputs import read_media
from tokenprune.models.processors import frame_size


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return loader(checkpoint)


def test_an_image_is_read_upright_and_whole(loaded, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me clockwise", as phones write
    Image.fromarray(np.rot90(picture)).save(tmp_path / "a.png", exif=exif)
    media = read_media(tmp_path / "a.png", loaded("qwen2_vl"))

    assert media.frames.dtype == torch.uint8
    assert np.array_equal(media.frames[0].permute(1, 2, 0).numpy(), picture)
    assert media.video is None and media.audio is None and not media.sized


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_all_modes_are_read(mode, loaded, tmp_path):
    Image.new(mode, (40, 30)).save(tmp_path / "a.tiff")

    assert read_media(tmp_path / "a.tiff", loaded("qwen2_vl")).frames.shape == (1, 3, 30, 40)


def test_a_gif_is_an_image_or_a_video(loaded, files, tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "still.gif")

    assert read_media(tmp_path / "still.gif", loaded("qwen2_vl")).video is None
    assert read_media(files.animation, loaded("llava"), frames=4).video is not None


def test_a_video_is_decoded_at_the_processors_size(loaded, files):
    one = loaded("llava_onevision")
    media = read_media(files.video, one, frames=4)

    assert media.frames.shape == (4, 3, 56, 56)
    assert media.sized and media.video.indices.tolist() == [0, 10, 19, 29]
    assert frame_size(one.processor)(112, 192, 4) == (56, 56)
    whole = read_media(files.video, loaded("llava"), frames=2)
    assert whole.frames.shape == (2, 3, 112, 192) and not whole.sized


def test_what_is_cropped_later_is_decoded(loaded, files):
    media = read_media(files.video, loaded("llava_next_video"), frames=2)

    assert media.frames.shape == (2, 3, 56, 96)


def test_sixty_four_frames_unless_told(loaded, files):
    assert len(read_media(files.video, loaded("qwen2_vl")).frames) == 30  # all there are
    assert len(read_media(files.video, loaded("qwen2_vl"), fps=5).frames) == 5


def test_an_mpeg_file_is_a_video(loaded, tmp_path):
    # Pillow takes it for an image that it cannot read.
    from tests.media.clips import encode

    path = encode(tmp_path / "a.mpg", "mpeg2video", numbers=range(4), form="mpeg2video").path
    with Image.open(path) as picture:
        assert picture.format == "MPEG"
    assert len(read_media(path, loaded("qwen2_vl"), frames=2).frames) == 2


def test_a_sound_is_read_for_models_that_hear(loaded, files):
    for name in ("qwen2_audio", "qwen2_5_omni"):
        media = read_media(files.sound, loaded(name))
        assert media.audio.shape == (24000,) and len(media.frames) == 0
    assert read_media(files.video, loaded("qwen2_audio")).audio is not None


def test_a_video_s_sound_is_read_for_models_that_see_and_hear(loaded, files):
    omni = loaded("qwen2_5_omni")
    media = read_media(files.video, omni, frames=2)
    assert len(media.audio) == pytest.approx(16000, abs=1100)  # the coder adds a frame at the end
    assert len(media.frames) == 2
    assert read_media(files.video, omni, frames=2, sound=False).audio is None
    assert read_media(files.silent, omni, frames=2).audio is None
    assert read_media(files.video, loaded("qwen2_vl"), frames=2).audio is None
