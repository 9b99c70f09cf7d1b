"""Every command that answers takes --json: one JSON document, with the facts of the plain answer."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import typer
from click.testing import Result
from safetensors.torch import save_file
from searching import three_indexed
from test_predict_command import send, trained
from test_pretrain_cli import RUN, one_thread  # noqa: F401
from typer.core import TyperCommand, TyperGroup
from typer.testing import CliRunner

from models.ct.phantom import Identity, chest, write_series
from models.encoders.timm_import import timm
from service.cli import app
from service.client import Keyslice
from service.settings import Settings

EXCEPTED = {
    "serve": "serves until it is stopped",
    "work": "serves until it is stopped",
    "up": "serves until it is stopped",
    "receive": "serves until it is stopped",
    "demo": "shows people around, and serves on",
}
LINES = {"audit list"}  # a document a line, each as it is in the chain
COHORT = [Identity(f"json-{k}") for k in range(4)]


@dataclass(frozen=True)
class Case:
    """What is asked, {turn} once `plain` and once `json`, and what of the document the plain answer must say."""

    arguments: str
    facts: Callable[[Any], list[str]]


PATIENTS = " ".join(f"--patient-id {each.patient_id}" for each in COHORT)
CASES = {
    "check": Case("", lambda told: [f"{told['series']} series of {told['files']} files, {told['bags']} bags"]),
    "doctor": Case("", lambda told: [each["name"] for each in told]),
    "erase": Case("--patient json-erased-{turn} --yes {service}", lambda told: [f"{told['series']} series"]),
    "search": Case(
        f"{COHORT[0].series_uid} 1 -k 3 {{service}}",
        lambda told: [word for hit in told["hits"] for word in (hit["series_uid"], f"{hit['score']:.4f}")],
    ),
    "embed": Case("{exports} {service}", lambda told: [each["series_uid"] for each in told["series"]]),
    "predict": Case("{new} --head json {service}", lambda told: [each["patient_id"] for each in told]),
    "fetch": Case("mambaout_tiny --revision " + "0" * 40, lambda told: [told["path"]]),
    "pretrain": Case(
        "--config {folder}/run.toml --fresh --max-minutes 0",
        lambda told: [f"step {told['steps']} of 4", Path(told["checkpoint"]).name],
    ),
    "train": Case(
        "{folder}/labels.csv --folds 2 --epochs 1 --hidden 8 --attention 4 {service}",
        lambda told: [*told["labels"], f"{told['report']['patients']} patients"],
    ),
    "heads": Case("{service}", lambda told: [each["head_id"] for each in told]),
    "heads promote": Case("json@1 {service}", lambda told: [told["name"], told["head_id"]]),
    "encoders": Case("", lambda told: [each["name"] for each in told["encoders"]]),
    "encoders calibrate": Case("test_mambaout --mode exact --again", lambda told: [*told["slices_per_s"]]),
    "encoders verify": Case("test_mambaout", lambda told: [told["encoder_id"]]),
    "index stats": Case("", lambda told: [word for each in told for word in (each["encoder_id"], str(each["rows"]))]),
    "index check": Case("", lambda told: [f"{name}: {one['rows']} rows" for name, one in told.items()]),
    "index rebuild": Case("", lambda told: [f"{name}: {one['rows']} rows" for name, one in told.items()]),
    "features get": Case(
        "{folder}/{turn}.parquet " + PATIENTS + " {service}",
        lambda told: [f"{told['slices']} slices of {told['series']} series"],
    ),
    "features map": Case(
        "--out {folder}/{turn}.html " + PATIENTS + " {service}",
        lambda told: [f"{len(told['points'])} of {told['instances']} instances, {told['series']} series"],
    ),
    "keys create": Case("--name made --scope read", lambda told: told["scopes"]),
    "keys list": Case("", lambda told: [each["key_id"] for each in told]),
    "keys revoke": Case("{key_turn}", lambda told: [f"({told['name']}) is {told['state']}"]),
    "pseudonym": Case("MRN-1 MRN-2", lambda told: [each["pseudonym"] for each in told]),
    "audit verify": Case("", lambda told: [f"{told['entries']} entries fit", told["head"]]),
    "audit list": Case("", lambda told: [each["who"] for each in told]),
}


def commands(command: TyperCommand | TyperGroup, name: str = "") -> Iterator[tuple[str, TyperCommand | TyperGroup]]:
    """Each that does something by itself, as it is called behind `keyslice`."""
    if not isinstance(command, TyperGroup):
        yield name, command
        return
    if command.invoke_without_command:
        yield name, command
    for each, one in command.commands.items():
        yield from commands(one, f"{name} {each}".strip())


COMMANDS = dict(commands(typer.main.get_command(app)))


def keyslice(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


@pytest.fixture(scope="module")
def named(service, export_root, tmp_path_factory):
    """What the cases' braces stand for: a service with a head and patients, a data directory of its own beside it."""
    folder = tmp_path_factory.mktemp("json")
    with Keyslice(service.address) as client, pytest.MonkeyPatch.context() as patch:
        trained(client, folder, "json")
        for turn in ("plain", "json"):
            client.wait(client.upload(send(folder / turn, Identity(f"json-erased-{turn}"))), timeout=120)
        send(export_root / "json", Identity("json-exported"))
        send(folder / "new", Identity("json-new"))
        phantom = chest(seed=0, lesion=False, slices=6, size=64)
        write_series(folder / "ct", phantom.hu, phantom.spacing_mm, Identity("json pretrained"))
        (folder / "run.toml").write_text(RUN.format(folder=folder).replace('name = "pretrained_here"\n', ""))
        (folder / "weights").mkdir()
        torch.manual_seed(0)
        save_file(timm.create_model("test_mambaout").state_dict(), folder / "weights" / "test_mambaout.safetensors")
        save_file({}, folder / "fetched.safetensors")

        patch.setenv("COLUMNS", "200")
        patch.setenv("KEYSLICE_DATA_DIR", str(folder / "data"))
        patch.setenv("KEYSLICE_WEIGHTS_DIR", str(folder / "weights"))
        patch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(folder / "fetched.safetensors"))
        three_indexed(Settings()).close()
        words = ("keys", "create", "--name", "old", "--scope", "read", "--json")
        keys = {f"key_{turn}": json.loads(keyslice(*words).stdout)["key_id"] for turn in ("plain", "json")}
        yield {
            "folder": folder,
            "new": folder / "new",
            "exports": export_root / "json",
            "service": f"--service {service.address}",
            **keys,
        }


