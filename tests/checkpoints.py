"""Checkpoints of tiny random models with the real processor of their family, made offline.

`save_checkpoint("qwen2_5_vl", folder)` writes what a hub would deliver: weights, configuration,
tokenizer, image, video and sound processors, and a chat template. `AutoProcessor` and
`AutoModelForMultimodalLM` read it. The tokenizer knows characters; answers are noise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE

from tests.tiny import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    IMAGE,
    PAD,
    PINPOINTS,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCABULARY,
    build,
)

__all__ = ["CHECKPOINTS", "save_checkpoint"]

SPECIAL = {PAD: "<pad>", 1: "<s>", 2: "</s>", 3: "<unk>"}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_checkpoint(name: str, folder: str | Path) -> Path:
    """Save the tiny model of a family with its processor; returns the folder."""
    folder = Path(folder)
    tiny = build(name)
    # An answer of special tokens would read as an empty one.
    tiny.model.generation_config.suppress_tokens = sorted({*tiny.suppress, *SPECIAL})
    if name == "qwen2_5_omni":
        _save_omni(tiny.model, folder)
    else:
        tiny.model.save_pretrained(folder)
    CHECKPOINTS[name]().save_pretrained(folder)
    return folder


def _save_omni(thinker: Any, folder: Path) -> None:
    """Save a thinker the way it is released: as a part of a model that also speaks."""
    omni = transformers.models.qwen2_5_omni.configuration_qwen2_5_omni
    thinker.save_pretrained(folder)
    omni.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict()).save_pretrained(folder)
    weights = {f"thinker.{key}": one.contiguous() for key, one in thinker.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# -- tokenizers and chats


def _tokenizer(names: dict[int, str], **named: str) -> Any:
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


def _chat(**parts: str) -> str:
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


# -- processors


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


def _shortest(side: int) -> dict[str, Any]:
    return {"size": {"shortest_edge": side}, "crop_size": _square(side)}


def _llava() -> Any:
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**_shortest(56)),
        tokenizer=_tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat(image="<image>"),
    )


def _llava_next() -> Any:
    return transformers.LlavaNextProcessor(
        image_processor=transformers.LlavaNextImageProcessor(
            **_shortest(56), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=_tokenizer({IMAGE: "<image>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat(image="<image>"),
    )


def _llava_next_video() -> Any:
    return transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(**_shortest(56)),
        image_processor=transformers.LlavaNextImageProcessor(
            **_shortest(56), image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=_tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chat(image="<image>", video="<video>"),
    )


def _llava_onevision() -> Any:
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(
            size=_square(56), image_grid_pinpoints=[*PINPOINTS, [224, 112]], **HALF
        ),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=_square(56), **HALF),
        tokenizer=_tokenizer({IMAGE: "<image>", VIDEO: "<video>"}),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_1",
        chat_template=_chat(image="<image>", video="<video>"),
    )


def _internvl() -> Any:
    marks = {IMAGE: "<IMG_CONTEXT>", VIDEO: "<video>", VISION_START: "<img>", VISION_END: "</img>"}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(
            size=_square(84), crop_to_patches=True, min_patches=1, max_patches=4, **IMAGENET
        ),
        video_processor=transformers.InternVLVideoProcessor(size=_square(84), **IMAGENET),
        tokenizer=_tokenizer(
            marks,
            start_image_token="<img>",
            end_image_token="</img>",
            context_image_token="<IMG_CONTEXT>",
            video_token="<video>",
        ),
        image_seq_length=9,
        chat_template=_chat(image="<IMG_CONTEXT>", video="<video>"),
    )


QWEN = {
    IMAGE: "<|image_pad|>",
    VIDEO: "<|video_pad|>",
    VISION_START: "<|vision_start|>",
    VISION_END: "<|vision_end|>",
}


def _qwen_pictures(**settings: Any) -> dict[str, Any]:
    limits = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
    return {"size": limits, "patch_size": 14, "merge_size": 2, **settings}


def _qwen_chat(**sounds: str) -> str:
    return _chat(
        image="<|vision_start|><|image_pad|><|vision_end|>",
        video="<|vision_start|><|video_pad|><|vision_end|>",
        **sounds,
    )


def _qwen2_vl() -> Any:
    return transformers.Qwen2VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        tokenizer=_tokenizer(QWEN),
        chat_template=_qwen_chat(),
    )


def _qwen2_5_vl() -> Any:
    return transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        tokenizer=_tokenizer(QWEN),
        chat_template=_qwen_chat(),
    )


def _qwen3_vl() -> Any:
    # The limits of its video processor are for all frames together.
    limits = {"shortest_edge": 4 * 28 * 28, "longest_edge": 64 * 28 * 28}
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures(**HALF)),
        video_processor=transformers.Qwen3VLVideoProcessor(**_qwen_pictures(size=limits)),
        tokenizer=_tokenizer(QWEN),
        chat_template=_chat(
            image="<|vision_start|><|image_pad|><|vision_end|>", video="<|video_pad|>"
        ),
    )


def _ear(seconds: int) -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=seconds)


def _qwen2_audio() -> Any:
    marks = {AUDIO: "<|AUDIO|>", AUDIO_START: "<|audio_bos|>", AUDIO_END: "<|audio_eos|>"}
    return transformers.Qwen2AudioProcessor(
        feature_extractor=_ear(1),  # all that the tiny tower has positions for
        tokenizer=_tokenizer(marks),
        chat_template=_chat(audio="<|audio_bos|><|AUDIO|><|audio_eos|>"),
    )


def _qwen2_5_omni() -> Any:
    marks = {
        IMAGE: "<|IMAGE|>",
        VIDEO: "<|VIDEO|>",
        AUDIO: "<|AUDIO|>",
        VISION_START: "<|vision_bos|>",
        VISION_END: "<|vision_eos|>",
        AUDIO_START: "<|audio_bos|>",
        AUDIO_END: "<|audio_eos|>",
    }
    return transformers.Qwen2_5OmniProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**_qwen_pictures()),
        video_processor=transformers.Qwen2VLVideoProcessor(**_qwen_pictures()),
        feature_extractor=_ear(30),
        tokenizer=_tokenizer(
            marks,
            image_token="<|IMAGE|>",
            video_token="<|VIDEO|>",
            audio_token="<|AUDIO|>",
            vision_bos_token="<|vision_bos|>",
            vision_eos_token="<|vision_eos|>",
            audio_bos_token="<|audio_bos|>",
            audio_eos_token="<|audio_eos|>",
        ),
        chat_template=_chat(
            image="<|vision_bos|><|IMAGE|><|vision_eos|>",
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )


CHECKPOINTS: dict[str, Callable[[], Any]] = {
    "internvl": _internvl,
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_next_video": _llava_next_video,
    "llava_onevision": _llava_onevision,
    "qwen2_5_omni": _qwen2_5_omni,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen2_audio": _qwen2_audio,
    "qwen2_vl": _qwen2_vl,
    "qwen3_vl": _qwen3_vl,
}
