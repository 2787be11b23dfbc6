// Hosts: each is a tower. Up to the line is the CPU that its VMs have; above the line is what they wait for. Beside it is
// the memory. Few hosts are shown with all their VMs; many as tiles, and only those that can be seen are there at all.
import { $, el, text, attr, styled, list, cores, percent, size, ago } from "./dom.js";
import { order } from "./orders.js";
import { may } from "./fleet.js";

const few = 6;                        // as many hosts are shown in full
const tile = { w: 148, h: 214, gap: 12 };
const starves = 0.1;                  // steal from which a VM starves, as the daemon's goal has it
const late = 12000;                   // ms without a word

const hues = [212, 187, 162, 232, 200, 250, 174, 222];
const known = new Map();
export function colour(name, light = "var(--vm-l)") {
  const kept = known.get(light + name);
  if (kept) return kept;
  let h = 0;
  for (let i = 0; i < name.length; i++) h = (h * 31 + name.charCodeAt(i)) >>> 0;
  const c = "hsl(" + hues[h % hues.length] + " " + (58 + h % 17) + "% " + light + ")";
  known.set(light + name, c);
  return c;
}

// count counts once what is shown of a host at several places.
export function count(h) {
  h.starved = h.stands = 0;
  for (const v of h.vms) {
    if (starving(v)) h.starved++;
    if (v.state === "running" || v.state === "paused") h.stands++;
  }
}

export const starving = v => v.steal >= starves && v.waiting_cores >= 0.05;
const ratio = h => h.cpus ? (h.cpu_cores + h.waiting_cores) / h.cpus : 0;
const natural = new Intl.Collator("en", { numeric: true }).compare;

let shown = [], sorted = [], sortedBy = "";

// order of the hosts that match the filter.
function choose(state) {
  const word = $("filter").value.trim().toLowerCase(), hot = $("starving").getAttribute("aria-pressed") === "true";
  const by = state.hosts.size + "/" + [...state.hosts.values()].reduce((n, h) => n + h.name.length, 0);
  if (by !== sortedBy) {
    sorted = [...state.hosts.keys()].sort((a, b) => natural(state.hosts.get(a).name, state.hosts.get(b).name) || natural(a, b));
    sortedBy = by;
  }
  shown = sorted.map(k => state.hosts.get(k));
  if (word) shown = shown.filter(h => h.name.toLowerCase().includes(word) || h.maintenance && h.maintenance.phase.includes(word) || Object.entries(h.labels || {}).some(l => l.join("=").toLowerCase().includes(word)) || h.vms.some(v => v.name.toLowerCase().includes(word)));
  if (hot) shown.sort((a, b) => b.waiting_cores - a.waiting_cores || ratio(b) - ratio(a));
}

export function draw(state) {
  current = state;
  choose(state);
  tallies(state);
  const box = $("hosts");
  const locked = box.querySelector(".locked");
  if (locked) { if (!state.hosts.size) return; locked.remove(); }
  const noscript = box.querySelector("noscript");
  if (noscript) noscript.remove();
  // All towers have the same scale.
  let top = 1.3;
  for (const h of state.hosts.values()) top = Math.max(top, Math.min(3, ratio(h) * 1.08));
  draw.top = top;
  const full = shown.length <= few && innerWidth > 0;
  attr(box, "class", full ? "full n" + Math.min(3, shown.length) : "tiles");
  if (full) {
    styled(box, "height", "");
    list(box, shown, h => "f" + h.key, makeCard, (e, h) => updateCard(e, h, state));
  } else tiles(state);
  const panel = $("panel");
  if (panel.open && !state.hosts.has(panel.dataset.host)) panel.close();
  if (panel.open) updateCard(panel.firstChild, state.hosts.get(panel.dataset.host), state);
}

