"""Every call of the Python client against the OpenAPI of the live service: path, parameters, body, answer."""

import inspect
import json
import re
from email import message_from_bytes
from email.policy import HTTP
from typing import get_args, get_type_hints

import httpx
import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel

from service.client import Keyslice
from service.client.asked import Cohort, Explaining, Searching, SearchingImage, SearchingSeries, Training
from service.client.twofold import Call, Each
from service.routes.predictions import Asked
from service.schemas.features import EmbeddedQuery
from service.schemas.search import ImageSearchRequest, SearchRequest, SeriesSearchRequest
from service.schemas.training import HeadTraining

ASKED = {"remove": 0.1, "draws": 5, "seed": 1, "apart_mm": 10.0}
FILTERS = {"body_part": "CHEST", "spacing_to_mm": 5.0}
TRAINING = {
    "name": "nodule",
    "encoder": "e",
    "task": "binary",
    "network": "mean",
    "protocol": "nested",
    "folds": 3,
    "inner_folds": 2,
    "epochs": 1,
    "patience": 1,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "dropout": 0.1,
    "hidden": 8,
    "attention": 4,
    "temperature_scaling": False,
    "specificity": 0.8,
    "baselines": ["mean", "probe"],
    "permutations": 0,
    "splits_of": "h",
    "seed": 2,
}
COHORT = {
    "patient_id": ["P1", "P2"],
    "study_uid": "1.2",
    "series_uid": ["1.2.3"],
    "date_from": "2001-01-31",
    "date_to": "20010201",
    "modality": "CT",
    "body_part": "CHEST",
    "manufacturer": "GE",
    "kernel": "STD",
    "verdict": "accepted",
    "encoder": "e",
    "window": ["lung"],
    "patients": "id",
}
SLICES = [{"series_uid": "1.2", "slice": 1, "window": "lung"}]
SEARCH = {"k": 3, "match": "any", "collapse": "series", "exclude": "patient", "filters": FILTERS, "exact": True}

IMAGE_SEARCH = {"window": "lung", "k": 3, "match": "any", "collapse": "series", "filters": FILTERS, "exact": True}

# Of each call, all that it can be given.
EXAMPLES: dict[str, list[tuple[tuple, dict]]] = {
    "request": [(("GET", "/v1/series"), {"params": {"limit": 1}})],
    "upload": [((__file__,), {"encoder": "e", "patient_id": "P1"})],
    "complete": [(("1.2",), {})],
    "series": [((), {"patient_id": "P1", "study_uid": "1.2", "state": "indexed"})],
    "get_series": [(("1.2",), {})],
    "tags": [(("1.2",), {})],
    "set_tags": [(("1.2", ["a", "b"]), {})],
    "erase_series": [(("1.2",), {})],
    "erase_patient": [(("P/1",), {})],
    "get_job": [(("j",), {})],
    "wait": [(("j",), {})],
    "events": [(("j",), {})],
    "cancel": [(("j",), {})],
    "embeddings": [(("1.2",), {"encoder": "e", "window": "lung"})],
    "embeddings_xarray": [(("1.2",), {"encoder": "e", "window": "lung"})],
    "features": [(("cohort.arrows",), COHORT)],
    "encoders": [((), {})],
    "train": [((b"patient_id,x\n",), TRAINING)],
    "heads": [((), {})],
    "get_head": [(("n@2",), {})],
    "promote": [(("n@2",), {})],
    "compare": [(("a", "b"), {})],
    "predict": [(("P/1",), {"head": "h", "series_uid": "1.2", "study_uid": "1", **ASKED})],
    "get_prediction": [(("p",), {})],
    "attention": [(("1.2",), {"head": "h", **ASKED})],
    "plot_attention": [(("1.2",), {"head": "h", **ASKED})],
    "similar": [
        (("1.2", 3, "lung"), SEARCH),
        ((), {"slices": SLICES, "combine": "mean", "encoder": "e"}),
        ((), {"vector": [1.0, 0.0], "encoder": "e", "window": "lung"}),
    ],
    "similar_image": [((b"DICM",), {"encoder": "e", **IMAGE_SEARCH})],
    "similar_series": [
        (
            ("1.2",),
            {
                "by": "attention",
                "head": "h",
                "encoder": "e",
                "k": 3,
                "shortlist": 9,
                "exclude": "study",
                "filters": FILTERS,
            },
        )
    ],
    "export": [
        (("/mnt/pacs",), {"encoder": "e", "dry_run": True}),
        (("dicomweb+https://pacs.test/",), {"query": {"patient_id": "P1"}}),
        (("dicomweb+https://pacs.test/",), {"queries": "patient_id\nP1\n"}),
    ],
    "exports": [((), {})],
    "get_export": [(("x",), {})],
    "export_table": [(("x", "series.csv"), {})],
}
CALLS = {name: value for name, value in vars(Keyslice).items() if isinstance(value, Call | Each)}
FORMS = ("upload", "train", "similar_image")
BINARY = {"embeddings", "embeddings_xarray", "features", "events", "export_table", "request", "wait", "plot_attention"}


