"""Explanations over HTTP: attention with its spread and faithfulness, and heat maps that a worker made."""

import io
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import torch
from archived import archived_file
from PIL import Image
from posting import slice_files
from safetensors.torch import save_file
from starlette.testclient import TestClient

from models.abmil import ABMIL, Ensemble
from models.ct.decode import read_hu
from models.ct.phantom import Identity
from models.ct.slices import encoder_input
from models.ct.windows import LUNG, apply_window
from models.encoders import i3resnet
from models.encoders.timm_import import timm
from models.heads.export import to_onnx, to_safetensors
from models.load import load_network
from models.specs import encoder_id
from models.zoo import TEST, TEST_VOLUME
from service.app import create_app
from service.overlay import overlay
from service.routes import explanations as route
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey, HeatSpot
from workers import pipeline
from workers.explanations import heat_map
from workers.resources import Resources

IDENTITY = Identity("EXPLAINED")
UID = IDENTITY.series_uid
LABELS = ["nodule", "effusion"]


@dataclass
class Place:
    http: TestClient
    worker: Resources
    head: str

    def get(self, what: str, **query: object) -> httpx.Response:
        accept = {"Accept": str(query.pop("accept", "*/*"))}
        return self.http.get(f"/v1/series/{UID}/{what}", params={"head": self.head, **query}, headers=accept)


def untrained(dim: int) -> Ensemble:
    torch.manual_seed(0)
    heads = [ABMIL(dim, 2) for _ in range(3)]
    with torch.no_grad():
        for each in heads:
            each.w.weight.mul_(10)
    return Ensemble(heads, one_of_n=False, temperature=[1.5]).eval()


def add_head(worker: Resources, encoder: str, dim: int) -> str:
    ensemble = untrained(dim)
    _, head = worker.stores.heads.add(encoder, LABELS, {}, {})
    worker.stores.heads.commit(head, to_safetensors(ensemble), to_onnx(ensemble, dim), {})
    return head


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """API and worker in this process over the same stores; there is no broker between them."""
    root = tmp_path_factory.mktemp("explanations")
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
    archive_series(worker, encoder)
    assert pipeline.embed_series(UID, encoder, worker)
    with TestClient(create_app(settings)) as http:
        yield Place(http, worker, add_head(worker, encoder, TEST.dim))
    worker.close()


def archive_series(worker: Resources, encoder: str) -> None:
    staged = worker.settings.data_dir / "staged"
    for number, (_, content) in enumerate(slice_files(IDENTITY, count=6, size=128)):
        staged.write_bytes(content)
        worker.stores.archive.add(UID, [(sop_uid(number), staged)])
    worker.stores.catalog.receive([Arrival(UID, IDENTITY.study_uid, IDENTITY.patient_id)], encoder)


def sop_uid(number: int) -> str:
    return IDENTITY.uid("slice", "1", "1", str(number))


def bag_of(place: Place) -> np.ndarray:
    row = place.worker.stores.catalog.embedding(UID, place.worker.own_encoder_id())
    return place.worker.stores.bags.get(EmbeddingKey(UID, row.encoder_id), row.content or "")


