"""The generated world: repeatable, and its answers follow from the list of scenes."""

import itertools

import numpy as np
import pytest

from tokenprune.eval.mini.world import (
    COLORS,
    KINDS,
    NUMBERS,
    SHAPES,
    Story,
    Thing,
    ask,
    draw_clips,
    draw_story,
    frame_scenes,
    render,
    stream,
)

LENGTHS = [1, 2, 3, 6, 16, 64, 128]


def stories(count: int = 60) -> list[Story]:
    return [
        draw_story(stream("tune", i), frames=LENGTHS[i % len(LENGTHS)], interval_seconds=2.5)
        for i in range(count)
    ]


def plain_answer(story: Story, text: str) -> str:
    """The answer worked out word by word from the scenes, with plain loops."""
    words = text.split()
    scenes = [[str(thing).split() for thing in scene.things] for scene in story.scenes]
    things = list(itertools.chain(*scenes))
    match words[:2]:
        case ["what", "color"]:
            [found] = [color for color, shape in things if shape == words[4]]
            return found
        case ["what", "shape"] if words[2] == "is":
            [found] = [shape for color, shape in things if color == words[3]]
            return found
        case ["what", "shape"]:
            [(_, shape)] = scenes[0] if words[3] == "first" else scenes[-1]
            return shape
        case ["what", "came"]:
            [at] = [i for i, scene in enumerate(scenes) if words[4:6] in scene]
            assert len(scenes[at]) == 1
            [(color, shape)] = scenes[at + 1 if words[2] == "after" else at - 1]
            return f"{color} {shape}"
        case ["how", "many"]:
            count = 0
            for scene in scenes:
                count += any(shape == words[5] for _, shape in scene)
            return NUMBERS[count]
        case ["was", "there"]:
            return "yes" if words[3:5] in things else "no"
    raise AssertionError(text)


@pytest.mark.parametrize("kind", KINDS)
def test_answers_follow_from_the_scenes(kind: str) -> None:
    asked = 0
    for number, story in enumerate(stories()):
        for turn in range(4):
            question = ask(stream("tune", 1, number, turn), story, kind)
            if question is None:
                continue
            assert question.kind == kind
            assert question.answer == plain_answer(story, question.text)
            asked += 1
    assert asked > 30


def test_needle_questions_name_a_thing_seen_in_one_or_two_frames() -> None:
    for number, story in enumerate(stories()):
        question = ask(stream("tune", 2, number), story, "needle")
        if question is None:
            continue
        [at] = [i for i, scene in enumerate(story.scenes) if scene.needle]
        thing = story.scenes[at].things[0]
        assert {SHAPES[thing.shape], COLORS[thing.color]} & set(question.text.split())
        for phase in (0.0, 0.3, 0.5, 0.99):
            frames = round(story.seconds / story.interval_seconds)
            seen = frame_scenes(story, frames, story.interval_seconds, phase)
            assert (seen == at).sum() in (1, 2)


def test_stories_keep_their_rules() -> None:
    for story in stories():
        scenes = story.scenes
        assert 1 <= len(scenes) <= 24
        for one, two in itertools.pairwise(scenes):
            assert not {t.shape for t in one.things} & {t.shape for t in two.things}
            assert two.start_seconds == pytest.approx(one.start_seconds + one.seconds)
        for shape in range(len(SHAPES)):
            assert sum(shape in {t.shape for t in scene.things} for scene in scenes) <= 5
        frames = round(story.seconds / story.interval_seconds)
        if frames >= 3:
            seen = frame_scenes(story, frames, story.interval_seconds, 0.7)
            assert set(seen) == set(range(len(scenes)))


def test_stories_and_pictures_repeat() -> None:
    one, two = (draw_story(stream("train", 5), frames=64, interval_seconds=2.8) for _ in range(2))
    assert one == two
    things = [scene.things for scene in one.scenes]
    progress = np.linspace(0, 1, len(things), dtype=np.float32)
    frames, again = (
        render(rng, draw_clips(rng, things), progress, (48, 96))[0]
        for rng in (stream("train", 6), stream("train", 6))
    )
    assert frames.dtype == np.uint8 and frames.shape == (len(things), 48, 96, 3)
    assert (frames == again).all()


def test_splits_never_share_a_stream() -> None:
    splits = ("train", "held-out", "tune", "sample")
    drawn = {
        tuple(stream(split, seed).integers(2**62, size=2)) for split in splits for seed in range(50)
    }
    assert len(drawn) == 4 * 50


def test_a_thing_covers_what_it_should() -> None:
    rng = stream("tune", 7)
    things = [(Thing(shape, 0),) for shape in range(len(SHAPES))]
    clips = draw_clips(rng, things)
    frames, cover = render(rng, clips, np.zeros(len(things), np.float32), (96, 192))
    assert (cover[:, 1] == 0).all()
    for frame, inside in zip(frames.astype(int), cover[:, 0], strict=True):
        assert 0.02 < inside.mean() < 0.25
        red = frame[inside == 1].mean(0)
        assert red[0] > 2 * red[1] and red[0] > 2 * red[2]


def test_story_with_too_many_scenes_fails() -> None:
    with pytest.raises(ValueError, match="4 frames hold 1 to 3 scenes, got scenes=9"):
        draw_story(stream("tune", 0), frames=4, interval_seconds=1, scenes=9)
