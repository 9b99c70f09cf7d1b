"""A multi-frame series on the whole way: embedded frame by frame, and every answer says which frame a slice is."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from enhanced import groups, in_syntax, write_enhanced
from PIL import Image
from pydicom.uid import RLELossless
from safetensors.torch import save_file
from starlette.testclient import TestClient
from synthetic import random_hu, write_ct

from models.abmil import ABMIL, Ensemble
from models.ct.phantom import Identity
from models.ct.windows import LUNG, apply_window
from models.encoders.timm_import import timm
from models.heads.export import to_onnx, to_safetensors
from models.specs import encoder_id
from models.zoo import TEST
from service import indexing
from service.app import create_app
from service.intake import take_in
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey, HeatSpot
from service.storage.stores import Stores
from service.uploads import StagedFile
from workers import pipeline
from workers.explanations import heat_map
from workers.resources import Resources

FRAMES, SINGLES = Identity("FRAMES"), Identity("SINGLES")
Z_MM = [10.0, 0.0, 20.0, 15.0, 5.0, 25.0]  # of the frames, in the order of the file
ORDER = [int(k) for k in np.argsort(Z_MM)]  # of the frames, feet to head
HU = random_hu(slices=len(Z_MM))


@dataclass
class Place:
    http: TestClient
    worker: Resources
    encoder: str
    head: str


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A multi-frame series whose last frame is a localizer, and its twin in files of one slice."""
    root = tmp_path_factory.mktemp("frames")
    settings = Settings(
        data_dir=root / "data",
        weights_dir=root / "weights",
        encoder="test_mambaout",
        broker_url="redis://127.0.0.1:9/0",
        sweep_seconds=3600,
    )
    settings.weights_path.mkdir()
    torch.manual_seed(0)
    save_file(timm.create_model("test_mambaout").state_dict(), settings.weights_path / "test_mambaout.safetensors")
    worker = Resources(settings)
    encoder = encoder_id(TEST, settings.weights_path)

    def localizer(dataset: pydicom.FileDataset) -> None:
        kind = {"FrameType": ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]}
        last = dataset.PerFrameFunctionalGroupsSequence[-1]
        last.CTImageFrameTypeSequence = groups(CTImageFrameTypeSequence=kind).CTImageFrameTypeSequence
        in_syntax(RLELossless)(dataset)

    hu = np.concatenate([HU, HU[:1]])
    archive(worker, FRAMES, [write_enhanced(root, hu, localizer, z_mm=[*Z_MM, 40.0], identity=FRAMES)])
    archive(worker, SINGLES, write_ct(root / "singles", HU[ORDER], identity=SINGLES))
    for identity in (FRAMES, SINGLES):
        worker.stores.catalog.receive([Arrival(identity.series_uid, identity.study_uid, identity.patient_id)], encoder)
        assert pipeline.embed_series(identity.series_uid, encoder, worker)
    indexing.index_bags(worker.stores, settings, worker.holder)
    ensemble = Ensemble([ABMIL(TEST.dim, 1)], one_of_n=False, temperature=[1.0]).eval()
    _, head = worker.stores.heads.add(encoder, ["nodule"], {}, {})
    worker.stores.heads.commit(head, to_safetensors(ensemble), to_onnx(ensemble, TEST.dim), {})
    with TestClient(create_app(settings)) as http:
        yield Place(http, worker, encoder, head)
    worker.close()


def archive(worker: Resources, identity: Identity, paths) -> None:
    for path in paths:
        worker.stores.archive.add(identity.series_uid, [(str(pydicom.dcmread(path).SOPInstanceUID), path)])


def bag(stores: Stores, identity: Identity, encoder: str) -> np.ndarray:
    row = stores.catalog.embedding(identity.series_uid, encoder)
    return stores.bags.get(EmbeddingKey(identity.series_uid, encoder), row.content)


def test_frames_embed_as_the_same_slices_in_files_of_their_own(place):
    frames, singles = (bag(place.worker.stores, each, place.encoder) for each in (FRAMES, SINGLES))

    assert frames.shape == (6, 2, TEST.dim)
    np.testing.assert_allclose(frames.astype(float), singles.astype(float), rtol=1e-2, atol=2e-3)
    answer = place.http.get(f"/v1/series/{FRAMES.series_uid}/embeddings").json()
    assert [each["frame"] for each in answer["slices"]] == [k + 1 for k in ORDER]
    assert [each["z_mm"] for each in answer["slices"]] == sorted(Z_MM)
    assert len({each["sop_uid"] for each in answer["slices"]}) == 1
    twin = place.http.get(f"/v1/series/{SINGLES.series_uid}/embeddings").json()
    assert [each["frame"] for each in twin["slices"]] == [None] * 6


