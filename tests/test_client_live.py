"""The Python client against a running service, by both ways of waiting: upload, wait, embeddings, train, and on."""

import ast
import asyncio
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from posting import slice_files, tarred
from serving import keys_of, serving, settings_of

from models.ct.phantom import Identity
from service import errors
from service.client import Keyslice
from service.schemas.heads import Head

ROOT = Path(__file__).resolve().parent.parent
PATIENTS = 4


@dataclass
class Way:
    """A client, and how its calls are made."""

    name: str
    client: Keyslice
    call: Callable[..., Any]
    each: Callable[..., list[Any]]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module", params=["blocking", "awaited"])
def way(request: pytest.FixtureRequest, service, runner: asyncio.Runner) -> Iterator[Way]:
    client = Keyslice(service.address)

    async def listed(bound: Any, *arguments: Any, **options: Any) -> list[Any]:
        return [item async for item in bound.aio(*arguments, **options)]

    if request.param == "blocking":
        yield Way("BLOCKING", client, lambda bound, *a, **k: bound(*a, **k), lambda bound, *a, **k: [*bound(*a, **k)])
        client.close()
    else:
        yield Way(
            "AWAITED",
            client,
            lambda bound, *a, **k: runner.run(bound.aio(*a, **k)),
            lambda bound, *a, **k: runner.run(listed(bound, *a, **k)),
        )
        runner.run(client.aclose())


def identity(way: Way, number: int) -> Identity:
    return Identity(f"CLIENT-{way.name}-{number}")


