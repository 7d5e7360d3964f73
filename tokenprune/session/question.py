"""Answering a question on the branch of a watched prompt, and going back to where it began."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokenprune.engine.cache import CACHE_NAME, CACHE_NAMES
from tokenprune.engine.patch import Patch
from tokenprune.engine.prompt import Given
from tokenprune.engine.rollback import Bookmark
from tokenprune.errors import TokenPruneError
from tokenprune.models.loaded import LoadedModel
from tokenprune.report.report import Report
from tokenprune.session.positions import prompt_positions
from tokenprune.session.script import Tokens
from tokenprune.session.watched import Watched

__all__ = ["Question", "answer_words", "generate_from"]

_RESERVED = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", *CACHE_NAMES)


@dataclass(frozen=True)
class Question:
    """A question about what was watched.

    Attributes:
        watched: What it is about.
        words: What is asked.
        prompt: All tokens, those of what was watched included.
    """

    watched: Watched
    words: str
    prompt: Tokens

    @classmethod
    def about(cls, watched: Watched, words: str) -> Question:
        """The question, written as the processor writes it after the frames.

        Raises:
            TokenPruneError: It is empty, or holds a placeholder.
        """
        return cls(watched, words, watched.prompt.then(watched.script.suffix(words)))


def generate_from(
    question: Question,
    loaded: LoadedModel,
    patch: Patch,
    report: Report,
    settings: dict[str, Any],
) -> Any:
    """What the model's `generate` returns for a question, going on from what was watched.

    Args:
        question: The cache of what it is about is as before when this returns, or fails.
        loaded: The model that watched.
        patch: Of the session; its hooks are there for the time of the call.
        report: Is filled as the model runs, with what stages decide for this question alone.
        settings: Of `generate`.

    Returns:
        Tokens, or the object that `return_dict_in_generate` asks for, without its cache.

    Raises:
        TokenPruneError: A setting is the session's own.
    """
    cache, prompt, model = question.watched.cache, question.prompt, loaded.model
    if taken := sorted(set(settings) & set(_RESERVED)):
        raise TokenPruneError(
            f"{' and '.join(taken)} belong to the session; leave them out, or use `prune`"
        )
    if settings.get("use_cache") is False:
        raise TokenPruneError(
            "use_cache=False would forget what was watched; leave it out, or use `prune`"
        )
    rows = _rows(model, settings)
    # What prunes on the branch would take from the front, where a bookmark finds what was stored.
    mark = Bookmark(cache, whole=rows > 1 or patch.schedule.prunes_later)
    try:
        if rows > 1:  # `generate` repeats its inputs, but not a cache that it is given
            cache.batch_repeat_interleave(rows)
        calls = cache.layers[0].sequence.branch(rows)
        report.calls[:] = calls if report.calls else []
        with torch.no_grad(), patch.run(report, Given(question=question.words)):
            output: Any = model.generate(
                input_ids=prompt.ids,
                attention_mask=torch.ones_like(prompt.ids),
                position_ids=prompt_positions(loaded, prompt),
                **{CACHE_NAME: cache},
                **prompt.types,
                **settings,
            )
    finally:
        mark.restore()
    if getattr(output, CACHE_NAME, None) is not None:
        setattr(output, CACHE_NAME, None)  # it is the session's, and back at its old length
    return output


def answer_words(output: Any, question: Question, loaded: LoadedModel) -> str:
    """The answer in what `generate` returned; of several ones the first, which is the best."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    answers = sequences[:1, len(question.prompt) :]
    words: str = loaded.processor.batch_decode(answers, skip_special_tokens=True)[0]
    return words.strip()


def _rows(model: Any, settings: dict[str, Any]) -> int:
    """Rows that `generate` makes of one prompt."""
    config = settings.get("generation_config") or model.generation_config
    names = ("num_beams", "num_return_sequences")
    return max(settings.get(name) or getattr(config, name, None) or 1 for name in names)
