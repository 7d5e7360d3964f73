"""Peak memory and time of a prefill in groups, beside the prompt prefilled at once.

python -m tokenprune.eval.bench.groups --tokens 24000 --layers 4
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from tokenprune.eval.bench.gpu_results import describe
from tokenprune.eval.bench.random_models import keep_layers, llava_inputs
from tokenprune.eval.bench.signals import MODELS, RESULTS, Run, forward
from tokenprune.eval.bench.speed import encoded_once

__all__ = ["main"]


def main(
    tokens: Annotated[int, typer.Option(help="Media tokens, about.", min=1)] = 24000,
    group: Annotated[int, typer.Option(help="Frames of a group.", min=1)] = 16,
    layers: Annotated[int, typer.Option(help="Decoder layers; 0 for all of the model.")] = 0,
    rounds: Annotated[int, typer.Option(help="Rounds.", min=1)] = 3,
    model: Annotated[str, typer.Option(help=f"One of {', '.join(MODELS)}.")] = "0.5b",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = RESULTS,
) -> None:
    """Run the bench."""
    if model not in MODELS:
        raise typer.BadParameter(f"no model {model!r}; there are {', '.join(MODELS)}")
    built = MODELS[model]()
    if layers:
        keep_layers(built, layers)
    config: Any = built.config
    vision = config.vision_config
    each = (-(-(vision.image_size // vision.patch_size) // 2)) ** 2
    inputs = llava_inputs(built, -(-tokens // each))
    count = int((inputs["input_ids"] == config.video_token_id).sum())
    grouped = f"groups(size={group})"
    recipes = [
        None,
        grouped,
        "knorm(keep=0.2)",
        f"{grouped} + knorm(keep=0.2)",
        "random(keep=0.2 at=cache)",
        f"{grouped} + random(keep=0.2 at=cache)",
        "uniform(keep=0.2)",
    ]
    runs: dict[str | None, list[Run]] = {recipe: [] for recipe in recipes}
    forward(built, llava_inputs(built, 2), None)
    with encoded_once(built, inputs):
        for number in range(rounds):
            # The order alternates, so that a drift of the machine cancels.
            for recipe in recipes[::-1] if number % 2 else recipes:
                runs[recipe].append(forward(built, inputs, recipe))
    rows = [_row(recipe, runs[recipe], runs[None]) for recipe in recipes]
    about = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found = {"about": about, "model": model, "layers": layers, "media_tokens": count, "rows": rows}
    out.mkdir(parents=True, exist_ok=True)
    (out / "groups.json").write_text(json.dumps(found, indent=2) + "\n")
    (out / "groups.md").write_text(_table(count, rows))
    typer.echo(_table(count, rows))


def _row(recipe: str | None, runs: list[Run], unpruned: list[Run]) -> dict[str, Any]:
    pairs = list(zip(runs, unpruned, strict=True))
    return {
        "recipe": recipe or "none, at once",
        "peak_mib": round(median(run.peak_bytes for run in runs) / 2**20),
        "peak_ratio": round(median(a.peak_bytes / max(1, b.peak_bytes) for a, b in pairs), 3),
        "seconds": round(median(run.seconds for run in runs), 2),
        "seconds_ratio": round(median(a.seconds / b.seconds for a, b in pairs), 3),
    }


def _table(tokens: int, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"Prefill of {tokens:,} media tokens; peak memory beyond weights, inputs and features.",
        "",
        "| recipe | peak, MiB | ratio | seconds | ratio |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| `{one['recipe']}` | {one['peak_mib']:,} | {one['peak_ratio']:.2f} "
        f"| {one['seconds']:.1f} | {one['seconds_ratio']:.2f} |"
        for one in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    gc.freeze()
    typer.run(main)
