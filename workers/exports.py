"""Exports: scanned, then taken in series by series, each embedded before it counts as done."""

import logging
import os
import shutil
import socket
import threading
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sqlalchemy.exc import OperationalError, SQLAlchemyError

from service.archives import Kind, kind_of
from service.disk import Room, is_full
from service.errors import BadArchive, BadExport, BeingErased, NoRoom, SourceAway, SourceFailed
from service.exports import path_of
from service.intake import adopt
from service.queue import Queue
from service.remotes import Remote, S3Prefix, is_remote, parse_remote
from service.schemas.pulls import PacsQuery
from service.settings import Settings
from service.storage.chain import Event
from service.storage.contents import NotHeld
from service.storage.files import ExportFile
from service.storage.stores import Stores
from service.storage.tables import now
from service.uploads import StagedFile
from workers.archives import Tar, Zip
from workers.scanning import scan
from workers.sources import NotFetched, Source, Tree, in_threads

POLL_SECONDS = 0.25  # between two looks at the series that are being embedded
ROOM_SECONDS = 2.0  # between two looks at a disk that is too full
PAUSED = "waiting for room on the disk"

log = logging.getLogger(__name__)


def see_to_export(export_id: str, stores: Stores, settings: Settings, stopping: threading.Event) -> None:
    """run_export() with a queue of its own: Celery's connections are one thread's."""
    queue = Queue(settings, stores)
    try:
        run_export(export_id, stores, settings, queue, stopping)
    finally:
        queue.close()


def run_export(
    export_id: str, stores: Stores, settings: Settings, queue: Queue, stopping: threading.Event | None = None
) -> None:
    """Bring an export to its end, from wherever it is. Twice changes nothing; `stopping` hands it back."""
    exports, holder = stores.exports, f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    if stopping and stopping.is_set():
        return
    if not exports.claim(export_id, holder, settings.stale_seconds, settings.max_attempts):
        return
    try:
        with _kept(export_id, holder, stores, settings, stopping) as over, _folder(export_id, settings) as folder:
            _Run(export_id, holder, stores, settings, queue, folder, over).run()
    except NotHeld:  # cancelled, taken over, or the worker ends
        exports.release(export_id, holder)
    except SourceAway as error:
        log.warning("export %s: %s, to be tried again", export_id, error)
        exports.release(export_id, holder, str(error))
    except (BadArchive, BadExport, NoRoom, SourceFailed) as error:
        exports.fail(export_id, holder, str(error))
    except (OSError, OperationalError, BrokenExecutor) as error:
        log.warning("export %s: %s, to be tried again", export_id, type(error).__name__)
        exports.release(export_id, holder, type(error).__name__)
    except Exception as error:  # nothing may leave an export running for ever
        log.error("export %s: %s", export_id, type(error).__name__)
        exports.fail(export_id, holder, f"{type(error).__name__} while it was embedded")


def open_source(uri: str, options: Mapping[str, Any], folder: Path, settings: Settings) -> Source:
    """What the URI names; what must be unpacked goes into `folder`. Raises BadExport, BadArchive or NoRoom."""
    if is_remote(uri):
        return _open_remote(parse_remote(uri), options, settings)
    path = Path(os.fsdecode(path_of(uri)))
    if path.resolve() != path:
        raise BadExport("a symbolic link has taken the place of a part of the path")
    if path.is_dir():
        return Tree(os.fsencode(path))
    kind = kind_of(path) if path.is_file() else None
    if kind is Kind.ZIP:
        return Zip(path, settings.max_expansion)
    if kind is Kind.TAR:
        return Tar(path, folder, settings.max_expansion, Room.of(settings))
    raise BadExport("there is no directory or archive at the path any more")


def _open_remote(place: Remote, options: Mapping[str, Any], settings: Settings) -> Source:
    """Its library is imported here: a worker that exports directories needs neither."""
    if isinstance(place, S3Prefix):
        from workers.bucket import Bucket

        return Bucket(place, settings.fetch_at_once)
    from workers.pacs import Pull, open_pacs

    queries = [PacsQuery.model_validate(each) for each in options["queries"]]
    return Pull(open_pacs(place, settings), queries, settings.fetch_at_once)


