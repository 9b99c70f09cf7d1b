"""DICOMweb with dicomweb-client on the other side: what was sent is found and read back."""

import io
from pathlib import Path

import httpx
import numpy as np
import psutil
import pydicom
import pytest
from dicomweb_client.api import DICOMwebClient
from enhanced import in_syntax, write_enhanced
from PIL import Image
from posting import slice_files
from pydicom.uid import EnhancedCTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, MRImageStorage
from requests import HTTPError

from models.ct.decode import read_hu
from models.ct.phantom import Identity
from models.ct.windows import LUNG, apply_window
from service.embedded import Running


@pytest.fixture(scope="module")
def client(service: Running) -> DICOMwebClient:
    return DICOMwebClient(f"{service.address}/dicom-web")


@pytest.fixture(scope="module")
def lidc(client: DICOMwebClient, lidc_0001: list[Path]) -> dict[str, Path]:
    """The real series by SOPInstanceUID, stored."""
    datasets = [pydicom.dcmread(path) for path in lidc_0001]
    answer = client.store_instances(datasets)
    assert len(answer.ReferencedSOPSequence) == 133 and "FailedSOPSequence" not in answer
    return {str(dataset.SOPInstanceUID): path for dataset, path in zip(datasets, lidc_0001, strict=True)}


@pytest.fixture(scope="module")
def where(lidc: dict[str, Path]) -> tuple[str, str, str]:
    """Study, series and one instance of it."""
    header = pydicom.dcmread(next(iter(lidc.values())), stop_before_pixels=True)
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID)


def address(where: tuple[str, str, str]) -> str:
    return "/dicom-web/studies/{}/series/{}/instances/{}".format(*where)


def read_parts(answer: httpx.Response) -> list[tuple[str, bytes]]:
    """Content-Type and content of each part."""
    assert answer.status_code == 200, answer.text
    boundary = answer.headers["content-type"].split("boundary=")[1].encode()
    parts = answer.content.split(b"--" + boundary)
    assert parts[0] == b"" and parts[-1] == b"--\r\n"
    split = [part[2:-2].split(b"\r\n\r\n", 1) for part in parts[1:-1]]
    return [(head.split(b"Content-Type: ")[1].split(b"\r\n")[0].decode(), content) for head, content in split]


def related(files: list[bytes], kind: str = "application/dicom", closed: bool = True) -> dict:
    body = b"".join(b"--edge\r\nContent-Type: %s\r\n\r\n%s\r\n" % (kind.encode(), file) for file in files)
    headers = {"Content-Type": 'multipart/related; type="application/dicom"; boundary=edge'}
    return {"content": body + (b"--edge--\r\n" if closed else b""), "headers": headers}


def failures(answer: httpx.Response, tag: str = "00081198") -> list[tuple[int, str]]:
    items = answer.json().get(tag, {}).get("Value", [])
    return [(item["00081197"]["Value"][0], item["00000902"]["Value"][0].split(":")[0]) for item in items]


