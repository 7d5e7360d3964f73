"""Prompts: a question written with the chat template, with a placeholder for each medium."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenprune.errors import TokenPruneError, UnsupportedModelError

__all__ = ["check_question", "write_prompt"]


def check_question(question: str, placeholders: Mapping[str, str] | None = None) -> None:
    """Check that a question has words, and no placeholder among them.

    Args:
        question: In words.
        placeholders: The placeholder of each modality, as `placeholder_tokens` finds them; None
            where the processor is not known yet.

    Raises:
        TokenPruneError: The question is empty, or holds a placeholder.
    """
    if not question.strip():
        raise TokenPruneError(
            f"a question must have words, got {question!r}; ask something, such as 'what happens?'"
        )
    for modality, token in (placeholders or {}).items():
        if token in question:
            raise TokenPruneError(
                f"a question cannot hold {token!r}, which stands for {modality} tokens in a "
                "prompt; ask in words"
            )


def write_prompt(processor: Any, parts: list[dict[str, str]], question: str, *, name: str) -> str:
    """Write one turn of the user by the chat template, with a placeholder for each part.

    Args:
        processor: Of the model.
        parts: Such as `{"type": "image"}`, in order.
        question: In words.
        name: Of the model, for the error.

    Raises:
        UnsupportedModelError: The checkpoint has no chat template.
    """
    template = _with_template(processor, name)
    content = [*parts, {"type": "text", "text": question}]
    try:
        text = _apply(template, content)
    except TypeError:  # the template adds the content to a string
        text = str(content)
    if str(content) in text:  # it takes strings only: placeholders stand in the user's text
        tokens = [getattr(processor, f"{part['type']}_token") for part in parts]
        text = _apply(template, "".join(tokens) + question)
    return text


def _with_template(processor: Any, name: str) -> Any:
    """The processor or its tokenizer, whichever has the chat template."""
    for one in (processor, getattr(processor, "tokenizer", None)):
        if getattr(one, "chat_template", None):
            return one
    raise UnsupportedModelError(
        f"the processor of {name} has no chat template, so no prompt can be written; use a "
        "checkpoint tuned for chat"
    )


def _apply(template: Any, content: str | list[dict[str, str]]) -> str:
    chat = [{"role": "user", "content": content}]
    text: str = template.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return text
