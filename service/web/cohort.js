// Cohort: the table of series.

import { $, count, el, enc, imagePath, named, number, say, short, words } from "./elements.js";
import { get, show } from "./calls.js";
import { here } from "./viewer.js";

const PAGE_SIZE = 10, POLL_MS = 3000;
export const OPEN = ["received", "queued", "embedding", "embedded"]; // states that will still change

const cursors = [""]; // one per page up to the shown one
let nextCursor = null, unsettled = false;

function plain(found) {
  if (Array.isArray(found)) return found.map(plain).join("; ");
  return found && typeof found === "object" ? Object.entries(found).map(([name, value]) => `${words(name)} ${plain(value)}`).join(", ") : String(found);
}
export const findings = (verdict) => (verdict?.findings || []).map(({ code, found }) => [words(code), plain(found)].filter(Boolean).join(": "));
export const spacing = ({ slice_spacing_mm, pixel_spacing_mm }) => [slice_spacing_mm, ...(pixel_spacing_mm || [null, null])].map((mm) => number(mm, 2)).join(" × ");

function rowOf({ series_uid, patient_id, geometry, received, state, error, verdict, embeddings }) {
  const link = el("a", { href: `#series=${enc(series_uid)}`, title: series_uid }, named(patient_id));
  const running = embeddings.find((each) => each.state === "embedding");
  const kind = { accepted: "good", accepted_with_warnings: "warn", rejected: "bad" }[verdict?.status] || "";
  const notes = (lines, kind) => lines.map((line) => el("div", { className: `${kind} small break` }, line));
  const middle = imagePath(series_uid, Math.floor((geometry?.slices ?? 0) / 2), "abdomen");
  const embedded = embeddings.some((each) => each.embedded_at), picture = embedded ? el("img", { alt: "" }) : "";
  if (embedded) show(picture, middle).catch(() => {}); // it is shown without
  const row = el("tr", { onclick: (event) => { if (event.target !== link) link.click(); } }, el("td", {}, picture),
    el("td", { className: "break" }, link, " ", el("span", { className: "muted small number" }, short(series_uid))),
    el("td", { className: "number" }, String(geometry?.slices ?? received)),
    el("td", { className: "number" }, geometry ? spacing(geometry) : ""),
    el("td", {}, running ? `embedding, ${running.done} of ${running.slices ?? received}` : state, ...again(series_uid, state),
      ...notes(error ? [error] : [], "bad")),
    el("td", {}, el("span", { className: kind }, words(verdict?.status || "")), ...notes(findings(verdict), "muted")));
  row.dataset.series = series_uid;
  return row;
}

function again(uid, state) { // a button where it failed
  if (state !== "failed") return [];
  const button = el("button", { className: "small", ariaLabel: `Retry ${short(uid)}`, onclick: async (event) => {
    event.stopPropagation(); // the row's own click opens the series
    await get(`/v1/series/${enc(uid)}/retry`, { method: "POST" }).then(loadCohort, ({ message }) => say("cohort-note", message, "bad"));
  } }, "Retry");
  return [" ", button];
}

export function markRow() { for (const row of $("rows").children) row.toggleAttribute("aria-current", row.dataset.series === here.series); }

function filters() { // as the API names them, those that are set
  const value = (id) => $(id).value.trim();
  const asked = { text: value("text"), patient_id: value("patient"), state: value("state"), verdict: value("verdict"), date_from: value("from"), date_to: value("to") };
  return Object.fromEntries(Object.entries(asked).filter(([, each]) => each));
}

export async function loadCohort() {
  const cursor = cursors.at(-1);
  try {
    const asked = filters(), query = new URLSearchParams({ limit: PAGE_SIZE, ...(cursor && { cursor }), ...asked });
    const { series, next_cursor } = await get(`/v1/series?${query}`);
    if (cursor !== cursors.at(-1) || JSON.stringify(asked) !== JSON.stringify(filters())) return;
    const focused = document.activeElement.closest("#rows tr")?.dataset.series;
    $("rows").replaceChildren(...series.map(rowOf));
    [...$("rows").children].find((row) => row.dataset.series === focused)?.querySelector("a").focus();
    nextCursor = next_cursor;
    unsettled = series.some((each) => OPEN.includes(each.state));
    const none = Object.keys(asked).length ? "No series like that." : "No series yet: upload some to begin.";
    say("cohort-note", series.length ? "" : none);
    $("cohort").hidden = !series.length;
    $("paging").hidden = cursors.length === 1 && !nextCursor;
    $("page").textContent = `page ${cursors.length}`;
  } catch (error) { say("cohort-note", error.message, "bad"); }
  $("previous").disabled = cursors.length === 1;
  $("next").disabled = !nextCursor;
  markRow();
}

$("state").append(...[...OPEN, "indexed", "rejected", "failed"].map((name) => el("option", { value: name }, name)));
for (const name of ["accepted", "accepted_with_warnings", "rejected"]) $("verdict").append(el("option", { value: name }, words(name)));
let typing = 0;
$("filter").oninput = () => { // at most some questions a second, however quickly somebody types
  clearTimeout(typing);
  typing = setTimeout(() => { cursors.splice(1); loadCohort(); }, 150);
};
$("filter").onsubmit = (event) => event.preventDefault();
$("next").onclick = () => { cursors.push(nextCursor); loadCohort(); };
$("previous").onclick = () => { cursors.pop(); loadCohort(); };
setInterval(() => { if (unsettled && !document.hidden) loadCohort(); }, POLL_MS);
