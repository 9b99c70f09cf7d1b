"""The C-STORE SCP (PS3.4 B): what a PACS sends is on disk and in the catalog before success goes back."""

import errno
import logging
import re
import signal
import socket
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage
from pynetdicom import AE, _config, evt
from pynetdicom.association import Association
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from sqlalchemy.exc import DBAPIError

from models.ct.decode import DECODERS
from models.ct.header import NotDicom, read_header
from models.ct.reasons import Reason
from models.specs import MissingWeights, WrongWeights
from service import logs
from service.disk import Room
from service.errors import BeingErased, NoRoom, QueueFull
from service.intake import NamedSetAside, collect
from service.settings import Settings, parse_titles
from service.storage.chain import Event, Outcome
from service.storage.stores import Stores, open_stores
from service.terminal import fail, read_settings
from service.uploads import StagedFile

STORAGE = [CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage]
MAX_PDU = 128 * 1024  # bytes; the most that DCMTK sends
LONGEST_PDU = 8 * MAX_PDU  # bytes of any PDU, whatever its header says: a request with many contexts is long
FINISH_SECONDS = 10.0  # that instances on their way have at the end
LAST_ANSWER_SECONDS = 0.3
NOTED_SECONDS = 60.0  # between two entries of the audit that say the same
SERIES_IN_LOG = 20

# Statuses (PS3.4 B.2.3, PS3.7 C.4.2).
SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
SOP_CLASS_NOT_SUPPORTED = 0x0122
OUT_OF_RESOURCES = 0xA700
DOES_NOT_MATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000

OTHERWISE = "the data set has another SOPInstanceUID than the request"

# What is told of a file that is set aside; of the other reasons, that it cannot be understood.
STATUSES = {
    Reason.MULTIFRAME: SOP_CLASS_NOT_SUPPORTED,
    Reason.UNSUPPORTED_TRANSFER_SYNTAX: SOP_CLASS_NOT_SUPPORTED,
    Reason.NOT_CT: DOES_NOT_MATCH,
    Reason.LOCALIZER: DOES_NOT_MATCH,
    Reason.SECONDARY_CAPTURE: DOES_NOT_MATCH,
    Reason.NOT_GRAYSCALE: DOES_NOT_MATCH,
    Reason.NOT_AXIAL: DOES_NOT_MATCH,
}

log = logging.getLogger(__name__)


class CannotReceive(Exception):
    """Why the receiver does not start."""


@dataclass
class Tally:
    """What came over one association."""

    kept: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    series: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        refused = ", ".join(f"{count} refused ({why})" for why, count in sorted(self.refused.items()))
        named = [*sorted(self.series)[:SERIES_IN_LOG], *(["..."] if len(self.series) > SERIES_IN_LOG else [])]
        counts = f"{self.kept} kept, {self.duplicates} were here already" + (f", {refused}" if refused else "")
        return f"{counts}; series {', '.join(named) or 'none'}"


