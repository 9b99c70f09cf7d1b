"""DICOM out: which documents go to which peer."""

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from service.dicom_out.peers import AE_TITLE
from service.schemas.base import Schema, Sent, Text

DicomKind = Literal["key_objects", "report"]


class CStoreAddress(Sent):
    """A C-STORE SCP."""

    host: Text
    port: int = Field(ge=1, le=65535)
    called_ae: str = Field(pattern=AE_TITLE)
    calling_ae: str = Field("KEYSLICE", pattern=AE_TITLE)


class DicomPeer(Sent):
    """One of the two: a STOW-RS URL or a C-STORE SCP, that KEYSLICE_DICOM_PEERS names."""

    stow: str | None = Field(None, min_length=1, max_length=2000, description="the URL that is posted to")
    c_store: CStoreAddress | None = None

    @model_validator(mode="after")
    def _one(self) -> "DicomPeer":
        if (self.stow is None) == (self.c_store is None):
            raise ValueError("expected either stow or c_store")
        return self


class DicomOut(Sent):
    """Which documents of a head's prediction go where."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"head": "0123456789ab", "to": {"stow": "https://pacs.example/dicom-web/studies"}}]
        },
    )

    head: Text
    kinds: list[DicomKind] = Field(["key_objects", "report"], min_length=1, max_length=2)
    to: DicomPeer


class DicomSent(Schema):
    kind: DicomKind
    sop_class_uid: str
    sop_instance_uid: str
    status: int = Field(description="DICOM status: 0 stored, 0xB000 to 0xBFFF stored with a warning, else refused")


class DicomOutDone(Schema):
    series_uid: str
    head_id: str
    sent: list[DicomSent]