// tiles places those tiles that can be seen.
function tiles(state) {
  const box = $("hosts"), width = box.clientWidth;
  const columns = Math.max(1, Math.floor((width + tile.gap) / (tile.w + tile.gap)));
  const wide = (width + tile.gap) / columns - tile.gap, each = tile.h + tile.gap;
  const rows = Math.ceil(shown.length / columns);
  styled(box, "height", Math.max(0, rows * each - tile.gap) + "px");
  const above = box.getBoundingClientRect().top;
  const first = Math.max(0, Math.floor(-above / each) - 1), last = Math.min(rows, Math.ceil((innerHeight - above) / each) + 1);
  tiles.columns = columns;
  const part = shown.slice(first * columns, last * columns);
  list(box, part, h => "t" + h.key, makeTile, (e, h) => {
    const at = first * columns + part.indexOf(h);
    styled(e, "transform", "translate(" + (at % columns) * (wide + tile.gap) + "px," + Math.floor(at / columns) * each + "px)");
    styled(e, "width", wide + "px");
    updateTile(e, h, state, wide);
  });
}

let waiting = false;
export function scrolled(state) {
  if (waiting || $("hosts").className !== "tiles") return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; tiles(state); });
}

function tallies(state) {
  let vms = 0, starved = 0, unwell = 0, used = 0, all = 0, closed = 0;
  for (const h of state.hosts.values()) {
    if (trouble(h, state)) unwell++;
    used += h.cpu_cores; all += h.cpus;
    vms += h.stands;
    starved += h.starved;
    if (h.maintenance) closed++;
  }
  const moving = new Set(), urgent = new Set();
  for (const e of state.evictions.values()) {
    if (e.of.state) moving.add(e.of.id);
    if (e.of.remedy.length || e.of.decidable && !e.of.state) urgent.add(e.of.id);
  }
  // A fleet's leader knows of evictions that no daemon was asked about.
  const under = state.fleet ? state.decisions.filter(d => d.state === "goes on").length : moving.size;
  const waits = state.decisions.filter(d => d.state === "waits").length;
  const items = [["hosts", state.hosts.size, ""], ["VMs", vms, ""], ["of " + all.toFixed(0) + " cores in use", used.toFixed(used < 100 ? 1 : 0), ""],
    ["starve", starved, starved ? "hot" : ""], ["moving", under, under ? "move" : ""]];
  if (waits) items.push([waits === 1 ? "waits for your yes" : "wait for your yes", waits, "warn"]);
  if (closed) items.push(["in maintenance", closed, ""]);
  if (unwell) items.push(["late or silent", unwell, "warn"]);
  if (urgent.size) items.push(["need you", urgent.size, "bad"]);
  list($("tallies"), items, i => i[0].replace(/\d+/g, ""), () => el("span", { class: "tally" }, el("b"), el("i")), (e, [what, n, kind]) => {
    attr(e, "data-is", kind);
    text(e.firstChild, String(n));
    text(e.lastChild, what);
  });
}

// trouble says what is wrong with a host's word; empty for nothing.
function trouble(h, state) {
  if (h.state && h.state !== "reporting") return h.at_ms ? "late: " + ago(Date.now() + state.skew - h.at_ms) : "not heard yet";
  if (h.state && !state.fleet.error) return "";
  if (h.error) return h.at_ms ? "last heard " + ago(Date.now() + state.skew - h.at_ms) : "not heard yet";
  const since = Date.now() + state.skew - h.at_ms;
  return h.at_ms && since > late ? "late: " + ago(since) : "";
}

function makeTower() {
  return el("div", { class: "tower" }, el("div", { class: "cpu" }, el("div", { class: "have" }), el("div", { class: "want" }), el("div", { class: "capacity" })), el("div", { class: "mem" }));
}

