"use strict";
const PAGE_SIZE = 10, SIMILAR = 6, POLL_MS = 3000, WATCH_MS = 1000, LISTED = 50;
const OPEN = ["received", "queued", "embedding", "embedded"]; // states that will still change
// What is chosen; the address says the same. `hu` is "low,high" where the picture is not shown at the window.
const here = { series: "", slice: null, window: "", hu: "", head: "", others: true };
// Level and width in HU, as radiologists have them at hand beside the encoder's own windows.
const PRESETS = { mediastinum: [50, 350], "soft tissue": [40, 400], liver: [80, 150], bone: [400, 1800], brain: [40, 80], angiogram: [300, 600] };
const $ = (id) => document.getElementById(id);
const enc = encodeURIComponent;
const words = (name) => name.replaceAll("_", " ");
const short = (uid) => (uid.length > 12 ? "…" + uid.slice(-8) : uid);
const number = (value, digits) => (value == null ? "?" : String(Number(value.toFixed(digits))));
const count = (n, noun) => `${n} ${noun}${n === 1 || noun === "series" ? "" : "s"}`;
const named = (patientId) => patientId || "(no patient id)";
const imagePath = (uid, slice, window, hu = "") => `/v1/series/${enc(uid)}/slices/${slice}/image?`
  + (hu ? new URLSearchParams({ low: hu.split(",")[0], high: hu.split(",")[1] }) : `window=${enc(window)}`);

function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function say(id, text, kind = "muted") {
  $(id).textContent = text;
  $(id).hidden = !text;
  for (const each of ["muted", "bad"]) $(id).classList.toggle(each, each === kind);
}

function problem(body, status) { // RFC 9457, or what a proxy in between makes of it
  try { return { detail: `status ${status}`, ...JSON.parse(body) }; } catch { return { detail: `the service answered with status ${status}` }; }
}

// The key, where the service asks for one: kept until the tab is closed

const key = () => sessionStorage.getItem("keyslice_key") || "";
const withKey = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

function askKey(detail) {
  $("login").hidden = false;
  say("login-note", key() ? detail : "This service asks for one.", key() ? "bad" : "muted");
}

$("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("keyslice_key", $("key").value.trim());
  location.reload();
};

async function ask(path, { headers, ...options } = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers, ...withKey() } })
    .catch(() => { throw Object.assign(new Error("The service does not answer."), { silent: true }); });
  if (answer.ok) return answer;
  const { detail } = problem(await answer.text(), answer.status);
  if (answer.status === 401) askKey(detail);
  throw new Error(detail);
}

const get = async (path, options) => (await ask(path, options)).json();

async function show(image, path) { // the address itself in <img> would be asked for without the key
  const url = URL.createObjectURL(await (await ask(path)).blob());
  Object.assign(image, { src: url }).dataset.path = path;
  await image.decode().catch(() => { throw new Error("not a picture"); }).finally(() => URL.revokeObjectURL(url));
}

document.addEventListener("click", async (event) => { // nor does a link send the key: what it leads to is saved
  const link = event.target.closest('a[href^="/v1/"]');
  if (!link || !key()) return;
  event.preventDefault();
  const saved = await ask(link.getAttribute("href")).catch((error) => { result(error.message, "bad"); });
  if (!saved) return;
  const named = /filename="([^"]+)"/.exec(saved.headers.get("Content-Disposition"))?.[1];
  const suffix = { "text/html": ".html", "text/markdown": ".md" }[saved.headers.get("Content-Type").split(";")[0]] || "";
  const url = URL.createObjectURL(await saved.blob());
  el("a", { href: url, download: link.download || named || link.pathname.split("/").at(-1) + suffix }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});

// Upload

async function filesOf(entry) { // a dropped folder has no files of its own, they must be walked to
  if (entry.isFile) return [await new Promise((done, failed) => entry.file(done, failed))];
  const reader = entry.createReader(), found = [];
  for (;;) {
    const some = await new Promise((done, failed) => reader.readEntries(done, failed)); // at most 100 at a time
    if (!some.length) return found;
    for (const each of some) found.push(...(await filesOf(each)));
  }
}

