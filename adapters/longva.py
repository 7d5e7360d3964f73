"""LongVA: original checkpoints, written anew as what transformers can load.

LongVA projects the patches of a frame and then averages them two by two; so does PerceptionLM.
On a CLIP tower without the layers behind the features, its architecture is LongVA's: 144 tokens of
a frame of 336 pixels, one after the other, with nothing between frames. To LongVA an image is a
video of its tiles. They are cut by its own rule, which is LLaVA-NeXT's without the view of the
whole; the processors for that are in `_longva_processor`. transformers alone refuses to load it:
load by `tokenprune.models.load.load_model`, or import that module before.

Differences that remain: pictures are resized by torchvision, as transformers does, where LongVA
uses PIL (both bicubic, up to three levels of 255 apart here and there), and by the decoder where
it resizes frames (see `read_video`).
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tokenprune.adapters._longva_processor import LongVAImageProcessor
from tokenprune.adapters._weights import plan_weights, weight_files, write_weights
from tokenprune.errors import TokenPruneError, UnsupportedModelError

__all__ = ["convert"]

TOWERS: dict[str, dict[str, int]] = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
}
"""Sizes of the tower that LongVA names, and does not describe."""

SUPPORTED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    # Setting: what it is where the checkpoint leaves it open, and what can be served.
    "model_type": (None, ("llava_qwen",)),
    "mm_patch_merge_type": (None, ("unires",)),
    "mm_projector_type": ("linear", ("mlp2x_gelu",)),
    "mm_spatial_pool_mode": ("average", ("average",)),
    "mm_spatial_pool_stride": (2, (2,)),
    "mm_vision_select_feature": ("patch", ("patch",)),
    "image_aspect_ratio": (None, ("anyres",)),
}

RENAMED = {
    "lm_head.": "lm_head.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
    "model.layers.": "model.language_model.layers.",
    "model.norm.": "model.language_model.norm.",
    "model.mm_projector.0.": "model.multi_modal_projector.linear_1.",
    "model.mm_projector.2.": "model.multi_modal_projector.linear_2.",
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    "vision_model.": "model.vision_tower.",  # in a checkpoint of CLIP itself
}

UNUSED = (
    ".rotary_emb.inv_freq",  # computed anew
    ".embeddings.position_ids",
    "model.image_newline",  # LongVA puts nothing between frames or lines
)
"""Ends of names of tensors that are left behind; a resampler, too, LongVA never calls."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}<{{ part['type'] }}>\n{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def convert(source: Path, out: Path, tower: Path | None = None) -> None:
    """Write an original LongVA checkpoint as a PerceptionLM model with its processor.

    Args:
        source: Folder with config.json, tokenizer and safetensors.
        out: Folder to write; must be new or empty.
        tower: Folder of the CLIP checkpoint that LongVA was trained on, if `source` names an
            unknown one or lacks its weights.

    Raises:
        UnsupportedModelError: It is no LongVA, or one of a kind that PerceptionLM is not.
        TokenPruneError: Files are missing, or `out` holds something.
    """
    settings = _settings(source)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TokenPruneError(f"{str(out)!r} is not empty; give a new folder to write to")
    config = _config(settings, tower, source)
    files = [*weight_files(source), *([] if tower is None else weight_files(tower))]
    wanted = _wanted(config)
    # Some releases of transformers wrap the tower once more.
    wrapped = any(name.startswith("model.vision_tower.vision_model.") for name in wanted)
    blocks = config.vision_config.num_hidden_layers
    tensors = plan_weights(files, wanted, lambda name: _rename(name, blocks, wrapped))
    tokenizer = _tokenizer(source, config)
    processor = _processor(tokenizer, config, settings.get("image_grid_pinpoints"))
    out.mkdir(parents=True, exist_ok=True)
    write_weights(tensors, out)
    processor.save_pretrained(out)
    _generation(source, tokenizer).save_pretrained(out)
    config.save_pretrained(out)  # last: a folder without it is no model yet


# -- settings


def _settings(source: Path) -> dict[str, Any]:
    settings = _read_config(source)
    for name, (usual, served) in SUPPORTED.items():
        value = settings.get(name, usual)
        if value not in served:
            raise UnsupportedModelError(
                f"{str(source)!r} holds no LongVA model that can be converted: its {name} must be "
                f"{served[0]!r}, got {value!r}; give an original LongVA checkpoint"
            )
    return settings


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return settings
    except (OSError, ValueError) as error:
        raise TokenPruneError(
            f"cannot read config.json in {str(folder)!r}: {error}; give the folder of a checkpoint"
        ) from error


