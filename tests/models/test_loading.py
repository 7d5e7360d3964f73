"""Loading checkpoints, and reading files as a model needs them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import tokenprune.models.load
from tokenprune.asking import answer, ask, default_recipe
from tokenprune.engine.patch import prune
from tokenprune.errors import (
    MediaError,
    MissingExtraError,
    RecipeError,
    TokenPruneError,
    UnsupportedModelError,
)
from tokenprune.inputs import read_media
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media
from tokenprune.models.processors import frame_size


@pytest.fixture(scope="module")
def loaded(checkpoint):
    models: dict[str, LoadedModel] = {}

    def load(name: str) -> LoadedModel:
        if name not in models:
            models[name] = load_model(str(checkpoint(name)), device="cpu")
        return models[name]

    return load


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A checkpoint that may be spoilt."""
    return shutil.copytree(checkpoint("qwen2_vl"), tmp_path / "copy")


# -- models


def test_models_are_ready_to_answer(loaded):
    one = loaded("qwen2_vl")

    assert not one.model.training
    assert one.model.dtype == torch.float32
    assert type(one.adapter).__name__ == "Qwen2VL"


def test_omni_checkpoints_load_their_thinker_with_all_its_weights(loaded, checkpoint):
    one = loaded("qwen2_5_omni")
    saved = load_file(checkpoint("qwen2_5_omni") / "model.safetensors")

    assert type(one.model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    state = one.model.state_dict()
    assert {f"thinker.{name}" for name in state} == set(saved)
    assert all(torch.equal(value, saved[f"thinker.{name}"]) for name, value in state.items())


def test_a_thinker_on_its_own_loads(loaded, tmp_path):
    one = loaded("qwen2_5_omni")
    one.model.save_pretrained(tmp_path)
    one.processor.save_pretrained(tmp_path)
    alone = load_model(str(tmp_path), device="cpu")

    state = alone.model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.model.state_dict().items())


def test_a_missing_package_fails(copy, monkeypatch):
    def absent(*args, **kwargs):
        raise ImportError("\nSomeTower requires the timm library. Do so with pip:\n`x`")

    monkeypatch.setattr(
        tokenprune.models.load.transformers.AutoProcessor, "from_pretrained", absent
    )
    with pytest.raises(MissingExtraError, match="requires the timm library.* install that package"):
        load_model(str(copy), device="cpu")


def test_half_precision_is_widened_on_a_cpu_only(copy):
    weights = load_file(copy / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, copy / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))

    assert load_model(str(copy), device="cpu").model.dtype == torch.float32
    assert load_model(str(copy), device="cpu", dtype=torch.float16).model.dtype == torch.float16


def test_an_attention_can_be_chosen(checkpoint):
    folder = str(checkpoint("qwen2_vl"))
    one = load_model(folder, device="cpu", attention="eager")

    assert one.model.get_decoder().config._attn_implementation == "eager"
    with pytest.raises(TokenPruneError, match="cannot load model .*magic"):
        load_model(folder, device="cpu", attention="magic")


def test_a_missing_folder_fails(tmp_path):
    for name in (str(tmp_path / "nothing"), "./nothing", "a/b/c", "nothing"):
        with pytest.raises(TokenPruneError, match=r"no such folder; give a hub name \(owner/name"):
            load_model(name)


def test_the_built_in_model_is_the_default(copy, monkeypatch):
    monkeypatch.setattr(tokenprune.models.load, "built_in_models", lambda: {"mini-video": copy})

    assert load_model(device="cpu").name == "mini-video"


def test_a_folder_without_a_config_fails(copy):
    (copy / "config.json").unlink()
    with pytest.raises(TokenPruneError, match="cannot load model .*config.json"):
        load_model(str(copy))


def test_an_unreadable_config_fails(copy):
    (copy / "config.json").write_text("{]")
    with pytest.raises(TokenPruneError, match="cannot load model .*; give a hub name"):
        load_model(str(copy))


def test_a_folder_without_weights_fails(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(TokenPruneError, match="cannot load model .*safetensors"):
        load_model(str(copy))


def test_broken_weights_fail(copy):
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(TokenPruneError, match="cannot load model .*; give a hub name"):
        load_model(str(copy))


def test_weights_of_another_shape_fail(copy):
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 112
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(TokenPruneError, match="cannot load model"):
        load_model(str(copy))


def test_missing_weights_fail(copy):
    weights = load_file(copy / "model.safetensors")
    name = next(name for name in weights if "layers.3" in name)
    del weights[name]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TokenPruneError, match="its weights lack 1 tensors, such as .*layers.3"):
        load_model(str(copy))


def test_a_folder_without_a_processor_fails(copy):
    for file in copy.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    with pytest.raises(TokenPruneError, match="cannot load model"):
        load_model(str(copy))


