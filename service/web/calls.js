// Calls of the API, with the key where it asks for one.

import { $, el, say } from "./elements.js";

export function problem(body, status) { // RFC 9457, or what a proxy in between makes of it
  try { return { detail: `status ${status}`, ...JSON.parse(body) }; } catch { return { detail: `the service answered with status ${status}` }; }
}

// The key, where the service asks for one: kept until the tab is closed

const key = () => sessionStorage.getItem("keyslice_key") || "";
export const withKey = () => (key() ? { Authorization: `Bearer ${key()}` } : {});

export function askKey(detail) {
  $("login").hidden = false;
  say("login-note", key() ? detail : "This service asks for one.", key() ? "bad" : "muted");
}

$("login").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("keyslice_key", $("key").value.trim());
  location.reload();
};

export async function ask(path, { headers, ...options } = {}) {
  const answer = await fetch(path, { ...options, headers: { ...headers, ...withKey() } })
    .catch(() => { throw Object.assign(new Error("The service does not answer."), { silent: true }); });
  if (answer.ok) return answer;
  const { detail } = problem(await answer.text(), answer.status);
  if (answer.status === 401) askKey(detail);
  throw Object.assign(new Error(detail), { status: answer.status });
}

export const get = async (path, options) => (await ask(path, options)).json();

export async function show(image, path) { // the address itself in <img> would be asked for without the key
  const url = URL.createObjectURL(await (await ask(path)).blob());
  Object.assign(image, { src: url }).dataset.path = path;
  await image.decode().catch(() => { throw new Error("not a picture"); }).finally(() => URL.revokeObjectURL(url));
}

document.addEventListener("click", async (event) => { // nor does a link send the key: what it leads to is saved
  const link = event.target.closest('a[href^="/v1/"]');
  if (!link || !key()) return;
  event.preventDefault();
  link.parentElement.querySelector(".refused")?.remove();
  const saved = await ask(link.getAttribute("href")).catch((error) => {
    link.after(el("span", { className: "refused bad small", role: "alert" }, error.message));
  });
  if (!saved) return;
  const named = /filename="([^"]+)"/.exec(saved.headers.get("Content-Disposition"))?.[1];
  const suffix = { "text/html": ".html", "text/markdown": ".md" }[saved.headers.get("Content-Type").split(";")[0]] || "";
  const url = URL.createObjectURL(await saved.blob());
  el("a", { href: url, download: link.download || named || link.pathname.split("/").at(-1) + suffix }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60000);
});