class TestRealSeries:
    def test_every_file_comes_back_byte_for_byte(self, http, lidc, where):
        study, series, _ = where
        accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}

        parts = read_parts(http.get(f"/dicom-web/studies/{study}/series/{series}", headers=accept))

        assert {content for _, content in parts} == {path.read_bytes() for path in lidc.values()}
        assert len(parts) == 133
        assert parts == read_parts(http.get(f"/dicom-web/studies/{study}", headers=accept))

    def test_dicomweb_client_reads_the_same_datasets(self, client, lidc, where):
        study, series, sop_uid = where

        found = {str(each.SOPInstanceUID): each for each in client.retrieve_series(study, series)}

        assert found == {uid: pydicom.dcmread(path) for uid, path in lidc.items()}
        assert client.retrieve_instance(*where) == found[sop_uid]

    def test_one_instance_comes_as_a_file_where_that_is_asked_for(self, http, lidc, where):
        answer = http.get(address(where), headers={"Accept": "application/dicom; transfer-syntax=*"})

        assert answer.headers["content-type"] == "application/dicom"
        assert answer.content == lidc[where[2]].read_bytes()

    def test_it_is_found_at_every_level(self, client, where, lidc):
        study, series, _ = where

        (by_patient,) = client.search_for_studies(search_filters={"PatientID": "LIDC-IDRI-0001"})
        (by_modality,) = client.search_for_series(study, search_filters={"Modality": "CT"})
        instances = client.search_for_instances(study, series)

        assert by_patient["0020000D"]["Value"] == [study]
        assert by_patient["00201208"]["Value"] == [133]
        assert by_patient["00080061"]["Value"] == ["CT"]
        assert by_modality["0020000E"]["Value"] == [series]
        assert {each["00080018"]["Value"][0] for each in instances} == set(lidc)
        assert {each["00280010"]["Value"][0] for each in instances} == {512}

    def test_metadata_is_the_header_without_pixels(self, client, where, lidc):
        every = client.retrieve_series_metadata(*where[:2])

        (mine,) = [each for each in every if each["00080018"]["Value"] == [where[2]]]
        assert client.retrieve_instance_metadata(*where) in (mine, [mine])
        assert set(mine["7FE00010"]) == {"vr", "BulkDataURI"}
        expected = pydicom.dcmread(lidc[where[2]])
        assert list(mine) == [f"{each.tag:08X}" for each in expected]
        del mine["7FE00010"], expected.PixelData
        read = pydicom.Dataset.from_json(mine)
        read.SpecificCharacterSet = expected.SpecificCharacterSet
        assert read == expected

    def test_bulk_data_is_where_the_metadata_says(self, client, where, lidc):
        (mine,) = [client.retrieve_instance_metadata(*where)]
        mine = mine[0] if isinstance(mine, list) else mine

        assert client.retrieve_bulkdata(mine["7FE00010"]["BulkDataURI"]) == [pydicom.dcmread(lidc[where[2]]).PixelData]

    def test_its_frame_is_its_pixels(self, client, http, where, lidc):
        pixels = pydicom.dcmread(lidc[where[2]]).PixelData

        assert client.retrieve_instance_frames(*where, [1]) == [pixels]
        answer = http.get(f"{address(where)}/frames/1", headers={"Accept": "application/octet-stream"})
        assert answer.content == pixels
        assert answer.headers["content-type"] == "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"

    def test_rendered_at_a_window_it_is_the_slice(self, http, where, lidc):
        hu = read_hu(lidc[where[2]])
        url = f"{address(where)}/rendered"

        by_name = http.get(url, params={"window": "lung", "accept": "image/png"})
        by_numbers = http.get(f"{address(where)}/frames/1/rendered?window=-500,2000,linear-exact&accept=image/png")

        expected = np.round(apply_window(hu, LUNG) * 255).astype(np.uint8)
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(by_name.content))), expected)
        assert np.abs(np.asarray(Image.open(io.BytesIO(by_numbers.content))).astype(int) - expected).max() <= 1
        assert Image.open(io.BytesIO(http.get(url).content)).format == "JPEG"

    def test_thumbnails_are_small(self, http, where):
        study, series, _ = where
        series_url = f"/dicom-web/studies/{study}/series/{series}"
        for url in (f"/dicom-web/studies/{study}", series_url, address(where), f"{address(where)}/frames/1"):
            answer = http.get(f"{url}/thumbnail")
            assert Image.open(io.BytesIO(answer.content)).size == (128, 128), url

    def test_memory_stays_flat(self, http, service, where, lidc):
        (api,) = [each for each in psutil.Process(service.process.pid).children() if "uvicorn" in each.cmdline()]
        accept = {"Accept": 'multipart/related; type="application/dicom"; transfer-syntax=*'}
        before, most, length = api.memory_info().rss, 0, 0

        for _ in range(3):
            with http.stream("GET", f"/dicom-web/studies/{where[0]}", headers=accept) as answer:
                for chunk in answer.iter_bytes(1 << 20):
                    length += len(chunk)
                    most = max(most, api.memory_info().rss)

        assert length > 3 * 133 * 512 * 512 * 2
        assert most - before < 40 * 2**20


