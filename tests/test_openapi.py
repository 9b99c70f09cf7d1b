"""The service against whatever its own OpenAPI schema permits and forbids, by schemathesis: no 5xx, no answer that the
schema does not name, no body that is not as the schema says.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from posting import embed, slice_files, wait

from models.ct.phantom import Identity
from service.embedded import Running, in_background

HERE = Path(__file__).resolve().parent
SECONDS = 30
PATIENTS = [f"SCHEMA-{number}" for number in range(4)]
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "use_after_free",
)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service of its own: whatever may be removed will be."""
    with in_background(tmp_path_factory.mktemp("attacked")) as running:
        yield running


def known(http: httpx.Client) -> dict[str, list[str]]:
    """Values that name something which is there, by parameter; all of one patient, so that they fit each other."""
    for number, name in enumerate(PATIENTS):
        embed(http, slice_files(Identity(name), count=3, seed=number))
    table = "patient_id,x\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(PATIENTS))
    head = http.post("/v1/heads", files={"labels": table.encode()}, data={"epochs": "1", "folds": "2"}).json()
    assert wait(http, head["job_id"])["state"] == "done"
    series = Identity(PATIENTS[0]).series_uid
    study = http.get(f"/v1/series/{series}").json()["study_uid"]
    instances = http.get(f"/dicom-web/studies/{study}/series/{series}/instances").json()
    prediction = http.get(f"/v1/patients/{PATIENTS[0]}/predictions", params={"head": head["head_id"]}).json()
    return {
        "path.series_uid": [series],
        "path.series": [series],
        "path.study": [study],
        "path.instance": [each["00080018"]["Value"][0] for each in instances],
        "path.patient_id": PATIENTS[:1],
        "path.head_id": [head["head_id"]],
        "query.head": [head["head_id"]],
        "path.job_id": [head["job_id"]],
        "path.prediction_id": [prediction["prediction_id"]],
    }


def as_dictionaries(values: dict[str, list[str]]) -> str:
    """schemathesis.toml: parameters are mostly of these values."""
    lines = []
    for parameter, found in values.items():
        name = re.sub(r"\W", "_", parameter)
        lines += [f"[dictionaries.{name}]", f"values = {json.dumps(found)}"]
        lines += [f'[parameters."{parameter}"]', f'dictionary = "{name}"', "probability = 0.8"]
    return "\n".join(lines)


def attack(running: Running, folder: Path, config: str, *options: str) -> subprocess.CompletedProcess[str]:
    """schemathesis for a bounded time, from a seed."""
    (folder / "schemathesis.toml").write_text(config)
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(folder / "schemathesis.toml")),
        *("run", f"{running.address}/openapi.json", "--checks", ",".join(CHECKS), "--max-time", str(SECONDS)),
        *("--seed", "1", "--no-shrink", "--continue-on-failure", "--request-timeout", "30", "--no-color", *options),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "openapi_hooks", "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, cwd=folder, env=os.environ | hooks, capture_output=True, text=True, check=False)


def test_what_the_schema_permits_or_forbids_of_what_is_there(attacked, tmp_path):
    with httpx.Client(base_url=attacked.address, timeout=60) as http:
        values = known(http)

    done = attack(
        attacked, tmp_path, as_dictionaries(values), "--phases", "coverage,fuzzing", "--exclude-method", "DELETE"
    )

    assert done.returncode == 0, done.stdout
    with httpx.Client(base_url=attacked.address) as http:
        assert http.get("/readyz").status_code == 200


def test_one_call_after_another_by_what_the_last_one_answered(attacked, tmp_path):
    done = attack(attacked, tmp_path, "", "--phases", "coverage,stateful")

    assert done.returncode == 0, done.stdout
