"""The SQL tables of the catalog; migrations/ holds the same, step by step."""

import uuid
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Text,
    TypeDecorator,
    UniqueConstraint,
    text,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class UTCDateTime(TypeDecorator[datetime]):
    """An aware UTC time in every database; SQLite alone forgets the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


def now() -> datetime:
    return datetime.now(UTC)


class Row(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map: ClassVar = {datetime: UTCDateTime, dict[str, Any]: JSON, list[str]: JSON}


class PatientRow(Row):
    """The one place that knows a patient's id; everything else carries the opaque key."""

    __tablename__ = "patients"

    patient_key: Mapped[str] = mapped_column(primary_key=True)
    patient_id: Mapped[str] = mapped_column(unique=True)


class SeriesRow(Row):
    __tablename__ = "series"

    series_uid: Mapped[str] = mapped_column(primary_key=True)
    series_key: Mapped[str] = mapped_column(default=lambda: uuid.uuid4().hex)  # another one after an erasure
    study_uid: Mapped[str] = mapped_column(index=True)
    patient_key: Mapped[str] = mapped_column(ForeignKey(PatientRow.patient_key), index=True)
    received_at: Mapped[datetime] = mapped_column(default=now)
    received: Mapped[int]  # instances in the archive
    content: Mapped[str]  # Archive.content(): which instances they are
    encoder_id: Mapped[str]  # the encoder last asked for: `state` speaks of its embedding
    verdict: Mapped[dict[str, Any] | None]
    geometry: Mapped[dict[str, Any] | None]

    # Of a series that comes slice by slice: since when, how many its sender says, and when it counts as whole.
    collecting_since: Mapped[datetime | None]
    expected: Mapped[int | None]
    whole_at: Mapped[datetime] = mapped_column(default=now, index=True)

    # Of its first slice: what a search may ask for, and all that QIDO-RS answers, as DICOM JSON (PS3.18 F).
    header: Mapped[dict[str, Any]] = mapped_column(default=dict)
    study_date: Mapped[str] = mapped_column(default="", index=True)  # YYYYMMDD
    accession_number: Mapped[str] = mapped_column(default="", index=True)
    modality: Mapped[str] = mapped_column(default="")
    body_part: Mapped[str] = mapped_column(default="")
    manufacturer: Mapped[str] = mapped_column(default="")
    kernel: Mapped[str] = mapped_column(default="")

    patient: Mapped[PatientRow] = relationship(lazy="joined", innerjoin=True)
    embeddings: Mapped[list["EmbeddingRow"]] = relationship(lazy="selectin", order_by="EmbeddingRow.encoder_id")

    @property
    def current(self) -> "EmbeddingRow":
        return next(each for each in self.embeddings if each.encoder_id == self.encoder_id)

    @property
    def patient_id(self) -> str:
        return self.patient.patient_id

    @property
    def state(self) -> str:
        return self.current.state

    @property
    def error(self) -> str | None:
        return self.current.error


class ArchiveSumRow(Row):
    """A file of the archive as it arrived."""

    __tablename__ = "archive_sums"

    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid), primary_key=True)
    sop_uid: Mapped[str] = mapped_column(primary_key=True)
    sha256: Mapped[bytes] = mapped_column(LargeBinary)


class Work:
    """Columns of anything a worker takes on: who has it, since when, how often it was tried."""

    state: Mapped[str] = mapped_column(index=True)
    attempts: Mapped[int] = mapped_column(default=0)
    holder: Mapped[str | None]
    touched_at: Mapped[datetime] = mapped_column(default=now)  # sent, claimed, or last heard of
    done: Mapped[int] = mapped_column(default=0)
    known: Mapped[int] = mapped_column(default=0)
    error: Mapped[str | None]


