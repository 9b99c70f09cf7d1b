"""Where the slices for pretraining come from, as one kind of sequence."""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class BadSource(Exception):
    """The data cannot be used as they are; the message says what was found and expected, and names no patient."""


@dataclass(frozen=True)
class Box:
    """A lesion's extent in pixels of its slice: x = column, y = row, 0-based, upper ends included."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class CTImage:
    """One slice for pretraining."""

    hu: NDArray[np.int16]  # (rows, columns)
    spacing_mm: tuple[float, float]  # between rows, between columns
    boxes: tuple[Box, ...] = ()  # annotated lesions; none does not mean healthy


class Source(Protocol):
    """A sequence of slices."""

    @property
    def patients(self) -> Sequence[str]:
        """One opaque key per slice: for splitting only, never logged."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> CTImage: ...


class Subset:
    """The slices of a source at these indices, in this order."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self._source = source
        self._indices = tuple(indices)
        self.patients = tuple(source.patients[index] for index in self._indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> CTImage:
        return self._source[self._indices[index]]


class Concat:
    """The slices of several sources, one source after the other.

    Equal patient keys stay equal: a patient who is in two archives must not be on both sides of a split.
    """

    def __init__(self, *sources: Source) -> None:
        self._places = tuple((source, index) for source in sources for index in range(len(source)))
        self.patients = tuple(key for source in sources for key in source.patients)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> CTImage:
        source, within = self._places[index]
        return source[within]


def split(patients: Sequence[str], folds: int, seed: int) -> list[tuple[int, ...]]:
    """The indices of each fold's slices: every slice is in one fold, and all slices of a patient are in the same one.

    Folds differ by at most one patient. The same keys and seed give the same patients per fold, whatever the order of
    the slices. Raises BadSource where there are fewer patients than folds.
    """
    different = sorted(set(patients))
    if not 1 <= folds <= len(different):
        raise BadSource(f"{len(different)} patients for {folds} folds, expected at least one fold and one patient each")
    shuffled = np.random.default_rng(seed).permutation(len(different))
    fold_of = {different[which]: place % folds for place, which in enumerate(shuffled)}
    return [tuple(index for index, key in enumerate(patients) if fold_of[key] == fold) for fold in range(folds)]


def leave_out(source: Source, patients: Collection[str]) -> Subset:
    """The slices of all other patients. Raises BadSource where a key has no slice: a misspelt one would stay in."""
    if unknown := set(patients) - set(source.patients):
        raise BadSource(
            f"{len(unknown)} of {len(set(patients))} patients to leave out have no slice, expected some each"
        )
    return Subset(source, [index for index, key in enumerate(source.patients) if key not in patients])


def balanced(source: Source) -> Subset:
    """The slices again and again, so that a patient counts by the root of the number of slices.

    The patient with the most has each slice once; one with a hundredth of that has each ten times.
    """
    counts = Counter(source.patients)
    most = max(counts.values())
    times = {patient: round((most / count) ** 0.5) for patient, count in counts.items()}
    return Subset(source, [index for index, key in enumerate(source.patients) for _ in range(times[key])])
