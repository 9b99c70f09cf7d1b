"""The stores, opened together from Settings."""

from dataclasses import dataclass

from service.pseudonyms import Pseudonyms
from service.settings import Settings
from service.storage.api_keys import ApiKeys
from service.storage.archive import Archive, Sums
from service.storage.audit import Audit
from service.storage.bags import Bags
from service.storage.canaries import Canaries
from service.storage.catalog import Catalog
from service.storage.chain import Chain
from service.storage.checksums import Checksums
from service.storage.cohorts import Cohorts
from service.storage.contents import ExportContents
from service.storage.database import Database, upgrade
from service.storage.erasures import Erasures
from service.storage.exports import Exports
from service.storage.figures import Figures
from service.storage.folder import Folder
from service.storage.heads import Heads
from service.storage.health import Health
from service.storage.heatmaps import HeatMaps
from service.storage.index import SliceIndex
from service.storage.indexes import Indexes
from service.storage.inspection import Inspection
from service.storage.jobs import Jobs
from service.storage.lance_files import BucketTables, LocalTables, TableFiles
from service.storage.leases import Leases
from service.storage.objects import Objects
from service.storage.predictions import Predictions
from service.storage.pseudonym_key import require_same_key
from service.storage.queries import Queries
from service.storage.selection import Selection
from service.storage.studies import Studies
from service.storage.tags import Tags


@dataclass(frozen=True)
class Stores:
    archive: Archive
    bags: Bags
    index: SliceIndex
    indexes: Indexes
    database: Database
    inspection: Inspection
    catalog: Catalog
    checksums: Checksums
    cohorts: Cohorts
    studies: Studies
    heads: Heads
    predictions: Predictions
    leases: Leases
    erasures: Erasures
    canaries: Canaries
    figures: Figures
    health: Health
    heatmaps: HeatMaps
    selection: Selection
    tags: Tags
    queries: Queries
    jobs: Jobs
    exports: Exports
    contents: ExportContents
    api_keys: ApiKeys
    audit: Audit
    pseudonyms: Pseudonyms | None

    def close(self) -> None:
        self.database.engine.dispose()


def open_stores(settings: Settings) -> Stores:
    """Open every store below the data directory, and bring the catalog's schema up to date.

    Raises SchemaIsNewer or OtherPseudonymKey."""
    root = settings.data_dir
    root.mkdir(parents=True, exist_ok=True)
    upgrade(settings.catalog_url, lock_dir=root)
    database = Database(settings.catalog_url)
    pseudonyms = Pseudonyms.of(settings)
    require_same_key(database, pseudonyms)
    checksums = Checksums(database)
    archive = archive_of(settings, checksums.of if settings.verify_reads else None)
    chain = Chain(settings.audit_secret)
    return Stores(
        archive=archive,
        bags=Bags(objects_of(settings, "bags"), verify=settings.verify_reads),
        index=SliceIndex(tables_of(settings)),
        indexes=Indexes(database),
        database=database,
        inspection=Inspection(database),
        catalog=Catalog(database, archive),
        checksums=checksums,
        cohorts=Cohorts(database),
        studies=Studies(database),
        heads=Heads(database),
        predictions=Predictions(database),
        leases=Leases(database),
        erasures=Erasures(database, chain),
        canaries=Canaries(database),
        figures=Figures(database),
        health=Health(database),
        heatmaps=HeatMaps(root / "heatmaps"),
        selection=Selection(database),
        tags=Tags(database),
        queries=Queries(settings.staging_dir / "queries"),
        jobs=Jobs(database),
        exports=Exports(database),
        contents=ExportContents(database),
        api_keys=ApiKeys(database, chain),
        audit=Audit(database, chain),
        pseudonyms=pseudonyms,
    )


def objects_of(settings: Settings, store: str) -> Objects:
    """The place of a store's bytes: a folder of the data directory, or of the object store."""
    if settings.bucket is None:
        return Folder(settings.data_dir / store)
    from service.storage.bucket import Bucket  # boto3 takes long to import

    return Bucket(settings.bucket).below(store)


def archive_of(settings: Settings, verify_by: Sums | None = None) -> Archive:
    return Archive(objects_of(settings, "archive"), settings.staging_dir, verify_by)


def tables_of(settings: Settings, folder: str = "index") -> TableFiles:
    """The place of the index's tables, as objects_of()."""
    if settings.bucket is None:
        return LocalTables(settings.data_dir / folder)
    from service.storage.bucket import Bucket

    bucket = Bucket(settings.bucket).below(folder)
    return BucketTables(bucket, bucket.uri, bucket.lance_options())
