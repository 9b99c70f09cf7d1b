"""QIDO-RS: studies, series and instances that match, as DICOM JSON (PS3.18 10.6)."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.uid import ImplicitVRLittleEndian

from models.ct.header import NotDicom, read_elements, read_header
from service.dicom_json import BULK_BYTES, UTF8, to_json
from service.dicomweb.addresses import Addresses
from service.dicomweb.attributes import INSTANCE, STUDY, Attribute, Level, attribute, searched
from service.dicomweb.matching import Criterion, criterion
from service.errors import BadDicomWeb
from service.storage.archive import Archive
from service.storage.stores import Stores
from service.storage.studies import LIKEABLE, FoundSeries, Wanted

MOST_RESULTS = 5000  # of one answer
OPTIONS = {"limit", "offset", "includefield", "fuzzymatching", "accept"}  # no attributes

# What each level answers, empty where unknown, beside InstanceAvailability and RetrieveURL, which each has
# (PS3.18 tables 10.6.3-3 to 10.6.3-5).
ANSWERED: dict[Level, list[str]] = {
    "study": [
        "AccessionNumber",
        "ModalitiesInStudy",
        "NumberOfStudyRelatedInstances",
        "NumberOfStudyRelatedSeries",
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
    ],
    "series": [
        "BodyPartExamined",
        "Modality",
        "NumberOfSeriesRelatedInstances",
        "PerformedProcedureStepStartDate",
        "PerformedProcedureStepStartTime",
        "SeriesDate",
        "SeriesDescription",
        "SeriesInstanceUID",
        "SeriesNumber",
        "SeriesTime",
    ],
    "instance": [
        "AvailableTransferSyntaxUID",
        "BitsAllocated",
        "Columns",
        "InstanceNumber",
        "NumberOfFrames",
        "Rows",
        "SOPClassUID",
        "SOPInstanceUID",
    ],
}
LEVELS: list[Level] = ["study", "series", "instance"]

Item = dict[str, Any]  # a dataset in the DICOM JSON model


@dataclass(frozen=True)
class Query:
    level: Level
    criteria: Sequence[Criterion]
    include: Sequence[Attribute] | None  # beside what is always answered; None for all there is
    limit: int
    offset: int


@dataclass(frozen=True)
class Results:
    items: Sequence[Item]
    more: bool  # than were asked for or may be answered


def parse_query(
    level: Level,
    parameters: Iterable[tuple[str, str]],
    include: Sequence[str],
    limit: int | None,
    offset: int,
    **within: str | None,
) -> Query:
    """A search from its parameters, narrowed by keywords like StudyInstanceUID=. Raises BadDicomWeb."""
    criteria = {keyword: criterion(attribute(keyword), value) for keyword, value in within.items() if value is not None}
    for name, value in parameters:
        if name in OPTIONS:
            continue
        asked = searched(name, level)
        if asked.keyword in criteria:
            raise BadDicomWeb(f"{asked.keyword} is given twice")
        criteria[asked.keyword] = criterion(asked, value)
    names = [name for each in include for name in each.split(",") if name]
    fields = None if "all" in names else [attribute(name) for name in names]
    return Query(
        level, [*criteria.values()], fields, min(MOST_RESULTS if limit is None else limit, MOST_RESULTS), offset
    )


def search(query: Query, stores: Stores, addresses: Addresses) -> Results:
    """One page of what matches: the latest studies first, in them series and instances by their UIDs."""
    found = {"study": _studies, "series": _series, "instance": _instances}[query.level](query, stores, addresses)
    items = list(islice(found, query.offset, query.offset + query.limit + 1))
    return Results([make() for make in items[: query.limit]], len(items) > query.limit)


# Each of these yields what makes an item, so that what an offset skips is not made.


def _studies(query: Query, stores: Stores, addresses: Addresses) -> Iterator[partial[Item]]:
    for study in stores.studies.search(_wanted(query.criteria)):
        if any(_matches(query.criteria, _known(each, study)) for each in study):
            yield partial(_study_item, query, study, addresses)


def _series(query: Query, stores: Stores, addresses: Addresses) -> Iterator[partial[Item]]:
    for study in stores.studies.search(_wanted(query.criteria)):
        for each in study:
            if _matches(query.criteria, _known(each, study)):
                yield partial(_series_item, query, each, study, addresses)


def _instances(query: Query, stores: Stores, addresses: Addresses) -> Iterator[partial[Item]]:
    of_instance = [each for each in query.criteria if each.attribute.keyword in INSTANCE]
    of_series = [each for each in query.criteria if each.attribute.keyword not in INSTANCE]
    by_uid = next((each for each in of_instance if each.attribute.keyword == "SOPInstanceUID" and each.text), None)
    for study in stores.studies.search(_wanted(of_series)):
        for each in study:
            if not _matches(of_series, _known(each, study)):
                continue
            sop_uids = stores.archive.sop_uids(each.series_uid)
            if by_uid and by_uid.text != "*":
                sop_uids = sorted({*sop_uids} & {*by_uid.uids()})
            stores.archive.verify(each.series_uid, sop_uids)
            for sop_uid in sop_uids:
                header = partial(_header, stores.archive, each.series_uid, sop_uid, query)
                if not of_instance or _matches(of_instance, header()):
                    yield partial(_instance_item, query, sop_uid, header, each, study, addresses)


def _wanted(criteria: Sequence[Criterion]) -> Wanted:
    """What of the criteria the catalog can look for."""
    asked = {each.attribute.keyword: each for each in criteria if each.text not in ("", "*")}
    uids = {keyword: asked[keyword].uids() for keyword in ("StudyInstanceUID", "SeriesInstanceUID") if keyword in asked}
    bounds = asked["StudyDate"].bounds() if "StudyDate" in asked else None
    return Wanted(
        study_uids=uids.get("StudyInstanceUID", ()),
        series_uids=uids.get("SeriesInstanceUID", ()),
        study_date=bounds and (bounds[0][:8], bounds[1][:8]),
        like={key: each.like() for key, each in asked.items() if key in LIKEABLE or key == "PatientName"},
    )


def _matches(criteria: Sequence[Criterion], known: Mapping[str, Any]) -> bool:
    return all(each.matches(known.get(each.attribute.key, {}).get("Value", [])) for each in criteria)


def _known(series: FoundSeries, study: Sequence[FoundSeries]) -> Item:
    """What the catalog knows of a series and its study."""
    modalities = {value for each in study for value in each.header.get("00080060", {}).get("Value", [])}
    return dict(
        [
            _element("PatientID", series.patient_id),  # where the header lacks it
            *series.header.items(),
            _element("ModalitiesInStudy", *sorted(modalities)),
            _element("StudyInstanceUID", series.study_uid),
            _element("SeriesInstanceUID", series.series_uid),
            _element("NumberOfStudyRelatedSeries", len(study)),
            _element("NumberOfStudyRelatedInstances", sum(each.received for each in study)),
            _element("NumberOfSeriesRelatedInstances", series.received),
        ]
    )


def _header(archive: Archive, series_uid: str, sop_uid: str, query: Query) -> Item:
    """What an instance's own file says, of what is answered, asked for and matched."""
    tags: list[str | int] = [*ANSWERED["instance"], *INSTANCE, *(each.tag for each in query.include or ())]
    with archive.local(series_uid, [sop_uid]) as (path,):
        try:
            header = read_elements(path, BULK_BYTES) if query.include is None else read_header(path, also=tags)
        except NotDicom:
            return {}
        syntax = header.file_meta.get("TransferSyntaxUID", ImplicitVRLittleEndian)
        return to_json(header, None if query.include is None else tags) | dict(
            [_element("SOPInstanceUID", sop_uid), _element("AvailableTransferSyntaxUID", syntax)]
        )


