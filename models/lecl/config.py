"""What a pretraining run is told: one TOML file, checked before anything starts."""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.ct.windows import WINDOWS

Share = Annotated[float, Field(ge=0, le=1)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


class BadConfig(Exception):
    """The configuration cannot be read; the message names each key, what was found and what was expected."""


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"found {pair[0]:g} to {pair[1]:g}, expected the lower end first")
    return pair


def _known_window(name: str) -> str:
    if name not in WINDOWS:
        raise ValueError(f"no window {name!r}, expected one of {', '.join(WINDOWS)}")
    return name


Range = Annotated[tuple[Weight, Weight], AfterValidator(_rising)]


class Section(BaseModel):
    """One table of the file. A key that it does not know is an error: a misspelt one would pass for its default."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DeepLesionConfig(Section):
    kind: Literal["deeplesion"]
    path: Path  # the folder with DL_info.csv and Images_png
    split: Literal["train", "val", "test"] = "train"  # the authors' own, by patient


class ArchiveConfig(Section):
    kind: Literal["archive"]
    path: Path  # a folder of DICOM
    boxes: Path | None = None  # CSV of lesions by SOP UID


class DataConfig(Section):
    sources: Annotated[
        list[Annotated[DeepLesionConfig | ArchiveConfig, Field(discriminator="kind")]], Field(min_length=1)
    ]
    cache: Path | None = None  # where decoded slices are kept between runs
    description: str = ""  # of the collections, for the model card
    attribution: str = ""  # as their licences ask for it, for the model card
    leave_out_patients: list[str] = []  # opaque keys, as the sources give them
    folds: Count | None = None  # patients are dealt into so many folds,
    fold: Annotated[int, Field(ge=0)] | None = None  # and those of this one are left out
    split_seed: int = 0  # not the run's: runs of several seeds share their folds
    # Slices of a patient count by the root of their number: no long series drowns the patients with few.
    balanced: bool = False

    @model_validator(mode="after")
    def _one_fold_of_several(self) -> Self:
        if (self.folds is None) != (self.fold is None):
            raise ValueError("folds and fold come together")
        if self.folds is not None and self.fold is not None and not self.fold < self.folds > 1:
            raise ValueError(f"fold {self.fold} of {self.folds}, expected two folds or more, and one of 0 to folds - 1")
        return self


class EncoderConfig(Section):
    base: str  # an encoder that the service knows: its network, its windows
    # With the base encoder's weights, with none, or with the ImageNet default's in the trunk and none beyond it.
    start: Literal["pretrained", "random", "trunk"] = "pretrained"
    frozen_blocks: Annotated[int, Field(ge=0)] = (
        0  # of an EfficientNet's trunk, from the stem on, that stay as they are
    )
    frozen_norms: bool = False  # batch norms keep the statistics they started with: small batches have worse ones
    name: str | None = None  # of the encoder that the service gets at the end
    licence: str = ""  # of its weights; the base encoder's if none is given
    commercial_use: bool = True  # whether that licence permits it


class ViewConfig(Section):
    """How a slice becomes the views of one training step. Angles, shifts and noise are drawn up to these."""

    size: Annotated[int, Field(ge=32)] = 224  # px that the network sees, per side
    crop: Annotated[int, Field(ge=32)] | None = (
        None  # px; a square of the slice after resizing to `size`, else all of it
    )
    windows: Annotated[list[Annotated[str, AfterValidator(_known_window)]], Field(min_length=1)] = ["abdomen", "lung"]
    plant: Share = 0.5  # of the slices get a synthetic lesion
    lesions: Count = 1  # in a slice that gets any, at most
    decoy: Share = 0.5  # get an edit that is none
    lesion_crop: bool = False  # the second view of a lesion's slice is centred on the lesion (LECL)
    scale: Annotated[tuple[Positive, Positive], AfterValidator(_rising)] = (0.8, 1.25)
    flip: bool = True  # left to right, every other time
    rotate_degrees: Annotated[float, Field(ge=0, le=180)] = 10.0
    sharpen: Annotated[tuple[float, float], AfterValidator(_rising)] = (
        0.0,
        0.0,
    )  # share of the fine detail added, or taken
    noise_hu: Range = (0.0, 20.0)  # standard deviation
    shift_hu: Weight = 20.0
    gain: Share = 0.05  # HU are multiplied by 1 - gain to 1 + gain

    @model_validator(mode="after")
    def _crop_within(self) -> Self:
        if self.crop is not None and self.crop > self.size:
            raise ValueError(f"crop of {self.crop} px, expected at most size, {self.size} px")
        return self


class ObjectiveConfig(Section):
    """What the loss is the weighted sum of; an objective of weight 0 is not computed."""

    moco: Weight = 0.0
    lecl: Weight = 0.0
    reconstruction: Weight = 0.0
    discrimination: Weight = 0.0
    planting: Weight = 0.0
    lecl_lambda: Weight = 1.0  # Eq. 4; the paper tries 0, 1, 3 and 5
    temperature: Positive = 0.2
    momentum: Share = 0.99  # of the momentum encoder
    momentum_schedule: Literal["cosine", "constant"] = "cosine"  # up to 1, as MoCo-v3 has it, or as it is
    projector_hidden: Count = 4096

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each objective that is computed."""
        names = ("moco", "lecl", "reconstruction", "discrimination", "planting")
        return {name: getattr(self, name) for name in names if getattr(self, name) > 0}

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if not self.weights:
            raise ValueError("every objective has weight 0, expected one above")
        return self


