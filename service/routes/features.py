"""A cohort's features, to take away."""

from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from service.deps import EncoderNames, EncodersDep, SettingsDep, ShownDep, StoresDep, WithinDep, needs
from service.errors import EmptyCohort
from service.features.bags import Cohort, picked, read_cohort
from service.features.formats import FORMATS
from service.features.sample import sample
from service.schemas.features import EmbeddedQuery, FeatureQuery, SampleQuery
from service.storage.cohorts import CohortFilter
from service.storage.stores import Stores

router = APIRouter(prefix="/v1/features", tags=["features"], dependencies=[needs("read", narrows=True)])

BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {each.media_type: BINARY for each in FORMATS.values()}}},
)
def get_features(
    query: Annotated[FeatureQuery, Query()],
    stores: StoresDep,
    settings: SettingsDep,
    encoders: EncodersDep,
    shown: ShownDep,
    within: WithinDep,
) -> StreamingResponse:
    """The embeddings of all series that meet the filter, with their receipts, in one file."""
    cohort = _cohort(query, within, stores, encoders)
    settings.staging_dir.mkdir(parents=True, exist_ok=True)
    form = FORMATS[query.format]
    shown.about(cohort=cohort.series)
    bags = shown.passing(read_cohort(cohort, stores))
    content = form.write(bags, about(cohort), cohort.dim, settings.staging_dir)
    headers = {"Content-Disposition": f'attachment; filename="features{form.suffix}"'} | _said(cohort)
    return StreamingResponse(content, media_type=form.media_type, headers=headers)


@router.get(
    "/sample", response_class=StreamingResponse, responses={200: {"content": {FORMATS["arrow"].media_type: BINARY}}}
)
def get_sample(
    query: Annotated[SampleQuery, Query()],
    stores: StoresDep,
    encoders: EncodersDep,
    shown: ShownDep,
    within: WithinDep,
) -> StreamingResponse:
    """Some instances of the series that meet the filter, drawn evenly, with the series' tags, as an Arrow stream."""
    cohort = _cohort(query, within, stores, encoders)
    told = about(cohort) | {"seed": query.seed}
    shown.about(cohort=cohort.series)
    content = sample(cohort, told, query.count, query.seed, stores, shown.series)
    return StreamingResponse(content, media_type=FORMATS["arrow"].media_type, headers=_said(cohort))


def _cohort(query: EmbeddedQuery, within: Sequence[str], stores: Stores, encoders: EncoderNames) -> Cohort:
    """Raises EmptyCohort, WindowNotFound, and what names of encoders do."""
    encoder_id, spec = encoders.id(query.encoder), encoders.spec(query.encoder)
    here = [window.name for window in spec.windows]
    windows = [here[k] for k in sorted(picked(here, query.window))] if query.window else here
    chosen = query.chosen(within)
    series, slices = stores.cohorts.size(chosen, encoder_id)
    if not series:
        raise EmptyCohort(f"no series with embeddings of {encoder_id} meets the filter")
    return Cohort(chosen, encoder_id, windows, spec.dim, query.patients == "id", series, slices)


def _said(cohort: Cohort) -> dict[str, str]:
    return {
        "X-Keyslice-Encoder": cohort.encoder_id,
        "X-Keyslice-Windows": ",".join(cohort.windows),
        "X-Keyslice-Series": str(cohort.series),
        "X-Keyslice-Slices": str(cohort.slices),
    }


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
