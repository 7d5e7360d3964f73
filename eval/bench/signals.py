"""What signals cost: time and peak memory beyond those of the unpruned prefill, or encoding.

    python -m tokenprune.eval.bench.signals --rounds 3
    python -m tokenprune.eval.bench.signals --model tiny --tokens 100

A stage that keeps everything reads one signal, in turns with the unpruned model; shares are medians
over rounds of the ratio to the last unpruned run, which comes before every `--every` rows. A row of
`nothing` is a stage without a signal: the price of being there. Signals of the language
model are shares of a prefill of about 6,000 video tokens, whose encoding is not counted; those of
the encoder are shares of a forward through a CLIP with a tiny language model, which is hardly more
than the encoding. Models have random weights in bfloat16. `signals.json` and `signals.md` are
written after each round.
"""

from __future__ import annotations

import ctypes
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig

from tokenprune.core.context import Context
from tokenprune.core.selection import Selection
from tokenprune.core.signal import INPUT, Attention, Hidden, Keys, Signal, Text, Values
from tokenprune.core.site import Cache, Input, Layer, Site
from tokenprune.core.stage import Stage
from tokenprune.engine.patch import prune
from tokenprune.eval.bench.gpu_models import TINY_SIGLIP, TINY_TEXT
from tokenprune.eval.bench.gpu_results import describe
from tokenprune.eval.bench.random_models import (
    QWEN2_7B,
    SO400M,
    Model,
    Settings,
    build,
    keep_layers,
    llava_config,
    llava_inputs,
)
from tokenprune.eval.bench.speed import encoded_once, make
from tokenprune.eval.bench.stopwatch import PeakMemory
from tokenprune.methods.visionzip import Dominance, EncoderKeys

__all__ = ["MODELS", "Reader", "Run", "encoder_rows", "forward", "main", "prefill_rows"]

RESULTS = Path(__file__).parents[1] / "results"
CLIP_L: Settings = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
"""CLIP ViT-L/14 of 336 x 336 pixels, a tower with a class token: 144 tokens a frame."""

_trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)


def _llava(text: Settings, vision: Settings) -> Callable[[], Model]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return lambda: build(llava_config(text, vision), device)


MODELS: dict[str, Callable[[], Model]] = {
    "0.5b": lambda: make(vision_layers=1),
    "7b": _llava(QWEN2_7B, {**SO400M, "num_hidden_layers": 1}),
    "tiny": _llava(TINY_TEXT, TINY_SIGLIP),
}
"""LLaVA-OneVision by the size of its language model; the tower plays no part."""


@dataclass(frozen=True)
class Reader(Stage):
    """Keeps everything, and reads what it asks for.

    Attributes:
        site: Where.
        needs: The signal, or none.
    """

    site: Site = Input()
    needs: tuple[Signal[Any], ...] = ()

    name = "reader"

    def select(self, context: Context) -> Selection:
        for signal in self.needs:
            context[signal]
        return Selection(torch.arange(len(context), device=context.rows.device))

    def __str__(self) -> str:
        return ", ".join(map(_short, self.needs)) or "nothing"


def _short(signal: Signal[Any]) -> str:
    """A signal with the settings that are not its defaults."""
    told = [
        f"{one.name}={getattr(signal, one.name)!r}"
        for one in fields(signal)  # type: ignore[arg-type]  # all signals are dataclasses
        if getattr(signal, one.name) != one.default
    ]
    return f"{type(signal).__name__}({', '.join(told)})"


def prefill_rows(layer: int) -> list[Reader]:
    """What is measured of the language model.

    Args:
        layer: For signals of one layer.
    """
    everywhere: list[Signal[Any]] = [Hidden(), Hidden(layer=INPUT)]
    stored: list[Signal[Any]] = [Keys(), Values()]
    many = [
        Attention(),
        Attention(queries=64),
        Attention(queries=64, reduce="mean", heads="mean"),
        Attention(queries="text", reduce="mean"),
    ]
    at_cache = [*many, Attention(rotary=False), *stored, Keys(rotary=False), *everywhere]
    at_layer = [
        *(Attention(**{**vars(one), "layer": -1}) for one in many),
        Attention(layer=-1, rotary=False),
        Attention(),
        Attention(rotary=False),
        *stored,
        *everywhere,
    ]
    sites: list[tuple[Site, list[Signal[Any]]]] = [
        (Cache(), at_cache),
        (Layer(layer), at_layer),
        (Input(), [Text()]),
    ]
    return [
        Reader(site, needs)
        for site, signals in sites
        for needs in ((), *((signal,) for signal in signals))
    ]