// paint draws a tile's tower: thousands of elements for all that can be seen would take the browser too long.
const looks = { at: -1 };
function paint(canvas, h, state, w, high) {
  if (looks.at !== state.look) {
    const styles = getComputedStyle(document.documentElement);
    for (const n of ["--lift", "--other", "--hot", "--ink", "--vm-l"]) looks[n] = styles.getPropertyValue(n).trim();
    looks.at = state.look;
  }
  const dpr = Math.min(2, devicePixelRatio || 1), cw = Math.round(w * dpr), ch = Math.round(high * dpr);
  if (canvas.width !== cw || canvas.height !== ch) { canvas.width = cw; canvas.height = ch; styled(canvas, "height", high + "px"); }
  const c = canvas.getContext("2d"), cpu = cw - 13 * dpr, mem = cw - 8 * dpr, line = ch - ch / draw.top, unit = h.cpus ? ch / (h.cpus * draw.top) : 0;
  c.fillStyle = looks["--lift"];
  c.clearRect(0, 0, cw, ch);
  c.fillRect(0, 0, cpu, ch);
  c.fillRect(mem, 0, cw - mem, ch);
  let y = ch, rest = h.cpu_cores, over = line, m = ch;
  const perByte = h.memory_bytes ? ch / h.memory_bytes : 0;
  let taken = h.memory_bytes - h.available_bytes;
  for (const v of h.vms) { const n = v.cpu_cores * unit; c.fillStyle = colour(v.name, looks["--vm-l"]); c.fillRect(0, y - n, cpu, Math.max(0, n - dpr)); y -= n; rest -= v.cpu_cores; taken -= v.resident_bytes; }
  c.fillStyle = looks["--other"];
  if (rest > 0) c.fillRect(0, y - rest * unit, cpu, rest * unit);
  if (taken > 0) { m -= taken * perByte; c.fillRect(mem, m, cw - mem, ch - m); }
  for (const v of h.vms) { const n = v.resident_bytes * perByte; c.fillStyle = colour(v.name, looks["--vm-l"]); c.fillRect(mem, m - n, cw - mem, Math.max(0, n - dpr / 2)); m -= n; }
  c.fillStyle = looks["--hot"];
  for (const v of h.vms) { const n = v.waiting_cores * unit; if (n > 0.3) c.fillRect(0, over - n, cpu, Math.max(0.5, n - dpr)); over -= n; }
  c.fillStyle = looks["--ink"];
  c.fillRect(0, line - dpr, cpu, 1.5 * dpr);
}

// updateTower draws what the VMs have and want.
function updateTower(e, h) {
  const [cpu, mem] = e.children, [have, want, line] = cpu.children;
  const unit = h.cpus ? 100 / (h.cpus * draw.top) : 0; // % of the height for a core
  const parts = h.vms.filter(v => v.cpu_cores > 0.004).map(v => ({ k: v.name, n: v.cpu_cores, c: colour(v.name), t: v.name }));
  const other = h.cpu_cores - parts.reduce((s, p) => s + p.n, 0);
  if (other > 0.01) parts.push({ k: "\0other", n: other, c: "var(--other)", t: "" });
  const segment = (s, p) => {
    styled(s, "height", (p.n * unit).toFixed(2) + "%");
    styled(s, "--c", p.c);
    text(s, p.n * unit > 6.5 ? p.t : "");
  };
  const make = () => el("div", { class: "seg" });
  list(have, parts, p => p.k, make, segment);
  list(want, h.vms.filter(v => v.waiting_cores > 0.01).map(v => ({ k: v.name, n: v.waiting_cores, c: colour(v.name), t: v.name + " waits" })), p => p.k, make, segment);
  styled(want, "bottom", (100 / draw.top).toFixed(2) + "%");
  attr(line, "data-is", h.waiting_cores > 0.01 * h.cpus ? "over" : null);
  styled(line, "bottom", (100 / draw.top).toFixed(2) + "%");
  const used = h.memory_bytes - h.available_bytes, per = h.memory_bytes ? 100 / h.memory_bytes : 0;
  const blocks = h.vms.filter(v => v.resident_bytes > 0).map(v => ({ k: v.name, n: v.resident_bytes, c: colour(v.name) }));
  const rest = used - blocks.reduce((s, b) => s + b.n, 0);
  if (rest > 0) blocks.unshift({ k: "\0other", n: rest, c: "var(--other)" });
  list(mem, blocks, b => b.k, make, (s, b) => { styled(s, "height", (b.n * per).toFixed(2) + "%"); styled(s, "--c", b.c); });
}

function summary(h) {
  const starved = h.starved;
  return h.name + ": " + cores(h.cpu_cores) + " of " + h.cpus + " cores in use, " + (h.waiting_cores > 0.05 ? cores(h.waiting_cores) + " more wanted, " : "") +
    (starved ? starved + " VMs starve, " : "") + size(h.available_bytes) + " of memory available";
}

function mood(h, state) {
  if (trouble(h, state)) return "late";
  return h.starved ? "hot" : ratio(h) > 0.9 ? "warm" : "well";
}