@torch.inference_mode()
def by_fold(bag: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """(probabilities (labels,), attention (slices, windows)) of each fold by itself."""
    flat = torch.from_numpy(bag.reshape(-1, bag.shape[2]).astype(np.float32))
    answers = [Ensemble([fold], one_of_n=False, temperature=[1.5]).eval()(flat) for fold in untrained(TEST.dim).heads]
    return [(p.numpy(), attention.numpy().reshape(bag.shape[:2])) for p, attention in answers]


def test_attention_is_the_mean_over_the_folds_with_their_spread(place):
    answer = place.get("attention").json()

    attention = np.array([each for _, each in by_fold(bag_of(place))])  # (folds, slices, windows)
    mean, std = attention.mean(axis=0), attention.std(axis=0, ddof=1)
    found = {(each["slice"], each["window"]): (each["weight"], each["weight_std"]) for each in answer["instances"]}
    for w, window in enumerate(("abdomen", "lung")):
        for k in range(6):
            assert found[k, window] == pytest.approx((mean[k, w], std[k, w]), abs=1e-6)
        assert answer["window_share"][window] == pytest.approx(mean[:, w].sum(), abs=1e-6)
        by_window = attention[:, :, w].sum(axis=1)
        assert answer["window_share_std"][window] == pytest.approx(by_window.std(ddof=1), abs=1e-6)
    by_slice = attention.sum(axis=2)
    best = int(by_slice.mean(axis=0).argmax())
    top = answer["top_slices"][0]
    assert (top["slice"], top["sop_uid"], top["z_mm"]) == (best, answer["instances"][2 * best]["sop_uid"], 5.0 * best)
    assert top["weight_std"] == pytest.approx(by_slice[:, best].std(ddof=1), abs=1e-6)


def test_key_slices_lie_as_far_apart_as_asked(place):
    near, far = (place.get("attention", apart_mm=mm).json()["key_slices"] for mm in (0, 12))

    assert near == place.get("attention").json()["top_slices"]
    z_mm = sorted(each["z_mm"] for each in far)
    assert far[0] == near[0] and 1 < len(far) < 5
    assert min(np.diff(z_mm)) >= 12


def test_a_patients_prediction_carries_the_same_explanation_and_its_spread(place):
    ask = {"head": place.head, "remove": 0.25, "draws": 7, "seed": 3}

    answer = place.http.get(f"/v1/patients/{IDENTITY.patient_id}/predictions", params=ask).json()

    attention = place.get("attention", remove=0.25, draws=7, seed=3).json()
    for each in ("window_share", "top_slices", "key_slices", "faithfulness"):
        assert answer[each] == attention[each]
    probabilities = np.array([each for each, _ in by_fold(bag_of(place))])
    for k, label in enumerate(LABELS):
        assert answer["probabilities"][label] == pytest.approx(probabilities[:, k].mean(), abs=1e-6)
        assert answer["probabilities_std"][label] == pytest.approx(probabilities[:, k].std(ddof=1), abs=1e-6)
        assert answer["faithfulness"]["labels"][label]["whole"] == answer["probabilities"][label]
    faithfulness = answer["faithfulness"]
    assert [faithfulness[each] for each in ("removed", "instances", "draws", "seed")] == [3, 12, 7, 3]


@pytest.mark.parametrize("bad", [{"remove": 0}, {"remove": 1}, {"draws": 0}, {"draws": 1000}, {"apart_mm": -1}])
def test_what_cannot_be_asked_is_refused(place, bad):
    assert place.get("attention", **bad).status_code == 422


def made(place: Place, slice: int, window: str, label: str) -> HeatSpot:
    row = place.worker.stores.catalog.embedding(UID, place.worker.own_encoder_id())
    spot = HeatSpot(UID, row.content or "", place.head, slice, window, label)
    heat_map(spot, place.worker)
    return spot


@pytest.mark.parametrize(("number", "window", "label"), [(0, "abdomen", "nodule"), (4, "lung", "effusion")])
def test_a_heat_map_is_of_its_slice_window_and_label(place, number, window, label):
    """Against the network itself: the change of the log-odds when one cell of the last map moves a little."""
    made(place, number, window, label)

    answer = place.get(f"slices/{number}/heatmap", window=window, label=label, accept="application/json").json()

    cells = np.array(answer["cells"])
    expected = slow_cells(place, number, ["abdomen", "lung"].index(window), LABELS.index(label))
    assert np.abs(expected).max() > 1e-6
    np.testing.assert_allclose(cells, expected, rtol=0.02, atol=0.01 * np.abs(expected).max())
    assert [answer[each] for each in ("slice", "window", "label", "method", "z_mm", "head_id")] == [
        number,
        window,
        label,
        "decomposition",
        5.0 * number,
        place.head,
    ]
    attention = np.mean([each for _, each in by_fold(bag_of(place))], axis=0)
    assert answer["weight"] == pytest.approx(attention[number, ["abdomen", "lung"].index(window)], abs=1e-6)


def slow_cells(place: Place, number: int, window: int, label: int) -> np.ndarray:
    """Each cell of the last map made a thousandth larger and smaller, through the pooling, the norm and the head."""
    bare = load_network(TEST, place.worker.settings.weights_path).double()
    path = archived_file(place.worker.stores, UID, sop_uid(number))
    picture = encoder_input(read_hu(path), TEST.windows, TEST.input_size)[window]
    mean, std = (torch.tensor(each, dtype=torch.float64)[:, None, None] for each in (TEST.mean, TEST.std))
    bag, ensemble = torch.from_numpy(bag_of(place).reshape(12, -1).astype(np.float64)), untrained(TEST.dim).double()

    def log_odds(last: torch.Tensor) -> float:
        embedding, stored = bare.network.head.norm(last.mean(dim=(0, 1))), bag[2 * number + window]
        moved = bag.clone()
        moved[2 * number + window] = stored + embedding - whole  # about what is stored, which is float16
        return float(torch.logit(ensemble(moved)[0][label]))

    with torch.no_grad():
        last = bare.network.forward_features(((torch.from_numpy(picture).double() - mean) / std)[None])[0]
        whole = bare.network.head.norm(last.mean(dim=(0, 1)))
        answer = np.empty(last.shape[:2])
        for row, column in np.ndindex(*answer.shape):
            up, down = last.clone(), last.clone()
            up[row, column] *= 1.001
            down[row, column] *= 0.999
            answer[row, column] = (log_odds(up) - log_odds(down)) / 0.002
    return answer


def test_its_picture_is_the_slice_at_the_window_with_the_cells_on_it(place):
    made(place, 2, "lung", "nodule")
    numbers = place.get("slices/2/heatmap", window="lung", label="nodule", accept="application/json").json()

    answer = place.get("slices/2/heatmap", window="lung", label="nodule", accept="image/png")

    slice = apply_window(read_hu(archived_file(place.worker.stores, UID, sop_uid(2))), LUNG)
    assert answer.headers["content-type"] == "image/png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer.content))), overlay(slice, numbers["cells"]))
    assert answer.headers["x-keyslice-method"] == "decomposition"
    assert float(answer.headers["x-keyslice-strongest"]) == pytest.approx(np.abs(numbers["cells"]).max(), rel=1e-4)
    full = place.get("slices/2/heatmap", window="lung", label="nodule", full=1000)
    assert np.ptp(np.asarray(Image.open(io.BytesIO(full.content))), axis=2).max() <= 1  # next to no colour


def test_where_unset_it_is_of_the_first_label_at_the_window_of_the_largest_weight(place):
    attention = np.mean([each for _, each in by_fold(bag_of(place))], axis=0)
    window = ["abdomen", "lung"][int(attention[3].argmax())]
    made(place, 3, window, "nodule")

    answer = place.get("slices/3/heatmap", accept="application/json").json()

    assert (answer["label"], answer["window"]) == ("nodule", window)


@pytest.mark.parametrize(
    ("number", "query", "status", "kind"),
    [
        (6, {}, 404, "slice-not-found"),
        (-1, {}, 404, "slice-not-found"),
        (0, {"label": "tumour"}, 404, "label-not-found"),
        (0, {"window": "wide"}, 404, "window-not-found"),
        (0, {"head": "nowhere"}, 404, "head-not-found"),
        (0, {"full": 0}, 422, "invalid-request"),
        (0, {"window": "lung", "label": "effusion"}, 503, "broker-down"),
    ],
)
def test_what_cannot_be_answered_says_why(place, number, query, status, kind):
    answer = place.get(f"slices/{number}/heatmap", **query)

    assert (answer.status_code, answer.json()["type"]) == (status, f"urn:keyslice:{kind}")


def test_a_head_over_whole_volumes_has_no_heat_maps(place):
    stores, weights = place.worker.stores, place.worker.settings.weights_path
    network = i3resnet.build(TEST_VOLUME.network)
    save_file(network.state_dict(), weights / f"{TEST_VOLUME.name}.safetensors")
    encoder = encoder_id(TEST_VOLUME, weights)
    stores.catalog.receive([Arrival(UID, IDENTITY.study_uid, IDENTITY.patient_id)], encoder)
    key, content = EmbeddingKey(UID, encoder), stores.archive.content(UID)[0]
    bag = np.random.default_rng(0).normal(size=(1, 1, TEST_VOLUME.dim)).astype(np.float16)
    stores.bags.put(key, content, bag, {"windows": ["wide"], "sop_uids": ["1.2.3"], "z_mm": [15.0]})
    stores.catalog.commit(key, content, 1, {"status": "accepted", "findings": []}, {})
    head = add_head(place.worker, encoder, TEST_VOLUME.dim)

    answer = place.get("slices/0/heatmap", head=head)

    assert (answer.status_code, answer.json()["type"]) == (422, "urn:keyslice:bad-query")
    assert place.get("attention", head=head).json()["faithfulness"] is None


def test_a_worker_that_does_not_come_is_waited_for_only_so_long(place, monkeypatch):
    """The message went out; nobody answers."""
    monkeypatch.setattr(route, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr("service.queue.Queue.heat_map", lambda *_: None)

    answer = place.get("slices/5/heatmap", window="lung", label="effusion")

    assert (answer.status_code, answer.json()["type"]) == (503, "urn:keyslice:workers-busy")


def test_a_heat_map_made_twice_is_the_same_and_leaves_nothing_beside_it(place):
    spot = made(place, 1, "lung", "nodule")
    first = place.worker.stores.heatmaps.get(spot)

    made(place, 1, "lung", "nodule")

    assert place.worker.stores.heatmaps.get(spot) == first
    folder = place.worker.settings.data_dir / "heatmaps" / UID
    assert all(path.suffix == ".json" and not path.name.startswith(".") for path in folder.iterdir())


def test_a_heads_report_is_a_page_that_loads_nothing(place):
    answer = place.http.get(f"/v1/heads/{place.head}/report")

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"] == "default-src 'none'; style-src 'unsafe-inline'"
    assert place.head in answer.text
    assert place.http.get("/v1/heads/nowhere/report").status_code == 404


def test_a_head_that_an_earlier_version_stored_is_to_be_trained_again(place):
    stores = place.worker.stores
    program = torch.onnx.export(untrained(TEST.dim), (torch.zeros(4, TEST.dim),), input_names=["bag"], verbose=False)
    _, head = stores.heads.add(place.worker.own_encoder_id(), LABELS, {}, {})
    stores.heads.commit(head, b"", program.model_proto.SerializeToString(), {})

    answer = place.get("attention", head=head)

    assert (answer.status_code, answer.json()["type"]) == (409, "urn:keyslice:head-not-ready")
    assert "train it again" in answer.json()["detail"]
