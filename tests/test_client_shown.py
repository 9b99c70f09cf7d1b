"""What people see of the Python client: help, tables, the curves of attention; and how soon it is there."""

import inspect
import subprocess
import sys
from xml.etree import ElementTree

import httpx
from answering import ADDRESS, JOB, Line, client_of

from service.client import Keyslice
from service.client.answers import Attention, Predictions, SearchAnswer
from service.client.twofold import Call, Each


def test_it_is_quick_to_import():
    slow = ("torch", "fastapi", "pydicom", "sqlalchemy", "pyarrow", "h5py", "zarr", "lancedb", "sklearn", "xarray")
    code = f"import service.client, sys; print(sorted(set({slow}) & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"


def test_every_call_says_what_it_does_and_takes():
    client = Keyslice(ADDRESS)
    calls = [name for name, value in vars(Keyslice).items() if isinstance(value, Call | Each)]

    assert "predict" in calls
    for name in calls:
        call = getattr(client, name)
        assert call.__doc__ and "wire" not in inspect.signature(call).parameters, name
    assert str(inspect.signature(client.get_job)).startswith("(job:")


def test_the_key_is_sent_and_never_shown(monkeypatch):
    monkeypatch.setenv("KEYSLICE_API_KEY", "ks_of_the_environment")
    answers = [httpx.Response(200, json=JOB) for _ in range(3)]
    line = Line(*answers)
    for key in (None, "ks_given", ""):
        client = client_of(line, api_key=key)
        client.get_job("j1")
        assert "ks_" not in repr(client) + repr(vars(client))

    assert [request.headers.get("authorization") for request in line.asked] == [
        "Bearer ks_of_the_environment",
        "Bearer ks_given",
        None,
    ]
    assert "secret" not in repr(Keyslice("http://me:secret@keyslice.test"))


WHERE = {"series_uid": "1.2", "sop_uid": "1.2.3", "frame": None}
EXPLAINED = {
    "head_id": "h1",
    "head_name": "nodule",
    "head_version": 2,
    "encoder_id": "e",
    "window_share": {"abdomen": 0.25, "<lung>": 0.75},
    "window_share_std": {"abdomen": 0.0, "<lung>": 0.0},
    "top_slices": [{**WHERE, "slice": 1, "z_mm": 5.0, "weight": 0.6, "weight_std": 0.05}],
    "key_slices": [{**WHERE, "slice": 1, "z_mm": 5.0, "weight": 0.6, "weight_std": 0.05}],
    "faithfulness": None,
}
WEIGHTS = {("abdomen", 0): 0.1, ("abdomen", 1): 0.1, ("abdomen", 2): 0.05, ("<lung>", 0): 0.1, ("<lung>", 1): 0.5}
ATTENTION = {
    **EXPLAINED,
    "series_uid": "1.2",
    "labels": ["mass"],
    "instances": [
        {**WHERE, "slice": k, "z_mm": 5.0 * k, "window": window, "weight": weight, "weight_std": 0.0}
        for (window, k), weight in (WEIGHTS | {("<lung>", 2): 0.15}).items()
    ],
}


def test_predictions_are_a_table_and_no_label_is_markup():
    found = Predictions.model_validate(
        {
            **EXPLAINED,
            "prediction_id": "p1",
            "patient_id": "P<1>",
            "probabilities": {"<b>mass</b>": 0.72345},
            "probabilities_std": {"<b>mass</b>": 0.05},
            "series": ["1.2"],
            "bags": {},
        }
    )

    assert repr(found).splitlines() == [
        "<Predictions for P<1> by head nodule@2 (h1), 1 series>",
        "label        probability",
        "<b>mass</b>  0.723 ± 0.050",
        "top slice  z mm  attention      series",
        "1          5.0   0.600 ± 0.050  1.2",
        "attention by window: abdomen 0.25, <lung> 0.75",
    ]
    page = ElementTree.fromstring(f"<div>{found._repr_html_()}</div>")
    assert [cell.text for cell in page.iter("td")] == [
        "<b>mass</b>",
        "0.723 ± 0.050",
        "1",
        "5.0",
        "0.600 ± 0.050",
        "1.2",
    ]


def test_hits_are_a_table():
    hit = {**WHERE, "slice": 3, "z_mm": 7.5, "window": "lung", "patient_id": "P1", "score": 0.98765}
    about = {"encoder_id": "e", "index": "exact", "recall": 1.0, "effort": None, "note": None}
    found = SearchAnswer.model_validate({"hits": [hit], **about})

    assert repr(found).splitlines()[0] == "<1 similar slices by e, index exact, recall 1.00>"
    assert repr(found).splitlines()[2] == "0.9877  3      7.5   lung    P1       1.2"
    assert "<td>0.9877</td>" in found._repr_html_()


def test_attention_is_drawn_as_a_curve_per_window_with_the_key_slices_marked(tmp_path):
    client = client_of(Line(httpx.Response(200, json=ATTENTION)))

    drawing = client.plot_attention("1.2", head="nodule")

    drawing.save(tmp_path / "curves.svg")
    root = ElementTree.parse(tmp_path / "curves.svg").getroot()
    tag = "{http://www.w3.org/2000/svg}"
    curves = [
        [tuple(map(float, point.split(","))) for point in each.get("points").split()]
        for each in root.iter(f"{tag}polyline")
    ]
    # 640 px from z 0 to 10 mm, 220 px from weight 0 at the foot to 0.5, the largest.
    assert curves[0] == [(56, 204), (376, 204), (696, 226)]
    assert curves[1] == [(56, 204), (376, 28), (696, 182)]
    (mark,) = [each for each in root.iter(f"{tag}path") if each.get("class") == "key"]
    assert mark.get("d").startswith("M376.0,")
    assert [each.text for each in root.iter(f"{tag}text")][-1] == "<lung>"
    assert drawing._repr_svg_() == drawing.svg
    assert Attention.model_validate(ATTENTION).plot() == drawing


def test_a_series_of_one_slice_is_drawn_too():
    alone = {**ATTENTION, "instances": ATTENTION["instances"][:1]}
    ElementTree.fromstring(Attention.model_validate(alone).plot().svg)
