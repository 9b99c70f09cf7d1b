"""Stores of many series for the search bench: perturbed copies of real series' bags, and a hard set of noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.ct.phantom import Identity
from service.storage.archive import content_of
from service.storage.catalog import Arrival
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores

Floats = NDArray[np.float32]

SHIFT, JITTER = 0.35, 0.15  # of a copy, and of each of its slices, in differences between two real slices
LATENTS = 48  # dimensions that the hard set's vectors really have
SHORTEST = 20  # slices of a series that copies are made of
SLICES = 200  # of a series of the hard set
TAGGED = 100  # every so manieth series has the tag
SCANNERS = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips", "TOSHIBA")
AT_ONCE = 50  # series of one transaction


@dataclass(frozen=True)
class Made:
    """A series as a worker would have left it, but for its pixels."""

    number: int
    bag: NDArray[np.float16]  # (slices, windows, dim)

    @property
    def identity(self) -> Identity:
        return Identity(f"SEARCH-{self.number // 2:06d}", series=str(self.number))  # two of each patient

    @property
    def columns(self) -> dict[str, Any]:
        """Of SeriesRow."""
        month = 1 + self.number % 12
        return {"modality": "CT", "manufacturer": SCANNERS[self.number % 4], "study_date": f"2024{month:02d}15"}

    @property
    def tags(self) -> list[str]:
        return [] if self.number % TAGGED else ["chosen"]


def copies(real: list[Floats], first: int, seed: int) -> Iterator[Made]:
    """Without end: a real series' slices, interpolated anew along z and moved the way that real slices differ."""
    random = np.random.default_rng(seed)
    every = np.concatenate(real)  # (slices, windows, dim)
    number = first
    while True:
        bag = real[int(random.integers(len(real)))]
        step = random.uniform(0.7, 1.4)
        places = np.arange(random.uniform(0, step), len(bag) - 1, step)
        below, part = places.astype(int), (places % 1)[:, None, None].astype(np.float32)
        moved = (1 - part) * bag[below] + part * bag[below + 1]
        moved = moved + SHIFT * _difference(every, 1, random) + JITTER * _difference(every, len(moved), random)
        yield Made(number, moved.astype(np.float16))
        number += 1


def hard_set(dim: int, windows: int, seed: int) -> Iterator[Made]:
    """Without end: Gaussian latents, in which nothing lies near anything, turned into `dim` dimensions."""
    random = np.random.default_rng(seed)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, LATENTS)))[0].T.astype(np.float32)
    number = 0
    while True:
        latents = random.standard_normal((SLICES, windows, LATENTS), np.float32)
        yield Made(number, (latents @ turned).astype(np.float16))
        number += 1


def store(
    made: Iterator[Made],
    rows: int,
    encoder_id: str,
    windows: list[str],
    folder: Path,
    stores: Stores,
    at_once: int = AT_ONCE,
) -> None:
    """Into archive, catalog and bags, until there are so many slices times windows. Nothing is indexed yet."""
    done = 0
    while done < rows:
        group = list(islice(made, at_once))
        arrivals = []
        for each in group:
            identity = each.identity
            staged = folder / "staged"
            staged.write_bytes(b"")  # the archive's files are named by the catalog and never read here
            stores.archive.add(identity.series_uid, [(identity.uid("slice", "0"), staged)])
            arrivals.append(Arrival(identity.series_uid, identity.study_uid, identity.patient_id, each.columns))
        stores.catalog.receive(arrivals, encoder_id)
        for each in group:
            _embed(each, encoder_id, windows, stores)
            done += each.bag.shape[0] * each.bag.shape[1]


def real_bags(encoder_id: str, stores: Stores) -> list[Floats]:
    """Every bag of the encoder that is stored, but for series of a few slices."""
    contents = stores.indexes.embedded(encoder_id)
    bags = [stores.bags.get(EmbeddingKey(uid, encoder_id), content) for uid, content in contents.items()]
    return [bag.astype(np.float32) for bag in bags if len(bag) >= SHORTEST]


def draw(made: Iterator[Made], count: int) -> list[tuple[int, Floats]]:
    """So many slices at one window each, one of every series, as (window, unit vector)."""
    random = np.random.default_rng(1)
    found = []
    for each in islice(made, count):
        window = int(random.integers(each.bag.shape[1]))
        vector = each.bag[int(random.integers(len(each.bag))), window].astype(np.float32)
        found.append((window, vector / np.linalg.norm(vector)))
    return found


def _embed(made: Made, encoder_id: str, windows: list[str], stores: Stores) -> None:
    identity, slices = made.identity, len(made.bag)
    sop_uids = [identity.uid("slice", str(number)) for number in range(slices)]
    content = content_of(sop_uids[:1])
    receipt = {"windows": windows, "sop_uids": sop_uids, "z_mm": [float(number) for number in range(slices)]}
    key = EmbeddingKey(identity.series_uid, encoder_id)
    stores.bags.put(key, content, made.bag, receipt)
    stores.catalog.commit(key, content, slices, {"status": "accepted"}, {"slices": slices, "slice_spacing_mm": 1.0})
    if made.tags:
        stores.tags.put(identity.series_uid, made.tags)


def _difference(every: Floats, count: int, random: np.random.Generator) -> Floats:
    first, second = random.integers(len(every), size=(2, count))
    return np.asarray(every[first] - every[second], np.float32)
