"""Reading files as a model can use them."""

from __future__ import annotations

import base64
import io

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.checkpoints import loader
from tokenprune.errors import MediaError
from tokenprune.inputs import check_watchable, read_media
from tokenprune.media import Limits, use_limits
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


def test_sources_of_all_kinds_are_read(loaded, files):
    model = loaded("qwen2_vl")
    path = files.image
    plain = read_media(path, model).frames
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    for source in (path.as_uri(), path.read_bytes(), io.BytesIO(path.read_bytes()), data):
        assert torch.equal(read_media(source, model).frames, plain)
    url = "https://example.org/a.png"
    assert torch.equal(read_media(url, model, fetch=lambda url: path).frames, plain)
    with pytest.raises(MediaError, match=f"only local files are read, got '{url}'"):
        read_media(url, model)
    assert len(read_media(files.video.read_bytes(), model, frames=np.int64(2)).frames) == 2


def test_pictures_lie_on_the_ground_that_is_asked_for(loaded, tmp_path):
    model = loaded("qwen2_vl")
    clear = Image.new("RGBA", (40, 30))
    clear.save(tmp_path / "a.png")
    clear.save(
        tmp_path / "a.gif", save_all=True, append_images=[clear.rotate(1), clear], duration=50
    )
    for name in ("a.png", "a.gif"):
        assert (read_media(tmp_path / name, model).frames == 255).all()
        assert (read_media(tmp_path / name, model, background="black").frames == 0).all()


@pytest.mark.parametrize("ending", ["webp", "png", "avif", "gif"])
def test_animations_are_videos(ending, loaded, tmp_path):
    frames = [Image.new("RGB", (64, 48), (40 * n, 0, 0)) for n in range(4)]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[100, 500, 200, 300])
    media = read_media(path, loaded("qwen2_5_vl"), frames=4)

    assert media.video is not None
    assert media.video.pts_seconds.tolist() == pytest.approx([0, 0.1, 0.6, 0.8], abs=1e-3)


def test_pictures_that_only_ffmpeg_reads(loaded, tmp_path):
    with av.open(str(tmp_path / "a.dpx"), "w", format="image2") as out:
        stream = out.add_stream("dpx", rate=1)
        stream.width, stream.height, stream.pix_fmt = 40, 30, "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (40, 30), "red"))))
    media = read_media(tmp_path / "a.dpx", loaded("qwen2_5_vl"))
    assert media.video is None and media.frames.shape == (1, 3, 30, 40)


def test_bombs_and_long_sounds_are_refused(loaded, files, tmp_path):
    with use_limits(Limits(pixels=1000)), pytest.raises(MediaError, match="more than the limit"):
        read_media(files.image, loaded("qwen2_vl"))
    sound = loaded("qwen2_audio")
    with use_limits(Limits(sound_seconds=1.4)), pytest.raises(MediaError, match="limit of 1.4 sec"):
        read_media(files.sound, sound)
    with use_limits(Limits(sound_seconds=1.5)):
        assert len(read_media(files.sound, sound).audio) == 24000


def test_only_videos_are_watched_in_groups(loaded, files, tmp_path):
    with pytest.raises(MediaError, match="is an image: it has no groups of frames"):
        check_watchable(files.image.as_uri(), loaded("qwen2_vl"))
    check_watchable(files.animation, loaded("qwen2_vl"))