def encoder_rows() -> list[Reader]:
    """What is measured of the encoder."""
    signals = Dominance("received"), Dominance("class"), EncoderKeys()
    return [Reader(), *(Reader(Input(), (signal,)) for signal in signals)]


def tower(tiny: bool) -> Model:
    """A CLIP, and a tiny language model beside it."""
    config = llava_config(TINY_TEXT, TINY_SIGLIP)
    vision = {**TINY_SIGLIP, "num_hidden_layers": 2} if tiny else CLIP_L
    config.vision_config = CLIPVisionConfig(**vision)
    config.vision_feature_select_strategy = "default"  # without the class token
    return build(config, "cuda" if torch.cuda.is_available() else "cpu")


# -- measuring


@dataclass(frozen=True)
class Run:
    """What one forward took.

    Attributes:
        seconds: From the inputs to the logits of the last token.
        peak_bytes: Memory at its peak beyond weights and inputs.
    """

    seconds: float
    peak_bytes: int


def forward(model: Model, inputs: dict[str, Tensor], pruned: Stage | str | None) -> Run:
    """Measure one prefill; without a stage or recipe, that of the model alone."""
    with torch.inference_mode(), nullcontext() if pruned is None else prune(model, pruned):
        if _trim is not None:  # what was freed must not count as taken before
            _trim(0)
        peak = PeakMemory(model.device)
        started = time.perf_counter()
        model(**inputs, logits_to_keep=1)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return Run(time.perf_counter() - started, peak.extra_bytes())


Pairs = dict[Reader, list[tuple[Run, Run]]]
"""For each row the unpruned run and its own, of each round."""


def in_turns(
    model: Model, inputs: dict[str, Tensor], rows: list[Reader], rounds: int, every: int
) -> Iterator[Pairs]:
    """What is known after each round.

    Args:
        model: The model.
        inputs: Its prompt.
        rows: Stages.
        rounds: How often each is run.
        every: How many rows are compared with one unpruned run.
    """
    pairs: Pairs = {row: [] for row in rows}
    forward(model, inputs, None)
    for number in range(rounds):
        # The order alternates, so that a drift of the machine cancels.
        order = rows[::-1] if number % 2 else rows
        for place, row in enumerate(tqdm(order, leave=False)):
            if place % every == 0:
                unpruned = forward(model, inputs, None)
            pairs[row].append((unpruned, forward(model, inputs, row)))
        yield pairs


def warm_up(model: Model, rows: list[Reader]) -> None:
    """Read each signal once of a short prompt: what cannot be read fails at once."""
    short = llava_inputs(model, 2)
    for row in rows:
        forward(model, short, row)


# -- results


@dataclass(frozen=True)
class Cell:
    """A row of the table: medians of all rounds.

    Attributes:
        signal: What was read.
        site: Where.
        rounds: How often.
        seconds: Of the forward.
        time_share: Of the unpruned forward, beyond it.
        peak_bytes: Beyond weights and inputs.
        peak_share: Of the unpruned peak, beyond it.
    """

    signal: str
    site: str
    rounds: int
    seconds: float
    time_share: float
    peak_bytes: float
    peak_share: float


def cells(pairs: Pairs) -> list[Cell]:
    """The table: first the unpruned model, then each row."""
    unpruned = list(dict.fromkeys(base for runs in pairs.values() for base, _ in runs))
    found = [_cell("unpruned", "", [(base, base) for base in unpruned])]
    return found + [_cell(str(row), str(row.site), runs) for row, runs in pairs.items()]


