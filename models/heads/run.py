"""A head at work: one bag in, probabilities and attention out, without torch."""

import numpy as np
import onnxruntime
from numpy.typing import NDArray


class HeadRunner:
    """An exported head in memory. Several threads may run it at once."""

    def __init__(self, graph: bytes) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # a bag is milliseconds of work; the cores belong to the encoder
        self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def predict(self, bag: NDArray[np.float16]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """bag (slices, windows, dim) -> probabilities (labels,), attention (slices, windows) that sums to 1."""
        slices, windows, dim = bag.shape
        instances = bag.reshape(slices * windows, dim).astype(np.float32)
        probabilities, attention = self._session.run(None, {"bag": instances})
        return np.asarray(probabilities), np.asarray(attention).reshape(slices, windows)
