"""A trained head as bytes: safetensors for people, an ONNX graph that the API runs without torch."""

import warnings

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from models.abmil import Ensemble
from models.heads.member import new_network
from models.heads.options import HeadOptions


class _ByFold(nn.Module):
    """The graph's form of an ensemble."""

    def __init__(self, ensemble: Ensemble) -> None:
        super().__init__()
        self.ensemble = ensemble

    def forward(self, bag: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        return self.ensemble.by_fold(bag, present)


def to_safetensors(ensemble: Ensemble) -> bytes:
    """The weights of every fold, as `heads.<fold>.<tensor>`."""
    return save({name: tensor.contiguous() for name, tensor in ensemble.state_dict().items()})


def from_safetensors(weights: bytes, options: HeadOptions) -> Ensemble:
    """The ensemble again, of the options that it was trained with; in eval mode, its weights without gradients."""
    state = load(weights)
    folds = len({name.split(".")[1] for name in state if name.startswith("heads.")})
    dim, labels = state["heads.0.encoder.0.weight"].shape[1], len(state["heads.0.head.4.bias"])
    heads = [new_network(options.network, dim, labels, options) for _ in range(folds)]
    ensemble = Ensemble(heads, options.one_of_n, state["temperature"].tolist())
    ensemble.load_state_dict(state, strict=True)
    return ensemble.eval().requires_grad_(False)


def to_onnx(ensemble: Ensemble, dim: int) -> bytes:
    """`bag` (instances, dim) float32 and `present` (runs, instances) bool, as Ensemble.by_fold() takes them.

    Answers `probabilities` (folds, runs, labels) and `attention` (folds, runs, instances).
    """
    instances, runs = torch.export.Dim("instances", min=1), torch.export.Dim("runs", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns of its own internals
        program = torch.onnx.export(
            _ByFold(ensemble).eval(),
            (torch.zeros(4, dim), torch.ones(3, 4, dtype=torch.bool)),
            input_names=["bag", "present"],
            output_names=["probabilities", "attention"],
            dynamic_shapes=({0: instances}, {0: runs, 1: instances}),
            verbose=False,
        )
    assert program is not None
    graph: bytes = program.model_proto.SerializeToString()
    return graph
