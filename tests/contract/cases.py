"""What the contracts are run over: recipes of each method, families, and what is refused.

A new method needs a row in `CASES`; `test_every_method_has_cases` asks for it. A new family needs
nothing but its tiny model.
"""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from tokenprune.testing.tiny import FAMILIES, NAMES, family_of

CASES: dict[str, list[str]] = {
    "random": [
        "random(keep=0.5)",
        "random(keep=5 seed=3)",
        "random(keep=0.3 at=2 per=frame)",
        "random(keep=0.5 at=cache)",
        "random(keep.image=0.3 keep.video=0.5 keep.audio=4 at=cache)",
    ],
    "uniform": [
        "uniform(keep=0.25)",
        "uniform(keep=0.4 at=0)",
        "uniform(keep.video=0.3 keep.image=0.4 keep.audio=0.6 per=frame at=2)",
        "uniform(keep=0.6 at=3 per=item)",
        "uniform(keep=7 at=cache)",
        "uniform(keep=0.5 at=cache per=frame)",
    ],
    "vflowopt": [
        "vflowopt(keep=0.25)",
        "vflowopt(keep=0.5 alpha=0.5 recycled=0.5)",
    ],
    "plphp": [
        "plphp(keep=0.5)",
        "plphp(keep=0.3 layers=1/3)",
    ],
    "fastv": [
        "fastv(keep=0.4)",
        "fastv(keep=0.5 layer=1 rotary=false per=item)",
    ],
    "snapkv": [
        "snapkv(keep=0.4)",
        "snapkv(keep=0.5 window=text kernel=3 layers=1/3 per=frame)",
    ],
    "knorm": [
        "knorm(keep=0.4)",
        "knorm(keep=0.5 layers=1/3 per=item)",
    ],
    "divprune": [
        "divprune(keep=0.3)",
        "divprune(keep=0.5 per=frame)",
    ],
    "pyramiddrop": [
        "pyramiddrop(keep=0.5)",
        "pyramiddrop(keep=0.7 layers=1/3 per=item)",
    ],
    "visionzip": [
        "visionzip(keep=0.4)",
        "visionzip(keep=0.5 targets=0.5 contextual=mean per=item)",
    ],
}

ELSEWHERE = {"groups": "test_groups.py: it prunes nothing, and takes no ragged batch"}
"""Methods whose contracts are not these."""

ONE_PER_SITE = [
    "random(keep=0.5)",
    "vflowopt(keep=0.5)",
    "uniform(keep=0.5 at=2)",
    "random(keep=0.5 at=cache)",
]
"""What every family is run with in the short suite."""

COMBINED = [
    "uniform(keep=0.8) + random(keep=0.7 at=1) + random(keep=0.6 at=3) + random(keep=0.5 at=cache)",
    "vflowopt(keep=0.4) + plphp(keep=0.5)",
    "random(keep=0.7 at=cache) + uniform(keep=0.5 at=cache)",
]
"""Recipes in which one stage works on what others have left."""

EVERYWHERE = COMBINED[0]
"""One recipe that prunes at each site: for contracts on how a model is used."""

THREE = ("llava_onevision", "qwen2_5_vl", "qwen2_audio")
"""Families that run every case in the short suite."""

