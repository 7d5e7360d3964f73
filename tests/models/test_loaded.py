"""Inputs of a loaded model: audio of any length, and what of a picture is visible."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.checkpoints import loader
from tokenprune.asking import answer, default_recipe
from tokenprune.errors import MediaError
from tokenprune.inputs import read_media
from tokenprune.models.media import Media


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return loader(checkpoint)


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

    assert found.media_tokens.before >= 2
