"""Deinterlacing: lines of the second field are made anew, from frames before and after as well."""

import warnings
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from av.filter import Graph, filters_available

from tokenprune.errors import DecodeError
from tokenprune.media.decode.damage import DecodedFrame
from tokenprune.media.index.index import PacketIndex

__all__ = ["InterlacedFrames", "check_filter", "deinterlaced"]

_FILTERS = ("bwdif", "yadif")  # the better one first


class InterlacedFrames(DecodeError):
    """Frames are flagged as interlaced, where the first one of the file was not."""


@cache
def check_filter() -> str | None:
    """The name of the filter that deinterlaces; None, with a warning, if FFmpeg has none."""
    name = next((one for one in _FILTERS if one in filters_available), None)
    if name is None:
        warnings.warn(
            "this build of FFmpeg has no filter to deinterlace (bwdif, yadif): interlaced frames "
            "come as they are, with the lines of two moments",
            stacklevel=2,
        )
    return name


def deinterlaced(
    frames: Iterable[DecodedFrame], index: PacketIndex, needed: frozenset[int] | None
) -> Iterator[DecodedFrame]:
    """Deinterlace decoded frames that are flagged as interlaced; one in makes one out.

    Args:
        frames: decoded frames in presentation order.
        index: the packet index.
        needed: places of the frames that are wanted, and of their neighbours; others pass as they
            are. None for all.
    """
    name = check_filter()
    if name is None:
        yield from frames
        return
    held: DecodedFrame | None = None
    graph: Any = None
    for found in frames:
        takes = needed is None or found.place in needed
        if held is not None and not (takes and _follows(held, found, index)):
            yield held._replace(frame=_last(graph))
            held = None
        if not takes:
            yield found
            continue
        if held is None:
            graph = _graph(name, found.frame)
        graph.vpush(found.frame)
        if held is not None:
            yield held._replace(frame=graph.vpull())
        held = found
    if held is not None:
        yield held._replace(frame=_last(graph))


def _follows(held: DecodedFrame, found: DecodedFrame, index: PacketIndex) -> bool:
    """Whether a frame is the next one, of the same kind and the same recording."""
    one, other = held.frame, found.frame
    alike = (one.width, one.height) == (other.width, other.height)
    if not (alike and one.format.name == other.format.name and found.place == held.place + 1):
        return False
    # Where frames are counted, there may be more of them than packets.
    packets = index.by_place[np.minimum([held.place, found.place], len(index.place) - 1)]
    return bool(np.diff(index.epoch[packets])[0] == 0)


def _last(graph: Any) -> Any:
    """The frame that a filter still holds, since it waits for the next one."""
    graph.vpush(None)
    return graph.vpull()


def _graph(name: str, frame: Any) -> Any:
    graph = Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format.name, time_base=Fraction(1)
    )
    # The parity is each frame's own; frames that are not flagged pass untouched.
    work = graph.add(name, mode="send_frame", deint="interlaced", threads="1")
    sink = graph.add("buffersink")
    graph.link_nodes(source, work, sink).configure()
    return graph
