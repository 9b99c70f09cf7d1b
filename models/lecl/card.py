"""The model card of an exported encoder: what it is, from what, how good, and what it is not for."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.specs import EncoderSpec

LIMITS = """\
For research. Not a medical device, and not for clinical decisions. It has seen the scanners, body regions and lesions
named above and nothing else; synthetic lesions are not real ones. Embeddings of pictures are personal data where the
pictures are."""


@dataclass(frozen=True)
class Trained:
    """How weights came to be, for those who will judge them. Nothing in it may tell who a patient is."""

    objectives: Mapping[str, float]  # the weight of each in the loss
    data: str  # the collections, how many slices and patients of them, what was held out
    attribution: str  # as the data's licences ask for it
    steps: int  # of the optimiser
    command: str  # that trains them again
    versions: Mapping[str, str]  # of Keyslice, torch and whatever else decides the numbers
    figures: Mapping[str, float]  # what was measured, by name
    figures_of: str = "these weights"  # which weights that was: these, or others trained the same way on fewer patients


def model_card(spec: EncoderSpec, trained: Trained, cosine: float) -> str:
    """MODEL_CARD.md; `cosine` is that of the canary's embeddings before and after rounding to the file's numbers."""
    windows = ", ".join(f"{each.name} {each.low:g}..{each.high:g} HU" for each in spec.windows)
    return f"""\
# {spec.name}

A frozen encoder of CT slices for Keyslice: `{spec.network}` ({spec.family}), a slice of {spec.input_size} x \
{spec.input_size} pixels at each window ({windows}) to {spec.dim} numbers.

- Licence of the weights: {spec.licence}{"" if spec.commercial_use else "; no commercial use"}
- SHA-256 of the weights: `{spec.weights.sha256}`
- Cosine of the stored to the trained weights' embeddings: {cosine:.7f}

## Data

{trained.data}

{trained.attribution}

## Training

{trained.steps} steps. Objectives, with their weight in the loss:

{_listed({name: f"{weight:g}" for name, weight in trained.objectives.items()})}

```
{trained.command}
```

{_listed(trained.versions)}

## Figures

{_figures(trained)}

## Limits

{LIMITS}
"""


def _figures(trained: Trained) -> str:
    if not trained.figures:
        return "None were measured."
    return f"Of {trained.figures_of}:\n\n" + _listed({name: f"{value:.4g}" for name, value in trained.figures.items()})


def _listed(entries: Mapping[str, str]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in entries.items())
