"""Attribute matching (PS3.4 C.2.2.2): single value, list of UIDs, universal, wildcard, range."""

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.ct.reasons import UID
from service.dicomweb.attributes import Attribute
from service.errors import BadDicomWeb

NUMBERS = {"DS", "IS", "US", "SS", "UL", "SL", "FL", "FD"}
RANGES = {"DA": re.compile(r"\d{8}"), "TM": re.compile(r"\d{2}(\d{2}(\d{2}(\.\d{1,6})?)?)?")}
ANY_CASE = {"PN", "CS"}  # PS3.4 C.2.2.2.1 leaves names to us; codes are upper case, which not every sender knows

Value = str | int | float | dict[str, str]  # of the DICOM JSON model


@dataclass(frozen=True)
class Criterion:
    """One attribute and what it must be."""

    attribute: Attribute
    text: str

    def matches(self, values: Sequence[Any]) -> bool:
        """Whether one of an element's values, as DICOM JSON has them, is what was asked for."""
        if self.text in ("", "*"):
            return True
        test = _test(self.attribute, self.text)
        return any(test(form) for value in values for form in _forms(value))

    def uids(self) -> list[str]:
        return re.split(r"[,\\]", self.text)

    def bounds(self) -> tuple[str, str]:
        """Both ends of a range of dates or times, inclusive, as strings that compare like them."""
        low, dash, high = self.text.partition("-")
        return low.ljust(13, "0") if low else "", (high if dash else low).ljust(13, "9") if high or not dash else "~"

    def like(self) -> str:
        """An SQL pattern that matches at least what this does: SQLite knows the case of ASCII letters only."""
        wild = {"*": "%", "?": "_", "%": "\\%", "_": "\\_", "\\": "\\\\"}
        pattern = "".join(wild.get(each, each) if each.isascii() else "_" for each in self.text)
        if self.attribute.vr == "PN":
            return f"{pattern}%"  # a name may end in empty components
        return pattern.upper() if self.attribute.keyword == "BodyPartExamined" else pattern


def criterion(attribute: Attribute, text: str) -> Criterion:
    """What is asked of the attribute. Raises BadDicomWeb, which never quotes the value: it may be a patient's."""
    text = text.strip()
    found = Criterion(attribute, text)
    if "\0" in text:
        raise BadDicomWeb(f"{attribute.keyword} holds NUL")
    if not text or text == "*":
        return found
    if attribute.vr == "UI" and not all(UID.fullmatch(each) for each in found.uids()):
        raise BadDicomWeb(f"{attribute.keyword} is not a UID of at most 64 digits and dots, or several between commas")
    if form := RANGES.get(attribute.vr):
        ends = text.split("-")
        if len(ends) > 2 or not any(ends) or not all(form.fullmatch(each) for each in ends if each):
            example = "YYYYMMDD, or two of them with a dash" if attribute.vr == "DA" else "HHMMSS, or two with a dash"
            raise BadDicomWeb(f"{attribute.keyword} is neither one {attribute.vr} nor a range, expected as {example}")
    if attribute.vr in NUMBERS and _number(text) is None:
        raise BadDicomWeb(f"{attribute.keyword} is no number")
    return found


def _test(attribute: Attribute, text: str) -> Callable[[str], bool]:
    asked = Criterion(attribute, text)
    if attribute.vr == "UI":
        uids = set(asked.uids())
        return lambda value: value in uids
    if attribute.vr in RANGES:
        low, high = asked.bounds()
        return lambda value: low <= value.ljust(13, "0") <= high
    if attribute.vr in NUMBERS:
        number = _number(text)
        return lambda value: _number(value) == number
    # fnmatch's expressions cannot be made to take exponential time; a bracket is no wildcard of DICOM's.
    pattern = fnmatch.translate((text.rstrip("^") if attribute.vr == "PN" else text).replace("[", "[[]"))
    wild = re.compile(pattern, re.IGNORECASE if attribute.vr in ANY_CASE else 0)
    return lambda value: wild.match(value) is not None


def _forms(value: Value) -> list[str]:
    """A value as text; of a name each of its groups, without the empty components at their ends."""
    if isinstance(value, dict):
        return [each.strip().rstrip("^") for each in value.values()]
    return [str(value).strip()]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
