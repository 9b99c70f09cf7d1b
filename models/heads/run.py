"""A head at work: one bag in, probabilities and attention out, without torch."""

from dataclasses import dataclass

import numpy as np
import onnxruntime
from numpy.typing import NDArray

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Reading:
    """What the folds of a head say of one bag."""

    fold_probabilities: Floats  # (folds, labels)
    fold_attention: Floats  # (folds, slices, windows), each fold's sums to 1

    @property
    def probabilities(self) -> Floats:
        """(labels,), the ensemble's: the mean over the folds."""
        return np.asarray(self.fold_probabilities.mean(axis=0))

    @property
    def attention(self) -> Floats:
        """(slices, windows), the mean over the folds; sums to 1."""
        return np.asarray(self.fold_attention.mean(axis=0))


class OtherGraph(Exception):
    """The graph is not of the form that models/heads/export.py writes now."""


class HeadRunner:
    """An exported head in memory. Several threads may run it at once."""

    def __init__(self, graph: bytes) -> None:
        """Raises OtherGraph."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a bag is milliseconds of work; the cores belong to the encoder
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        if (found := [each.name for each in self._session.get_inputs()]) != ["bag", "present"]:
            raise OtherGraph(f"the graph takes {', '.join(found)}, expected bag, present")

    def predict(self, bag: NDArray[np.float16]) -> tuple[Floats, Floats]:
        """bag (slices, windows, dim) -> probabilities (labels,), attention (slices, windows) that sums to 1."""
        reading = self.read(bag)
        return reading.probabilities, reading.attention

    def read(self, bag: NDArray[np.float16]) -> Reading:
        """bag (slices, windows, dim) -> what each fold says of it."""
        probabilities, attention = self._run(bag, np.ones((1, bag.shape[0] * bag.shape[1]), np.bool_))
        return Reading(probabilities[:, 0], attention[:, 0].reshape(-1, *bag.shape[:2]))

    def without(self, bag: NDArray[np.float16], removed: NDArray[np.bool_]) -> Floats:
        """The ensemble's probabilities, (runs, labels), where each run lacks the instances it removes.

        `removed` is (runs, slices * windows); no run may remove all of them.
        """
        probabilities, _ = self._run(bag, ~removed)
        return np.asarray(probabilities.mean(axis=0))

    def _run(self, bag: NDArray[np.float16], present: NDArray[np.bool_]) -> tuple[Floats, Floats]:
        """(folds, runs, labels) probabilities and (folds, runs, instances) attention."""
        instances = bag.reshape(-1, bag.shape[2]).astype(np.float32)
        probabilities, attention = self._session.run(None, {"bag": instances, "present": present})
        return np.asarray(probabilities), np.asarray(attention)