function makeTile(h) {
  return el("button", { class: "tile", type: "button", "data-host": h.key, onclick: e => open(e.currentTarget.dataset.host) },
    el("span", { class: "name" }), el("canvas"), el("span", { class: "figures" }));
}

function updateTile(e, h, state, wide) {
  const kind = mood(h, state);
  attr(e, "data-is", kind);
  attr(e, "aria-label", summary(h));
  text(e.children[0], h.name);
  paint(e.children[1], h, state, wide - 26, tile.h - 72);
  const starved = h.starved, m = h.maintenance;
  attr(e, "data-phase", m ? m.phase : null);
  text(e.children[2], kind === "late" ? trouble(h, state) : m ? m.phase + (m.going.length ? " · " + m.going.length + " to go" : m.staying.length ? " · " + m.staying.length + " stay" : "") : starved ? starved + " of " + h.vms.length + " starve" : percent(ratio(h)) + " · " + h.vms.length + " VMs");
}

let opener = null;
let current = null;
function open(key) {
  const panel = $("panel"), h = current.hosts.get(key);
  opener = key;
  panel.dataset.host = key;
  panel.replaceChildren(makeCard(h), el("div", { class: "buttons" }, el("button", { type: "button", onclick: () => panel.close() }, "Close")));
  panel.onclose = () => { const t = document.querySelector('.tile[data-host="' + CSS.escape(opener) + '"]'); if (t) t.focus(); };
  updateCard(panel.firstChild, h, current);
  panel.showModal();
}

function makeCard(h) {
  const host = h.key;
  return el("article", { class: "card host", "data-host": host, tabindex: 0 },
    el("header", {}, el("h2"), el("span", { class: "pill" }), el("p", { class: "load" })),
    el("div", { class: "body" }, makeTower(),
      el("div", { class: "vms" }, el("div", { class: "rows", role: "list" }), el("p", { class: "soft none", hidden: true }, "No VM here."))),
    el("p", { class: "trouble", hidden: true }), el("p", { class: "soft guard", hidden: true }),
    h.state ? el("footer", {}, el("button", { type: "button", class: "drain", onclick: () => order({ kind: "drain", host }) }, "Drain…"),
      el("button", { type: "button", class: "restore", onclick: () => order({ kind: "restore", host }) }, "Restore…"),
      el("button", { type: "button", class: "forget danger", onclick: () => order({ kind: "forget", host }) }, "Forget…")) :
    el("footer", {}, el("button", { type: "button", class: "relieve", onclick: () => order({ kind: "relieve", host }) }, "Relieve…"),
      el("button", { type: "button", class: "evacuate", onclick: () => order({ kind: "evacuate", host }) }, "Evacuate…")));
}

function updateCard(e, h, state) {
  const [head, body, bad, guard, foot] = e.children;
  const kind = mood(h, state);
  attr(e, "data-is", kind);
  attr(e, "aria-label", summary(h));
  text(head.children[0], h.name);
  const starved = h.starved, m = h.maintenance;
  text(head.children[1], m ? m.phase : { late: "late", hot: starved + (starved === 1 ? " VM starves" : " VMs starve"), warm: "busy", well: "well" }[kind]);
  text(head.children[2], cores(h.cpu_cores) + " of " + h.cpus + " cores" + (h.waiting_cores > 0.05 ? " + " + cores(h.waiting_cores) + " wanted" : "") + " · " + size(h.memory_bytes - h.available_bytes) + " of " + size(h.memory_bytes) +
    (h.stalls && h.stalls.cpu > 0.01 ? " · CPU stalls " + percent(h.stalls.cpu) : "") + Object.entries(h.labels || {}).map(([k, v]) => " · " + k + " " + v).join(""));
  updateTower(body.children[0], h);
  const [rows, none] = body.children[1].children;
  // Those that are here come first.
  const here = v => v.state !== "none";
  const vms = h.vms.filter(here).concat(h.vms.filter(v => !here(v)));
  none.hidden = vms.length > 0;
  list(rows, vms, v => v.name, v => makeVM(v, h.key), (r, v) => updateVM(r, v, h));
  const t = trouble(h, state);
  const why = [t, h.error, ...(h.problems || [])].filter(Boolean).join(". ");
  bad.hidden = !why; text(bad, why);
  guard.hidden = !h.guard; text(guard, "Guard: " + h.guard);
  for (const b of foot.children) b.disabled = !h.peers.length || !h.vms.some(here);
  if (!h.state) return;
  const [drain, restore, forget] = foot.children;
  drain.hidden = m && m.phase !== "restoring" && m.phase !== "planned"; drain.disabled = !may("act");
  restore.hidden = !m || m.phase === "restoring"; restore.disabled = !may("act");
  forget.hidden = h.state === "reporting"; forget.disabled = !may("admin");
}

