"""Stage 2: the language model learns on a bank of tower features, many questions per video.

One sequence holds a video and a dozen questions on it. Each question sees the video and itself
only, at the positions it would have alone, so that nothing leaks from one to the next and every
question is what inference will see.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
)

from tokenprune.eval.mini.architecture import Architecture
from tokenprune.eval.mini.tower import draw_frames
from tokenprune.eval.mini.vocabulary import TOKENS
from tokenprune.eval.mini.world import (
    COLORS,
    KINDS,
    MAX_COUNT,
    NUMBERS,
    SHAPES,
    Question,
    Story,
    Thing,
    ask,
    draw_clips,
    draw_story,
    frame_scenes,
    stream,
)

__all__ = [
    "Bank",
    "Batch",
    "FrameSource",
    "Tally",
    "align_lateness",
    "align_words",
    "balancing",
    "build_bank",
    "draw_batch",
    "forward",
    "soften",
    "thin",
]

BANK_STEPS = 8  # frames per clip
TARGET_SPREAD = 0.4  # variance of thing features along each axis, beside embeddings of 0.08²
QUIET = 1.0  # deviation of features in directions that tell nothing, before balancing
# Of the loss; others 1. A video has one question about its last thing, but several of other kinds.
LOSS_WEIGHTS = {"describe": 0.4, "last": 6.0, "count": 2.0, "exist": 5.0}
# How often kinds of questions are drawn; others 1.
WEIGHTS = {"color": 2, "after": 3, "before": 3, "count": 6, "shape": 2, "exist": 5, "last": 4}


# ---------------------------------------------------------------------------------------------
# Attention for training
# ---------------------------------------------------------------------------------------------


def _attention_by_question(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over the video, then the questions under their own mask: training only.

    `attention_mask` has the rows of the questions, `[B, 1, Q, N + Q]`. Rows of the video are
    worked off in blocks, which skips most of the masked half.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).bfloat16() for x in (key, value))
    query = (query * scaling).bfloat16()
    n = query.shape[2] - attention_mask.shape[2]
    blocks = max(1, round(n / 200))
    edges = [n * i // blocks for i in range(blocks + 1)]
    outs = []
    for a, b in zip(edges, edges[1:], strict=False):
        future = torch.ones(b - a, b, dtype=torch.bool).triu(a + 1)
        outs.append(_attend(query[:, :, a:b], key[:, :, :b], value[:, :, :b], future))
    outs.append(_attend(query[:, :, n:], key, value, ~attention_mask))
    return torch.cat(outs, 2).transpose(1, 2), None


def _attend(query: Tensor, key: Tensor, value: Tensor, hidden: Tensor) -> Tensor:
    scores = (query @ key.transpose(-1, -2)).masked_fill(hidden, -1e9)
    return scores.softmax(-1).to(value.dtype) @ value


AttentionInterface.register("mini_by_question", _attention_by_question)
AttentionMaskInterface.register("mini_by_question", lambda *_, **__: None)


# ---------------------------------------------------------------------------------------------
# Where frame features come from
# ---------------------------------------------------------------------------------------------


class FrameSource(Protocol):
    """Turns a story into the features of its sampled frames."""

    @property
    def pairs(self) -> Sequence[tuple[Thing, Thing]] | None:
        """The only two-thing scenes it has; None for any."""
        ...

    @property
    def nothing(self) -> Tensor | None:
        """Feature `[D]` of a token that shows no thing."""
        ...

    def features(self, rng: np.random.Generator, story: Story, frames: int, phase: float) -> Tensor:
        """Features `[F, tokens, D]` of frames at `(i + phase)` intervals."""
        ...


def scene_progress(scenes: NDArray[np.int64]) -> NDArray[np.float32]:
    """How far its scene has gone at each frame, in (0, 1), `[F]`."""
    _, first, count = np.unique(scenes, return_index=True, return_counts=True)
    rank = np.arange(len(scenes)) - np.repeat(first, count)
    return np.asarray((rank + 0.5) / np.repeat(count, count), np.float32)


@dataclass
class Bank:
    """Features of prerendered clips, a few for every thing and some with two."""

    data: Tensor  # [clips, BANK_STEPS, tokens, D]
    things: list[tuple[Thing, ...]]
    rows: dict[tuple[Thing, ...], list[int]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for row, things in enumerate(self.things):
            self.rows[things].append(row)
        self.pairs = [things for things in self.rows if len(things) == 2]
        self.nothing = self.data[::7, 0].float().flatten(0, 1).median(0).values

    @classmethod
    def load(cls, path: Path) -> Bank:
        """Read a bank saved as `{"data": tensor, "things": [[(shape, color), ...], ...]}`."""
        saved = torch.load(path)
        return cls(saved["data"], [tuple(Thing(*t) for t in shown) for shown in saved["things"]])

    def features(self, rng: np.random.Generator, story: Story, frames: int, phase: float) -> Tensor:
        scenes = frame_scenes(story, frames, story.interval_seconds, phase)
        clips = np.array([rng.choice(self.rows[scene.things]) for scene in story.scenes])
        steps = (scene_progress(scenes) * BANK_STEPS).astype(np.int64)
        if rng.random() < 0.5:
            steps = BANK_STEPS - 1 - steps
        return self.data[clips[scenes], steps].float()


def build_bank(
    mini: Architecture, rng: np.random.Generator, *, clips: int = 24, pairs: int = 800
) -> Bank:
    """Render and encode `clips` clips of every thing and `pairs` clips with two things."""
    things: list[tuple[Thing, ...]] = [
        (Thing(shape, color),)
        for shape in range(len(SHAPES))
        for color in range(len(COLORS))
        for _ in range(clips)
    ]
    for _ in range(pairs):
        two = rng.choice(len(SHAPES), 2, replace=False)
        things.append(tuple(Thing(int(s), int(rng.integers(len(COLORS)))) for s in two))
    data = []
    progress = (np.arange(BANK_STEPS, dtype=np.float32) + 0.5) / BANK_STEPS
    with torch.no_grad():
        for start in range(0, len(things), 16):
            part = things[start : start + 16]
            looks = draw_clips(rng, part)[np.repeat(np.arange(len(part)), BANK_STEPS)]
            frames, _ = draw_frames(mini, rng, looks, np.tile(progress, len(part)))
            features = mini.encode(frames)
            by_clip: Tensor = features.unflatten(0, (len(part), BANK_STEPS))  # type: ignore[no-untyped-call]
            data.append(by_clip.half())
    return Bank(torch.cat(data), things)


def thing_means(bank: Bank) -> tuple[Tensor, Tensor]:
    """Mean feature of every thing `[shapes, colors, D]`, and of a token that shows none `[D]`."""
    single = [row for row, things in enumerate(bank.things) if len(things) == 1]
    tokens = bank.data[single, ::2].float()  # [clips, steps, tokens, D]
    nothing = tokens.flatten(0, 2)[::7].median(0).values
    farthest = (tokens - nothing).norm(dim=-1).argmax(-1, keepdim=True)[..., None]
    shown = tokens.take_along_dim(farthest, 2).flatten(1, 2).mean(1)  # [clips, D]
    shapes = torch.tensor([bank.things[row][0].shape for row in single])
    colors = torch.tensor([bank.things[row][0].color for row in single])
    means = torch.zeros(len(SHAPES), len(COLORS), shown.shape[-1])
    for shape in range(len(SHAPES)):
        for color in range(len(COLORS)):
            means[shape, color] = shown[(shapes == shape) & (colors == color)].mean(0)
    return means, nothing


def balancing(bank: Bank) -> Tensor:
    """A matrix `[D, D]` that gives all directions in which things differ about the same spread.

    Features of a trained tower tell shapes apart along a few directions that drown the rest. Those
    of some are far larger than what a layer adds to them, so that frames hardly learn of each
    other: they are brought down. The matrix is folded into the tower's last layer.
    """
    things, nothing = thing_means(bank)
    means = things.flatten(0, 1)
    means = torch.cat([means, nothing.expand(len(means) // 8, -1)])
    means = means - means.mean(0)
    spread, axes = torch.linalg.eigh(means.T @ means / len(means))
    classes = len(SHAPES) + len(COLORS)
    spread, axes = spread[-classes:], axes[:, -classes:]
    within = axes @ axes.T
    beside = torch.eye(len(within)) - within
    tokens = bank.data[::7].float().flatten(0, 2) @ beside
    loud = max(1.0, float(tokens.std(0).norm()) / QUIET)
    scale = (TARGET_SPREAD / spread).sqrt().clamp(0.2 / loud, 3.5)
    matrix: Tensor = axes @ torch.diag(scale) @ axes.T + 0.7 / loud * beside
    return matrix


def align_words(mini: Architecture, bank: Bank) -> None:
    """Start the words for shapes and colours where the tower puts what they name.

    The first layers start with two heads that look for the same shape and tell the colour, and
    two that look for the same colour and tell the shape. From random weights, shapes are not
    looked up for the first thousand steps. All of it is trained like the rest.
    """
    means, _ = thing_means(bank)
    with torch.no_grad():
        axes = []
        for words, direction in zip((SHAPES, COLORS), _directions(means), strict=True):
            for word, row in zip(words, direction, strict=True):
                mini.decoder.embed_tokens.weight[TOKENS[word]] = 0.9 * row / row.norm()
            axes.append(torch.linalg.svd(direction)[2][: len(direction) - 1])
        for layer in mini.decoder.layers[:3]:
            _align_layer(layer.self_attn, *axes)


def soften(mini: Architecture) -> None:
    """Make attention less sharp, most of all where the first layer looks for a colour.

    Trained for long, a head looks at the one red thing that is loudest rather than at all of them,
    and what it does not look at passes no gradient on: "was there a red star ?" fails if another
    red thing is louder.
    """
    with torch.no_grad():
        for number, layer in enumerate(mini.decoder.layers):
            query = _heads(layer.self_attn)[0]
            bias = layer.self_attn.q_proj.bias.unflatten(0, (-1, layer.self_attn.head_dim))
            for head in range(len(query)):
                factor = 0.4 if number == 0 and head >= len(query) // 2 else 0.8
                query[head] *= factor
                bias[head] *= factor


def _directions(means: Tensor) -> tuple[Tensor, Tensor]:
    """How the features of each shape and of each colour differ from those of all, `[n, D]`."""
    middle = means.mean((0, 1))
    return means.mean(1) - middle, means.mean(0) - middle


def _heads(attention: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of queries, keys and values, head by head: `[heads, size, D]`."""
    query, key, value = (
        getattr(attention, f"{name}_proj").weight.unflatten(0, (-1, attention.head_dim))
        for name in "qkv"
    )
    return query, key, value


