"""Models that come with the library: very small, trained on a generated world."""

from pathlib import Path

__all__ = ["built_in_models"]


def built_in_models() -> dict[str, Path]:
    """Folders of the shipped models, by the name that `--model` takes."""
    folder = Path(__file__).parent
    return {path.parent.name: path.parent for path in sorted(folder.glob("*/config.json"))}
