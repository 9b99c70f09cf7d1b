"""`make demo`: one CT series, or a synthetic cohort, from POST to prediction, by the HTTP calls anyone can make."""

import shutil
import signal
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from sklearn.metrics import roc_auc_score

from models.ct.phantom import Identity, chest, write_series
from service.client import Keyslice
from service.client.asked import Training
from service.client.calls import ENDED
from service.embedded import in_background
from service.errors import KeysliceError
from service.schemas.predictions import Predictions
from service.schemas.search import Exclude
from service.schemas.series import Series
from service.settings import Settings
from service.terminal import client_of, told

COHORT = 36  # synthetic patients, every second one with a lesion
TRAINED_ON = 24
# The paper's 128 bags a step and learning rate 1e-4 are for thousands of patients. This cohort trains on 24, of
# which a fold validates on five: too few to stop early by.
TRAINING: Training = {"batch_size": 4, "learning_rate": 1e-3, "epochs": 60, "patience": 60}
NEIGHBOURS = 5
LABEL = "phantom_mass"

console = Console(highlight=False)


class DemoFailed(Exception):
    """What the service answered instead."""


@dataclass(frozen=True)
class Patient:
    identity: Identity
    lesion_slices: tuple[int, ...]
    folder: Path  # its files


def demo(settings: Settings, series: Path | None, *, oneshot: bool) -> None:
    """Start the service on <data_dir>/demo, demonstrate, and serve on unless oneshot. Raises DemoFailed."""
    with (
        console.status("starting the service") as status,
        in_background(settings.data_dir / "demo", settings.host, settings.port) as service,
        client_of(settings, service.address) as client,
    ):
        status.stop()
        with tempfile.TemporaryDirectory(prefix="keyslice-demo-") as folder:
            try:
                if series is None:
                    _show_cohort(client, Path(folder))
                else:
                    _show_series(client, series, Path(folder))
            except KeysliceError as error:
                raise DemoFailed(_why(error)) from error
        console.print(f"\nThe page: {service.address}/    The API: {service.address}/docs")
        if not oneshot:
            console.print("Serving; Ctrl-C stops.")
            service.process.wait()


def _show_cohort(client: Keyslice, folder: Path) -> None:
    head, held_out = _train_on_cohort(client, folder)
    predictions = [client.predict(each.identity.patient_id, head=head) for each in held_out]
    probabilities = [each.probabilities[LABEL] for each in predictions]
    auroc = roc_auc_score([bool(patient.lesion_slices) for patient in held_out], probabilities)
    console.print(f"\nheld-out AUROC   {auroc:.3f}  ({len(held_out)} synthetic patients the head never saw)")
    shown = max((k for k in range(len(held_out)) if held_out[k].lesion_slices), key=lambda k: probabilities[k])
    patient, prediction = held_out[shown], predictions[shown]
    console.print(f"patient          {patient.identity.patient_id}, has a lesion")
    console.print(f"probability      {probabilities[shown]:.3f}")
    console.print(f"lesion slices    {', '.join(map(str, patient.lesion_slices))}")
    _show_top_slices(prediction, set(patient.lesion_slices))
    top = prediction.top_slices[0]
    _show_neighbours(client, top.series_uid, top.slice, "patient")


def _train_on_cohort(client: Keyslice, folder: Path) -> tuple[str, list[Patient]]:
    """Post the synthetic patients and train a head on most of them: its id, and the patients it never saw."""
    console.print(f"[bold]A synthetic cohort[/]: {COHORT} phantoms, half with a mass in the lung. No real patient.")
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=console) as progress:
        task = progress.add_task("write, post ", total=COHORT)
        patients, jobs = [], []
        with ProcessPoolExecutor(initializer=_ignore_interrupt) as pool:
            for patient in pool.map(_write_patient, range(COHORT), [folder] * COHORT):
                patients.append(patient)
                jobs.append(client.upload(patient.folder).job_id)
                shutil.rmtree(patient.folder)
                progress.advance(task)
    _wait_for(client, jobs, "embed, index")
    train, held_out = patients[:TRAINED_ON], patients[TRAINED_ON:]
    head = _train(client, {patient.identity.patient_id: bool(patient.lesion_slices) for patient in train}, LABEL)
    return head, held_out


