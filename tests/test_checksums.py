"""What the archive and the bags hold is what was put there: recorded on arrival, and compared when it is read."""

import hashlib
import json

import httpx
import numpy as np
import pytest
from archived import archived, archived_file
from buckets import overwrite
from posting import slice_files
from searching import ENCODER, Made, embed_made, random_bag
from starlette.testclient import TestClient

from models.ct.phantom import Identity
from service.app import create_app
from service.errors import Damaged
from service.indexing import index_bags, keep_index
from service.intake import take_in
from service.settings import Settings
from service.storage.bags import Bags
from service.storage.inspection import LOST_BAG
from service.storage.keys import EmbeddingKey
from service.storage.staging import staging
from service.storage.stores import open_stores
from service.uploads import StagedFile
from workers import pipeline

SENT = Identity("SUMS")
KEY = EmbeddingKey("1.2.3", ENCODER)


@pytest.fixture
def settings(tmp_path):
    return Settings(data_dir=tmp_path / "data", verify_reads=True)


@pytest.fixture
def stores(settings):
    opened = open_stores(settings)
    yield opened
    opened.close()


def post(stores, settings, count=3):
    """The files' SHA-256 by what they are called in the archive, as nobody but the sender knows them."""
    files = slice_files(SENT, count=count)
    with staging(settings.staging_dir) as folder:
        staged = [StagedFile(folder / name, name) for name, _ in files]
        for each, (_, content) in zip(staged, files, strict=True):
            each.path.write_bytes(content)
        taken = take_in(staged, folder, ENCODER, stores, settings)
    return taken, {hashlib.sha256(content).digest() for _, content in files}