@pytest.fixture(scope="module")
def cohort(way: Way, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a table of labels, and of a folder of folders, one per patient, uploaded at once."""
    root = tmp_path_factory.mktemp("cohort")
    lines = ["patient_id,odd"]
    for number in range(PATIENTS):
        (root / "ct" / str(number)).mkdir(parents=True)
        for name, content in slice_files(identity(way, number), count=2, seed=number):
            (root / "ct" / str(number) / name).write_bytes(content)
        lines.append(f"{identity(way, number).patient_id},{number % 2}")
    (root / "ct" / "notes.txt").write_text("no DICOM")
    (root / "labels.csv").write_text("\n".join(lines))
    received = way.call(way.client.upload, root / "ct")
    assert {each.series_uid for each in received.series} == {identity(way, k).series_uid for k in range(PATIENTS)}
    assert [each.file for each in received.set_aside] == ["notes.txt"]
    assert way.call(way.client.wait, received, timeout=120).state == "done"
    return root


@pytest.fixture(scope="module")
def head(way: Way, cohort: Path) -> Head:
    accepted = way.call(
        way.client.train, cohort / "labels.csv", folds=2, epochs=1, permutations=0, hidden=8, attention=4
    )
    seen = []
    way.call(way.client.wait, accepted, progress=seen.append, timeout=120)
    assert (seen[-1].kind, seen[-1].state) == ("train", "done")
    return way.call(way.client.get_head, accepted)


def test_embeddings_are_the_services_own_with_their_coordinates(way, cohort, http):
    uid = identity(way, 0).series_uid
    told = http.get(f"/v1/series/{uid}/embeddings").json()

    whole = way.call(way.client.embeddings, uid)
    lung = way.call(way.client.embeddings_xarray, uid, window="lung")
    labelled = way.call(way.client.embeddings_xarray, uid)

    assert whole.dtype == np.float16
    assert np.array_equal(whole, np.array(told["embeddings"], np.float16))
    assert np.array_equal(labelled.values, whole) and labelled.dims == ("slice", "window", "dim")
    assert np.array_equal(labelled.sel(window="lung").values, whole[:, 1])
    assert np.array_equal(lung.values, whole[:, 1:])
    assert [*labelled.window.values] == told["windows"]
    assert [*labelled.slice.values] == [0, 1]
    for name in ("z_mm", "sop_uid"):
        assert [*labelled[name].values] == [each[name] for each in told["slices"]]
    assert labelled.attrs == {"series_uid": uid, "encoder_id": told["encoder_id"], "receipt": told["receipt"]}


def test_a_head_predicts_attends_and_is_drawn(way, cohort, head, http):
    who, uid = identity(way, 1).patient_id, identity(way, 1).series_uid

    found = way.call(way.client.predict, who, head=head, draws=3, remove=0.3)
    again = way.call(way.client.get_prediction, found.prediction_id)
    attention = way.call(way.client.attention, uid, head=head.head_id)
    drawing = way.call(way.client.plot_attention, uid, head=head)

    assert found.model_dump(mode="json") == http.get(f"/v1/predictions/{found.prediction_id}").json()
    assert again == found and found.series == [uid] and found.faithfulness.draws == 3
    assert attention.model_dump(mode="json") == http.get(f"/v1/series/{uid}/attention?head={head.head_id}").json()
    assert drawing.svg.count("<polyline") == 2
    assert f"odd    {found.probabilities['odd']:.3f}" in repr(found)


def test_a_heads_name_is_promoted_compared_and_listed(way, head):
    assert head.promoted and head.report
    assert head.head_id in [each.head_id for each in way.each(way.client.heads)]
    assert way.call(way.client.promote, head).promoted
    comparison = way.call(way.client.compare, head, head)
    assert comparison.labels["odd"].auroc.difference == 0


def test_similar_slices_and_series_are_found(way, cohort):
    uid = identity(way, 2).series_uid
    own = {"patient_id": [identity(way, k).patient_id for k in range(PATIENTS)]}
    vector = way.call(way.client.embeddings, uid)[0, 1]
    encoder = way.call(way.client.embeddings_xarray, uid).attrs["encoder_id"]

    by_slice = way.call(way.client.similar, uid, 0, "lung", k=3, filters=own)
    others = way.call(way.client.similar, uid, 0, "lung", k=3, exclude="patient", filters=own)
    by_vector = way.call(way.client.similar, vector=vector, encoder=encoder, window="lung", k=3, filters=own)
    series = way.call(way.client.similar_series, uid, k=2, filters=own)
    sent = way.call(way.client.similar_image, cohort / "ct" / "2" / "0.dcm", match="fused", k=1, filters=own)

    assert (by_slice.hits[0].series_uid, by_slice.hits[0].slice) == (uid, 0)
    assert [hit.sop_uid for hit in by_vector.hits] == [hit.sop_uid for hit in by_slice.hits]
    assert (sent.hits[0].series_uid, sent.hits[0].slice) == (uid, 0)
    assert uid not in {hit.series_uid for hit in others.hits} and len(others.hits) == 3
    assert uid not in {hit.series_uid for hit in series.hits} and len(series.hits) == 2


def test_series_are_listed_and_tagged(way, cohort):
    patient = identity(way, 3)
    (found,) = way.each(way.client.series, patient_id=patient.patient_id)
    assert found == way.call(way.client.get_series, patient.series_uid)
    assert (found.state, found.geometry.slices) == ("indexed", 2)
    assert way.call(way.client.set_tags, patient.series_uid, ["pilot"]) == ["pilot"]
    assert way.call(way.client.tags, patient.series_uid) == ["pilot"]


def test_a_cohorts_features_are_written(way, cohort, tmp_path):
    import pyarrow.parquet as pq

    uids = sorted(identity(way, k).series_uid for k in range(2))
    seen = []
    said = way.call(way.client.features, tmp_path / "two.parquet", series_uid=uids, window="lung", progress=seen.append)
    assert (said["series"], said["slices"], said["windows"], said["bytes"]) == (2, 4, ["lung"], seen[-1])
    assert pq.read_table(tmp_path / "two.parquet")["series_uid"].to_pylist() == [uids[0]] * 2 + [uids[1]] * 2


def test_the_same_again_and_an_archive_of_it_change_nothing(way, cohort, tmp_path):
    files = slice_files(identity(way, 0), count=2, seed=0)
    (tmp_path / "same.tar").write_bytes(tarred(files))
    seen = []

    again = way.call(
        way.client.upload, [cohort / "ct" / "0", tmp_path / "same.tar"], progress=lambda *told: seen.append(told)
    )

    assert [(each.received, each.duplicates, each.state) for each in again.series] == [(0, 4, "indexed")]
    size = (tmp_path / "same.tar").stat().st_size + sum(len(content) for _, content in files)
    assert seen[-1] == (size, size)


def test_an_export_is_embedded_and_told(way, export_root, tmp_path):
    patient = identity(way, 90)
    (export_root / way.name).mkdir()
    for name, content in slice_files(patient, count=1):
        (export_root / way.name / name).write_bytes(content)

    accepted = way.call(way.client.export, str(export_root / way.name))
    way.call(way.client.wait, accepted, timeout=120)
    found = way.call(way.client.get_export, accepted.export_id)
    way.call(way.client.export_table, accepted.export_id, tmp_path / "series.csv")

    assert [(each.series_uid, each.state) for each in found.series] == [(patient.series_uid, "embedded")]
    assert accepted.export_id in [each.export_id for each in way.each(way.client.exports)]
    assert (tmp_path / "series.csv").read_text().splitlines()[1].startswith(f"{patient.series_uid},embedded,1,1,")


def test_a_job_is_told_until_it_ends_and_a_series_can_be_erased(way, tmp_path):
    patient = identity(way, 91)
    for name, content in slice_files(patient, count=2):
        (tmp_path / name).write_bytes(content)

    received = way.call(way.client.upload, tmp_path)
    told = way.each(way.client.events, received)
    ended = way.call(way.client.get_job, received), way.call(way.client.cancel, received)
    receipt = way.call(way.client.erase_series, patient.series_uid)

    assert (told[-1].state, told[-1].done) == ("done", 2)
    assert ended == (told[-1], told[-1])
    assert receipt.series == 1
    with pytest.raises(errors.SeriesNotFound):
        way.call(way.client.erase_series, patient.series_uid)


def test_what_is_not_wrapped_is_asked_by_request(way, cohort):
    answer = way.call(
        way.client.request, "GET", f"/v1/series/{identity(way, 0).series_uid}/slices/0/image", params={"window": "lung"}
    )
    assert answer.content.startswith(b"\x89PNG")
    assert any(each.default for each in way.call(way.client.encoders))


@pytest.mark.parametrize(
    ("error", "status", "ask"),
    [
        (errors.SeriesNotFound, 404, lambda client: (client.get_series, "1.2.3.4.5")),
        (errors.JobNotFound, 404, lambda client: (client.wait, "nowhere")),
        (errors.HeadNotFound, 404, lambda client: (client.get_head, "nobody")),
        (errors.BadRequest, 422, lambda client: (client.similar, "1.2", 0)),
        (errors.BadLabels, 422, lambda client: (client.train, b"nothing")),
        (errors.PathNotAllowed, 403, lambda client: (client.export, "/etc")),
        (errors.NothingUsable, 422, lambda client: (client.upload, __file__)),
    ],
)
def test_refusals_are_errors_of_the_tree(way, error, status, ask):
    with pytest.raises(error) as raised:
        way.call(*ask(way.client))
    assert raised.value.found["status"] == status


def test_keys_are_needed_where_they_are_and_scopes_too(runner, tmp_path):
    settings = settings_of(tmp_path, weights_dir=tmp_path / "weights")
    key = keys_of(settings).create("reader", ["read"], None)[1]
    (tmp_path / "large.zip").write_bytes(b"PK" + bytes(8 * 2**20))
    with serving(settings, port=0) as server:
        port = server.servers[0].sockets[0].getsockname()[1]
        stranger = Keyslice(f"http://127.0.0.1:{port}", api_key="ks_wrong")
        reader = Keyslice(f"http://127.0.0.1:{port}", api_key=key)
        with pytest.raises(errors.Unauthenticated):
            [*stranger.series()]
        with pytest.raises(errors.Unauthenticated):  # told while the body is still on its way
            stranger.upload(tmp_path / "large.zip")
        with pytest.raises(errors.ScopeMissing) as raised:
            runner.run(reader.upload.aio(tmp_path / "large.zip"))
        assert ([*reader.series()], raised.value.found["needed"]) == ([], ["write"])
        runner.run(reader.aclose())
        stranger.close()


def test_the_tutorial_runs(service, tmp_path, monkeypatch):
    (tmp_path / "ct").mkdir()
    lines = ["patient_id,nodule"]
    for number in range(PATIENTS):
        patient = Identity(f"TUTORIAL-{number}")
        (tmp_path / "ct" / f"{number}.tar").write_bytes(tarred(slice_files(patient, count=2, seed=number)))
        lines.append(f"{patient.patient_id},{number % 2}")
    (tmp_path / "labels.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/client.md").read_text()
    names: dict[str, Any] = {}

    with asyncio.Runner() as runner:
        for lines in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
            code = compile(
                lines.replace("http://127.0.0.1:8000", service.address),
                "docs/client.md",
                "exec",
                flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,  # as notebooks do
            )
            if waiting := eval(code, names):
                runner.run(waiting)

    assert names["bag"].shape == (2, 2, 1280)
    assert set(names["found"].probabilities) == {"nodule"}
    assert (tmp_path / "curves.svg").read_text().startswith("<svg")
    assert [*names["other"].probabilities] == ["nodule"]
    assert len(names["hits"]) == 5
