// Elements of the page, and words and numbers as it writes them.

export const $ = (id) => document.getElementById(id);
export const enc = encodeURIComponent;
export const words = (name) => name.replaceAll("_", " ");
export const short = (uid) => (uid.length > 12 ? "…" + uid.slice(-8) : uid);
export const number = (value, digits) => (value == null ? "?" : String(Number(value.toFixed(digits))));
export const count = (n, noun) => `${n} ${noun}${n === 1 || noun === "series" ? "" : "s"}`;
export const named = (patientId) => patientId || "(no patient id)";
export const imagePath = (uid, slice, window, hu = "") => `/v1/series/${enc(uid)}/slices/${slice}/image?`
  + (hu ? new URLSearchParams({ low: hu.split(",")[0], high: hu.split(",")[1] }) : `window=${enc(window)}`);

export function el(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}

export function svg(tag, attributes, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function say(id, text, kind = "muted") {
  $(id).textContent = text;
  $(id).hidden = !text;
  for (const each of ["muted", "bad"]) $(id).classList.toggle(each, each === kind);
}