class Receiver:
    """Listens on the address of the settings. One in a process, for pynetdicom's way of receiving is the process's."""

    def __init__(self, settings: Settings, stores: Stores) -> None:
        self._settings = settings
        self._stores = stores
        self._tallies: dict[Association, Tally] = {}
        self._busy: set[Association] = set()
        self._noted: dict[tuple[str | int, ...], float] = {}  # what the audit has, and since when
        self._server: Any = None

    def start(self) -> None:
        """Raises CannotReceive, MissingWeights or WrongWeights."""
        settings = self._settings
        settings.own_encoder_id()
        entity = AE(ae_title=settings.receive_aet)
        entity.require_called_aet = True
        entity.require_calling_aet = parse_titles(settings.calling_aets)
        entity.maximum_associations = settings.receive_associations
        entity.maximum_pdu_size = MAX_PDU
        entity.acse_timeout = entity.dimse_timeout = entity.network_timeout = settings.receive_silent_seconds
        entity.add_supported_context(Verification)
        for sop_class in STORAGE:
            entity.add_supported_context(sop_class, list(DECODERS))
        handlers = [
            (evt.EVT_CONN_OPEN, self._opened),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_REJECTED, self._rejected),
            (evt.EVT_CONN_CLOSE, self._closed),
        ]
        folder = self._folder()
        left = list(folder.iterdir())
        try:
            address = (settings.receive_host, settings.receive_port or 0)
            self._server = entity.start_server(address, block=False, evt_handlers=handlers)  # type: ignore[arg-type]
        except OSError as error:
            place = f"{settings.receive_host}:{settings.receive_port}"
            raise CannotReceive(f"cannot listen on {place}: {error.strerror}") from error
        for path in left:  # the port is ours, so whoever left them is dead
            path.unlink(missing_ok=True)
        log.info("receiving as %s on %s:%s", settings.receive_aet, settings.receive_host, settings.receive_port)

    def stop(self) -> None:
        """Take no more; what is on its way is finished, then its association is aborted."""
        self._server.shutdown()
        end, told = time.monotonic() + FINISH_SECONDS, set[Association]()
        while (left := set(self._server.active_associations) - told) and time.monotonic() < end:
            for association in left:
                if not self._at_work(association):
                    association.abort(block=False)
                    told.add(association)
            time.sleep(0.002)
        time.sleep(LAST_ANSWER_SECONDS)
        tempfile.tempdir = None  # the system's again

    def _folder(self) -> Path:
        """Where instances are written as they come, below the data directory: from there the archive links them.

        Named by the address, which one process at a time can listen on.
        """
        name = f"{socket.gethostname()}-{self._settings.receive_host}-{self._settings.receive_port}"
        folder = self._settings.data_dir / "receiving" / name.replace(":", "_")
        folder.mkdir(parents=True, exist_ok=True)
        _config.STORE_RECV_CHUNKED_DATASET = True  # straight to a file, never decoded
        tempfile.tempdir = str(folder.resolve())  # where pynetdicom makes it
        return folder

    def _opened(self, event: evt.Event) -> None:
        """pynetdicom would wait for ever in the middle of a PDU, and believes any length of one."""
        connection = event.assoc.dul.socket
        assert connection is not None and connection.socket is not None
        connection.socket.settimeout(self._settings.receive_silent_seconds)
        receive = connection.recv

        def bounded(nr_bytes: int) -> bytearray:
            if nr_bytes > LONGEST_PDU:
                raise OSError(errno.EMSGSIZE, "PDU too long")
            return receive(nr_bytes)

        connection.recv = bounded  # type: ignore[method-assign]

    def _store(self, event: evt.Event) -> Dataset:
        """Answer one C-STORE request; whatever goes wrong becomes a status."""
        self._busy.add(event.assoc)
        tally = self._tallies.setdefault(event.assoc, Tally())
        try:
            status, comment = self._keep(event, tally)
            if status != SUCCESS:
                self._note(event, status)
        except (OSError, DBAPIError) as error:  # a disk or catalog that is away; the sender may try again
            log.error("not kept: %s", type(error).__name__)
            status, comment = OUT_OF_RESOURCES, "the store is away, send it again later"
        except Exception as error:  # a message may hold what the file held
            log.error("not kept: %s", type(error).__name__)
            status, comment = PROCESSING_FAILURE, f"{type(error).__name__} while storing"
        finally:
            self._busy.discard(event.assoc)
        if status != SUCCESS:
            tally.refused[comment.partition(":")[0]] += 1
        return _answer(status, comment)

    def _keep(self, event: evt.Event, tally: Tally) -> tuple[int, str]:
        settings, path = self._settings, event.dataset_path
        try:
            Room.of(settings).require()
        except NoRoom:
            return OUT_OF_RESOURCES, "the disk is nearly full"
        if _named_otherwise(path, str(event.request.AffectedSOPInstanceUID)):  # type: ignore[union-attr]
            return DOES_NOT_MATCH, OTHERWISE
        sender = f"aet:{event.assoc.requestor.ae_title}"
        try:
            intake = collect([StagedFile(path, "")], settings.own_encoder_id(), self._stores, settings, sender)
        except BeingErased:
            return OUT_OF_RESOURCES, "the series is being erased, send it again later"
        except QueueFull:
            return OUT_OF_RESOURCES, "as many series wait as may, send it again later"
        for aside in [*intake.set_aside, *(each for series in intake.series for each in series.set_aside)]:
            return _refusal(aside)
        for series in intake.series:
            tally.kept += series.received
            tally.duplicates += series.duplicates
            tally.series.add(series.series_uid)
        self._note(event, SUCCESS, *(series.series_uid for series in intake.series))
        return SUCCESS, ""

    def _note(self, event: evt.Event, status: int, *series_uids: str) -> None:
        """In the audit, once a minute for each sender, series and status: a series is hundreds of instances."""
        title, moment = str(event.assoc.requestor.ae_title), time.monotonic()
        what: tuple[str | int, ...] = (title, status, *series_uids)
        if moment - self._noted.get(what, -NOTED_SECONDS) < NOTED_SECONDS:
            return
        outcome: Outcome = "done" if status == SUCCESS else "refused"
        self._stores.audit.append([Event(f"aet:{title}", "c-store", outcome, status, series_uids=series_uids)])
        recent = {each: at for each, at in [*self._noted.items()] if moment - at < NOTED_SECONDS}
        self._noted = recent | {what: moment}

    def _rejected(self, event: evt.Event) -> None:
        called = event.assoc.requestor.primitive
        log.warning(
            "refused an association: %r called %r",
            event.assoc.requestor.ae_title,
            called.called_ae_title if called else "",
        )

    def _closed(self, event: evt.Event) -> None:
        """Remove what came of an instance in whose middle the sender broke off."""
        message = event.assoc.dimse.message
        if message is not None and message._data_set_path is not None:
            Path(str(message._data_set_path)).unlink(missing_ok=True)
        if tally := self._tallies.pop(event.assoc, None):
            log.info("%r: %s", event.assoc.requestor.ae_title, tally)

    def _at_work(self, association: Association) -> bool:
        dimse = association.dimse
        return association in self._busy or dimse.message is not None or not dimse.msg_queue.empty()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="keyslice: %(message)s")
    logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)  # it would quote data sets
    _config.LOG_HANDLER_LEVEL = "none"
    settings, stop = read_settings(), threading.Event()
    logs.set_up(settings)
    if settings.receive_port is None:
        fail("KEYSLICE_RECEIVE_PORT is not set, expected the port to listen on")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stores = open_stores(settings)
    receiver = Receiver(settings, stores)
    try:
        receiver.start()
    except (CannotReceive, MissingWeights, WrongWeights) as error:
        log.error("%s", error)
        raise SystemExit(1) from None
    stop.wait()
    receiver.stop()
    stores.close()


def _named_otherwise(path: Path, sop_uid: str) -> bool:
    """Whether success for this UID would be said of another instance. A file that cannot be read is screened later."""
    try:
        return str(read_header(path).get("SOPInstanceUID", sop_uid)) != sop_uid
    except NotDicom:
        return False


def _refusal(aside: NamedSetAside) -> tuple[int, str]:
    return STATUSES.get(aside.reason, CANNOT_UNDERSTAND), f"{aside.reason}: {aside.detail}"


def _answer(status: int, comment: str) -> Dataset:
    answer = Dataset()
    answer.Status = status
    if comment:
        answer.ErrorComment = re.sub(r"[^ -\[\]-~]", "?", comment)[:64]  # LO (PS3.5 6.2)
    return answer


if __name__ == "__main__":
    main()