function progress(text, done, known) {
  $("progress").hidden = !text;
  $("progress-text").textContent = text;
  if (known) Object.assign($("bar"), { max: known, value: done }); else $("bar").removeAttribute("value");
}

function result(text, kind = "") { $("upload-result").append(el("p", { className: kind }, text)); }

function listed(title, lines) {
  if (!lines.length) return;
  const items = lines.slice(0, LISTED).map((line) => el("li", {}, line));
  if (lines.length > LISTED) items.push(el("li", {}, `and ${lines.length - LISTED} more`));
  $("upload-result").append(el("details", { open: lines.length <= 5 }, el("summary", {}, title), el("ul", {}, ...items)));
}

const listAside = (files) => listed(`${count(files.length, "file")} set aside`,
  files.map(({ file, reason, detail }) => `${file}: ${words(reason)} (${detail})`));

function upload(files) {
  if (!files.length || $("files").disabled) return;
  if (files.length === 1 && /\.csv$/i.test(files[0].name)) return train(files[0]);
  const body = new FormData(), request = new XMLHttpRequest(), mb = (bytes) => (bytes / 1e6).toFixed(1);
  for (const file of files) body.append("files", file, file.name);
  const end = (...said) => {
    progress("");
    Object.assign($("files"), { disabled: false, value: "" });
    if (said.length) result(...said);
  };
  $("upload-result").replaceChildren();
  $("files").disabled = true;
  progress("Sending", 0, 1);
  request.upload.onprogress = (sent) => progress(`Sending: ${mb(sent.loaded)} of ${mb(sent.total)} MB`, sent.loaded, sent.total);
  request.upload.onload = () => progress("Sent; the service is sorting the files into series");
  request.onerror = () => end("The connection broke before the service answered.", "bad");
  request.onload = () => {
    if (request.status === 202) { end(); return taken(JSON.parse(request.responseText)); }
    const { detail, set_aside } = problem(request.responseText, request.status);
    if (request.status === 401) askKey(detail);
    end(`Not taken: ${detail}`, "bad");
    listAside(set_aside || []);
  };
  request.open("POST", "/v1/series");
  for (const [name, value] of Object.entries(withKey())) request.setRequestHeader(name, value);
  request.send(body);
}

async function train(table) {
  const body = new FormData();
  body.append("labels", table, table.name);
  $("upload-result").replaceChildren();
  try {
    const { job_id, head_id } = await get("/v1/heads", { method: "POST", body });
    result(`Head ${head_id} is being trained.`);
    watch(job_id);
  } catch (error) { result(`Not trained: ${error.message}`, "bad"); }
}

function trained({ state, head_id, error }) {
  if (state !== "done") return result(`Head ${head_id} ${state}: ${error || "no reason given"}`, "bad");
  $("upload-result").append(el("p", { className: "good" }, `Head ${head_id} is ready: `,
    el("a", { href: `/v1/heads/${enc(head_id)}/report` }, "its report")));
  if (shown) { encoder = null; openSeries(); } // its heads are one more
}

function taken({ job_id, series, set_aside }) {
  const sum = (key) => series.reduce((total, each) => total + each[key], 0);
  const again = sum("duplicates") ? `, ${sum("duplicates")} here already` : "";
  if (series.length) result(`${count(series.length, "series")}: ${count(sum("received"), "new slice")}${again}.`);
  else result("No usable CT series in the upload.", "bad");
  listAside([...set_aside, ...series.flatMap((each) => each.set_aside)]);
  if (series.length) watch(job_id);
  loadCohort();
}

