"""Stores with made-up bags, for tests of the index and of searches."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from archived import archived_file

from service.indexing import index_bags
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores, open_stores

ENCODER = "toy@0123456789ab"
WINDOWS = ("abdomen", "lung")
DIM = 8


@dataclass(frozen=True)
class Made:
    """A series that is embedded, not indexed."""

    series_uid: str
    bag: np.ndarray  # (slices, windows, dim)
    patient: str = "P"
    study: str = "1"
    about: dict[str, Any] = field(default_factory=dict)  # columns of SeriesRow
    verdict: str = "accepted"
    spacing_mm: float = 2.5
    tags: Sequence[str] = ()


def random_bag(seed: int, slices: int = 5, dim: int = DIM) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(slices, len(WINDOWS), dim)).astype(np.float16)


def embed_made(stores: Stores, made: Made, encoder_id: str = ENCODER) -> str:
    """Into archive, catalog and bags, as a worker leaves it; again for a bag that changed. Answers its content."""
    for k in range(len(made.bag)):
        staged = archived_file(stores, made.series_uid, "x").parents[2] / "staged"
        staged.write_bytes(b"DICM")
        stores.archive.add(made.series_uid, [(f"{made.series_uid}.{k}", staged)])
    stores.catalog.receive([Arrival(made.series_uid, made.study, made.patient, made.about)], encoder_id)
    key = EmbeddingKey(made.series_uid, encoder_id)
    content, _ = stores.archive.content(made.series_uid)
    receipt = {
        "windows": list(WINDOWS),
        "sop_uids": [f"{made.series_uid}.{k}" for k in range(len(made.bag))],
        "z_mm": [float(k) for k in range(len(made.bag))],
    }
    stores.bags.put(key, content, made.bag, receipt)
    geometry = {"slices": len(made.bag), "slice_spacing_mm": made.spacing_mm}
    stores.catalog.commit(key, content, len(made.bag), {"status": made.verdict}, geometry)
    stores.tags.put(made.series_uid, made.tags)
    return content


def three_indexed(settings: Settings) -> Stores:
    """Stores of three series of ten rows, indexed."""
    stores = open_stores(settings)
    for number in range(3):
        embed_made(stores, Made(f"1.2.{number}", random_bag(number)))
    index_bags(stores, settings, "worker")
    return stores
