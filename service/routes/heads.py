"""Heads: trained on a labels table over stored bags."""

from typing import Annotated

from fastapi import APIRouter, Form, Query, Response

from service.comparisons import compare_heads
from service.deps import EncodersDep, QueueDep, SettingsDep, ShownDep, StoresDep, needs
from service.errors import UploadTooLarge
from service.labels import match_labels, parse_labels
from service.schemas.base import Text
from service.schemas.heads import Head, HeadAccepted, HeadComparison, HeadPage
from service.schemas.training import HeadTraining
from service.splits import splits_of

router = APIRouter(prefix="/v1/heads", tags=["heads"])

SMALL_SET = 100  # patients up to which a training on shuffled labels is part of the report unless said otherwise
LONG = {"rows", "splits"}  # of a report, left out of lists


@router.post("", status_code=202, dependencies=[needs("train")])
def post_head(
    form: Annotated[HeadTraining, Form(media_type="multipart/form-data")],
    stores: StoresDep,
    settings: SettingsDep,
    queue: QueueDep,
    encoders: EncodersDep,
    shown: ShownDep,
) -> HeadAccepted:
    """Train a head on the labels file: `patient_id`, `study_uid` or `series_uid`, then a column per label."""
    encoder_id = encoders.id(form.encoder)
    table = form.labels.file.read(settings.max_labels_bytes + 1)
    if len(table) > settings.max_labels_bytes:
        raise UploadTooLarge(f"the labels table is longer than {settings.max_labels_bytes} bytes")
    matched = match_labels(parse_labels(table, form.task), stores.catalog, encoder_id)
    splits = splits_of(stores.heads.ready(form.splits_of), matched) if form.splits_of else None
    options = form.model_dump(exclude={"labels", "encoder", "splits_of", "name"})
    if form.permutations is None:
        options["permutations"] = int(matched.patients <= SMALL_SET)
    targets = matched.as_targets(splits, form.splits_of)
    job_id, head_id = stores.heads.add(encoder_id, matched.labels.labels, options, targets, form.name)
    shown.series(uid for _, uids, _ in matched.rows for uid in uids)
    shown.about(head=head_id, job=job_id)
    queue.train(head_id)
    return HeadAccepted.model_validate({"job_id": job_id, "head_id": head_id, "warnings": matched.warnings})


@router.get("", dependencies=[needs("read")])
def list_heads(
    stores: StoresDep,
    cursor: Annotated[Text | None, Query(description="next_cursor of the page before")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> HeadPage:
    """The heads here, in the order of their ids; without the rows and splits of their reports."""
    rows = stores.heads.list(after=cursor, limit=limit + 1)
    page = [Head.model_validate(row) for row in rows[:limit]]
    for head in page:
        head.report = head.report and {key: value for key, value in head.report.items() if key not in LONG}
    return HeadPage(heads=page, next_cursor=page[-1].head_id if len(rows) > limit else None)


@router.get("/{head_id}", dependencies=[needs("read")])
def get_head(head_id: Text, stores: StoresDep) -> Head:
    """The head's state, labels, options and report; by id, by `name@version`, or by name: the promoted version."""
    return Head.model_validate(stores.heads.get(head_id))


@router.post("/{head_id}/promote", dependencies=[needs("admin")])
def promote_head(head_id: Text, stores: StoresDep, shown: ShownDep) -> Head:
    """From now on the head's name alone means this version. The first version of a name is promoted by itself."""
    promoted = stores.heads.promote(head_id)
    shown.about(head=promoted.head_id)
    return Head.model_validate(promoted)


@router.get("/{head_id}/comparison", dependencies=[needs("read")])
def get_comparison(
    head_id: Text,
    other: Annotated[Text, Query(alias="with", description="the other head")],
    stores: StoresDep,
) -> HeadComparison:
    """This head minus another on the same patients: DeLong's test and a paired bootstrap."""
    return HeadComparison.model_validate(compare_heads(stores.heads.ready(head_id), stores.heads.ready(other)))


@router.get(
    "/{head_id}/weights",
    response_class=Response,
    responses={200: {"content": {"application/octet-stream": {}}}},
    dependencies=[needs("read")],
)
def get_weights(head_id: Text, stores: StoresDep) -> Response:
    """The weights of every fold as safetensors: `heads.<fold>.<tensor>` of models/abmil.py, and `temperature`."""
    name = {"Content-Disposition": f'attachment; filename="head-{head_id}.safetensors"'}
    return Response(stores.heads.weights(head_id), media_type="application/octet-stream", headers=name)