async function watch(jobId) { // asked for again and again: an EventSource sends no key
  const job = await get(`/v1/jobs/${enc(jobId)}`).catch((error) => error);
  if (job.silent) return setTimeout(watch, WATCH_MS, jobId);
  if (job instanceof Error) {
    progress("");
    return result("This upload cannot be watched any more; the cohort table shows its state.", "bad");
  }
  const { state, series, done, known, unit, head_id } = job;
  const over = series.filter((each) => !OPEN.includes(each.state)), refused = over.filter((each) => each.state !== "indexed");
  const which = head_id ? `Trained: ${done} of ${known} ${unit}` : `Embedded: ${done} of ${known} slices, ${over.length} of ${series.length} series`;
  if (!["done", "failed", "cancelled"].includes(state)) {
    progress(state === "waiting" ? "Waiting for a worker" : which, done, known);
    return setTimeout(watch, WATCH_MS, jobId);
  }
  progress("");
  if (head_id) return trained(job);
  loadCohort();
  if (over.length > refused.length) result(`${count(over.length - refused.length, "series")} ready.`, "good");
  const rows = await Promise.all(refused.slice(0, LISTED).map((each) => get(`/v1/series/${enc(each.series_uid)}`).catch(() => null)));
  listed(`${count(refused.length, "series")} not embedded`, rows.filter(Boolean).map((row) =>
    `${named(row.patient_id)}, ${short(row.series_uid)}: ${row.error || findings(row.verdict).join("; ") || row.state}`));
}

$("files").onchange = (event) => upload([...event.target.files]);
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = async (event) => {
  event.preventDefault();
  $("drop").classList.remove("over");
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  try { upload((await Promise.all(entries.map(filesOf))).flat()); } catch { result("The dropped files cannot be read.", "bad"); }
};

// Cohort

const cursors = [""]; // one per page up to the shown one
let nextCursor = null, unsettled = false;

function plain(found) {
  if (Array.isArray(found)) return found.map(plain).join("; ");
  return found && typeof found === "object" ? Object.entries(found).map(([name, value]) => `${words(name)} ${plain(value)}`).join(", ") : String(found);
}
const findings = (verdict) => (verdict?.findings || []).map(({ code, found }) => [words(code), plain(found)].filter(Boolean).join(": "));
const spacing = ({ slice_spacing_mm, pixel_spacing_mm }) => [slice_spacing_mm, ...(pixel_spacing_mm || [null, null])].map((mm) => number(mm, 2)).join(" × ");

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
    el("td", {}, running ? `embedding, ${running.done} of ${running.slices ?? received}` : state, ...notes(error ? [error] : [], "bad")),
    el("td", {}, el("span", { className: kind }, words(verdict?.status || "")), ...notes(findings(verdict), "muted")));
  row.dataset.series = series_uid;
  return row;
}

function markRow() { for (const row of $("rows").children) row.toggleAttribute("aria-current", row.dataset.series === here.series); }

async function loadCohort() {
  const cursor = cursors.at(-1);
  try {
    const asked = { limit: PAGE_SIZE, cursor, patient_id: $("patient").value.trim(), state: $("state").value };
    const query = new URLSearchParams(Object.entries(asked).filter(([, value]) => value));
    const { series, next_cursor } = await get(`/v1/series?${query}`);
    if (cursor !== cursors.at(-1) || asked.state !== $("state").value || asked.patient_id !== $("patient").value.trim()) return;
    const focused = document.activeElement.closest("#rows tr")?.dataset.series;
    $("rows").replaceChildren(...series.map(rowOf));
    [...$("rows").children].find((row) => row.dataset.series === focused)?.querySelector("a").focus();
    nextCursor = next_cursor;
    unsettled = series.some((each) => OPEN.includes(each.state));
    const none = asked.patient_id || asked.state ? "No series like that." : "No series yet: upload some to begin.";
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
$("patient").oninput = $("state").onchange = () => { cursors.splice(1); loadCohort(); };
$("filter").onsubmit = (event) => event.preventDefault();
$("next").onclick = () => { cursors.push(nextCursor); loadCohort(); };
$("previous").onclick = () => { cursors.pop(); loadCohort(); };
setInterval(() => {
  if (document.hidden) return;
  if (unsettled) loadCohort();
  if (shown && !encoder && OPEN.includes(shown.state)) openSeries();
}, POLL_MS);

// The chosen series

let shown = null, encoder = null, attention = null, addressTimer = 0;

function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), slice = parseInt(asked.get("slice"), 10);
  clearTimeout(addressTimer);
  for (const name of ["window", "head"]) here[name] = asked.get(name) || here[name];
  here.hu = /^-?\d+,-?\d+$/.test(asked.get("hu")) ? asked.get("hu") : "";
  if (asked.has("others")) here.others = asked.get("others") === "1";
  Object.assign(here, { series: asked.get("series") || "", slice: Number.isNaN(slice) ? null : slice });
  return openSeries();
}

