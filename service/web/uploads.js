// Upload: files to the service, and what becomes of them.

import { $, count, el, enc, named, short, words } from "./elements.js";
import { askKey, get, problem, withKey } from "./calls.js";
import { OPEN, findings, loadCohort } from "./cohort.js";
import { loadJobs } from "./jobs.js";
import { openAgain } from "./viewer.js";

const WATCH_MS = 1000, LISTED = 50;

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
    loadJobs();
  } catch (error) { result(`Not trained: ${error.message}`, "bad"); }
}

function trained({ state, head_id, error }) {
  if (state !== "done") return result(`Head ${head_id} ${state}: ${error || "no reason given"}`, "bad");
  $("upload-result").append(el("p", { className: "good" }, `Head ${head_id} is ready: `,
    el("a", { href: `/v1/heads/${enc(head_id)}/report` }, "its report")));
  openAgain();
}

function taken({ job_id, series, set_aside }) {
  const sum = (key) => series.reduce((total, each) => total + each[key], 0);
  const again = sum("duplicates") ? `, ${sum("duplicates")} here already` : "";
  if (series.length) result(`${count(series.length, "series")}: ${count(sum("received"), "new slice")}${again}.`);
  else result("No usable CT series in the upload.", "bad");
  listAside([...set_aside, ...series.flatMap((each) => each.set_aside)]);
  if (series.length) watch(job_id);
  loadCohort();
  loadJobs();
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