def _show_series(client: Keyslice, path: Path, folder: Path) -> None:
    answer = client.upload(path)
    _wait_for(client, [answer.job_id], "embed, index")
    rows = [client.get_series(each.series_uid) for each in answer.series]
    table = Table(Column("series", overflow="fold"), "state", "slices", "spacing mm", "verdict", "set aside")
    for row, received in zip(rows, answer.series, strict=True):
        geometry, verdict = row.geometry, row.verdict
        aside = len(received.set_aside) + (len(verdict.set_aside) if verdict else 0)
        measured = [geometry.slices, geometry.slice_spacing_mm] if geometry else [0, "-"]
        table.add_row(row.series_uid, row.state, *map(str, [*measured, verdict.status if verdict else "-", aside]))
    console.print(table)
    for each in answer.set_aside[:10]:
        console.print(f"set aside        {each.file}: {each.reason}, {each.detail}")
    embedded = [row for row in rows if row.geometry]
    if not embedded:
        raise DemoFailed("no series could be embedded; the table above says why")
    row = embedded[0]
    slices, windows, dim = client.embeddings(row.series_uid).shape
    names = next(each for each in client.encoders() if each.default).windows
    console.print(
        f"embeddings       {slices} slices x {windows} windows ({', '.join(each.name for each in names)}) x {dim}"
    )
    _show_prediction(client, row, folder)
    _show_neighbours(client, row.series_uid, slices // 2, "none" if len(rows) == 1 else "series")


def _show_prediction(client: Keyslice, row: Series, folder: Path) -> None:
    """By a head that is here for the series' encoder; without one, by one trained on phantoms, and said so."""
    encoder_id = row.embeddings[0].encoder_id
    heads = [each for each in client.heads() if (each.state, each.encoder_id) == ("ready", encoder_id)]
    if heads:
        head = max(heads, key=lambda each: each.created_at).head_id
    else:
        console.print("\nNo head is here yet, and none can be trained without labels. One is trained on phantoms:")
        head, _ = _train_on_cohort(client, folder)
    prediction = client.predict(row.patient_id, head=head, series_uid=row.series_uid)
    for label, probability in prediction.probabilities.items():
        console.print(f"probability      {label}: {probability:.3f}, by head {head}")
    if LABEL in prediction.probabilities:
        console.print("                 a head trained on phantoms says nothing about a real patient")
    _show_top_slices(prediction, set())


def _show_top_slices(prediction: Predictions, lesion_slices: set[int]) -> None:
    console.print("top slices by attention:")
    table = Table("slice", "z mm", "attention", "in the lesion")
    for each in prediction.top_slices:
        truth = "yes" if each.slice in lesion_slices else "no" if lesion_slices else "unknown"
        table.add_row(str(each.slice), f"{each.z_mm:.1f}", f"{each.weight:.3f}", truth)
    console.print(table)
    shares = ", ".join(f"{window} {share:.2f}" for window, share in prediction.window_share.items())
    console.print(f"attention by window: {shares}")


def _show_neighbours(client: Keyslice, series_uid: str, number: int, exclude: Exclude) -> None:
    answer = client.similar(series_uid, number, "lung", k=NEIGHBOURS, exclude=exclude)
    searched = "all slices" if exclude == "none" else f"same {exclude} excluded"
    console.print(f"similar to slice {number} at the lung window, {searched}:")
    table = Table("patient", "slice", "z mm", "cosine")
    for hit in answer.hits:
        table.add_row(hit.patient_id, str(hit.slice), f"{hit.z_mm:.1f}", f"{hit.score:.4f}")
    console.print(table)
    console.print(f"index {answer.index}, recall {answer.recall:.2f}")


def _write_patient(number: int, folder: Path) -> Patient:
    identity = Identity(f"SYNTHETIC-{number:03d}")
    phantom = chest(seed=number, lesion=number % 2 == 1)
    write_series(folder / str(number), phantom.hu, phantom.spacing_mm, identity)
    return Patient(identity, phantom.lesion_slices, folder / str(number))


def _train(client: Keyslice, labels: dict[str, bool], label: str) -> str:
    table = "\n".join([f"patient_id,{label}", *(f"{patient},{int(value)}" for patient, value in labels.items())])
    accepted = client.train(table.encode(), **TRAINING)
    _wait_for(client, [accepted.job_id], "train head  ")
    head = client.get_head(accepted)
    if head.report is None:
        raise DemoFailed(f"training failed: {head.error}")
    folds = len(head.report["folds"])
    console.print(f"head             {head.head_id}: {folds} folds over {head.report['patients']} patients")
    return head.head_id


def _wait_for(client: Keyslice, jobs: Sequence[str], what: str) -> None:
    """Show the jobs' progress until all of them have ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=None)
        while True:
            states = [client.get_job(job) for job in jobs]
            done, known = sum(each.done for each in states), sum(each.known for each in states)
            progress.update(task, completed=done, total=known or None)
            if all(each.state in ENDED for each in states):
                break
            time.sleep(0.5)
    for state in states:
        for each in state.series:
            if each.error:
                console.print(f"series {each.series_uid} is {each.state}: {each.error}")


def _why(error: KeysliceError) -> str:
    aside = [f"\n  {each['file']}: {each['reason']}, {each['detail']}" for each in error.found.get("set_aside", [])]
    return told(error) + "".join(aside[:10])


def _ignore_interrupt() -> None:
    """Ctrl-C is the parent's to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
