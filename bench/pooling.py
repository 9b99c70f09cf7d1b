"""Whole bags: our ABMIL head trained on some patients and read on others, beside mean and max pooling."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import comb

import numpy as np
import torch
from numpy.typing import NDArray

from bench.probe import probe_scores
from models.abmil import Ensemble
from models.heads.train import HeadOptions, LabelledBag, train_head

# The paper's batch of 128 bags would be a whole fold, and its learning rate is made for thousands of them.
OPTIONS = HeadOptions(folds=3, epochs=32, patience=8, batch_size=16, learning_rate=1e-3)

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """A bag as an encoder sees it."""

    patient: str
    features: Floats  # (slices, windows, dim)
    lesion: tuple[int, ...]  # slices that show it; none in a clean bag
    conspicuous: bool  # the lesion, or that of the bag's partner

    @property
    def positive(self) -> bool:
        return bool(self.lesion)


@dataclass(frozen=True)
class Head:
    """A trained head and the scaling of what it reads."""

    ensemble: Ensemble
    mean: Floats  # (windows, dim)
    spread: Floats

    def read(self, features: Floats) -> tuple[float, NDArray[np.float64]]:
        """(slices, windows, dim) -> the probability, and each slice's attention, summed over its windows."""
        scaled = torch.from_numpy(scaled_as(features, self.mean, self.spread).astype(np.float32))
        with torch.inference_mode():
            probabilities, attention = self.ensemble(scaled.flatten(0, 1))
        by_slice = attention.reshape(features.shape[:2]).sum(dim=1)
        return float(probabilities[0]), by_slice.double().numpy()


def scaled_as(features: Floats, mean: Floats, spread: Floats) -> NDArray[np.float16]:
    """Standardised by the training bags, in the precision of a stored bag."""
    return ((features - mean) / spread).clip(-60, 60).astype(np.float16)


def trained(bags: Sequence[Embedded], seed: int, options: HeadOptions = OPTIONS) -> Head:
    """The ensemble that the service would train on these bags, standardised first.

    Encoders differ in scale by orders of magnitude; at one learning rate a league of raw embeddings would rank scales.
    """
    every = np.concatenate([bag.features for bag in bags])
    mean, spread = every.mean(axis=0), np.maximum(every.std(axis=0), 1e-6)
    labelled = [
        LabelledBag(bag.patient, (float(bag.positive),), partial(scaled_as, bag.features, mean, spread)) for bag in bags
    ]
    with_seed = HeadOptions(**(vars(options) | {"seed": seed}))
    return Head(train_head(labelled, ["lesion"], with_seed, lambda done, known: None).ensemble, mean, spread)


def pooled_scores(how: str, train: Sequence[Embedded], test: Sequence[Embedded], seed: int) -> NDArray[np.float64]:
    """Of each test bag by a linear probe on the bag's mean or max over slices."""

    def pooled(bags: Sequence[Embedded]) -> Floats:
        return np.stack([getattr(bag.features, how)(axis=0).ravel() for bag in bags])

    truth, patients = np.array([bag.positive for bag in train]), np.array([bag.patient for bag in train])
    return probe_scores(pooled(train), truth, patients, pooled(test), seed)


def hit(attention: NDArray[np.float64], lesion: Sequence[int], first: int) -> bool:
    """Whether one of the `first` slices with the highest attention shows the lesion."""
    return bool(set(np.argsort(-attention, kind="stable")[:first].tolist()) & set(lesion))


def chance_of_hit(slices: int, lesion: int, first: int) -> float:
    """The same of slices drawn at random without replacement."""
    return 1 - comb(slices - lesion, first) / comb(slices, first)


def mass_over_uniform(attention: NDArray[np.float64], lesion: Sequence[int]) -> float:
    """The attention on the lesion's slices over what equal attention would give them."""
    return float(attention[list(lesion)].sum() / attention.sum() * len(attention) / len(lesion))


def rank(attention: NDArray[np.float64], lesion: Sequence[int]) -> int:
    """Which place, from 1, the lesion's first slice takes by attention."""
    order = np.argsort(-attention, kind="stable")
    return 1 + int(np.flatnonzero(np.isin(order, lesion))[0])