class EmbeddingRow(Work, Row):
    """An embedding asked for. It is readable once `content` is set; that write is the commit."""

    __tablename__ = "embeddings"

    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid), primary_key=True)
    encoder_id: Mapped[str] = mapped_column(primary_key=True)
    sender: Mapped[str] = mapped_column(default="")  # who asked for the work that is open, as the audit names them
    content: Mapped[str | None]  # of the bag that counts
    slices: Mapped[int | None]
    embedded_at: Mapped[datetime | None]
    indexed_content: Mapped[str | None]  # of the bag whose rows are in the index
    indexed_rows: Mapped[int | None]  # how many they are

    # Of the bag whose rows are in the index, as models/health.py has them.
    norm: Mapped[float | None]
    norm_spread: Mapped[float | None]
    effective_rank: Mapped[float | None]

    __table_args__ = (
        Index("ix_embeddings_encoder_state", "encoder_id", "state"),
        Index("ix_embeddings_sender_state", "sender", "state"),
        Index(
            "ix_embeddings_measured",
            "encoder_id",
            "embedded_at",
            sqlite_where=text("norm IS NOT NULL"),
            postgresql_where=text("norm IS NOT NULL"),
        ),
    )


class ErasureRow(Row):
    """What is to leave every store; once it has, how much that was, and nothing of whom."""

    __tablename__ = "erasures"

    erasure_id: Mapped[str] = mapped_column(primary_key=True)
    asked_at: Mapped[datetime] = mapped_column(default=now)
    emptied: Mapped[bool] = mapped_column(default=False)  # every store but the catalog's own files
    erased_at: Mapped[datetime | None]  # those too
    patient_id: Mapped[str | None]  # of a patient who is to go, until every store is empty
    series: Mapped[int]
    encoder_ids: Mapped[list[str]]  # whose indexes held rows
    heads: Mapped[list[str]]  # that were trained on some of it
    removed: Mapped[dict[str, Any]]  # how many, by kind


class ErasingSeriesRow(Row):
    """A series on its way out: nothing of it is taken in before this row is gone."""

    __tablename__ = "erasing_series"

    series_uid: Mapped[str] = mapped_column(primary_key=True)
    erasure_id: Mapped[str] = mapped_column(ForeignKey(ErasureRow.erasure_id), index=True)
    holders: Mapped[list[str]]  # workers that had it in hand and have not let go


class IndexRow(Row):
    """Which Lance table an encoder's searches use, and what its ANN index was measured to find."""

    __tablename__ = "indexes"

    encoder_id: Mapped[str] = mapped_column(primary_key=True)
    table_name: Mapped[str]
    broken: Mapped[bool] = mapped_column(default=False)  # a search found it so; it is being rebuilt
    built_rows: Mapped[int | None]  # of the ANN index; None where searches are exact
    built_at: Mapped[datetime | None]
    build_seconds: Mapped[float | None]
    recall: Mapped[float | None]  # at 10, of the effort below, or the best there was
    nprobes: Mapped[int | None]  # None: no effort finds enough, searches are exact
    refine: Mapped[int | None]
    measured: Mapped[dict[str, Any] | None]  # of the last build: queries, every effort tried


class SeriesTagRow(Row):
    """A tag that users gave to a series."""

    __tablename__ = "series_tags"

    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid, ondelete="CASCADE"), primary_key=True)
    tag: Mapped[str] = mapped_column(primary_key=True, index=True)


class PooledRow(Row):
    """A series in one vector: its mean, or a head's attention over its slices."""

    __tablename__ = "pooled"

    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid, ondelete="CASCADE"), primary_key=True)
    encoder_id: Mapped[str] = mapped_column(primary_key=True)
    pooling: Mapped[str] = mapped_column(primary_key=True)  # "mean", or a head's id
    content: Mapped[str]  # of the bag it was made from
    vector: Mapped[bytes] = mapped_column(LargeBinary)  # float16, of length one