function writeAddress() { // not at every step of the slider: browsers refuse too many
  clearTimeout(addressTimer);
  addressTimer = setTimeout(() => history.replaceState(null, "", "#" + new URLSearchParams({ ...here, others: Number(here.others) })), 250);
}

async function openSeries() {
  const uid = here.series, ready = (yes) => document.querySelectorAll(".ready").forEach((part) => { part.hidden = !yes; });
  markRow();
  $("viewer").hidden = !uid;
  if (!uid || shown?.series_uid !== uid || !encoder) {
    clearTimeout(similarTimer);
    if (shown?.series_uid !== uid) { ready(false); $("title").textContent = `Series ${uid}`; say("series-note", "Loading"); }
    shown = encoder = attention = wanted = null;
    if (!uid) return;
    try {
      const [series, { encoders }, { heads }] = await Promise.all([`/v1/series/${enc(uid)}`, "/v1/encoders", "/v1/heads?limit=1000"].map((path) => get(path)));
      if (uid !== here.series) return;
      const embedded = series.embeddings.filter((each) => each.embedded_at).map((each) => each.encoder_id);
      shown = series;
      encoder = encoders.find((each) => embedded.includes(each.encoder_id)) || null;
      describe();
      if (!encoder) return;
      offer(heads.filter((each) => each.state === "ready" && each.encoder_id === encoder.encoder_id));
    } catch (error) { if (uid === here.series) say("series-note", error.message, "bad"); return; }
    await askHead();
    if (uid !== here.series) return;
    $("hits").replaceChildren();
    $("image").hidden = true; // until its own picture is here
    ready(true);
  }
  if (!encoder.windows.some((each) => each.name === here.window)) here.window = encoder.windows[0].name;
  for (const radio of document.getElementsByName("window")) radio.checked = radio.value === here.window;
  $("others").checked = here.others;
  goTo(here.slice ?? attention?.top_slices[0].slice ?? Math.floor(shown.geometry.slices / 2));
}

function describe() {
  const { geometry: is, state } = shown;
  const wait = OPEN.includes(state) ? `${state}: pictures follow once it is embedded` : `${state}: nothing to show`;
  const facts = is ? [`${is.slices} slices of ${is.rows} × ${is.columns}`, `${spacing(is)} mm`, ...is.kernels] : [];
  $("title").textContent = `${named(shown.patient_id)}, series ${shown.series_uid}`;
  say("series-note", [encoder ? encoder.encoder_id : shown.error || wait, ...facts, ...findings(shown.verdict)].join(" · "));
}

function offer(heads) { // the encoder's windows and the heads trained on it, the newest first
  const { rows, columns, slices, pixel_spacing_mm: mm } = shown.geometry;
  $("windows").replaceChildren("Window", ...encoder.windows.map(({ name, low, high }) => el("label", {},
    el("input", { type: "radio", name: "window", value: name, onchange: () => { Object.assign(here, { window: name, hu: "" }); goTo(here.slice); } }),
    ` ${name} `, el("span", { className: "muted small" }, `${low} to ${high} HU`.replaceAll("-", "−")))));
  heads.sort((a, b) => b.created_at.localeCompare(a.created_at));
  if (!heads.some((each) => each.head_id === here.head)) here.head = heads[0]?.head_id || "";
  $("head").replaceChildren(...heads.map((each) => el("option", { value: each.head_id, selected: each.head_id === here.head },
    `${each.labels.join(", ")} (${each.created_at.slice(0, 16).replace("T", " ")}, ${each.head_id})`)));
  $("head").parentElement.hidden = $("heated").parentElement.hidden = !heads.length;
  $("slider").max = slices - 1;
  $("frame").style.setProperty("--ratio", (columns * (mm?.[1] ?? 1)) / (rows * (mm?.[0] ?? 1)));
}