def test_every_command_that_answers_takes_it():
    taking = {name for name, one in COMMANDS.items() if "--json" in {word for each in one.params for word in each.opts}}

    assert taking == COMMANDS.keys() - EXCEPTED.keys() == CASES.keys()


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CASES)
def test_it_is_one_document_with_the_facts_of_the_plain_answer(named, caplog, monkeypatch, name):
    if name == "pseudonym":
        monkeypatch.setenv("KEYSLICE_PSEUDONYM_KEY", "k" * 32)
    caplog.set_level("INFO", "keyslice.pretrain")
    case = CASES[name]

    def asked(turn: str, *options: str) -> Result:
        words = case.arguments.replace("{key_turn}", named[f"key_{turn}"]).format(turn=turn, **named).split()
        return keyslice(*name.split(), *words, *options)

    plain = asked("plain")
    said = plain.output + caplog.text
    told = asked("json", "--json")

    assert plain.exit_code == told.exit_code, told.output
    assert told.exit_code in ((0, 3) if name in ("check", "doctor") else (0,)), told.output
    document = [json.loads(line) for line in told.stdout.splitlines()] if name in LINES else json.loads(told.stdout)
    facts = case.facts(document)
    assert facts
    assert [fact for fact in facts if fact not in said] == []
    if name != "pretrain":  # whose plain answer is its log
        assert plain.stdout != told.stdout


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("heads promote nobody@9 {service}", 1, "404: "),
        ("keys revoke 000000000000", 2, "000000000000"),
        ("fetch resnet --revision main", 2, "no encoder 'resnet'"),
        ("index rebuild --encoder other@0", 2, "nothing is embedded by"),
    ],
)
def test_an_error_is_said_on_standard_error_with_the_same_status(named, arguments, status, said):
    answer = keyslice(*arguments.format(**named).split(), "--json")

    assert (answer.exit_code, answer.stdout) == (status, "")
    assert said in answer.stderr
