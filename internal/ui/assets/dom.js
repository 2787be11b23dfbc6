// Elements and figures. All texts are put in as texts: some come from other hosts and from guests.

export const $ = id => document.getElementById(id);

// el makes an element. Attributes that begin with "on" listen; style is an object.
export function el(name, attrs, ...children) {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (v === undefined || v === null || v === false) continue;
    if (k === "style") for (const [p, x] of Object.entries(v)) e.style.setProperty(p, x);
    else if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else e.setAttribute(k, v === true ? "" : v);
  }
  for (const c of children.flat()) if (c !== undefined && c !== null && c !== false) e.append(c);
  return e;
}

// put sets a text, or an attribute or a style, only if it is another: most do not change.
export function text(e, s) { if (e.textContent !== s) e.textContent = s; }
export function attr(e, k, v) { if (e.getAttribute(k) !== v) { if (v === null) e.removeAttribute(k); else e.setAttribute(k, v); } }
export function styled(e, k, v) { if (e.style.getPropertyValue(k) !== v) e.style.setProperty(k, v); }

// list makes a container's children those of items, by key; each keeps its element.
export function list(parent, items, key, make, update) {
  const have = parent.items || (parent.items = new Map());
  const seen = new Set();
  let before = parent.firstChild;
  for (const item of items) {
    const k = key(item);
    seen.add(k);
    let e = have.get(k);
    if (!e) have.set(k, e = make(item));
    update(e, item);
    if (e === before) before = before.nextSibling;
    else parent.insertBefore(e, before);
  }
  for (const [k, e] of have) if (!seen.has(k)) { e.remove(); have.delete(k); }
}

export function seconds(s) {
  if (s === undefined || s === null) return "–";
  if (s < 0.0995) return (s * 1000).toFixed(0) + " ms";
  if (s < 0.9995) return (s * 1000).toFixed(0) + " ms";
  if (s < 9.95) return s.toFixed(1) + " s";
  if (s < 90) return s.toFixed(0) + " s";
  if (s < 5400) return Math.floor(s / 60) + " min " + Math.round(s % 60) + " s";
  return (s / 3600).toFixed(1) + " h";
}

export function size(b) {
  for (const [u, n] of [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]]) if (b >= n) return (b / n).toFixed(b / n < 9.95 ? 1 : 0) + " " + u;
  return (b || 0) + " B";
}

export function rate(b) {
  b *= 8;
  for (const [u, n] of [["Gbit/s", 1e9], ["Mbit/s", 1e6], ["kbit/s", 1e3]]) if (b >= n) return (b / n).toFixed(b / n < 9.95 ? 1 : 0) + " " + u;
  return b.toFixed(0) + " bit/s";
}

export const cores = n => n.toFixed(n < 9.95 ? 2 : 1);
export const percent = f => (100 * f).toFixed(0) + " %";
export const whole = n => Number(n || 0).toLocaleString("en");

export function ago(ms) {
  const s = Math.max(0, ms / 1000);
  if (s < 90) return Math.round(s) + " s ago";
  if (s < 5400) return Math.round(s / 60) + " min ago";
  if (s < 129600) return Math.round(s / 3600) + " h ago";
  return Math.round(s / 86400) + " days ago";
}

// clock is the time of day, with the day if that is another one.
export function clock(ms) {
  const d = new Date(ms);
  if (isNaN(d)) return "–";
  const t = d.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" });
  return d.toDateString() === new Date().toDateString() ? t : t + " on " + d.toLocaleDateString("en-GB", { day: "numeric", month: "short" });
}

export function bytes(base64) {
  return base64 ? Uint8Array.from(atob(base64), c => c.charCodeAt(0)) : new Uint8Array(0);
}

export function toast(s, bad) {
  const t = $("toast");
  t.textContent = s;
  t.className = bad ? "shown bad" : "shown";
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => { t.className = ""; }, bad ? 12000 : 5000);
}
