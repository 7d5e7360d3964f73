"""The command line put together: its verbs, and exit code 2 for what the user can mend."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable

import typer

from tokenprune.cli.ask import ask
from tokenprune.cli.convert import convert_checkpoint
from tokenprune.cli.decode import decode_video
from tokenprune.cli.demo import demo
from tokenprune.cli.eval import evaluate
from tokenprune.cli.list import list_all
from tokenprune.cli.options import With
from tokenprune.cli.plan import plan_file
from tokenprune.cli.sample import sample
from tokenprune.cli.watch import watch_video
from tokenprune.errors import TokenPruneError, first_line

__all__ = ["VERBS", "app", "main"]

VERBS: dict[str, Callable[..., None]] = {
    "ask": ask,
    "plan": plan_file,
    "watch": watch_video,
    "decode": decode_video,
    "sample": sample,
    "eval": evaluate,
    "convert": convert_checkpoint,
    "list": list_all,
    "demo": demo,
}
"""The commands, in the order of the help."""

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Prune the visual and audio tokens that multimodal language models do not need.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # to import rich would double the time that help takes
)
for verb, run in VERBS.items():
    app.command(verb)(run)


@app.callback()
def import_modules(context: typer.Context, modules: With = None) -> None:
    """Import what `--with` names, before the verb runs; the verb finds the names in `obj`."""
    context.obj = modules or []
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a file there hides no installed package
    for name in context.obj:
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module may raise whatever it likes
            raise TokenPruneError(
                f"--with {name} cannot be imported: {first_line(error)}; give a module that is "
                "installed or in this folder, such as my_package.mine"
            ) from error


def main() -> None:
    """Run the command line."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        app()
    except TokenPruneError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
