"""The shipped mini models: complete, small, offline, and able to answer."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tokenprune.core.recipe import Recipe
from tokenprune.engine.patch import prune
from tokenprune.eval.run import evaluate_recipes
from tokenprune.eval.tasks import mini_story
from tokenprune.eval.tasks.mini_video import LOOKUPS, encode, samples, score
from tokenprune.models import built_in_models
from tokenprune.models.load import load_model
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.media import Media

TYPES = {"mini-video": "qwen2_5_vl", "mini-video-llava": "llava_onevision"}
FRAME_TOKENS = {"mini-video": 18, "mini-video-llava": 16}
SEPARATORS = {"mini-video": 0, "mini-video-llava": 1}  # placeholders that show no frame


@pytest.fixture(scope="module", params=list(TYPES))
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    return load_model(request.param)


@pytest.fixture(scope="module")
def qwen() -> LoadedModel:
    return load_model("mini-video")


def test_every_shipped_model_is_tested() -> None:
    assert set(built_in_models()) == set(TYPES) == set(FRAME_TOKENS) == set(SEPARATORS)


@pytest.mark.parametrize("name", TYPES)
def test_the_shipped_folder_is_complete_and_small(name: str) -> None:
    folder = built_in_models()[name]
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 << 20
    assert (folder / "model.safetensors").exists()


@pytest.mark.parametrize("name", TYPES)
def test_auto_classes_load_the_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = built_in_models()[name]
    model = AutoModelForImageTextToText.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.model_type == TYPES[name]
    text = "What color is the star?"
    words = processor.tokenizer.convert_ids_to_tokens(processor.tokenizer(text)["input_ids"])
    assert words == ["what", "color", "is", "the", "star", "?"]


@pytest.mark.parametrize("frames", [1, 5, 64])
def test_prompts_hold_as_many_tokens_a_frame(loaded: LoadedModel, frames: int) -> None:
    sample = next(iter(samples(1, frames=frames, seed=3)))
    inputs = encode(loaded.processor, sample)
    video = int((inputs["input_ids"] == loaded.model.config.video_token_id).sum())
    assert video == frames * FRAME_TOKENS[loaded.name] + SEPARATORS[loaded.name]


def test_an_image_is_taken_too(loaded: LoadedModel) -> None:
    frame = next(iter(samples(1, frames=1, seed=3))).frames
    inputs = loaded.encode(Media(torch.from_numpy(frame)), "what color is the star?")
    with torch.inference_mode(), prune(loaded.model, "uniform(keep=0.5)") as report:
        loaded.model.generate(**inputs, max_new_tokens=2)
    assert report.media_tokens.after == -(-report.media_tokens.before // 2) > 0


def test_temporal_positions_count_frames(qwen: LoadedModel) -> None:
    """Whatever the sampling: the model learnt order in steps of one."""
    sample = next(iter(samples(1, frames=4, seed=3)))
    inputs = encode(qwen.processor, sample)
    assert "second_per_grid_ts" not in inputs
    positions, _ = qwen.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], video_grid_thw=inputs["video_grid_thw"]
    )
    first = int((inputs["mm_token_type_ids"][0] == 2).nonzero()[0])
    tokens = FRAME_TOKENS[qwen.name]
    temporal = positions[0, 0, first : first + 4 * tokens : tokens]
    assert temporal.diff().tolist() == [1, 1, 1]


def test_the_model_answers_held_out_look_ups(loaded: LoadedModel) -> None:
    """A floor far below what is reported, and far above guessing (about 0.1)."""
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in samples(60, frames=8, seed=5):
        if sample.kind not in LOOKUPS:
            continue
        inputs = encode(loaded.processor, sample)
        with torch.inference_mode(), prune(loaded.model):
            output = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        answer = loaded.processor.decode(
            output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        right[sample.kind].append(score(answer, sample.answer))
    flat = [one for kind in right.values() for one in kind]
    assert len(flat) >= 30
    assert sum(flat) / len(flat) >= 0.8, dict(right)


def test_evaluation_reports_what_was_kept(loaded: LoadedModel) -> None:
    recipes = [Recipe(), Recipe("uniform(keep=0.25)"), Recipe("random(keep=0.5 at=cache)")]
    results = evaluate_recipes(loaded, recipes, frames=8, samples=6, seed=5)
    assert [len(result.scores) for result in results] == [6, 6, 6]
    whole = 8.0 * FRAME_TOKENS[loaded.name]
    assert [result.media_tokens()["per_layer"] for result in results] == [
        [whole] * 4,
        [whole / 4] * 4,
        [whole / 2] * 4,
    ]


def test_all_held_out_kinds_are_asked() -> None:
    assert {sample.kind for sample in samples(60, frames=64, seed=1)} >= set(LOOKUPS) | {
        "after",
        "before",
        "count",
    }


@pytest.mark.parametrize(
    "told, share",
    [
        ("red star then blue ring", 1.0),
        (" red star then blue ring ", 1.0),
        ("red star", 1 / 2),
        ("blue ring then red star", 1 / 2),
        ("red star then pink bar then blue ring", 2 / 3),
        ("red star then red star then blue ring then blue ring", 2 / 4),
        ("", 0.0),
    ],
)
def test_a_story_is_scored_by_scenes_in_order(told: str, share: float) -> None:
    assert mini_story.score(told, "red star then blue ring") == pytest.approx(share)


def test_the_model_retells_short_videos(loaded: LoadedModel) -> None:
    [result] = evaluate_recipes(loaded, [Recipe()], task="mini-story", frames=6, samples=8, seed=5)
    assert result.kinds == ["describe"] * 8
    assert result.accuracy >= 0.4  # a wrong scene in a story of two costs half of it
