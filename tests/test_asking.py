"""Answers about files, and questions that have none."""

from __future__ import annotations

import pytest
import torch

from tests.checkpoints import loader
from tokenprune.asking import answer, ask, default_recipe
from tokenprune.core.recipe import Recipe
from tokenprune.engine.patch import prune
from tokenprune.errors import MediaError, RecipeError, TokenPruneError, UnsupportedModelError
from tokenprune.inputs import read_media
from tokenprune.models.media import Media
from tokenprune.session.script import FrameGroup, Pace


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return loader(checkpoint)


def test_ask_is_the_whole_job(loaded, files):
    one = loaded("qwen2_vl")
    found = ask(one, files.video, "what?", frames=4, max_new_tokens=2)

    assert found.recipe == "vflowopt(keep=0.25)"
    assert found.pictures.shape[0] == found.frames == 4
    assert found.as_dict()["kv_bytes"] == found.report.kv_bytes.as_dict()
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


def test_frames_of_no_file_are_answered_about(loaded):
    frames = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
    clip = FrameGroup.at_pace(frames, torch.arange(4), Pace(2.0, 2.0))
    found = answer(loaded("qwen2_vl"), Media(frames, video=clip), "what?", Recipe(), 2)

    assert found.frames == 4 and found.pictures_decoded == found.bytes_read == 0
    assert found.seconds.index == found.seconds.decode == 0


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
