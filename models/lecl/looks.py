"""How a training view looks at a slice: which square of it, turned how, at which window, how noisy."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from models.ct.windows import Window, apply_window
from models.lecl.config import ViewConfig
from models.lecl.sources import Box

Floats = NDArray[np.float32]

AIR = -1024.0  # HU beyond the slice's edge
NOISE_WIDTH = 0.6  # px: CT noise is correlated over about a pixel
SHARPENED = 1.0  # px, a standard deviation: what reconstruction kernels differ in
LESION_SIDES = (1.2, 3.0)  # the lesion-centred crop's side over the lesion's longer one
SMALLEST = 24.0  # px of the original slice
JITTER = 0.15  # of the lesion-centred crop's side, that the lesion's centre may lie off the middle
MIDDLE = (0.25, 0.75)  # of the slice's sides: where a crop that looks for nothing is centred


@dataclass(frozen=True)
class Look:
    """A square of a slice and what is done to it. Looking twice with the same one gives the same picture."""

    centre: tuple[float, float]  # row, column of the original slice
    step: tuple[float, float]  # original pixels per pixel of the view, along rows and columns
    side: int  # px of the view
    degrees: float = 0.0
    flip: bool = False
    gain: float = 1.0
    shift_hu: float = 0.0
    sharpen: float = 0.0  # share of the detail finer than SHARPENED px that is added, or taken where negative
    noise_hu: float = 0.0
    noise_seed: int = 0

    def at(self, hu: Floats, window: Window) -> Floats:
        """(rows, columns) of HU -> (side, side) in [0, 1]. Windowed before resizing, as encoder_input does."""
        square = self._square(hu, AIR) * self.gain + self.shift_hu
        if self.sharpen:
            square += self.sharpen * (square - cv2.GaussianBlur(square, (0, 0), SHARPENED))
        if self.noise_hu > 0:
            white = np.random.default_rng(self.noise_seed).standard_normal(square.shape, np.float32)
            noise = cv2.GaussianBlur(white, (0, 0), NOISE_WIDTH)
            square += noise * (self.noise_hu / noise.std())
        return np.clip(self._turned(apply_window(square, window)), 0, 1)

    def mask(self, mask: Floats) -> Floats:
        """(rows, columns) in [0, 1] -> the same (side, side) of it."""
        return np.clip(self._turned(self._square(mask, 0.0)), 0, 1)

    def holds(self, box: Box) -> bool:
        """Whether the centre of a box is in the view, near its edges and turned as it may be."""
        rows, columns = (box.y0 + box.y1) / 2 - self.centre[0], (box.x0 + box.x1) / 2 - self.centre[1]
        return max(abs(rows) / self.step[0], abs(columns) / self.step[1]) < 0.45 * self.side

    @property
    def _corner(self) -> float:
        """The side of an upright square that holds the turned one, in sides of that."""
        angle = np.radians(abs(self.degrees))
        return float(abs(np.cos(angle)) + np.sin(angle))

    def _square(self, pixels: Floats, beyond: float) -> Floats:
        """The upright square around the turned one; `beyond` fills what lies outside the slice."""
        halves = [max(1, round(self.side * self._corner * step / 2)) for step in self.step]
        low = [round(at) - half for at, half in zip(self.centre, halves, strict=True)]
        square = np.full((2 * halves[0], 2 * halves[1]), beyond, np.float32)
        inside = [
            slice(max(0, start), min(length, start + 2 * half))
            for start, half, length in zip(low, halves, pixels.shape, strict=True)
        ]
        to = [slice(each.start - start, each.stop - start) for each, start in zip(inside, low, strict=True)]
        if all(each.stop > each.start for each in inside):
            square[to[0], to[1]] = pixels[inside[0], inside[1]]
        return square

    def _turned(self, square: Floats) -> Floats:
        size = round(self.side * self._corner)
        shrinking = min(square.shape) >= size
        small: NDArray[Any] = cv2.resize(
            square, (size, size), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_LINEAR
        )
        if self.degrees:
            turn: NDArray[Any] = cv2.getRotationMatrix2D(((size - 1) / 2, (size - 1) / 2), self.degrees, 1.0)
            turn[:, 2] -= (size - self.side) / 2
            small = cv2.warpAffine(small, turn, (self.side, self.side), flags=cv2.INTER_LINEAR)
        return np.ascontiguousarray(small[:, ::-1]) if self.flip else small


def slice_look(shape: tuple[int, ...], config: ViewConfig, lesion: Box | None, random: np.random.Generator) -> Look:
    """A look at the slice at about the scale that the encoder sees it; with a lesion it is somewhere in the view."""
    side = config.crop or config.size
    scale = float(np.exp(random.uniform(*np.log(config.scale))))
    step = (shape[0] / config.size / scale, shape[1] / config.size / scale)
    if config.crop is None:
        centre = (shape[0] * random.uniform(0.45, 0.55), shape[1] * random.uniform(0.45, 0.55))
    elif lesion is None:
        centre = (shape[0] * random.uniform(*MIDDLE), shape[1] * random.uniform(*MIDDLE))
    else:
        away = [max(0.0, 0.42 * side * along - half) for along, half in zip(step, _halves(lesion), strict=True)]
        middle = _middle(lesion)
        centre = (middle[0] + random.uniform(-away[0], away[0]), middle[1] + random.uniform(-away[1], away[1]))
    return Look(centre, step, side, **_changes(config, random))


def lesion_look(lesion: Box, config: ViewConfig, random: np.random.Generator) -> Look:
    """The lesion-centred crop of LECL: about the box's centre, jittered, the whole lesion in it."""
    longer = 2 * max(_halves(lesion))
    original = max(SMALLEST, longer * random.uniform(*LESION_SIDES))  # px of the slice
    away = min(JITTER * original, (original - longer) / 2)  # no farther than keeps all of it in
    row, column = _middle(lesion)
    centre = (row + random.uniform(-away, away), column + random.uniform(-away, away))
    side = config.crop or config.size
    return Look(centre, (original / side, original / side), side, **_changes(config, random))


def _changes(config: ViewConfig, random: np.random.Generator) -> dict[str, Any]:
    return {
        "degrees": float(random.uniform(-config.rotate_degrees, config.rotate_degrees)),
        "flip": bool(config.flip and random.random() < 0.5),
        "gain": float(random.uniform(1 - config.gain, 1 + config.gain)),
        "shift_hu": float(random.uniform(-config.shift_hu, config.shift_hu)),
        "sharpen": float(random.uniform(*config.sharpen)),
        "noise_hu": float(random.uniform(*config.noise_hu)),
        "noise_seed": int(random.integers(2**31)),
    }


def _middle(box: Box) -> tuple[float, float]:
    return (box.y0 + box.y1) / 2, (box.x0 + box.x1) / 2


def _halves(box: Box) -> tuple[float, float]:
    """Half the rows and half the columns of the box."""
    return (box.y1 - box.y0 + 1) / 2, (box.x1 - box.x0 + 1) / 2
