"""What can be chosen about a head and its evaluation; plain values, so that the API needs no torch to read them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Task = Literal["multilabel", "one_of_n", "binary"]
Network = Literal["abmil", "gated_abmil", "mean", "max"]
Baseline = Literal["abmil", "gated_abmil", "mean", "max", "probe"]
Protocol = Literal["kfold", "nested"]

NETWORKS: tuple[Network, ...] = get_args(Network)


@dataclass(frozen=True)
class HeadOptions:
    """The paper's hyper-parameters by default."""

    task: Task = "multilabel"
    network: Network = "abmil"
    protocol: Protocol = "kfold"
    folds: int = 5  # fewer where a class has fewer patients
    inner_folds: int = 5  # of nested: in each outer fold, and of the deployed head
    epochs: int = 32
    patience: int = 8  # epochs without improvement of the validation loss
    batch_size: int = 128  # bags
    learning_rate: float = 1e-4
    weight_decay: float = 1e-2  # AdamW's default
    dropout: float = 0.5
    hidden: int = 256  # size of an instance behind the first layer
    attention: int = 256  # p of Eq. 6
    temperature_scaling: bool = True
    specificity: float = 0.9  # at which sensitivity is told
    baselines: Sequence[Baseline] = ()
    permutations: int = 0  # trainings on shuffled labels
    seed: int = 0

    @property
    def one_of_n(self) -> bool:
        return self.task == "one_of_n"