def _study_item(query: Query, study: Sequence[FoundSeries], addresses: Addresses) -> Item:
    of_study = {attribute(keyword).key for keyword in {*STUDY, *ANSWERED["study"]}}
    known = {key: value for key, value in _known(study[0], study).items() if key in of_study}
    return _item(query, known, addresses.study(study[0].study_uid))


def _series_item(query: Query, series: FoundSeries, study: Sequence[FoundSeries], addresses: Addresses) -> Item:
    return _item(query, _known(series, study), addresses.series(series.study_uid, series.series_uid))


def _instance_item(
    query: Query,
    sop_uid: str,
    header: Callable[[], Item],
    series: FoundSeries,
    study: Sequence[FoundSeries],
    addresses: Addresses,
) -> Item:
    url = addresses.instance(series.study_uid, series.series_uid, sop_uid)
    return _item(query, _known(series, study) | header(), url)


def _item(query: Query, known: Item, url: str) -> Item:
    """What the query's level and those above it answer, and of the rest what was asked for."""
    answered = [keyword for level in LEVELS[: LEVELS.index(query.level) + 1] for keyword in ANSWERED[level]]
    empty = dict(_element(keyword) for keyword in answered)
    asked = known.keys() if query.include is None else {*empty, *(each.key for each in query.include)}
    chosen = {key: value for key, value in known.items() if key in asked}
    where = [_element("InstanceAvailability", "ONLINE"), _element("RetrieveURL", url)]
    return dict(sorted((empty | chosen | dict([*where, _element("SpecificCharacterSet", UTF8)])).items()))


def _element(keyword: str, *values: Any) -> tuple[str, Item]:
    """Tag and value in the DICOM JSON model; without values an empty element."""
    tag = tag_for_keyword(keyword)
    assert tag is not None  # our own keywords
    vr = dictionary_VR(tag)
    shown = [{"Alphabetic": value} if vr == "PN" else value for value in values]
    return f"{tag:08X}", {"vr": vr, "Value": shown} if values else {"vr": vr}
