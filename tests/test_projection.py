"""Embeddings in two dimensions, against the definitions."""

import numpy as np
import pytest

from models.projection import FEWEST, project


def clusters(count: int, dim: int = 12) -> np.ndarray:
    """Three tight groups of directions, of different lengths."""
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, dim))
    vectors = np.repeat(centres, count, axis=0) + 0.05 * random.normal(size=(3 * count, dim))
    return (vectors * random.uniform(1, 5, size=(len(vectors), 1))).astype(np.float16)


def test_pca_is_the_covariances_leading_eigenvectors():
    vectors = clusters(8)
    directions = [row / np.sqrt(sum(float(value) ** 2 for value in row)) for row in vectors.astype(np.float64)]
    centred = np.array(directions) - sum(directions) / len(directions)
    values, axes = np.linalg.eigh(sum(np.outer(row, row) for row in centred))

    found = project(vectors, seed=0)

    expected = centred @ axes[:, [-1, -2]]
    np.testing.assert_allclose(np.abs(found.pca), np.abs(expected), atol=1e-9)  # an axis may be turned around
    assert found.shares == pytest.approx((values[-1] / values.sum(), values[-2] / values.sum()))


def test_tsne_keeps_groups_together_and_its_seed():
    vectors = clusters(12)

    found = project(vectors, seed=3).tsne

    away = np.linalg.norm(found[:, None] - found[None], axis=-1) + np.diag(np.full(len(found), np.inf))
    assert [int(k) // 12 for k in away.argmin(axis=1)] == [k // 12 for k in range(36)]
    np.testing.assert_array_equal(found, project(vectors, seed=3).tsne)


@pytest.mark.parametrize("count", [1, 2, FEWEST - 1])
def test_few_vectors_have_no_tsne(count):
    found = project(np.random.default_rng(0).normal(size=(count, 5)), seed=0)

    assert found.pca.shape == (count, 2) and np.isfinite(found.pca).all()
    assert found.tsne is None
    assert found.shares == pytest.approx((1.0, 0.0)) if count == 2 else sum(found.shares) <= 1


def test_vectors_that_are_all_the_same_are_one_point():
    found = project(np.ones((20, 4), np.float16), seed=0)

    assert (found.pca.tolist(), found.shares, found.tsne) == ([[0.0, 0.0]] * 20, (0.0, 0.0), None)


def test_a_vector_of_zeros_is_no_error():
    vectors = clusters(8)
    vectors[3] = 0

    assert np.isfinite(project(vectors, seed=0).pca).all()