function offerDownloads() {
  const of = `/v1/series/${enc(here.series)}`, head = `?head=${enc(here.head)}`;
  const links = [["embeddings, JSON", `${of}/embeddings?encoder=${enc(encoder.encoder_id)}`], ...(here.head ? [["attention, JSON", `${of}/attention${head}`],
    ["key objects, DICOM", `${of}/key-objects${head}`], ["report, DICOM SR", `${of}/report${head}`], ["report of the head", `/v1/heads/${enc(here.head)}/report`]] : [])];
  $("downloads").replaceChildren("Take away:", ...links.map(([text, href]) => el("a", { href }, text)));
}

async function askHead() { // about the series and about its patient
  const { series, head } = here, query = `?head=${enc(head)}`;
  offerDownloads();
  attention = null;
  for (const id of ["chart", "legend", "top", "probabilities"]) $(id).replaceChildren();
  $("chart").toggleAttribute("hidden", true);
  say("probabilities-note", head ? "" : "No head is trained for this encoder yet: POST a table of labels to /v1/heads.");
  say("attention-note", $("probabilities-note").textContent);
  if (!head) return;
  const [weights, patient] = await Promise.allSettled([get(`/v1/series/${enc(series)}/attention${query}`),
    get(`/v1/patients/${enc(shown.patient_id)}/predictions${query}`)]);
  if (here.series !== series || here.head !== head) return;
  if (weights.status === "fulfilled") draw(weights.value); else say("attention-note", weights.reason.message, "bad");
  if (patient.status === "rejected") return say("probabilities-note", patient.reason.message, "bad");
  $("probabilities").append(...Object.entries(patient.value.probabilities).map(([label, value]) => el("tr", {},
    el("th", { scope: "row", className: "break" }, label),
    el("td", { style: "width: 60%" }, el("div", { className: "bar" }, el("div", { style: `width: ${100 * value}%` }))),
    el("td", { className: "number" }, value.toFixed(3)))));
  const from = `Of patient ${named(shown.patient_id)}, from ${count(patient.value.series.length, "series")}.`;
  say("probabilities-note", `${from} Optimistic where the head was trained on this patient.`);
}

// Attention: weight in percent over z in mm

const BOX = { left: 54, right: 630, top: 10, bottom: 152 }, DASHES = ["", "7 4", "2 3"]; // BOX in units of the viewBox
const stroke = (i) => ({ fill: "none", stroke: `var(--w${i % 3})`, "stroke-width": 2, "stroke-dasharray": DASHES[i % 3] });
const xOf = (z) => BOX.left + ((z - attention.low) / (attention.high - attention.low || 1)) * (BOX.right - BOX.left);

function draw({ instances, window_share, top_slices }) {
  const windows = Object.keys(window_share), most = instances.reduce((top, each) => Math.max(top, each.weight), 0) || 1;
  const z = instances.filter((each) => each.window === windows[0]).map((each) => each.z_mm); // by slice, and z only grows
  attention = { z, low: z[0], high: z.at(-1), top_slices };
  const y = (weight) => BOX.bottom - (weight / most) * (BOX.bottom - BOX.top);
  const axes = [0, 0.5, 1].flatMap((part) => {
    const at = y(part * most), mm = attention.low + part * (attention.high - attention.low);
    return [svg("line", { x1: BOX.left, x2: BOX.right, y1: at, y2: at, stroke: "var(--line)" }),
      svg("text", { x: BOX.left - 6, y: at + 4, "text-anchor": "end" }, `${number(100 * part * most, 1)} %`),
      svg("text", { x: xOf(mm), y: BOX.bottom + 17, "text-anchor": ["start", "middle", "end"][2 * part] }, number(mm, 1))];
  });
  const lines = windows.map((name, i) => svg("polyline", { ...stroke(i), points: instances.filter((each) => each.window === name)
    .map((each) => `${xOf(each.z_mm).toFixed(1)},${y(each.weight).toFixed(1)}`).join(" ") }));
  $("chart").append(...axes, svg("text", { x: 342, y: BOX.bottom + 34, "text-anchor": "middle" }, "z in mm, feet to head"), ...lines,
    svg("line", { id: "marker", y1: BOX.top - 6, y2: BOX.bottom + 4, stroke: "var(--text)", "stroke-width": 1.5 }));
  $("chart").toggleAttribute("hidden", false); // an SVG has no property of that name
  $("legend").append(...windows.map((name, i) => el("span", {},
    svg("svg", { viewBox: "0 0 26 6" }, svg("path", { ...stroke(i), d: "M0 3h26" })), `${name} ${number(100 * window_share[name], 0)} %`)));
  $("top").append("Most attended:", ...top_slices.map(({ slice, weight }) =>
    el("button", { onclick: () => goTo(slice) }, `slice ${slice}, ${number(100 * weight, 1)} %`)));
}