def spoil(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")


def test_the_checksum_of_every_file_is_recorded_as_it_arrives(stores, settings):
    _, sent = post(stores, settings)

    sums = stores.checksums.of(SENT.series_uid)

    assert set(sums.values()) == sent
    assert sums.keys() == {path.stem for path in archived(stores, SENT.series_uid)}


def test_a_file_whose_bringer_died_before_the_catalog_is_summed_when_it_is_sent_again(stores, settings):
    for name, content in slice_files(SENT, count=1):
        (settings.data_dir / name).write_bytes(content)
        uid = f"{SENT.series_uid}.1"
        stores.archive.add(SENT.series_uid, [(uid, settings.data_dir / name)])
    left = archived_file(stores, SENT.series_uid, uid).read_bytes()

    post(stores, settings, count=2)
    post(stores, settings, count=3)

    files = {path.stem: hashlib.sha256(path.read_bytes()).digest() for path in archived(stores, SENT.series_uid)}
    assert hashlib.sha256(left).digest() in files.values()
    assert stores.checksums.of(SENT.series_uid).items() <= files.items()
    assert len(stores.checksums.of(SENT.series_uid)) == 3


def test_a_damaged_file_is_mended_by_sending_it_again_and_another_file_changes_nothing(stores, settings):
    post(stores, settings)
    first, second, _ = archived(stores, SENT.series_uid)
    whole = first.read_bytes()
    spoil(first)

    taken, _ = post(stores, settings)

    assert first.read_bytes() == whole
    assert [(each.received, each.duplicates) for each in taken.series] == [(0, 3)]
    assert not [path for path in first.parent.iterdir() if path.name.startswith(".")]
    with stores.archive.reading(SENT.series_uid) as paths:
        assert paths[:2] == [first, second]


def test_a_damaged_file_is_refused_where_reads_are_verified(stores, settings):
    post(stores, settings)
    first, *_ = archived(stores, SENT.series_uid)
    spoil(first)

    refusal = pytest.raises(Damaged, match="1 of 3 files are not what arrived")
    with refusal as refused, stores.archive.reading(SENT.series_uid):
        pass
    assert refused.value.found["sop_uids"] == [first.stem]
    assert SENT.series_uid not in str(refused.value)

    plain = open_stores(settings.model_copy(update={"verify_reads": False}))
    with plain.archive.reading(SENT.series_uid) as paths:
        assert len(paths) == 3
    plain.close()


@pytest.mark.parametrize("path", ["/dicom-web/studies/{study}", "/dicom-web/studies/{study}/series/{series}/metadata"])
def test_a_read_of_a_damaged_file_is_answered_with_a_problem(stores, settings, path):
    post(stores, settings)
    spoil(archived(stores, SENT.series_uid)[0])

    with TestClient(create_app(settings)) as http:
        answer = http.get(path.format(study=SENT.study_uid, series=SENT.series_uid))

    assert answer.status_code == httpx.codes.CONFLICT
    assert answer.json()["type"] == "urn:keyslice:damaged"
    assert answer.json()["series_uid"] == SENT.series_uid


def test_a_damaged_file_fails_its_embedding_and_says_why(stores, settings):
    post(stores, settings)
    spoil(archived(stores, SENT.series_uid)[0])

    class Worker:
        holder = "worker"

        def line(self, _):
            return None

    worker = Worker()
    worker.stores, worker.settings = stores, settings

    assert not pipeline.embed_series(SENT.series_uid, ENCODER, worker)

    row = stores.catalog.series(SENT.series_uid)
    assert (row.state, row.error) == ("failed", "1 of 3 files are not what arrived (SHA-256); send the series again")


BAG = f"{ENCODER}/1.2.3/c0.zarr"
CHUNK, METADATA = f"{BAG}/c/0/0/0", f"{BAG}/zarr.json"


def test_a_bag_says_its_own_checksums(place):
    receipt = {"windows": ["lung"], "z_mm": [0.1, 1e-7], "rescale": [(1.0, None)], "é": "ü"}
    Bags(place).put(KEY, "c0", random_bag(0), receipt)

    said = json.loads(place.read(METADATA))["attributes"]

    plain = json.dumps(said["receipt"], sort_keys=True, separators=(",", ":"))
    assert said["sha256"] == {
        "embeddings": hashlib.sha256(place.read(CHUNK)).hexdigest(),
        "receipt": hashlib.sha256(plain.encode()).hexdigest(),
    }
    assert Bags(place).damage(KEY, "c0") is None


HARMS = [
    ("embeddings is another", lambda place: overwrite(place, CHUNK, place.read(CHUNK)[:-1] + b"\x55")),
    ("embeddings is another", lambda place: place.remove(CHUNK)),
    ("receipt is another", lambda place: overwrite(place, METADATA, place.read(METADATA).replace(b"domen", b"domem"))),
    ("does not read", lambda place: overwrite(place, METADATA, b"{")),
]


@pytest.mark.parametrize(("said", "harm"), HARMS)
def test_a_damaged_bag_is_told_refused_and_replaced_by_the_next_that_is_written(place, said, harm):
    bags, bag, receipt = Bags(place, verify=True), random_bag(0), {"windows": ["abdomen"]}
    bags.put(KEY, "c0", bag, receipt)
    harm(place)

    assert said in bags.damage(KEY, "c0")
    for read in (bags.get, bags.receipt, lambda *which: bags.get_slice(*which, 0)):
        with pytest.raises(Damaged, match="not what was written"):
            read(KEY, "c0")
    bags.put(KEY, "c0", bag, receipt)

    assert np.array_equal(bags.get(KEY, "c0"), bag)
    assert place.names(f"{ENCODER}/1.2.3") == ["c0.zarr"]


def test_a_bag_of_zeros_which_zarr_writes_no_chunk_of_is_sound(place):
    bags = Bags(place, verify=True)
    bags.put(KEY, "c0", np.zeros((3, 2, 4), np.float16), {})

    assert bags.damage(KEY, "c0") is None
    assert not bags.get(KEY, "c0").any()


def test_a_bag_of_before_there_were_checksums_reads_as_it_did(place):
    bags, bag = Bags(place, verify=True), random_bag(0)
    bags.put(KEY, "c0", bag, {})
    said = json.loads(place.read(METADATA))
    del said["attributes"]["sha256"]
    overwrite(place, METADATA, json.dumps(said).encode())

    assert bags.damage(KEY, "c0") is None
    assert np.array_equal(bags.get(KEY, "c0"), bag)


@pytest.mark.parametrize("harm", ["damaged", "gone"])
def test_a_lost_bag_fails_its_embedding_and_holds_up_no_other(stores, settings, harm):
    lost, other = EmbeddingKey("1.2.1", ENCODER), EmbeddingKey("1.2.2", ENCODER)
    for number, key in enumerate((lost, other)):
        embed_made(stores, Made(key.series_uid, random_bag(number)))
    content = stores.catalog.embedding(*vars(lost).values()).content
    path = settings.data_dir / "bags" / ENCODER / lost.series_uid / f"{content}.zarr"
    if harm == "damaged":
        spoil(path / "c" / "0" / "0" / "0")
    else:
        path.rename(path.with_name("elsewhere"))

    index_bags(stores, settings, "worker")
    keep_index(stores, settings, "worker")

    row = stores.catalog.series(lost.series_uid)
    assert (row.state, row.error) == ("failed", LOST_BAG)
    assert stores.catalog.series(other.series_uid).state == "indexed"
