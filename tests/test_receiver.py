"""The C-STORE receiver against DCMTK's senders: what was answered with success is there, whatever dies."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import httpx
import numpy as np
import pydicom
import pytest
from archived import archived_file
from conftest import missing
from posting import slice_files
from pydantic import ValidationError
from pydicom import uid
from pynetdicom import AE, _config
from synthetic import write_ct, write_slice

from models.ct.decode import read_hu
from models.ct.header import read_header
from models.ct.phantom import Identity
from service.embedded import in_background
from service.errors import SeriesNotFound
from service.settings import Settings
from service.storage.catalog import Catalog
from service.storage.database import Database
from service.storage.stores import Stores, open_stores
from workers.receiver import LONGEST_PDU, OTHERWISE, Receiver

SUCCESS = "Received Store Response (Success)"
CORNERSTONE = "CTImage.dcm_"
SYNTAXES = {  # of the files below oddities/cornerstone, with the option that has storescu propose it
    "BigEndianExplicitTransferSyntax_1.2.840.10008.1.2.2": "-xb",
    "DeflatedExplicitVRLittleEndianTransferSyntax_1.2.840.10008.1.2.1.99": "-xd",
    "JPEGLSLosslessTransferSyntax_1.2.840.10008.1.2.4.80": "-xt",
    "JPEGProcess14SV1TransferSyntax_1.2.840.10008.1.2.4.70": "-xs",
    "JPEGProcess1TransferSyntax_1.2.840.10008.1.2.4.50": "-xy",
    "LittleEndianExplicitTransferSyntax_1.2.840.10008.1.2.1": "-x=",
    "LittleEndianImplicitTransferSyntax_1.2.840.10008.1.2": "-xi",
    "RLELosslessTransferSyntax_1.2.840.10008.1.2.5": "-xr",
}


def dcmtk(tool: str) -> str:
    """DCMTK's program of this name, and not pynetdicom's, which lies beside our Python."""
    ours = Path(sys.executable).parent
    path = os.pathsep.join(each for each in os.environ["PATH"].split(os.pathsep) if Path(each) != ours)
    if not (found := shutil.which(tool, path=path)):
        missing(f"no {tool} (Debian dcmtk)")
    return str(found)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def settings_in(folder: Path, **others) -> Settings:
    return Settings(data_dir=folder / "data", receive_port=free_port(), **others)


@contextlib.contextmanager
def receiving(settings: Settings, stores: Stores) -> Iterator[Receiver]:
    receiver = Receiver(settings, stores)
    receiver.start()
    try:
        yield receiver
    finally:
        receiver.stop()


@pytest.fixture
def settings(tmp_path) -> Settings:
    return settings_in(tmp_path)


@pytest.fixture
def receiver(settings, stores):
    with receiving(settings, stores) as running:
        yield running


@pytest.fixture
def plain_stores(tmp_path):
    opened = open_stores(Settings(data_dir=tmp_path / "data"))
    yield opened
    opened.close()


def storescu(port: int, paths: list[Path], *options: str, called: str = "KEYSLICE") -> subprocess.CompletedProcess[str]:
    command = [dcmtk("storescu"), "-v", "-aec", called, *options, "127.0.0.1", str(port), *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def acknowledged(output: str) -> list[Path]:
    """The files that storescu names before a success."""
    found, sending = [], None
    for line in output.splitlines():
        if named := re.search(r"Sending file: (.*)", line):
            sending = Path(named[1])
        elif SUCCESS in line:
            found.append(sending)
    return found


def place(path: Path, stores: Stores) -> Path:
    header = read_header(path)
    return archived_file(stores, str(header.SeriesInstanceUID), str(header.SOPInstanceUID))


def left_behind(settings: Settings) -> list[Path]:
    return [path for path in (settings.data_dir / "receiving").rglob("*") if path.is_file()]


def received(stores: Stores, series_uid: str) -> int:
    """What the catalog says."""
    try:
        return stores.catalog.series(series_uid).received
    except SeriesNotFound:
        return 0


def associated(settings: Settings, *contexts, **timeouts):
    entity = AE("TESTER")
    for context in contexts or [uid.CTImageStorage]:
        entity.add_requested_context(context)
    return entity.associate("127.0.0.1", settings.receive_port, ae_title="KEYSLICE")


def test_a_real_series_is_in_archive_and_catalog_as_it_was_sent_once_however_often(
    receiver, settings, stores, lidc_0001
):
    first = storescu(settings.receive_port, lidc_0001)
    second = storescu(settings.receive_port, lidc_0001[:20])

    assert (first.returncode, len(acknowledged(first.stdout + first.stderr))) == (0, 133)
    assert (second.returncode, len(acknowledged(second.stdout + second.stderr))) == (0, 20)
    for path in lidc_0001:
        assert pydicom.dcmread(place(path, stores)) == pydicom.dcmread(path)
    assert received(stores, str(read_header(lidc_0001[0]).SeriesInstanceUID)) == 133
    assert left_behind(settings) == []


def test_it_answers_an_echo_under_its_own_name_only(receiver, settings):
    def echo(title: str) -> int:
        command = [dcmtk("echoscu"), "-aec", title, "127.0.0.1", str(settings.receive_port)]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode

    assert echo("KEYSLICE") == 0
    assert echo("OTHER") != 0


def test_a_receiver_that_has_stopped_leaves_temporary_files_where_they_were(tmp_path, plain_stores):
    before = tempfile.gettempdir()
    with receiving(settings_in(tmp_path), plain_stores):
        pass
    assert tempfile.gettempdir() == before


@pytest.mark.parametrize("name", SYNTAXES)
def test_a_slice_keeps_its_transfer_syntax_and_pixels(tmp_path, plain_stores, data, name):
    settings, path = settings_in(tmp_path), data / "oddities" / "cornerstone" / f"{CORNERSTONE}{name}.dcm"
    with receiving(settings, plain_stores):
        sent = storescu(settings.receive_port, [path], "-R", SYNTAXES[name])

    assert sent.returncode == 0, sent.stderr
    stored = place(path, plain_stores)
    assert pydicom.dcmread(stored).file_meta.TransferSyntaxUID == pydicom.dcmread(path).file_meta.TransferSyntaxUID
    np.testing.assert_array_equal(read_hu(stored), read_hu(path))


@pytest.mark.parametrize(
    "name",
    [  # three whose pixels end at an odd byte, which storescu does not read, and what it has no option for
        "JPEG2000LosslessOnlyTransferSyntax_1.2.840.10008.1.2.4.90",
        "JPEG2000TransferSyntax_1.2.840.10008.1.2.4.91",
        "JPEGLSLossyTransferSyntax_1.2.840.10008.1.2.4.81",
        "JPEGProcess14TransferSyntax_1.2.840.10008.1.2.4.57",
        "JPEGProcess2_4TransferSyntax_1.2.840.10008.1.2.4.51",
    ],
)
def test_a_syntax_that_storescu_cannot_send_comes_from_another_sender(tmp_path, plain_stores, data, name):
    settings, path = settings_in(tmp_path), data / "oddities" / "cornerstone" / f"{CORNERSTONE}{name}.dcm"
    dataset = pydicom.dcmread(path)
    with receiving(settings, plain_stores):
        entity = AE("TESTER")
        entity.add_requested_context(dataset.SOPClassUID, dataset.file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", settings.receive_port, ae_title="KEYSLICE")
        assert association.send_c_store(dataset).Status == 0
        association.release()

    stored = place(path, plain_stores)
    assert pydicom.dcmread(stored).file_meta.TransferSyntaxUID == dataset.file_meta.TransferSyntaxUID
    np.testing.assert_array_equal(read_hu(stored), read_hu(path))


def test_an_enhanced_ct_is_kept_as_one_instance(tmp_path, plain_stores, data):
    settings, path = settings_in(tmp_path), data / "oddities" / "pydicom" / "eCT_Supplemental.dcm"
    with receiving(settings, plain_stores):
        sent = storescu(settings.receive_port, [path])

    assert sent.returncode == 0, sent.stderr
    stored = place(path, plain_stores)
    np.testing.assert_array_equal(read_hu(stored, frame=2), read_hu(path, frame=2))


@pytest.mark.parametrize(("tool", "option"), [("dcmcjpeg", "-xs"), ("dcmcjpls", "-xt"), ("dcmcrle", "-xr")])
def test_what_dcmtk_compresses_comes_back_to_the_last_bit(tmp_path, plain_stores, lidc_0001, tool, option):
    settings, compressed = settings_in(tmp_path), tmp_path / "compressed.dcm"
    subprocess.run([dcmtk(tool), lidc_0001[40], compressed], check=True, timeout=60)
    with receiving(settings, plain_stores):
        sent = storescu(settings.receive_port, [compressed], "-R", option)

    assert sent.returncode == 0, sent.stderr
    np.testing.assert_array_equal(read_hu(place(lidc_0001[40], plain_stores)), read_hu(lidc_0001[40]))


def test_only_named_callers_may_send(tmp_path, plain_stores, lidc_0001):
    settings = settings_in(tmp_path, calling_aets="MODALITY, WORKSTATION")
    with receiving(settings, plain_stores):
        stranger = storescu(settings.receive_port, lidc_0001[:1], "-aet", "STRANGER")
        wrong = storescu(settings.receive_port, lidc_0001[:1], "-aet", "MODALITY", called="ELSEWHERE")
        assert not place(lidc_0001[0], plain_stores).exists()
        known = storescu(settings.receive_port, lidc_0001[:1], "-aet", "WORKSTATION")

    assert (stranger.returncode != 0, wrong.returncode != 0, known.returncode) == (True, True, 0)
    assert "Calling AE Title Not Recognized" in stranger.stderr + stranger.stdout
    assert "Called AE Title Not Recognized" in wrong.stderr + wrong.stdout


def test_a_class_that_is_no_ct_is_not_negotiated_and_the_rest_of_the_study_comes(tmp_path, plain_stores, data):
    settings, folder = settings_in(tmp_path), data / "oddities" / "misc"
    paths = sorted(folder.glob("dcmqi_*.dcm"))  # three slices and a SEG
    with receiving(settings, plain_stores):
        sent = storescu(settings.receive_port, paths, "--no-halt")

    assert sorted(acknowledged(sent.stdout + sent.stderr)) == [path for path in paths if "SEG" not in path.name]
    assert [place(path, plain_stores).exists() for path in paths] == [True, True, True, False]


@pytest.mark.parametrize(
    ("change", "status", "comment"),
    [
        (
            {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]},
            0xA900,
            "localizer: ImageType is ORIGINAL/PRIMARY/LOCALIZER",
        ),
        ({"Modality": "MR"}, 0xA900, "not_ct: Modality is MR, expected CT"),
        ({"ImagePositionPatient": None}, 0xC000, "no_position: "),
        ({"SeriesInstanceUID": ""}, 0xC000, "invalid_uid: "),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, 0xA900, "not_grayscale: "),
    ],
)
def test_what_is_set_aside_is_refused_with_its_reason_and_leaves_nothing(
    tmp_path, settings, plain_stores, change, status, comment
):
    dataset = pydicom.dcmread(write_slice(tmp_path / "ct"))
    for keyword, value in change.items():
        setattr(dataset, keyword, value)
    with receiving(settings, plain_stores):
        association = associated(settings)
        answer = association.send_c_store(dataset)
        association.release()

    assert (answer.Status, answer.ErrorComment[: len(comment)]) == (status, comment)
    assert len(answer.ErrorComment) <= 64
    assert list((settings.data_dir / "archive").glob("*")) == []
    assert left_behind(settings) == []


def test_the_audit_has_a_series_of_a_sender_once_and_what_was_refused(tmp_path, settings, plain_stores):
    datasets = [pydicom.dcmread(path) for path in write_ct(tmp_path / "ct")[:3]]
    datasets.append(pydicom.dcmread(write_slice(tmp_path / "slice")))
    datasets[-1].Modality = "MR"
    with receiving(settings, plain_stores):
        association = associated(settings)
        statuses = [association.send_c_store(each).Status for each in datasets]
        noted = [json.loads(row.entry) for row in plain_stores.audit.list()]
        association.release()

    key = plain_stores.catalog.series(str(datasets[0].SeriesInstanceUID)).series_key
    assert statuses == [0, 0, 0, 0xA900]
    assert [(each["who"], each["kind"], each["outcome"], each["status"], each.get("series")) for each in noted] == [
        ("aet:TESTER", "c-store", "done", 0, [key]),
        ("aet:TESTER", "c-store", "refused", 0xA900, None),
    ]


def test_success_is_never_said_of_another_instance_than_was_named(tmp_path, settings, plain_stores, monkeypatch):
    path = write_slice(tmp_path / "ct")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"  # by which a sender that does not look inside names it
    pydicom.dcmwrite(path, dataset, enforce_file_format=False)
    monkeypatch.setattr(_config, "STORE_SEND_CHUNKED_DATASET", True)
    with receiving(settings, plain_stores):
        entity = AE("TESTER")
        entity.add_requested_context(uid.CTImageStorage, dataset.file_meta.TransferSyntaxUID)
        association = entity.associate("127.0.0.1", settings.receive_port, ae_title="KEYSLICE")
        answer = association.send_c_store(path)
        association.release()

    assert (answer.Status, answer.ErrorComment) == (0xA900, OTHERWISE)
    assert list((settings.data_dir / "archive").glob("*")) == []


def test_a_disk_that_is_nearly_full_refuses_with_out_of_resources(tmp_path, plain_stores, lidc_0001):
    settings = settings_in(tmp_path, min_free_bytes=2**60)
    with receiving(settings, plain_stores):
        sent = storescu(settings.receive_port, lidc_0001[:3])

    assert "OutOfResources" in sent.stdout + sent.stderr
    assert acknowledged(sent.stdout + sent.stderr) == []
    assert list((settings.data_dir / "archive").glob("*")) == []
    assert left_behind(settings) == []


def test_more_series_than_may_wait_are_sent_again_later_and_one_that_has_begun_is_whole(tmp_path, plain_stores):
    settings = settings_in(tmp_path, max_waiting=1)
    begun, new = (slice_files(Identity(name), count=2) for name in ("BEGUN", "NEW"))
    with receiving(settings, plain_stores):
        association = associated(settings)
        order = [begun[0], new[0], begun[1]]
        answers = [association.send_c_store(pydicom.dcmread(BytesIO(content))) for _, content in order]
        association.release()

    assert [answer.Status for answer in answers] == [0x0000, 0xA700, 0x0000]
    assert answers[1].ErrorComment == "as many series wait as may, send it again later"
    assert plain_stores.catalog.series(Identity("BEGUN").series_uid).received == 2
    assert not plain_stores.catalog.has(Identity("NEW").series_uid)
    assert {json.loads(row.entry)["outcome"] for row in plain_stores.audit.list()} == {"done", "refused"}
    assert left_behind(settings) == []


def test_a_catalog_that_is_away_acknowledges_nothing(tmp_path, settings, plain_stores):
    away = Catalog(Database("postgresql+psycopg://nobody@127.0.0.1:1/none"), plain_stores.archive)
    dataset = pydicom.dcmread(write_slice(tmp_path / "ct"))
    with receiving(settings, replace(plain_stores, catalog=away)):
        association = associated(settings)
        answer = association.send_c_store(dataset)
        association.release()

    assert (answer.Status, answer.ErrorComment) == (0xA700, "the store is away, send it again later")
    assert left_behind(settings) == []


def test_two_senders_at_once_share_a_series(receiver, settings, stores, lidc_0001):
    halves = [lidc_0001[:80], lidc_0001[50:]]  # thirty of them by both
    outputs: list[subprocess.CompletedProcess[str]] = []
    threads = [
        threading.Thread(target=lambda half=half: outputs.append(storescu(settings.receive_port, half)))
        for half in halves
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert [each.returncode for each in outputs] == [0, 0]
    assert received(stores, str(read_header(lidc_0001[0]).SeriesInstanceUID)) == 133


def test_more_associations_than_allowed_are_refused(tmp_path, plain_stores):
    settings = settings_in(tmp_path, receive_associations=1)
    with receiving(settings, plain_stores):
        first = associated(settings)
        second = associated(settings)

        assert (first.is_established, second.is_rejected) == (True, True)
        first.release()


def test_a_sender_that_breaks_off_in_the_middle_of_an_instance_leaves_nothing_of_it(settings, plain_stores, lidc_0001):
    with receiving(settings, plain_stores), relay_that_cuts(settings.receive_port, after=3_700_000) as port:
        sent = storescu(port, lidc_0001[:20])
        kept = [path for path in lidc_0001 if place(path, plain_stores).exists()]
        wait_until(lambda: left_behind(settings) == [])

    assert sent.returncode != 0
    assert 5 <= len(kept) <= 7  # of half a megabyte each
    assert set(acknowledged(sent.stdout + sent.stderr)) <= set(kept)
    assert received(plain_stores, str(read_header(lidc_0001[0]).SeriesInstanceUID)) == len(kept)


@contextlib.contextmanager
def relay_that_cuts(port: int, after: int) -> Iterator[int]:
    """A port that passes on to another, and cuts the line after so many bytes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def passed_on() -> None:
            sender, _ = server.accept()
            with sender, socket.create_connection(("127.0.0.1", port)) as target:
                back = threading.Thread(target=copied, args=(target, sender), daemon=True)
                back.start()
                left = after
                while left > 0 and (chunk := sender.recv(min(65536, left))):
                    target.sendall(chunk)
                    left -= len(chunk)
                for each in (target, sender):
                    with contextlib.suppress(OSError):
                        each.shutdown(socket.SHUT_RDWR)

        thread = threading.Thread(target=passed_on, daemon=True)
        thread.start()
        yield int(server.getsockname()[1])
        thread.join(30)


