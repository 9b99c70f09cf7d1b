"""Staged files to archived series: screened, counted, noted in the catalog."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from pydicom.dataset import FileDataset

from models.ct.nifti import InflatesTooFar, UnusableNifti, is_nifti, nifti_slices
from models.ct.reasons import Reason
from models.ct.screening import SetAside, screened_header
from service.about import about_series
from service.archives import most_expanded, unpacked
from service.disk import Room
from service.errors import BeingErased, NothingUsable
from service.pseudonyms import Pseudonyms
from service.settings import Settings
from service.storage.archive import sha256_of
from service.storage.catalog import Arrival, Quiet
from service.storage.stores import Stores
from service.storage.work import refuse
from service.uploads import StagedFile

SHOWN_WHEN_NOTHING_USABLE = 100  # files named in the error


@dataclass(frozen=True)
class NamedSetAside:
    """A file of an upload that was not stored, under the name its sender gave it."""

    file: str
    reason: Reason
    detail: str


@dataclass
class SeriesIntake:
    """One series of what was sent."""

    series_uid: str
    study_uid: str
    patient_id: str
    staged: list[tuple[str, Path]] = field(default_factory=list)  # SOPInstanceUID and file
    received: int = 0  # instances that were new
    duplicates: int = 0  # instances that were here already, or twice in the upload
    set_aside: list[NamedSetAside] = field(default_factory=list)


@dataclass(frozen=True)
class Intake:
    series: list[SeriesIntake]
    set_aside: list[NamedSetAside]  # files that belong to none of the series
    job_id: str = ""  # of an upload


def take_in(
    files: Iterable[StagedFile],
    folder: Path,
    encoder_id: str,
    stores: Stores,
    settings: Settings,
    patient_id: str = "",
    sender: str = "",
) -> Intake:
    """Archive every axial CT slice among the files and ask for its series' embeddings.

    A NIfTI volume becomes a series of such slices; `patient_id` is whose it is.

    Everything is unpacked and screened before the first file is archived, so a bad upload leaves
    nothing behind. Raises BadArchive, UploadTooLarge, NoRoom, BeingErased, or NothingUsable with what was found.
    """
    every = _all_files(files, folder, settings, patient_id)
    groups, set_aside = _group(every, stores)
    if not groups:
        found = [vars(each) for each in set_aside[:SHOWN_WHEN_NOTHING_USABLE]]
        message = f"none of {len(set_aside)} files is an axial CT slice"
        raise NothingUsable(message, set_aside=found)
    arrivals = [_archive(series, stores, sender) for series in groups]
    with _abandoning(arrivals, stores):
        return Intake(groups, set_aside, stores.catalog.receive(arrivals, encoder_id))


def collect(
    files: Iterable[StagedFile], encoder_id: str, stores: Stores, settings: Settings, sender: str = ""
) -> Intake:
    """Archive the axial CT slices among some files of which more may come; series are embedded when they are whole.

    What this answers is on disk and in the catalog. A file that is set aside is gone. Raises BeingErased, or QueueFull
    for a series that is new: one that has begun to come comes to its end.
    """
    groups, set_aside = _group(files, stores)
    if not all(stores.catalog.has(series.series_uid) for series in groups):
        require_turn(sender, stores, settings)
    if arrivals := [_archive(series, stores, sender) for series in groups]:
        quiet = Quiet(settings.series_quiet_seconds, settings.series_limit_seconds)
        with _abandoning(arrivals, stores):
            stores.catalog.collect(arrivals, encoder_id, quiet)
    return Intake(groups, set_aside)


def adopt(files: Iterable[StagedFile], series_uid: str, encoder_id: str, stores: Stores, sender: str = "") -> Intake:
    """Archive the axial CT slices of one series, which is whole. A file of another series is set aside.

    Its embedding is asked for in the catalog; who adopts sends the message. Raises BeingErased.
    """
    groups, set_aside = _group(files, stores, series_uid)
    if arrivals := [_archive(series, stores, sender) for series in groups]:
        with _abandoning(arrivals, stores):
            stores.catalog.collect(arrivals, encoder_id, None)
    return Intake(groups, set_aside)


def require_turn(sender: str, stores: Stores, settings: Settings) -> None:
    """Raises QueueFull where as many series of the sender wait for a worker as may."""
    waiting = stores.catalog.backlog(sender, settings.max_waiting)
    if waiting >= settings.max_waiting:
        refuse(waiting, settings.max_waiting, "series of this sender")


def _screened(path: Path, pseudonyms: Pseudonyms | None) -> FileDataset | SetAside:
    """The header of a usable file, which with pseudonyms is one that names nobody from here on."""
    header = screened_header(path)
    if pseudonyms is None:
        return header
    if isinstance(header, SetAside):
        return replace(header, series_uid=pseudonyms.uid(header.series_uid) if header.series_uid else "")
    aside = pseudonyms.rewrite(path)
    if aside is None:
        return screened_header(path)
    return replace(aside, series_uid=pseudonyms.uid(str(header.SeriesInstanceUID)))


def _patient_id(header: FileDataset) -> str:
    # Without an id nobody can say that two studies are of one patient.
    return str(header.get("PatientID") or "").strip() or f"unknown-{header.StudyInstanceUID}"


def _all_files(
    files: Iterable[StagedFile], folder: Path, settings: Settings, patient_id: str
) -> Iterator[StagedFile | NamedSetAside]:
    room = Room.of(settings)
    for number, staged in enumerate(files):
        inside = folder / f"unpacked-{number}"
        inside.mkdir()
        for file in unpacked(staged, inside, room, settings.max_upload_files, settings.max_expansion):
            if is_nifti(file.path):
                yield from _nifti(file, inside, room, settings, patient_id)
            else:
                yield file


def _nifti(
    file: StagedFile, folder: Path, room: Room, settings: Settings, patient_id: str
) -> Iterator[StagedFile | NamedSetAside]:
    """The volume's slices, under the volume's name. Whatever it takes of the disk goes when the upload ends."""
    slices = folder / f"nifti-{file.path.name}"
    slices.mkdir()
    most, fits = most_expanded(file.path, settings.max_expansion), room.left()
    try:
        for path in nifti_slices(file.path, slices, patient_id, min(most, fits)):
            room.require()
            yield StagedFile(path, file.name)
    except UnusableNifti as error:
        if isinstance(error, InflatesTooFar) and fits < most:
            room.require(most)
        yield NamedSetAside(file.name, error.reason, str(error))
    file.path.unlink()


def _group(
    files: Iterable[StagedFile | NamedSetAside], stores: Stores, only: str | None = None
) -> tuple[list[SeriesIntake], list[NamedSetAside]]:
    """Usable slices by series; a file set aside goes with its series where that has usable slices."""
    groups: dict[str, SeriesIntake] = {}
    aside: dict[str, list[NamedSetAside]] = defaultdict(list)
    for file in files:
        if isinstance(file, NamedSetAside):
            aside[""].append(file)
            continue
        header = _screened(file.path, stores.pseudonyms)
        if isinstance(header, SetAside):
            aside[header.series_uid].append(NamedSetAside(file.name, header.reason, header.detail))
            file.path.unlink()
            continue
        uid, study_uid = str(header.SeriesInstanceUID), str(header.StudyInstanceUID)
        if only not in (None, uid):
            detail = "the file is another series' than it was when it was scanned"
            aside[""].append(NamedSetAside(file.name, Reason.CHANGED, detail))
            file.path.unlink()
            continue
        patient_id = _patient_id(header)
        if uid not in groups:
            if stores.erasures.being_erased(uid):
                raise BeingErased(f"series {uid} is being erased; send it again later")
            owner = stores.catalog.owner(uid) or (patient_id, study_uid)
            groups[uid] = SeriesIntake(uid, study_uid=owner[1], patient_id=owner[0])
        series = groups[uid]
        if (patient_id, study_uid) != (series.patient_id, series.study_uid):
            detail = "this SeriesInstanceUID belongs to another patient or study"
            series.set_aside.append(NamedSetAside(file.name, Reason.SERIES_OF_ANOTHER_PATIENT, detail))
            file.path.unlink()
        else:
            series.staged.append((str(header.SOPInstanceUID), file.path))
    usable = [series for series in groups.values() if series.staged]
    for series in usable:
        series.set_aside += aside.pop(series.series_uid, [])
    strays = [each for uid, series in groups.items() if not series.staged for each in series.set_aside]
    return usable, strays + [each for group in aside.values() for each in group]


def _archive(series: SeriesIntake, stores: Stores, sender: str) -> Arrival:
    uid, about = series.series_uid, about_series(series.staged[0][1])
    sop_uids, sums = [sop_uid for sop_uid, _ in series.staged], dict[str, bytes]()
    known = stores.checksums.of(uid, sop_uids)
    found = [sha256_of(path) for _, path in series.staged]
    for (sop_uid, path), sha256 in zip(series.staged, found, strict=True):
        if known.get(sop_uid) == sha256:
            stores.archive.mend(uid, sop_uid, path, sha256)
    for sop_uid, sha256, added in zip(sop_uids, found, stores.archive.add(uid, series.staged), strict=True):
        if added:
            series.received += 1
            sums[sop_uid] = sha256
        else:
            series.duplicates += 1
            if sop_uid not in known and sop_uid not in sums:  # whoever brought it died before it said so
                with suppress(FileNotFoundError):  # erased meanwhile, which the catalog finds out
                    sums[sop_uid] = stores.archive.sha256(uid, sop_uid)
    return Arrival(uid, series.study_uid, series.patient_id, about, sop_uids, sums, sender)


@contextmanager
def _abandoning(arrivals: list[Arrival], stores: Stores) -> Iterator[None]:
    """Where an erasure came between the archive and the catalog, nothing of what was sent stays in the archive."""
    try:
        yield
    except BeingErased:
        for arrival in arrivals:
            stores.catalog.abandon(arrival.series_uid)
        raise
