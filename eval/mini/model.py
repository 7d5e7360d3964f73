"""The mini video model: a very small Qwen2.5-VL and its processor, both built offline."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)

from tokenprune.eval.mini.world import COLORS, NUMBERS, SHAPES

__all__ = ["FRAME_SIZE", "FRAME_TOKENS", "build_model", "build_processor", "save"]

PATCH, MERGE = 8, 2
FRAME_SIZE = (48, 96)  # height, width after the video processor, for 16:9 pictures
FRAME_TOKENS = (FRAME_SIZE[0] // PATCH // MERGE) * (FRAME_SIZE[1] // PATCH // MERGE)
# Brings 16:9 pictures to 48x96, square ones to 64x64, 4:3 ones to 64x80.
PIXELS = {"shortest_edge": 4096, "longest_edge": 6144}

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
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
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


def build_processor() -> Qwen2VLProcessor:
    """The processor of the mini model; one frame is one step in time.

    It is Qwen2-VL's, which tells the model no seconds between frames: temporal positions count
    frames, so that "the frame before" is one step back whatever the sampling, and order can be
    learnt by a model this small.
    """
    settings = {
        "size": dict(PIXELS),
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": 1,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**settings, cap_pixels_per_frame=False),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A freshly initialised mini model in float32."""
    tokens = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    width = 128
    ends = {"eos_token_id": tokens["<|end|>"], "pad_token_id": tokens["<|pad|>"]}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 16384,
            "initializer_range": 0.08,  # a model this small does not start to learn at 0.02
            "tie_word_embeddings": True,
            "bos_token_id": None,
            # The slowest of the eight temporal frequencies turns half round in 480 seconds.
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 100000.0,
                "mrope_section": [8, 4, 4],
            },
            **ends,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "tokens_per_second": 1,
            "window_size": 8 * PATCH * MERGE,
            "fullatt_block_indexes": [0, 1, 2, 3],
            "out_hidden_size": width,
            "initializer_range": 0.04,
        },
        image_token_id=tokens["<|image_pad|>"],
        video_token_id=tokens["<|video_pad|>"],
        vision_start_token_id=tokens["<|vision_start|>"],
        vision_end_token_id=tokens["<|vision_end|>"],
        tie_word_embeddings=True,
        **ends,
    )
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=32, **ends)
    return model


def save(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write weights in float16, configuration and processor to `folder`."""
    state = {name: value.detach().half() for name, value in model.state_dict().items()}
    dtype = model.config.dtype
    model.save_pretrained(folder, state_dict=state)
    model.config.dtype = dtype
    build_processor().save_pretrained(folder)
    for file in folder.iterdir():
        file.chmod(0o644)
