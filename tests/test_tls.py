"""The nginx configuration of docs/security.md before a real service."""

import datetime
import http.client
import re
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, missing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from posting import post, slice_files, wait
from serving import keys_of

from models.ct.phantom import Identity
from service.embedded import free_port, in_background
from service.settings import Settings

HOST = "keyslice.example"
AROUND = """
daemon off; pid {folder}/pid; error_log {folder}/error.log;
events {{}}
http {{
    client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
{server}
}}
"""


def certify(folder: Path) -> Path:
    """A certificate that vouches for itself, with its key beside it."""
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    today = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName(HOST), x509.DNSName("localhost")])
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
    made = made.not_valid_before(today - datetime.timedelta(days=1)).not_valid_after(today + datetime.timedelta(days=1))
    signed = made.add_extension(names, critical=False).sign(key, hashes.SHA256())
    (folder / "keyslice.crt").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (folder / "keyslice.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return folder / "keyslice.crt"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[tuple[httpx.Client, ssl.SSLContext]]:
    """A client of nginx, and what it trusts. nginx is before a service that has a key, by the docs' own lines."""
    nginx = shutil.which("nginx") or shutil.which("/usr/sbin/nginx") or missing("no nginx (Debian nginx-light)")
    folder = tmp_path_factory.mktemp("tls")
    (server,) = re.findall(r"```nginx\n(.*?)```", (ROOT / "docs" / "security.md").read_text(), re.DOTALL)
    _, key = keys_of(Settings(data_dir=folder / "data")).create("here", ["read", "write"], None)
    trusting, port = ssl.create_default_context(cafile=certify(folder)), free_port("127.0.0.1", 0)
    with in_background(folder / "data", KEYSLICE_PUBLIC_URL=f"https://{HOST}") as running:
        places = {
            "443": f"127.0.0.1:{port}",
            "/etc/nginx": str(folder),
            "/var/log/nginx": str(folder),
            "http://127.0.0.1:8000": running.address,
        }
        for written, ours in places.items():
            assert written in server
            server = server.replace(written, ours, 1 if written == "443" else -1)
        (folder / "nginx.conf").write_text(AROUND.format(folder=folder, server=server))
        process = subprocess.Popen([nginx, "-p", folder, "-c", folder / "nginx.conf"])
        headers = {"Host": HOST, "Authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=f"https://localhost:{port}", verify=trusting, headers=headers, timeout=120
        ) as client:
            while not is_up(client):
                assert process.poll() is None
                time.sleep(0.05)
            yield client, trusting
        process.terminate()
        process.wait()
        assert "BEHIND-A-PROXY" not in (folder / "error.log").read_text()


@pytest.fixture(scope="module")
def proxied(place) -> httpx.Client:
    return place[0]


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/healthz").status_code == 200
    except httpx.TransportError:
        return False


def test_an_upload_its_progress_and_its_embedding_go_through(proxied):
    identity = Identity("BEHIND-A-PROXY")

    job = post(proxied, slice_files(identity, count=40)).raise_for_status().json()["job_id"]
    with proxied.stream("GET", f"/v1/jobs/{job}/events") as answer:
        events = [line for line in answer.iter_lines() if line.startswith("data:")]

    assert '"state":"done"' in events[-1]
    assert wait(proxied, job)["state"] == "done"
    bag = proxied.get(f"/v1/series/{identity.series_uid}/embeddings").json()
    assert len(bag["slices"]) == 40
    assert "max-age" in proxied.get("/healthz").headers["strict-transport-security"]


def test_addresses_in_answers_are_the_proxys(proxied):
    identity = Identity("ADDRESSED")
    wait(proxied, post(proxied, slice_files(identity)).json()["job_id"])

    (study,) = proxied.get("/dicom-web/studies", params={"PatientID": identity.patient_id}).json()

    assert study["00081190"]["Value"] == [f"https://{HOST}/dicom-web/studies/{identity.study_uid}"]


def test_who_has_no_key_is_told_before_their_body_has_come(place):
    client, trusting = place
    connection = http.client.HTTPSConnection("localhost", client.base_url.port, context=trusting, timeout=60)
    connection.putrequest("POST", "/v1/series")
    connection.putheader("Content-Type", "multipart/form-data; boundary=edge")
    connection.putheader("Content-Length", str(2**30))
    connection.endheaders(bytes(2**16))

    assert connection.getresponse().status == 401
    connection.close()


def test_without_tls_nothing_is_said(proxied):
    plain = httpx.get(str(proxied.base_url).replace("https", "http"))

    assert (plain.status_code, "keyslice" in plain.text.lower()) == (400, False)