def _align_layer(attention: Any, shapes: Tensor, colors: Tensor) -> None:
    size = attention.head_dim
    # The slower half of a head's axes, which hardly turn.
    still = torch.cat([torch.arange(size // 4, size // 2), torch.arange(3 * size // 4, size)])
    strength = 0.7 * (size / 32) ** 0.25  # scores are divided by the root of the size
    query, key, value = _heads(attention)
    output = attention.o_proj.weight.unflatten(1, (-1, size))  # [D, heads, size]
    for group, (same, told) in enumerate(((shapes, colors), (colors, shapes))):
        spread = torch.linalg.qr(torch.randn(len(still), len(same)))[0]
        look = strength * spread @ same
        key[group, still] = look
        value[group, : len(told)] = told
        for head in (2 * group, 2 * group + 1):
            query[head, still] = look
            output[:, head, : len(told)] = 0.15 * told.T


LATE_AXIS = 6  # of the temporal frequencies: 0.0133 a frame, monotone over 235 frames
LATE_MIDDLE = 56  # frames between the text and the middle of what must be told apart
LATE_SCALE = 22.0  # of query and key along that axis: a step of about one logit a frame


def align_lateness(mini: Architecture, source: FrameSource, seed: int = 0) -> None:
    """Start one head of the second and of the third layer so that "last" looks at late frames.

    The text's positions lie amid those of the frames, so "last" is neither the nearest frame nor
    the farthest, and content does not tell it: nothing has come yet after what is last. The slow
    rotation of one temporal frequency grows with time throughout, but random weights are far too
    small there to tell two scenes apart, and training alone did not find it in an hour.
    """
    language = mini.decoder
    size = language.layers[0].self_attn.head_dim
    axis = [LATE_AXIS, LATE_AXIS + size // 2]
    turn = LATE_MIDDLE * float(language.rotary_emb.inv_freq[LATE_AXIS]) + math.pi / 2
    query_phase = LATE_SCALE * torch.tensor([math.cos(turn), math.sin(turn)])
    group, head = 1, 3  # the group whose values tell shapes, see _align_layer
    for number in (1, 2):
        found, mean = _direction_of("last", number, mini, source, seed)
        attention = language.layers[number].self_attn
        query, key = (
            (part.weight.unflatten(0, (-1, size)), part.bias.unflatten(0, (-1, size)))
            for part in (attention.q_proj, attention.k_proj)
        )
        with torch.no_grad():
            key[0][group, axis] = 0.0
            key[1][group, axis] = torch.tensor([LATE_SCALE, 0.0])
            for one in range(2 * group, 2 * group + 2):  # the other head stays blind to time here
                query[0][one, axis] = 0.0
                query[1][one, axis] = 0.0
            # Asked for by "last", the head looks at nothing but time.
            query[0][head] -= (query[0][head] @ mean + query[1][head])[:, None] * found
            query[0][head, axis] = query_phase[:, None] * found


def _direction_of(
    word: str, layer: int, mini: Architecture, source: FrameSource, seed: int
) -> tuple[Tensor, Tensor]:
    """What tells a word from all other tokens at a layer's input, and its mean state, `[D]`.

    The product of both is 1; that of the direction and another token's state is about 0.
    """
    rng = stream("train", 4, seed, layer)
    states, is_word = [], []
    with torch.no_grad():
        for _ in range(6):
            batch = draw_batch(rng, mini, source, videos=8, frames=40, questions=16, describe=False)
            hidden = forward_with_hidden(mini, batch)[1][layer].float()
            normed = mini.decoder.layers[layer].input_layernorm(hidden)
            media = normed.shape[1] - batch.text.shape[1]
            states += [normed[:, :media:7].flatten(0, 1), normed[:, media:].flatten(0, 1)]
            is_word += [
                torch.zeros(len(states[-2])),
                (batch.text.flatten() == TOKENS[word]).float(),
            ]
    x, y = torch.cat(states), torch.cat(is_word)
    weight = torch.where(y > 0, (1 - y).sum() / y.sum(), torch.ones(()))  # both classes alike
    moments = (x * weight[:, None]).T @ x / weight.sum()
    moments += 0.01 * moments.diagonal().mean() * torch.eye(len(moments))
    direction = torch.linalg.solve(moments, ((weight * y)[:, None] * x).mean(0))
    mean = x[y > 0].mean(0)
    return direction / (direction @ mean), mean


# ---------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """`B` videos of the same length with their questions.

    `text` and what follows it cover the `Q` question tokens only, padded on the right. `P` tokens
    come before them.
    """

    features: Tensor  # [B, N, D], of F * tokens or, thinned, fewer
    text: Tensor  # [B, Q] token ids
    target: Tensor  # [B, Q] next token where it belongs to an answer, else -100
    weight: Tensor  # [B, Q]
    mask: Tensor  # [B, 1, Q, P + Q]
    positions: Tensor  # [1 or 3, B, P + Q]
    asked: list[list[tuple[Question, int, int]]]  # with start and end of the answer in `target`
    early: Tensor  # [B, Q, 4] targets of ContextHeads, in the last words of some questions
    context: Tensor | None = None  # [B, N, 3] targets of ContextHeads


class ContextHeads(nn.Module):
    """What a token that shows a thing can know of the scenes before: trained beside the answers.

    The thing of the scene before (shape and colour), and how often its own shape has come so
    far. The words of a few kinds of questions learn the answer early, too: shape, colour, count,
    yes or no. Dropped after training.
    """

    context_classes = (len(SHAPES), len(COLORS), MAX_COUNT + 1)
    early_classes = (*context_classes, 2)
    layers = (2, 3)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.context = nn.ModuleList(
            nn.Linear(width, sum(self.context_classes)) for _ in self.layers
        )
        # The second layer does not know yet what came before.
        self.early = nn.Linear(width, sum(self.early_classes))

    def loss(self, hidden: Sequence[Tensor], batch: Batch) -> Tensor:
        """Mean cross entropy; `hidden[i]` is `[B, P + Q, D]` after layer i."""
        assert batch.context is not None
        total = torch.zeros(())
        n = batch.features.shape[1]
        for layer, head in zip(self.layers, self.context, strict=True):
            states = F.rms_norm(hidden[layer].float(), hidden[layer].shape[-1:])
            logits = head(states[:, 2 : n + 2])
            total = total + self._loss(logits, batch.context, self.context_classes)
        words = self.early(states[:, -batch.text.shape[1] :])
        return total + self._loss(words, batch.early, self.early_classes)

    def _loss(self, logits: Tensor, targets: Tensor, classes: tuple[int, ...]) -> Tensor:
        total = torch.zeros(())
        parts: Sequence[Tensor] = logits.split(classes, -1)  # type: ignore[no-untyped-call]
        for part, target in zip(parts, targets.unbind(-1), strict=True):
            asked = (target >= 0).sum().clamp(min=1)  # of a one-scene video, nothing
            each = F.cross_entropy(part.flatten(0, 1), target.flatten(), reduction="sum")
            total = total + each / asked
        return total / len(classes)


def context_targets(story: Story, scenes: NDArray[np.int64], shows: Tensor) -> Tensor:
    """Targets of ContextHeads `[F * tokens, 3]`, -100 where unknown or where no thing is shown."""
    scene_targets = torch.full((len(story.scenes), 3), -100)
    seen: dict[int, int] = defaultdict(int)
    for i, scene in enumerate(story.scenes):
        for thing in scene.things:
            seen[thing.shape] += 1
        if len(scene.things) == 1:
            scene_targets[i, 2] = seen[scene.things[0].shape]
        if i and len(story.scenes[i - 1].things) == 1:
            before = story.scenes[i - 1].things[0]
            scene_targets[i, :2] = torch.tensor([before.shape, before.color])
    frames = scene_targets[torch.from_numpy(scenes)][:, None].expand(-1, shows.shape[1], -1)
    return torch.where(shows[..., None], frames, -100).flatten(0, 1)


def draw_questions(rng: np.random.Generator, story: Story, count: int) -> list[Question]:
    """About `count` different questions on a story, hard kinds more often."""
    weights = np.array([WEIGHTS.get(kind, 1) for kind in KINDS], np.float64)
    kinds = rng.choice(len(KINDS), 2 * count, p=weights / weights.sum())
    drawn = (ask(rng, story, KINDS[k]) for k in kinds)
    return list(dict.fromkeys(question for question in drawn if question))[:count]


def draw_interval(rng: np.random.Generator, frames: int) -> float:
    """Seconds between frames: 1 to 4, often near the three of a long file."""
    if rng.random() < 0.4:
        return float(rng.uniform(2.4, 3.2))
    return float(np.exp(rng.uniform(0, np.log(4 if frames < 96 else 3))))


def draw_batch(
    rng: np.random.Generator,
    mini: Architecture,
    source: FrameSource,
    *,
    videos: int,
    frames: int,
    questions: int,
    describe: bool = True,
    interval: float | None = None,
) -> Batch:
    """Draw `videos` videos of `frames` frames with about `questions` questions each."""
    features, asked, context = [], [], []
    for _ in range(videos):
        seconds = interval or draw_interval(rng, frames)
        story = draw_story(rng, frames=frames, interval_seconds=seconds, pairs=source.pairs)
        phase = float(rng.random())
        seen = source.features(rng, story, frames, phase)
        features.append(seen.flatten(0, 1))
        if source.nothing is not None:
            scenes = frame_scenes(story, frames, seconds, phase)
            far = (seen - source.nothing).norm(dim=-1)  # [F, tokens]
            context.append(context_targets(story, scenes, far > 0.6 * far.amax(1, keepdim=True)))
        drawn = draw_questions(rng, story, questions)
        described = ask(rng, story, "describe") if describe else None
        asked.append([*drawn, described] if described else drawn)
    batch = _assemble(mini, features, asked, frames)
    batch.context = torch.stack(context) if context else None
    return batch


def _assemble(
    mini: Architecture, features: list[Tensor], asked: list[list[Question]], frames: int
) -> Batch:
    rows, spans = [], []
    for questions in asked:
        ids: list[int] = []
        target: list[int] = []
        owner: list[int] = []
        offset: list[int] = []
        weight: list[float] = []
        span = []
        for number, question in enumerate(questions):
            words = [TOKENS[word] for word in f"{question.text} <|assistant|>".split()]
            answer = [TOKENS[word] for word in f"{question.answer} <|end|>".split()]
            ids += words + answer[:-1]  # <|end|> is predicted, not fed
            span.append((question, len(ids) - len(answer), len(ids)))
            target += [-100] * (len(words) - 1) + answer
            size = len(words) + len(answer) - 1
            owner += [number] * size
            offset += range(size)
            weight += [LOSS_WEIGHTS.get(question.kind, 1.0)] * size
        rows.append((ids, target, owner, offset, weight))
        spans.append(span)
    longest = max(len(row[0]) for row in rows)

    def padded(which: int, fill: float) -> Tensor:
        return torch.tensor([[*row[which], *[fill] * (longest - len(row[0]))] for row in rows])

    owner_ids, offsets = padded(2, -1).long(), padded(3, 0).long()
    prefix, text_start = mini.positions(frames)
    text_positions = (text_start + offsets).expand(len(prefix), -1, -1)
    own = owner_ids[:, :, None] == owner_ids[:, None, :]
    own = own & torch.ones(longest, longest, dtype=torch.bool).tril()
    seen = torch.ones(len(rows), longest, prefix.shape[1], dtype=torch.bool)
    early = torch.full((len(rows), longest, 4), -100)
    for row, span in enumerate(spans):
        for question, start, _ in span:
            early[row, start - 2 : start + 1] = _early_target(question)
    return Batch(
        torch.stack(features),
        padded(0, 0).long(),
        padded(1, -100).long(),
        padded(4, 0.0).float(),
        torch.cat([seen, own], 2)[:, None],
        torch.cat([prefix[:, None].expand(-1, len(rows), -1), text_positions], 2),
        spans,
        early,
    )


def _early_target(question: Question) -> Tensor:
    """What a question's last words are to know early: shape, colour, count, existence, `[4]`."""
    target = torch.full((4,), -100)
    if question.kind in ("after", "before"):
        color, shape = question.answer.split()
        target[:2] = torch.tensor((SHAPES.index(shape), COLORS.index(color)))
    elif question.kind == "last":
        target[0] = SHAPES.index(question.answer)
    elif question.kind == "count":
        target[2] = NUMBERS.index(question.answer)
    elif question.kind == "exist":
        target[3] = question.answer == "yes"
    return target


def thin(batch: Batch, frame_tokens: int, rng: np.random.Generator) -> Batch:
    """Leave out some of the media tokens, the same number in every video.

    A model that has only ever seen whole frames comes to lean on their background, as a place to
    attend to when nothing matches, and fails without it whatever else is kept. Anything from a
    fifth of the tokens is kept, by chance, by how much they differ from the background, or by a
    mixture of both. Of every frame the most different token stays, so that questions keep their
    answers.
    """
    videos, tokens = batch.features.shape[:2]
    frames = tokens // frame_tokens
    count = round(tokens * float(np.exp(rng.uniform(np.log(0.2), 0))))
    plain = batch.features.flatten(0, 1).median(0).values  # most tokens show background
    shows = (batch.features - plain).norm(dim=-1)
    noise = torch.from_numpy(rng.standard_normal((videos, tokens))).float()
    score = float(rng.choice([0, 0.5, 1, 3])) * shows / shows.std() + noise
    best = shows.unflatten(1, (frames, frame_tokens)).argmax(-1)
    best = best + torch.arange(frames) * frame_tokens
    score.scatter_(1, best, torch.inf)
    kept = score.topk(count, dim=1).indices.sort(dim=1).values  # [B, count]
    sequence = torch.cat(
        [
            torch.arange(2).expand(videos, -1),
            kept + 2,
            torch.arange(tokens + 2, batch.positions.shape[-1]).expand(videos, -1),
        ],
        1,
    )
    positions = batch.positions.gather(2, sequence.expand(len(batch.positions), -1, -1))
    return replace(
        batch,
        features=batch.features.take_along_dim(kept[..., None], 1),
        mask=batch.mask[..., tokens - count :],
        positions=positions,
        context=None if batch.context is None else batch.context.take_along_dim(kept[..., None], 1),
    )


def forward(mini: Architecture, batch: Batch) -> Tensor:
    """Logits at the question tokens, `[B, Q, V]`. Needs "mini_by_question" attention."""
    return forward_with_hidden(mini, batch)[0]


def forward_with_hidden(mini: Architecture, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Logits as `forward`, and the hidden states `[B, P + Q, D]` before and after each layer."""
    embed = mini.decoder.embed_tokens
    opening, ending = (
        part.expand(len(batch.text), -1, -1) for part in (mini.embed(*mini.opening), mini.ending())
    )
    with torch.autocast("cpu", torch.bfloat16):
        output = mini.decoder(
            inputs_embeds=torch.cat([opening, batch.features, ending, embed(batch.text)], 1),
            attention_mask={"full_attention": batch.mask},
            position_ids=batch.positions.squeeze(0),  # a single axis has no dimension of its own
            use_cache=False,
            output_hidden_states=True,
        )
    asked = output.last_hidden_state[:, -batch.text.shape[1] :].float()
    return F.linear(asked, embed.weight), list(output.hidden_states)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """Weighted mean cross entropy of the answer tokens."""
    each = F.cross_entropy(logits.flatten(0, 1), batch.target.flatten(), reduction="none")
    weight = batch.weight.flatten() * (batch.target.flatten() >= 0)
    return (each * weight).sum() / weight.sum()


@dataclass
class Tally:
    """Right and asked questions by kind."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def add(self, kind: str, right: bool) -> None:
        self.right[kind] += right
        self.asked[kind] += 1

    def add_batch(self, logits: Tensor, batch: Batch) -> None:
        """Count answers that are right in every token, given the tokens before."""
        same = logits.argmax(-1) == batch.target
        for row, spans in zip(same, batch.asked, strict=True):
            for question, start, end in spans:
                self.add(question.kind, bool(row[start:end].all()))

    @property
    def accuracy(self) -> float:
        """Mean over all questions but "describe"."""
        asked = sum(n for kind, n in self.asked.items() if kind != "describe")
        return sum(n for kind, n in self.right.items() if kind != "describe") / max(1, asked)

    def __str__(self) -> str:
        parts = (f"{k} {self.right[k] / self.asked[k]:.2f}" for k in sorted(self.asked))
        return f"{self.accuracy:.3f} ({', '.join(parts)})"
