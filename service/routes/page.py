"""The web page."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

PAGE = Path(__file__).resolve().parent.parent / "web" / "index.html"


@router.get("/")
def get_page() -> FileResponse:
    return FileResponse(PAGE)
