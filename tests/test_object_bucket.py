"""A bucket as the place of bags: what is listed and removed, two writers at once, and a server that refuses."""

import hashlib

import numpy as np
import pytest
from botocore.exceptions import ClientError
from buckets import NAME, bucket_below, guarded, overwrite
from searching import ENCODER, random_bag

from service.errors import StorageUnreachable
from service.remotes import S3Prefix
from service.storage import bucket as bucket_module
from service.storage.bags import Bags
from service.storage.bucket import Bucket
from service.storage.keys import EmbeddingKey

KEY = EmbeddingKey("1.2.3", ENCODER)
BAG = f"{ENCODER}/1.2.3/c0.zarr"


def keys(s3) -> list[str]:
    return [each["Key"] for each in s3.list_objects_v2(Bucket=NAME).get("Contents", [])]


def test_a_bag_is_two_objects_below_the_prefix(s3):
    Bags(bucket_below("keyslice/")).put(KEY, "c0", random_bag(0), {})

    assert keys(s3) == [f"keyslice/{BAG}/c/0/0/0", f"keyslice/{BAG}/zarr.json"]


def test_names_and_removal_go_by_pages_and_touch_no_neighbour(s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "PAGE", 3)
    ours = [f"ct/{folder}/{k}" for folder in ("1.2", "1.23") for k in range(5)]
    for key in ("ct/", "ct-2/1", "else", *ours):
        s3.put_object(Bucket=NAME, Key=key, Body=b"x")
    place = bucket_below("ct/")

    assert place.names() == ["1.2", "1.23"]
    assert place.names("1.2") == place.below("1.2").names() == list("01234")
    assert place.names("1") == []
    place.remove("1.2")
    place.remove("1.2")

    assert keys(s3) == ["ct-2/1", "ct/", *ours[5:], "else"]


