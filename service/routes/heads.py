"""Heads: trained on a labels table over stored bags."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Response

from service.deps import EncodersDep, QueueDep, SettingsDep, StoresDep
from service.errors import UploadTooLarge
from service.labels import match_labels, parse_labels
from service.schemas import Head, HeadAccepted, HeadPage, HeadTraining, Text

router = APIRouter(prefix="/v1/heads", tags=["heads"])


@router.post("", status_code=202)
def post_head(
    form: Annotated[HeadTraining, Form()],
    stores: StoresDep,
    settings: SettingsDep,
    queue: QueueDep,
    encoders: EncodersDep,
) -> HeadAccepted:
    """Train a head on the labels file: `patient_id` or `series_uid`, then a column of 0 and 1 per label."""
    encoder_id = encoders.id(form.encoder)
    table = form.labels.file.read(settings.max_labels_bytes + 1)
    if len(table) > settings.max_labels_bytes:
        raise UploadTooLarge(f"the labels table is longer than {settings.max_labels_bytes} bytes")
    labels = parse_labels(table, form.task == "one_of_n")
    rows = match_labels(labels, stores.catalog, encoder_id)
    options = form.model_dump(exclude={"labels", "encoder"})
    job_id, head_id = stores.heads.add(encoder_id, labels.labels, options, {"rows": rows})
    queue.train(head_id)
    return HeadAccepted(job_id=job_id, head_id=head_id)


@router.get("")
def list_heads(
    stores: StoresDep,
    cursor: Annotated[Text | None, Query(description="next_cursor of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> HeadPage:
    """The heads here, in the order of their ids."""
    rows = stores.heads.list(after=cursor, limit=limit + 1)
    page = [Head.model_validate(row) for row in rows[:limit]]
    return HeadPage(heads=page, next_cursor=page[-1].head_id if len(rows) > limit else None)


@router.get("/{head_id}")
def get_head(head_id: Text, stores: StoresDep) -> Head:
    """The head's state, labels, options and report."""
    return Head.model_validate(stores.heads.get(head_id))


@router.get(
    "/{head_id}/weights", response_class=Response, responses={200: {"content": {"application/octet-stream": {}}}}
)
def get_weights(head_id: Text, stores: StoresDep) -> Response:
    """The weights of every fold as safetensors: `heads.<fold>.<tensor>` of models/abmil.py."""
    name = {"Content-Disposition": f'attachment; filename="head-{head_id}.safetensors"'}
    return Response(stores.heads.ready(head_id).weights, media_type="application/octet-stream", headers=name)
