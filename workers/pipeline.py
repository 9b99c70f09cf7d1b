"""The recipes, top to bottom: embed a series, train a head, check the canary."""

import hashlib
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy.exc import OperationalError

from models.ct.screening import Frames, SetAside
from models.ct.series import CTSeries, arrange
from models.heads.export import to_onnx, to_safetensors
from models.heads.loader import NotABag
from models.heads.options import HeadOptions
from models.heads.protocols import TooFewPatients, planned
from models.heads.train import LabelledBag, TrainedHead
from models.heads.train import train_head as fit
from models.line import Line
from models.load import Encoder, canary
from models.runtimes import CannotRun
from models.specs import LicenceForbids, MissingWeights, WrongWeights
from models.zoo import encoders
from service.errors import Damaged, StorageUnreachable
from service.storage.archive import content_of
from service.storage.keys import EmbeddingKey
from service.storage.tables import HeadRow, now
from workers.head_reports import completed
from workers.resources import Resources

PROGRESS_SECONDS = 1.0  # between two notes of progress, which are also the sign of life

NO_FAULT = (StorageUnreachable, InterruptedError)  # of the work: tried again, however often

Progress = Callable[[int, int], None]  # slices done, of slices known

log = logging.getLogger(__name__)


class NotFinite(Exception):
    """An embedding holds NaN or infinity."""


class NotWanted(Exception):
    """Whoever asked for this work has cancelled it, another worker has taken it over, or its series was erased."""


class NoVolume(Exception):
    """The series' slices do not make the volume that the encoder wants."""


def embed_series(series_uid: str, encoder_id: str, worker: Resources) -> bool:
    """Read, window, encode and store one series; True where that made a new bag. Twice changes nothing."""
    key = EmbeddingKey(series_uid, encoder_id)
    catalog = worker.stores.catalog
    claim = partial(catalog.claim, key, worker.holder, worker.settings.stale_seconds, worker.settings.max_attempts)
    try:
        line = worker.line(encoder_id)  # before the claim: it may take longer than a worker may be silent
    except (MissingWeights, WrongWeights, CannotRun, LicenceForbids) as error:
        if claim():
            catalog.fail(key, "failed", str(error))
        return False
    if not claim():
        return False
    try:
        return _embed(key, line, worker)
    except (NotFinite, Damaged) as error:
        catalog.fail(key, "failed", str(error))
    except NotWanted:
        _let_go(key, worker)
    except (OSError, OperationalError) as error:
        if not catalog.has(series_uid):  # its files went under our hands
            _let_go(key, worker)
            return False
        log.warning("series %s: %s, to be tried again", series_uid, type(error).__name__)
        catalog.release(key, type(error).__name__, counted=not isinstance(error, NO_FAULT))
        raise
    except Exception as error:  # nothing may leave a series embedding for ever
        log.error("series %s: %s", series_uid, type(error).__name__)
        catalog.fail(key, "failed", f"{type(error).__name__} while embedding")
        raise
    return False


def _embed(key: EmbeddingKey, line: Line, worker: Resources) -> bool:
    stores, started, clock = worker.stores, now(), time.perf_counter()
    series_key = stores.catalog.series(key.series_uid).series_key

    def note(done: int, known: int) -> None:
        _go_on(worker)
        if not stores.catalog.progress(key, done, known):
            raise NotWanted

    progress = _throttled(note)
    try:
        with stores.archive.reading(key.series_uid) as files:
            content, received = content_of([path.stem for path in files]), len(files)
            embed = _embedded_volume if line.encoder.spec.volume else _embedded_slices
            series, embeddings = embed(files, line, progress)
    except NoVolume as error:
        stores.catalog.fail(key, "rejected", str(error))
        return False
    verdict = _verdict(series)
    if not series.slices:
        stores.catalog.fail(key, "rejected", f"none of {received} files is a slice that decodes", verdict)
        return False
    with np.errstate(over="ignore"):  # what float16 cannot hold becomes infinity, and is refused
        bag = embeddings.astype(np.float16)  # (slices, windows, dim)
    if bad := int((~np.isfinite(bag)).any(axis=(1, 2)).sum()):
        raise NotFinite(f"{bad} of {len(bag)} instances embed to NaN or infinity")
    times = {"started_at": started.isoformat(), "seconds": round(time.perf_counter() - clock, 3)}
    note(len(bag), len(bag))  # after an erasure no bag is written
    stores.bags.put(key, content, bag, _receipt(series, line.encoder) | times)
    if not stores.catalog.commit(key, content, len(bag), verdict, series.geometry(), series_key):
        raise NotWanted
    stores.bags.keep_only(key, {content, *stores.predictions.contents(key)})
    return True


