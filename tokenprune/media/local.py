"""Sources as people name them, brought to a local file: paths, URIs, bytes and open files.

One normaliser for messages, readers, sessions and the command line.
"""

import base64
import binascii
import os
import re
import socket
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import IO, Any
from urllib.parse import unquote, unquote_to_bytes

from tokenprune.errors import MediaError
from tokenprune.media.index.container import check_file
from tokenprune.media.kinds import HEAD_BYTES, check_kind

__all__ = [
    "Fetch",
    "LocalFile",
    "MediaSource",
    "check_source",
    "data_of_uri",
    "decode_base64",
    "local_file",
]

MediaSource = str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes]
"""A path, a `file:` or `data:` URI, the bytes of a file, or an open file."""

Fetch = Callable[[str], MediaSource]
"""Gets what a URL names: its bytes, an open file, or the path where it was saved."""

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]+):/{1,3}(?=.)")
BLOCK_BYTES = 1 << 20


class LocalFile:
    """A file of this machine that holds what a source names.

    Bytes are written to a file without a place of its own, which is removed when this object goes.

    Args:
        source: what the caller gave.
        fetch: gets what URLs name; None refuses them.

    An open file is left at the position where it was found.

    Attributes:
        path: of the file.

    Raises:
        MediaError: the source names no local file, or is of no kind that is known.
    """

    def __init__(self, source: MediaSource, fetch: Fetch | None = None) -> None:
        self._given = _label(source)
        if (url := _url(source)) is not None:
            if fetch is None:
                raise MediaError(
                    f"only local files are read, got {url!r:.200}; download it first, or hand in"
                    " fetch=, a function that gets what a URL names"
                )
            source = fetch(url)
            if _url(source) is not None:
                raise MediaError(f"fetch must give bytes, an open file or a path, got {source!r}")
        if isinstance(source, str) and source[:5].lower() == "data:":
            source = data_of_uri(source)[1]
        self._temporary = not isinstance(source, str | os.PathLike)
        if isinstance(source, str | os.PathLike):
            self.path = _path(os.fspath(source))
        else:
            self.path = _written(source)
            weakref.finalize(self, _remove, self.path)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Within, errors name what the caller gave, and not a file that he does not know."""
        try:
            yield
        except MediaError as error:
            text = str(error)
            if not self._temporary or self.path not in text:
                raise
            raise type(error)(text.replace(repr(self.path), self._given)) from error


@contextmanager
def local_file(source: MediaSource, fetch: Fetch | None = None) -> Iterator[str]:
    """The path of a local file that holds what a source names, for as long as the block lasts.

    Raises:
        MediaError: as `LocalFile`; errors of the block name the source.
    """
    file = LocalFile(source, fetch)
    with file.naming():
        yield file.path


def check_source(path: str | os.PathLike[str]) -> None:
    """Check what can be known of a file at once, before anything heavy is loaded.

    Raises:
        MediaError: there is no such file, nothing in it, or what surely is no media.
    """
    file = LocalFile(path)
    with file.naming():
        check_file(file.path)
        with suppress(OSError), open(file.path, "rb") as opened:
            check_kind(file.path, opened.read(HEAD_BYTES))


def data_of_uri(uri: str) -> tuple[str, bytes]:
    """The media type of a `data:` URI, and what it holds.

    Raises:
        MediaError: it is malformed.
    """
    head, comma, body = uri[5:].partition(",")
    if not comma:
        raise MediaError(f"a data: URI needs a comma before its data, got {uri[:60]!r}")
    if not head.lower().endswith(";base64"):
        return head, unquote_to_bytes(body)
    return head[: -len(";base64")], decode_base64(body)


def decode_base64(text: str) -> bytes:
    """What base64 encodes: percent-encoded, in the alphabet of URLs, or without padding too.

    Raises:
        MediaError: it is malformed.
    """
    plain = re.sub(r"\s+", "", unquote(text) if "%" in text else text)
    plain = plain.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise MediaError(f"a data: URI holds no base64 ({error}), but {text[:40]!r}") from error


def _label(source: object) -> str:
    """How errors name a source that is no file."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        return "what the data: URI holds"
    if isinstance(source, str):
        return f"what {source!r:.200} gave"
    return (
        "what was given as bytes"
        if isinstance(source, bytes | bytearray | memoryview)
        else ("what was given as an open file")
    )


