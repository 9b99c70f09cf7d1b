// Jobs and exports: how far each is, what failed of it and why, and how to stop it or try it again.

import { $, count, el, enc, say, short, words } from "./elements.js";
import { get } from "./calls.js";
import { loadCohort } from "./cohort.js";

const PAGE_SIZE = 6, UNFINISHED = 20, LISTED = 50, BUSY_MS = 1000, IDLE_MS = 5000, DETAIL_MS = 10000, PACE_MS = 120000;
const KINDS = { embed: "Upload", train: "Training", export: "Export" };
const DOING = { slices: "Embedding", epochs: "Training", files: "Reading headers", series: "Embedding" };
const ENDED = ["done", "failed", "cancelled"];
const TROUBLE = ["failed", "rejected"]; // states of series that have a reason
const POST = { method: "POST" };
const many = (n) => n.toLocaleString("en");
const sum = (numbers) => Object.values(numbers).reduce((total, each) => total + each, 0);
const told = (numbers) => Object.entries(numbers).map(([name, n]) => `${many(n)} ${words(name)}`).join(", ");

// The list

const cursors = [""]; // one per page up to the shown one
const shown = new Map(); // by job id: its element, the parts of it, and the job as it was last
let nextCursor = null, timer = 0, turn = 0;

export async function loadJobs() {
  clearTimeout(timer);
  if (document.hidden) return; // once it is looked at again
  const mine = ++turn, cursor = cursors.at(-1), kind = $("job-kind").value;
  const asked = (more) => get(`/v1/jobs?${new URLSearchParams(Object.entries({ kind, ...more }).filter(([, value]) => value))}`);
  let wait = IDLE_MS;
  try {
    const [page, open] = await Promise.all([asked({ cursor, limit: PAGE_SIZE }),
      cursor ? { jobs: [] } : asked({ unfinished: true, limit: UNFINISHED })]); // however old they are
    if (mine !== turn) return;
    const here = new Set(open.jobs.map((job) => job.job_id));
    showJobs([...open.jobs, ...page.jobs.filter((job) => !here.has(job.job_id))]);
    nextCursor = page.next_cursor;
    if (open.jobs.length) wait = BUSY_MS;
  } catch (error) {
    if (mine !== turn) return;
    say("jobs-note", error.message, "bad");
    if (error.status === 401) return; // a key is typed first
  }
  $("job-paging").hidden = cursors.length === 1 && !nextCursor;
  $("newer").disabled = cursors.length === 1;
  $("older").disabled = !nextCursor;
  timer = setTimeout(loadJobs, wait);
}

function showJobs(jobs) {
  say("jobs-note", jobs.length ? "" : "Nothing was asked for yet.");
  for (const id of shown.keys()) if (!jobs.some((job) => job.job_id === id)) shown.delete(id);
  const items = jobs.map((job) => {
    if (!shown.has(job.job_id)) shown.set(job.job_id, newItem(job));
    const item = shown.get(job.job_id), before = item.job;
    item.job = job;
    update(item);
    if (before && !ENDED.includes(before.state) && ENDED.includes(job.state)) ended(job);
    return item.node;
  });
  const list = $("job-list"), focused = document.activeElement;
  if (items.length === list.children.length && items.every((each, i) => each === list.children[i])) return;
  list.replaceChildren(...items);
  if (list.contains(focused)) focused.focus({ preventScroll: true });
}

function ended({ kind, state, states }) {
  $("jobs-said").textContent = `${KINDS[kind]} ${state}${states.failed ? `, ${count(states.failed, "series")} failed` : ""}.`;
  if (kind !== "train") loadCohort();
}

$("newer").onclick = () => { cursors.pop(); loadJobs(); };
$("older").onclick = () => { cursors.push(nextCursor); loadJobs(); };
$("job-kind").onchange = () => { cursors.splice(1); loadJobs(); };
document.addEventListener("visibilitychange", loadJobs);

// One of them

function newItem({ job_id, kind, name, created_at, export_id, head_id }) {
  const text = `job-${job_id}`, item = { samples: [], toldAt: 0, told: "", contents: "" };
  item.state = el("strong");
  item.times = el("span", { className: "muted small number" });
  item.cancel = el("button", { onclick: () => act(item, () => get(`/v1/jobs/${enc(job_id)}/cancel`, POST)) }, "Cancel");
  item.retry = el("button", { onclick: () => act(item, () => retry(item.job)) }, "Retry");
  item.text = el("p", { id: text, className: "small break" });
  item.bar = el("progress");
  item.bar.setAttribute("aria-labelledby", text);
  item.links = el("p", { className: "row small" }, ...linksOf(kind, export_id, head_id));
  item.error = el("p", { className: "bad small break", hidden: true });
  item.list = el("ul", { className: "small break" });
  item.summary = el("summary");
  item.details = el("details", { className: "small", hidden: true, ontoggle: () => detail(item, true) }, item.summary, item.list);
  item.files = el("details", { className: "small", hidden: true, ontoggle: () => item.files.open && listFiles(item) }, el("summary"), el("ul", { className: "break" }));
  item.node = el("li", { tabIndex: -1 }, el("p", { className: "row" }, el("span", { className: "grow break" }, el("strong", {}, KINDS[kind]),
    " ", name || "", " ", el("span", { className: "muted small number" }, when(created_at))), item.times, item.state, item.cancel, item.retry),
  item.text, item.bar, item.links, item.error, item.details, item.files);
  return item;
}

