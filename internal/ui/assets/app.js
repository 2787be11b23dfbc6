// The page: it logs in, listens to the stream, and has each part drawn when something has changed.
import { $, el, text, attr, toast } from "./dom.js";
import * as hosts from "./hosts.js";
import * as evictions from "./evictions.js";
import * as fleet from "./fleet.js";
import { close as closeDialog } from "./orders.js";

export const state = {
  hosts: new Map(),      // by key
  evictions: new Map(),  // by host/id
  jobs: new Map(),
  maps: new Map(),       // by host/id
  fleet: null,           // null: these are single hosts
  decisions: [],
  who: "",
  look: 0,               // grows whenever pictures must be drawn anew
  skew: 0,               // what the server's clock is ahead, in ms
};

// The key is good in this tab alone, and for this server alone.
const storeKey = "vacate-key";
let key = sessionStorage.getItem(storeKey) || "";

export async function call(path, body) {
  const r = await fetch("/api/" + path, { method: "POST", headers: { "Content-Type": "application/json", "X-Vacate-Key": key }, body: JSON.stringify(body) });
  if (r.ok) return r.json();
  const said = await r.text();
  if (r.status === 401) locked(said);
  let message = said;
  try { message = JSON.parse(said).error || said; } catch { /* it is plain text */ }
  throw new Error(message);
}

async function login() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  history.replaceState(null, "", "/");
  const r = await call("login", { token });
  key = r.key;
  sessionStorage.setItem(storeKey, key);
}

let out = false;
function locked(why) {
  out = true;
  link("off", "locked");
  $("hosts").replaceChildren(el("div", { class: "card locked" }, el("h2", {}, "Who are you?"), el("p", {}, why || "Open the page by the address that `vacate ui` printed on your terminal."),
    el("p", { class: "soft" }, "Each address opens the page once. `vacate ui` has printed a new one.")));
}

function link(kind, s) {
  attr($("link"), "data-is", kind);
  text($("link"), s);
}

// listen reads server-sent events.
async function listen() {
  for (let wait = 500; !out;) {
    try {
      const r = await fetch("/api/stream", { headers: { "X-Vacate-Key": key } });
      if (r.status === 401) return locked(await r.text());
      if (!r.ok) throw new Error(await r.text());
      wait = 500;
      link("on", "live");
      const reader = r.body.pipeThrough(new TextDecoderStream()).getReader();
      let parts = [];
      for (;;) {
        const { value, done } = await reader.read();
        if (done) break;
        // An event of many hosts comes in many pieces: they are joined once.
        let rest = value, end;
        if (rest[0] === "\n" && parts.length && parts.at(-1).endsWith("\n")) {
          hear(parts.join(""));
          parts = [];
          rest = rest.slice(1);
        }
        while ((end = rest.indexOf("\n\n")) >= 0) {
          parts.push(rest.slice(0, end));
          hear(parts.join(""));
          parts = [];
          rest = rest.slice(end + 2);
        }
        parts.push(rest);
      }
    } catch (e) { if (out) return; }
    link("off", "no answer from vacate ui");
    await new Promise(f => setTimeout(f, wait));
    wait = Math.min(8000, wait * 2);
  }
}

function hear(block) {
  const data = block.indexOf("data: ");
  if (data < 0) return;
  const event = block.slice(7, block.indexOf("\n"));
  if (event === "bye") {
    // Another program may listen there from now on: it must not get the key.
    key = "";
    sessionStorage.removeItem(storeKey);
    return locked("vacate ui has ended. Start it again, and open the address that it prints.");
  }
  const c = JSON.parse(block.slice(data + 6));
  if (event === "hello") { state.who = c.who; attr($("link"), "title", "You act as " + c.who); return; }
  state.skew = c.now_ms - Date.now();
  for (const k of c.gone || []) { state.hosts.delete(k); state.evictions.delete(k); state.maps.delete(k); }
  for (const h of c.hosts || []) { hosts.count(h); state.hosts.set(h.key, h); }
  if (c.fleet) state.fleet = c.fleet;
  if (c.decisions) state.decisions = c.decisions;
  for (const e of c.evictions || []) state.evictions.set(e.host + "/" + e.of.id, e);
  for (const j of c.jobs || []) state.jobs.set(j.id, j);
  for (const m of c.maps || []) state.maps.set(m.key, m);
  draw(c.hosts || c.gone || c.fleet, c.evictions || c.maps || c.jobs || c.gone || c.decisions, c.decisions);
}

// draw draws what has changed, at most once for each frame.
let pending = 0, forHosts = false, forEvictions = false, forDecisions = false;
export function draw(h = true, e = true, d = true) {
  forHosts ||= !!h; forEvictions ||= !!e; forDecisions ||= !!d;
  if (pending) return;
  const now = () => {
    pending = 0;
    const from = performance.now();
    if (forHosts || forEvictions) hosts.draw(state);
    if (forEvictions) evictions.draw(state);
    if (forHosts || forDecisions) fleet.draw(forDecisions);
    forHosts = forEvictions = forDecisions = false;
    performance.measure("vacate-update", { start: from, end: performance.now() });
    if (performance.getEntriesByName("vacate-update").length > 500) performance.clearMeasures();
  };
  // A page that nobody sees gets no frames.
  pending = document.hidden ? setTimeout(now, 1000) : requestAnimationFrame(now);
}

// Keys.
addEventListener("keydown", e => {
  const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
  if (e.key === "/" && !typing) { e.preventDefault(); $("filter").focus(); }
  else if (e.key === "Escape" && document.activeElement === $("filter")) { $("filter").value = ""; $("filter").blur(); draw(); }
  else if (e.key === "?" && !typing) keys();
  else if (e.key === "s" && !typing && !document.querySelector("dialog[open]")) $("starving").click();
  else if (e.key.startsWith("Arrow") && !typing) hosts.move(e);
});

function keys() {
  const d = $("dialog");
  const rows = [["/", "filter hosts and VMs"], ["s", "those that starve first"], ["← ↑ ↓ →", "from host to host"], ["Enter", "open the host that has the focus"], ["Tab", "to the buttons"], ["Esc", "close"], ["?", "this"]];
  d.replaceChildren(el("h2", {}, "Keys"), el("dl", { class: "keys" }, rows.flatMap(([k, what]) => [el("dt", {}, el("kbd", {}, k)), el("dd", {}, what)])),
    el("div", { class: "buttons" }, el("button", { type: "button", onclick: closeDialog }, "Close")));
  d.showModal();
}

const scheme = localStorage.getItem("vacate-theme");
if (scheme) document.documentElement.dataset.theme = scheme;
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("vacate-theme", root.dataset.theme);
  looksOther();
});
$("help").addEventListener("click", keys);
$("filter").addEventListener("input", () => draw());
$("starving").addEventListener("click", () => {
  const on = $("starving").getAttribute("aria-pressed") !== "true";
  $("starving").setAttribute("aria-pressed", on);
  draw();
});
const looksOther = () => { state.look++; draw(); };
addEventListener("resize", looksOther);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", looksOther);
addEventListener("scroll", () => hosts.scrolled(state), { passive: true });
// Words like "12 s ago" grow old without news.
setInterval(() => draw(true, true), 5000);

(async () => {
  try { await login(); } catch (e) { locked(e.message); toast(e.message, true); return; }
  if (!key) return locked();
  listen();
})();
