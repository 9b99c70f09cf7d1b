"""Every environment variable that Keyslice reads, with its unit and default."""

import ipaddress
import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.modes import Mode, in_mode
from models.specs import MissingWeights, encoder_id
from models.zoo import DEFAULT_ENCODER, encoders
from service.dicom_out.peers import AE_TITLE, parse_peers
from service.remotes import S3Prefix, parse_remote


class Settings(BaseSettings):
    """Read once at the edge and passed down. Each field is the variable KEYSLICE_<FIELD>."""

    model_config = SettingsConfigDict(env_prefix="KEYSLICE_", extra="ignore")

    host: str = Field("127.0.0.1", description="address the API listens on; beyond loopback an API key is needed")
    port: int = Field(8000, ge=0, le=65535, description="port the API listens on")
    data_dir: Path = Field(Path("data"), description="archive, bags, index, catalog and the embedded broker's log")
    weights_dir: Path | None = Field(None, description="weights that no package brings; default <data_dir>/weights")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default SQLite at <data_dir>/catalog.db")
    object_store: str | None = Field(
        None, description="s3://bucket/prefix where archive, bags and index lie instead of in the data directory"
    )
    broker_url: str | None = Field(None, description="Redis or Valkey URL; unset, `keyslice up` starts its own Valkey")
    encoder: str = Field(DEFAULT_ENCODER, description="the encoder of uploads that name none")
    mode: Mode = Field("exact", description="how encoders run: exact (fp32), fast (reduced precision), bulk (compiled)")
    noncommercial: bool = Field(False, description="true permits encoders whose licence forbids commercial use")
    decode_processes: int = Field(
        2, ge=1, description="processes per encoder of a worker that decode and window slices"
    )
    series_at_once: int = Field(2, ge=1, description="series that a worker embeds at once, sharing batches")

    public_url: str | None = Field(
        None,
        pattern=r"^https?://",
        description="address of the API in DICOMweb's answers; unset, as the caller reached it",
    )
    cors_origins: str = Field("", description="origins whose pages may read the API, as a viewer's, between commas")
    api_key: SecretStr | None = Field(None, description="the API key that our own commands and the Python client send")
    rate_limit: int | None = Field(
        None, gt=0, description="requests per minute of one API key, to each API process; unset, any number"
    )

    oidc_issuer: str | None = Field(
        None, description="https address of the OpenID Connect provider whose access tokens count beside API keys"
    )
    oidc_audience: str | None = Field(None, description="whom such tokens must be for")
    oidc_claim: str = Field("scope", description="the claim that has such tokens' scopes, as keyslice:read")

    max_waiting: int = Field(
        10_000, gt=0, description="series of one sender that may wait for a worker; beyond, new ones are refused"
    )
    series_quiet_seconds: float = Field(
        60.0, ge=0, description="without another slice, after which a series that came by network counts as whole"
    )
    series_limit_seconds: float = Field(
        3600.0, gt=0, description="after its first slice, a series that came by network counts as whole in any case"
    )

    max_upload_bytes: int = Field(20 * 2**30, gt=0, description="bytes of one upload, archives as sent")
    max_upload_files: int = Field(100_000, gt=0, description="files of one upload, archive members counted")
    max_upload_seconds: float = Field(6 * 3600.0, gt=0, description="time that one upload may take")
    upload_silent_seconds: float = Field(60.0, gt=0, description="silence after which an upload is cut off")
    max_expansion: float = Field(50.0, gt=0, description="unpacked bytes per byte of archive")
    export_roots: str = Field(
        "",
        description="below what callers may name exports: directories as paths or file: URIs, DICOMweb servers and S3 "
        "prefixes, between commas; unset, nowhere",
    )
    scan_processes: int = Field(2, ge=1, description="processes of a worker that read the headers of an export")
    export_series_ahead: int = Field(
        8,
        ge=1,
        description="series of an export that wait for the encoder or are in it; the others of it are not queued yet",
    )
    max_body_bytes: int = Field(8 * 2**20, gt=0, description="bytes of a request that brings no file")
    max_labels_bytes: int = Field(32 * 2**20, gt=0, description="bytes of a labels table")
    max_neighbours: int = Field(1000, gt=0, description="largest k of a search")

    index_ann_rows: int = Field(
        50_000, gt=0, description="slices times windows of an encoder from which its searches use an ANN index"
    )
    index_recall: float = Field(
        0.95, ge=0, le=1, description="measured recall at 10 below which an ANN index is not used"
    )
    index_upkeep_seconds: float = Field(60.0, gt=0, description="how often the index is mended, built and compacted")

    dicom_peers: str = Field(
        "",
        description="where DICOM may be sent: STOW-RS URLs and dicom://TITLE@host:port, between commas",
    )

    dicomweb_server: str | None = Field(
        None, description="the one DICOMweb server that the credentials below are sent to, as https://host/path"
    )
    dicomweb_token: SecretStr | None = Field(None, description="bearer token of that server")
    dicomweb_user: str | None = Field(None, description="user of that server, instead of a token")
    dicomweb_password: SecretStr | None = Field(None, description="and the user's password")
    dicomweb_ca: Path | None = Field(
        None, description="PEM of the authorities that DICOMweb servers' certificates may be of; else the usual ones"
    )
    fetch_at_once: int = Field(8, ge=1, description="files that an export reads at once of a DICOMweb server or bucket")
    fetch_silent_seconds: float = Field(60.0, gt=0, description="silence after which a DICOMweb server is given up")

    receive_port: int | None = Field(
        None, ge=1, le=65535, description="port of the C-STORE receiver; unset, `keyslice up` starts none"
    )
    receive_host: str = Field("127.0.0.1", description="address that the C-STORE receiver listens on")
    receive_aet: str = Field("KEYSLICE", pattern=AE_TITLE, description="AE title that senders must call")
    receive_associations: int = Field(10, gt=0, description="associations that the receiver holds at once")
    receive_silent_seconds: float = Field(60.0, gt=0, description="silence after which a sender is cut off")
    calling_aets: str = Field(
        "",
        validate_default=True,
        description="AE titles that may send by C-STORE, between commas; any if none, on loopback only",
    )
    min_free_bytes: int = Field(
        2 * 2**30, ge=0, description="bytes that stay free on the data directory's disk: nothing is taken in below"
    )

    log_format: Literal["text", "json"] = Field(
        "text", description="json writes every log line as an object, with the ids of request, task, job and series"
    )
    pseudonym_key: SecretStr | None = Field(
        None,
        min_length=32,
        description="identifiers become hashes by it on arrival, dates are shifted; unset, nothing",
    )
    audit_key: SecretStr | None = Field(None, min_length=16, description="signs the audit's entries; unset, unsigned")
    audit_days: float | None = Field(None, gt=0, description="after which entries of the audit go; unset, never")
    verify_reads: bool = Field(
        False, description="true compares bags and archived files with their checksums whenever they are read"
    )

    sweep_seconds: float = Field(5.0, gt=0, description="how often work whose message was lost is looked for")
    stale_seconds: float = Field(15.0, gt=0, description="silence after which a worker counts as dead")
    max_attempts: int = Field(3, gt=0, description="attempts at one series or head before it counts as failed")
    visibility_seconds: int = Field(3600, gt=0, description="after which the broker hands an unfinished message on")
    canary_seconds: float = Field(60.0, gt=0, description="how often a worker embeds the canary slice")
    ready_seconds: float = Field(600.0, gt=0, description="age of the last embedding above which /readyz fails")

    @field_validator("encoder")
    @classmethod
    def _known_encoder(cls, name: str, earlier: ValidationInfo) -> str:
        if {"data_dir", "weights_dir"} <= earlier.data.keys():  # else one of them is wrong, which is said
            known = encoders(_weights_path(earlier.data["data_dir"], earlier.data["weights_dir"]))
            if name not in known:
                raise ValueError(f"unknown encoder {name!r}, expected one of {', '.join(known)}")
        return name

    @field_validator("object_store")
    @classmethod
    def _readable_bucket(cls, uri: str | None) -> str | None:
        place = parse_remote(uri) if uri else None
        if place is not None and not isinstance(place, S3Prefix):
            raise ValueError("expected s3://bucket/prefix")
        return str(place) if place else None

    @field_validator("dicom_peers")
    @classmethod
    def _readable_peers(cls, peers: str) -> str:
        parse_peers(peers)
        return peers

    @field_validator("dicomweb_server")
    @classmethod
    def _readable_server(cls, url: str | None) -> str | None:
        return url and str(parse_remote(f"dicomweb+{url}")).removeprefix("dicomweb+")

    @model_validator(mode="after")
    def _whose_credentials(self) -> Self:
        if (self.dicomweb_token or self.dicomweb_user or self.dicomweb_password) and not self.dicomweb_server:
            raise ValueError("credentials of a DICOMweb server without KEYSLICE_DICOMWEB_SERVER, the one they are of")
        if bool(self.dicomweb_user) != bool(self.dicomweb_password):
            raise ValueError("KEYSLICE_DICOMWEB_USER and KEYSLICE_DICOMWEB_PASSWORD, expected both or none")
        return self

    @model_validator(mode="after")
    def _whole_provider(self) -> Self:
        if bool(self.oidc_issuer) != bool(self.oidc_audience):
            raise ValueError("KEYSLICE_OIDC_ISSUER and KEYSLICE_OIDC_AUDIENCE, expected both or none")
        if self.oidc_issuer and not (
            (address := urlsplit(self.oidc_issuer)).scheme == "https"
            or (address.scheme == "http" and is_loopback(address.hostname or ""))
        ):
            raise ValueError("KEYSLICE_OIDC_ISSUER, expected an address that starts with https://")
        return self

    @field_validator("calling_aets")
    @classmethod
    def _named_callers(cls, titles: str, earlier: ValidationInfo) -> str:
        named = parse_titles(titles)
        if wrong := [title for title in named if not re.match(AE_TITLE, title)]:
            raise ValueError(f"{wrong[0]!r} is no AE title")
        host = earlier.data.get("receive_host", "127.0.0.1")
        if earlier.data.get("receive_port") and not is_loopback(host) and not named:
            raise ValueError(
                f"KEYSLICE_RECEIVE_HOST is {host}, expected a loopback address or the titles that may call"
            )
        return titles

    @property
    def catalog_url(self) -> str:
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'catalog.db'}"

    @property
    def bucket(self) -> S3Prefix | None:
        """The object store, where there is one."""
        place = parse_remote(self.object_store) if self.object_store else None
        return place if isinstance(place, S3Prefix) else None

    @property
    def audit_secret(self) -> bytes | None:
        return self.audit_key.get_secret_value().encode() if self.audit_key else None

    @property
    def weights_path(self) -> Path:
        return _weights_path(self.data_dir, self.weights_dir)

    @property
    def staging_dir(self) -> Path:
        """Uploads on their way in: below data_dir, so that a file moves into the archive without a copy."""
        return self.data_dir / "staging"

    def own_encoder_id(self) -> str:
        """The id of the service's encoder, run as its mode says. Raises MissingWeights or WrongWeights."""
        plain = encoders(self.weights_path).get(self.encoder)
        if plain is None:  # an export was there at the start
            raise MissingWeights(f"{self.encoder} is no longer in the weights directory")
        return encoder_id(in_mode(plain, self.mode, self.weights_path), self.weights_path)


def parse_titles(titles: str) -> list[str]:
    """The AE titles of KEYSLICE_CALLING_AETS, which stand between commas."""
    return [title.strip() for title in titles.split(",") if title.strip()]


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _weights_path(data_dir: Path, weights_dir: Path | None) -> Path:
    return weights_dir or data_dir / "weights"
