"""Accuracy of a model under recipes, on a task's held-out questions, through the public path."""

from __future__ import annotations

import importlib
import pkgutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tqdm import tqdm

from tokenprune.core.recipe import Recipe
from tokenprune.engine.patch import prune
from tokenprune.errors import RecipeError
from tokenprune.models.loaded import LoadedModel

__all__ = ["Result", "check_run", "evaluate_recipes", "find_task"]


class Task(Protocol):
    """A module of `eval/tasks/`."""

    max_new_tokens: int
    """Longest answer."""

    def samples(self, count: int, *, frames: int, seed: int) -> Sequence[Any]:
        """Held-out samples, each with `question`, `answer` and `kind`."""

    def encode(self, processor: Any, sample: Any) -> dict[str, Any]:
        """Model inputs, batch 1."""

    def score(self, answer: str, truth: str) -> float:
        """How right an answer is, 0 to 1."""


@dataclass
class Result:
    """What one recipe reached.

    Attributes:
        recipe: As text.
        kinds: The kind of each question, in order.
        scores: How right each answer was, 0 to 1.
        before: Media tokens, summed over the questions.
        per_layer: Media entries of each layer's cache, averaged over heads, summed likewise.
    """

    recipe: str
    kinds: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    before: int = 0
    per_layer: torch.Tensor | None = None

    @property
    def accuracy(self) -> float:
        """Mean score: the share of right answers, where answers are right or wrong."""
        return sum(self.scores) / len(self.scores)

    def by_kind(self) -> dict[str, float]:
        """Mean score for each kind of question."""
        groups: dict[str, list[float]] = defaultdict(list)
        for kind, score in zip(self.kinds, self.scores, strict=True):
            groups[kind].append(score)
        return {kind: sum(group) / len(group) for kind, group in sorted(groups.items())}

    def media_tokens(self) -> dict[str, Any]:
        """Means over the questions: before, after, and in each layer's cache."""
        count = len(self.scores)
        layers = [] if self.per_layer is None else (self.per_layer / count).tolist()
        return {
            "before": self.before / count,
            "after": sum(layers) / max(1, len(layers)),
            "per_layer": [round(entries, 2) for entries in layers],
        }

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "recipe": self.recipe,
            "accuracy": self.accuracy,
            "by_kind": self.by_kind(),
            "media_tokens": self.media_tokens(),
            "samples": len(self.scores),
        }

    def __str__(self) -> str:
        tokens = self.media_tokens()
        kinds = "  ".join(f"{kind} {share:.3f}" for kind, share in self.by_kind().items())
        layers = "/".join(f"{entries:g}" for entries in tokens["per_layer"])
        return (
            f"{self.recipe:<44} {self.accuracy:.3f}  of {len(self.scores)}  "
            f"media {tokens['before']:.0f} -> {layers} a layer  {kinds}"
        )


def find_task(name: str) -> Task:
    """The task of this name.

    Raises:
        RecipeError: There is none.
    """
    import tokenprune.eval.tasks as package

    modules = {m.name.replace("_", "-"): m.name for m in pkgutil.iter_modules(package.__path__)}
    if name not in modules:
        raise RecipeError(f"no task {name!r}; known: {', '.join(modules)}")
    module: Any = importlib.import_module(f"{package.__name__}.{modules[name]}")
    return module  # type: ignore[no-any-return]


def check_run(task: str, *, frames: int, samples: int, seed: int) -> None:
    """Check what `evaluate_recipes` is asked for.

    Raises:
        RecipeError: There is no such task, or a number is too small.
    """
    find_task(task)
    for name, value, least in (("frames", frames, 1), ("samples", samples, 1), ("seed", seed, 0)):
        if value < least:
            raise RecipeError(f"{name} must be at least {least}, got {value}")


def evaluate_recipes(
    loaded: LoadedModel,
    recipes: Sequence[Recipe],
    *,
    task: str = "mini-video",
    frames: int = 64,
    samples: int = 500,
    seed: int = 1,
    max_new_tokens: int | None = None,
) -> list[Result]:
    """Ask every question under every recipe.

    Args:
        loaded: The model.
        recipes: What to compare; every one sees the same inputs.
        task: Name of a module in `eval/tasks/`.
        frames: Frames of each video.
        samples: Number of questions.
        seed: Which questions.
        max_new_tokens: Longest answer; None for what the task needs.
    """
    check_run(task, frames=frames, samples=samples, seed=seed)
    module = find_task(task)
    longest = max_new_tokens or module.max_new_tokens
    results = [Result(str(recipe)) for recipe in recipes]
    for sample in tqdm(module.samples(samples, frames=frames, seed=seed), desc=task, unit="q"):
        inputs = module.encode(loaded.processor, sample)
        inputs = {
            name: value.to(loaded.model.device) if isinstance(value, torch.Tensor) else value
            for name, value in inputs.items()
        }
        for recipe, result in zip(recipes, results, strict=True):
            _ask(loaded, module, sample, inputs, recipe, result, longest)
    return results


def _ask(
    loaded: LoadedModel,
    task: Task,
    sample: Any,
    inputs: dict[str, Any],
    recipe: Recipe,
    result: Result,
    max_new_tokens: int,
) -> None:
    with torch.inference_mode(), prune(loaded.model, recipe) as report:
        output = loaded.model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    fresh = output[:, inputs["input_ids"].shape[1] :]
    words = loaded.processor.batch_decode(fresh, skip_special_tokens=True)[0]
    result.kinds.append(sample.kind)
    result.scores.append(float(task.score(words, sample.answer)))
    result.before += report.media_tokens.before
    entries = report.last.media_entries
    assert entries is not None
    layers = entries.double().mean(dim=2).sum(dim=0)
    result.per_layer = layers if result.per_layer is None else result.per_layer + layers