def test_a_frame_set_aside_is_named_with_its_number_and_reason(place):
    series = place.http.get(f"/v1/series/{FRAMES.series_uid}").json()

    assert series["received"] == 1
    assert series["geometry"]["slices"] == 6
    assert series["embeddings"][0]["slices"] == 6
    assert [(each["frame"], each["reason"]) for each in series["verdict"]["set_aside"]] == [(7, "localizer")]


@pytest.mark.parametrize("slice_number", range(6))
def test_a_picture_is_of_the_frame_that_its_slice_is(place, slice_number):
    url = f"/v1/series/{FRAMES.series_uid}/slices/{slice_number}/image"
    answer = place.http.get(url, params={"window": "lung"})

    seen = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(seen, np.round(apply_window(HU[ORDER[slice_number]].copy(), LUNG) * 255))


def test_hits_say_which_frame_they_are(place):
    query = {"series_uid": SINGLES.series_uid, "slice": 2, "window": "lung", "k": 1, "exclude": "series"}

    (hit,) = place.http.post("/v1/search", json=query).json()["hits"]

    assert (hit["series_uid"], hit["slice"], hit["frame"]) == (FRAMES.series_uid, 2, ORDER[2] + 1)
    assert hit["score"] > 0.9999


def test_attention_and_heat_map_say_which_frame_they_are_of(place):
    uid, frame = FRAMES.series_uid, ORDER[3] + 1
    content = place.worker.stores.catalog.embedding(uid, place.encoder).content
    heat_map(HeatSpot(uid, content, place.head, 3, "lung", "nodule"), place.worker)
    attention = place.http.get(f"/v1/series/{uid}/attention", params={"head": place.head}).json()
    url, query = f"/v1/series/{uid}/slices/3/heatmap", {"head": place.head, "window": "lung"}

    numbers = place.http.get(url, params=query, headers={"Accept": "application/json"}).json()
    picture = place.http.get(url, params=query)

    assert numbers["frame"] == frame
    assert Image.open(io.BytesIO(picture.content)).size == (32, 32)
    assert [each["frame"] for each in attention["instances"][::2]] == [k + 1 for k in ORDER]


def test_what_leaves_as_dicom_names_the_frames(place):
    top = place.http.get(f"/v1/series/{FRAMES.series_uid}/attention", params={"head": place.head}).json()["top_slices"]
    found = place.http.get(f"/v1/series/{FRAMES.series_uid}/key-objects", params={"head": place.head})
    report = place.http.get(f"/v1/series/{FRAMES.series_uid}/report", params={"head": place.head})

    document = pydicom.dcmread(io.BytesIO(found.content))
    images = [item.ReferencedSOPSequence[0] for item in document.ContentSequence if item.ValueType == "IMAGE"]
    assert [int(each.ReferencedFrameNumber) for each in images] == [each["frame"] for each in top]
    assert report.status_code == 200


def arrived(place: Place, folder: Path, contents: list[bytes]) -> dict:
    """What the API says of the series in these files once a worker has embedded it."""
    files = [StagedFile(folder / f"part-{k}", f"file-{k}") for k in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.path.write_bytes(content)
    (series,) = take_in(files, folder, place.encoder, place.worker.stores, place.worker.settings).series
    assert (series.received, series.set_aside) == (len(contents), [])
    assert pipeline.embed_series(series.series_uid, place.encoder, place.worker)
    return place.http.get(f"/v1/series/{series.series_uid}").json()


def test_a_hundred_frames_come_in_as_one_instance(place, tmp_path):
    identity = Identity("HUNDRED-FRAMES")
    path = write_enhanced(tmp_path / "made", random_hu(slices=100), in_syntax(RLELossless), identity=identity)

    series = arrived(place, tmp_path, [path.read_bytes()])

    assert (series["received"], series["embeddings"][0]["slices"]) == (1, 100)
    assert series["verdict"]["status"] == "accepted"
    slices = place.http.get(f"/v1/series/{identity.series_uid}/embeddings").json()["slices"]
    assert [each["frame"] for each in slices] == [*range(1, 101)]


def test_the_real_multi_frame_files_are_embedded(place, data, tmp_path):
    names = ["pydicom/eCT_Supplemental.dcm", "cornerstone/CT0012.fragmented_no_bot_jpeg_baseline.51.dcm"]

    series = arrived(place, tmp_path, [(data / "oddities" / name).read_bytes() for name in names])

    # both say the same series and differ in their SOPInstanceUIDs; their frames lie at the same two positions
    assert (series["received"], series["geometry"]["slices"]) == (2, 2)
    assert {each["reason"] for each in series["verdict"]["set_aside"]} == {"duplicate_position"}
    assert sorted(each["frame"] for each in series["verdict"]["set_aside"]) == [1, 2]
