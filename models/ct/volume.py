"""A CT series as one volume, on the voxel grid that a volume encoder was trained on."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from models.ct.decode import read_hu
from models.ct.errors import UndecodableSlice
from models.ct.reasons import Reason
from models.ct.screening import SetAside
from models.ct.series import CTSeries, CTSlice, arrange, read_slices
from models.ct.windows import Window, apply_window

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Undecodable = dict[tuple[Path, int | None], SetAside]  # by file and frame
Side = tuple[int, float]  # pixels, and mm from one to the next

# Where an axis grows to, in DICOM's patient coordinates: +x is left, +y is back (PS3.3 C.7.6.2.1.1).
DIRECTIONS = {"L": (1, 0, 0), "R": (-1, 0, 0), "P": (0, 1, 0), "A": (0, -1, 0)}

SAME_SPACING = 1e-3  # relative; headers round pixel spacings
LONGEST_MM = 5000.0  # more than any scanner reaches: a header must not be able to ask for gigabytes
ROUNDING = 1e-6  # voxels; a length that is a whole number of voxels may come out a little short


class UnusableVolume(Exception):
    """The series' slices do not make a volume; the message says what was found and what was expected."""


@dataclass(frozen=True)
class Preparation:
    """How a network's authors turned, resampled and windowed the volumes it was trained on.

    Aligned by "centres", the first voxels' centres coincide before and after resampling and the spacing is exact, as
    in MONAI's Spacing; by "edges", the outer edges do, and the spacing is the nearest that divides the length, as in
    torch's interpolate(align_corners=False).
    """

    axes: Literal["SRA", "SLP"]  # where depth, height, width grow to: superior, right or left, anterior or posterior
    aligned: Literal["centres", "edges"]
    windowed: Literal["before", "after"]  # resampling: they do not commute where HU leave the window


PREPARATIONS = {
    # merlin/data/monai_transforms.py: Orientation RAS, Spacing bilinear, ScaleIntensityRange, SpatialPad,
    # CenterSpatialCrop. Its arrays are (x, y, z); the first line of its network makes them (z, x, y), as they are here.
    "merlin": Preparation("SRA", aligned="centres", windowed="after"),
    # CT-CLIP's scripts/data_inference_nii.py. It leaves the axes of CT-RATE's files as they are, DICOM's own: columns,
    # to the left of a patient on the back; rows, to the back; slices. Its network sees (slices, columns, rows).
    "ct_clip": Preparation("SLP", aligned="edges", windowed="before"),
}


def prepare_volume(
    paths: Iterable[Path],
    out: Floats,
    spacing_mm: tuple[float, float, float],
    window: Window,
    preparation: str,
) -> CTSeries | SetAside:
    """Write a series' volume to `out`, (1, depth, height, width); answers the series, or why it makes none."""
    found = [(path, one) for path in sorted(paths) for one in read_slices(path)]
    series = arrange(found)
    try:
        _, undecodable = read_volume(series, spacing_mm, out.shape[1:], window, PREPARATIONS[preparation], out[0])
    except UnusableVolume as error:
        return SetAside(Reason.NO_VOLUME, str(error))
    return arrange(
        (path, undecodable.get((one.path, one.frame), one) if isinstance(one, CTSlice) else one) for path, one in found
    )


def read_volume(
    series: CTSeries,
    spacing_mm: tuple[float, float, float],
    shape: tuple[int, ...],
    window: Window,
    preparation: Preparation,
    out: Floats | None = None,
) -> tuple[Floats, Undecodable]:
    """(depth, height, width) in [0, 1], and the slices that could not be decoded.

    The series is resampled linearly to `spacing_mm`, then cropped or padded with 0, the window's lower end, to
    `shape` around its centre. Slices are interpolated between their true positions: uneven steps and gaps are
    filled linearly, and so is the gap that an undecodable slice leaves; at either end the nearest slice is
    repeated. The shear of a tilted gantry is not undone. Each slice is brought to height and width as it is
    decoded, and two of them are held beside the volume. Raises UnusableVolume.
    """
    if len(series.slices) < 2:
        raise UnusableVolume(f"{len(series.slices)} slice(s), expected two at least")
    turn, aligned = _turn(np.array(series.slices[0].orientation), preparation.axes), preparation.aligned
    (rows, row_mm), (columns, column_mm) = turn.sides(*_sides(series))
    z_mm = [one.z_mm for one in series.slices]
    depth = _axis(float(np.median(np.diff(z_mm))), z_mm[-1] - z_mm[0], spacing_mm[0], shape[0], aligned)
    height = _axis(row_mm, (rows - 1) * row_mm, spacing_mm[1], shape[1], aligned)
    width = _axis(column_mm, (columns - 1) * column_mm, spacing_mm[2], shape[2], aligned)

    early, late = (window, None) if preparation.windowed == "before" else (None, window)
    volume = np.empty(shape, np.float32) if out is None else out
    volume[:] = 0.0
    inside = volume[depth.place, height.place, width.place]
    undecodable: Undecodable = {}
    plane = _ToPlane(turn, height.at_mm / row_mm, width.at_mm / column_mm, early)
    _stack(_planes(series, plane, undecodable), depth.at_mm + z_mm[0], inside)
    if (left := len(z_mm) - len(undecodable)) < 2:
        raise UnusableVolume(f"{left} of {len(z_mm)} slices can be decoded, expected two at least")
    if late:
        inside[:] = apply_window(inside, late)
    return volume, undecodable


