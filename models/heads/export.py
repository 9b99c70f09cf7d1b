"""A trained head as bytes: safetensors for people, an ONNX graph that the API runs without torch."""

import warnings

import torch
from safetensors.torch import save

from models.abmil import Ensemble


def to_safetensors(ensemble: Ensemble) -> bytes:
    """The weights of every fold, as `heads.<fold>.<tensor>`."""
    return save({name: tensor.contiguous() for name, tensor in ensemble.state_dict().items()})


def to_onnx(ensemble: Ensemble, dim: int) -> bytes:
    """`bag` (instances, dim) float32 -> `probabilities` (labels,), `attention` (instances,)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            ensemble.eval(),
            (torch.zeros(4, dim),),
            input_names=["bag"],
            output_names=["probabilities", "attention"],
            dynamic_shapes=({0: torch.export.Dim("instances", min=1)},),
            verbose=False,
        )
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    return graph