class Caught(Exception):
    """A request, which goes no further."""

    def __init__(self, request: httpx.Request) -> None:
        self.request = request
        request.read()


def catch(request: httpx.Request) -> httpx.Response:
    raise Caught(request)


def caught(name: str, arguments: tuple, options: dict) -> httpx.Request:
    bound = getattr(Keyslice("http://keyslice.test", transport=httpx.MockTransport(catch)), name)
    with pytest.raises(Caught) as raised:
        answer = bound(*arguments, **options)
        next(answer)
    return raised.value.request


@pytest.fixture(scope="module")
def openapi(http) -> dict:
    return http.get("/openapi.json").raise_for_status().json()


@pytest.fixture(scope="module")
def validator(openapi) -> Draft202012Validator:
    """Which finds what a schema refers to."""
    return Draft202012Validator(openapi)


def operation(openapi: dict, request: httpx.Request) -> dict:
    """What the service says of the call that is asked for; of two paths that fit, the more literal one."""
    path = request.url.raw_path.decode().split("?")[0]
    fitting = [template for template in openapi["paths"] if re.fullmatch(re.sub(r"\{.*?\}", "[^/]+", template), path)]
    template = min(fitting, key=lambda template: template.count("{"))
    return openapi["paths"][template][request.method.lower()]


def faults(validator: Draft202012Validator, schema: dict, value) -> list[str]:
    return [error.message for error in validator.evolve(schema=schema).iter_errors(value)]


def fits_as_text(validator: Draft202012Validator, schema: dict, texts: list[str]) -> bool:
    """A query or form has nothing but text: a number is one that JSON reads as one, a list is repeated."""

    def read(text: str):
        try:
            return json.loads(text)
        except ValueError:
            return text

    several = [texts, [read(text) for text in texts]]
    single = [texts[0], read(texts[0])] if len(texts) == 1 else []
    return any(not faults(validator, schema, value) for value in [*single, *several])


def of_name(pairs: list[tuple[str, str]]) -> dict[str, list[str]]:
    return {name: [value for each, value in pairs if each == name] for name, _ in pairs}


def form(request: httpx.Request) -> dict[str, list[str]]:
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    parts = message_from_bytes(head + request.content, policy=HTTP).iter_parts()
    return of_name([(part.get_param("name", header="content-disposition"), part.get_content()) for part in parts])


def test_the_query_beside_an_image_is_as_the_schema_has_it():
    (query,) = form(caught("similar_image", *EXAMPLES["similar_image"][0]))["query"]
    assert ImageSearchRequest.model_validate_json(query) == ImageSearchRequest.model_validate(IMAGE_SEARCH)