class HeadRow(Work, Row):
    __tablename__ = "heads"

    head_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]  # its own id where nobody named it
    version: Mapped[int] = mapped_column(default=1)
    promoted: Mapped[bool] = mapped_column(default=False)  # the version that the bare name means
    created_at: Mapped[datetime] = mapped_column(default=now)
    encoder_id: Mapped[str] = mapped_column(index=True)
    labels: Mapped[list[str]]
    options: Mapped[dict[str, Any]]
    targets: Mapped[dict[str, Any]]  # of the labels table: Matched.as_targets()
    report: Mapped[dict[str, Any] | None]
    weights: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)  # safetensors
    graph: Mapped[bytes | None] = mapped_column(LargeBinary, deferred=True)  # ONNX

    __table_args__ = (UniqueConstraint("name", "version", name="uq_heads_name_version"),)


class HeadNetworkRow(Row):
    """A network of a head in training: what another worker need not train again."""

    __tablename__ = "head_networks"

    head_id: Mapped[str] = mapped_column(ForeignKey(HeadRow.head_id), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    network: Mapped[bytes] = mapped_column(LargeBinary)


class PredictionRow(Row):
    """A prediction that was given: by which head, of which bags, asked how."""

    __tablename__ = "predictions"

    prediction_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    patient_key: Mapped[str] = mapped_column(ForeignKey(PatientRow.patient_key), index=True)
    head_id: Mapped[str] = mapped_column(ForeignKey(HeadRow.head_id))
    asked: Mapped[dict[str, Any]]

    patient: Mapped[PatientRow] = relationship(lazy="joined", innerjoin=True)
    bags: Mapped[list["PredictionBagRow"]] = relationship(lazy="selectin", order_by="PredictionBagRow.series_uid")


class PredictionBagRow(Row):
    __tablename__ = "prediction_bags"

    prediction_id: Mapped[str] = mapped_column(ForeignKey(PredictionRow.prediction_id), primary_key=True)
    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid), primary_key=True, index=True)
    content: Mapped[str]


class JobRow(Row):
    """Work a caller can watch: an upload's series, a head in training, or an export. Its state is theirs."""

    __tablename__ = "jobs"

    job_id: Mapped[str] = mapped_column(primary_key=True)
    created_at: Mapped[datetime] = mapped_column(default=now)
    cancelled_at: Mapped[datetime | None]
    head_id: Mapped[str | None] = mapped_column(ForeignKey(HeadRow.head_id), index=True)

    head: Mapped[HeadRow | None] = relationship(lazy="joined")
    export: Mapped["ExportRow | None"] = relationship(lazy="joined", uselist=False)

    __table_args__ = (Index("ix_jobs_created_at", "created_at", "job_id"),)


class JobSeriesRow(Row):
    __tablename__ = "job_series"

    job_id: Mapped[str] = mapped_column(ForeignKey(JobRow.job_id), primary_key=True)
    series_uid: Mapped[str] = mapped_column(ForeignKey(SeriesRow.series_uid), primary_key=True, index=True)
    encoder_id: Mapped[str]


class ExportRow(Work, Row):
    """A directory, archive, bucket prefix or server whose series are embedded. `done` of `known` counts its series, and
    files before it is scanned."""

    __tablename__ = "exports"

    export_id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey(JobRow.job_id), unique=True)
    uri: Mapped[str] = mapped_column(index=True)
    encoder_id: Mapped[str]
    options: Mapped[dict[str, Any]]  # dry_run: scanned only
    created_at: Mapped[datetime] = mapped_column(default=now)
    scanned_at: Mapped[datetime | None]  # since when all its files are known
    ended_at: Mapped[datetime | None]
    files: Mapped[int | None]  # all that were found; None while they are counted in export_files
    bytes: Mapped[int | None] = mapped_column(BigInteger)
    trimmed: Mapped[bool] = mapped_column(default=False)  # it has ended, and no row of a used file is left


