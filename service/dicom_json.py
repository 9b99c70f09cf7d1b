"""DICOM elements in the DICOM JSON model (PS3.18 F); malformed ones are left out."""

import json
from collections.abc import Callable, Iterable
from typing import Any, cast

from pydicom.datadict import dictionary_VR
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.filewriter import correct_ambiguous_vr_element
from pydicom.tag import BaseTag, Tag

BINARY = {"OB", "OD", "OF", "OL", "OV", "OW", "UN"}
BULK_BYTES = 1024  # of a binary value, above which it is not put into the answer
PIXELS = {0x7FE00008, 0x7FE00009, 0x7FE00010}  # never are they
UTF8 = "ISO_IR 192"  # what JSON is written in

Address = Callable[[str], str]  # a bulk value's place, as `00189346/0/7FE00010`, to its URL


def to_json(dataset: Dataset, tags: Iterable[Any] | None = None, address: Address | None = None) -> dict[str, Any]:
    """The dataset's elements, or those of the tags or keywords that are there, by eight-digit tag.

    Large binary values are named by `address`, and left out without one.
    """
    return _items(dataset, sorted(dataset.keys()) if tags is None else [Tag(tag) for tag in tags], address, "")


def _items(dataset: Dataset, tags: Iterable[BaseTag], address: Address | None, place: str) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for tag in tags:
        try:
            if tag in dataset and (found := _element(dataset, tag, address, f"{place}{tag:08X}")) is not None:
                json.dumps(found, allow_nan=False)
                answer[f"{tag:08X}"] = found
        except Exception:  # whatever pydicom makes of a malformed value, which it would quote
            continue
    if "00080005" in answer:
        answer["00080005"] = {"vr": "CS", "Value": [UTF8]}
    return answer


def _element(dataset: Dataset, tag: BaseTag, address: Address | None, place: str) -> dict[str, Any] | None:
    raw = dataset.get_item(tag, keep_deferred=True)
    if is_bulk(raw):
        return {"vr": _vr(raw), "BulkDataURI": address(place)} if address else None
    element = dataset[tag]
    if " or " in element.VR:
        element = cast(DataElement, correct_ambiguous_vr_element(element, dataset, True))
    if element.VR == "SQ":
        items = [_items(each, sorted(each.keys()), address, f"{place}/{k}/") for k, each in enumerate(element.value)]
        return {"vr": "SQ", "Value": items} if items else {"vr": "SQ"}
    return dict(_without_nul(element.to_json_dict(None, BULK_BYTES)))


def is_bulk(element: Any) -> bool:
    """Whether the element, read or not, is one that metadata names instead of holding."""
    if element.tag in PIXELS:
        return True
    if _vr(element) not in BINARY:
        return False
    length = getattr(element, "length", None)  # of a raw element
    if length is None:
        length = len(element.value or b"")
    return bool(length > BULK_BYTES)  # undefined is 0xFFFFFFFF


def _vr(element: Any) -> str:
    if element.tag in PIXELS:
        return {0x7FE00008: "OF", 0x7FE00009: "OD"}.get(int(element.tag), "OW")
    if element.VR:
        return str(element.VR)
    try:
        return dictionary_VR(element.tag)
    except KeyError:
        return "UN"


def _without_nul(value: Any) -> Any:
    """PostgreSQL keeps no NUL."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, list):
        return [_without_nul(each) for each in value]
    return {key: _without_nul(each) for key, each in value.items()} if isinstance(value, dict) else value
