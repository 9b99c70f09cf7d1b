"""Every shell and Python block of README and docs runs as it stands, or is listed with what it would need."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from posting import embed, post, slice_files, tarred
from serving import keys_of, serving, settings_of

from models.ct.phantom import Identity
from service.client import Keyslice
from service.embedded import in_background

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^( *)```(shell|bash|python)\n(.*?)^\1```$(?:\n\n```text\n(.*?)^```$)?", re.MULTILINE | re.DOTALL)
PATIENTS = 10  # with a label
UID = "1.2.840.113619.2.55.3.604"  # the docs' example of a series

NOT_RUN = {  # page and beginning of the block: why not
    ("README.md", "make demo"): ".ci/run runs it",
    ("README.md", "make test"): "is what runs this",
    ("README.md", "storescu"): "needs the receiver; test_receiver.py sends to it",
    ("README.md", "keyslice encoders"): "needs a hub",
    ("docs/client.md", ""): "test_client_live.py::test_the_tutorial_runs",
    ("docs/dicomweb.md", "from dicomweb_client"): "test_dicomweb.py sends and reads by the same client",
    ("docs/encoders.md", "keyslice fetch"): "needs a hub, and weights that are asked for from their authors",
    ("docs/encoders.md", "curl"): "needs an encoder of one's own; test_pretrain_cli.py makes one",
    ("docs/exports.md", "curl -H 'Content-Type: application/json' http"): "needs a PACS; test_pacs.py has one",
    ("docs/exports.md", "AWS_ENDPOINT_URL_S3"): "needs a bucket; test_remote_exports.py has one",
    ("docs/features.md", "import"): "test_docs.py::test_each_format_of_features_is_read_by_the_docs_own_lines",
    ("docs/how-to/add-an-encoder.md", "keyslice encoders c"): "needs weights; test_encoder_choice.py makes some",
    ("docs/how-to/back-up.md", "pg_dump"): "needs PostgreSQL's tools",
    ("docs/how-to/connect-a-pacs.md", ""): "needs a PACS; test_receiver.py and test_dicom_peers.py play one",
    ("docs/how-to/scale-out.md", ""): "needs servers of the reader's own; test_containers.py has what compose starts",
    ("docs/index.md", "make demo"): "as README's",
    ("docs/pretraining.md", ""): "needs hours; test_pretrain_cli.py has small ones",
    ("docs/security.md", "KEYSLICE_OIDC_ISSUER"): "needs an identity provider; test_oidc.py has one",
    ("docs/security.md", "pipx"): "needs PyPI's advisories",
    ("docs/security.md", "docker compose"): "needs an engine; test_containers.py reads what it would start",
    ("docs/storage.md", "import"): "test_docs.py::test_numpy_reads_a_bag_by_the_docs_own_lines",
    ("docs/tutorial.md", "make setup"): "serves for ever; a service is up",
}
BEFORE = {"cp -a backup data": "mv data lost\n"}  # a restore begins where nothing is


@dataclass(frozen=True)
class Block:
    page: str  # from the root
    language: str
    code: str
    shown: str | None  # what the page says it printed

    def why_not(self) -> str | None:
        reasons = (why for (page, begin), why in NOT_RUN.items() if page == self.page and self.code.startswith(begin))
        return next(reasons, None)


def blocks_of(path: Path) -> list[Block]:
    """The blocks of a page from top to bottom, without the indent of a list."""
    found = FENCE.findall(path.read_text())
    page = str(path.relative_to(ROOT))
    return [
        Block(page, language, re.sub(f"^{indent}", "", code, flags=re.MULTILINE), shown or None)
        for indent, language, code, shown in found
    ]


BLOCKS = {
    str(path.relative_to(ROOT)): blocks_of(path)
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
RUN = [page for page, blocks in BLOCKS.items() if any(block.why_not() is None for block in blocks)]


@dataclass(frozen=True)
class World:
    """What the blocks speak of: a service, its data directory, and what is put in place of the docs' examples."""

    data_dir: Path
    names: dict[str, str]  # variables of the shell
    instead: dict[str, str]

    def code(self, block: Block) -> str:
        code = block.code
        for example, ours in self.instead.items():
            code = code.replace(example, ours)
        return BEFORE.get(block.code.splitlines()[0], "") + code