class ExportFileRow(Row):
    """A file of an export, as the scan found it: of which series, or why it is not used.

    The row of a file that is used goes when its series is handed over, or soon after the export has ended.
    """

    __tablename__ = "export_files"

    export_id: Mapped[str] = mapped_column(ForeignKey(ExportRow.export_id), primary_key=True)
    file_key: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)  # ExportFile.key()
    name: Mapped[bytes] = mapped_column(LargeBinary)  # below the export's root; file systems know bytes
    size: Mapped[int] = mapped_column(BigInteger)  # bytes
    place: Mapped[int] = mapped_column(BigInteger)  # where in an archive it begins
    series_uid: Mapped[str]  # empty where its header names none
    reason: Mapped[str | None]
    detail: Mapped[str]

    __table_args__ = (Index("ix_export_files_series", "export_id", "series_uid"),)


class ExportSeriesRow(Row):
    """What became of a series of an export."""

    __tablename__ = "export_series"

    export_id: Mapped[str] = mapped_column(ForeignKey(ExportRow.export_id), primary_key=True)
    series_uid: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]  # waiting, embedding; embedded, rejected, failed, set_aside, cancelled; found of a dry run
    files: Mapped[int]
    started_at: Mapped[datetime | None]
    seconds: Mapped[float | None]  # from its copy to its embedding
    slices: Mapped[int | None]  # in the embedding
    slices_set_aside: Mapped[dict[str, Any] | None]  # by the embedding: reason to number
    error: Mapped[str | None]

    __table_args__ = (Index("ix_export_series_state", "export_id", "state"),)


class LeaseRow(Row):
    """Who alone may do something, until when."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(primary_key=True)
    holder: Mapped[str]
    expires_at: Mapped[datetime]


class CanaryRow(Row):
    """The canary slice's embedding by this encoder: the first ever, and how close the last one came."""

    __tablename__ = "canaries"

    encoder_id: Mapped[str] = mapped_column(primary_key=True)
    reference: Mapped[bytes] = mapped_column(LargeBinary)  # (windows * dim) float32
    cosine: Mapped[float]
    checked_at: Mapped[datetime]


class CanaryDayRow(Row):
    """How far the canary's embeddings of one day came from the first ever."""

    __tablename__ = "canary_days"

    encoder_id: Mapped[str] = mapped_column(ForeignKey(CanaryRow.encoder_id), primary_key=True)
    day: Mapped[str] = mapped_column(primary_key=True)  # YYYY-MM-DD, UTC
    lowest: Mapped[float]  # cosine
    checks: Mapped[int]


class ApiKeyRow(Row):
    """An API key. The row stays when the key has ended: a service that ever had one does not open again."""

    __tablename__ = "api_keys"

    key_id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    digest: Mapped[bytes] = mapped_column(LargeBinary)  # SHA-256 of the secret
    scopes: Mapped[list[str]]
    tags: Mapped[list[str]] = mapped_column(default=list)  # sees only series with one of them; all where empty
    created_at: Mapped[datetime] = mapped_column(default=now)
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]  # to about an hour

    @property
    def state(self) -> Literal["active", "expired", "revoked"]:
        if self.revoked_at:
            return "revoked"
        return "expired" if self.expires_at and self.expires_at <= now() else "active"


class PseudonymKeyRow(Row):
    """The key that identifiers are hashed by, as its fingerprint; one row at most."""

    __tablename__ = "pseudonym_key"

    only: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    fingerprint: Mapped[str]


class AuditRow(Row):
    """Who read or wrote whose data: a link of the chain that service/storage/chain.py describes."""

    __tablename__ = "audit"

    seq: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False
    )
    at: Mapped[datetime] = mapped_column(index=True)  # as in the entry
    entry: Mapped[str] = mapped_column(Text)  # canonical JSON
    digest: Mapped[str]  # SHA-256 of the entry, in hexadecimal
    signature: Mapped[str | None]  # of the digest, by KEYSLICE_AUDIT_KEY
