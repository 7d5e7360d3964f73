"""The generated event world: scenes with moving shapes, rendered in bulk, and questions on them.

A *story* is a list of scenes that follow each other without a gap. Each scene has its own
background and shows one thing, sometimes two: a shape in a colour. Two neighbouring scenes never
share a shape. Most scenes also show clutter that no question asks about.

Truth with second things: both things of a scene count for colour, shape, existence and counting;
order questions and first/last are asked only where the scenes they name show one thing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "COLORS",
    "KINDS",
    "MAX_COUNT",
    "NUMBERS",
    "SHAPES",
    "Clips",
    "Question",
    "Scene",
    "Story",
    "Thing",
    "ask",
    "draw_clips",
    "draw_story",
    "frame_scenes",
    "render",
    "stream",
]

Array = NDArray[np.floating[Any]]  # float32 in pictures, float64 where they are made up
Ints = NDArray[np.int64]
Split = Literal["train", "held-out", "tune", "sample"]

RGB = {
    "red": (225, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 220, 50),
    "purple": (150, 50, 190),
    "orange": (250, 140, 30),
    "cyan": (50, 210, 220),
    "pink": (250, 130, 190),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
COLORS = tuple(RGB)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
KINDS = ("color", "shape", "after", "before", "first", "last", "count", "exist", "needle")

ASPECT = 16 / 9  # the world is ASPECT wide and 1 high
MAX_SCENES = 24
MAX_COUNT = 5
SHORTEST = 1.05  # of the sampling interval: every scene is seen at least once at any phase
NEEDLE = (1.05, 1.9)  # of the sampling interval: seen in one or two sampled frames
SECOND_THING = 0.15
CLUTTER = 0.65


# ---------------------------------------------------------------------------------------------
# Shapes: implicit functions, positive inside, x right and y down in units of the radius
# ---------------------------------------------------------------------------------------------


def _circle(x: Array, y: Array) -> Array:
    return 1 - np.hypot(x, y)


def _square(x: Array, y: Array) -> Array:
    return 0.82 - np.maximum(abs(x), abs(y))


def _triangle(x: Array, y: Array) -> Array:
    return np.asarray(np.minimum(0.65 - y, 0.5 + 0.5 * y - 0.87 * abs(x)))


def _diamond(x: Array, y: Array) -> Array:
    return (1.05 - 1.45 * abs(x) - abs(y)) * 0.6


def _star(x: Array, y: Array) -> Array:
    fifth = np.pi / 5
    to_tip = abs((np.arctan2(x, -y) + fifth) % (2 * fifth) - fifth) / fifth  # 0 at a tip, 1 between
    return 1.12 - 0.66 * to_tip - np.hypot(x, y)


def _cross(x: Array, y: Array) -> Array:
    x, y = abs(x), abs(y)
    return np.asarray(np.maximum(np.minimum(0.3 - x, 1 - y), np.minimum(0.3 - y, 1 - x)))


def _ring(x: Array, y: Array) -> Array:
    return 0.25 - abs(np.hypot(x, y) - 0.77)


def _heart(x: Array, y: Array) -> Array:
    lobe = 0.56 - np.hypot(abs(x) - 0.42, y + 0.35)
    tip = np.minimum(0.93 - abs(x) * 1.05 - y, y + 0.4) * 0.7
    return np.asarray(np.maximum(lobe, tip))


def _moon(x: Array, y: Array) -> Array:
    return np.asarray(np.minimum(1 - np.hypot(x, y), np.hypot(x - 0.55, y + 0.1) - 0.82))


def _arrow(x: Array, y: Array) -> Array:
    shaft = np.minimum(0.24 - abs(y), np.minimum(x + 1, 0.3 - x))
    head = np.minimum(x + 0.05, ((1 - x) * 0.85 - abs(y)) * 0.75)
    return np.asarray(np.maximum(shaft, head))


def _bar(x: Array, y: Array) -> Array:
    return np.asarray(np.minimum(0.3 - abs(y), 1.1 - abs(x)))


def _hourglass(x: Array, y: Array) -> Array:
    return np.asarray(np.minimum((abs(y) * 0.95 + 0.08 - abs(x)) * 0.7, 0.95 - abs(y)))


_FIELDS: dict[str, Callable[[Array, Array], Array]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "diamond": _diamond,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "moon": _moon,
    "arrow": _arrow,
    "bar": _bar,
    "hourglass": _hourglass,
}
SHAPES = tuple(_FIELDS)


# ---------------------------------------------------------------------------------------------
# Stories: what happens when
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Thing:
    """A shape in a colour, as indices into SHAPES and COLORS."""

    shape: int
    color: int

    def __str__(self) -> str:
        return f"{COLORS[self.color]} {SHAPES[self.shape]}"


@dataclass(frozen=True)
class Scene:
    """What is shown from `start_seconds` for `seconds`."""

    things: tuple[Thing, ...]
    start_seconds: float
    seconds: float
    needle: bool = False


@dataclass(frozen=True)
class Story:
    """Scenes in order; `interval_seconds` is the sampling interval they were made for."""

    scenes: tuple[Scene, ...]
    interval_seconds: float

    @property
    def seconds(self) -> float:
        return self.scenes[-1].start_seconds + self.scenes[-1].seconds


def stream(split: Split, *seed: int) -> np.random.Generator:
    """A random stream; streams of different splits never meet, whatever their seeds."""
    word = {"train": 11, "held-out": 22, "tune": 33, "sample": 44}[split]
    return np.random.default_rng([word, *seed])


def draw_story(
    rng: np.random.Generator,
    *,
    frames: int,
    interval_seconds: float,
    scenes: int | None = None,
    needle: bool | None = None,
    pairs: Sequence[tuple[Thing, Thing]] | None = None,
) -> Story:
    """Draw a story that lasts `frames * interval_seconds`.

    Args:
        frames: Number of frames that will be sampled.
        interval_seconds: Time between them.
        scenes: Number of scenes; random up to MAX_SCENES if not given.
        needle: Whether one scene is a needle; random if not given.
        pairs: The only two-thing scenes allowed; any two if not given.

    Raises:
        ValueError: If `frames` is below one or too small for `scenes`.
    """
    most = max(1, min(MAX_SCENES, int(frames / 1.3)))
    if frames < 1 or (scenes is not None and not 1 <= scenes <= most):
        raise ValueError(
            f"{frames} frames hold 1 to {most} scenes, got scenes={scenes}; ask for fewer"
        )
    if scenes is None:
        scenes = int(rng.integers(min(max(1, round(frames / 2.6)), 12), most + 1))
    if needle is None:
        needle = scenes >= 3 and rng.random() < 0.7
    at = int(rng.integers(scenes)) if needle else -1
    things = _draw_things(rng, scenes, at, pairs)
    lengths = _draw_lengths(rng, scenes, at, frames) * interval_seconds
    starts = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    return Story(
        tuple(
            Scene(things[i], float(starts[i]), float(lengths[i]), needle=i == at)
            for i in range(scenes)
        ),
        interval_seconds,
    )


def _draw_lengths(rng: np.random.Generator, scenes: int, needle: int, frames: int) -> Array:
    """Scene lengths in sampling intervals, none below SHORTEST, `frames` in all."""
    lengths = np.full(scenes, min(SHORTEST, frames / scenes))
    spread = rng.gamma(2.0, size=scenes)
    if needle >= 0:
        lengths[needle] = rng.uniform(*NEEDLE)
        spread[needle] = 0.0
    spare = frames - lengths.sum()
    if spare < 0:
        lengths[needle] += spare
        spare = 0.0
    return np.asarray(lengths + spread / spread.sum() * spare)


def _draw_things(
    rng: np.random.Generator,
    scenes: int,
    needle: int,
    pairs: Sequence[tuple[Thing, Thing]] | None,
) -> list[tuple[Thing, ...]]:
    weights = np.ones(len(SHAPES))
    if rng.random() < 0.6:  # a shape that comes back, so that high counts are not rare
        weights[rng.integers(len(SHAPES))] = rng.uniform(3, 8)
    hidden = -1
    if needle >= 0:
        hidden = int(rng.integers(len(SHAPES)))
        weights[hidden] = 0
    weights /= weights.sum()
    seen: Counter[int] = Counter()
    story: list[tuple[Thing, ...]] = []
    while len(story) < scenes:
        if len(story) == needle:
            shown: tuple[Thing, ...] = (Thing(hidden, int(rng.integers(len(COLORS)))),)
        elif rng.random() < SECOND_THING and (pairs is None or len(pairs)):
            if pairs is None:
                two = rng.choice(len(SHAPES), 2, replace=False, p=weights)
                shown = tuple(Thing(int(s), int(rng.integers(len(COLORS)))) for s in two)
            else:
                shown = pairs[int(rng.integers(len(pairs)))]
        else:
            shape = int(rng.choice(len(SHAPES), p=weights))
            shown = (Thing(shape, int(rng.integers(len(COLORS)))),)
        shapes = {thing.shape for thing in shown}
        before = {thing.shape for thing in story[-1]} if story else set()
        if shapes & before or any(seen[shape] == MAX_COUNT for shape in shapes):
            continue
        if hidden in shapes and len(story) != needle:
            continue
        story.append(shown)
        seen.update(shapes)
    return story


def frame_scenes(story: Story, frames: int, interval_seconds: float, phase: float = 0.5) -> Ints:
    """Index of the scene seen at `(i + phase) * interval_seconds`, `[frames]`."""
    starts = np.array([scene.start_seconds for scene in story.scenes])
    times = (np.arange(frames) + phase) * interval_seconds
    return np.asarray(np.searchsorted(starts, times, side="right") - 1, dtype=np.int64)


# ---------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """A question in the model's words, its one right answer and its kind."""

    text: str
    answer: str
    kind: str


