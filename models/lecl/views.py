"""From a slice to what one training step sees of it: planted or not, cropped, augmented in HU, at one window."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from models.ct.windows import WINDOWS, Window, apply_window
from models.lecl.config import ViewConfig
from models.lecl.lesions import decoy, plant
from models.lecl.looks import lesion_look, slice_look
from models.lecl.sources import Box, CTImage, Source
from models.lecl.tissue import tissues

Floats = NDArray[np.float32]

VISIBLE = 0.03  # of a window's range: a change of less does not show
CLEARER = 0.8  # how often a lesion is shown at the window that shows it best
ON_LESION = 0.85  # how often a view is laid so that the lesion is in it


@dataclass(frozen=True)
class Sample:
    """What one slice gives to a training step; pictures are (S, S)."""

    view: Floats  # in [0, 1]: the slice, or a crop of it, with lesion and decoy
    healthy: Floats  # the same without the planted lesion
    mask: Floats  # in [0, 1]: how much of each pixel is planted lesion
    other: Floats  # a second view, for contrast; the lesion-centred crop where LECL asks for it and there is a lesion
    lesion: bool  # one is in the view


@dataclass(frozen=True)
class Batch:
    view: Tensor  # (B, 1, S, S)
    healthy: Tensor  # (B, 1, S, S)
    mask: Tensor  # (B, 1, S, S)
    other: Tensor  # (B, 1, S, S)
    lesion: Tensor  # (B,) bool

    def __len__(self) -> int:
        return len(self.lesion)

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)))

    def pin_memory(self) -> "Batch":
        return Batch(*(getattr(self, each.name).pin_memory() for each in fields(self)))


def collate(samples: list[Sample]) -> Batch:
    """Samples side by side."""
    pictures = {
        name: torch.from_numpy(np.stack([getattr(each, name) for each in samples]))[:, None]  # (B, 1, S, S)
        for name in ("view", "healthy", "mask", "other")
    }
    return Batch(**pictures, lesion=torch.tensor([each.lesion for each in samples]))


class Views(Dataset[Sample]):
    """The samples of a source. A key is (slice, draw): the same key gives the same sample, whoever asks and when.

    Without `contrast` the second view is the first, and without `restore` so is the healthy one: nobody looks at it.
    """

    def __init__(
        self, source: Source, config: ViewConfig, seed: int, contrast: bool = True, restore: bool = True
    ) -> None:
        self._source, self._config, self._seed = source, config, seed
        self._contrast, self._restore = contrast, restore
        self._windows = [WINDOWS[name] for name in config.windows]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, draw = key
        random = np.random.default_rng((self._seed, index, draw))
        image = self._source[index]
        edit = edited(image, self._config, random)
        window, seen = self._window(edit, random)
        # A lesion that does not show at this window is none: nobody could learn it from here.
        boxes = [*image.boxes, *(_extent(mask) for mask in seen)]
        lesion = boxes[random.integers(len(boxes))] if boxes else None
        look = slice_look(edit.hu.shape, self._config, lesion if random.random() < ON_LESION else None, random)
        view = look.at(edit.hu, window)
        shown = look.mask(np.maximum.reduce(seen)) if seen else np.zeros_like(view)
        return Sample(
            view=view,
            healthy=look.at(edit.healthy, window) if seen and self._restore else view,
            mask=shown,
            other=self._other(edit.hu, window, lesion, random) if self._contrast else view,
            lesion=bool(shown.max() > 0.5) or any(look.holds(box) for box in image.boxes),
        )

    def _other(self, hu: Floats, window: Window, lesion: Box | None, random: np.random.Generator) -> Floats:
        if lesion and self._config.lesion_crop:
            return lesion_look(lesion, self._config, random).at(hu, window)
        return slice_look(hu.shape, self._config, lesion, random).at(hu, window)

    def _window(self, edit: "Edit", random: np.random.Generator) -> tuple[Window, list[Floats]]:
        """A window, and the masks of the planted lesions that show at it."""
        chosen = int(random.integers(len(self._windows)))
        shows = [[_shows(edit, mask, window) for window in self._windows] for mask in edit.masks]
        if shows and random.random() < CLEARER:
            chosen = int(np.argmax(shows[0]))
        return self._windows[chosen], [
            mask for mask, each in zip(edit.masks, shows, strict=True) if each[chosen] > VISIBLE
        ]


@dataclass(frozen=True)
class Edit:
    """A slice before any view is taken of it; arrays are (rows, columns)."""

    hu: Floats  # with lesions and decoy
    healthy: Floats  # with the decoy alone
    masks: tuple[Floats, ...]  # one of each lesion


def edited(image: CTImage, config: ViewConfig, random: np.random.Generator) -> Edit:
    """The slice with what the configuration's shares draw for it; one with an annotated lesion has its lesion."""
    healthy: Floats = image.hu[None].astype(np.float32)
    spacing = (1.0, *image.spacing_mm)  # a single slice has no step to the next
    planting = random.random() < config.plant and not image.boxes
    lesions = int(random.integers(1, config.lesions + 1)) if planting else 0
    deceiving = random.random() < config.decoy
    if not lesions and not deceiving:
        return Edit(healthy[0], healthy[0], ())
    labels = tissues(image.hu, image.spacing_mm)
    if deceiving and (edit := decoy(healthy, spacing, random, labels=labels)):
        healthy = edit.hu
    hu, masks = healthy, []
    for _ in range(lesions):
        if edit := plant(hu, spacing, random, labels=labels):
            hu = edit.hu
            masks.append(edit.mask[0])
    return Edit(hu[0], healthy[0], tuple(masks))


def _shows(edit: Edit, mask: Floats, window: Window) -> float:
    """How much the lesion changes the picture at this window, from 0 to 1."""
    inside = mask > 0.5
    return float(np.abs(apply_window(edit.hu[inside], window) - apply_window(edit.healthy[inside], window)).mean())


def _extent(mask: Floats) -> Box:
    rows, columns = np.nonzero(mask > 0.5)
    return Box(float(columns.min()), float(rows.min()), float(columns.max()), float(rows.max()))
