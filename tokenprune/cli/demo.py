"""`tokenprune demo`: a page in the browser."""

from __future__ import annotations

from typing import Annotated

import typer

from tokenprune.cli.options import Model

__all__ = ["demo"]


def demo(
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to serve on.")] = 7860,
) -> None:
    """Serve a page that answers questions about a video."""
    from tokenprune.demos.long_video_qa import serve

    serve(model, host=host, port=port)