def copied(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while chunk := source.recv(65536):
            target.sendall(chunk)


def wait_until(found, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_pdu_cannot_ask_for_gigabytes_and_a_silent_sender_is_cut_off(tmp_path, plain_stores):
    settings = settings_in(tmp_path, receive_silent_seconds=1.0)
    with receiving(settings, plain_stores):
        for sent in (b"\x01\x00" + (LONGEST_PDU + 1).to_bytes(4, "big"), b"\x01\x00\x00\x00\x10\x00half", b""):
            with socket.create_connection(("127.0.0.1", settings.receive_port), timeout=10) as line:
                line.sendall(sent)
                assert line.recv(100) == b"" or line.recv(100) == b""  # an A-ABORT may come first

        established = associated(settings)
        wait_until(lambda: not established.is_established, 10)


def test_off_loopback_the_callers_must_be_named(tmp_path):
    with pytest.raises(ValidationError, match="expected a loopback address or the titles that may call"):
        settings_in(tmp_path, receive_host="0.0.0.0")
    with pytest.raises(ValidationError, match="is no AE title"):
        settings_in(tmp_path, calling_aets="GOOD, BAD\\TITLE")
    assert settings_in(tmp_path, receive_host="0.0.0.0", calling_aets="CT1").receive_host == "0.0.0.0"

    command = [sys.executable, "-P", "-m", "service.cli", "receive", "--host", "0.0.0.0"]
    ended = subprocess.run(command, env=environment(tmp_path), capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, "KEYSLICE_CALLING_AETS" in ended.stderr) == (2, True)


def environment(folder: Path, **others: str) -> dict[str, str]:
    return os.environ | {"KEYSLICE_DATA_DIR": str(folder / "data"), "KEYSLICE_PORT": "0"} | others


@contextlib.contextmanager
def command(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """`keyslice receive`, listening."""
    arguments = ["-P", "-m", "service.cli", "receive", "--port", str(port)]
    with (folder / "receive.log").open("ab") as output:
        process = subprocess.Popen([sys.executable, *arguments], env=environment(folder), stdout=output, stderr=output)
    try:
        wait_until(lambda: listening(port), 60)
        yield process
    finally:
        process.kill()
        process.wait()


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_whatever_was_acknowledged_before_a_kill_is_in_archive_and_catalog(tmp_path, plain_stores, lidc_0001):
    port, random = free_port(), np.random.default_rng(5)
    series_uid = str(read_header(lidc_0001[0]).SeriesInstanceUID)
    done: set[Path] = set()
    for _ in range(4):
        with command(tmp_path, port) as process:
            left = [path for path in lidc_0001 if path not in done]
            sender = subprocess.Popen(
                [dcmtk("storescu"), "-v", "-aec", "KEYSLICE", "127.0.0.1", str(port), *map(str, left)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            time.sleep(random.uniform(0.2, 0.9))
            process.send_signal(signal.SIGKILL)
            done |= set(acknowledged(sender.communicate(timeout=60)[0]))

        assert all(place(path, plain_stores).exists() for path in done)
        assert received(plain_stores, series_uid) >= len(done)
    assert len(done) > 0

    with command(tmp_path, port):
        assert storescu(port, lidc_0001).returncode == 0
        assert received(plain_stores, series_uid) == 133
        assert [path for path in (tmp_path / "data" / "receiving").rglob("*") if path.is_file()] == []


def test_a_receiver_told_to_stop_finishes_what_is_on_its_way(tmp_path, plain_stores, lidc_0001):
    port = free_port()
    with command(tmp_path, port) as process:
        sender = subprocess.Popen(
            [dcmtk("storescu"), "-v", "-aec", "KEYSLICE", "127.0.0.1", str(port), *map(str, lidc_0001)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_until(lambda: any((tmp_path / "data" / "archive").rglob("*.dcm")))
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=20)
        done = acknowledged(sender.communicate(timeout=60)[0])

    kept = [path for path in lidc_0001 if place(path, plain_stores).exists()]
    assert status == 0
    assert 0 < len(done) <= len(kept) <= len(done) + 1  # of the last, the answer may have been lost
    assert received(plain_stores, str(read_header(lidc_0001[0]).SeriesInstanceUID)) == len(kept)
    assert [path for path in (tmp_path / "data" / "receiving").rglob("*") if path.is_file()] == []


def test_a_taken_port_is_said(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments = ["-P", "-m", "service.cli", "receive", "--port", str(taken.getsockname()[1])]
        ended = subprocess.run(
            [sys.executable, *arguments],
            env=environment(tmp_path),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    assert (ended.returncode, "cannot listen on" in ended.stderr) == (1, True)


def test_keyslice_up_receives_embeds_after_the_quiet_time_and_names_no_patient(tmp_path, lidc_0001):
    port = free_port()
    quick = {"KEYSLICE_SWEEP_SECONDS": "0.5", "KEYSLICE_SERIES_QUIET_SECONDS": "3"}
    with (
        in_background(tmp_path, KEYSLICE_RECEIVE_PORT=str(port), **quick) as running,
        httpx.Client(base_url=running.address, timeout=60) as http,
    ):
        wait_until(lambda: listening(port), 60)
        assert storescu(port, lidc_0001, "-aet", "MODALITY").returncode == 0
        aborted = sent_until_the_abort(port, write_ct(tmp_path / "ct", np.zeros((100, 32, 32), np.float32)), 50)
        series_uid = str(read_header(lidc_0001[0]).SeriesInstanceUID)

        assert embedded_slices(http, series_uid) == 133
        assert embedded_slices(http, aborted) == 50

    log = (tmp_path / "keyslice.log").read_text()
    assert f"'MODALITY': 133 kept, 0 were here already; series {series_uid}" in log
    assert "LIDC-IDRI-0001" not in log


def sent_until_the_abort(port: int, paths: list[Path], count: int) -> str:
    entity = AE("BREAKER")
    entity.add_requested_context(uid.CTImageStorage)
    association = entity.associate("127.0.0.1", port, ae_title="KEYSLICE")
    datasets = [pydicom.dcmread(path) for path in paths[:count]]
    assert [association.send_c_store(each).Status for each in datasets] == [0] * count
    association.abort()
    return str(datasets[0].SeriesInstanceUID)


def embedded_slices(http: httpx.Client, series_uid: str) -> int:
    wait_until(lambda: http.get(f"/v1/series/{series_uid}").json().get("state") == "indexed", 120)
    (embedding,) = http.get(f"/v1/series/{series_uid}").json()["embeddings"]
    return int(embedding["slices"])