$("chart").onpointerdown = $("chart").onpointermove = (event) => {
  if (!attention || !(event.buttons & 1)) return;
  const { left, width } = $("chart").getBoundingClientRect(), at = ((event.clientX - left) / width) * 640;
  const off = attention.z.map((z) => Math.abs(xOf(z) - at));
  goTo(off.indexOf(Math.min(...off)));
};

// One slice, and those like it

let wanted = null, painting = null, similarTimer = 0, turned = 0;

function goTo(slice) {
  const last = shown.geometry.slices - 1;
  here.slice = Math.max(0, Math.min(last, slice));
  const z = attention ? `, z ${number(attention.z[here.slice], 1)} mm` : "", said = `Slice ${here.slice} (0 to ${last})${z}`;
  $("slider").value = here.slice;
  $("slider").ariaValueText = $("position").textContent = said;
  if (attention) for (const end of ["x1", "x2"]) $("marker").setAttribute(end, xOf(attention.z[here.slice]));
  wanted = imagePath(here.series, here.slice, here.window, here.hu);
  showLevel();
  paint();
  writeAddress();
  clearTimeout(similarTimer);
  similarTimer = setTimeout(findSimilar, 250);
}

async function paint() { // one picture at a time, and of those asked for meanwhile only the last
  if (painting || !wanted) return;
  painting = wanted;
  $("image").alt = `Slice ${here.slice} of ${named(shown.patient_id)}, ${here.window} window`;
  const error = await show($("image"), painting).then(() => "", ({ message }) => message);
  const late = painting !== wanted;
  painting = null;
  if (late) return paint();
  heat();
  say("image-note", error, "");
  $("image").hidden = Boolean(error);
}

let heatTimer = 0;

function heat() { // it takes a worker some seconds, so only where one stays
  clearTimeout(heatTimer);
  $("heat").hidden = true;
  if (!$("heated").checked || !here.head) return;
  const { series, slice, head, window } = here;
  heatTimer = setTimeout(async () => {
    say("attention-note", "A worker is computing the heat map.");
    const answer = await ask(`/v1/series/${enc(series)}/slices/${slice}/heatmap?${new URLSearchParams({ head, window })}`).catch((error) => error);
    if (series !== here.series || slice !== here.slice || window !== here.window || head !== here.head || !$("heated").checked) return;
    if (answer instanceof Error) return say("attention-note", answer.message, "bad");
    URL.revokeObjectURL($("heat").src);
    $("heat").src = URL.createObjectURL(await answer.blob());
    $("heat").hidden = false;
    say("attention-note", "Orange speaks for the head's first label, blue against it.");
  }, 400);
}

$("heated").onchange = heat;

// Window and level of the picture alone: neighbours are those at the encoder's window.

function shownAt() { // HU of black and of white
  const { low, high } = encoder.windows.find((each) => each.name === here.window);
  return here.hu ? here.hu.split(",").map(Number) : [low, high];
}

function showAt(level, width) {
  const low = Math.round(level - width / 2);
  here.hu = `${low},${low + Math.max(1, Math.round(width))}`;
  goTo(here.slice);
}

function showLevel() {
  const [low, high] = shownAt(), level = Math.round((low + high) / 2), width = high - low;
  if (document.activeElement !== $("level")) $("level").value = level;
  if (document.activeElement !== $("width")) $("width").value = width;
  const preset = Object.keys(PRESETS).find((name) => PRESETS[name][0] === level && PRESETS[name][1] === width);
  $("preset").value = !here.hu ? "window" : preset || "free";
}

$("preset").append(el("option", { value: "window" }, "the window above"),
  ...Object.entries(PRESETS).map(([name, [level, width]]) => el("option", { value: name }, `${name} (${level}, ${width})`)),
  el("option", { value: "free" }, "free"));