@dataclass(frozen=True)
class _Axis:
    """The voxels of one axis that lie inside the series."""

    at_mm: Doubles  # from the centre of the series' first voxel
    place: slice  # among all voxels of the axis


def _axis(step_mm: float, extent_mm: float, spacing_mm: float, size: int, aligned: str) -> _Axis:
    """Voxels for a series whose first and last voxel centres are `extent_mm` apart."""
    if not 0 < step_mm <= extent_mm <= LONGEST_MM:
        found = f"{extent_mm:g} mm in steps of {step_mm:g} mm"
        raise UnusableVolume(f"{found}, expected two voxels at least in {LONGEST_MM:g} mm at most")
    if aligned == "centres":
        count = round(extent_mm / spacing_mm + 1)
        at_mm = np.arange(count) * spacing_mm
    else:
        length_mm = extent_mm + step_mm
        count = max(1, int(length_mm / spacing_mm + ROUNDING))
        at_mm = (np.arange(count) + 0.5) * (length_mm / count) - step_mm / 2
    cropped, padded = max(count - size, 0) // 2, max(size - count, 0) // 2
    at_mm = np.clip(at_mm[cropped : cropped + size], 0.0, extent_mm)
    return _Axis(at_mm, slice(padded, padded + len(at_mm)))


@dataclass(frozen=True)
class _Turn:
    """How a slice as stored becomes one whose height and width grow as they should."""

    transposed: bool
    flipped: tuple[bool, bool]  # height, width; after transposing

    def __call__(self, image: Floats) -> Floats:
        turned = image.T if self.transposed else image
        height, width = (-1 if flip else 1 for flip in self.flipped)
        return turned[::height, ::width]

    def sides(self, rows: Side, columns: Side) -> tuple[Side, Side]:
        """Height and width, from rows and columns."""
        return (columns, rows) if self.transposed else (rows, columns)


def _turn(orientation: Doubles, axes: str) -> _Turn:
    """The transposition and flips that come nearest to the axes, as MONAI's Orientation takes them.

    ImageOrientationPatient says where a slice's column index grows to, then its row index (PS3.3 C.7.6.2.1.1).
    """
    wanted = np.array([DIRECTIONS[axis] for axis in axes[1:]])  # (height and width, 3)
    agreement = wanted @ np.stack([orientation[3:], orientation[:3]]).T  # (height and width, rows and columns)
    transposed = bool(np.trace(abs(agreement)) < np.trace(abs(agreement[:, ::-1])))
    height, width = np.diagonal(agreement[:, ::-1] if transposed else agreement)
    return _Turn(transposed, (bool(height < 0), bool(width < 0)))


@dataclass(frozen=True)
class _ToPlane:
    """A slice file as one plane of the volume."""

    turn: _Turn
    rows: Doubles  # where the plane's rows lie, in pixels of the turned slice
    columns: Doubles
    window: Window | None

    def __call__(self, one: CTSlice) -> Floats:
        hu = read_hu(one.path, one.frame)
        image = self.turn(apply_window(hu, self.window) if self.window else hu)
        return _linear(_linear(image, self.rows, 0), self.columns, 1)


def _linear(image: Floats, at: Doubles, axis: int) -> Floats:
    """The image at fractional indices of one axis."""
    below = np.minimum(at.astype(np.intp), image.shape[axis] - 2)
    share = np.expand_dims((at - below).astype(np.float32), 1 - axis)
    low, high = image.take(below, axis), image.take(below + 1, axis)
    between: Floats = low + share * (high - low)
    return between


def _planes(series: CTSeries, plane: _ToPlane, undecodable: Undecodable) -> Iterator[tuple[float, Floats]]:
    """Position and plane of every slice that decodes, feet to head; the others are noted in `undecodable`."""
    for one in series.slices:
        try:
            yield one.z_mm, plane(one)
        except UndecodableSlice as error:
            undecodable[one.path, one.frame] = SetAside(Reason.UNDECODABLE, str(error), frame=one.frame)


def _stack(planes: Iterable[tuple[float, Floats]], at_mm: Doubles, volume: Floats) -> None:
    """Fill the volume, whose planes lie at `at_mm`, linearly between the given ones."""
    done, last = 0, None
    for z_mm, plane in planes:
        below_mm, below = last or (z_mm - 1.0, plane)  # below the first plane, it is repeated
        reached = int(np.searchsorted(at_mm, z_mm, side="right"))
        for depth in range(done, reached):
            volume[depth] = below + np.float32((at_mm[depth] - below_mm) / (z_mm - below_mm)) * (plane - below)
        done, last = reached, (z_mm, plane)
    if last is not None:
        volume[done:] = last[1]


def _sides(series: CTSeries) -> tuple[Side, Side]:
    """Rows and columns that all slices share."""
    sizes = {(one.rows, one.columns) for one in series.slices}
    if len(sizes) > 1:
        found = ", ".join(f"{rows} x {columns}" for rows, columns in sorted(sizes))
        raise UnusableVolume(f"slices of {found} pixels, expected one size")
    spacings = [one.pixel_spacing_mm for one in series.slices if one.pixel_spacing_mm is not None]
    if len(spacings) < len(series.slices):
        raise UnusableVolume(f"PixelSpacing in {len(spacings)} of {len(series.slices)} slices, expected it in all")
    if not np.allclose(spacings, spacings[0], rtol=SAME_SPACING, atol=0.0):
        raise UnusableVolume(f"pixels of {np.min(spacings):g} to {np.max(spacings):g} mm, expected one spacing")
    (rows, columns), (row_mm, column_mm) = sizes.pop(), spacings[0]
    return (rows, row_mm), (columns, column_mm)
