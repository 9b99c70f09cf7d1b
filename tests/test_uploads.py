"""Multipart bodies: streamed to files, bounded, refused where they are malformed."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from service.disk import Room
from service.errors import BadUpload, EmptyUpload, UploadTooLarge
from service.storage.staging import staging
from service.uploads import receive_files

TYPE = "multipart/form-data; boundary=edge"


def body(*parts: tuple[str, bytes], field: str = "files") -> bytes:
    sections = [
        f'--edge\r\nContent-Disposition: form-data; name="{field}"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
        for name, content in parts
    ]
    return b"".join(sections) + b"--edge--\r\n"


def receive(sent: bytes, folder: Path, chunk: int = 7, max_files: int = 10, kind: str = TYPE):
    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(sent), chunk):
            yield sent[start : start + chunk]

    room = Room(folder, 0)
    return asyncio.run(receive_files(stream(), kind, folder, room, max_files=max_files))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_parts_arrive_whole_however_they_are_cut(tmp_path, chunk):
    parts = [("a.dcm", b"first\r\n--edg"), ("b c.dcm", bytes(range(256)) * 20)]

    files = receive(body(*parts), tmp_path, chunk)

    assert [(file.name, file.path.read_bytes()) for file in files] == parts


def test_a_part_cannot_name_its_own_place(tmp_path):
    (file,) = receive(body(("../../outside", b"x")), tmp_path)
    assert file.path.parent == tmp_path


def test_more_files_than_allowed_are_refused(tmp_path):
    with pytest.raises(UploadTooLarge, match="more than 2 files"):
        receive(body(("a", b"1"), ("b", b"2"), ("c", b"3")), tmp_path, max_files=2)


@pytest.mark.parametrize(
    ("sent", "kind", "error"),
    [
        (body(("a", b"1")), "application/json", BadUpload),
        (body(("a", b"1")), "multipart/form-data", BadUpload),
        (body(("a", b"1")), "", BadUpload),
        (body(("a", b"1"))[:-6], TYPE, BadUpload),
        (b"nonsense", TYPE, BadUpload),
        (b"", TYPE, BadUpload),
        (body(("a", b"1"), field="other"), TYPE, BadUpload),
        (body(), TYPE, EmptyUpload),
        (body(("a", b"")), TYPE, EmptyUpload),
    ],
)
def test_what_is_no_upload_is_refused(tmp_path, sent, kind, error):
    with pytest.raises(error):
        receive(sent, tmp_path, kind=kind)


def test_an_empty_file_among_others_is_kept_for_whoever_names_it_and_an_unfilled_field_is_not(tmp_path):
    files = receive(body(("a", b"1"), ("empty.dcm", b""), ("", b"")), tmp_path)

    assert [file.name for file in files] == ["a", "empty.dcm"]


def test_staging_is_gone_at_the_end_even_of_a_failure(tmp_path):
    def fail() -> None:
        with staging(tmp_path / "staging") as folder:
            (folder / "part").write_bytes(b"x")
            raise BadUpload("on purpose")

    with pytest.raises(BadUpload):
        fail()

    assert list((tmp_path / "staging").iterdir()) == []
