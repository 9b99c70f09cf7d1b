"""The archive in a bucket: instances come once, are read as files for a while, and DICOMweb answers them as sent."""

import hashlib
import json
import threading
from pathlib import Path

import pytest
from buckets import NAME, bucket_below, overwrite
from dicomweb_client.api import DICOMwebClient
from posting import slice_files
from serving import serving
from starlette.testclient import TestClient
from test_object_bucket import keys, no_conditions
from typer.testing import CliRunner

from models.ct.decode import read_hu
from models.ct.phantom import Identity
from service.app import create_app
from service.cli import app
from service.errors import Damaged
from service.intake import take_in
from service.settings import Settings
from service.storage.archive import Archive
from service.storage.folder import Folder
from service.storage.objects import Objects
from service.storage.staging import staging
from service.storage.stores import open_stores
from service.uploads import StagedFile

ENCODER = Settings().own_encoder_id()
SENT = Identity("ARCHIVED")
FILES = dict(slice_files(SENT, count=3))
UID = "1.2.3"


@pytest.fixture(params=["directory", "bucket", "bucket that knows no conditions"])
def place(request, tmp_path, monkeypatch) -> Objects:
    if request.param == "directory":
        return Folder(tmp_path / "archive")
    request.getfixturevalue("s3")
    bucket = bucket_below("keyslice/archive/")
    if "no" in request.param:
        no_conditions(bucket, monkeypatch)
    return bucket


def staged(folder: Path, content: bytes) -> Path:
    path = folder / hashlib.sha256(content).hexdigest()
    path.write_bytes(content)
    return path


def test_an_instance_comes_once(place, tmp_path):
    archive = Archive(place, tmp_path / "staging")

    assert archive.add(UID, [("1", staged(tmp_path, b"first")), ("2", staged(tmp_path, b"second"))]) == [True, True]
    assert archive.add(UID, [("1", staged(tmp_path, b"other")), ("3", staged(tmp_path, b"third"))]) == [False, True]
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    assert archive.sop_uids(UID) == ["1", "2", "3"]
    assert archive.series() == [UID]
    with archive.reading(UID) as paths:
        assert [(path.stem, path.read_bytes()) for path in paths] == [
            ("1", b"first"),
            ("2", b"second"),
            ("3", b"third"),
        ]


def test_its_content_is_the_same_wherever_it_lies(place, tmp_path):
    here, there = Archive(place, tmp_path), Archive(Folder(tmp_path / "there"), tmp_path)
    for sop_uid in ("1.10", "1.2", "1"):
        for archive in (here, there):
            archive.add(UID, [(sop_uid, staged(tmp_path, b"DICM"))])
        assert here.content(UID) == there.content(UID)


def test_what_is_not_there_has_a_path_without_a_file(place, tmp_path):
    archive = Archive(place, tmp_path / "staging")

    with archive.reading(UID, ["1"]) as (path,):
        assert not path.exists()
    with archive.reading(UID) as paths:
        assert paths == []
    with pytest.raises(FileNotFoundError):
        archive.sha256(UID, "1")


def test_copies_go_when_they_were_read_and_when_reading_failed(s3, tmp_path):
    archive = Archive(bucket_below("keyslice/archive/"), tmp_path / "staging")
    archive.add(UID, [("1", staged(tmp_path, b"first"))])

    with archive.reading(UID) as (path,):
        assert path.is_relative_to(tmp_path / "staging")
    with pytest.raises(ZeroDivisionError), archive.reading(UID):
        raise ZeroDivisionError
    assert list((tmp_path / "staging").iterdir()) == []


def test_of_two_senders_at_once_one_is_first(s3, tmp_path):
    archive, start, said = Archive(bucket_below("keyslice/archive/"), tmp_path), threading.Barrier(8), {}

    def send(number: int) -> None:
        path = staged(tmp_path, b"by %d" % number)
        start.wait()
        said[number] = archive.add(UID, [("1", path)])

    threads = [threading.Thread(target=send, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    (first,) = [number for number, added in said.items() if added == [True]]
    assert archive.sha256(UID, "1") == hashlib.sha256(b"by %d" % first).digest()


@pytest.fixture
def settings(s3, tmp_path, monkeypatch) -> Settings:
    monkeypatch.setenv("KEYSLICE_OBJECT_STORE", f"s3://{NAME}/keyslice")
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path / "data"))
    return Settings(broker_url="memory://", sweep_seconds=3600)


