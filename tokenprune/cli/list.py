"""`tokenprune list`: methods and models."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from tokenprune.catalog import find_plugins, method_summaries, model_types
from tokenprune.cli.options import Json
from tokenprune.models import built_in_models

__all__ = ["list_all"]


def list_all(as_json: Json = False) -> None:
    """List methods and model families."""
    methods, models = method_summaries(), model_types()
    built_in, plugins = list(built_in_models()), find_plugins()
    if as_json:
        found = {"methods": methods, "models": models, "built_in": built_in}
        typer.echo(json.dumps(found | {"plugins": [asdict(one) for one in plugins]}))
        return
    width = max(map(len, methods))
    lines = ["methods", *(f"  {name:<{width}}  {what}" for name, what in methods.items())]
    lines += ["models", f"  {', '.join(models)}", "built-in models", f"  {', '.join(built_in)}"]
    if plugins:
        lines += ["plugins", *(f"  {one.kind} {one.name}, of {one.package}" for one in plugins)]
    typer.echo("\n".join(lines))