class TestStore:
    def test_what_came_before_counts_as_stored(self, http):
        body = related([content for _, content in slice_files(Identity("STOW-TWICE"))])

        first, again = http.post("/dicom-web/studies", **body), http.post("/dicom-web/studies", **body)

        assert (first.status_code, again.status_code) == (200, 200)
        assert first.headers["content-type"] == "application/dicom+json"
        assert first.json() == again.json()
        assert len(first.json()["00081199"]["Value"]) == 6
        assert http.get(f"/v1/series/{Identity('STOW-TWICE').series_uid}").json()["received"] == 6

    def test_each_failure_has_its_reason_and_the_rest_is_stored(self, http):
        def change(number, dataset):
            if number == 1:
                dataset.SOPClassUID, dataset.Modality = MRImageStorage, "MR"
            if number == 2:
                dataset.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            if number == 3:
                dataset.SOPInstanceUID = "1." * 32 + "1"  # 65 characters
            if number == 4:
                dataset.SOPClassUID = EnhancedCTImageStorage
                dataset.Modality = "MR"

        files = [content for _, content in slice_files(Identity("STOW-FAILURES"), change=change)]
        answer = http.post("/dicom-web/studies", **related([*files, b"", b"nothing"]))

        assert answer.status_code == 202
        assert len(answer.json()["00081199"]["Value"]) == 2
        assert failures(answer) == [(0x0122, "not_ct"), (0xA900, "localizer"), (0x0122, "not_ct")]
        others = failures(answer, "0008119A")
        assert [reason for reason, _ in others] == [0xC000] * 3
        assert [word for _, word in others] == ["invalid_uid", "not_dicom", "not_dicom"]

    def test_another_study_than_the_path_s_is_refused(self, client, http):
        files = [content for _, content in slice_files(Identity("STOW-STUDY"), count=2)]

        answer = http.post("/dicom-web/studies/1.2.3", **related(files))

        assert answer.status_code == 409
        assert failures(answer) == [(0xA900, "other_study")] * 2
        assert http.get(f"/v1/series/{Identity('STOW-STUDY').series_uid}").status_code == 404
        datasets = [pydicom.dcmread(io.BytesIO(file)) for file in files]
        with pytest.raises(HTTPError):
            client.store_instances(datasets, "1.2.3")
        stored = client.store_instances(datasets, Identity("STOW-STUDY").study_uid)
        assert len(stored.ReferencedSOPSequence) == 2

    def test_a_series_of_another_patient_is_not_mixed_in(self, http):
        owner, thief = Identity("STOW-OWNER"), Identity("STOW-THIEF")
        http.post("/dicom-web/studies", **related([content for _, content in slice_files(owner, count=1)]))
        stolen = slice_files(thief, 1, change=lambda _, each: setattr(each, "SeriesInstanceUID", owner.series_uid))

        answer = http.post("/dicom-web/studies", **related([stolen[0][1]]))

        assert (answer.status_code, failures(answer)) == (409, [(0xA900, "series_of_another_patient")])

    def test_a_large_request_is_not_held_in_memory(self, http, service):
        (api,) = [each for each in psutil.Process(service.process.pid).children() if "uvicorn" in each.cmdline()]
        files = [content for _, content in slice_files(Identity("STOW-LARGE"), count=200, size=512)]
        body, most = related(files), 0
        before = api.memory_info().rss

        def chunks():
            nonlocal most
            for start in range(0, len(body["content"]), 1 << 20):
                yield body["content"][start : start + (1 << 20)]
                most = max(most, api.memory_info().rss)

        answer = http.post("/dicom-web/studies", content=chunks(), headers=body["headers"])

        assert answer.status_code == 200
        assert max(most, api.memory_info().rss) - before < 60 * 2**20 < len(body["content"])


