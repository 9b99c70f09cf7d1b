"""Series whose bags are known number by number, stored without a worker."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from service.deps import EncoderNames
from service.settings import Settings
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

WINDOWS = ["abdomen", "lung"]
DIM = 1280  # of the default encoder


@dataclass
class Stored:
    """A series to be: what its header says, and what embedding it gave."""

    number: int
    patient_id: str
    slices: int
    about: dict[str, Any] = field(default_factory=dict)
    model: str = ""
    verdict: str = "accepted"
    scale: float = 1.0

    @property
    def series_uid(self) -> str:
        return f"1.2.3.{self.number}"

    @property
    def study_uid(self) -> str:
        return f"1.2.{self.number}"

    @property
    def bag(self) -> NDArray[np.float16]:
        random = np.random.default_rng(self.number)
        return (self.scale * random.normal(size=(self.slices, len(WINDOWS), DIM))).astype(np.float16)

    @property
    def receipt(self) -> dict[str, Any]:
        return {
            "windows": WINDOWS,
            "sop_uids": [f"{self.series_uid}.{k}" for k in range(self.slices)],
            "z_mm": [2.5 * k - 100 for k in range(self.slices)],
            "geometry": {"slices": self.slices, "slice_spacing_mm": 2.5 if self.slices > 1 else None},
        }


COHORT = [
    Stored(1, "ADA", 4, {"body_part": "CHEST", "manufacturer": "GE", "kernel": "STD", "study_date": "20010131"}, "A1"),
    Stored(2, "ADA", 3, {"body_part": "CHEST", "manufacturer": "GE", "kernel": "LUNG", "study_date": "20020131"}),
    Stored(3, "BOB", 1, {"body_part": "ABDOMEN", "manufacturer": "Siemens", "modality": "CT"}, "Force"),
    Stored(4, "CYD", 5, {"study_date": "20030131"}, verdict="accepted_with_warnings"),
]


def store(each: Stored, stores: Stores, encoder_id: str) -> EmbeddingKey:
    """As a worker would have left it."""
    key, header = EmbeddingKey(each.series_uid, encoder_id), {"00080060": {"vr": "CS", "Value": ["CT"]}}
    if each.model:
        header["00081090"] = {"vr": "LO", "Value": [each.model]}
    arrival = Arrival(each.series_uid, each.study_uid, each.patient_id, {"header": header, **each.about})
    stores.catalog.receive([arrival], encoder_id)
    content, _ = stores.archive.content(each.series_uid)
    stores.bags.put(key, content, each.bag, each.receipt)
    verdict = {"status": each.verdict, "findings": [], "set_aside": []}
    stores.catalog.commit(key, content, each.slices, verdict, each.receipt["geometry"])
    return key


def fill(stores: Stores, settings: Settings) -> str:
    """Store the cohort; answers the encoder's id."""
    encoder_id = EncoderNames(settings).id(None)
    for each in COHORT:
        store(each, stores, encoder_id)
    return encoder_id