def _cell(signal: str, site: str, runs: list[tuple[Run, Run]]) -> Cell:
    return Cell(
        signal,
        site,
        len(runs),
        statistics.median(run.seconds for _, run in runs),
        statistics.median(run.seconds / base.seconds - 1 for base, run in runs),
        statistics.median(run.peak_bytes for _, run in runs),
        statistics.median(
            run.peak_bytes / base.peak_bytes - 1 if base.peak_bytes else 0.0 for base, run in runs
        ),
    )


@dataclass(frozen=True)
class Part:
    """A model, its prompt, and what was found.

    Attributes:
        name: "prefill" or "encoding": what shares are of.
        model: What it is called.
        media_tokens: Of the prompt.
        cells: The rows.
    """

    name: str
    model: str
    media_tokens: int
    cells: list[Cell]


def table(about: dict[str, Any], parts: list[Part]) -> str:
    """All parts as Markdown."""
    lines = [f"# What signals cost: {about.get('card', about['device'])}, {about['cores']} cores"]
    for part in parts:
        title = f"**{part.name}, {part.model}, {part.media_tokens:,} media tokens**"
        lines += ["", title, "", "| signal | site | rounds | seconds | extra | peak MiB | extra |"]
        lines.append("|---|---|---|---|---|---|---|")
        for cell in part.cells:
            shares = [f"{share:+.1%}" for share in (cell.time_share, cell.peak_share)]
            if not cell.site:
                shares = ["", ""]
            lines.append(
                f"| `{cell.signal}` | {cell.site} | {cell.rounds} | {cell.seconds:.3f} "
                f"| {shares[0]} | {cell.peak_bytes / 2**20:.1f} | {shares[1]} |"
            )
    return "\n".join(lines)


def save(folder: Path, about: dict[str, Any], parts: list[Part]) -> None:
    """Write both files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {**about, "parts": [asdict(part) for part in parts]}
    (folder / "signals.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "signals.md").write_text(table(about, parts) + "\n")


def main(
    tokens: Annotated[int, typer.Option(help="Media tokens of the prefill, about.", min=1)] = 6000,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
    every: Annotated[int, typer.Option(help="Rows to one unpruned run.", min=1)] = 4,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "0.5b",
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 for all of the model.")] = 0,
    frames: Annotated[int, typer.Option(help="Frames to encode.", min=1)] = 8,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 for all.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Run the bench."""
    if model not in MODELS:
        raise typer.BadParameter(f"no model {model!r}; there are {', '.join(MODELS)}")
    if threads:
        torch.set_num_threads(threads)
    about = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parts: list[Part] = []
    measured = (
        _prefill(model, tokens, rounds, every, layers),
        _encoding(model == "tiny", frames, rounds, every),
    )
    for known in measured:
        for part in known:
            save(out, about, [*parts, part])
        parts.append(part)
    typer.echo(table(about, parts))
    typer.echo(f"written to {out}")


def _prefill(name: str, tokens: int, rounds: int, every: int, layers: int) -> Iterator[Part]:
    model = MODELS[name]()
    if layers:
        keep_layers(model, layers)
        name = f"{name} of {layers} layers"
    config: Any = model.config
    rows = prefill_rows(config.text_config.num_hidden_layers // 2)
    warm_up(model, rows)
    vision = config.vision_config
    each = (-(-(vision.image_size // vision.patch_size) // 2)) ** 2
    inputs = llava_inputs(model, -(-tokens // each))
    with encoded_once(model, inputs):
        for pairs in in_turns(model, inputs, rows, rounds, every):
            yield Part("prefill", f"LLaVA-OneVision {name}", _media(model, inputs), cells(pairs))


def _encoding(tiny: bool, frames: int, rounds: int, every: int) -> Iterator[Part]:
    model, rows = tower(tiny), encoder_rows()
    warm_up(model, rows)
    inputs, name = llava_inputs(model, frames), "tiny CLIP" if tiny else "CLIP ViT-L/14-336"
    for pairs in in_turns(model, inputs, rows, rounds, every):
        yield Part("encoding", name, _media(model, inputs), cells(pairs))


def _media(model: Model, inputs: dict[str, Tensor]) -> int:
    config: Any = model.config
    return int((inputs["input_ids"] == config.video_token_id).sum())


if __name__ == "__main__":
    gc.freeze()
    typer.run(main)