def chest(number: int) -> list[tuple[str, bytes]]:
    """Files of patient P1, P2, ...; the first one's series is long enough for the slices that the docs name."""

    def change(_: int, dataset) -> None:
        dataset.BodyPartExamined = "CHEST"

    return slice_files(Identity(f"P{number}"), count=72 if number == 1 else 2, size=64, seed=number, change=change)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What a reader would have lying there, under the docs' names."""
    folder = tmp_path_factory.mktemp("files")
    slices = slice_files(Identity("SENT"), count=3, size=64, seed=99)
    (folder / "ct").mkdir()
    for name, content in slices:
        (folder / "ct" / name).write_bytes(content)
    (folder / "slice.dcm").write_bytes(slices[0][1])
    (folder / "series.tar.xz").write_bytes(tarred(slices, "w:xz"))
    with zipfile.ZipFile(folder / "series.zip", "w") as archive:
        for name, content in slices:
            archive.writestr(name, content)
    part = b"--edge\r\nContent-Type: application/dicom\r\n\r\n" + slices[0][1] + b"\r\n--edge--\r\n"
    (folder / "body").write_bytes(part)
    labels = "".join(f"P{number},{number % 2}\n" for number in range(1, PATIENTS + 1))
    (folder / "labels.csv").write_text(f"patient_id,nodule\n{labels}")
    (folder / ".curlrc").write_text("fail-with-body\nsilent\nshow-error\n")
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, files) -> Iterator[World]:
    """A service with ten patients, heads `nodule` and `nodules`, of that two versions, and two patients to erase."""
    data_dir, export = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("export")
    (data_dir / "weights").mkdir()
    for name, content in slice_files(Identity("EXPORTED"), count=2, seed=98):
        (export / name).write_bytes(content)
    quick = {"KEYSLICE_SWEEP_SECONDS": "1", "KEYSLICE_EXPORT_ROOTS": str(export)}
    with in_background(data_dir, **quick) as running, httpx.Client(base_url=running.address, timeout=120) as http:
        for number in range(1, PATIENTS + 1):
            embed(http, chest(number))
        for name in ("P-0001", "ERASED"):
            embed(http, slice_files(Identity(name), count=1, seed=97))
        with Keyslice(running.address) as client:
            for name in ("nodule", "nodules", "nodules"):
                head = client.train(files / "labels.csv", name=name, folds=2, epochs=1, permutations=0)
                client.wait(head)
        first = Identity("P1")
        names = {
            "SERIES": first.series_uid,
            "STUDY": first.study_uid,
            "INSTANCE": first.uid("slice", "1", "1", "0"),
            "PATIENT": "P1",
            "HEAD": head.head_id,
            "KEYSLICE_PORT": running.address.rpartition(":")[2],
        }
        instead = {
            "http://127.0.0.1:8000": running.address,
            "Keyslice()": f'Keyslice("{running.address}")',
            "/mnt/pacs/export": str(export),
            UID: Identity("ERASED").series_uid,
            "keyslice erase": "keyslice erase --yes",
            "--protocol nested": "--protocol nested --folds 2 --inner-folds 2 --epochs 1",
            ".venv/bin/": "",
        }
        yield World(data_dir, names, instead)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[World]:
    """A service with keys, one of them to be revoked, and a series in the audit."""
    settings = settings_of(tmp_path_factory.mktemp("guarded"))
    keys = keys_of(settings)
    revoked, _ = keys.create("old", ["read"], None)
    _, key = keys.create("ward", ["read", "write"], None)
    with serving(settings, port=0) as server:
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        with httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"}) as http:
            post(http, slice_files(Identity("AUDITED"), count=1)).raise_for_status()
        instead = {
            "http://127.0.0.1:8000": address,
            UID: Identity("AUDITED").series_uid,
            "4af9614ccf9e": revoked.key_id,
        }
        yield World(settings.data_dir, {"KEYSLICE_API_KEY": key}, instead)


@pytest.fixture
def desk(tmp_path, files, monkeypatch) -> Path:
    """The folder a reader is in, with the files there."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(block: Block, world: World, desk: Path, names: dict[str, Any]) -> str:
    """What the block printed; it must not fail. Python blocks of a page share their names."""
    code = world.code(block)
    if block.language == "python":
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, block.page, "exec"), names)
        return printed.getvalue()
    ours = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "CURL_HOME": str(desk)}
    ours |= {"PYTHONPATH": str(ROOT), "KEYSLICE_DATA_DIR": "data"}
    shell = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        env=os.environ | ours | world.names,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shell.returncode == 0, f"{block.page}: {code}\n{shell.stdout[-2000:]}{shell.stderr[-2000:]}"
    return shell.stdout


def alike(text: str) -> str:
    """Without what depends on the machine: digits behind a point, and ids."""
    return re.sub(r"\b[0-9a-f]{12}\b", "ID", re.sub(r"\d+\.\d+", "0.0", text)).strip()


@pytest.mark.parametrize("page", [page for page in RUN if page not in ("docs/security.md", "docs/tutorial.md")])
def test_every_block_of_the_page_runs(cohort, desk, page):
    run_page(page, cohort, desk)


def test_every_block_about_keys_runs(guarded, desk):
    run_page("docs/security.md", guarded, desk)


def test_the_tutorial_prints_what_it_says_on_the_real_series(cohort, desk, lidc_0001):
    with zipfile.ZipFile(desk / "real.zip", "w") as archive:
        for path in lidc_0001:
            archive.write(path, path.name)
    archive_of_the_series = {"$NBIA/getImage?SeriesInstanceUID=$SERIES": (desk / "real.zip").as_uri()}
    here = replace(cohort, instead=cohort.instead | archive_of_the_series)

    run_page("docs/tutorial.md", here, desk)

    assert (desk / "attention.svg").read_text().startswith("<svg")


def run_page(page: str, world: World, desk: Path) -> None:
    """Run the page's blocks from top to bottom; what Python printed must be what the page shows."""
    (desk / "data").symlink_to(world.data_dir)
    names: dict[str, Any] = {}
    ran = [(block, run(block, world, desk, names)) for block in BLOCKS[page] if block.why_not() is None]
    told = [(printed, block.shown) for block, printed in ran if block.language == "python" and block.shown]

    assert [alike(printed) for printed, _ in told] == [alike(shown) for _, shown in told]


def test_what_is_not_run_is_there_and_so_are_the_tests_named_in_its_place():
    stale = [
        (page, begin) for page, begin in NOT_RUN if not any(block.code.startswith(begin) for block in BLOCKS[page])
    ]
    named = {name for why in NOT_RUN.values() for name in re.findall(r"test_\w+\.py", why)}

    assert stale == []
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).exists()] == []


def test_a_new_block_is_run_or_listed():
    """Fences of other kinds are shown only: answers, settings, equations, and the usage that test_docs.py holds."""
    kinds = {
        kind
        for page in BLOCKS
        for kind in re.findall(r"^ *```(\w*)[^\n]*\n.*?^ *```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    }

    assert kinds <= {"shell", "bash", "python", "json", "text", "toml", "yaml", "csv", "nginx", "js", "math", "console"}
