"""The words of the mini models, their tokenizer and their chat."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tokenprune.eval.mini.world import COLORS, NUMBERS, SHAPES

__all__ = ["CHAT_TEMPLATE", "TOKENS", "build_tokenizer"]

SPECIAL = (
    "<|pad|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|unk|>",
)
GRAMMAR = "? . , what color is the shape came after before was first last how many times seen"
WORDS = (
    *GRAMMAR.split(),
    *"there a an yes no describe then and thing which were".split(),
    *NUMBERS,
    *SHAPES,
    *COLORS,
)
TOKENS = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that lowercases and splits punctuation off."""
    tokenizer = Tokenizer(models.WordLevel(TOKENS, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex("colour"), "color")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=[s for s in SPECIAL if s.startswith("<|") and "unk" not in s][2:],
        model_max_length=16384,
        clean_up_tokenization_spaces=False,
    )
