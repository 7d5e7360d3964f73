"""Prune the visual and audio tokens that multimodal language models do not need."""

__version__ = "0.1.0"
