"""The page in a real Chromium: what somebody does with mouse and keyboard, and what they see then."""

import os
import re
import shutil
from pathlib import Path

import pytest
from conftest import missing
from playwright.sync_api import Browser, Page, expect, sync_playwright
from posting import embed, slice_files, tarred
from test_auth import keys_of, serving, settings_of

from models.ct.phantom import Identity

WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)
SCREENSHOTS = os.environ.get("KEYSLICE_SCREENSHOTS")  # a folder; what the page looks like is for people to judge


@pytest.fixture(scope="module")
def browser():
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        missing("no Chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser, service):
    """An open page that must not have complained when the test ends."""
    complaints: list[str] = []
    opened = browser.new_page(viewport={"width": 1280, "height": 1000})
    opened.set_default_timeout(WAIT_MS)
    opened.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.goto(f"{service.address}/")
    yield opened
    opened.close()
    assert [each for each in complaints if "Failed to load resource" not in each] == []


@pytest.fixture(scope="module")
def series(http):
    """Two patients' series of six slices, the first with a name that would be a script elsewhere."""
    for number, name in enumerate(("PAGE-A", "<b>PAGE</b>-B")):
        embed(http, slice_files(Identity(name), count=6, size=64, seed=700 + number))
    return [Identity(name).series_uid for name in ("PAGE-A", "<b>PAGE</b>-B")]


def open_series(page: Page, uid: str, **chosen: object) -> None:
    page.goto(page.url.partition("#")[0] + "#" + "&".join(f"{k}={v}" for k, v in {"series": uid, **chosen}.items()))
    expect(page.locator("#image")).to_be_visible()


def look(page: Page, name: str) -> None:
    if SCREENSHOTS:
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def test_from_an_upload_to_a_similar_slice_by_mouse(page, series):
    name = "PAGE-UPLOADED"
    archive = tarred(slice_files(Identity(name), count=6, size=64, seed=703))

    page.locator("#files").set_input_files({"name": "s.tar", "mimeType": "application/x-tar", "buffer": archive})
    expect(page.locator("#upload-result")).to_contain_text("1 series ready.")
    page.locator("#patient").fill(name)
    page.get_by_role("link", name=name).click()
    expect(page.locator("#title")).to_contain_text(name)
    expect(page.locator("#hits-note")).to_contain_text("index ")
    page.locator("#hits button").first.click()

    expect(page.locator("#title")).not_to_contain_text(name)
    assert re.search(r"slice=\d", page.url)


def test_by_keyboard_alone(page, series):
    page.locator("#patient").focus()
    page.keyboard.type("PAGE-A")
    expect(page.locator("#rows tr")).to_have_count(1)
    page.locator("#rows a").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#slider")).to_be_focused()
    page.keyboard.press("Home")  # which slice is shown first depends on the heads there are
    expect(page.locator("#position")).to_contain_text("Slice 0 (0 to 5)")

    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")

    expect(page.locator("#position")).to_contain_text("Slice 2 (0 to 5)")
    expect(page.locator("#image")).to_have_attribute("data-path", re.compile(r"/slices/2/image"))
    look(page, "series")


def test_window_and_level_are_those_asked_for(page, series):
    open_series(page, series[0], slice=2)

    page.locator("#preset").select_option("bone")
    expect(page.locator("#image")).to_have_attribute("data-path", re.compile("low=-500&high=1300"))
    page.locator("#level").fill("40")
    page.locator("#width").fill("400")
    expect(page.locator("#image")).to_have_attribute("data-path", re.compile("low=-160&high=240"))
    box = page.locator("#frame").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 140, box["y"] + 100)
    page.mouse.up()

    expect(page.locator("#preset")).to_have_value("free")
    assert int(page.locator("#width").input_value()) > 400
    page.locator("#frame").dblclick()
    expect(page.locator("#image")).to_have_attribute("data-path", re.compile("window="))


def test_the_wheel_scrolls_through_the_slices(page, series):
    open_series(page, series[0], slice=2)
    page.locator("#frame").hover()
    page.mouse.wheel(0, -40)
    expect(page.locator("#position")).to_contain_text("Slice 3")


def test_an_error_is_shown_beside_the_file_it_concerns(page):
    page.locator("#files").set_input_files({"name": "letter.txt", "mimeType": "text/plain", "buffer": b"no DICOM"})
    expect(page.locator("#upload-result")).to_contain_text("Not taken")
    expect(page.locator("#upload-result")).to_contain_text("letter.txt")
    page.locator("#files").set_input_files({"name": "x.csv", "mimeType": "text/csv", "buffer": b"patient_id,mass\n"})
    expect(page.locator("#upload-result")).to_contain_text("Not trained")


def test_a_head_trained_from_a_dropped_table_explains_the_series(page, http, series):
    names = [f"PAGE-TRAIN-{number}" for number in range(8)]
    for number, name in enumerate(names):
        embed(http, slice_files(Identity(name), count=3, seed=710 + number))
    table = "patient_id,page label\n" + "".join(f"{name},{number % 2}\n" for number, name in enumerate(names))

    page.locator("#files").set_input_files({"name": "labels.csv", "mimeType": "text/csv", "buffer": table.encode()})
    expect(page.get_by_role("link", name="its report")).to_be_visible(timeout=2 * WAIT_MS)
    open_series(page, series[0])

    expect(page.locator("#chart polyline")).to_have_count(2)
    expect(page.locator("#probabilities")).to_contain_text("page label")
    expect(page.get_by_role("link", name="report, DICOM SR")).to_be_visible()
    look(page, "attention")


def test_a_name_is_text_and_never_markup(page, series):
    open_series(page, series[1])
    expect(page.locator("#title")).to_contain_text("<b>PAGE</b>-B")
    assert page.locator("#title b").count() == 0


@pytest.mark.parametrize("width", [1280, 800])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off(browser, service, series, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    page.goto(f"{service.address}/#series={series[0]}&slice=2")
    expect(page.locator("#image")).to_be_visible(timeout=WAIT_MS)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    look(page, f"{scheme}-{width}")
    page.close()


def test_a_service_with_keys_is_asked_with_the_one_that_was_typed(browser, tmp_path):
    settings = settings_of(tmp_path)
    _, key = keys_of(settings).create("page", ["read"], None)
    with serving(settings, port=0) as server:
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/")
        for typed, said in (("ks_wrong", "what came is no API key"), (key, None)):
            page.get_by_label("API key").fill(typed)
            page.get_by_role("button", name="Use").click()
            if said:
                expect(page.locator("#login-note")).to_contain_text(said)
        expect(page.locator("#cohort-note")).to_contain_text("No series yet")

        expect(page.locator("#login")).to_be_hidden()
        assert page.evaluate("localStorage.length") == 0
        assert key not in page.url + page.content()
        page.close()