class RunConfig(Section):
    output: Path  # folder of checkpoints and metrics
    steps: Count | None = None  # of the optimizer; or
    epochs: Positive | None = None  # times over the slices
    batch: Count = 64  # slices per step, over all processes
    accumulate: Count = 1  # parts that a step's batch is computed in
    learning_rate: Positive = 1e-4  # at the end of the warm-up
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    warmup_epochs: Weight | None = None
    weight_decay: Weight = 1e-2
    precision: Literal["fp32", "bf16"] = "fp32"
    workers: Annotated[int, Field(ge=0)] = 2  # processes that prepare views, per training process
    seed: Annotated[int, Field(ge=0)] = 0
    checkpoint_every: Count = 500  # steps
    log_every: Count = 20  # steps

    @model_validator(mode="after")
    def _lengths_in_one_unit(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("expected either steps or epochs")
        if self.warmup_steps is not None and self.warmup_epochs is not None:
            raise ValueError("found warmup_steps and warmup_epochs, expected one of them at most")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} is no multiple of accumulate {self.accumulate}")
        return self

    def lengths(self, slices: int) -> tuple[int, int]:
        """The optimizer's steps in all, and those of them that warm up, on this many slices."""
        steps = self.steps or max(1, round((self.epochs or 0) * slices / self.batch))
        warmup = self.warmup_steps or round((self.warmup_epochs or 0) * slices / self.batch)
        return steps, min(warmup, steps)


class Config(Section):
    """A whole run."""

    data: DataConfig
    encoder: EncoderConfig
    views: ViewConfig = ViewConfig()
    objectives: ObjectiveConfig
    run: RunConfig

    def writing_to(self, output: Path) -> "Config":
        """The same run with another output folder."""
        return self.model_copy(update={"run": self.run.model_copy(update={"output": output})})

    def facts(self) -> dict[str, Any]:
        """The run as JSON holds it, for checkpoints and model cards: patients left out are counted, not listed."""
        facts = self.model_dump(mode="json")
        facts["data"]["leave_out_patients"] = len(self.data.leave_out_patients)
        return facts


def read_config(path: Path) -> Config:
    """The file's configuration. Raises BadConfig."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from error
    try:
        return Config.model_validate(found)
    except ValidationError as error:
        raise BadConfig("\n".join(f"{path.name}: {_said(each)}" for each in error.errors())) from error


def _said(error: Any) -> str:
    """One finding as `key: what is wrong`."""
    key = ".".join(str(part) for part in error["loc"] if part not in ("deeplesion", "archive"))
    match error["type"]:
        case "extra_forbidden":
            return f"{key}: no such key"
        case "missing":
            return f"{key}: not given"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            hidden = isinstance(error["input"], dict) or "leave_out_patients" in error["loc"]
            found = "" if hidden else f", found {error['input']!r}"
            return f"{key}: {error['msg'][:1].lower()}{error['msg'][1:]}{found}"
