"""Where a local archive has its files."""

from pathlib import Path

from service.storage.stores import Stores


def archived(stores: Stores, series_uid: str) -> list[Path]:
    return [archived_file(stores, series_uid, sop_uid) for sop_uid in stores.archive.sop_uids(series_uid)]


def archived_file(stores: Stores, series_uid: str, sop_uid: str) -> Path:
    with stores.archive.local(series_uid, [sop_uid]) as (path,):
        return path
