"""A head's report for people: a page and a model card."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, PlainTextResponse

from service.deps import StoresDep, needs
from service.report.card import model_card
from service.report.page import page
from service.schemas.base import Text

router = APIRouter(prefix="/v1/heads", tags=["heads"], dependencies=[needs("read")])

# The page needs nothing from anywhere, and a label may say anything.
CLOSED = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
AS_IT_IS = {"X-Content-Type-Options": "nosniff"}  # no browser may take a label for HTML


class Markdown(PlainTextResponse):
    media_type = "text/markdown"


@router.get("/{head_id}/report", response_class=HTMLResponse)
def get_report(head_id: Text, stores: StoresDep) -> HTMLResponse:
    """One self-contained HTML page: figures, curves, cohort, and the command that made the head."""
    head = stores.heads.ready(head_id)
    found = page(head.head_id, head.encoder_id, head.labels, head.created_at, head.report or {})
    return HTMLResponse(found, headers=CLOSED)


@router.get("/{head_id}/card", response_class=Markdown)
def get_card(head_id: Text, stores: StoresDep) -> Markdown:
    """The model card: use and limits, data as counts, figures with intervals, origin, and how to load the weights."""
    head = stores.heads.ready(head_id)
    found = model_card(head.head_id, head.encoder_id, head.labels, head.created_at, head.report or {})
    return Markdown(found, headers=AS_IT_IS)