def test_a_model_type_without_an_adapter_fails(copy):
    (copy / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(
        UnsupportedModelError, match="no adapter for model_type 'gpt2' of .*; known"
    ):
        load_model(str(copy))


# -- files


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


def test_what_is_cropped_is_not_visible(loaded, files):
    frames = torch.arange(160, dtype=torch.uint8).expand(1, 3, 90, 160)
    for name, columns in (("llava", range(35, 125)), ("llava_next", range(160))):
        seen = loaded(name).visible(Media(frames))
        assert seen[0, 0, 0].tolist() == list(columns)
        assert seen.shape[2] == 90
    one = loaded("llava_next_video")
    media = read_media(files.video, one, frames=2)
    assert media.frames.shape[3] == 96 and one.visible(media).shape == (2, 3, 56, 56)
    assert loaded("qwen2_vl").visible(media) is media.frames


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


def test_a_sound_beyond_what_a_processor_takes_fails(loaded):
    one = loaded("audioflamingo3")
    one.processor.max_audio_len = 2
    media = Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=torch.zeros(48000))
    with pytest.raises(
        MediaError, match=r"the sound lasts 3 seconds, and .* takes at most 2; give"
    ):
        one.encode(media, "what?")


def test_a_track_of_a_few_samples_makes_a_token(loaded, files):
    omni = loaded("qwen2_5_omni")
    media = replace(read_media(files.video, omni, frames=2), audio=torch.zeros(3))
    inputs = omni.encode(media, "what?")
    assert int((inputs["input_ids"] == omni.model.config.audio_token_id).sum()) > 0


def test_long_sounds_are_heard_to_the_end(loaded):
    # The tiny processor takes one second at a time, and would cut the rest off.
    one = loaded("qwen2_audio")
    sound = torch.rand(40_000) - 0.5
    media = Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=sound)
    inputs = one.encode(media, "what?")

    assert inputs["feature_attention_mask"].sum(dim=1).tolist() == [100, 100, 50]
    placeholders = inputs["input_ids"] == one.model.config.audio_token_id
    assert int(placeholders.sum()) == 25 + 25 + 12
    expected = one.processor.feature_extractor(
        sound[16_000:32_000].numpy(), sampling_rate=16000, return_tensors="pt"
    )
    assert torch.equal(inputs["input_features"][1], expected["input_features"][0])


@pytest.mark.parametrize("samples", [1, 100, 16_001])
def test_sounds_of_any_length_have_tokens(samples, loaded):
    one = loaded("qwen2_audio")
    media = Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=torch.zeros(samples))
    found = answer(one, media, "what?", default_recipe(one, media), 1)

    assert found.media_tokens["before"] >= 2


# -- answers


def test_ask_is_the_whole_job(loaded, files):
    one = loaded("qwen2_vl")
    found = ask(one, files.video, "what?", frames=4, max_new_tokens=2)

    assert found.recipe == "vflowopt(keep=0.25)"
    assert found.pictures.shape[0] == found.frames == 4
    assert found.as_dict()["kv_bytes"] == found.report.kv_bytes
    again = ask(one, files.video, "what?", recipe="none", frames=4, max_new_tokens=2)
    assert again.recipe == "none" and again.answer is not None


def test_answers_do_not_change_the_model(loaded, files):
    one = loaded("qwen2_vl")
    first = ask(one, files.image, "what?", recipe="none", max_new_tokens=4)
    for recipe, error in (("random(at=99)", RecipeError), ("random(keep=0.3)", None)):
        if error is None:
            ask(one, files.image, "what?", recipe=recipe, max_new_tokens=4)
        else:
            with pytest.raises(error):
                ask(one, files.image, "what?", recipe=recipe, max_new_tokens=4)
    last = ask(one, files.image, "what?", recipe="none", max_new_tokens=4)

    assert first.answer == last.answer
    with prune(one.model):  # nothing is left of the earlier ones
        pass


def test_default_recipe_goes_by_what_is_asked_about(loaded):
    heard = Media(torch.zeros(0, 3, 1, 1, dtype=torch.uint8), audio=torch.zeros(16000))
    seen = Media(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))

    assert str(default_recipe(loaded("qwen2_5_omni"))) == "vflowopt(keep=0.25)"
    assert str(default_recipe(loaded("qwen2_5_omni"), seen)) == "vflowopt(keep=0.25)"
    assert str(default_recipe(loaded("qwen2_5_omni"), heard)) == "plphp(keep=0.5)"
    assert str(default_recipe(loaded("qwen2_audio"))) == "plphp(keep=0.5)"


def test_bad_questions_fail(loaded, files):
    one = loaded("qwen2_vl")
    with pytest.raises(TokenPruneError, match="a question must have words, got ' '"):
        ask(one, "nothing.mp4", " ")
    with pytest.raises(TokenPruneError, match="max_new_tokens must be at least 1, got 0"):
        ask(one, files.image, "what?", max_new_tokens=0)
    with pytest.raises(MediaError, match="no such file"):
        ask(one, "nothing.mp4", "what?")


def test_prompts_without_a_place_for_the_file_fail(loaded, files):
    one = loaded("qwen2_vl")
    media = read_media(files.image, one)
    writers = (one.processor, one.processor.tokenizer)  # either may hold the template
    templates = [writer.chat_template for writer in writers]
    try:
        one.processor.chat_template = "{{ messages[0]['content'][-1]['text'] }}"
        with pytest.raises((MediaError, UnsupportedModelError), match="without a place|refuses"):
            answer(one, media, "what?", default_recipe(one), 1)
        for writer in writers:
            writer.chat_template = None
        with pytest.raises(UnsupportedModelError, match="has no chat template"):
            answer(one, media, "what?", default_recipe(one), 1)
    finally:
        for writer, template in zip(writers, templates, strict=True):
            writer.chat_template = template
