"""Releases of transformers: what older ones get wrong by themselves.

Nothing here can make such tests pass, for it is the unpruned model, or the processor, that fails
or answers otherwise. The newest release has no entry, and `test_releases.py` keeps it so.
"""

from __future__ import annotations

import re

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tokenprune.testing.tiny.releases import OLD, RELEASE

__all__ = ["NEWEST", "QUIRKS", "WARNINGS", "WATCHER", "quirk"]

NEWEST = Version("5.23")
"""From here on nothing is known to be wrong but what `contract/cases.py` lists."""

WATCHER = "qwen3_vl" if OLD else "qwen2_5_vl"
"""A family whose tokens have three positions each, and whose clips are watched in groups."""

WARNINGS: list[str] = []
"""What the release at hand warns of by itself, as pytest filters it."""
if RELEASE < Version("5.18"):
    # The processor of InternVL gives tensors to numpy.
    WARNINGS.append("ignore:__array_wrap__ must accept context:DeprecationWarning")

QUIRKS: list[tuple[str, str, str]] = [
    # Releases, tests (a pattern of their names), and what transformers does there.
    (
        "<5.10",
        r"test_sessions\.py::test_(?!releases|processors).*[\[-]qwen2(_5)?_vl\]|"
        r"test_devices\.py::test_a_session_over_two_devices\[qwen2_5_vl\]|"
        r"test_reliability\.py::test_two_sessions_of_one_model_take_turns\[qwen2_5_vl\]|"
        r"test_seconds\.py::test_groups_go_on_where_the_last_one_ended\[qwen2_5_vl\]|"
        r"test_session\.py::test_the_mini_model_answers_in_another_process|"
        r"test_readme\.py::test_the_session_runs",
        "frames of Qwen2-VL and Qwen2.5-VL get positions without time, and rows that depend on how "
        "many frames follow; sessions refuse it",
    ),
    (
        "<5.10",
        r"test_mini_model\.py::test_the_model_answers_held_out_look_ups\[mini-video\]|"
        r"test_mini_model\.py::test_temporal_positions_count_frames",
        "frames of Qwen2-VL get positions without time, so mini-video answers wrongly",
    ),
    (
        "<5.10",
        r"test_mini_training\.py::test_(frames_become|questions_see|thinned|a_balanced).*\[qwen\]",
        "frames of Qwen2-VL get positions without time, so mini-video cannot be trained; its tower "
        "does not take cu_seqlens from outside either",
    ),
    (
        "<5.10",
        r"mini-video-llava",
        "weights of SigLIP have other names than in the releases that saved the model",
    ),
    (
        "<5.10",
        r"test_load\.py::test_a_thinker_on_its_own_loads",
        "thinkers of Qwen-Omni are known in whole checkpoints only",
    ),
    (
        "<5.10",
        r"test_support\.py::.*\[falcon_h1",
        "the configuration refuses its own default for use_cache",
    ),
    (
        "<5.18",
        r"test_overlap\.py::test_a_sound_track_is_not_left_out_silently|"
        r"test_seconds\.py::test_groups_go_on_where_the_last_one_ended\[.*omni",
        "Qwen-Omni cannot be told the positions of a question; sessions refuse it",
    ),
    (
        "<5.18",
        r"test_assisted_decoding_matches_the_oracle\[phi4",
        "assisted decoding fails, unpruned too: it repeats a mask of four dimensions as one of two",
    ),
    (
        "<5.19",
        r"test_mutant_is_caught\[mask_of_all_ones_where_none_is_needed\]",
        "attention rounds alike with and without a mask of ones, so nothing tells the mutant",
    ),
    (
        "<5.18",
        r"test_frames_decoded_at_the_rules_size_give_the_processors_grid\[\d-qwen3_vl",
        "the processor refuses pictures that are lower than a patch",
    ),
    (
        "==5.18.*",
        r"test_longva\.py::test_images_of_a_prompt_may_have_different_numbers_of_tiles",
        "beams get the pictures of others; they are refused",
    ),
    (
        "<5.18",
        r"test_volume_limits_are_those_of_transformers",
        "odd numbers of frames are rounded up, and pictures lower than a patch are refused",
    ),
    (
        "<5.18",
        r"test_frames_share_pixels_as_in_transformers",
        "frames do not share pixels in the processor of Qwen2-VL yet",
    ),
    (
        "<5.18",
        r"test_chat_template_takes_media\[video_llava\]",
        "its processor fails in a chat: it is given sound, which it does not take",
    ),
    (
        "<5.18",
        r"test_a_sound_longer_than_a_window_goes_on_counting\[qwen3_omni_moe\]",
        "processors do not say whether they cut sounds, so long ones are given in pieces",
    ),
]


def quirk(test: str) -> str | None:
    """Why a test cannot pass on the release at hand; None if it must.

    Args:
        test: Its name, with its module and parameters, as pytest writes it.
    """
    for releases, pattern, reason in QUIRKS:
        if RELEASE in SpecifierSet(releases) and re.search(pattern, test):
            return f"transformers {RELEASE}: {reason}"
    return None
