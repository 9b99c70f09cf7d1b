"""What a scan finds in a directory or an archive: each file's series, or the reason why it is not used."""

import io
import os
import socket
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pydicom
import pytest
from posting import slice_files

from models.ct.phantom import Identity
from models.ct.reasons import Reason
from models.ct.screening import series_of
from service.errors import BadArchive
from workers.archives import Tar, Zip
from workers.scanning import BATCH, scan
from workers.sources import NotFetched, Tree

ONE, OTHER = Identity("SCAN-ONE"), Identity("SCAN-OTHER")


def contents() -> dict[bytes, bytes]:
    """Two series mixed in one folder, one of them in another folder too, and what is beside them in an export."""
    one, other = ([content for _, content in slice_files(each, count=4)] for each in (ONE, OTHER))

    def magnetic(_: int, dataset: pydicom.FileDataset) -> None:
        dataset.Modality = "MR"

    return {
        b"mixed/IM0": one[0],
        b"mixed/IM1": other[0],
        b"mixed/IM2": one[1],
        b"deep/er/than/that/a b\nc.dcm": one[2],
        b"latin-\xe9\xff.dcm": one[3],
        b"notes.txt": b"not DICOM at all",
        b"empty": b"",
        b"cut": one[0][:200],
        b"MR/1": slice_files(Identity("SCAN-MR"), count=1, change=magnetic)[0][1],
    }


EXPECTED = {
    b"mixed/IM0": (ONE.series_uid, None),
    b"mixed/IM1": (OTHER.series_uid, None),
    b"mixed/IM2": (ONE.series_uid, None),
    b"deep/er/than/that/a b\nc.dcm": (ONE.series_uid, None),
    b"latin-\xe9\xff.dcm": (ONE.series_uid, None),
    b"notes.txt": ("", Reason.NOT_DICOM),
    b"empty": ("", Reason.NOT_DICOM),
    b"cut": ("", Reason.NOT_CT),
    b"MR/1": (Identity("SCAN-MR").series_uid, Reason.NOT_CT),
}


