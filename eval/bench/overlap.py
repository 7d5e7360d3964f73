"""Time from a file's path to the first token, against decoding alone and computing alone.

    python -m tokenprune.eval.bench.overlap --files /var/tmp/footage --timeline overlap.png

A session watches ten minutes of 360p in groups, and is asked for one token. Decoding has one worker
and the model one thread, in all three measurements, so that on two cores each has one: what is
measured is what is lost where they meet, not how many cores there are. `--all-cores` leaves both at
their defaults instead, by which each may use all cores, and both share them. "Decode" streams the
same groups and throws them away; "compute" watches the same frames, decoded before, and asks. The
model is a LLaVA-OneVision with random weights, of a size that makes both take about as long. What
is compared is run in turns, the whole first in every other round; figures are medians of the rounds
after a first one that is not counted.

The goal: at most 1.10 times the longer of both, and the decoding of the first group.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from tokenprune.eval.bench.footage import Footage, make
from tokenprune.media import stream_video
from tokenprune.models.load import load_outline
from tokenprune.models.loaded import LoadedModel
from tokenprune.models.processors import frame_size
from tokenprune.report.timeline import Timeline
from tokenprune.session.session import Session

FOOTAGE = Footage("ten-minutes-360p-g250", 360, 640, 250, 550, 10)
SIDE = 224  # pixels of a frame, in patches of 16
MARGIN = 1.10
QUESTION = "what"


@dataclass(frozen=True)
class Round:
    """Seconds of one round.

    Attributes:
        decode: All groups, decoded alone.
        first_group: The first of them.
        compute: From frames to the first token, with what the processor does.
        model: The encoder and the language model within it.
        whole: From the path to the first token.
    """

    decode: float
    first_group: float
    compute: float
    model: float
    whole: float


def build() -> LoadedModel:
    """The model of the bench, with random weights and the processor of a built-in model."""
    outline = load_outline("mini-video-llava")
    processor, known = outline.processor, outline.model.config
    processor.video_processor.size = {"height": SIDE, "width": SIDE}
    processor.num_image_tokens = (SIDE // 16) ** 2
    text = Qwen2Config(
        vocab_size=known.text_config.vocab_size,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
    )
    vision = SiglipVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=16,
        vision_use_head=False,
    )
    config = LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=known.image_token_index,
        video_token_index=known.video_token_index,
        image_grid_pinpoints=[[SIDE, SIDE]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return LoadedModel(model, processor, "random-llava-onevision")


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        loaded: The model.
        path: The video.
        frames: How many are watched.
        group: How many at once.
        recipe: What is pruned.
        workers: How many decode; None for one on each core.
    """

    loaded: LoadedModel
    path: Path
    frames: int
    group: int
    recipe: str
    workers: int | None

    def decode(self) -> tuple[float, float, list[Tensor]]:
        """Seconds of all groups and of the first, and the groups."""
        begin = time.perf_counter()
        first, groups = 0.0, []
        for video in stream_video(
            self.path,
            group=self.group,
            first_group=self.group,
            frames=self.frames,
            size=frame_size(self.loaded.processor),
            workers=self.workers,
        ):
            first = first or time.perf_counter() - begin
            groups.append(video.frames)
        return time.perf_counter() - begin, first, groups

    def compute(self, groups: list[Tensor]) -> tuple[float, float]:
        """Seconds from decoded frames to the first token, and those of the model within."""
        begin = time.perf_counter()
        with self._session() as session:
            for frames in groups:
                session.watch(frames, fps=self.frames / (60.0 * FOOTAGE.minutes))
            answer = session.ask(QUESTION, max_new_tokens=1)
            spent = time.perf_counter() - begin
            total = sum((one.seconds for one in session.groups), answer.seconds)
        return spent, (total.encode or 0.0) + (total.prefill or 0.0)

    def whole(self) -> tuple[float, Timeline]:
        """Seconds from the path to the first token, and how they passed."""
        begin = time.perf_counter()
        with self._session() as session:
            session.watch(self.path, frames=self.frames, workers=self.workers)
            session.ask(QUESTION, max_new_tokens=1)
            return time.perf_counter() - begin, session.timeline

    def round(self, number: int) -> tuple[Round, Timeline]:
        """One of each."""
        if number % 2:
            whole, timeline = self.whole()
        decode, first, groups = self.decode()
        compute, model = self.compute(groups)
        if not number % 2:
            whole, timeline = self.whole()
        return Round(decode, first, compute, model, whole), timeline

    def _session(self) -> Session:
        loaded = self.loaded
        return Session(loaded.model, loaded.processor, self.recipe, group=self.group)


def summary(rounds: list[Round]) -> dict[str, float]:
    """Medians, and what the goal is made of."""
    found = {
        name: statistics.median(getattr(one, name) for one in rounds)
        for name in ("decode", "first_group", "compute", "model", "whole")
    }
    longer = max(found["decode"], found["model"])
    found["limit"] = MARGIN * longer + found["first_group"]
    found["over_longer"] = (found["whole"] - found["first_group"]) / longer
    found["one_after_the_other"] = found["decode"] + found["compute"]
    return found


def main(
    files: Annotated[Path, typer.Option(help="Folder for the video.")] = Path("/var/tmp/footage"),
    frames: Annotated[int, typer.Option(help="Frames to watch.")] = 256,
    group: Annotated[int, typer.Option(help="Frames to prefill at once.")] = 16,
    recipe: Annotated[str, typer.Option(help="What to prune.")] = "vflowopt(keep=0.25)",
    all_cores: Annotated[bool, typer.Option(help="Leave workers and threads at defaults.")] = False,
    rounds: Annotated[int, typer.Option(help="Rounds that count.")] = 5,
    timeline: Annotated[Path | None, typer.Option(help="Picture of the last run.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Measure, and say whether the goal is met."""
    if not all_cores:
        torch.set_num_threads(1)
    workers = None if all_cores else 1
    bench = Bench(build(), make(FOOTAGE, files), frames, group, recipe, workers)
    measured, last = [], Timeline()
    for number in tqdm(range(rounds + 1), disable=as_json):
        one, last = bench.round(number)
        if number:
            measured.append(one)
    if timeline is not None:
        last.save(timeline)
    found = summary(measured)
    if as_json:
        typer.echo(json.dumps({**found, "rounds": [asdict(one) for one in measured]}))
        return
    for name, value in found.items():
        typer.echo(f"{name.replace('_', ' '):<20} {value:7.3f}")
    if not all_cores:  # which share what each has alone
        typer.echo("goal met" if found["whole"] <= found["limit"] else "goal missed")


if __name__ == "__main__":
    typer.run(main)
