"""What a caller accepts, as media types and transfer syntaxes (RFC 9110 12.5.1, PS3.18 8.7)."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from service.errors import NotAcceptable

DICOM = "application/dicom"
DICOM_JSON = "application/dicom+json"
JSON = "application/json"
OCTETS = "application/octet-stream"
RELATED = "multipart/related"
JPEG, PNG = "image/jpeg", "image/png"

LONGEST_SHOWN = 200  # characters of an Accept in an error

# A media type or a range of them, then its parameters; values may be quoted.
_TOKEN = r"[\w!#$&^.+*-]+"
_PARAMETER = rf'\s*;\s*({_TOKEN})=("[^"]*"|[^;,"\s]*)'
_RANGE = re.compile(rf"\s*({_TOKEN}/{_TOKEN})((?:{_PARAMETER})*)\s*;?\s*(?:,|$)")


@dataclass(frozen=True)
class Media:
    """A media type; of multipart/related also that of its parts."""

    kind: str
    part: str = ""

    def __str__(self) -> str:
        return f'{self.kind}; type="{self.part}"' if self.part else self.kind


@dataclass(frozen=True)
class Choice:
    """What the caller likes best of what is offered, and in which transfer syntaxes; "" where it names none."""

    media: Media
    syntaxes: frozenset[str]


def chosen(accept: str, offered: Sequence[Media]) -> Choice:
    """The best of `offered` for this Accept. Raises NotAcceptable."""
    fits = [(each, syntax) for wanted, syntax in _ranges(accept) for each in offered if _fits(each, wanted)]
    if not fits:
        expected = ", ".join(map(str, offered))
        raise NotAcceptable(f"Accept is {accept[:LONGEST_SHOWN]!r}, expected one of {expected}")
    best = fits[0][0]
    return Choice(best, frozenset(syntax for media, syntax in fits if media == best))


def _fits(media: Media, wanted: Media) -> bool:
    part = not wanted.part or (bool(media.part) and fnmatchcase(media.part, wanted.part))
    return part and fnmatchcase(media.kind, wanted.kind)


def _ranges(accept: str) -> list[tuple[Media, str]]:
    """Media ranges with their transfer-syntax, the best liked first. Raises NotAcceptable."""
    found: list[tuple[float, Media, str]] = []
    at = 0
    while at < len(accept):
        match = _RANGE.match(accept, at)
        if match is None:
            raise NotAcceptable(f"Accept is {accept[:LONGEST_SHOWN]!r}, expected media types between commas")
        parameters = {key.lower(): value.strip('"') for key, value in re.findall(_PARAMETER, match[2])}
        try:
            quality = float(parameters.get("q", 1))
        except ValueError as error:
            raise NotAcceptable(f"Accept is {accept[:LONGEST_SHOWN]!r}, expected q as a number") from error
        media = Media(match[1].lower(), parameters.get("type", "").lower())
        if quality > 0:
            found.append((quality, media, parameters.get("transfer-syntax", "")))
        at = match.end()
    found.sort(key=lambda each: -each[0])
    return [(media, syntax) for _, media, syntax in found]