MROPE = ("glm4v", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_omni_moe", "qwen3_vl")
"""Families with more than one position per token."""

SOUND_ONLY = ("audioflamingo3", "granite_speech", "qwen2_audio", "voxtral")
"""Families without a vision tower."""

REFUSALS: dict[tuple[str, str], str] = {
    # (method, family or variant): why. Such a combination must raise, and no other may.
    **{("vflowopt", name): "its map is read from a vision tower" for name in SOUND_ONLY},
    **{("visionzip", name): "it reads a vision tower" for name in SOUND_ONLY},
}

TORN_BY_BEAMS = (*SOUND_ONLY, "glm4v", "phi4_multimodal_sounds")
"""Whose default prompt holds several images, sounds or windows; `generate` repeats each alone.

This and the next list are of the newest release of transformers: older ones repeat less.
"""

NO_BEAMS: dict[str, str] = {
    # Variants whose media transformers itself cannot repeat for beams: why.
    "glm4v_video": "frames hold image placeholders, and it counts video placeholders",
    "video_llama_3_compressed": "it counts the tokens that the processor left out as well",
}

NO_CHUNKS: dict[str, str] = {
    # Variants that transformers itself cannot prefill in chunks, however large: why.
    "glm4v_video": "frames hold image placeholders, and it hands out features by video ones",
    "perception_lm": "it cannot cut the output of a timm tower",
    "perception_lm_image": "it cannot cut the output of a timm tower",
    "video_llama_3_compressed": "it hands out no chunks of the mask of what was left out",
}

SEPARATORS: dict[str, int] = {
    # Placeholders of the default prompt that stand for no patch.
    "llava_next": 6,  # a newline after each row
    "llava_next_video_image": 6,
    "llava_onevision": 1,  # one newline after the clip
    "llava_onevision_image": 4,
    "llava_onevision_images": 3,  # one after each image
    "video_llava": 2,  # the class token of each frame
    "video_llava_video": 3,
    "phi4_multimodal": 6,  # one after each line, and one between tiles and the whole
    "phi4_multimodal_sounds": 6,
}


def methods_of(recipe: str) -> list[str]:
    """The methods that a recipe text names."""
    return [] if recipe == "none" else re.findall(r"(?:^|\+)\s*(\w+)", recipe)


def refusal(recipe: str, name: str) -> str | None:
    """Why a recipe is refused for a family; None if it is not."""
    for method in methods_of(recipe):
        reason = REFUSALS.get((method, name)) or REFUSALS.get((method, family_of(name)))
        if reason is not None:
            return f"{method}: {reason}"
    return None


def keep_all(recipe: str) -> str:
    """The same recipe with nothing pruned."""
    return re.sub(r"(keep(?:\.\w+)?)=[\d.]+", r"\1=1.0", recipe)


def _every_recipe() -> list[str]:
    return [text for texts in CASES.values() for text in texts] + COMBINED


def product(*, refused: bool | None = False) -> list[Any]:
    """(family, recipe): the short suite, and the rest of the product marked `full`.

    Args:
        refused: Only those that are refused, or only those that are not; None for both.
    """
    short = [(name, text) for name in THREE for text in _every_recipe()]
    short += [(name, text) for name in FAMILIES for text in ONE_PER_SITE]
    rest = [(name, text) for name in NAMES for text in _every_recipe() + ONE_PER_SITE]
    return _parameters(short, rest, refused)


def uses(recipes: list[str] | None = None, names: tuple[str, ...] = THREE) -> list[Any]:
    """(family, recipe) for contracts on how a model is used: few recipes, fewer families.

    Args:
        recipes: Of the short suite.
        names: Families of the short suite.
    """
    recipes = [EVERYWHERE] if recipes is None else recipes
    short = [(name, text) for name in names for text in recipes]
    rest = [(name, text) for name in NAMES for text in [*recipes, *ONE_PER_SITE, *COMBINED]]
    return _parameters(short, rest, False)


def drawn(seed: int, *, wide: bool = False) -> tuple[str, str, str, str]:
    """A recipe of one to four steps made up by chance, and what to run it on.

    Args:
        seed: What it is drawn from.
        wide: Of more methods, of which a session takes only some.

    Returns:
        Family, recipe, kind of prompt and attention implementation.
    """
    draw = random.Random(seed)
    name = draw.choice(NAMES)
    steps: list[str] = []
    for _ in range(draw.randint(1, 4)):
        keep, rate = draw.choice(["0.1", "0.3", "0.5", "0.8", "1.0"]), draw.choice(["0.1", "0.6"])
        at = draw.choice(["input", "cache", "0", "1", "2", "4"])
        per = draw.choice(["prompt", "item", "frame", "second"])
        common = [
            f"random(keep={keep} at={at} per={per} seed={draw.randint(0, 99)})",
            f"uniform(keep={keep} at={at} per={per})",
            f"random(keep=3 at={at})",
            f"random(keep.image={keep} keep.video={rate} keep.audio={rate} at={at} per={per})",
            f"vflowopt(keep={rate} recycled=0.5)",
            f"plphp(keep={rate} layers={draw.choice(['none', '1/4'])})",
        ]
        others = [
            f"fastv(keep={keep} layer={draw.randint(1, 4)})",
            f"fastv(keep={keep} layer=2 rotary=false)",
            f"snapkv(keep={keep} window={draw.choice(['3', 'text'])} kernel=3)",
            f"knorm(keep={keep} per={per})",
            "pyramiddrop(keep=0.6)",
            f"visionzip(keep={keep} contextual={draw.choice(['sum', 'mean'])})",
        ]
        step = draw.choice(common + others if wide else common)
        if refusal(step, name) is None:
            steps.append(step)
    kind, attention = draw.choice(["alone", "batch"]), draw.choice(["sdpa", "eager"])
    return name, " + ".join(steps) or "none", kind, attention


def _parameters(
    short: list[tuple[str, str]], rest: list[tuple[str, str]], refused: bool | None
) -> list[Any]:
    quick = set(short)
    parameters = []
    for name, text in dict.fromkeys(short + rest):
        if refused is None or (refusal(text, name) is not None) == refused:
            marks = () if (name, text) in quick else (pytest.mark.full,)
            identity = f"{name}-{text.replace(' ', '')}"
            parameters.append(pytest.param(name, text, id=identity, marks=marks))
    return parameters
