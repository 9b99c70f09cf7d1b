"""The index's tables in a bucket: what is broken, what is only away, and what an erasure leaves of them."""

import time

import pytest
from buckets import NAME
from searching import ENCODER, random_bag

from service.errors import StorageUnreachable
from service.settings import Settings
from service.storage.index import IndexBroken, SliceIndex, SliceRows
from service.storage.keys import EmbeddingKey
from service.storage.stores import tables_of

GONE, STAYS = "1.2.840.999", "1.2.3"


@pytest.fixture
def settings(s3, tmp_path):
    return Settings(data_dir=tmp_path, object_store=f"s3://{NAME}/keyslice")


@pytest.fixture
def index(settings):
    """A table `t` of two series."""
    index = SliceIndex(tables_of(settings))
    for seed, uid in enumerate((GONE, STAYS)):
        bag = random_bag(seed)
        sop_uids = [f"{uid}.{k}" for k in range(len(bag))]
        key = EmbeddingKey(uid, ENCODER)
        index.replace("t", [SliceRows(key, "p", "1.2", sop_uids, [0.0] * len(bag), ["abdomen", "lung"], bag)])
    return index


def objects(s3, part=""):
    return [each["Key"] for each in s3.list_objects_v2(Bucket=NAME).get("Contents", []) if part in each["Key"]]


def content(s3):
    return b"".join(s3.get_object(Bucket=NAME, Key=key)["Body"].read() for key in objects(s3))


def test_a_table_is_named_measured_and_dropped(index, s3, tmp_path):
    assert index.names() == ["t"]
    assert (index.exists("t"), index.exists("u")) == (True, False)
    assert index.size_bytes("t") == len(content(s3)) > 20 * 16
    assert abs(index.age_seconds("t", time.time())) < 60
    assert not list(tmp_path.iterdir())

    index.drop("t")

    assert (index.names(), objects(s3)) == ([], [])


def test_after_an_erasure_no_object_holds_the_series(index, s3):
    assert GONE.encode() in content(s3)

    index.erase("t", [GONE], lambda: None)

    assert GONE.encode() not in content(s3)
    assert index.counts("t") == {STAYS: 10}
    index.erase("t", [STAYS], lambda: None)
    assert objects(s3) == []


@pytest.mark.parametrize("harm", ["gone", "cut off", "overwritten"])
def test_a_table_whose_objects_are_harmed_is_broken(index, settings, s3, harm):
    for key in objects(s3, "/data/"):
        if harm == "gone":
            s3.delete_object(Bucket=NAME, Key=key)
        else:
            s3.put_object(Bucket=NAME, Key=key, Body=b"" if harm == "cut off" else b"x" * 5000)

    with pytest.raises(IndexBroken):
        SliceIndex(tables_of(settings)).rows("t")


@pytest.mark.parametrize("call", [lambda index: index.rows("t"), lambda index: index.exists("t")])
def test_a_table_that_is_away_is_not_broken(index, settings, monkeypatch, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")

    with pytest.raises(StorageUnreachable):
        call(SliceIndex(tables_of(settings)))


def test_a_server_that_lance_alone_does_not_reach_is_away_too(index, settings, monkeypatch):
    files = tables_of(settings)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    files._options |= {"aws_endpoint": "http://127.0.0.1:1"}

    with pytest.raises(StorageUnreachable, match="Lance"):
        SliceIndex(files).rows("t")


def test_lance_gets_the_same_server_region_and_credentials(settings, monkeypatch):
    _, ours = tables_of(settings).connection()
    assert (ours["aws_region"], ours["aws_access_key_id"], ours["allow_http"]) == ("us-east-1", "test", "True")
    assert ours["aws_endpoint"].startswith("http://127.0.0.1:")
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    monkeypatch.delenv("AWS_DEFAULT_REGION")

    _, amazons = tables_of(settings).connection()

    assert not {"aws_endpoint", "aws_region", "allow_http"} & amazons.keys()