def ask(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    """Draw a question of `kind` (one of KINDS, or "describe"); None where the story has none."""
    return _ASKERS[kind](rng, story)


def _all_things(story: Story) -> list[Thing]:
    return [thing for scene in story.scenes for thing in scene.things]


def _ask_attribute(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    """Ask for a colour by a shape that occurs once, or for a shape by such a colour."""
    things = _all_things(story)
    shapes = Counter(thing.shape for thing in things)
    colors = Counter(thing.color for thing in things)
    known = {
        (thing, what)
        for scene in story.scenes
        if scene.needle == (kind == "needle")
        for thing in scene.things
        for what, once in (
            ("color", shapes[thing.shape] == 1),
            ("shape", colors[thing.color] == 1),
        )
        if once and kind in (what, "needle")
    }
    if not known:
        return None
    thing, what = sorted(known)[rng.integers(len(known))]
    if what == "color":
        return Question(f"what color is the {SHAPES[thing.shape]} ?", COLORS[thing.color], kind)
    return Question(f"what shape is {COLORS[thing.color]} ?", SHAPES[thing.shape], kind)


def _ask_order(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    counts = Counter(_all_things(story))
    step = 1 if kind == "after" else -1
    scenes = story.scenes
    places = [
        i
        for i, scene in enumerate(scenes)
        if 0 <= i + step < len(scenes)
        and len(scene.things) == len(scenes[i + step].things) == 1
        and counts[scene.things[0]] == 1
    ]
    if not places:
        return None
    i = places[rng.integers(len(places))]
    text = f"what came {kind} the {scenes[i].things[0]} ?"
    return Question(text, str(scenes[i + step].things[0]), kind)


def _ask_end(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    things = story.scenes[0 if kind == "first" else -1].things
    if len(things) != 1:
        return None
    return Question(f"what shape was {kind} ?", SHAPES[things[0].shape], kind)


def _ask_count(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    counts = Counter(thing.shape for thing in _all_things(story))
    absent = [shape for shape in range(len(SHAPES)) if not counts[shape]]
    if absent and rng.random() < 0.15:
        shape = absent[rng.integers(len(absent))]
    else:
        shape = sorted(counts)[rng.integers(len(counts))]
    return Question(f"how many times was the {SHAPES[shape]} seen ?", NUMBERS[counts[shape]], kind)


def _ask_existence(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    things = _all_things(story)
    one, other = (things[i] for i in rng.integers(len(things), size=2))
    if rng.random() < 0.5:
        thing = one
    elif rng.random() < 0.6:  # a shape and a colour that were seen, but perhaps not together
        thing = Thing(one.shape, other.color)
    elif rng.random() < 0.5:
        thing = Thing(one.shape, int(rng.integers(len(COLORS))))
    else:
        thing = Thing(int(rng.integers(len(SHAPES))), one.color)
    answer = "yes" if thing in things else "no"
    return Question(f"was there a {thing} ?", answer, kind)


def _ask_description(rng: np.random.Generator, story: Story, kind: str) -> Question | None:
    told = (" and ".join(str(t) for t in sorted(scene.things)) for scene in story.scenes)
    return Question("describe ?", " then ".join(told), kind)


def _asker(
    function: Callable[[np.random.Generator, Story, str], Question | None], kind: str
) -> Callable[[np.random.Generator, Story], Question | None]:
    return lambda rng, story: function(rng, story, kind)


_ASKERS = {
    "color": _asker(_ask_attribute, "color"),
    "shape": _asker(_ask_attribute, "shape"),
    "needle": _asker(_ask_attribute, "needle"),
    "after": _asker(_ask_order, "after"),
    "before": _asker(_ask_order, "before"),
    "first": _asker(_ask_end, "first"),
    "last": _asker(_ask_end, "last"),
    "count": _asker(_ask_count, "count"),
    "exist": _asker(_ask_existence, "exist"),
    "describe": _asker(_ask_description, "describe"),
}


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------

BLOBS, BITS = 3, 5


@dataclass(frozen=True)
class Clips:
    """How `n` scenes look; every field has `n` entries. Lengths are in picture heights."""

    shape: Ints  # [n, 2], -1: no second thing
    color: Ints  # [n, 2]
    path: Array  # [n, 2, 2, 2] thing, start/end, x/y
    radius: Array  # [n, 2]
    ground: Array  # [n, 2, 3] colour at the top and at the bottom
    light: Array  # [n, 4] level, swing, turns, phase
    noise: Array  # [n] standard deviation, of 255
    blob: Array  # [n, BLOBS, 7] x, y, drift x, drift y, size, gray, tint
    stripe: Array  # [n, 5] strength, waves per height, angle, phase, drift
    bit: Array  # [n, BITS, 6] x, y, drift x, drift y, radius, gray (negative: none)

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, index: Ints | slice) -> Clips:
        return Clips(**{field.name: getattr(self, field.name)[index] for field in fields(self)})

    def __repr__(self) -> str:
        return f"Clips({len(self)})"


def draw_clips(rng: np.random.Generator, things: Sequence[tuple[Thing, ...]]) -> Clips:
    """Draw the looks of one scene for each entry of `things` (one or two things)."""
    n = len(things)
    shape = np.full((n, 2), -1, np.int64)
    color = np.zeros((n, 2), np.int64)
    for i, shown in enumerate(things):
        for j, thing in enumerate(shown):
            shape[i, j], color[i, j] = thing.shape, thing.color
    path, radius = _draw_paths(rng, shape[:, 1] >= 0)
    cluttered = rng.random(n) < CLUTTER
    which = rng.integers(1, 8, n) * cluttered  # bits: blobs, stripes, small gray bits
    blob = np.stack(
        [
            rng.uniform(0, ASPECT, (n, BLOBS)),
            rng.uniform(0, 1, (n, BLOBS)),
            rng.uniform(-0.3, 0.3, (n, BLOBS)),
            rng.uniform(-0.3, 0.3, (n, BLOBS)),
            rng.uniform(0.1, 0.22, (n, BLOBS)),
            rng.uniform(-45, 45, (n, BLOBS)) * ((which & 1) > 0)[:, None],
            rng.uniform(-10, 10, (n, BLOBS)) * ((which & 1) > 0)[:, None],
        ],
        -1,
    )
    stripe = np.stack(
        [
            rng.uniform(8, 22, n) * ((which & 2) > 0),
            rng.uniform(2, 6, n),
            rng.uniform(0, np.pi, n),
            rng.uniform(0, 2 * np.pi, n),
            rng.uniform(-6, 6, n),
        ],
        -1,
    )
    bit = np.stack(
        [
            rng.uniform(0, ASPECT, (n, BITS)),
            rng.uniform(0, 1, (n, BITS)),
            rng.uniform(-0.4, 0.4, (n, BITS)),
            rng.uniform(-0.4, 0.4, (n, BITS)),
            rng.uniform(0.03, 0.055, (n, BITS)),
            np.where(((which & 4) > 0)[:, None], rng.uniform(50, 195, (n, BITS)), -1.0),
        ],
        -1,
    )
    gray = rng.uniform(75, 185, (n, 1, 1))
    ground = gray + rng.uniform(-20, 20, (n, 2, 1)) + rng.uniform(-28, 28, (n, 2, 3))
    ground = np.clip(ground, 60, 200)  # neither black nor white
    light = np.stack(
        [
            rng.uniform(0.87, 1.08, n),
            rng.uniform(0, 0.07, n),
            rng.uniform(0.3, 2, n),
            rng.uniform(0, 2 * np.pi, n),
        ],
        -1,
    )
    arrays = (path, radius, ground, light, rng.uniform(2, 8, n), blob, stripe, bit)
    return Clips(shape, color, *(np.asarray(array, np.float32) for array in arrays))


def _draw_paths(rng: np.random.Generator, two: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Straight paths inside the picture; two things keep to their halves."""
    n = len(two)
    radius = rng.uniform(0.2, 0.3, (n, 2))
    radius[two] = rng.uniform(0.19, 0.25, (int(two.sum()), 2))
    low = np.stack([radius, radius], -1) * 0.95  # [n, 2, xy]
    high = np.array([ASPECT, 1.0]) - low
    left = rng.integers(0, 2, n)  # which of two things is on the left
    rows = np.flatnonzero(two)
    high[rows, left[rows], 0] = ASPECT / 2 - radius[rows, left[rows]]
    low[rows, 1 - left[rows], 0] = ASPECT / 2 + radius[rows, 1 - left[rows]]
    start = rng.uniform(low, high)
    end = np.clip(start + rng.uniform(-0.5, 0.5, start.shape), low, high)
    return np.asarray(np.stack([start, end], 2), np.float32), np.asarray(radius, np.float32)


def render(
    rng: np.random.Generator,
    clips: Clips,
    progress: Array,
    size: tuple[int, int],
    *,
    soft: float = 1.0,
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Render frame i of `clips[i]` at `progress[i]` in [0, 1].

    Args:
        rng: For the noise.
        clips: The looks, one entry per frame (`clips[index]` repeats them).
        progress: How far the scene has gone, `[n]`.
        size: Height and width in pixels; the world is stretched to it.
        soft: Width of the edges in pixels.

    Returns:
        Frames uint8 `[n, height, width, 3]`, and how much of each pixel each thing covers,
        float32 `[n, 2, height, width]`.
    """
    height, width = size
    n = len(clips)
    x = ((np.arange(width, dtype=np.float32) + 0.5) / width * ASPECT)[None, None]  # [1, 1, w]
    y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[None, :, None]  # [1, h, 1]
    at = np.asarray(progress, np.float32)
    picture = _ground(clips, at, x, y)
    cover = np.zeros((n, 2, height, width), np.float32)
    place = clips.path[:, :, 0] + (clips.path[:, :, 1] - clips.path[:, :, 0]) * at[:, None, None]
    for j in (0, 1):
        for s, name in enumerate(SHAPES):
            rows = np.flatnonzero(clips.shape[:, j] == s)
            if not len(rows):
                continue
            radius = clips.radius[rows, j, None, None]
            inside = _FIELDS[name](
                (x - place[rows, j, 0, None, None]) / radius,
                (y - place[rows, j, 1, None, None]) / radius,
            )
            cover[rows, j] = np.clip(inside * radius * (height / soft) + 0.5, 0, 1)
        paint = np.array(list(RGB.values()), np.float32)[clips.color[:, j]]  # [n, 3]
        picture += cover[:, j, ..., None] * (paint[:, None, None] - picture)
    level, swing, turns, phase = clips.light.T
    picture *= (level + swing * np.sin(2 * np.pi * turns * at + phase))[:, None, None, None]
    grain = rng.standard_normal((n, height, width, 1), dtype=np.float32)
    picture += grain * clips.noise[:, None, None, None]
    return np.clip(picture, 0, 255).astype(np.uint8), cover


def _ground(clips: Clips, at: Array, x: Array, y: Array) -> Array:
    """Background and clutter, `[n, height, width, 3]`."""
    top, bottom = clips.ground[:, 0, None, None], clips.ground[:, 1, None, None]
    picture = top + (bottom - top) * y[..., None] + np.zeros_like(x)[..., None]
    rows = np.flatnonzero(clips.stripe[:, 0])
    strength, waves, angle, phase, drift = clips.stripe[rows].T[..., None, None]
    along = x * np.cos(angle) + y * np.sin(angle)
    turn = 2 * np.pi * waves * along + phase + drift * at[rows, None, None]
    picture[rows] += (strength * np.sin(turn))[..., None]
    rows = np.flatnonzero(clips.blob[:, 0, 5])
    for px, py, dx, dy, size, gray, tint in np.moveaxis(clips.blob[rows], 0, -1)[..., None, None]:
        go = at[rows, None, None]
        far = ((x - px - dx * go) ** 2 + (y - py - dy * go) ** 2) / (size * size)
        bump = np.exp(-0.5 * far)[..., None]
        picture[rows] += bump * np.stack([gray + tint, gray, gray - tint], -1)
    rows = np.flatnonzero(clips.bit[:, 0, 5] >= 0)
    for px, py, dx, dy, size, gray in np.moveaxis(clips.bit[rows], 0, -1)[..., None, None]:
        go = at[rows, None, None]
        far = np.hypot(x - px - dx * go, y - py - dy * go)
        mask = np.clip((size - far) * y.shape[1] + 0.5, 0, 1)[..., None]
        picture[rows] += mask * (gray[..., None] - picture[rows])
    return picture