def test_every_call_has_an_example():
    assert set(EXAMPLES) == set(CALLS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_call_is_one_that_the_service_has(openapi, validator, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, options in EXAMPLES[name]:
        request = caught(name, arguments, options)
        offered = operation(openapi, request)
        known = {each["name"]: each for each in offered.get("parameters", []) if each["in"] == "query"}
        given = of_name(request.url.params.multi_items())

        assert set(given) <= set(known)
        assert {each for each, parameter in known.items() if parameter.get("required")} <= set(given)
        for each, texts in given.items():
            assert fits_as_text(validator, known[each]["schema"], texts), (each, texts)


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in {"request", *FORMS}])
def test_a_body_is_as_the_schema_has_it(openapi, validator, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, options in EXAMPLES[name]:
        request = caught(name, arguments, options)
        expected = operation(openapi, request).get("requestBody")
        assert (expected is None) == (request.content == b"")
        if expected:
            schema = expected["content"]["application/json"]["schema"]
            assert faults(validator, schema, json.loads(request.content)) == []


@pytest.mark.parametrize("name", FORMS)
def test_a_form_is_as_the_schema_has_it(openapi, validator, name):
    ((arguments, options),) = EXAMPLES[name]
    request = caught(name, arguments, options)
    schema = operation(openapi, request)["requestBody"]["content"]["multipart/form-data"]["schema"]
    schema = openapi["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]] if "$ref" in schema else schema
    fields = form(request)

    assert set(schema["required"]) <= set(fields) <= set(schema["properties"])
    for each in set(fields) - {"files", "labels", "file"}:
        assert fits_as_text(validator, schema["properties"][each], fields[each]), each


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in BINARY])
def test_an_answer_is_read_as_what_the_service_says_it_is(openapi, name):
    arguments, options = EXAMPLES[name][0]
    answers = operation(openapi, caught(name, arguments, options))["responses"]
    (good,) = [answer for status, answer in answers.items() if status.startswith("2")]
    said = good["content"]["application/json"]["schema"]
    named = said["$ref"].rsplit("/", 1)[1]

    found = get_type_hints(CALLS[name].run)["return"]

    if isinstance(found, type) and issubclass(found, BaseModel):
        assert found.__name__ == named
    else:  # item by item of a page
        item = get_args(found)[0]
        fields = openapi["components"]["schemas"][named]["properties"].values()
        listed = [each["items"] for each in fields if "items" in each]
        named_items = {each.get("$ref", "/str").rsplit("/", 1)[1] for each in listed}
        assert item.__name__ in named_items


@pytest.mark.parametrize("name", ["embeddings", "embeddings_xarray"])
def test_arrays_are_asked_for_as_what_the_service_has(openapi, name):
    request = caught(name, *EXAMPLES[name][0])
    assert request.headers["accept"] in operation(openapi, request)["responses"]["200"]["content"]


@pytest.mark.parametrize(
    ("options", "schema", "others"),
    [
        (Explaining, Asked, set()),
        (Training, HeadTraining, {"labels"}),
        (Searching, SearchRequest, {"series_uid", "slice", "window"}),
        (SearchingImage, ImageSearchRequest, set()),
        (SearchingSeries, SeriesSearchRequest, {"series_uid"}),
        (Cohort, EmbeddedQuery, set()),
    ],
)
def test_options_are_those_of_the_service(options, schema, others):
    assert set(options.__annotations__) | others == set(schema.model_fields)


def test_the_examples_give_all_that_a_call_takes():
    typed = {"train": Training, "features": Cohort, "predict": Explaining, "similar": Searching}
    for name, options in typed.items():
        assert set(options.__annotations__) <= {each for _, given in EXAMPLES[name] for each in given}, name
    for name, call in CALLS.items():
        taken = {
            each.name
            for each in inspect.signature(call.run).parameters.values()
            if each.kind is each.KEYWORD_ONLY and each.name not in ("progress", "timeout", "again", "format")
        }
        assert taken <= {each for _, given in EXAMPLES[name] for each in given}, name