function makeVM(v, host) {
  return el("div", { class: "vm", role: "listitem" },
    el("i", { class: "dot" }), el("span", { class: "name" }), el("span", { class: "state" }),
    el("span", { class: "bar", "aria-hidden": "true" }, el("i", { class: "got" }), el("i", { class: "lack" })),
    el("span", { class: "figures" }),
    el("span", { class: "do" },
      el("button", { type: "button", class: "evict", "aria-label": "Evict " + v.name, onclick: () => order({ kind: "evict", host, vm: v.name }) }, "Evict…"),
      el("button", { type: "button", class: "start", "aria-label": "Start " + v.name, onclick: () => order({ kind: "start", host, vm: v.name }) }, "Start…"),
      el("button", { type: "button", class: "stop quiet", "aria-label": "Stop " + v.name, onclick: () => order({ kind: "stop", host, vm: v.name }) }, "Stop…")));
}

function updateVM(e, v, h) {
  const [dot, name, state, bar, figures, acts] = e.children;
  styled(dot, "--c", colour(v.name));
  text(name, v.name);
  text(state, v.eviction_id ? v.state + ", moving" : v.state === "none" ? "not here" : v.state === "running" ? "" : v.state);
  attr(e, "data-is", starving(v) ? "hot" : v.state);
  attr(e, "title", v.problem || null);
  const wants = Math.max(h.cpus, 0.01), running = v.state === "running" || v.state === "paused";
  bar.hidden = v.state !== "running";
  styled(bar.children[0], "width", Math.min(100, 100 * v.cpu_cores / wants).toFixed(1) + "%");
  styled(bar.children[0], "--c", colour(v.name));
  styled(bar.children[1], "width", Math.min(100, 100 * v.waiting_cores / wants).toFixed(1) + "%");
  text(figures, running ? cores(v.cpu_cores) + (v.waiting_cores > 0.02 ? " + " + cores(v.waiting_cores) : "") + " cores" + (v.steal > 0.02 ? " · steal " + percent(v.steal) : "") +
    (v.resident_bytes ? " · " + size(v.resident_bytes) : v.memory_bytes ? " · " + size(v.memory_bytes) : "") + (v.swapped_bytes > 2 ** 20 ? " · " + size(v.swapped_bytes) + " in swap" : "") : v.problem || "");
  const stands = v.state === "running" || v.state === "paused";
  acts.hidden = !!h.state; // the fleet decides where VMs run
  acts.children[0].hidden = !stands || !!v.eviction_id || !h.peers.length;
  acts.children[1].hidden = v.state !== "none" || v.libvirt;
  acts.children[2].hidden = !stands || !!v.eviction_id || v.libvirt;
}

// move takes the focus from host to host.
export function move(e) {
  const at = document.activeElement && document.activeElement.closest("[data-host]");
  if (document.querySelector("dialog[open]")) return;
  const all = [...$("hosts").querySelectorAll(":scope > [data-host]")];
  if (!all.length) return;
  const columns = $("hosts").className === "tiles" ? tiles.columns : Math.max(1, all.filter(x => x.offsetTop === all[0].offsetTop).length);
  const byPlace = $("hosts").className === "tiles" ? shown.map(h => h.key) : all.map(x => x.dataset.host);
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[e.key];
  let i = at ? byPlace.indexOf(at.dataset.host) + step : 0;
  if (i < 0 || i >= byPlace.length) return;
  e.preventDefault();
  const find = () => $("hosts").querySelector('[data-host="' + CSS.escape(byPlace[i]) + '"]');
  let to = find();
  if (!to) { scrollBy(0, Math.sign(step) * (tile.h + tile.gap)); tiles(current); to = find(); }
  if (to) { to.focus({ preventScroll: true }); to.scrollIntoView({ block: "nearest" }); }
}