function linksOf(kind, exportId, headId) {
  const of = `/v1/${kind === "export" ? `exports/${enc(exportId)}` : `heads/${enc(headId)}`}`;
  const links = { embed: [], export: [["table of its series, CSV", "/table.csv"]], train: [["report", "/report"], ["model card", "/card"]] };
  return links[kind].map(([text, path]) => el("a", { href: of + path, ...(kind === "export" ? { download: `export-${exportId}.csv` } : {}) }, text));
}

function update(item) {
  const { job } = item, { state, kind, states, done, known, unit } = job, over = ENDED.includes(state), failed = states.failed || 0;
  item.state.textContent = state === "done" && failed ? "done, not whole" : state;
  item.state.className = { done: failed ? "warn" : "good", failed: "bad" }[state] || "muted";
  item.times.textContent = over ? `took ${lasting(new Date(job.ended_at) - new Date(job.created_at))}` : "";
  const held = document.activeElement;
  item.cancel.hidden = over;
  item.retry.textContent = kind === "embed" && failed > 1 ? "Retry all" : "Retry";
  item.retry.hidden = !(kind === "export" && over && (failed || state !== "done")) && !(kind === "embed" && failed);
  if (held.hidden && item.node.contains(held)) item.node.focus({ preventScroll: true });
  item.bar.hidden = over || state === "waiting";
  if (known) Object.assign(item.bar, { max: known, value: done }); else item.bar.removeAttribute("value");
  const of = known ? `${many(done)} of ${many(known)} ${unit}` : `${many(done)} ${unit}`;
  const running = state === "waiting" ? "Waiting for a worker" : `${DOING[unit]}: ${of}${pace(item)}`;
  item.text.textContent = over ? result(item) : [running, told(states)].filter(Boolean).join("; ");
  item.links.hidden = kind === "train" ? state !== "done" : !item.links.children.length || !sum(states);
  if (!item.refused) tell(item, job.error || "");
  detail(item, false);
}

function result({ job: { kind, states, done, known, unit }, contents }) {
  if (kind === "train") return known ? `${many(done)} of ${many(known)} ${unit}` : "";
  return (told(states) || "no series") + contents;
}

function tell(item, text) {
  item.error.hidden = !text;
  if (item.error.textContent !== text) item.error.textContent = text;
}

// Pace: what was done in the last two minutes that this page has seen

function pace(item) {
  const { done, known, unit } = item.job, { samples } = item, at = performance.now();
  if (samples.length && (samples[0].unit !== unit || samples.at(-1).done > done)) samples.length = 0;
  samples.push({ at, done, unit });
  while (at - samples[0].at > PACE_MS) samples.shift();
  const perSecond = (1000 * (done - samples[0].done)) / (at - samples[0].at);
  if (!(perSecond > 0)) return "";
  const [rate, per] = perSecond >= 1 ? [perSecond, "s"] : perSecond >= 1 / 60 ? [60 * perSecond, "min"] : [3600 * perSecond, "h"];
  return `, ${rate.toPrecision(2) >= 100 ? Math.round(rate) : Number(rate.toPrecision(2))}/${per}`
    + (known > done ? `, about ${lasting((1000 * (known - done)) / perSecond)} left` : "");
}