def _go_on(worker: Resources) -> None:
    """Raises InterruptedError, which hands the work back, where the worker was told to end."""
    if worker.stopping.is_set():
        raise InterruptedError("the worker ends")


def _let_go(key: EmbeddingKey, worker: Resources) -> None:
    """The series was erased while it was embedded: leave nothing of it, and say so to whoever erases it."""
    if not worker.stores.catalog.has(key.series_uid):
        worker.stores.bags.remove(key.series_uid)
    worker.stores.erasures.let_go(key.series_uid, worker.holder)


def train_head(head_id: str, worker: Resources) -> None:
    """Train a head on the bags its labels name, and store it whole."""
    heads = worker.stores.heads
    if worker.stopping.is_set():
        return
    if not heads.claim(head_id, worker.holder, worker.settings.stale_seconds, worker.settings.max_attempts):
        return
    row = heads.get(head_id)

    def note(done: int, known: int) -> None:
        _go_on(worker)
        if not heads.progress(head_id, done, known):
            raise NotWanted

    try:
        spec = encoders(worker.settings.weights_path)[row.encoder_id.partition("@")[0]]
        with worker.random_numbers:
            trained = _fit(row, worker, _throttled(note))
        graph = to_onnx(trained.ensemble, spec.dim)
    except NotWanted:
        return
    except (TooFewPatients, NotABag, Damaged) as error:
        heads.fail(head_id, str(error))
        return
    except (OSError, OperationalError) as error:
        log.warning("head %s: %s, to be tried again", head_id, type(error).__name__)
        heads.release(head_id, type(error).__name__, counted=not isinstance(error, NO_FAULT))
        return
    except Exception as error:  # nothing may leave a head in training for ever
        log.error("head %s: %s", head_id, type(error).__name__)
        heads.fail(head_id, f"{type(error).__name__} while training")
        return
    report = completed(trained.report, row, [window.name for window in spec.windows])
    heads.commit(head_id, to_safetensors(trained.ensemble), graph, report)


def _fit(row: HeadRow, worker: Resources, progress: Callable[[int, int], None]) -> TrainedHead:
    """Read each row's bags as they are now, and train on them; networks of an earlier attempt on the same are kept."""
    table, options = row.targets, HeadOptions(**row.options)
    names = [_bag_names(uids, row.encoder_id, worker) for _, uids, _ in table["rows"]]
    bags = [
        LabelledBag(
            patient,
            tuple(float("nan") if cell is None else float(cell) for cell in target),
            partial(_joined_bags, own, worker),
        )
        for (patient, _, target), own in zip(table["rows"], names, strict=True)
    ]
    splits = planned(table["splits"]) if table.get("splits") else None
    digest = hashlib.sha256(repr(names).encode()).hexdigest()[:16]
    kept = worker.stores.heads.networks(row.head_id, digest)
    return fit(bags, row.labels, options, progress, splits, table.get("split"), kept)


def check_canary(worker: Resources) -> None:
    """Embed a fixed slice and compare it with its first embedding: the whole way still gives what it gave."""
    encoder = worker.line(worker.own_encoder_id()).encoder
    cosine = worker.stores.canaries.record(encoder.id, encoder.encode(canary(encoder.spec)))
    log.info("canary of %s: cosine %.6f", encoder.id, cosine)


