"""The web page, in a few files."""

from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).resolve().parent.parent / "web"
PARTS = ("elements", "calls", "uploads", "cohort", "jobs", "viewer")  # ES modules that page.js puts together
FILES = ("page.css", "page.js", *(f"{part}.js" for part in PARTS))

# Nothing from elsewhere, no script in the markup: what a patient's name might hold is never run.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "Cache-Control": "no-cache",  # asked for again each time, and mostly not sent again
}


@router.get("/")
def get_page() -> FileResponse:
    return FileResponse(WEB / "index.html", headers=HEADERS)


def _serve(name: str) -> None:
    @router.get(f"/{name}")
    def get_file() -> FileResponse:
        return FileResponse(WEB / name, headers=HEADERS)


for name in FILES:
    _serve(name)
