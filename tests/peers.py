"""DICOM peers on loopback, and a series put into the stores without a worker."""

import io
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path

import numpy as np
import pydicom
from pynetdicom import AE, evt
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response

from models.ct.header import read_header
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

ENCODER, DIM = "toy@0123456789ab", 4


@dataclass
class StowServer:
    """A small STOW-RS store; each path below answers as one kind of server does."""

    address: str = ""
    received: list[pydicom.Dataset] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)

    async def store(self, request: Request) -> Response:
        head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
        message = BytesParser(policy=HTTP).parsebytes(head + await request.body())
        assert message.get_content_type() == "multipart/related" and message.get_param("type") == "application/dicom"
        self.paths.append(request.url.path)
        files = [part.get_payload(decode=True) for part in message.iter_parts()]
        self.received += [pydicom.dcmread(io.BytesIO(file)) for file in files]
        uids = [str(each.SOPInstanceUID) for each in self.received[-len(files) :]]
        failed = [
            {"00081155": {"vr": "UI", "Value": [uid]}, "00081197": {"vr": "US", "Value": [49442]}} for uid in uids
        ]
        answers = {
            "plain": Response(status_code=200),
            "some": JSONResponse([{"00081198": {"vr": "SQ", "Value": failed[:1]}}], 202),
            "none": JSONResponse({"00081198": {"vr": "SQ", "Value": failed}}, 409),
            "orthanc": JSONResponse({"00081198": {"vr": "SQ", "Value": failed[1:]}}, 200),  # says 200 and what failed
            "vague": Response("<xml/>", 202),
            "redirect": RedirectResponse(f"{self.address}/plain", 307),
            "error": Response("no", 500),
        }
        return answers[request.path_params["kind"]]


@dataclass
class Scp:
    """A C-STORE SCP that answers with `status`."""

    port: int = 0
    status: int = 0
    received: list[pydicom.Dataset] = field(default_factory=list)
    callers: list[str] = field(default_factory=list)

    def on_store(self, event: evt.Event) -> int:
        dataset = event.dataset
        dataset.file_meta = event.file_meta
        self.received.append(dataset)
        self.callers.append(event.assoc.requestor.ae_title)
        return self.status


def serving(scp: Scp, contexts: list[tuple[str, list[str]]]) -> Iterator[Scp]:
    entity = AE("PACS")
    entity.require_called_aet = True
    for sop_class, syntaxes in contexts:
        entity.add_supported_context(sop_class, syntaxes)
    server = entity.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, scp.on_store)])
    scp.port = server.server_address[1]
    yield scp
    server.shutdown()


def stored_series(stores: Stores, paths: list[Path], seed: int, kind: str = "slice2d", commit: bool = True) -> str:
    """Put a series into archive, catalog and bags, as intake and a worker would; answers its UID."""
    headers = [read_header(path) for path in paths]
    uid = str(headers[0].SeriesInstanceUID)
    for path, header in zip(paths, headers, strict=True):
        staged = path.with_suffix(".staged")
        shutil.copy(path, staged)
        stores.archive.add(uid, [(str(header.SOPInstanceUID), staged)])
    stores.catalog.receive([Arrival(uid, str(headers[0].StudyInstanceUID), str(headers[0].PatientID))], ENCODER)
    if commit:
        key, (content, _) = EmbeddingKey(uid, ENCODER), stores.archive.content(uid)
        rows = headers[:1] if kind == "volume3d" else headers
        bag = np.random.default_rng(seed).normal(size=(len(rows), 2, DIM)).astype(np.float16)
        receipt = {
            "kind": kind,
            "windows": ["abdomen", "lung"],
            "sop_uids": [str(each.SOPInstanceUID) for each in rows],
            "z_mm": [float(each.ImagePositionPatient[2]) for each in rows],
        }
        stores.bags.put(key, content, bag, receipt)
        stores.catalog.commit(key, content, len(bag), {}, {})
    return uid
