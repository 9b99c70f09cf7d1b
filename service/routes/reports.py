"""A head's report for people."""

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from service.deps import StoresDep
from service.report.page import page
from service.schemas import Text

router = APIRouter(prefix="/v1/heads", tags=["heads"])

# The page needs nothing from anywhere, and a label may say anything.
CLOSED = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


@router.get("/{head_id}/report", response_class=HTMLResponse)
def get_report(head_id: Text, stores: StoresDep) -> HTMLResponse:
    """One self-contained HTML page: figures, curves, cohort, and the command that made the head."""
    head = stores.heads.ready(head_id)
    found = page(head.head_id, head.encoder_id, head.labels, head.created_at, head.report or {})
    return HTMLResponse(found, headers=CLOSED)
