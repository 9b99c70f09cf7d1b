"""The form that trains a head."""

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field

from models.heads.options import Baseline, Network, Protocol, Task
from service.schemas.base import Text


class HeadTraining(BaseModel):
    """The form beside the labels file. The paper's hyper-parameters by default."""

    model_config = ConfigDict(extra="forbid")

    name: str | None = Field(
        None,
        pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$",
        description="of which this head is the next version; its own id where unset",
    )
    labels: UploadFile = Field(
        description="CSV: patient_id, study_uid or series_uid, then a column per label of 0, 1 and empty for unknown; "
        "a column split of train, validation and test where some are"
    )
    encoder: Text | None = Field(None, description="name or id; the service's own where unset")
    task: Task = Field("multilabel", description="one_of_n has exactly one 1 per row, binary one label column")
    network: Network = "abmil"
    protocol: Protocol = Field("kfold", description="of a table without a split column")
    folds: int = Field(5, ge=2, le=50, description="fewer where a class has fewer patients")
    inner_folds: int = Field(5, ge=2, le=50, description="of nested: in each outer fold, and of the deployed head")
    epochs: int = Field(32, ge=1, le=10_000)
    patience: int = Field(8, ge=1, le=10_000, description="epochs without improvement of the validation loss")
    batch_size: int = Field(128, ge=1, le=4096, description="bags")
    learning_rate: float = Field(1e-4, gt=0, le=1)
    weight_decay: float = Field(1e-2, ge=0, le=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    hidden: int = Field(256, ge=1, le=4096, description="size of an instance behind the first layer")
    attention: int = Field(256, ge=1, le=4096, description="size of the attention's hidden layer")
    temperature_scaling: bool = Field(True, description="false leaves probabilities as the network gives them")
    specificity: float = Field(0.9, gt=0, lt=1, description="at which sensitivity is told")
    baselines: list[Baseline] = Field([], max_length=5, description="heads to train beside it on the same splits")
    permutations: int | None = Field(
        None, ge=0, le=100, description="trainings on shuffled labels; 1 for up to 100 patients where unset, else 0"
    )
    splits_of: Text | None = Field(None, description="a head whose splits are used again, patient by patient")
    seed: int = Field(0, ge=0, lt=2**31)
