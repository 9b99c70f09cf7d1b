"""The web page, in three files."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).resolve().parent.parent / "web"

# Nothing from elsewhere, no script in the markup: what a patient's name might hold is never run.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # asked for again each time, and mostly not sent again
}


@router.get("/")
def get_page() -> FileResponse:
    return FileResponse(WEB / "index.html", headers=HEADERS)


@router.get("/page.css")
def get_style() -> FileResponse:
    return FileResponse(WEB / "page.css", headers=HEADERS)


@router.get("/page.js")
def get_script() -> FileResponse:
    return FileResponse(WEB / "page.js", headers=HEADERS)
