"""How many bytes a series and a slice take in the catalog and as a bag: what docs/scale.md multiplies.

Takes synthetic series in as an upload does, under the header of a real CT and UIDs as long as UIDs may be, into one
catalog with a slice each and one with many, and compares their files; stores a bag of the default encoder's shape.
Prints a table, and as its last line JSON.

    python bench/sizes.py
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from bench.export import write_export
from service.intake import take_in
from service.settings import Settings
from service.storage.bags import Bags
from service.storage.folder import Folder
from service.storage.keys import EmbeddingKey
from service.storage.staging import staging
from service.storage.stores import Stores, open_stores
from service.uploads import StagedFile

SERIES = 60
SLICES = 51
BAG = (300, 2, 1280)  # slices, windows, dim
ENCODER = "efficientnet_lite0@0123456789ab"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="keyslice-bench-") as name:
        folder = Path(name)
        empty = catalog_bytes(folder / "empty", 0)
        single, many = (catalog_bytes(folder / str(count), count) for count in (1, SLICES))
        bag, files = bag_bytes(folder / "bags")
    per_slice = (many - single) / SERIES / (SLICES - 1)
    figures = {
        "catalog_bytes_per_series": round((single - empty) / SERIES - per_slice),
        "catalog_bytes_per_slice": round(per_slice),
        "bag_bytes_per_slice": round(bag / BAG[0]),
        "bag_over_vectors": round(bag / (np.prod(BAG) * 2), 4),
        "bag_files": files,
    }
    table = Table("figure", "value")
    for figure, value in figures.items():
        table.add_row(figure, f"{value:,}")
    Console().print(table)
    print(json.dumps(figures))


def catalog_bytes(folder: Path, slices: int) -> int:
    """Of the catalog's file with SERIES series of so many slices, embedded; of none for no slices."""
    folder.mkdir()
    settings = Settings(data_dir=folder / "data", min_free_bytes=0)
    stores = open_stores(settings)
    if slices:
        write_export(folder / "export", SERIES * slices, SERIES)
    for each in sorted((folder / "export").glob("*/*/*")):
        files = [StagedFile(path, path.name) for path in sorted(each.iterdir())]
        with staging(folder) as inside:
            for series in take_in(files, inside, ENCODER, stores, settings).series:
                embedded(series.series_uid, slices, stores)
    stores.database.scrub(None)  # written anew, without the room that SQLite keeps for what comes
    stores.close()
    return settings.data_dir.joinpath("catalog.db").stat().st_size


def embedded(series_uid: str, slices: int, stores: Stores) -> None:
    """What a worker notes of it."""
    content, _ = stores.archive.content(series_uid)
    geometry = {"slices": slices, "rows": 512, "columns": 512, "slice_spacing_mm": 5.0, "pixel_spacing_mm": [0.7, 0.7]}
    verdict = {"status": "accepted", "findings": [], "set_aside": []}
    stores.catalog.commit(EmbeddingKey(series_uid, ENCODER), content, slices, verdict, geometry)


def bag_bytes(folder: Path) -> tuple[int, int]:
    """Of one bag with its receipt, and of how many files it is."""
    uids = ["1." + f"{number:0>62}" for number in range(BAG[0])]
    receipt = {"sop_uids": uids, "z_mm": [2.5 * number - 375 for number in range(BAG[0])], "frames": [None] * BAG[0]}
    Bags(Folder(folder)).put(EmbeddingKey(uids[0], ENCODER), "0" * 16, np.ones(BAG, np.float16), receipt)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files), len(files)


if __name__ == "__main__":
    main()