class _Run:
    """One attempt at an export."""

    def __init__(
        self,
        export_id: str,
        holder: str,
        stores: Stores,
        settings: Settings,
        queue: Queue,
        folder: Path,
        over: threading.Event,
    ) -> None:
        self._export_id, self._holder, self._folder, self._over = export_id, holder, folder, over
        self._stores, self._settings, self._queue = stores, settings, queue
        self._export = stores.exports.get(export_id)
        self._room, self._paused = Room.of(settings), self._export.error is not None
        self._source = open_source(self._export.uri, self._export.options, folder, settings)

    def run(self) -> None:
        dry_run = self._export.options["dry_run"]
        if self._export.scanned_at is None:
            self._scan()
            self._stores.contents.scanned(self._export_id, self._holder, dry_run=dry_run)
        if not dry_run:
            self._embed()
        self._stores.exports.finish(self._export_id, self._holder)

    def _scan(self) -> None:
        contents = self._stores.contents
        unrecorded = partial(contents.unrecorded, self._export_id)
        for files in scan(self._source, self._settings.scan_processes, unrecorded):
            self._check()
            contents.record(self._export_id, self._holder, [self._called_here(file) for file in files])

    def _called_here(self, file: ExportFile) -> ExportFile:
        """Its series under the name that it has once it is here."""
        pseudonyms = self._stores.pseudonyms
        return file._replace(series_uid=pseudonyms.uid(file.series_uid)) if pseudonyms and file.series_uid else file

    def _embed(self) -> None:
        contents = self._stores.contents
        while True:
            self._check()
            on_their_way = contents.settle(self._export_id, self._holder)
            following = contents.next_series(self._export_id)
            if following and on_their_way < self._settings.export_series_ahead:
                self._hand_over_or_wait(following)
            elif following or on_their_way:
                self._over.wait(POLL_SECONDS)
            else:
                return

    def _hand_over_or_wait(self, series_uid: str) -> None:
        """The next series; where there is no room for it the export says so, and waits a little."""
        try:
            self._hand_over(series_uid)
        except (NoRoom, OSError) as error:
            if isinstance(error, OSError) and not is_full(error):
                raise
            why = str(error) if isinstance(error, NoRoom) else "the disk is full"
            self._stores.exports.explain(self._export_id, self._holder, f"{PAUSED}: {why}")
            self._paused = True
            self._over.wait(ROOM_SECONDS)
            return
        if self._paused:
            self._stores.exports.explain(self._export_id, self._holder, None)
            self._paused = False

    def _hand_over(self, series_uid: str) -> None:
        """Copy a series' files, archive the usable ones, ask for the embedding; the note of it comes last."""
        contents, started_at = self._stores.contents, now()
        files = {file.key().hex(): file for file in contents.usable_files(self._export_id, series_uid)}
        aside: list[ExportFile] = []
        self._room.require(sum(file.size for file in files.values()))
        with TemporaryDirectory(dir=self._folder, ignore_cleanup_errors=True) as folder:
            staged = self._copied(files, Path(folder), aside)
            try:
                taken = adopt(staged, series_uid, self._export.encoder_id, self._stores, f"export:{self._export_id}")
            except BeingErased as error:
                contents.handed_over(self._export_id, self._holder, series_uid, started_at, [], "failed", str(error))
                return
        refused = taken.set_aside + [each for series in taken.series for each in series.set_aside]
        aside += [files[each.file].aside(each.reason, each.detail) for each in refused]
        state = "embedding" if taken.series else "set_aside"
        if taken.series:
            self._stores.audit.append([self._taken_in(series_uid)])
            self._queue.embed(self._stores.catalog.complete(series_uid))
        contents.handed_over(self._export_id, self._holder, series_uid, started_at, aside, state)

    def _taken_in(self, series_uid: str) -> Event:
        return Event(f"export:{self._export_id}", "export.series", series_uids=(series_uid,))

    def _copied(self, files: dict[str, ExportFile], folder: Path, aside: list[ExportFile]) -> Iterator[StagedFile]:
        """Each file's copy under its key; what cannot be copied goes to `aside`."""

        def copy(key: str) -> NotFetched | None:
            self._check()
            self._room.require(files[key].size)
            try:
                self._source.fetch(files[key], folder / key)
            except NotFetched as error:
                return error
            return None

        for key, refused in zip(files, in_threads(copy, files, self._source.at_once), strict=True):
            if refused:
                aside.append(files[key].aside(refused.reason, str(refused)))
            else:
                yield StagedFile(folder / key, key)

    def _check(self) -> None:
        if self._over.is_set():
            raise NotHeld


@contextmanager
def _kept(
    export_id: str, holder: str, stores: Stores, settings: Settings, stopping: threading.Event | None
) -> Iterator[threading.Event]:
    """Show every few seconds that the worker lives; the event is set once the export is no longer its own."""
    over, ended = threading.Event(), threading.Event()

    def keep() -> None:
        while not ended.wait(min(1.0, settings.stale_seconds / 4)):
            try:
                if not stores.exports.touch(export_id, holder):
                    over.set()
            except SQLAlchemyError:  # a catalog that is away; whatever writes to it next finds out
                continue
            if stopping and stopping.is_set():
                over.set()

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield over
    finally:
        ended.set()
        keeper.join()


@contextmanager
def _folder(export_id: str, settings: Settings) -> Iterator[Path]:
    """A directory for one attempt; what a killed one left behind is removed."""
    root = settings.staging_dir
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"export-{export_id}-*"):
        shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(dir=root, prefix=f"export-{export_id}-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)
