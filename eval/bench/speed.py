"""Speed and memory of pruning, as ratios against the unpruned model with SDPA in the same run.

    python -m tokenprune.eval.bench.speed --pairs 11

The model is a randomly initialised LLaVA-OneVision with a language model of the size of Qwen2-0.5B
in bfloat16, its usual vision tower, and about 6,000 video tokens; the video is encoded once where
the tower plays no part. What is compared is run in turns, A B A B; the median of the ratios is
given with the interval that holds the true median with 95 % confidence (from order statistics).
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from enum import StrEnum
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from scipy.stats import binom
from torch import Tensor
from tqdm import tqdm

from tokenprune.engine.encoders import EncoderCalls
from tokenprune.engine.patch import prune
from tokenprune.eval.bench.random_models import SO400M, Model, build, llava_config, llava_inputs
from tokenprune.eval.bench.stopwatch import PeakMemory, Stopwatch
from tokenprune.plan.flops import prefill_flops

FRAMES = 31  # of 14 x 14 tokens, and a newline token: 6,077
DECODED = 16


def make(vision_layers: int) -> Model:
    """The model of the bench, with random weights."""
    text = {
        "vocab_size": 152000,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
    }
    config = llava_config(text, {**SO400M, "num_hidden_layers": vision_layers})
    return build(config, "cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def encoded_once(model: Model, inputs: dict[str, Tensor]) -> Iterator[None]:
    """Within, the video is not encoded again."""
    with torch.inference_mode():
        features = model.model.get_video_features(
            inputs["pixel_values_videos"],
            vision_feature_layer=model.config.vision_feature_layer,
            vision_feature_select_strategy=model.config.vision_feature_select_strategy,
        )
    encode = model.model.get_video_features

    @functools.wraps(encode)
    def known(*args: Any, **kwargs: Any) -> Any:
        return features

    model.model.get_video_features = known
    try:
        yield
    finally:
        del model.model.get_video_features


def run(model: Model, inputs: dict[str, Tensor], recipe: str | None, tokens: int) -> dict[str, Any]:
    """Seconds to the first token, and the median per further token; bytes of the cache."""
    watch = Stopwatch()
    patched = nullcontext() if recipe is None else prune(model, recipe)
    with torch.inference_mode(), patched as report:
        started = time.perf_counter()
        model.generate(
            **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=watch
        )
    steps = [b - a for a, b in zip(watch.times[1:], watch.times[2:], strict=False)]
    return {
        "first": watch.times[1] - started,
        "token": statistics.median(steps) if steps else 0.0,
        "report": report,
    }


def interval(values: list[float]) -> tuple[float, float]:
    """Where the median lies with 95 % confidence, by order statistics."""
    ordered = sorted(values)
    below = int(binom.ppf(0.025, len(ordered), 0.5))
    below = max(0, below - 1)
    return ordered[below], ordered[-1 - below]


def show(name: str, values: list[float]) -> None:
    low, high = interval(values)
    middle = statistics.median(values)
    typer.echo(f"{name:<58} {middle:.3f}  [{low:.3f}, {high:.3f}]  of {len(values)} pairs")


def in_turns(first: Callable[[], float], second: Callable[[], float], pairs: int) -> list[float]:
    """Ratios second / first, run in turns after one warm-up of each."""
    first(), second()
    ratios = []
    for number in tqdm(range(pairs), leave=False):
        # Who goes first alternates, so that a drift of the machine cancels.
        if number % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        ratios.append(b / a)
    return ratios


def predicted(model: Model, report: Any) -> float:
    """The speed-up of prefill that the count of operations promises."""
    call = report.last
    text = call.length - len(call.layouts[0])
    pruned = [torch.arange(text + int(n)) for n in call.media_entries[0, :, 0]]
    whole = [torch.arange(call.length)] * len(pruned)
    return prefill_flops(model, whole) / prefill_flops(model, pruned)


class Part(StrEnum):
    """What the bench consists of."""

    keep_all = "keep-all"
    prefill = "prefill"
    decode = "decode"
    tower = "tower"
    memory = "memory"


def main(
    pairs: Annotated[int, typer.Option(help="Pairs of keep-all; a third of it elsewhere.")] = 11,
    frames: Annotated[int, typer.Option(help="Of 196 tokens each.")] = FRAMES,
    vision_layers: Annotated[int, typer.Option(help="Of the vision tower.")] = 26,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 for all.")] = 0,
    only: Annotated[list[Part] | None, typer.Option(help="Only these parts.")] = None,
    peak: Annotated[str, typer.Option(help="Only print the peak memory of this recipe.")] = "",
) -> None:
    """Run the bench."""
    if threads:
        torch.set_num_threads(threads)
    model = make(vision_layers)
    inputs = llava_inputs(model, frames)
    if peak:
        typer.echo(json.dumps(peak_bytes(model, inputs, None if peak == "plain" else peak)))
        return
    few = max(3, pairs // 3)
    parts = set(only or Part)
    typer.echo(f"{inputs['input_ids'].shape[1]} tokens, {model.device.type}, ratios to unpruned")
    if parts & {Part.keep_all, Part.prefill, Part.decode}:
        with encoded_once(model, inputs):
            if Part.keep_all in parts:
                keep_all = "random(keep=1.0) + random(keep=1.0 at=8) + plphp(keep=1.0)"
                ratios = in_turns(first(model, inputs, None), first(model, inputs, keep_all), pairs)
                show("keep-all: time to first token", ratios)
            if Part.prefill in parts:
                prefill_rows(model, inputs, few)
            if Part.decode in parts:
                decode_rows(model, inputs, few)
    if Part.tower in parts:
        with_tower(model, inputs, few)
    if Part.memory in parts:
        for recipe in ("plain", "random(keep=1.0)", "vflowopt(keep=0.1)", "plphp(keep=0.5)"):
            size = json.loads(spawn(recipe, frames, vision_layers, threads))
            typer.echo(
                f"peak memory beyond weights and inputs, {recipe:<22} {size / 2**20:8.0f} MiB"
            )


def first(model: Model, inputs: dict[str, Tensor], recipe: str | None) -> Callable[[], float]:
    """What measures the time to the first token."""
    return lambda: float(run(model, inputs, recipe, 1)["first"])


def prefill_rows(model: Model, inputs: dict[str, Tensor], pairs: int) -> None:
    for recipe in ("random(keep=0.1)", "uniform(keep=0.1)"):
        ratios = in_turns(first(model, inputs, None), first(model, inputs, recipe), pairs)
        prefill_row(model, recipe, "time to first token", ratios, inputs)


def prefill_row(
    model: Model, recipe: str, what: str, ratios: list[float], inputs: dict[str, Tensor]
) -> None:
    """Ratios, and how much of the promised speed-up they are."""
    promised = predicted(model, run(model, inputs, recipe, 1)["report"])
    show(f"{recipe}: {what}", ratios)
    got = 1 / statistics.median(ratios)
    typer.echo(f"    speed-up {got:.2f}, operations promise {promised:.2f}: {got / promised:.0%}")


def decode_rows(model: Model, inputs: dict[str, Tensor], pairs: int) -> None:
    def token(recipe: str | None) -> Callable[[], float]:
        return lambda: float(run(model, inputs, recipe, DECODED)["token"])

    for recipe in ("plphp(keep=0.5)", "random(keep=0.5 at=cache)"):
        show(f"{recipe}: time per token", in_turns(token(None), token(recipe), pairs))
        sizes = run(model, inputs, recipe, 2)["report"].kv_bytes
        typer.echo(f"    KV cache {sizes.before / 2**20:.1f} -> {sizes.after / 2**20:.1f} MiB")


def with_tower(model: Model, inputs: dict[str, Tensor], pairs: int) -> None:
    """Rows in which the tower's attention is read."""
    recipe = "vflowopt(keep=0.1)"
    shares: list[float] = []

    def plain() -> float:
        seconds = run(model, inputs, "none", 1)["report"].seconds
        shares.append(sum(spent) / (seconds.encode + seconds.prefill))
        return float(seconds.prefill)

    def pruned() -> float:
        spent.clear()
        return float(run(model, inputs, recipe, 1)["report"].seconds.prefill)

    with reading_timed() as spent:
        ratios = in_turns(plain, pruned, pairs)
    prefill_row(model, recipe, "prefill", ratios, inputs)
    show(f"{recipe}: reading the tower, share of unpruned total", shares[1:])


@contextmanager
def reading_timed() -> Iterator[list[float]]:
    """Within, note the seconds of every reading of the tower's attention.

    Much shorter than the encoding that it is part of, it would drown in the latter's scatter.
    """
    spent: list[float] = []
    read = EncoderCalls._read

    @functools.wraps(read)
    def timed(self: EncoderCalls, tower: Any, query: Tensor, *args: Any) -> None:
        if query.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        read(self, tower, query, *args)
        if query.is_cuda:
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)

    with patch.object(EncoderCalls, "_read", timed):
        yield spent


def spawn(recipe: str, frames: int, vision_layers: int, threads: int) -> str:
    """Run one recipe in a process of its own: peaks of a process only ever rise."""
    command = [sys.executable, "-m", "tokenprune.eval.bench.speed", "--peak", recipe]
    command += ["--frames", str(frames), "--vision-layers", str(vision_layers)]
    command += ["--threads", str(threads)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def peak_bytes(model: Model, inputs: dict[str, Tensor], recipe: str | None) -> int:
    """Peak memory of one answer beyond what was there before it."""
    peak = PeakMemory(model.device)
    run(model, inputs, recipe, 2)
    return peak.extra_bytes()


if __name__ == "__main__":
    typer.run(main)
