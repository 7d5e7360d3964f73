"""Training the mini models: what it shows a model is what inference will show it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import ProcessorMixin

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.curriculum import Stage, train_language
from tokenprune.eval.mini.language import (
    BANK_STEPS,
    Bank,
    build_bank,
    draw_batch,
    forward,
    soften,
    thin,
)
from tokenprune.eval.mini.train import ARCHITECTURES, Name, load_bank, training_model
from tokenprune.eval.mini.world import COLORS, SHAPES, Story, Thing, stream
from tokenprune.eval.tasks.mini_video import VideoQuestion, encode

FRAMES = 5


@pytest.fixture(scope="module", params=list(Name))
def name(request: pytest.FixtureRequest) -> Name:
    name: Name = request.param
    return name


@pytest.fixture(scope="module")
def mini(name: Name) -> Architecture:
    return ARCHITECTURES[name].fresh(0)


@pytest.fixture(scope="module")
def processor(mini: Architecture) -> ProcessorMixin:
    return mini.build_processor()


@pytest.fixture(scope="module")
def bank(mini: Architecture) -> Bank:
    """A clip of random features for every thing."""
    things = [
        (Thing(shape, color),) for shape in range(len(SHAPES)) for color in range(len(COLORS))
    ]
    torch.manual_seed(0)
    return Bank(torch.randn(len(things), BANK_STEPS, mini.frame_tokens, mini.width), things)


def pictures(mini: Architecture) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.integers(0, 256, (FRAMES, *mini.frame_size, 3), dtype=np.uint8)


class Shown:
    """A source whose every video shows the same frames."""

    pairs = None
    nothing = None

    def __init__(self, features: torch.Tensor) -> None:
        self.seen = features

    def features(
        self, rng: np.random.Generator, story: Story, frames: int, phase: float
    ) -> torch.Tensor:
        return self.seen


def as_sample(frames: np.ndarray, question: str) -> VideoQuestion:
    return VideoQuestion(frames.transpose(0, 3, 1, 2).copy(), 1.0, question, "", "color", 0)


def test_frames_become_what_the_processor_and_the_model_make_of_them(
    mini: Architecture, processor: ProcessorMixin
) -> None:
    frames = pictures(mini)
    inputs = encode(processor, as_sample(frames, "what color is the star ?"))
    seen = [inputs[n] for n in ("pixel_values_videos", "video_grid_thw") if n in inputs]
    with torch.no_grad():
        found = mini.model.model.get_video_features(*seen)
        features = torch.cat(list(found.pooler_output))
        trained = mini.encode(frames)
    media = FRAMES * mini.frame_tokens
    assert trained.shape == (FRAMES, mini.frame_tokens, mini.width)
    torch.testing.assert_close(trained.flatten(0, 1), features[:media], atol=1e-4, rtol=1e-4)


def test_questions_see_the_prompt_of_the_public_path(
    mini: Architecture, processor: ProcessorMixin
) -> None:
    """Same tokens at the same positions, though many questions share a sequence."""
    frames = pictures(mini)
    with torch.no_grad():
        source = Shown(mini.encode(frames))
        batch = draw_batch(
            stream("train", 8), mini, source, videos=1, frames=FRAMES, questions=3, describe=False
        )
        trained = forward(mini, batch)[0]
        for question, start, _ in batch.asked[0]:
            inputs = encode(processor, as_sample(frames, question.text))
            mini.decoder.config._attn_implementation = "sdpa"
            try:
                alone = mini.model(**inputs).logits[0, -1]
            finally:
                mini.use_training_attention()
            # Training rounds to bfloat16.
            assert (trained[start] - alone).abs().max() <= 0.03 * alone.abs().max()
    assert len(batch.asked[0]) == 3


def test_thinned_videos_keep_every_frame_and_the_positions(mini: Architecture, bank: Bank) -> None:
    rng = stream("train", 9)
    whole = draw_batch(rng, mini, bank, videos=2, frames=FRAMES, questions=3)
    for _ in range(8):
        batch = thin(whole, mini.frame_tokens, rng)
        count = batch.features.shape[1]
        ending = whole.positions.shape[2] - 2 - whole.features.shape[1]
        kept = batch.positions[:, :, 2 : 2 + count]
        for row in range(2):
            places = [
                (whole.positions[:, row] == one[:, None]).all(0).nonzero()[0, 0] - 2
                for one in kept[:, row].T
            ]
            seen = whole.features[row, torch.stack(places)]
            assert torch.equal(seen, batch.features[row])
            assert {int(place) // mini.frame_tokens for place in places} == set(range(FRAMES))
        assert torch.equal(batch.positions[..., -ending:], whole.positions[..., -ending:])
        assert batch.mask.shape[-1] == batch.positions.shape[-1]


def test_a_balanced_bank_is_what_the_balanced_tower_makes(
    mini: Architecture, name: Name, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenprune.eval.mini.language.BANK_STEPS", 1)
    small = dict(clips=1, pairs=4)
    monkeypatch.setattr(
        "tokenprune.eval.mini.train.build_bank", lambda mini, rng: build_bank(mini, rng, **small)
    )
    mini = training_model(name, tmp_path, 3)
    before = build_bank(mini, stream("train", 3, 0), **small).data
    balanced = load_bank(tmp_path, mini, 0)
    again = build_bank(training_model(name, tmp_path, 3), stream("train", 3, 0), **small).data
    assert not torch.allclose(balanced.data.float(), before.float(), rtol=0.1)
    torch.testing.assert_close(balanced.data, again, atol=1e-2, rtol=1e-2)


def test_training_goes_on_from_its_checkpoint(name: Name, bank: Bank, tmp_path: Path) -> None:
    """All of what is trained comes back, and only the language model was."""
    stages = (Stage(2, 3, 4, 3, 2.0, 600),)
    mini = training_model(name, tmp_path, 0)
    fresh = {key: value.clone() for key, value in mini.model.state_dict().items()}
    path = tmp_path / "language.pt"
    train_language(mini, bank, minutes=0.03, seed=0, checkpoint=path, stages=stages)
    steps = torch.load(path)["progress"]["step"]
    assert steps >= 1
    again = training_model(name, tmp_path, 5)
    for key, value in again.model.state_dict().items():
        assert torch.equal(value, mini.model.state_dict()[key]), key
    changed = {
        key for key, value in fresh.items() if not torch.equal(value, again.model.state_dict()[key])
    }
    trained = {id(parameter) for parameter in mini.language.parameters()}
    learnt = {key for key, value in mini.model.named_parameters() if id(value) in trained}
    assert changed - {"lm_head.weight"} == learnt
    train_language(again, bank, minutes=0.06, seed=0, checkpoint=path, stages=stages)
    assert torch.load(path)["progress"]["step"] > steps


def test_softening_scales_the_scores_of_attention() -> None:
    mini = ARCHITECTURES[Name.llava].fresh(0)
    width = mini.decoder.config.hidden_size
    state = torch.randn(width, generator=torch.Generator().manual_seed(0))
    before = [layer.self_attn.q_proj(state).view(4, -1) for layer in mini.decoder.layers]
    soften(mini)
    after = [layer.self_attn.q_proj(state).view(4, -1) for layer in mini.decoder.layers]
    factors = torch.full((4, 4, 1), 0.8)
    factors[0, 2:] = 0.4  # the heads that look for a colour
    torch.testing.assert_close(torch.stack(after), torch.stack(before) * factors)
