"""multipart/related answers, part by part: nothing is held that is not being sent (RFC 2387, PS3.18 8.6.1.2)."""

import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

from service.dicomweb.media import RELATED


@dataclass(frozen=True)
class Part:
    content_type: str
    location: str  # where this part alone is retrieved from
    chunks: Iterable[bytes]


@dataclass(frozen=True)
class Body:
    """An answer's body and its Content-Type."""

    content_type: str
    chunks: Iterator[bytes]


def related(kind: str, parts: Iterable[Part]) -> Body:
    """The parts, all of one media type. The first is made at once, so that its failure can still be an answer."""
    boundary = uuid.uuid4().hex
    chunks = started(_chunks(boundary, parts))
    return Body(f'{RELATED}; type="{kind}"; boundary={boundary}', chunks)


def started(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """The same chunks, the first of them made already."""
    return chain([next(chunks, b"")], chunks)


def _chunks(boundary: str, parts: Iterable[Part]) -> Iterator[bytes]:
    for part in parts:
        head = (
            f"--{boundary}\r\nContent-Type: {part.content_type}\r\nContent-Location: {part.location}\r\n\r\n".encode()
        )
        for chunk in part.chunks:
            yield head + chunk
            head = b""
        yield head + b"\r\n"
    yield f"--{boundary}--\r\n".encode()
