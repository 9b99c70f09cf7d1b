"""A head's answer for some series together, with the slices that made it: what every explanation is built of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.heads.explain import APART_MM, DRAWS, REMOVED_SHARE, key_slices, spread
from models.heads.explain import faithfulness as deletion
from models.heads.run import HeadRunner, Reading
from service.errors import BagGone
from service.schemas.predictions import Faithfulness, LabelFaithfulness, TopSlice
from service.storage.bags import slices_of
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores
from service.storage.tables import EmbeddingRow, HeadRow, PredictionRow

TOP_SLICES = 5


@dataclass(frozen=True)
class Bag:
    """The bags of some series one after another, and where each slice of them comes from."""

    embeddings: NDArray[np.float16]  # (slices, windows, dim)
    windows: list[str]
    slices: list[dict[str, Any]]  # series_uid, slice, sop_uid, frame, z_mm
    contents: dict[str, str]  # of each series' bag, by series_uid


@dataclass(frozen=True)
class Explained:
    """A head, a bag, and what the head's folds say of it."""

    head: HeadRow
    bag: Bag
    reading: Reading
    runner: HeadRunner

    @property
    def probabilities(self) -> dict[str, float]:
        return self._labelled(self.reading.probabilities)

    @property
    def probability_spread(self) -> dict[str, float]:
        """Standard deviation over the folds."""
        return self._labelled(spread(self.reading.fold_probabilities))

    @property
    def window_share(self) -> dict[str, float]:
        """Which part of the attention each window has."""
        return self._windowed(self.reading.attention.sum(axis=0))

    @property
    def window_share_spread(self) -> dict[str, float]:
        """Standard deviation over the folds."""
        return self._windowed(spread(self.reading.fold_attention.sum(axis=1)))

    @property
    def attention_spread(self) -> NDArray[np.float32]:
        """(slices, windows), standard deviation over the folds."""
        return spread(self.reading.fold_attention)

    def top_slices(self, most: int = TOP_SLICES) -> list[TopSlice]:
        """Those of the largest weight, summed over the windows; neighbours may all be among them."""
        by_slice, _ = self._by_slice()
        return self._slices(np.argsort(-by_slice, kind="stable")[:most].tolist())

    def key_slices(self, most: int = TOP_SLICES, apart_mm: float = APART_MM) -> list[TopSlice]:
        """Those of the largest weight of which no two of one series are closer than `apart_mm`."""
        by_slice, _ = self._by_slice()
        series, z_mm = zip(*((each["series_uid"], each["z_mm"]) for each in self.bag.slices), strict=True)
        return self._slices(key_slices(by_slice, series, z_mm, most, apart_mm))

    def faithfulness(self, share: float = REMOVED_SHARE, draws: int = DRAWS, seed: int = 0) -> Faithfulness | None:
        """What removing the top instances does, against random ones; None for a bag of one instance."""
        found = deletion(self.runner, self.bag.embeddings, self.reading, share, draws, seed)
        if found is None:
            return None
        numbers = zip(found.whole, found.without_top, found.without_random, found.without_random_std, strict=True)
        return Faithfulness(
            removed=found.removed,
            instances=found.instances,
            draws=found.draws,
            seed=found.seed,
            labels={
                label: LabelFaithfulness(
                    whole=float(whole),
                    without_top=float(top),
                    without_random=float(mean),
                    without_random_std=float(std),
                )
                for label, (whole, top, mean, std) in zip(self.head.labels, numbers, strict=True)
            },
        )

    def _labelled(self, values: NDArray[np.float32]) -> dict[str, float]:
        return dict(zip(self.head.labels, map(float, values), strict=True))

    def _windowed(self, values: NDArray[np.float32]) -> dict[str, float]:
        return dict(zip(self.bag.windows, map(float, values), strict=True))

    def _by_slice(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(slices,) weights summed over the windows, and their spread over the folds."""
        by_fold = self.reading.fold_attention.sum(axis=2)  # (folds, slices)
        return np.asarray(by_fold.mean(axis=0)), spread(by_fold)

    def _slices(self, rows: Sequence[int]) -> list[TopSlice]:
        weights, spreads = self._by_slice()
        return [TopSlice(**self.bag.slices[k], weight=float(weights[k]), weight_std=float(spreads[k])) for k in rows]


def explain_series(stores: Stores, heads: Callable[[str], HeadRunner], head_id: str, series_uid: str) -> Explained:
    """One series as the head reads it. Raises as Heads.ready() and Catalog.embedding() do."""
    head = stores.heads.ready(head_id)
    return _explained(stores, heads, head, _contents([stores.catalog.embedding(series_uid, head.encoder_id)]))


def explain_patient(
    stores: Stores,
    heads: Callable[[str], HeadRunner],
    head_id: str,
    patient_id: str,
    *,
    series_uid: str | None = None,
    study_uid: str | None = None,
) -> Explained:
    """All of the patient's accepted series together, unless narrowed, as the head reads them.

    Raises as Heads.ready() and Catalog.patient_embeddings() do.
    """
    head = stores.heads.ready(head_id)
    rows = stores.catalog.patient_embeddings(patient_id, head.encoder_id, series_uid=series_uid, study_uid=study_uid)
    return _explained(stores, heads, head, _contents(rows))


def explain_again(stores: Stores, heads: Callable[[str], HeadRunner], prediction: PredictionRow) -> Explained:
    """The bags of an earlier prediction as its head reads them, whatever came since. Raises BagGone."""
    contents = {bag.series_uid: bag.content for bag in prediction.bags}
    return _explained(stores, heads, stores.heads.ready(prediction.head_id), contents)


def _contents(rows: Sequence[EmbeddingRow]) -> dict[str, str]:
    """The bags that count now."""
    return {row.series_uid: row.content or "" for row in rows}


def _explained(
    stores: Stores, heads: Callable[[str], HeadRunner], head: HeadRow, contents: dict[str, str]
) -> Explained:
    bag, runner = read_bags(stores, head.encoder_id, contents), heads(head.head_id)
    return Explained(head, bag, runner.read(bag.embeddings), runner)


def read_bags(stores: Stores, encoder_id: str, contents: dict[str, str]) -> Bag:
    """Bags of one encoder, named by series and content, as one. Raises BagGone."""
    bags, slices, windows = [], [], []
    for series_uid, content in contents.items():
        key = EmbeddingKey(series_uid, encoder_id)
        try:
            bags.append(stores.bags.get(key, content))
            receipt = stores.bags.receipt(key, content)
        except FileNotFoundError as error:
            raise BagGone(f"bag {content} of series {series_uid} was replaced meanwhile; ask again") from error
        windows = receipt["windows"]
        slices += [{"series_uid": series_uid, **each} for each in slices_of(receipt)]
    return Bag(np.concatenate(bags), windows, slices, contents)