$("preset").onchange = () => {
  const chosen = PRESETS[$("preset").value];
  if (chosen) return showAt(...chosen);
  if ($("preset").value === "window") here.hu = "";
  goTo(here.slice);
};
$("level").oninput = $("width").oninput = () => {
  const said = [$("level"), $("width")]; // between two steps of 10 is right too
  if (said.every(({ value, validity }) => value && !validity.rangeUnderflow && !validity.rangeOverflow))
    showAt(...said.map((each) => each.valueAsNumber));
};

let drag = null; // where it began, at which level, width and slice

$("frame").onpointerdown = (event) => {
  if (event.button || !shown) return;
  event.preventDefault();
  $("slider").focus({ preventScroll: true });
  const [low, high] = shownAt();
  drag = { x: event.clientX, y: event.clientY, level: (low + high) / 2, width: high - low, slice: here.slice };
  $("frame").setPointerCapture(event.pointerId);
};
$("frame").onpointermove = (event) => {
  if (!drag) return;
  const x = event.clientX - drag.x, y = event.clientY - drag.y;
  if (event.pointerType === "touch") return goTo(drag.slice - Math.round(y / 8)); // a finger scrolls
  if (Math.abs(x) + Math.abs(y) < 4) return; // a click that shook
  const step = Math.max(1, drag.width / 256); // HU per pixel of the way
  showAt(drag.level + y * step, Math.max(1, drag.width + x * step));
};
$("frame").onpointerup = $("frame").onpointercancel = () => { drag = null; };
$("frame").ondblclick = () => { here.hu = ""; goTo(here.slice); };

$("slider").oninput = () => goTo($("slider").valueAsNumber);
$("chart").onclick = () => $("slider").focus();
$("frame").addEventListener("wheel", (event) => { // a trackpad sends many small turns, a wheel few large ones
  event.preventDefault();
  turned += event.deltaMode ? 40 * Math.sign(event.deltaY) : Math.max(-40, Math.min(40, event.deltaY));
  const steps = Math.trunc(turned / 40);
  turned -= 40 * steps;
  if (steps) goTo(here.slice - steps); // up the wheel, up the body
}, { passive: false });
$("head").onchange = async () => { here.head = $("head").value; await askHead(); goTo(here.slice); };
$("others").onchange = () => { here.others = $("others").checked; goTo(here.slice); };

async function findSimilar() {
  const { series, slice, window, others } = here, asked = wanted, late = () => asked !== wanted || others !== here.others;
  const query = { series_uid: series, slice, window, encoder: encoder.encoder_id, exclude: others ? "patient" : "none" };
  const body = JSON.stringify({ ...query, k: SIMILAR + 1 }); // one more than is shown, for the slice finds itself
  $("hits").ariaBusy = "true";
  try {
    const { hits, index, recall } = await get("/v1/search", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    if (late()) return;
    const alike = hits.filter((hit) => hit.series_uid !== series || hit.slice !== slice).slice(0, SIMILAR);
    $("hits").replaceChildren(...alike.map((hit) => el("button", { title: hit.series_uid,
      onclick: () => { location.hash = new URLSearchParams({ series: hit.series_uid, slice: hit.slice }); } },
      el("img", { alt: "" }), el("span", {}, named(hit.patient_id)),
      el("span", { className: "muted" }, `slice ${hit.slice}`), el("span", { className: "muted" }, `cosine ${hit.score.toFixed(3)}`))));
    document.querySelectorAll("#hits img").forEach((image, k) =>
      show(image, imagePath(alike[k].series_uid, alike[k].slice, alike[k].window)).catch(() => {}));
    const found = `index ${index}` + (recall == null ? "" : `, recall@10 ${number(recall, 3)}`);
    say("hits-note", alike.length ? found : "No other slices to compare with.");
  } catch (error) {
    if (late()) return;
    $("hits").replaceChildren();
    say("hits-note", error.message, "bad");
  }
  $("hits").ariaBusy = "false";
}

addEventListener("hashchange", async () => {
  await readAddress();
  $("viewer").scrollIntoView();
  $("slider").focus({ preventScroll: true });
});
loadCohort();
readAddress();