def test_a_part_of_an_object_is_read_by_its_range(s3):
    place = bucket_below("")
    overwrite(place, "object", b"0123456789")

    assert [place.read_part("object", *which) for which in ((2, 3), (8, 9), (10, 1))] == [b"234", b"89", b""]
    for read in (place.read, lambda name: place.read_part(name, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("another")


def no_conditions(place, monkeypatch):
    """A server that knows no If-None-Match."""
    put = place._client.put_object

    def plain(**options):
        if "IfNoneMatch" in options:
            raise ClientError({"Error": {"Code": "NotImplemented"}}, "PutObject")
        return put(**options)

    monkeypatch.setattr(place._client, "put_object", plain)


@pytest.mark.parametrize("conditions", [True, False], ids=["conditional", "plain"])
@pytest.mark.parametrize("at", ["before its chunk", "before its metadata", "after its metadata"])
def test_of_two_writers_at_once_one_whole_bag_stays(s3, monkeypatch, at, conditions):
    slow, quick = bucket_below("keyslice/"), bucket_below("keyslice/")
    if not conditions:
        no_conditions(slow, monkeypatch)
        no_conditions(quick, monkeypatch)
    put, others = slow._put_new, [lambda: Bags(quick).put(KEY, "c0", random_bag(2), {"by": "the quick one"})]

    def interrupted(name, content):
        metadata = name.endswith("zarr.json")
        if others and at.startswith("before") and ("metadata" in at) == metadata:
            others.pop()()
        answer = put(name, content)
        if others and at.startswith("after") and metadata:
            others.pop()()
        return answer

    monkeypatch.setattr(slow, "_put_new", interrupted)

    Bags(slow).put(KEY, "c0", random_bag(1), {"by": "the slow one"})

    bags = Bags(bucket_below("keyslice/"), verify=True)
    of = {"the slow one": random_bag(1), "the quick one": random_bag(2)}
    assert not others
    assert np.array_equal(bags.get(KEY, "c0"), of[bags.receipt(KEY, "c0")["by"]])
    assert len(keys(s3)) == 2


def test_a_bag_that_dies_between_its_objects_is_not_there(s3, monkeypatch):
    place = bucket_below("keyslice/")
    put = place._put_new

    def die(name, content):
        if name.endswith("zarr.json"):
            raise KeyboardInterrupt
        return put(name, content)

    with monkeypatch.context() as patch:
        patch.setattr(place, "_put_new", die)
        with pytest.raises(KeyboardInterrupt):
            Bags(place).put(KEY, "c0", random_bag(0), {})
    assert keys(s3) == [f"keyslice/{BAG}/c/0/0/0"]
    assert not Bags(place).exists(KEY, "c0")

    Bags(place).put(KEY, "c0", random_bag(1), {})

    assert np.array_equal(Bags(place, verify=True).get(KEY, "c0"), random_bag(1))


def test_a_bag_that_is_removed_ends_with_its_metadata(s3, monkeypatch):
    place = bucket_below("keyslice/")
    Bags(place).put(KEY, "c0", random_bag(0), {})
    remove, seen = place._delete, []
    monkeypatch.setattr(place, "_delete", lambda gone: (seen.append(keys(s3)), remove(gone)))

    Bags(place).remove("1.2.3")

    assert seen[1] == [f"keyslice/{BAG}/c/0/0/0"]
    assert keys(s3) == []


CALLS = [
    lambda place: place.names(),
    lambda place: place.exists("1.2.3"),
    lambda place: place.changed_at("1.2.3"),
    lambda place: place.read("1.2.3"),
    lambda place: place.add_folder("1.2.3", {"a": b"x"}),
    lambda place: place.remove("1.2.3"),
    lambda place: place.keeps_versions(),
]


@pytest.mark.parametrize("call", CALLS)
def test_a_bucket_that_is_missing_is_not_an_empty_one(s3, call):
    with pytest.raises(StorageUnreachable, match="NoSuchBucket"):
        call(Bucket(S3Prefix("another", "")))


@pytest.mark.parametrize("call", CALLS)
def test_a_server_that_is_away_is_told_without_a_name(s3, monkeypatch, call):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")

    with pytest.raises(StorageUnreachable, match="EndpointConnectionError") as raised:
        call(bucket_below(""))

    assert "1.2.3" not in str(raised.value)


@pytest.mark.parametrize(("known", "code"), [(True, "AccessDenied"), (False, "InvalidAccessKeyId")])
def test_credentials_that_are_refused_are_told(s3, monkeypatch, known, code):
    with guarded(known=known) as credentials:
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)

        with pytest.raises(StorageUnreachable, match=code):
            bucket_below("").read("1.2.3")


def test_damage_is_not_told_of_a_bag_that_cannot_be_reached(s3, monkeypatch):
    Bags(bucket_below("")).put(KEY, "c0", random_bag(0), {})
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    bags = Bags(bucket_below(""), verify=True)

    for read in (bags.damage, bags.get, bags.receipt, lambda *which: bags.get_slice(*which, 0)):
        with pytest.raises(StorageUnreachable):
            read(KEY, "c0")
    assert not bags.answers()


def test_a_bucket_says_whether_it_keeps_versions(s3):
    assert not bucket_below("").keeps_versions()
    s3.put_bucket_versioning(Bucket=NAME, VersioningConfiguration={"Status": "Enabled"})

    assert bucket_below("").keeps_versions()


def test_the_bytes_are_those_of_a_directory(s3, tmp_path):
    from service.storage.folder import Folder

    bucket, folder = bucket_below("keyslice/"), Folder(tmp_path)
    for place in (bucket, folder):
        Bags(place).put(KEY, "c0", random_bag(0), {"windows": ["lung"]})

    for name in ("zarr.json", "c/0/0/0"):
        digests = {hashlib.sha256(place.read(f"{BAG}/{name}")).hexdigest() for place in (bucket, folder)}
        assert len(digests) == 1