@pytest.fixture
def stores(settings):
    opened = open_stores(settings)
    send(opened, settings)
    yield opened
    opened.close()


def send(stores, settings):
    with staging(settings.staging_dir) as folder:
        for name, content in FILES.items():
            (folder / name).write_bytes(content)
        return take_in([StagedFile(folder / name, name) for name in FILES], folder, ENCODER, stores, settings)


def spoil(stores) -> str:
    sop_uid, *_ = stores.archive.sop_uids(SENT.series_uid)
    overwrite(bucket_below("keyslice/archive/"), f"{SENT.series_uid}/{sop_uid}.dcm", b"another")
    return sop_uid


def test_dicomweb_answers_what_was_sent(stores, settings):
    with serving(settings, port=0) as server:
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        web = DICOMwebClient(f"{address}/dicom-web")
        place = SENT.study_uid, SENT.series_uid
        sent = stores.archive.sop_uids(SENT.series_uid)

        retrieved = web.retrieve_series(*place)
        metadata = web.retrieve_series_metadata(*place)
        found = web.search_for_instances(*place, search_filters={"SOPInstanceUID": sent[1]})
        every = web.search_for_instances(*place, fields=["SliceLocation"])
        with stores.archive.reading(SENT.series_uid, sent[:1]) as (path,):
            hu = read_hu(path)
        (frame,) = web.retrieve_instance_frames(*place, sent[0], frame_numbers=[1])
        picture = web.retrieve_instance_rendered(*place, sent[0], media_types=("image/png",))

    assert [str(each.SOPInstanceUID) for each in retrieved] == sent
    assert [each["00080018"]["Value"][0] for each in metadata] == sent
    assert [each["00080018"]["Value"][0] for each in found] == sent[1:2]
    assert [each["00080018"]["Value"][0] for each in every] == sent
    assert len(frame) == hu.size * 2
    assert picture.startswith(b"\x89PNG")
    assert list(settings.staging_dir.glob("upload-*")) == []


def test_what_is_not_what_arrived_is_refused_and_mended_by_sending_it_again(stores, settings):
    spoil(stores)
    verifying = open_stores(settings.model_copy(update={"verify_reads": True}))

    with pytest.raises(Damaged, match="1 of 3 files"), verifying.archive.reading(SENT.series_uid):
        pass
    send(verifying, settings)
    with verifying.archive.reading(SENT.series_uid) as paths:
        assert {path.read_bytes() for path in paths} == set(FILES.values())
    verifying.close()


def differences(*options: str) -> list[tuple[str, str, bool]]:
    answer = CliRunner().invoke(app, ["check", "--json", *options])
    assert answer.exit_code in (0, 3), answer.output
    return [(each["kind"], each["where"], each["mended"]) for each in json.loads(answer.stdout)["differences"]]


def test_a_check_finds_what_is_damaged_lost_and_unknown(stores, settings, s3, monkeypatch):
    monkeypatch.setattr("service.consistency.SETTLED_SECONDS", -1.0)
    assert differences() == []
    damaged = spoil(stores)
    assert differences() == [("file_damaged", f"{SENT.series_uid}/{damaged}", False)]

    s3.delete_object(Bucket=NAME, Key=f"keyslice/archive/{SENT.series_uid}/{damaged}.dcm")
    assert differences("--quick") == [("file_missing", f"{SENT.series_uid}/{damaged}", False)]

    send(stores, settings)
    overwrite(bucket_below("keyslice/archive/"), f"{SENT.series_uid}/9.9.dcm", b"stray")
    overwrite(bucket_below("keyslice/archive/"), "9.8/9.9.dcm", b"stray")
    assert differences("--repair") == [("file_unknown", f"{SENT.series_uid}/9.9", True), ("file_unknown", "9.8", True)]
    assert differences() == []


def test_a_post_while_the_bucket_is_away_is_refused_and_taken_later(stores, settings, s3, monkeypatch):
    later = Identity("LATER")
    files = [("files", (name, content)) for name, content in slice_files(later, count=2)]
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as http:
            refused = http.post("/v1/series", files=files)
            assert http.get(f"/v1/series/{later.series_uid}").status_code == 404
    assert (refused.status_code, refused.json()["type"]) == (503, "urn:keyslice:storage-unreachable")
    assert len(keys(s3)) == len(FILES)

    with TestClient(create_app(settings), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as http:
        assert http.post("/v1/series", files=files).status_code == 202
    assert len(keys(s3)) == len(FILES) + 2
