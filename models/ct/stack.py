"""Which slices of a series are used: one stack from feet to head, whatever else the series holds."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from models.ct.reasons import Reason
from models.ct.screening import SetAside

if TYPE_CHECKING:
    from models.ct.series import CTSlice

SAME_POSITION_MM = 0.05  # closer than any scanner reconstructs; headers round to 0.01 mm
UNEVEN = 0.1  # a step that differs from the median by more than this share is uneven
MISSING = 1.5  # a step of more than this many medians hides at least one slice
SAME_ORIENTATION_DEGREES = 1.0

Dropped = list[tuple[str, SetAside]]  # file name and reason


def one_stack(slices: Sequence["CTSlice"]) -> tuple[list["CTSlice"], Dropped]:
    """The slices in use, feet to head by position and never by InstanceNumber, and the others with their reasons.

    They share an orientation, and no two lie at one position. Where stacks of several acquisitions, kernels or sizes
    overlap, the largest is used.
    """
    dropped: Dropped = []
    used = _of_one_orientation(_placed_alike(slices, dropped), dropped)
    return _apart(_of_stacks_that_do_not_overlap(used, dropped), dropped), dropped


def _placed_alike(slices: Sequence["CTSlice"], dropped: Dropped) -> list["CTSlice"]:
    """SliceLocation counts from an origin of its own (PS3.3 C.7.6.2.1.2): it does not go with true positions."""
    if all(each.placed_by_location for each in slices):
        return [*slices]
    for each in slices:
        if each.placed_by_location:
            _drop(each, Reason.NO_POSITION, "no ImagePositionPatient, which others of the series have", dropped)
    return [each for each in slices if not each.placed_by_location]


def _of_one_orientation(slices: Sequence["CTSlice"], dropped: Dropped) -> list["CTSlice"]:
    if not slices:
        return []
    common = np.array(Counter(each.normal for each in slices).most_common(1)[0][0])
    alike = []
    for each in slices:
        angle = float(np.degrees(np.arccos(np.clip(np.dot(each.normal, common), -1.0, 1.0))))
        if angle > SAME_ORIENTATION_DEGREES:
            _drop(each, Reason.ORIENTATION_DIFFERS, f"{angle:.1f} degrees from most slices of the series", dropped)
        else:
            alike.append(each)
    return alike


def _of_stacks_that_do_not_overlap(slices: Sequence["CTSlice"], dropped: Dropped) -> list["CTSlice"]:
    """The largest stack whole, and of each smaller one what lies where no larger one is.

    An acquisition that goes on where another ended stays. Stacks whose slices lie evenly between each other's are one
    scan in several acquisitions and stay too.
    """
    stacks: dict[tuple[int, str, int, int], list[CTSlice]] = defaultdict(list)
    for each in slices:
        stacks[(each.acquisition, each.kernel, each.rows, each.columns)].append(each)
    if len(stacks) <= 1 or _even(slices):
        return [*slices]
    used: list[CTSlice] = []
    runs: list[tuple[float, float, str]] = []  # mm, where a stack lies without a gap, and which one
    for (acquisition, kernel, rows, columns), stack in sorted(stacks.items(), key=lambda one: (-len(one[1]), one[0])):
        kept = []
        for each in stack:
            here = next((name for low, high, name in runs if low < each.z_mm < high), None)
            if here is None:
                kept.append(each)
                continue
            twice = any(abs(each.z_mm - other.z_mm) < SAME_POSITION_MM for other in used)
            reason = Reason.DUPLICATE_POSITION if twice else Reason.OVERLAPPING_STACK
            _drop(each, reason, f"at {each.z_mm} mm the larger stack of {here} is used", dropped)
        name = f"acquisition {acquisition}, {rows} x {columns} pixels, kernel {kernel or 'not named'}"
        runs += [(low, high, name) for low, high in _runs([each.z_mm for each in kept])]
        used += kept
    return used


def _runs(z_mm: list[float]) -> list[tuple[float, float]]:
    """From below the lowest to above the highest slice, broken where slices are missing; in mm."""
    if not z_mm:
        return []
    positions = np.unique(z_mm)
    steps = np.diff(positions)
    breaks = np.flatnonzero(steps > MISSING * (np.median(steps) if len(steps) else 0.0)) + 1
    return [(run[0] - SAME_POSITION_MM, run[-1] + SAME_POSITION_MM) for run in np.split(positions, breaks)]


def _even(slices: Sequence["CTSlice"]) -> bool:
    steps = np.diff(sorted(each.z_mm for each in slices))
    return bool(
        np.all(np.abs(steps - np.median(steps)) <= UNEVEN * np.median(steps)) and steps.min() > SAME_POSITION_MM
    )


def _apart(slices: Sequence["CTSlice"], dropped: Dropped) -> list["CTSlice"]:
    """One slice per position: of the lowest acquisition, then InstanceNumber, then SOPInstanceUID."""
    ordered: list[CTSlice] = []
    for each in sorted(slices, key=lambda each: (each.z_mm, _tie(each))):
        if not ordered or each.z_mm - ordered[-1].z_mm >= SAME_POSITION_MM:
            ordered.append(each)
            continue
        before = ordered[-1]
        used, other = (before, each) if _tie(before) < _tie(each) else (each, before)
        ordered[-1] = used
        frame = "" if used.frame is None else f" frame {used.frame}"
        _drop(
            other, Reason.DUPLICATE_POSITION, f"{used.sop_uid}{frame} lies at {used.z_mm} mm too, and is used", dropped
        )
    return ordered


def _tie(each: "CTSlice") -> tuple[int, str, int, str, int]:
    return each.acquisition, each.kernel, each.instance, each.sop_uid, each.frame or 0


def _drop(each: "CTSlice", reason: Reason, detail: str, dropped: Dropped) -> None:
    dropped.append((each.path.name, SetAside(reason, detail, frame=each.frame)))
