"""All errors that tokenprune raises on purpose.

TokenPruneError
├── RecipeError            a setting, a recipe or a stage that cannot be (also a ValueError)
├── UnsupportedModelError  a model, cache or prompt that cannot be pruned (also a ValueError)
├── MediaError             a file that cannot be used (also a ValueError)
│   ├── DecodeError
│   └── NoVideoStreamError
└── MissingExtraError      an optional package is absent or broken (also an ImportError)
"""

__all__ = [
    "DecodeError",
    "MediaError",
    "MissingExtraError",
    "NoVideoStreamError",
    "RecipeError",
    "TokenPruneError",
    "UnsupportedModelError",
]


class TokenPruneError(Exception):
    """Base of all errors of this library; its text is one line for the user."""


class RecipeError(TokenPruneError, ValueError):
    """A setting or a combination of stages is not valid."""


class UnsupportedModelError(TokenPruneError, ValueError):
    """The model, its cache or the prompt is of a kind that cannot be pruned."""


class MediaError(TokenPruneError, ValueError):
    """A media file, or what was asked of it, cannot be used."""


class DecodeError(MediaError):
    """A file is damaged beyond use, or is no media file at all."""


class NoVideoStreamError(MediaError):
    """A file holds no video."""


class MissingExtraError(TokenPruneError, ImportError):
    """An optional package is not installed, or fails to load."""


def first_line(error: BaseException) -> str:
    """What an error says, as part of a message; its name if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".;") if lines else type(error).__name__
