"""Outlines of synthetic lesions, in mm."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.lecl.shapes import REACH, Shape, random_shape

SEEDS = st.integers(0, 2**32 - 1)


def offsets(reach_mm, step_mm):
    """(z, y, x, 3) offsets in mm from the middle of a cube, whose half side is `reach_mm`."""
    axis = np.arange(-reach_mm, reach_mm + step_mm / 2, step_mm)
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).astype(np.float32)


def ball(radius_mm, edge_mm):
    nothing = np.zeros((0, 3), np.float32)
    flat = np.zeros(0, np.float32)
    axes = np.eye(3, dtype=np.float32) / np.float32(radius_mm)
    return Shape(radius_mm, edge_mm, axes, nothing, flat, flat, nothing, flat, sharpness=60.0)


def shape_of(seed, spiculated=False, radius_mm=8.0, edge_mm=0.5):
    return random_shape(radius_mm, edge_mm, np.random.default_rng(seed), spiculated)


def slow_share(shape, offset, scale):
    """The share at one offset from the centre, one wave and one spicule at a time."""
    position = [sum(float(shape.axes[row, k]) * float(offset[k]) for k in range(3)) for row in range(3)]
    distance = math.sqrt(sum(each**2 for each in position))
    direction = [each / distance for each in position]
    surface = 1.0
    for wave, phase, height in zip(shape.waves, shape.phases, shape.heights, strict=True):
        surface += height * math.cos(sum(d * w for d, w in zip(direction, wave, strict=True)) + phase)
    for spicule, length in zip(shape.spicules, shape.lengths, strict=True):
        cosine = sum(d * s for d, s in zip(direction, spicule, strict=True))
        surface += length * math.exp(shape.sharpness * (cosine - 1))
    depth_mm = (scale * min(max(surface, 0.3), REACH) - distance) * shape.radius_mm
    return 1 / (1 + math.exp(-2 * depth_mm / shape.edge_mm))


@settings(deadline=None, max_examples=30)
@given(SEEDS, st.booleans(), st.floats(0.3, 1.0))
def test_the_share_is_one_wave_and_one_spicule_after_the_other(seed, spiculated, scale):
    shape = shape_of(seed, spiculated, edge_mm=2.0)
    points = np.random.default_rng(seed).uniform(-12, 12, (20, 3)).astype(np.float32)

    shares = shape.share(points, scale)

    assert shares.dtype == np.float32
    np.testing.assert_allclose(shares, [slow_share(shape, each, scale) for each in points], atol=2e-4)


@pytest.mark.parametrize("edge_mm", [0.5, 3.0])
def test_the_edge_fades_from_88_to_12_hundredths_over_twice_its_half_width(edge_mm):
    along = np.array([[0, 0, 10 - edge_mm], [0, 10, 0], [10 + edge_mm, 0, 0]], np.float32)

    shares = ball(10.0, edge_mm).share(along)

    np.testing.assert_allclose(shares, [1 / (1 + math.exp(-2)), 0.5, 1 / (1 + math.exp(2))], atol=1e-4)


@pytest.mark.parametrize("spiculated", [False, True])
@pytest.mark.parametrize("radius_mm", [2.0, 20.0])
def test_a_shape_is_as_large_as_a_ball_of_its_radius(radius_mm, spiculated):
    grid = offsets(2.2 * radius_mm, radius_mm / 7)
    volumes_mm3 = np.array(
        [(shape_of(seed, spiculated, radius_mm).share(grid) > 0.5).sum() * (radius_mm / 7) ** 3 for seed in range(40)]
    )

    ratios = np.cbrt(volumes_mm3 / (4 / 3 * math.pi)) / radius_mm
    assert 0.8 < ratios.min() <= ratios.max() < 1.25
    assert 0.97 < np.median(ratios) < 1.07


@settings(deadline=None, max_examples=25, derandomize=True)
@given(SEEDS)
def test_a_shape_without_spicules_ends_within_its_reach(seed):
    grid = offsets(20, 1.0)
    beyond = np.linalg.norm(grid, axis=-1) > 6 * REACH + 3

    assert shape_of(seed, radius_mm=6.0, edge_mm=1.6).share(grid)[beyond].max() < 0.1


@settings(deadline=None, max_examples=25, derandomize=True)
@given(SEEDS, st.booleans())
def test_a_smaller_scale_lies_in_the_larger(seed, spiculated):
    shape, grid = shape_of(seed, spiculated), offsets(16, 1.6)

    assert (shape.share(grid, scale=0.5) <= shape.share(grid)).all()
    assert 0.05 < (shape.share(grid, scale=0.5) > 0.5).sum() / (shape.share(grid) > 0.5).sum() < 0.3  # an eighth


def test_spicules_reach_out_of_a_body_and_are_thin():
    grid = offsets(20, 0.8)
    distance = np.linalg.norm(grid, axis=-1) / 8  # radii

    for seed in range(12):
        smooth, spiky = (shape_of(seed, spiculated).share(grid) > 0.5 for spiculated in (False, True))
        assert distance[smooth].max() < 1.75
        assert distance[spiky].max() > 1.45
        shells = [spiky[(distance > low) & (distance < low + 0.2)].mean() for low in (0.4, 1.45)]
        assert shells[0] > 0.9
        assert 0 < shells[1] < 0.15


def test_a_surface_lies_between_three_tenths_of_the_radius_and_the_reach():
    spike = np.array([[1, 0, 0]], np.float32)
    long = replace(ball(10.0, 0.2), spicules=spike, lengths=np.array([3], np.float32))
    dented = replace(long, lengths=np.array([-3], np.float32))
    along = spike * np.array([[2], [4], [18], [21]], np.float32)  # mm

    np.testing.assert_allclose(long.share(along), [1, 1, 1, 0], atol=1e-3)
    np.testing.assert_allclose(dented.share(along), [1, 0, 0, 0], atol=1e-3)


def test_shapes_are_stretched_and_bumpy_and_some_are_neither():
    grid = offsets(14, 1.4)
    round_body = ball(8.0, 0.5).share(grid) > 0.5
    stretch, bumps = [], []
    for seed in range(30):
        shape = shape_of(seed)
        smooth, body = (each.share(grid) > 0.5 for each in (replace(shape, heights=0 * shape.heights), shape))
        stretch.append((smooth & round_body).sum() / (smooth | round_body).sum())
        bumps.append((smooth & body).sum() / (smooth | body).sum())

    for overlap in (stretch, bumps):
        assert min(overlap) < 0.8
        assert max(overlap) > 0.94


@given(SEEDS, st.booleans())
@settings(deadline=None, max_examples=15)
def test_the_same_generator_gives_the_same_shape(seed, spiculated):
    grid = offsets(12, 2)

    assert shape_of(seed, spiculated).share(grid).tobytes() == shape_of(seed, spiculated).share(grid).tobytes()
    assert shape_of(seed, spiculated).share(grid).tobytes() != shape_of(seed + 1, spiculated).share(grid).tobytes()