@pytest.fixture
def root(tmp_path: Path) -> bytes:
    for name, content in contents().items():
        path = Path(os.fsdecode(os.fsencode(tmp_path / "export") + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return os.fsencode(tmp_path / "export")


def found(source) -> dict[bytes, tuple[str, Reason | None]]:
    return {file.name: (file.series_uid, file.reason) for files in scan(source, 2) for file in files}


def test_every_file_of_a_directory_has_a_series_or_a_reason(root):
    folder = Path(os.fsdecode(root))
    (folder / "nothing here").mkdir()
    (folder / "link").symlink_to(folder / "mixed" / "IM0")
    (folder / "around").symlink_to(folder)
    (folder / "gone").symlink_to("/nowhere/at/all")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        here = Path.cwd()
        os.chdir(folder)  # a socket's path may be no longer than some hundred bytes
        listening.bind("socket")
        os.chdir(here)

    links = dict.fromkeys((b"link", b"around", b"gone"), ("", Reason.SYMLINK))
    others = dict.fromkeys((b"pipe", b"socket"), ("", Reason.NOT_A_FILE))
    assert found(Tree(root)) == EXPECTED | links | others


def test_an_empty_directory_has_no_files(tmp_path):
    assert found(Tree(os.fsencode(tmp_path))) == {}


def test_folders_in_folders_end_somewhere(tmp_path):
    folder = tmp_path
    for _ in range(102):
        folder /= "d"
    folder.mkdir(parents=True)
    (folder / "file").write_bytes(b"")

    assert list(found(Tree(os.fsencode(tmp_path))).values()) == [("", Reason.NOT_A_FILE)]


def test_processes_find_what_one_finds_and_what_is_recorded_is_not_read_again(root):
    folder, (content, *_) = Path(os.fsdecode(root)), contents().values()
    for number in range(3 * BATCH):
        (folder / str(number)).write_bytes(content)
    source, asked = Tree(root), []

    every = {file.name: file for files in scan(source, 2) for file in files}
    again = [file for files in scan(source, 2, lambda files: asked.extend(files) or []) for file in files]

    assert {name: (file.series_uid, file.reason) for name, file in every.items()} == EXPECTED | {
        str(number).encode(): (ONE.series_uid, None) for number in range(3 * BATCH)
    }
    assert again == []
    assert {file.name for file in asked} == set(every)
    assert len({file.key() for file in every.values()}) == len(every)


def test_a_copy_is_the_file_and_one_that_vanished_or_became_a_link_is_named(root, tmp_path):
    source, folder = Tree(root), Path(os.fsdecode(root))
    files = {file.name: file for found in scan(source, 1) for file in found}

    source.fetch(files[b"latin-\xe9\xff.dcm"], tmp_path / "copy")
    (folder / "mixed" / "IM0").unlink()
    (folder / "mixed" / "IM1").unlink()
    (folder / "mixed" / "IM1").symlink_to(folder / "mixed" / "IM2")
    (folder / "MR").rename(folder / "moved")
    (folder / "MR").symlink_to(folder / "moved")
    refused = {}
    for name in (b"mixed/IM0", b"mixed/IM1", b"MR/1"):
        with pytest.raises(NotFetched) as error:
            source.fetch(files[name], tmp_path / "none")
        refused[name] = error.value.reason

    assert (tmp_path / "copy").read_bytes() == contents()[b"latin-\xe9\xff.dcm"]
    assert refused[b"mixed/IM0"] == Reason.VANISHED
    assert refused[b"mixed/IM1"] == Reason.SYMLINK
    assert refused[b"MR/1"] in (Reason.SYMLINK, Reason.UNREADABLE_FILE)
    assert not (tmp_path / "none").exists()


def zipped(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents().items():
            archive.writestr(name.decode("utf-8", "replace"), content)
    return path


def tarred(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in contents().items():
            member = tarfile.TarInfo(name.decode("utf-8", "surrogateescape"))
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz", "tar.xz"])
def test_an_archive_holds_what_the_directory_held(kind, tmp_path):
    path, opened = tmp_path / f"export.{kind}", tmp_path / "opened"
    opened.mkdir()
    source = Zip(zipped(path), 50) if kind == "zip" else Tar(tarred(path, f"w:{kind[4:]}"), opened, 50)

    every = [file for files in scan(source, 2) for file in files]
    for number, file in enumerate(every):
        source.fetch(file, tmp_path / str(number))

    assert [(file.series_uid, file.reason) for file in every] == [*EXPECTED.values()]
    assert [(tmp_path / str(number)).read_bytes() for number in range(len(every))] == [*contents().values()]
    if kind != "zip":
        assert [file.name for file in every] == [*contents()]


def test_links_inside_an_archive_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "links.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo("link" + kind.decode())
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    member = zipfile.ZipInfo("link")
    member.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(member, "/etc/passwd")

    assert [*found(Zip(tmp_path / "links.zip", 50)).values()] == [("", Reason.SYMLINK)]
    assert [reason for _, reason in found(Tar(tmp_path / "links.tar", tmp_path, 50)).values()] == [
        Reason.SYMLINK,
        Reason.NOT_A_FILE,
        Reason.NOT_A_FILE,
    ]


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_a_truncated_archive_is_refused(kind, tmp_path):
    path = tmp_path / "export"
    zipped(path) if kind == "zip" else tarred(path, f"w:{kind[4:]}")
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(BadArchive, match="broken or truncated"):
        found(Zip(path, 50) if kind == "zip" else Tar(path, tmp_path, 50))


def test_a_header_is_read_up_to_its_series_alone():
    """What lies behind may be anything, and costs nothing."""
    content = slice_files(ONE, count=1)[0][1]
    end = content.index(ONE.series_uid.encode()) + len(ONE.series_uid) + 1

    class Counted(io.BytesIO):
        furthest = 0

        def read(self, *size):
            read = super().read(*size)
            self.furthest = max(self.furthest, self.tell())
            return read

    file = Counted(content[:end] + bytes(4096) + b"\xff" * 100_000)

    assert series_of(file) == ONE.series_uid
    assert file.furthest < end + 8192


def test_scanning_processes_end_with_a_parent_that_is_killed(root):
    code = f"""
import os, signal, multiprocessing
from workers.sources import Tree
if __name__ == "__main__":
    executor = Tree({root!r}).executor(2)
    print(executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = Path(os.fsdecode(root)) / "parent.py"
    script.write_text(code)

    # Its end of the pipe closes when the last process that has it is gone.
    ended = subprocess.run([sys.executable, script], capture_output=True, timeout=60, check=False)

    assert ended.returncode == -9
    assert int(ended.stdout)
