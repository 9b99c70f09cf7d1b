"""The page in a real Chromium: what somebody does with mouse and keyboard, and what they see then."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
from archived import archived
from conftest import missing
from playwright.sync_api import Browser, Page, expect, sync_playwright
from posting import embed, post, slice_files, tarred
from test_auth import keys_of, serving, settings_of

from models.ct.phantom import Identity
from service.indexing import index_bags
from service.settings import Settings
from service.storage.exports import touch
from service.storage.files import ExportFile
from service.storage.keys import EmbeddingKey
from service.storage.stores import Stores, open_stores

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


@contextmanager
def opened(browser: Browser, address: str, **options) -> Iterator[Page]:
    """An open page that must not have complained when the test ends."""
    complaints: list[str] = []
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 1000}} | options)
    page.set_default_timeout(WAIT_MS)
    page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(f"{address}/")
    yield page
    page.close()
    assert [each for each in complaints if "Failed to load resource" not in each] == []


@pytest.fixture
def page(browser: Browser, service):
    with opened(browser, service.address) as page:
        yield page


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


def cut_off(page: Page) -> list[str]:
    """What is wider than there is room for: the page than the window, a section's content than the section."""
    return page.evaluate("""() => [document.documentElement, ...document.querySelectorAll("section:not([hidden])")]
        .filter((each) => each.scrollWidth > Math.min(each.clientWidth, innerWidth))
        .map((each) => `${each.tagName} ${each.id}: ${each.scrollWidth} px, room for ${each.clientWidth}`)""")


def too_pale(page: Page) -> list[str]:
    """Texts of less contrast to what is behind them than WCAG 2.2 asks for (1.4.3): 4.5, or 3 where they are large.
    Text of disabled controls and over pictures does not count."""
    return page.evaluate("""() => {
        const rgba = (text) => {
            const found = text.match(/[\\d.]+/g).map(Number);
            return [...found.slice(0, 3), found[3] ?? 1];
        };
        const over = (top, under) => [0, 1, 2].map((k) => top[k] * top[3] + under[k] * (1 - top[3])).concat(1);
        const behind = (each) => {
            const layers = [];
            for (let node = each; node; node = node.parentElement)
                layers.push(rgba(getComputedStyle(node).backgroundColor));
            const page = rgba(getComputedStyle(document.body).backgroundColor);
            return layers.reverse().reduce((under, top) => over(top, under), page);
        };
        const luminance = (colour) => colour.slice(0, 3).map((value) => value / 255)
            .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
            .reduce((sum, value, k) => sum + value * [0.2126, 0.7152, 0.0722][k], 0);
        const said = (each) => [...each.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
        const counts = (each) => each.checkVisibility() && !each.disabled && !each.closest("#frame, .unseen");
        return [...document.body.querySelectorAll("*")]
            .filter((each) => said(each) && counts(each))
            .map((each) => {
                const style = getComputedStyle(each), ground = behind(each);
                const colour = over(rgba(each instanceof SVGElement ? style.fill : style.color), ground);
                const [light, dark] = [luminance(colour), luminance(ground)].sort((a, b) => b - a);
                const size = parseFloat(style.fontSize);
                const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
                return [(light + 0.05) / (dark + 0.05), large ? 3 : 4.5, each.textContent.trim().slice(0, 40)];
            })
            .filter(([ratio, wanted]) => ratio < wanted)
            .map(([ratio, wanted, text]) => `${text}: ${ratio.toFixed(2)}, expected ${wanted}`);
    }""")


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
    expect(page.locator("#probabilities")).to_contain_text(re.compile(r"page label0\.\d{3} ± 0\.\d{3}"))
    expect(page.locator("#chart polygon")).to_have_count(2)
    expect(page.get_by_role("link", name="report, DICOM SR")).to_be_visible()
    look(page, "attention")


def test_a_name_is_text_and_never_markup(page, series):
    open_series(page, series[1])
    expect(page.locator("#title")).to_contain_text("<b>PAGE</b>-B")
    assert page.locator("#title b").count() == 0


