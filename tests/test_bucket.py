"""An S3 bucket as moto serves it over HTTP: listed, read by ranges, fetched, refused."""

import pytest
from buckets import NAME, deny, put
from posting import slice_files

from models.ct.phantom import Identity
from models.ct.reasons import Reason
from service.errors import CredentialsRefused, SourceAway, SourceNotFound
from service.remotes import S3Prefix
from service.storage.files import ExportFile
from workers import bucket as bucket_module
from workers.bucket import HEADER_BYTES, Bucket
from workers.sources import NotFetched


def bucket(prefix: str = "") -> Bucket:
    return Bucket(S3Prefix(NAME, prefix), at_once=2)


def test_objects_below_the_prefix_are_listed_and_no_others(s3):
    for key in ("ct/1", "ct/a/2", "ct/", "ct", "ct-2/3", "else"):
        s3.put_object(Bucket=NAME, Key=key, Body=b"x")

    assert list(bucket("ct/").entries()) == [ExportFile(b"1", 1), ExportFile(b"a/2", 1)]


def test_a_listing_has_any_number_of_pages(s3, monkeypatch):
    monkeypatch.setattr(bucket_module, "PAGE", 3)
    put(s3, **{str(number): b"" for number in range(8)})

    assert [each.name for each in bucket().entries()] == [b"%d" % number for number in range(8)]


def test_a_header_is_read_and_no_more_of_the_object_than_it_takes(s3, monkeypatch):
    identity = Identity("bucket")
    ((_, content),) = slice_files(identity, count=1, size=512)
    ((_, long_header),) = slice_files(identity, count=1, change=with_long_text)
    s3.put_object(Bucket=NAME, Key="ct/long", Body=long_header)
    s3.put_object(Bucket=NAME, Key="ct/short", Body=content)
    s3.put_object(Bucket=NAME, Key="ct/text", Body=b"no DICOM")
    source = bucket("ct/")
    reads: list[tuple[str, str]] = []
    read = source._range
    monkeypatch.setattr(source, "_range", lambda key, wanted: (reads.append((key, wanted)), read(key, wanted))[1])

    long, short, text = source.identify([*source.entries()])

    assert (long.series_uid, short.series_uid) == (identity.series_uid, identity.series_uid)
    assert (text.series_uid, text.reason) == ("", Reason.NOT_DICOM)
    assert [wanted for key, wanted in reads if key == "ct/short"] == [f"bytes=0-{HEADER_BYTES - 1}"]
    assert 1 < len([key for key, _ in reads if key == "ct/long"]) <= 3
    assert len(long_header) > 4 * HEADER_BYTES


def with_long_text(_, dataset) -> None:
    """An element before the series' UID that is longer than a read, and is no part of what is asked for."""
    dataset.add_new(0x00091010, "OB", b"x" * 4 * HEADER_BYTES)


def test_an_object_is_fetched_whole(s3, tmp_path):
    content = bytes(range(256)) * 40_000  # longer than a part of a transfer
    put(s3, object=content)

    bucket().fetch(ExportFile(b"object", len(content)), tmp_path / "file")

    assert (tmp_path / "file").read_bytes() == content


class TestWhatGoesWrong:
    def test_one_object_that_is_refused_gone_or_cold_is_set_aside(self, s3, tmp_path):
        s3.put_object(Bucket=NAME, Key="cold", Body=b"x", StorageClass="GLACIER")
        put(s3, Jane=b"x" * 200)
        deny(s3, "Jane")
        files = [ExportFile(name, 200) for name in (b"Jane", b"cold", b"gone")]

        found = bucket().identify(files)

        assert [each.reason for each in found] == [Reason.UNREADABLE_FILE, Reason.UNREADABLE_FILE, Reason.VANISHED]
        assert ["403" in found[0].detail, "cold storage" in found[1].detail, "NoSuchKey" in found[2].detail] == [
            True
        ] * 3
        assert "Jane" not in found[0].detail
        for file, reason in ((files[0], Reason.UNREADABLE_FILE), (files[2], Reason.VANISHED)):
            with pytest.raises(NotFetched) as raised:
                bucket().fetch(file, tmp_path / "file")
            assert raised.value.reason == reason
        assert list(tmp_path.iterdir()) == []

    def test_a_read_that_fails_late_is_no_fault_of_the_file(self, s3):
        ((_, content),) = slice_files(Identity("bucket"), count=1, change=with_long_text)
        put(s3, Jane=content)
        source = bucket()
        read = source._range
        source._range = lambda key, wanted: read(key if wanted.startswith("bytes=0-") else "gone", wanted)

        (found,) = source.identify([*source.entries()])

        assert found.reason == Reason.VANISHED

    def test_what_concerns_every_object_ends_the_export(self, s3, tmp_path, monkeypatch):
        file = ExportFile(b"object", 10)
        with pytest.raises(SourceNotFound, match="NoSuchBucket"):
            list(Bucket(S3Prefix("another", ""), at_once=2).entries())
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
        for call in (lambda: [*bucket().entries()], lambda: bucket().identify([file] * 9)):
            with pytest.raises(SourceAway, match="EndpointConnectionError"):
                call()
        with pytest.raises(SourceAway):
            bucket().fetch(file, tmp_path / "file")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        with pytest.raises(CredentialsRefused, match="AWS_ACCESS_KEY_ID"):
            bucket().identify([file])