@pytest.fixture
def nothing_left_behind(http, service):
    data = Path(psutil.Process(service.process.pid).environ()["KEYSLICE_DATA_DIR"])
    before = http.get("/v1/series?limit=1000").json()
    yield
    assert http.get("/v1/series?limit=1000").json() == before
    assert [path for path in (data / "staging").rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("nothing_left_behind")
class TestBadStores:
    @pytest.mark.parametrize(
        ("content_type", "status"),
        [
            ("text/plain", 415),
            ("application/dicom", 415),
            ('multipart/related; type="application/dicom+json"; boundary=edge', 415),
            ("multipart/form-data; boundary=edge", 415),
            ('multipart/related; type="application/dicom"', 400),
            ('multipart/related; type="application/dicom"; boundary=""', 400),
            ('multipart/related; type="application/dicom"; boundary=another', 400),
        ],
    )
    def test_another_media_type_or_boundary(self, http, content_type, status):
        body = related([content for _, content in slice_files(Identity("STOW-BAD"), count=1)])
        answer = http.post("/dicom-web/studies", content=body["content"], headers={"Content-Type": content_type})
        problem(answer, status)

    def test_a_part_of_another_type(self, http):
        problem(http.post("/dicom-web/studies", **related([b"{}"], kind="application/dicom+json")), 415)

    @pytest.mark.parametrize("content", [b"", b"garbage", b"--edge--\r\n"])
    def test_a_body_without_parts(self, http, content):
        answer = http.post("/dicom-web/studies", content=content, headers=related([])["headers"])
        problem(answer, 400)

    def test_a_body_that_breaks_off(self, http):
        files = [content for _, content in slice_files(Identity("STOW-BAD"))]
        problem(http.post("/dicom-web/studies", **related(files, closed=False)), 400)

    def test_a_sender_that_goes_away(self, http):
        def some():
            yield related([content for _, content in slice_files(Identity("STOW-BAD"))])["content"][:3000]
            raise ConnectionError("on purpose")

        with pytest.raises(ConnectionError):
            http.post("/dicom-web/studies", content=some(), headers=related([])["headers"])
        assert http.get("/healthz").status_code == 200

    @pytest.mark.parametrize("study", ["none", "1..2", "1." * 32 + "1", "..%2f", "9" * 300])
    def test_a_study_that_is_no_uid(self, http, study):
        answer = http.post(f"/dicom-web/studies/{study}", **related([b"x"]))
        assert answer.status_code in (400, 404, 405)

    def test_an_answer_nobody_can_give(self, http):
        body = related([content for _, content in slice_files(Identity("STOW-BAD"), count=1)])
        body["headers"] |= {"Accept": "application/dicom+xml"}
        problem(http.post("/dicom-web/studies", **body), 406)


def problem(answer: httpx.Response, status: int) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return answer.json()


@pytest.fixture(scope="module")
def packed(http: httpx.Client, data: Path) -> tuple[str, str, str, Path]:
    """A JPEG 2000 slice of a real series: where it is, and its file."""
    (path,) = (data / "oddities" / "cornerstone").glob("*JPEG2000Lossless*")
    assert http.post("/dicom-web/studies", **related([path.read_bytes()])).status_code == 200
    header = pydicom.dcmread(path, stop_before_pixels=True)
    assert header.file_meta.TransferSyntaxUID == JPEG2000Lossless
    return str(header.StudyInstanceUID), str(header.SeriesInstanceUID), str(header.SOPInstanceUID), path


class TestRetrieve:
    def test_a_compressed_file_comes_as_stored_or_decoded(self, http, packed):
        url, path = address(packed[:3]), packed[3]
        whole = 'multipart/related; type="application/dicom"'

        as_stored = read_parts(http.get(url, headers={"Accept": f"{whole}; transfer-syntax=*"}))
        by_syntax = read_parts(http.get(url, headers={"Accept": f"{whole}; transfer-syntax={JPEG2000Lossless}"}))
        ((_, decoded),) = read_parts(http.get(url))

        assert as_stored == by_syntax == [("application/dicom", path.read_bytes())]
        dataset = pydicom.dcmread(io.BytesIO(decoded))
        assert dataset.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1"
        assert np.array_equal(dataset.pixel_array, pydicom.dcmread(path).pixel_array)

    def test_its_frame_comes_as_stored_or_decoded(self, http, packed):
        url, dataset = f"{address(packed[:3])}/frames/1", pydicom.dcmread(packed[3])
        octets = 'multipart/related; type="application/octet-stream"'

        ((plain, decoded),) = read_parts(http.get(url))
        ((coded, encoded),) = read_parts(http.get(url, headers={"Accept": f"{octets}; transfer-syntax=*"}))
        ((image, same),) = read_parts(http.get(url, headers={"Accept": 'multipart/related; type="image/jp2"'}))

        assert decoded == dataset.pixel_array.tobytes()
        assert plain == "application/octet-stream; transfer-syntax=1.2.840.10008.1.2.1"
        assert encoded == same and encoded.startswith(b"\xff\x4f\xff\x51")
        assert coded == f"application/octet-stream; transfer-syntax={JPEG2000Lossless}"
        assert image == f"image/jp2; transfer-syntax={JPEG2000Lossless}"

    @pytest.mark.parametrize(
        ("path", "accept", "status"),
        [
            ("", "garbage", 406),
            ("", "text/html", 406),
            ("", "application/dicom;q=high", 406),
            ("", 'multipart/related; type="application/dicom"; transfer-syntax=1.2.840.10008.1.2.4.80', 406),
            ("/metadata", "application/dicom+xml", 406),
            ("/frames/1", "image/png", 406),
            ("/frames/1", 'multipart/related; type="image/jls"', 406),
            ("/frames/2", "*/*", 404),
            ("/frames/0", "*/*", 404),
            ("/frames/1,1", "*/*", 400),
            ("/frames/one", "*/*", 400),
            ("/frames/1,", "*/*", 400),
            ("/frames/-1", "*/*", 400),
            ("/frames/" + ",".join(map(str, range(1, 10_001))), "*/*", 404),
            ("/frames/2/rendered", "*/*", 404),
            ("/frames/0/rendered", "*/*", 400),
            ("/rendered", "image/gif", 406),
            ("/rendered?window=brain", "*/*", 400),
            ("/rendered?window=40,0,linear", "*/*", 400),
            ("/rendered?window=40,nan,linear", "*/*", 400),
            ("/rendered?window=40,400,cubic", "*/*", 400),
            ("/rendered?viewport=0,10", "*/*", 400),
            ("/rendered?viewport=10", "*/*", 400),
            ("/rendered?viewport=99999,99999", "*/*", 400),
            ("/rendered?viewport=10,10,9000,9000,5,5", "*/*", 400),
            ("/rendered?quality=0", "*/*", 400),
            ("/bulkdata/00100010", "*/*", 404),
            ("/bulkdata/nothing/here", "*/*", 404),
            ("/bulkdata/00089215/99999999999/7FE00010", "*/*", 404),
        ],
    )
    def test_what_cannot_be_answered_is_said(self, http, packed, path, accept, status):
        problem(http.get(f"{address(packed[:3])}{path}", headers={"Accept": accept}), status)

    def test_what_is_not_there_is_said(self, http, packed):
        study, series, _, _ = packed
        problem(http.get("/dicom-web/studies/1.2.3"), 404)
        problem(http.get(f"/dicom-web/studies/{study}/series/1.2.3"), 404)
        problem(http.get(f"/dicom-web/studies/1.2.3/series/{series}"), 404)
        problem(http.get(address((study, series, "1.2.3"))), 404)
        problem(http.get(address((study, series, "1." * 32 + "1"))), 400)

    def test_a_viewport_keeps_proportions_crops_and_flips(self, http, packed):
        url = f"{address(packed[:3])}/rendered?accept=image/png"

        whole = np.asarray(Image.open(io.BytesIO(http.get(url).content)))
        small = Image.open(io.BytesIO(http.get(f"{url}&viewport=100,50").content))
        part = np.asarray(Image.open(io.BytesIO(http.get(f"{url}&viewport=40,20,10,30,40,20").content)))
        flipped = np.asarray(Image.open(io.BytesIO(http.get(f"{url}&viewport=40,20,10,30,-40,20").content)))

        assert small.size[1] == 50 and abs(small.size[0] - 50 * whole.shape[1] / whole.shape[0]) <= 1
        assert np.array_equal(part, whole[30:50, 10:50])
        assert np.array_equal(flipped, whole[30:50, 10:50][:, ::-1])


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, JPEG2000Lossless])
def test_frames_of_an_enhanced_ct(http, tmp_path, syntax):
    """Frame k is k HU everywhere, and so stored as 1024 + k."""
    hu = np.stack([np.full((32, 32), k, np.float32) for k in range(3)])
    identity = Identity(f"ENHANCED-{syntax}")
    path = write_enhanced(tmp_path, hu, in_syntax(syntax), identity=identity)
    assert http.post("/dicom-web/studies", **related([path.read_bytes()])).status_code == 200
    url = address((identity.study_uid, identity.series_uid, path.stem))
    frames = [np.full((32, 32), 1024 + k, "<u2").tobytes() for k in range(3)]

    parts = read_parts(http.get(f"{url}/frames/3,1"))
    picture = http.get(f"{url}/frames/2/rendered?window=1,4,linear-exact&accept=image/png")
    (instance,) = http.get(f"/dicom-web/instances?SOPInstanceUID={path.stem}").json()

    assert [content for _, content in parts] == [frames[2], frames[0]]
    assert set(np.asarray(Image.open(io.BytesIO(picture.content))).flat) == {128}
    assert [content for _, content in read_parts(http.get(f"{url}/bulkdata/7FE00010"))] == frames
    assert instance["00280008"]["Value"] == [3]
    assert instance["00083002"]["Value"] == [str(syntax)]
    assert Image.open(io.BytesIO(http.get(f"{url}/thumbnail").content)).size == (128, 128)
    answer = http.get(f"{url}/frames/4")
    assert (answer.status_code, answer.json()["type"]) == (404, "urn:keyslice:frame-not-found")
