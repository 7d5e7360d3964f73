"""`tokenprune list`: methods and models."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from tokenprune.catalog import Plugin, find_clashes, find_plugins, method_summaries, model_types
from tokenprune.cli.options import Json
from tokenprune.models import built_in_models

__all__ = ["list_all"]


def list_all(context: typer.Context, as_json: Json = False) -> None:
    """List methods and model families."""
    methods, models = method_summaries(), model_types()
    built_in = list(built_in_models())
    plugins = find_plugins() + (_added() if context.obj else [])
    clashes = find_clashes({"method": methods, "model": models}, plugins)
    if as_json:
        added = {"plugins": list(map(asdict, plugins)), "clashes": list(map(asdict, clashes))}
        found = {"methods": methods, "models": models, "built_in": built_in}
        typer.echo(json.dumps(found | added))
        return
    width = max(map(len, methods))
    lines = ["methods", *(f"  {name:<{width}}  {what}" for name, what in methods.items())]
    lines += ["models", f"  {', '.join(models)}", "built-in models", f"  {', '.join(built_in)}"]
    if plugins:
        lines += ["plugins", *(f"  {one.kind} {one.name}, of {one}" for one in plugins)]
    if clashes:
        lines += ["clashes: names that cannot be used, since several claim them"]
        lines += [f"  {one.kind} {one.name}: {', '.join(one.claimants)}" for one in clashes]
    typer.echo("\n".join(lines))


def _added() -> list[Plugin]:
    """What modules that were imported by `--with` have registered."""
    from tokenprune.adapters.base import ADAPTERS  # torch: seconds
    from tokenprune.core.registry import METHODS

    return [*METHODS.added(), *ADAPTERS.added()]