@pytest.mark.parametrize("width", [1280, 1010, 800, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_or_pale(browser, service, series, width, scheme):
    with opened(browser, service.address, viewport={"width": width, "height": 1000}, color_scheme=scheme) as page:
        expect(page.locator("#rows tr").first).to_be_visible()
        assert (cut_off(page), too_pale(page)) == ([], [])
        look(page, f"list-{scheme}-{width}")

        open_series(page, series[0], slice=2)
        expect(page.locator("#hits button").first).to_be_visible()
        assert (cut_off(page), too_pale(page)) == ([], [])
        look(page, f"{scheme}-{width}")


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


def test_an_export_is_begun_and_told_to_its_end(page, export_root):
    folder = export_root / "page"
    folder.mkdir()
    for name, content in slice_files(Identity("PAGE-EXPORTED"), count=3, seed=730):
        (folder / name).write_bytes(content)
    (folder / "notes.txt").write_text("no DICOM")

    page.locator("#uri").fill("/etc")
    page.get_by_role("button", name="Start").click()
    expect(page.locator("#export-note")).to_contain_text("Not started: the path lies outside the directories")
    page.locator("#uri").fill(str(folder))
    page.keyboard.press("Enter")
    job = page.locator("#job-list > li").filter(has_text=str(folder))

    expect(job).to_contain_text("1 embedded; 4 files, 3 slices embedded")
    expect(job.locator("progress")).to_be_hidden()
    expect(job.get_by_role("link", name="table of its series, CSV")).to_have_attribute("href", re.compile("table.csv"))
    job.get_by_text("1 file not used: 1 not dicom").click()
    expect(job).to_contain_text("notes.txt: not dicom")


@dataclass
class Bench:
    """A service without a worker, and its stores, so that a test says what a worker would have done."""

    address: str
    http: httpx.Client
    stores: Stores
    settings: Settings
    root: Path

    def export(self, *series: str) -> tuple[str, str]:
        """(export id, job id) of one that a worker has scanned."""
        accepted = self.http.post("/v1/exports", json={"uri": str(self.root)}).json()
        export_id = accepted["export_id"]
        assert self.stores.exports.claim(export_id, "me", 15, 3)
        files = [ExportFile(uid.encode(), 1, series_uid=uid) for uid in series]
        self.stores.contents.record(export_id, "me", files)
        return export_id, accepted["job_id"]

    def upload(self, name: str, error: str) -> str:
        """The UID of a series whose embedding failed."""
        uid = post(self.http, slice_files(Identity(name), count=2)).json()["series"][0]["series_uid"]
        key = EmbeddingKey(uid, self.stores.catalog.series(uid).encoder_id)
        self.stores.catalog.fail(key, "failed", error)
        return uid

    def embedded(self, name: str, count: int = 4) -> str:
        """The UID of a series that a worker embedded, as far as pictures and a search go."""
        uid = post(self.http, slice_files(Identity(name), count=count)).json()["series"][0]["series_uid"]
        key, (content, _) = (
            EmbeddingKey(uid, self.stores.catalog.series(uid).encoder_id),
            self.stores.archive.content(uid),
        )
        bag = np.random.default_rng(count).normal(size=(count, 2, 1280)).astype(np.float16)
        sop_uids = [path.stem for path in archived(self.stores, uid)]
        z_mm = [5.0 * k for k in range(count)]
        self.stores.bags.put(key, content, bag, {"windows": ["abdomen", "lung"], "sop_uids": sop_uids, "z_mm": z_mm})
        geometry = {"slices": count, "rows": 32, "columns": 32, "pixel_spacing_mm": [1.0, 1.0], "slice_spacing_mm": 5.0}
        geometry |= {"z_mm": [0.0, z_mm[-1]], "tilt_degrees": 0.0, "kernels": ["STD"]}
        verdict = {"status": "accepted", "findings": [], "set_aside": []}
        self.stores.catalog.commit(key, content, count, verdict, geometry)
        index_bags(self.stores, self.settings, "worker")
        return uid


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "pacs").mkdir()
    settings = Settings(
        data_dir=tmp_path / "data", broker_url="memory://", sweep_seconds=3600, export_roots=str(tmp_path / "pacs")
    )
    with serving(settings, port=0) as server:
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        stores = open_stores(settings)
        with httpx.Client(base_url=address, timeout=60) as http:
            yield Bench(address, http, stores, settings, tmp_path / "pacs")
        stores.close()


def test_a_running_export_shows_how_far_and_how_fast_it_is(browser, bench):
    export_id, job_id = bench.export("1.2.1", "1.2.2", "1.2.3", "1.2.4")
    with opened(browser, bench.address) as page:
        job = page.locator("#job-list > li")
        expect(job).to_contain_text("Reading headers: 4 files")
        expect(job.get_by_role("progressbar")).not_to_have_attribute("value", re.compile(".*"))

        bench.stores.contents.scanned(export_id, "me", dry_run=False)
        expect(job).to_contain_text("Embedding: 0 of 4 series; 4 waiting")
        with bench.stores.database.write() as session:
            touch(session, export_id, "me", done=2)
        expect(job).to_contain_text(re.compile(r"Embedding: 2 of 4 series, [\d.]+/(s|min), about \d+ s left"))
        expect(job.get_by_role("progressbar")).to_have_attribute("value", "2")
        look(page, "jobs-running")
        job.get_by_role("button", name="Cancel").focus()
        page.keyboard.press("Enter")

        expect(job).to_contain_text("4 cancelled")
        expect(job.locator("progress")).to_be_hidden()
        expect(job).to_be_focused()
    assert bench.http.get(f"/v1/jobs/{job_id}").json()["state"] == "cancelled"


def test_what_failed_says_why_and_is_tried_again_by_keyboard(browser, bench):
    uid = bench.upload("PAGE-FAILED", "the decoder <b>gave up</b>")
    with opened(browser, bench.address) as page:
        job = page.locator("#job-list > li")
        expect(job.locator("details li")).to_contain_text("failed: the decoder <b>gave up</b>")
        look(page, "jobs-failed")

        job.get_by_role("button", name="Retry").first.focus()
        page.keyboard.press("Space")

        expect(job).to_contain_text("Waiting for a worker; 1 queued")
        expect(job).to_be_focused()
    assert bench.http.get(f"/v1/series/{uid}").json()["state"] == "queued"


def test_a_failed_export_is_begun_again_and_a_refusal_is_told(browser, bench):
    export_id, _ = bench.export()
    bench.stores.exports.fail(export_id, "me", "the archive is broken or truncated")
    with opened(browser, bench.address) as page:
        job = page.locator("#job-list > li").filter(has_text="the archive is broken or truncated")
        expect(job).to_have_count(1)
        bench.root.rename(bench.root.with_name("away"))
        job.get_by_role("button", name="Retry").click()
        gone = page.locator("#job-list > li").filter(has_text="there is nothing at this path")
        expect(gone).to_have_count(1)
        bench.root.with_name("away").rename(bench.root)

        gone.get_by_role("button", name="Retry").click()

        expect(page.locator("#job-list > li")).to_have_count(2)
        expect(page.locator("#job-list > li").first).to_contain_text("Waiting for a worker")


def test_older_jobs_are_a_page_further(browser, bench):
    for number in range(8):
        bench.upload(f"PAGE-OLD-{number}", f"reason {number}")
    with opened(browser, bench.address) as page:
        expect(page.locator("#job-list > li")).to_have_count(6)
        page.get_by_role("button", name="Older", exact=True).click()
        expect(page.locator("#job-list > li")).to_have_count(2)
        expect(page.locator("#job-list")).to_contain_text("reason 0")
        page.locator("#job-kind").select_option("train")
        expect(page.locator("#jobs-note")).to_contain_text("Nothing was asked for yet")
        expect(page.locator("#job-list > li")).to_have_count(0)


@pytest.mark.parametrize("width", [1280, 800, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_of_the_jobs_is_cut_off(browser, bench, width, scheme):
    bench.upload("PAGE-FAILED", "given up after 3 attempts: " + "a-reason-without-a-blank-" * 12)
    _, head_id = bench.stores.heads.add("toy@0", ["mass"], {}, {}, "lungs")
    bench.stores.heads.fail(head_id, "2 patients of a class, expected 5")
    export_id, _ = bench.export("1.2.1", "1.2.2")
    bench.stores.contents.scanned(export_id, "me", dry_run=False)
    with opened(browser, bench.address, viewport={"width": width, "height": 900}, color_scheme=scheme) as page:
        expect(page.locator("#job-list > li")).to_have_count(3)
        expect(page.locator("#job-list details li")).to_have_count(1)
        page.locator("#uri").fill("dicomweb+https://pacs.example/dicom-web")
        expect(page.locator("#query-from")).to_be_visible()

        assert cut_off(page) == []
        look(page, f"jobs-{scheme}-{width}")


def test_the_cohort_is_searched_and_a_series_opened_by_keyboard(browser, bench):
    for name in ("PAGE-SEARCHED", "PAGE-OTHER"):
        uid = bench.embedded(name)
        bench.stores.tags.put(uid, [f"tag of {name}"])
    bench.upload("PAGE-BROKEN", "the decoder gave up")
    with opened(browser, bench.address) as page:
        expect(page.locator("#rows tr")).to_have_count(3)
        page.locator("#text").focus()
        page.keyboard.type("TAG searched")
        expect(page.locator("#rows tr")).to_have_count(1)
        page.locator("#verdict").select_option("rejected")
        expect(page.locator("#cohort-note")).to_contain_text("No series like that")
        page.locator("#verdict").select_option("accepted")
        page.locator("#from").fill("2999-01-01")
        expect(page.locator("#cohort")).to_be_hidden()
        page.locator("#from").fill("")
        page.get_by_role("link", name="PAGE-SEARCHED").focus()
        page.keyboard.press("Enter")
        expect(page.locator("#slider")).to_be_focused()
        page.keyboard.press("Home")

        page.keyboard.press("ArrowRight")

        expect(page.locator("#position")).to_contain_text("Slice 1 (0 to 3)")
        expect(page.locator("#image")).to_have_attribute("data-path", re.compile(r"/slices/1/image"))
        expect(page.locator("#hits-note")).to_contain_text("index exact")
        look(page, "cohort-search")
        page.locator("#hits button").first.click()
        expect(page.locator("#title")).to_contain_text("PAGE-OTHER")


def test_a_failed_series_is_tried_again_from_the_cohort(browser, bench):
    bench.upload("PAGE-BROKEN", "the decoder gave up")
    with opened(browser, bench.address) as page:
        page.locator("#rows").get_by_role("button", name="Retry").click()

        expect(page.locator("#rows")).to_contain_text("queued")
        assert "series=" not in page.url
