"""What the Python client sends, and how it reads what comes piece by piece."""

import json

import httpx
import pytest
from answering import ACCEPTED, JOB, Line, client_of, refusal

from service import errors


def test_labels_come_as_a_file_bytes_or_a_table(tmp_path):
    import pandas as pd

    (tmp_path / "labels.csv").write_text("patient_id,mass\nP1,1\n")
    table = pd.DataFrame({"patient_id": ["P1"], "mass": [1]})
    line = Line(*[httpx.Response(202, json=ACCEPTED)] * 4)

    for labels in (tmp_path / "labels.csv", str(tmp_path / "labels.csv"), b"patient_id,mass\nP1,1\n", table):
        client_of(line).train(labels, baselines=["mean", "max"], temperature_scaling=False, learning_rate=1e-3)

    for request in line.asked:
        body = request.read().decode()
        assert "\r\n\r\npatient_id,mass\nP1,1\n\r\n" in body
        assert body.count('name="baselines"') == 2 and "\r\n\r\nfalse\r\n" in body


def test_vectors_and_schemas_are_sent_as_json():
    import numpy as np

    from service.schemas.search import Filters, SliceQuery

    about = {"encoder_id": "e", "index": "exact", "recall": 1.0, "effort": None, "note": None}
    line = Line(*[httpx.Response(200, json={"hits": [], **about})] * 2)
    client_of(line).similar(vector=np.array([0.5, 1], np.float16), encoder="e", filters=Filters(body_part=["CHEST"]))
    client_of(line).similar(slices=[SliceQuery(series_uid="1.2", slice=3)], match="any", filters={"tags": "x"})

    assert [json.loads(request.read()) for request in line.asked] == [
        {"vector": [0.5, 1.0], "encoder": "e", "filters": {"body_part": ["CHEST"]}},
        {"slices": [{"series_uid": "1.2", "slice": 3}], "match": "any", "filters": {"tags": "x"}},
    ]


def test_names_in_paths_stay_names():
    line = Line(refusal(404, "patient-not-found"))
    with pytest.raises(errors.PatientNotFound):
        client_of(line).predict("A/B?x#%2F", head="n@2")
    assert line.asked[0].url.raw_path == b"/v1/patients/A%2FB%3Fx%23%252F/predictions?head=n%402"


def test_events_are_read_whatever_pieces_they_come_in():
    told = [json.dumps(JOB | {"done": k, "state": "done" if k == 2 else "running"}) for k in range(3)]
    body = "".join(f": ping\r\n\r\nevent: job\r\ndata: {each}\r\n\r\n" for each in told).encode()

    class Torn(httpx.SyncByteStream):
        def __iter__(self):
            yield from (body[k : k + 7] for k in range(0, len(body), 7))

    line = Line(httpx.Response(200, stream=Torn()))
    assert [job.done for job in client_of(line).events("j1")] == [0, 1, 2]


def test_a_file_is_whole_or_not_there(tmp_path):
    class Broken(httpx.SyncByteStream):
        def __iter__(self):
            yield b"PAR1"
            raise httpx.RemoteProtocolError("peer closed connection")

    said = {"X-Keyslice-Series": "1", "X-Keyslice-Slices": "1", "X-Keyslice-Encoder": "e", "X-Keyslice-Windows": "w"}
    target = tmp_path / "cohort.parquet"
    with pytest.raises(errors.ServiceAway, match="broke off"):
        client_of(Line(httpx.Response(200, stream=Broken(), headers=said))).features(target)
    assert [*tmp_path.iterdir()] == []
    with pytest.raises(errors.BadQuery, match="says no format"):
        client_of(Line()).features(tmp_path / "cohort.csv")
