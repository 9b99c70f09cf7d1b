"""`keyslice erase` against a running service."""

import json

import pytest
from posting import embed, slice_files
from typer.testing import CliRunner

from models.ct.phantom import Identity
from service.cli import app

IDENTITY = Identity("ERASE/COMMAND")


def erase(service, *arguments, **options):
    return CliRunner().invoke(app, ["erase", *arguments, "--service", service.address], **options)


@pytest.mark.parametrize("arguments", [[IDENTITY.series_uid], ["--patient", IDENTITY.patient_id]])
def test_the_receipt_is_printed_and_a_second_time_finds_nothing(service, http, arguments):
    embed(http, slice_files(IDENTITY, count=1))

    refused = erase(service, *arguments, input="n\n")
    erased = erase(service, *arguments, "--yes", "--json")
    again = erase(service, *arguments, "--yes")

    assert refused.exit_code == 1
    assert erased.exit_code == 0, erased.stderr
    receipt = json.loads(erased.stdout)
    assert http.get(f"/v1/erasures/{receipt['erasure_id']}").json() == receipt
    assert receipt["removed"]["archive_files"] == 1
    assert (again.exit_code, again.stderr[:4]) == (1, "404:")


def test_it_erases_a_series_or_a_patient_not_both_and_not_neither(service):
    for arguments in ([], ["1.2", "--patient", "P"]):
        assert erase(service, *arguments, "--yes").exit_code == 2
