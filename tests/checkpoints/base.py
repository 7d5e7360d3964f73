"""What the checkpoints share: tokenizers, chat templates, sizes of pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from tokenprune.testing.tiny import PAD, VOCABULARY

SPECIAL = {PAD: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}

Maker = Callable[[], Any]
"""Makes the processor of a family."""
Saver = Callable[[Any, Path], None]
"""Saves the model of a family that is not released as `save_pretrained` would write it."""


def tokenizer(names: dict[int, str], **named: str) -> Any:
    """A tokenizer of characters.

    Args:
        names: Special tokens by their number in the tiny models.
        named: What the processor of the family asks the tokenizer for.
    """
    special = {**SPECIAL, **names}
    characters = ["\n", *map(chr, range(32, 127))]
    free = [number for number in range(VOCABULARY) if number not in special]
    fillers = [f" word{number}" for number in range(len(free) - len(characters))]
    vocabulary = dict(zip([*characters, *fillers], free, strict=True))
    vocabulary |= {token: number for number, token in special.items()}
    model = Tokenizer(BPE(vocabulary, merges=[], unk_token="<unk>"))
    model.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=list(names.values()),
        model_specific_special_tokens=named,
    )


def chat(**parts: str) -> str:
    """A chat template that writes these texts for images, videos and sounds."""
    media = "".join(
        f"{{% elif part['type'] == '{kind}' %}}{{{{ {text!r} }}}}" for kind, text in parts.items()
    )
    return (
        "{% for message in messages %}{{ message['role'] }}: "
        "{% if message['content'] is string %}{{ message['content'] }}"
        "{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}" + media + "{% endif %}"
        "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def shortest(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": square(side)}


def ear(seconds: int) -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)
