"""Embeddings in two dimensions, to look at."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMPONENTS = 50  # that t-SNE starts from: distances in them are nearly those of all, at a fraction of the time
PERPLEXITY = 30.0
FEWEST = 10  # vectors, below which neighbourhoods are not worth drawing

Points = NDArray[np.float64]  # (n, 2)


@dataclass(frozen=True)
class Projection:
    pca: Points
    shares: tuple[float, float]  # of the variance, along each of its axes
    tsne: Points | None  # None of fewer than FEWEST vectors, or of vectors that are all the same


def project(vectors: NDArray[np.floating], seed: int) -> Projection:
    """(n, dim) -> by principal components, and by t-SNE (van der Maaten and Hinton 2008), both of directions.

    Vectors are made of length one first: searches compare by cosine. The same vectors and seed give the same points.
    """
    from sklearn.decomposition import PCA

    wide = vectors.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    directions = wide / np.where(lengths, lengths, 1.0)
    if len(directions) < 2 or np.ptp(directions, axis=0).max() < 1e-6:  # less than float16 tells apart
        return Projection(np.zeros((len(directions), 2)), (0.0, 0.0), None)
    components = min(COMPONENTS, *directions.shape)
    pca = PCA(components, svd_solver="covariance_eigh")
    found = np.zeros((len(directions), max(2, components)))
    found[:, :components] = pca.fit_transform(directions)
    first, second = [*map(float, pca.explained_variance_ratio_[:2]), 0.0][:2]
    return Projection(found[:, :2], (first, second), _tsne(found, seed) if len(found) >= FEWEST else None)


def _tsne(components: NDArray[np.float64], seed: int) -> Points:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    tsne = TSNE(2, perplexity=min(PERPLEXITY, (len(components) - 1) / 3), init="pca", random_state=seed)
    with threadpool_limits(1):  # its threads wait for each other: beside a busy service several are far slower than one
        found = tsne.fit_transform(components)
    return np.asarray(found, np.float64)
