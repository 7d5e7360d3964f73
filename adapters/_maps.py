"""Maps of views, pooled as pictures or along a line."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

__all__ = ["join_neighbours", "pool_grid"]


def join_neighbours(maps: Tensor, count: int) -> Tensor:
    """The mean of each `count` neighbours, `[Nv, ...]` to `[Nv // count, ...]`."""
    tokens = len(maps) // count
    return maps[: tokens * count].reshape(tokens, count, *maps.shape[1:]).mean(dim=1)


def pool_grid(maps: Tensor, grid: tuple[int, int], pool: Callable[[Tensor], Tensor]) -> Tensor:
    """Pool maps of views of one size as pictures, each channel by itself.

    Args:
        maps: `[W, rows * columns, ...]`; what follows are the channels.
        grid: Rows and columns.
        pool: Given and giving `[W, channels, rows, columns]`.

    Returns:
        `[W, N, ...]`, row by row.
    """
    channels = maps.shape[2:]
    pictures = maps.reshape(len(maps), *grid, channels.numel()).permute(0, 3, 1, 2)
    pooled = pool(pictures).flatten(2)  # [W, channels, N]
    return pooled.transpose(1, 2).reshape(len(maps), -1, *channels)