def _config(settings: dict[str, Any], tower: Path | None, source: Path) -> Any:
    """The configuration; the ids of its placeholders are still to be found."""
    known = {*transformers.Qwen2Config().to_dict(), "rope_theta", "rope_scaling"}
    known -= {"architectures", "model_type", "transformers_version", "dtype"}
    text = transformers.Qwen2Config(**{key: settings[key] for key in known & settings.keys()})
    vision = _vision(settings, tower, source)
    blocks = settings.get("mm_vision_select_layer", -2)
    # Of hidden states 0..n, entry i is what i blocks have made; the others are not needed.
    blocks = blocks if blocks >= 0 else vision.num_hidden_layers + 1 + blocks
    if not 0 < blocks <= vision.num_hidden_layers:
        raise UnsupportedModelError(
            f"mm_vision_select_layer must name one of the {vision.num_hidden_layers} blocks of the "
            f"tower, got {settings['mm_vision_select_layer']}; check config.json"
        )
    vision.num_hidden_layers = blocks
    vision.model_args = {"embed_dim": vision.hidden_size}  # where PerceptionLM looks for the width
    return transformers.PerceptionLMConfig(
        text_config=text,
        vision_config=vision,
        clip_config=vision.to_dict(),  # for `PerceptionLM.fix_config`
        vision_use_cls_token=True,
        projector_pooling_ratio=settings.get("mm_spatial_pool_stride", 2),
        tie_word_embeddings=text.tie_word_embeddings,
        architectures=["PerceptionLMForConditionalGeneration"],
        dtype=settings.get("torch_dtype"),
    )


def _vision(settings: dict[str, Any], tower: Path | None, source: Path) -> Any:
    name = settings.get("mm_vision_tower")
    if tower is None and name in TOWERS:
        return transformers.CLIPVisionConfig(**TOWERS[name])
    if tower is None:
        raise TokenPruneError(
            f"the sizes of {name!r}, the vision tower of {str(source)!r}, are not known; give the "
            "folder of its checkpoint with --tower"
        )
    found = _read_config(tower)
    found = found.get("vision_config", found)  # that of CLIP holds that of its tower
    if found.get("model_type") != "clip_vision_model":
        raise UnsupportedModelError(
            f"the tower of LongVA must be a clip_vision_model, got {found.get('model_type')!r} in "
            f"{str(tower)!r}; give the folder of a CLIP checkpoint"
        )
    return transformers.CLIPVisionConfig(**found)


# -- weights


def _wanted(config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors that a model of this configuration needs, with their shapes."""
    with torch.device("meta"):
        model = transformers.PerceptionLMForConditionalGeneration(config)
    wanted = {name: tuple(one.shape) for name, one in model.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    return wanted


def _rename(name: str, blocks: int, wrapped: bool) -> str | None:
    """The name that a tensor has in the model; None if it is of no use there."""
    if name.endswith(UNUSED) or name.startswith("model.vision_resampler."):
        return None
    for before, after in RENAMED.items():
        if name.startswith(before):
            rest = name.removeprefix(before)
            if "vision_model." not in before:
                return after + rest
            parts = rest.split(".")
            if parts[:2] == ["encoder", "layers"] and int(parts[2]) >= blocks:
                return None
            return after + ("vision_model." if wrapped else "") + rest
    # What else a CLIP checkpoint holds is its text half.
    clip = name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale"))
    return None if clip else name


# -- tokenizer and processor


def _tokenizer(source: Path, config: Any) -> Any:
    """The tokenizer with placeholders, whose ids the configuration then has."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, extra_special_tokens={"image_token": "<image>", "video_token": "<video>"}
        )
    except (ImportError, OSError, ValueError) as error:  # releases differ in what they miss
        raise TokenPruneError(
            f"cannot read the tokenizer in {str(source)!r}: {error}; copy its files there"
        ) from error
    rows = config.text_config.vocab_size
    config.image_token_id, config.video_token_id = ids = (
        tokenizer.image_token_id,
        tokenizer.video_token_id,
    )
    if max(ids) >= rows:
        raise UnsupportedModelError(
            f"placeholders need two unused rows of the embeddings, but all {rows} are taken; "
            "extend embed_tokens and lm_head of the checkpoint by two rows"
        )
    return tokenizer


def _processor(tokenizer: Any, config: Any, pinpoints: Any) -> Any:
    vision = config.vision_config
    side = vision.image_size
    square = {"height": side, "width": side}
    clip = transformers.CLIPImageProcessor()
    statistics = {"image_mean": clip.image_mean, "image_std": clip.image_std}
    return transformers.PerceptionLMProcessor(
        image_processor=LongVAImageProcessor(
            size={"shortest_edge": side},
            crop_size=square,
            image_grid_pinpoints=_grids(pinpoints, side),
            **statistics,
        ),
        video_processor=transformers.PerceptionLMVideoProcessor(
            size={"shortest_edge": side}, do_center_crop=True, crop_size=square, **statistics
        ),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        pooling_ratio=config.projector_pooling_ratio,
        chat_template=CHAT_TEMPLATE,
    )


def _grids(pinpoints: Any, side: int) -> list[list[int]]:
    """Heights and widths that an image may be padded to, in LongVA's order: the first wins ties."""
    try:
        sizes = ast.literal_eval(pinpoints) if isinstance(pinpoints, str) else pinpoints
        grids = [[int(height), int(width)] for width, height in sizes]
        if not grids or any(edge < side or edge % side for grid in grids for edge in grid):
            raise ValueError
    except (SyntaxError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            "image_grid_pinpoints must be a list of [width, height] in pixels, whole tiles of "
            f"{side}, got {pinpoints!r}; correct config.json"
        ) from error
    return grids


def _generation(source: Path, tokenizer: Any) -> Any:
    if (source / "generation_config.json").exists():
        return transformers.GenerationConfig.from_pretrained(source)
    return transformers.GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
