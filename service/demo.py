"""`make demo`: one CT series, or a synthetic cohort, from POST to prediction, by the HTTP calls anyone can make."""

import io
import shutil
import signal
import tarfile
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from sklearn.metrics import roc_auc_score

from models.ct.phantom import Identity, chest, write_series
from service.calling import client
from service.embedded import in_background
from service.settings import Settings

COHORT = 36  # synthetic patients, every second one with a lesion
TRAINED_ON = 24
# The paper's 128 bags a step and learning rate 1e-4 are for thousands of patients. This cohort trains on 24, of
# which a fold validates on five: too few to stop early by.
TRAINING = {"batch_size": 4, "learning_rate": 1e-3, "epochs": 60, "patience": 60}
NEIGHBOURS = 5
LABEL = "phantom_mass"

console = Console(highlight=False)


class DemoFailed(Exception):
    """What the service answered instead."""


@dataclass(frozen=True)
class Patient:
    identity: Identity
    lesion_slices: tuple[int, ...]
    archive: Path  # the series as tar


def demo(settings: Settings, series: Path | None, *, oneshot: bool) -> None:
    """Start the service on <data_dir>/demo, demonstrate, and serve on unless oneshot. Raises DemoFailed."""
    with (
        console.status("starting the service") as status,
        in_background(settings.data_dir / "demo", settings.host, settings.port) as service,
        client(settings, service.address, timeout=600) as http,
    ):
        status.stop()
        with tempfile.TemporaryDirectory(prefix="keyslice-demo-") as folder:
            if series is None:
                _show_cohort(http, Path(folder))
            else:
                _show_series(http, series, Path(folder))
        console.print(f"\nThe page: {service.address}/    The API: {service.address}/docs")
        if not oneshot:
            console.print("Serving; Ctrl-C stops.")
            service.process.wait()


def _show_cohort(http: httpx.Client, folder: Path) -> None:
    head, held_out = _train_on_cohort(http, folder)
    predictions = [_get(http, f"/v1/patients/{each.identity.patient_id}/predictions", head=head) for each in held_out]
    probabilities = [each["probabilities"][LABEL] for each in predictions]
    auroc = roc_auc_score([bool(patient.lesion_slices) for patient in held_out], probabilities)
    console.print(f"\nheld-out AUROC   {auroc:.3f}  ({len(held_out)} synthetic patients the head never saw)")
    shown = max((k for k in range(len(held_out)) if held_out[k].lesion_slices), key=lambda k: probabilities[k])
    patient, prediction = held_out[shown], predictions[shown]
    console.print(f"patient          {patient.identity.patient_id}, has a lesion")
    console.print(f"probability      {probabilities[shown]:.3f}")
    console.print(f"lesion slices    {', '.join(map(str, patient.lesion_slices))}")
    _show_top_slices(prediction, set(patient.lesion_slices))
    _show_neighbours(http, prediction["top_slices"][0], "patient")


def _train_on_cohort(http: httpx.Client, folder: Path) -> tuple[str, list[Patient]]:
    """Post the synthetic patients and train a head on most of them: its id, and the patients it never saw."""
    console.print(f"[bold]A synthetic cohort[/]: {COHORT} phantoms, half with a mass in the lung. No real patient.")
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("write, post ", total=COHORT)
        patients, jobs = [], []
        with ProcessPoolExecutor(initializer=_ignore_interrupt) as pool:
            for patient in pool.map(_write_patient, range(COHORT), [folder] * COHORT):
                patients.append(patient)
                jobs.append(_post(http, [patient.archive])["job_id"])
                progress.advance(task)
    _wait_for(http, jobs, "embed, index")
    train, held_out = patients[:TRAINED_ON], patients[TRAINED_ON:]
    head = _train(http, {patient.identity.patient_id: bool(patient.lesion_slices) for patient in train}, LABEL)
    return head, held_out


