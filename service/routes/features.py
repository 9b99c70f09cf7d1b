"""A cohort's features, to take away."""

from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from service.deps import EncodersDep, SettingsDep, StoresDep
from service.errors import EmptyCohort
from service.features.bags import Cohort, picked, read_cohort
from service.features.formats import FORMATS
from service.schemas.features import FeatureQuery
from service.storage.cohorts import CohortFilter

router = APIRouter(prefix="/v1/features", tags=["features"])

BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {each.media_type: BINARY for each in FORMATS.values()}}},
)
def get_features(
    query: Annotated[FeatureQuery, Query()], stores: StoresDep, settings: SettingsDep, encoders: EncodersDep
) -> StreamingResponse:
    """The embeddings of all series that meet the filter, with their receipts, in one file."""
    encoder_id, spec = encoders.id(query.encoder), encoders.spec(query.encoder)
    here = [window.name for window in spec.windows]
    windows = [here[k] for k in sorted(picked(here, query.window))] if query.window else here
    chosen = query.chosen()
    series, slices = stores.cohorts.size(chosen, encoder_id)
    if not series:
        raise EmptyCohort(f"no series with embeddings of {encoder_id} meets the filter")
    cohort = Cohort(chosen, encoder_id, windows, spec.dim, query.patients == "id", series, slices)
    settings.staging_dir.mkdir(parents=True, exist_ok=True)
    form = FORMATS[query.format]
    content = form.write(read_cohort(cohort, stores), about(cohort), cohort.dim, settings.staging_dir)
    headers = {
        "Content-Disposition": f'attachment; filename="features{form.suffix}"',
        "X-Keyslice-Encoder": encoder_id,
        "X-Keyslice-Windows": ",".join(windows),
        "X-Keyslice-Series": str(series),
        "X-Keyslice-Slices": str(slices),
    }
    return StreamingResponse(content, media_type=form.media_type, headers=headers)


def about(cohort: Cohort) -> dict[str, Any]:
    """What every file says of itself. Patients that were asked for by name are counted, not named."""
    conditions = {name: value for name, value in asdict(cohort.chosen).items() if value}
    if named := conditions.pop("patient_id", None):
        conditions["patients"] = len(named)
    return {
        "encoder_id": cohort.encoder_id,
        "windows": [*cohort.windows],
        "dim": cohort.dim,
        "filter": conditions,
        "patient": "id" if cohort.patient_ids else "opaque key",
        "code_version": version("keyslice"),
    }


def of_one_series(encoder_id: str, windows: list[str], dim: int) -> dict[str, Any]:
    """The same of a single series' file."""
    return about(Cohort(CohortFilter(), encoder_id, windows, dim, False, 1, 0))