function lasting(ms) {
  const seconds = Math.max(1, Math.round(ms / 1000));
  if (seconds < 100) return `${seconds} s`;
  return seconds < 6000 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 360) / 10} h`;
}

function when(time) {
  const at = new Date(time), two = (n) => String(n).padStart(2, "0"), clock = `${two(at.getHours())}:${two(at.getMinutes())}`;
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return at.toDateString() === new Date().toDateString() ? clock : `${day} ${clock}`;
}

// What became of its series: asked for when it has ended, and now and then where somebody looks

async function detail(item, looked) {
  const { job, details } = item, over = ENDED.includes(job.state), bad = sum(troubles(job));
  details.hidden = job.kind === "embed" ? !sum(job.states) : !bad;
  if (job.kind === "embed") item.summary.textContent = count(sum(job.states), "series");
  if (job.kind === "train" || !(details.open || over) || (job.kind === "embed" && !bad && !details.open)) return;
  const now = JSON.stringify([job.state, job.states]), late = performance.now() - item.toldAt > DETAIL_MS;
  if (item.told === now || !(looked || over || late)) return;
  Object.assign(item, { told: now, toldAt: performance.now() });
  const rows = await (job.kind === "embed" ? ofUpload(item) : ofExport(item)).catch((error) => tell(item, error.message));
  if (!rows) return;
  const lines = rows.slice(0, LISTED).map((row) => lineOf(item, row));
  const total = sum(job.kind === "embed" ? job.states : troubles(job));
  if (total > lines.length) lines.push(el("li", {}, `and ${many(total - lines.length)} more`));
  item.list.replaceChildren(...lines);
  if (over && !looked && bad && bad <= 5) details.open = true;
}

const troubles = ({ states }) => Object.fromEntries(TROUBLE.map((state) => [state, states[state] || 0]));

async function ofUpload({ job }) {
  const { series } = await get(job.subject), wrong = (row) => TROUBLE.includes(row.state);
  return [...series.filter(wrong), ...series.filter((row) => !wrong(row))];
}

async function ofExport(item) {
  const { job, files, summary } = item, wanted = TROUBLE.filter((state) => job.states[state]);
  const pages = await Promise.all((wanted.length ? wanted : ["failed"]).map((state) => get(`${job.subject}?state=${state}&limit=${LISTED}`)));
  const aside = pages[0].set_aside;
  summary.textContent = `${count(sum(troubles(job)), "series")} not embedded`;
  files.hidden = !sum(aside);
  files.firstChild.textContent = `${count(sum(aside), "file")} not used: ${told(aside)}`;
  item.contents = `; ${many(pages[0].files)} files, ${many(pages[0].slices)} slices embedded`;
  if (ENDED.includes(job.state)) item.text.textContent = result(item);
  return pages.flatMap((page) => page.series);
}

function lineOf(item, { series_uid, state, error }) {
  const again = el("button", { ariaLabel: `Retry ${short(series_uid)}`, onclick: () => act(item, () => get(`/v1/series/${enc(series_uid)}/retry`, POST)) }, "Retry");
  return el("li", {}, el("a", { href: `#series=${enc(series_uid)}`, title: series_uid }, short(series_uid)), ` ${state}`,
    ...(error ? [": ", el("span", { className: "bad" }, error)] : []), ...(state === "failed" && item.retry.textContent !== "Retry" ? [" ", again] : [])); // one alone has it above
}

async function listFiles(item) {
  const { job, files } = item;
  try {
    const { files: some, next_cursor } = await get(`${job.subject}/files?limit=${LISTED}`);
    const lines = some.map(({ file, reason, detail }) => el("li", {}, `${file}: ${words(reason)} (${detail})`));
    if (next_cursor) lines.push(el("li", {}, "and more: ", el("a", { href: `${job.subject}/files?limit=1000` }, "the first thousand, JSON")));
    files.lastChild.replaceChildren(...lines);
  } catch ({ message }) { tell(item, message); }
}

// Stop, try again, begin

async function act(item, asked) {
  item.refused = false;
  try { await asked(); tell(item, ""); } catch ({ message }) {
    item.refused = true;
    $("jobs-said").textContent = message;
    tell(item, message);
  }
  loadJobs();
}

async function retry({ kind, subject }) {
  if (kind === "export") return get(`${subject}/retry`, POST);
  for (const { series_uid, state } of (await get(subject)).series)
    if (state === "failed") await get(`/v1/series/${enc(series_uid)}/retry`, POST);
}

$("uri").oninput = () => { $("query").hidden = !$("uri").value.trim().startsWith("dicomweb+"); };
$("export").onsubmit = async (event) => {
  event.preventDefault();
  const date = (id) => $(id).value.replaceAll("-", "");
  const asked = { patient_id: $("query-patient").value.trim(), date_from: date("query-from"), date_to: date("query-to") };
  const query = $("query").hidden ? null : Object.fromEntries(Object.entries(asked).filter(([, value]) => value));
  const body = JSON.stringify({ uri: $("uri").value.trim(), dry_run: $("dry-run").checked, query });
  say("export-note", "");
  try {
    const { resumed } = await get("/v1/exports", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    say("export-note", resumed ? "It goes on where it was." : "It begins; below is how far it is.");
    $("uri").value = "";
    $("uri").oninput();
    cursors.splice(1);
  } catch (error) { say("export-note", `Not started: ${error.message}`, "bad"); }
  loadJobs();
};
