"""`keyslice doctor`: a sound machine is well, and each thing that may ail is said, with a way out."""

import json

import pytest
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import JPEGLSLossless
from typer.testing import CliRunner

from models.load import canary, load_encoder
from models.modes import in_mode
from models.zoo import encoders
from service.cli import app
from service.settings import Settings
from service.storage.stores import open_stores
from service.storage.tables import CanaryRow

AILING = 3
PARTS = ["versions", "decoders", "device", "disk", "archive", "bags", "index", "database", "broker", "encoder"]


@pytest.fixture(autouse=True)
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("KEYSLICE_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def examined(status=0):
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == status, result.output
    return {each["name"]: each for each in json.loads(result.stdout)}


def ailing():
    found = [each for each in examined(AILING).values() if not each["well"]]
    assert len(found) == 1
    return found[0]["name"], found[0]["found"]


def test_a_sound_machine_is_well_and_keeps_nothing_of_the_trial(data_dir):
    found = examined()

    assert list(found) == PARTS
    assert all(each["well"] for each in found.values())
    assert "none is stored yet" in found["encoder"]["found"]
    assert [path for store in ("archive", "bags", "index") for path in (data_dir / store).iterdir()] == []


def test_without_json_it_is_a_line_for_each():
    lines = CliRunner().invoke(app, ["doctor"]).output.splitlines()

    assert [line.split()[:2] for line in lines] == [["well", name] for name in PARTS]


def test_the_canary_is_compared_with_the_one_that_is_stored():
    settings = Settings()
    spec = in_mode(encoders(settings.weights_path)[settings.encoder], settings.mode, settings.weights_path)
    encoder = load_encoder(spec, settings.weights_path)
    stores = open_stores(settings)
    embedding = encoder.encode(canary(encoder.spec))
    stores.canaries.record(encoder.id, embedding)
    assert "cosine 1.000000" in examined()["encoder"]["found"]

    with stores.database.write() as session:
        session.get_one(CanaryRow, encoder.id).reference = embedding.reshape(-1)[::-1].tobytes()
    stores.close()

    name, found = ailing()
    assert name == "encoder"
    assert "expected 0.999999 or more" in found


def test_a_full_disk_ails(monkeypatch):
    monkeypatch.setenv("KEYSLICE_MIN_FREE_BYTES", str(2**62))

    name, found = ailing()

    assert name == "disk"
    assert f"expected {2**62} to stay free" in found


def test_a_broker_that_does_not_answer_ails(monkeypatch):
    monkeypatch.setenv("KEYSLICE_BROKER_URL", "redis://127.0.0.1:1/0")

    name, found = ailing()

    assert name == "broker"
    assert "KEYSLICE_BROKER_URL" in found


def test_an_encoder_without_weights_ails_and_says_how_to_get_them(monkeypatch):
    monkeypatch.setenv("KEYSLICE_ENCODER", "mambaout_tiny")

    name, found = ailing()

    assert name == "encoder"
    assert "keyslice fetch" in found


def test_a_database_that_is_not_there_ails_and_its_password_is_not_told(monkeypatch):
    monkeypatch.setenv("KEYSLICE_DATABASE_URL", "postgresql+psycopg://me:secret@127.0.0.1:1/none?connect_timeout=2")

    name, found = ailing()

    assert name == "database"
    assert "secret" not in found


def test_a_store_that_cannot_be_written_ails(data_dir):
    data_dir.mkdir()
    (data_dir / "bags").write_text("not a directory")

    found = examined(AILING)

    assert not found["bags"]["well"]
    assert found["archive"]["well"]


def test_a_decoder_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(get_decoder(JPEGLSLossless), "_available", {})

    assert ailing() == ("decoders", "missing: pyjpegls for JPEG-LS Lossless Image Compression")
