// The chosen series: its slices, what a head says of it, and slices like them.

import { $, count, el, enc, imagePath, named, number, say, svg } from "./elements.js";
import { ask, get, show } from "./calls.js";
import { OPEN, findings, markRow, spacing } from "./cohort.js";

const SIMILAR = 6, POLL_MS = 3000;
// What is chosen; the address says the same. `hu` is "low,high" where the picture is not shown at the window.
export const here = { series: "", slice: null, window: "", hu: "", head: "", others: true };
// Level and width in HU, as radiologists have them at hand beside the encoder's own windows.
const PRESETS = { mediastinum: [50, 350], "soft tissue": [40, 400], liver: [80, 150], bone: [400, 1800], brain: [40, 80], angiogram: [300, 600] };

let shown = null, encoder = null, attention = null, addressTimer = 0;

export function readAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), slice = parseInt(asked.get("slice"), 10);
  clearTimeout(addressTimer);
  for (const name of ["window", "head"]) here[name] = asked.get(name) || here[name];
  here.hu = /^-?\d+,-?\d+$/.test(asked.get("hu")) ? asked.get("hu") : "";
  if (asked.has("others")) here.others = asked.get("others") === "1";
  Object.assign(here, { series: asked.get("series") || "", slice: Number.isNaN(slice) ? null : slice });
  return openSeries();
}

export function openAgain() { // there is one head more
  if (!shown) return;
  encoder = null;
  openSeries();
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
    el("td", { style: "width: 60%" }, barOf(value, patient.value.probabilities_std[label])),
    el("td", { className: "number" }, `${value.toFixed(3)} ± ${patient.value.probabilities_std[label].toFixed(3)}`))));
  const from = `Of patient ${named(shown.patient_id)}, from ${count(patient.value.series.length, "series")}.`;
  const spread = "±, and the line over the bar, is the standard deviation over the folds: how far they agree.";
  say("probabilities-note", `${from} ${spread} Optimistic where the head was trained on this patient.`);
}

function barOf(value, std) { // a probability, and from where to where the folds lie
  const low = Math.max(0, value - std), high = Math.min(1, value + std);
  return el("div", { className: "bar" }, el("div", { style: `width: ${100 * value}%` }),
    el("span", { style: `left: ${100 * low}%; width: ${100 * (high - low)}%` }));
}

// Attention: weight in percent over z in mm

const BOX = { left: 54, right: 630, top: 10, bottom: 152 }, DASHES = ["", "7 4", "2 3"]; // BOX in units of the viewBox
const stroke = (i) => ({ fill: "none", stroke: `var(--w${i % 3})`, "stroke-width": 2, "stroke-dasharray": DASHES[i % 3] });
const xOf = (z) => BOX.left + ((z - attention.low) / (attention.high - attention.low || 1)) * (BOX.right - BOX.left);

function draw({ instances, window_share, top_slices }) {
  const windows = Object.keys(window_share), most = instances.reduce((top, each) => Math.max(top, each.weight + each.weight_std), 0) || 1;
  const z = instances.filter((each) => each.window === windows[0]).map((each) => each.z_mm); // by slice, and z only grows
  attention = { z, low: z[0], high: z.at(-1), top_slices };
  const y = (weight) => BOX.bottom - (weight / most) * (BOX.bottom - BOX.top);
  const axes = [0, 0.5, 1].flatMap((part) => {
    const up = y(part * most), mm = attention.low + part * (attention.high - attention.low);
    return [svg("line", { x1: BOX.left, x2: BOX.right, y1: up, y2: up, stroke: "var(--line)" }),
      svg("text", { x: BOX.left - 6, y: up + 4, "text-anchor": "end" }, `${number(100 * part * most, 1)} %`),
      svg("text", { x: xOf(mm), y: BOX.bottom + 17, "text-anchor": ["start", "middle", "end"][2 * part] }, number(mm, 1))];
  });
  const at = (each, weight) => `${xOf(each.z_mm).toFixed(1)},${y(Math.max(0, weight)).toFixed(1)}`;
  const those = windows.map((name) => instances.filter((each) => each.window === name));
  const lines = those.map((each, i) => svg("polyline", { ...stroke(i), points: each.map((one) => at(one, one.weight)).join(" ") }));
  const bands = those.map((each, i) => svg("polygon", { fill: `var(--w${i % 3})`, "fill-opacity": 0.16, // one standard deviation over the folds
    points: [...each.map((one) => at(one, one.weight + one.weight_std)), ...each.toReversed().map((one) => at(one, one.weight - one.weight_std))].join(" ") }));
  $("chart").append(...axes, ...bands, svg("text", { x: 342, y: BOX.bottom + 34, "text-anchor": "middle" }, "z in mm, feet to head"), ...lines,
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

setInterval(() => { if (!document.hidden && shown && !encoder && OPEN.includes(shown.state)) openSeries(); }, POLL_MS);
