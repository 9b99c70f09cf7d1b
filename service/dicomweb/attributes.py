"""Which attributes a search may ask for, spelled by keyword or tag, and at which level they are."""

from dataclasses import dataclass
from typing import Literal

from pydicom.datadict import dictionary_VR, keyword_for_tag, tag_for_keyword

from service.about import SAID
from service.errors import BadDicomWeb

Level = Literal["study", "series", "instance"]

STUDY = {
    "AccessionNumber",
    "IssuerOfPatientID",
    "ModalitiesInStudy",
    "PatientBirthDate",
    "PatientID",
    "PatientName",
    "PatientSex",
    "ReferringPhysicianName",
    "StudyDate",
    "StudyDescription",
    "StudyID",
    "StudyInstanceUID",
    "StudyTime",
}
SERIES = {*SAID, "SeriesInstanceUID"} - STUDY
INSTANCE = {
    "AcquisitionNumber",
    "Columns",
    "ImageType",
    "InstanceNumber",
    "NumberOfFrames",
    "Rows",
    "SOPClassUID",
    "SOPInstanceUID",
}
# A study is found by any of its series; only an instance's file says what the instance is.
SEARCHED: dict[Level, set[str]] = {
    "study": STUDY | SERIES,
    "series": STUDY | SERIES,
    "instance": STUDY | SERIES | INSTANCE,
}


@dataclass(frozen=True)
class Attribute:
    tag: int
    keyword: str
    vr: str

    @property
    def key(self) -> str:
        """As the DICOM JSON model spells it."""
        return f"{self.tag:08X}"


def attribute(name: str) -> Attribute:
    """By keyword or by tag in eight hexadecimal digits (PS3.18 8.3.4.1). Raises BadDicomWeb."""
    tag = tag_for_keyword(name)
    if tag is None and len(name) == 8 and name.isascii():
        try:
            tag = int(name, 16)
        except ValueError:
            tag = None
    keyword = keyword_for_tag(tag) if tag is not None else ""
    if tag is None or not keyword:
        raise BadDicomWeb(f"no attribute {name[:64]!r}, expected a keyword or a tag of the DICOM dictionary")
    return Attribute(tag, keyword, dictionary_VR(tag))


def searched(name: str, level: Level) -> Attribute:
    """An attribute that a search at this level matches. Raises BadDicomWeb."""
    found = attribute(name)
    if found.keyword not in SEARCHED[level]:
        raise BadDicomWeb(
            f"{found.keyword} is not searched for at the level of {level}, "
            f"expected one of {', '.join(sorted(SEARCHED[level]))}"
        )
    return found