def _show_series(http: httpx.Client, path: Path, folder: Path) -> None:
    uploads = [path] if path.is_file() else [_tar(sorted(path.rglob("*")), folder / "series.tar")]
    answer = _post(http, uploads)
    _wait_for(http, [answer["job_id"]], "embed, index")
    rows = [_get(http, f"/v1/series/{each['series_uid']}") for each in answer["series"]]
    table = Table(Column("series", overflow="fold"), "state", "slices", "spacing mm", "verdict", "set aside")
    for row, received in zip(rows, answer["series"], strict=True):
        geometry, verdict = row["geometry"] or {}, row["verdict"] or {"status": "-", "set_aside": []}
        aside = len(received["set_aside"]) + len(verdict["set_aside"])
        cells = [geometry.get("slices", 0), geometry.get("slice_spacing_mm", "-"), verdict["status"], aside]
        table.add_row(row["series_uid"], row["state"], *map(str, cells))
    console.print(table)
    for each in answer["set_aside"][:10]:
        console.print(f"set aside        {each['file']}: {each['reason']}, {each['detail']}")
    embedded = [row for row in rows if row["geometry"]]
    if not embedded:
        raise DemoFailed("no series could be embedded; the table above says why")
    row = embedded[0]
    bag = _get(http, f"/v1/series/{row['series_uid']}/embeddings")
    windows, dim = bag["windows"], bag["dim"]
    console.print(
        f"embeddings       {len(bag['slices'])} slices x {len(windows)} windows ({', '.join(windows)}) x {dim}"
    )
    _show_prediction(http, row, folder)
    middle = {"series_uid": row["series_uid"], "slice": len(bag["slices"]) // 2}
    _show_neighbours(http, middle, "none" if len(rows) == 1 else "series")


def _show_prediction(http: httpx.Client, row: dict[str, Any], folder: Path) -> None:
    """By a head that is here for the series' encoder; without one, by one trained on phantoms, and said so."""
    encoder_id = row["embeddings"][0]["encoder_id"]
    heads = [
        each
        for each in _get(http, "/v1/heads")["heads"]
        if (each["state"], each["encoder_id"]) == ("ready", encoder_id)
    ]
    if heads:
        head = max(heads, key=lambda each: each["created_at"])["head_id"]
    else:
        console.print("\nNo head is here yet, and none can be trained without labels. One is trained on phantoms:")
        head, _ = _train_on_cohort(http, folder)
    query = {"head": head, "series_uid": row["series_uid"]}
    prediction = _get(http, f"/v1/patients/{row['patient_id']}/predictions", **query)
    for label, probability in prediction["probabilities"].items():
        console.print(f"probability      {label}: {probability:.3f}, by head {head}")
    if LABEL in prediction["probabilities"]:
        console.print("                 a head trained on phantoms says nothing about a real patient")
    _show_top_slices(prediction, set())


def _show_top_slices(prediction: dict[str, Any], lesion_slices: set[int]) -> None:
    console.print("top slices by attention:")
    table = Table("slice", "z mm", "attention", "in the lesion")
    for each in prediction["top_slices"]:
        truth = "yes" if each["slice"] in lesion_slices else "no" if lesion_slices else "unknown"
        table.add_row(str(each["slice"]), f"{each['z_mm']:.1f}", f"{each['weight']:.3f}", truth)
    console.print(table)
    shares = ", ".join(f"{window} {share:.2f}" for window, share in prediction["window_share"].items())
    console.print(f"attention by window: {shares}")


def _show_neighbours(http: httpx.Client, query: dict[str, Any], exclude: str) -> None:
    body = {
        "series_uid": query["series_uid"],
        "slice": query["slice"],
        "window": "lung",
        "k": NEIGHBOURS,
        "exclude": exclude,
    }
    answer = _answer(http.post("/v1/search", json=body))
    searched = "all slices" if exclude == "none" else f"same {exclude} excluded"
    console.print(f"similar to slice {query['slice']} at the lung window, {searched}:")
    table = Table("patient", "slice", "z mm", "cosine")
    for hit in answer["hits"]:
        table.add_row(hit["patient_id"], str(hit["slice"]), f"{hit['z_mm']:.1f}", f"{hit['score']:.4f}")
    console.print(table)
    console.print(f"index {answer['index']}, recall {answer['recall']:.2f}")


def _write_patient(number: int, folder: Path) -> Patient:
    identity = Identity(f"SYNTHETIC-{number:03d}")
    phantom = chest(seed=number, lesion=number % 2 == 1)
    files = write_series(folder / str(number), phantom.hu, phantom.spacing_mm, identity)
    archive = _tar(files, folder / f"{number}.tar")
    shutil.rmtree(folder / str(number))
    return Patient(identity, phantom.lesion_slices, archive)


def _tar(files: Iterable[Path], target: Path) -> Path:
    with tarfile.open(target, "w") as archive:
        for number, file in enumerate(files):
            if file.is_file():
                archive.add(file.resolve(), f"{number:06d}-{file.name}")
    return target


def _post(http: httpx.Client, uploads: list[Path]) -> dict[str, Any]:
    files = [("files", (path.name, path.open("rb"), "application/octet-stream")) for path in uploads]
    return _answer(http.post("/v1/series", files=files))


def _train(http: httpx.Client, labels: dict[str, bool], label: str) -> str:
    table = "\n".join([f"patient_id,{label}", *(f"{patient},{int(value)}" for patient, value in labels.items())])
    answer = _answer(http.post("/v1/heads", files={"labels": io.BytesIO(table.encode())}, data=TRAINING))
    _wait_for(http, [answer["job_id"]], "train head  ")
    head = _get(http, f"/v1/heads/{answer['head_id']}")
    if head["state"] != "ready":
        raise DemoFailed(f"training failed: {head['error']}")
    folds = len(head["report"]["folds"])
    console.print(f"head             {head['head_id']}: {folds} folds over {head['report']['patients']} patients")
    return str(head["head_id"])


def _wait_for(http: httpx.Client, jobs: list[str], what: str) -> None:
    """Show the jobs' progress until all of them have ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        while True:
            states = [_get(http, f"/v1/jobs/{job}") for job in jobs]
            done, known = (sum(state[key] for state in states) for key in ("done", "known"))
            progress.update(task, completed=done, total=known or None)
            if all(state["state"] in ("done", "failed") for state in states):
                break
            time.sleep(0.5)
    for state in states:
        for each in state["series"]:
            if each["error"]:
                console.print(f"series {each['series_uid']} is {each['state']}: {each['error']}")


def _get(http: httpx.Client, path: str, **query: str) -> dict[str, Any]:
    return _answer(http.get(path, params=query))


def _answer(response: httpx.Response) -> dict[str, Any]:
    answer: dict[str, Any] = response.json()
    if response.is_error:
        _fail(response, answer)
    return answer


def _fail(response: httpx.Response, problem: dict[str, Any]) -> NoReturn:
    message = f"{response.request.method} {response.request.url.path}: {response.status_code}, {problem.get('detail')}"
    for each in problem.get("set_aside", [])[:10]:
        message += f"\n  {each['file']}: {each['reason']}, {each['detail']}"
    raise DemoFailed(message)


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
