"""The DICOMweb pull: the instances of a PACS that answer a query (QIDO-RS), as files (WADO-RS)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dicomweb_client.api import DICOMwebClient
from python_multipart.multipart import parse_options_header
from requests.auth import AuthBase, HTTPBasicAuth

from models.ct.reasons import UID, Reason
from service.errors import CredentialsRefused, SourceAway, SourceFailed, SourceNotFound, SourceRefused
from service.remotes import DicomWeb
from service.schemas.pulls import PacsQuery
from service.settings import Settings
from service.storage.files import ExportFile
from service.uploads import save_parts
from workers.one_server import PATIENCE, Bearer, OneServer, Patience, patiently
from workers.sources import of_one_file

PAGE = 200  # results that are asked for at a time; a server may give fewer
CHUNK = 2**20  # bytes
CONNECT_SECONDS = 10.0
DICOM, RELATED = b"application/dicom", b"multipart/related"
# As stored; some servers know no wildcard, and send what they like.
ACCEPT = 'multipart/related; type="application/dicom"; transfer-syntax=*, multipart/related; type="application/dicom"'

# Tags as DICOM JSON spells them (PS3.18 F.2).
STUDY_UID, SERIES_UID, SOP_UID = "0020000D", "0020000E", "00080018"


@dataclass(frozen=True)
class Instance:
    """A SOP instance by the UIDs that lead to it."""

    study_uid: str
    series_uid: str
    sop_uid: str

    def __str__(self) -> str:
        return f"studies/{self.study_uid}/series/{self.series_uid}/instances/{self.sop_uid}"

    @classmethod
    def named(cls, path: str) -> "Instance":
        return cls(*path.split("/")[1::2])


class Pacs:
    """A DICOMweb server. Its calls raise SourceRefused, SourceNotFound, SourceAway, or SourceFailed otherwise."""

    def __init__(
        self, url: str, auth: AuthBase | None = None, *, ca: Path | None, seconds: float, patience: Patience
    ) -> None:
        self._url = url
        self._session = OneServer(url, auth)
        self._session.verify = True if ca is None else str(ca)
        self._timeout = (CONNECT_SECONDS, seconds)
        self._patience = patience
        self._client = DICOMwebClient(url, self._session, permissive_uid=True, timeout=self._timeout)
        self._client.set_http_retry_params(retry=False)  # it ignores Retry-After

    def search(self, query: PacsQuery) -> Iterator[Instance]:
        """The instances of the series that answer the query, asked for page by page.

        Servers need not search series or instances across studies (PS3.18 10.6.1.1), so studies come first.
        """
        modality = {"Modality": query.modality} if query.modality else {}
        for study in self._pages(self._client.search_for_studies, _of_study(query)):
            study_uid = _uid(study, STUDY_UID)
            for series in self._pages(partial(self._client.search_for_series, study_uid), modality):
                series_uid = _uid(series, SERIES_UID)
                for found in self._pages(partial(self._client.search_for_instances, study_uid, series_uid), {}):
                    yield Instance(study_uid, series_uid, _uid(found, SOP_UID))

    def fetch(self, instance: Instance, path: Path) -> None:
        """Write the instance to a file, byte for byte as it comes and never held in memory."""
        patiently(partial(self._retrieve, instance, path), self._patience)

    def close(self) -> None:
        self._session.close()

    def _pages(
        self, search: Callable[..., list[dict[str, Any]]], filters: Mapping[str, str]
    ) -> Iterator[dict[str, Any]]:
        """Results until the server has no more. A short page is not the last: servers have limits of their own."""
        offset, before = 0, None
        while page := patiently(partial(search, search_filters=filters, limit=PAGE, offset=offset), self._patience):
            if page == before:
                raise SourceFailed("the server answers the same page again, expected it to know the parameter offset")
            yield from page
            offset, before = offset + len(page), page

    def _retrieve(self, instance: Instance, path: Path) -> None:
        url = f"{self._url}/{instance}"
        with (
            self._session.get(url, headers={"Accept": ACCEPT}, stream=True, timeout=self._timeout) as answer,
            TemporaryDirectory(dir=path.parent) as folder,
        ):
            answer.raise_for_status()
            kind, options = parse_options_header(answer.headers.get("Content-Type", ""))
            chunks = answer.iter_content(CHUNK)
            if kind == DICOM:  # against the standard, but some servers do
                with path.open("wb") as file:
                    file.writelines(chunks)
            elif kind == RELATED and b"boundary" in options:
                for part in save_parts(chunks, options[b"boundary"], Path(folder), max_files=1):
                    part.path.rename(path)
            else:
                raise SourceFailed("the server answers another media type, expected multipart/related")


def open_pacs(server: DicomWeb, settings: Settings, patience: Patience = PATIENCE) -> Pacs:
    """The server with the credentials of the settings, if they are of this server."""
    auth: AuthBase | None = None
    if settings.dicomweb_server and server.within(DicomWeb(settings.dicomweb_server)):
        if settings.dicomweb_token:
            auth = Bearer(settings.dicomweb_token.get_secret_value())
        elif settings.dicomweb_user and settings.dicomweb_password:
            auth = HTTPBasicAuth(settings.dicomweb_user, settings.dicomweb_password.get_secret_value())
    return Pacs(server.url, auth, ca=settings.dicomweb_ca, seconds=settings.fetch_silent_seconds, patience=patience)


class Pull:
    """Some queries to a PACS as an export's source: their instances are its files, whose series it knows."""

    def __init__(self, pacs: Pacs, queries: Sequence[PacsQuery], at_once: int) -> None:
        self.at_once = at_once
        self._pacs, self._queries = pacs, queries

    def entries(self) -> Iterator[ExportFile]:
        """Every instance. A query that the server does not answer is named by its number among the others."""
        for number, query in enumerate(self._queries, start=1):
            try:
                for each in self._pacs.search(query):
                    yield ExportFile(str(each).encode(), 0, series_uid=each.series_uid)
            except (CredentialsRefused, SourceAway, SourceNotFound, SourceRefused):
                raise
            except SourceFailed as error:
                yield ExportFile(b"query %d" % number, 0).aside(Reason.UNREADABLE_FILE, str(error))

    def executor(self, processes: int) -> Executor:
        return ThreadPoolExecutor(1)

    def identify(self, files: Sequence[ExportFile]) -> list[ExportFile]:
        return list(files)

    def fetch(self, file: ExportFile, target: Path) -> None:
        with of_one_file():
            self._pacs.fetch(Instance.named(file.name.decode()), target)


def _of_study(query: PacsQuery) -> dict[str, str]:
    """Matching keys of the study level (PS3.18 table 10.6.1-5); a range of dates is of PS3.4 C.2.2.2.5.1."""
    dates = f"{query.date_from}-{query.date_to}" if query.date_from or query.date_to else ""
    keys = {
        "PatientID": query.patient_id,
        "StudyInstanceUID": query.study_uid,
        "AccessionNumber": query.accession_number,
        "StudyDate": dates,
        "ModalitiesInStudy": query.modality,
    }
    return {keyword: value for keyword, value in keys.items() if value}


def _value(found: Any, tag: str) -> Any:
    try:
        return found[tag]["Value"][0]
    except (KeyError, IndexError, TypeError):
        return None


def _uid(found: Any, tag: str) -> str:
    """It becomes part of addresses, so nothing else may pass. Raises SourceFailed."""
    uid = str(_value(found, tag))
    if not UID.fullmatch(uid):
        raise SourceFailed("the server lists something without a valid UID")
    return uid