def _url(source: object) -> str | None:
    """The source if it is a URI of another machine's; None for all else."""
    if not isinstance(source, str | PurePath):
        return None
    text = os.fspath(source)
    match = SCHEME.match(text)
    if match is None or match[1].lower() in ("file", "data"):
        return None
    if isinstance(source, PurePath):  # which has lost a slash
        return None if _exists(text) else text.replace(":/", "://", 1)
    return text if "://" in text else None


def _path(text: str | bytes) -> str:
    """The path that a text means: itself, or what a `file:` URI names."""
    name = os.fsdecode(text)
    if name[:6].lower() == "file:/" and not _exists(name):
        candidates = _of_uri(name)
        name = next((one for one in candidates if _exists(one)), candidates[0])
    try:
        os.stat(name)
    except ValueError as error:  # a NUL within
        raise MediaError(f"no such file: {name!r:.200}; give the path of a local file") from error
    except OSError as error:
        if isinstance(error, PermissionError):
            raise MediaError(f"cannot read {_shortened(name)!r}: {error.strerror}") from error
        if not _exists(name):  # too long a name, say
            raise MediaError(
                f"no such file: {_shortened(name)!r}; give the path of a local media file"
            ) from error
    return name


def _shortened(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:100]}...{name[-40:]}"


def _of_uri(uri: str) -> list[str]:
    """Paths that a `file:` URI may mean, the likeliest first.

    Raises:
        MediaError: it names another machine.
    """
    rest = uri[5:]
    if not rest.startswith("//"):
        return [unquote(rest), rest]
    host, slash, path = rest[2:].partition("/")
    raw = rest[2:]  # as some write it: a plain path behind `file://`
    if host.lower() in ("", "localhost", "127.0.0.1", socket.gethostname().lower()):
        path = slash + path
        if os.name == "nt":
            path = path.lstrip("/")
        return [unquote(path), path]
    if _exists(unquote(raw)) or _exists(raw):
        return [unquote(raw), raw]
    if os.name == "nt":
        return [unquote(f"//{raw}")]
    raise MediaError(
        f"only local files are read, but {uri!r:.200} is a file of {host!r}; copy it here, or give"
        " the path under which it is mounted"
    )


def _exists(name: str) -> bool:
    try:
        return os.path.lexists(name)
    except (OSError, ValueError):
        return False


def _written(source: object) -> str:
    """Write bytes, or what an open file holds, to a new file."""
    if isinstance(source, bytes | bytearray | memoryview):
        blocks: Iterator[object] = iter((source,))
    elif callable(read := getattr(source, "read", None)):
        blocks = iter(lambda: read(BLOCK_BYTES) or None, None)
    else:
        raise MediaError(
            "a source must be a path, a file: or data: URI, bytes, or a file opened to read bytes,"
            f" got {source!r:.80}"
        )
    descriptor, path = tempfile.mkstemp(prefix="tokenprune-")
    try:
        with _kept_position(source), os.fdopen(descriptor, "wb") as file:
            for block in blocks:
                if not isinstance(block, bytes | bytearray | memoryview):
                    raise MediaError("an open file must give bytes: open it with mode 'rb'")
                file.write(block)
    except BaseException:
        _remove(path)
        raise
    return path


@contextmanager
def _kept_position(source: Any) -> Iterator[None]:
    """Leave an open file where it was, so that it can be read again; a pipe is at its end."""
    try:
        position = source.tell() if source.seekable() else None
    except (AttributeError, OSError, ValueError):
        position = None
    yield
    if position is not None:
        source.seek(position)


def _remove(path: str) -> None:
    Path(path).unlink(missing_ok=True)