def _embedded_slices(files: list[Path], line: Line, progress: Progress) -> tuple[CTSeries, NDArray[np.float32]]:
    """The series, feet to head, and its slices' embeddings, (slices, windows, dim).

    A file of one slice is read once. A multi-frame file answers how many frames it has, and each is then an item.
    """
    said = [(path, *answer) for path, answer in zip(files, line.embed(files, _of(progress, len(files))), strict=True)]
    frames = [(path, k + 1) for path, found, _ in said if isinstance(found, Frames) for k in range(found.count)]
    if frames:
        said = [each for each in said if not isinstance(each[1], Frames)]
        answers = line.embed(frames, _of(progress, len(said) + len(frames), before=len(said)))
        said += [(path, *answer) for (path, _), answer in zip(frames, answers, strict=True)]
    series = arrange((path, found) for path, found, _ in said)
    embeddings = {(path, found.frame): embedding for path, found, embedding in said}
    return series, np.array([embeddings[each.path, each.frame] for each in series.slices])


def _embedded_volume(files: list[Path], line: Line, progress: Progress) -> tuple[CTSeries, NDArray[np.float32]]:
    """The series and its one embedding, (1, 1, dim). Raises NoVolume."""
    ((series, embedding),) = line.embed([files], lambda done: progress(done * len(files), len(files)))
    if isinstance(series, SetAside):
        raise NoVolume(series.detail)
    return series, np.array([embedding])


def _receipt(series: CTSeries, encoder: Encoder) -> dict[str, Any]:
    slices = series.slices
    # A volume has one row in the bag; the slice in its middle stands for it.
    rows = slices[len(slices) // 2 :][:1] if encoder.spec.volume else slices
    return {
        "kind": encoder.spec.kind,
        "encoder_id": encoder.id,
        "encoder_fingerprint": encoder.fingerprint,
        "code_version": version("keyslice"),
        "windows": [window.name for window in encoder.spec.windows],
        "sop_uids": [each.sop_uid for each in rows],
        "frames": [each.frame for each in rows],
        "z_mm": [each.z_mm for each in rows],
        "rescale": sorted({(each.slope, each.intercept) for each in slices}, key=str),
        "decoders": sorted({each.decoder for each in slices}),
        "normal": slices[0].normal,
        "geometry": series.geometry(),
        "findings": [asdict(finding) for finding in series.verdict().findings],
    }


def _verdict(series: CTSeries) -> dict[str, Any]:
    set_aside = [
        {"sop_uid": name.removesuffix(".dcm"), "frame": each.frame, "reason": each.reason, "detail": each.detail}
        for name, each in series.set_aside
    ]
    return {**asdict(series.verdict()), "set_aside": set_aside}


def _bag_names(series_uids: list[str], encoder_id: str, worker: Resources) -> list[tuple[EmbeddingKey, str]]:
    """Asked once, not in every epoch; a bag that is replaced meanwhile ends the training, which is tried again."""
    rows = [worker.stores.catalog.embedding(series_uid, encoder_id) for series_uid in series_uids]
    return [(EmbeddingKey(row.series_uid, encoder_id), row.content or "") for row in rows]


def _joined_bags(names: list[tuple[EmbeddingKey, str]], worker: Resources) -> NDArray[np.float16]:
    """The bags of some series, one after another: (slices, windows, dim)."""
    return np.concatenate([worker.stores.bags.get(key, content) for key, content in names])


def _of(progress: Progress, known: int, before: int = 0) -> Callable[[int], None]:
    return lambda done: progress(before + done, known)


def _throttled(note: Callable[..., None]) -> Callable[..., None]:
    """The same call, but at most once in PROGRESS_SECONDS."""
    last = float("-inf")

    def maybe(*numbers: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            note(*numbers)

    return maybe
