// Evictions: those under way, with the guest's memory; those that need an operator; those that are over.
import { $, el, text, attr, styled, list, seconds, size, rate, percent, whole, ago, bytes, toast } from "./dom.js";
import { order } from "./orders.js";
import { call } from "./app.js";

// Colours that people with any colour vision tell apart (Okabe and Ito), in the order of classes as reports have them.
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#a08a1f", "#999999", "#8a5cc7", "#b15928", "#6b7280"];
const unsent = new Set(["skipped", "unused"]);
const good = new Set(["completed", "shut down"]);

// merge puts together what two hosts say of one eviction: the source's word first.
function merge(state) {
  const by = new Map();
  for (const e of state.evictions.values()) {
    const m = by.get(e.of.id) || by.set(e.of.id, { id: e.of.id, sides: [] }).get(e.of.id);
    m.sides.push(e);
  }
  for (const m of by.values()) {
    m.sides.sort((a, b) => (a.of.role === "source" ? 0 : 1) - (b.of.role === "source" ? 0 : 1));
    m.main = m.sides[0];
    m.vm = m.main.of.vm;
    const h = state.hosts.get(m.main.host), name = h ? h.name : m.main.host;
    m.from = m.main.of.role === "source" ? name : m.main.of.peer;
    m.to = m.main.of.role === "source" ? m.main.of.peer : name;
    m.began = Date.parse(m.main.of.started_at);
    m.ended = m.main.of.ended_at ? Date.parse(m.main.of.ended_at) : 0;
    // The source's engine is done when all memory went; the destination's word may come later.
    m.live = !m.main.of.outcome && (m.sides.some(s => s.of.state) || !m.main.of.ended_at);
    m.urgent = m.sides.filter(s => s.of.damage || s.of.remedy.length || s.of.decidable && !s.of.state);
  }
  return [...by.values()].sort((a, b) => a.began - b.began);
}

// ordered are evictions of a fleet whose daemons have not told of them, as far as the leader knows.
function ordered(state, all) {
  const told = new Set(all.map(m => m.id));
  return state.decisions.filter(d => d.state === "goes on" && !told.has(d.eviction_id)).map(d => {
    const unheard = (state.fleet.unheard || {})[d.from];
    const says = unheard ? "It goes on. What it does is not known here: " + unheard : d.eviction_id ? "It goes on." : "It is ordered, and its host has not begun yet.";
    return { id: d.eviction_id || d.id, vm: d.vm, from: d.from, to: d.to, began: Date.parse(d.at), main: { host: d.from, says, of: {} }, sides: [], live: true, urgent: [] };
  });
}

const mostLive = 12;

export function draw(state) {
  const all = merge(state);
  const urgent = all.filter(m => m.urgent.length), live = all.filter(m => m.live && !m.urgent.length).concat(ordered(state, all)), past = all.filter(m => m.ended && !m.urgent.length).reverse();
  $("urgent").hidden = !urgent.length;
  list($("urgent"), urgent.flatMap(m => m.urgent.map(s => ({ m, s }))), u => u.s.host + "/" + u.m.id, makeUrgent, (e, u) => updateUrgent(e, u, state));
  $("live").hidden = !live.length;
  attr($("live"), "class", live.length > (state.fleet ? 1 : 2) ? "many" : "");
  const part = live.slice(0, mostLive);
  if (live.length > mostLive) part.push({ id: "more", more: live.length - mostLive });
  list($("live"), part, m => m.id, m => m.more ? el("p", { class: "soft" }) : makeLive(m), (e, m) => { if (m.more) text(e, "and " + m.more + " more go on"); else updateLive(e, m, state); });
  const jobs = [...state.jobs.values()].filter(j => !j.ended || !j.seen).slice(-4);
  $("jobs").hidden = !jobs.length;
  list($("jobs"), jobs, j => j.id, j => el("div", { class: "card job" }, el("h3"), el("ul"), el("button", { type: "button", class: "quiet", onclick: () => { state.jobs.get(j.id).seen = true; draw(state); } }, "Dismiss")), (e, j) => {
    const h = state.hosts.get(j.host);
    text(e.children[0], (j.kind === "relieve" ? "Relieving " : "Evacuating ") + (h ? h.name : j.host) + (j.ended ? ": ended" : " …"));
    list(e.children[1], (j.lines || []).map((l, i) => [l, i]), x => x[1], () => el("li"), (li, x) => text(li, x[0]));
    e.children[2].hidden = !j.ended;
  });
  $("past").hidden = !past.length || !!state.fleet; // a fleet's decisions have them
  if (!$("past").hidden) drawPast(past, state);
}

function makeUrgent(u) {
  const o = kind => () => order({ kind, host: u.s.host, id: u.m.id, vm: u.m.vm });
  return el("div", { class: "card urgent" }, el("h2"), el("p", { class: "advice" }), el("pre"), el("footer", {},
    el("button", { type: "button", class: "resume", onclick: o("resume-here") }, "Resume here…"), el("button", { type: "button", class: "discard danger", onclick: o("discard") }, "Discard…"),
    el("button", { type: "button", class: "abort", onclick: o("abort") }, "Abort…")));
}

function updateUrgent(e, { m, s }, state) {
  const h = state.hosts.get(s.host);
  text(e.children[0], (m.vm ? "VM " + m.vm : "An eviction") + " needs you, on host " + (h ? h.name : s.host));
  text(e.children[1], [s.of.damage, s.of.reason, s.of.advice].filter(Boolean).join(". ") + (s.of.damage || s.of.advice ? "." : ""));
  text(e.children[2], s.of.remedy.join("\n"));
  e.children[2].hidden = !s.of.remedy.length;
  const [resume, discard, abort] = e.children[3].children;
  resume.hidden = !s.of.decidable || s.of.role !== "source";
  discard.hidden = !s.of.decidable;
  abort.hidden = !s.of.abortable;
}

// The steps of an eviction, as both sides call them.
const steps = [["prepare", ["preparing", "waiting", "arming"]], ["freeze", ["switching", "loading", "prepared"]], ["commit", ["committing", "in doubt"]], ["memory follows", ["pushing", "reconnecting", "running", "cut off"]], ["done", ["retiring", "completing"]]];

function makeLive(m) {
  const figure = what => el("div", {}, el("b"), el("span", {}, what));
  const e = el("article", { class: "card live", "data-id": m.id },
    el("header", {}, el("h2", {}, el("b"), " ", el("span", { class: "soft" })), el("p", { class: "says", "aria-live": "polite" }), el("button", { type: "button", class: "abort", onclick: () => order({ kind: "abort", host: e.dataset.host, id: m.id, vm: m.vm }) }, "Abort…")),
    el("ol", { class: "steps" }, steps.map(([name]) => el("li", {}, name))),
    el("div", { class: "scene" },
      el("figure", {}, el("canvas", { class: "map", role: "img" }), el("figcaption", { class: "key" })),
      el("div", { class: "numbers" }, figure("of the memory"), figure("left"), figure("down"), figure("on the link"), figure("fetches"), figure("over the link"), el("canvas", { class: "spark", role: "img", "aria-label": "rate over time" }))),
    el("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, el("i")));
  e.rates = [];
  return e;
}

function updateLive(e, m, state) {
  const of = m.main.of, p = of.progress || {};
  e.dataset.host = m.main.host;
  attr(e, "data-plain", m.sides.length ? null : "");
  const [head, stages, scene, bar] = e.children;
  text(head.children[0].firstChild, m.vm);
  text(head.children[0].lastChild, m.from + " → " + m.to);
  text(head.children[1], m.main.says || of.state || "waiting");
  head.children[2].hidden = !of.abortable;
  const at = steps.findIndex(s => s[1].includes(of.state));
  [...stages.children].forEach((li, i) => attr(li, "data-is", i < at ? "over" : i === at ? "now" : null));
  attr(e, "data-is", ["reconnecting", "in doubt", "cut off"].includes(of.state) ? "cut" : of.state === "rolling back" ? "back" : "on");
  const share = p.pages_total ? p.pages_sent / p.pages_total : 0;
  const [b1, b2, b3, b4, b5, b6, spark] = scene.children[1].children;
  text(b1.firstChild, p.pages_total ? percent(Math.floor(100 * share) / 100) : "–");
  text(b2.firstChild, p.eta_s === null || p.eta_s === undefined ? "–" : seconds(p.eta_s));
  text(b3.firstChild, p.stands ? "stands" : seconds(p.down_time_s));
  text(b4.firstChild, rate(p.rate_bytes_per_s || 0));
  text(b5.firstChild, whole(p.fetches));
  text(b6.firstChild, size(p.link_bytes || 0));
  attr(bar, "aria-valuenow", Math.floor(100 * share).toString());
  styled(bar.firstChild, "width", (100 * share).toFixed(2) + "%");
  if (e.last !== p.elapsed_s || e.drawn !== state.look) {
    e.drawn = state.look;
    e.last = p.elapsed_s;
    e.rates.push([p.elapsed_s || 0, p.rate_bytes_per_s || 0, p.fetches || 0]);
    if (e.rates.length > 400) e.rates = e.rates.filter((_, i) => i % 2);
    sparkline(spark, e.rates);
  }
  const map = state.maps.get(m.main.host + "/" + m.id);
  const fig = scene.children[0];
  fig.hidden = !map;
  if (map && (e.map !== map || e.look !== state.look)) { e.map = map; e.look = state.look; memory(fig.children[0], fig.children[1], map); }
}

const rgb = h => [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16));

// memory draws the guest's memory, in order of address: each square fills as its pages go, in the colour of what they are used for.
function memory(canvas, key, map) {
  const came = bytes(map.came), why = bytes(map.why), cls = bytes(map.class);
  const n = came.length, box = canvas.clientWidth || 640, dpr = Math.min(2, devicePixelRatio || 1);
  const columns = Math.max(24, Math.ceil(box / Math.max(box < 500 ? 4 : 6, Math.sqrt(box * (box < 500 ? 150 : 340) / Math.max(1, n))))); // so that it is not much higher than that
  const cell = box / columns, rows = Math.ceil(n / columns), high = Math.ceil(rows * cell);
  const w = Math.round(box * dpr), h = Math.round(high * dpr);
  if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; styled(canvas, "height", high + "px"); }
  const c = canvas.getContext("2d"), styles = getComputedStyle(document.documentElement);
  const empty = styles.getPropertyValue("--cell"), free = styles.getPropertyValue("--free"), fetched = styles.getPropertyValue("--hot");
  c.setTransform(dpr, 0, 0, dpr, 0, 0);
  c.clearRect(0, 0, box, high);
  const sums = new Map(), gap = cell > 7 ? 1.5 : 1;
  let total = 0, gone = 0;
  for (let i = 0; i < n; i++) {
    const x = (i % columns) * cell, y = Math.floor(i / columns) * cell, f = came[i] / 255;
    total++; gone += f;
    c.globalAlpha = 1;
    c.fillStyle = empty;
    c.fillRect(x, y, cell - gap, cell - gap);
    if (!f) continue;
    const reason = map.reasons[why[i]], left = unsent.has(reason);
    const name = left ? "never sent: free" : map.classes[cls[i]];
    const colour = left ? free : colours[cls[i] % colours.length];
    sums.set(name, [(sums.get(name) || [0])[0] + f, colour]);
    // A square fills from below.
    c.fillStyle = colour;
    const full = (cell - gap) * f;
    c.globalAlpha = left ? 1 : 0.92;
    c.fillRect(x, y + cell - gap - full, cell - gap, full);
    if (reason === "fetched") { c.globalAlpha = 1; c.fillStyle = fetched; c.fillRect(x + cell / 4, y + cell / 4, (cell - gap) / 2 - .5, (cell - gap) / 2 - .5); }
  }
  c.globalAlpha = 1;
  attr(canvas, "aria-label", "The guest's memory: " + percent(gone / Math.max(1, total)) + " has gone or was left out");
  const items = [...sums].sort((a, b) => b[1][0] - a[1][0]).map(([name, [part, colour]]) => ({ name, colour, part: part * map.pages * 4096 }));
  items.push({ name: "fetched: the guest waited", colour: fetched, part: 0 });
  list(key, items, i => i.name, () => el("span", {}, el("i"), el("span")), (s, i) => { styled(s.firstChild, "--c", i.colour); text(s.lastChild, i.name + (i.part ? "  " + size(i.part) : "")); });
}

function sparkline(canvas, points) {
  const w = canvas.clientWidth || 260, h = canvas.clientHeight || 54, dpr = Math.min(2, devicePixelRatio || 1);
  canvas.width = w * dpr; canvas.height = h * dpr;
  const c = canvas.getContext("2d"), styles = getComputedStyle(document.documentElement);
  c.scale(dpr, dpr);
  if (points.length < 2) return;
  const t0 = points[0][0], t1 = points.at(-1)[0] || 1, top = Math.max(1, ...points.map(p => p[1]));
  const x = t => (t - t0) / Math.max(0.001, t1 - t0) * w, y = v => h - 2 - v / top * (h - 6);
  c.beginPath();
  c.moveTo(0, h);
  for (const [t, v] of points) c.lineTo(x(t), y(v));
  c.lineTo(w, h);
  c.fillStyle = styles.getPropertyValue("--accent");
  c.globalAlpha = 0.18;
  c.fill();
  c.globalAlpha = 1;
  c.beginPath();
  points.forEach(([t, v], i) => i ? c.lineTo(x(t), y(v)) : c.moveTo(x(t), y(v)));
  c.strokeStyle = styles.getPropertyValue("--accent");
  c.lineWidth = 1.5;
  c.stroke();
}

let shown = 30;
function drawPast(past, state) {
  const word = $("filter").value.trim().toLowerCase();
  if (word) past = past.filter(m => (m.vm + " " + m.from + " " + m.to + " " + m.main.of.outcome).toLowerCase().includes(word));
  timeline($("line"), past.map(m => ({ lane: m.from, kind: good.has(m.main.of.outcome) ? "good" : "bad", began: m.began, ended: m.ended })), state);
  const part = past.slice(0, shown).map(m => ({ m, k: m.id }));
  if (past.length > shown) part.push({ k: "more" });
  const longest = Math.max(0.001, ...part.map(r => r.m ? r.m.main.total_s || 0 : 0));
  list($("list"), part, r => r.k, r => r.m ? makePast(r.m) : el("button", { type: "button", class: "more", onclick: () => { shown += 100; draw(state); } }, "Earlier ones"), (e, r) => { if (r.m) updatePast(e, r.m, longest, state); });
}

function makePast(m) {
  return el("div", { class: "entry", role: "listitem" }, el("i", { class: "dot" }), el("span", { class: "name" }), el("span", { class: "way" }), el("span", { class: "when" }), el("span", { class: "came" }),
    el("span", { class: "span", "aria-hidden": "true" }, el("i")), el("button", { type: "button", class: "report", "aria-label": "Report of " + m.vm, onclick: e => { const side = m.sides.find(s => s.report); if (side) showReport(side.host, m.id, m.vm, e.currentTarget); } }, "Report"));
}

function updatePast(e, m, longest, state) {
  const [dot, name, way, when, came, span, button] = e.children, x = m.main;
  const of = x.of, ok = good.has(of.outcome);
  attr(e, "data-is", ok ? "good" : "bad");
  text(name, m.vm);
  text(way, m.from + " → " + m.to);
  text(when, ago(Date.now() + state.skew - m.ended));
  text(came, ok && of.outcome === "completed" ? "down " + seconds(x.down_time_s) + ", all there after " + seconds(x.total_s) + ", " + size(x.link_bytes) + ", " + whole(x.fetches) + " fetches" : of.outcome + (of.reason ? ": " + of.reason : ""));
  attr(came, "title", of.reason || null);
  styled(span.firstChild, "width", Math.max(1, 100 * (x.total_s || 0) / longest).toFixed(1) + "%");
  button.hidden = !m.sides.some(s => s.report);
}

export async function showReport(host, id, vm, button) {
  button.disabled = true;
  try {
    const r = await call("report", { host, id });
    const d = $("dialog");
    d.replaceChildren(el("iframe", { src: r.url, sandbox: "allow-scripts", title: "Report of the eviction of " + vm }), el("div", { class: "buttons" }, el("button", { type: "button", onclick: () => d.close() }, "Close")));
    d.className = "wide";
    d.onclose = () => { d.className = ""; d.replaceChildren(); button.focus(); };
    d.showModal();
  } catch (e) { toast(e.message, true); }
  button.disabled = false;
}

// timeline draws when each of some things was, in lanes.
export function timeline(canvas, past, state) {
  const w = canvas.clientWidth, dpr = Math.min(2, devicePixelRatio || 1);
  if (!w || !past.length) return;
  const now = Date.now() + state.skew, from = Math.max(now - 864e5, Math.min(...past.slice(-5000).map(m => m.began))) - 20000;
  const recent = past.filter(m => m.ended >= from);
  const hosts = [...new Set(recent.map(m => m.lane))].sort().slice(0, 8);
  const lane = 20, h = Math.max(1, hosts.length) * lane + 20;
  if (canvas.width !== Math.round(w * dpr) || canvas.height !== Math.round(h * dpr)) { canvas.width = Math.round(w * dpr); canvas.height = Math.round(h * dpr); styled(canvas, "height", h + "px"); }
  const c = canvas.getContext("2d"), styles = getComputedStyle(document.documentElement), get = n => styles.getPropertyValue(n);
  c.setTransform(dpr, 0, 0, dpr, 0, 0);
  c.clearRect(0, 0, w, h);
  c.font = "11px system-ui, sans-serif";
  const left = Math.min(110, Math.max(0, ...hosts.map(n => c.measureText(n).width)) + 12), x = t => left + (t - from) / Math.max(1, now - from) * (w - left - 4);
  // A tick each round time.
  const span = (now - from) / 1000, step = [10, 30, 60, 300, 600, 1800, 3600, 7200, 21600].find(s => span / s <= Math.max(3, w / 130)) || 21600;
  c.fillStyle = get("--soft");
  c.strokeStyle = get("--edge");
  for (let t = Math.ceil(from / 1000 / step) * step * 1000; t < now; t += step * 1000) {
    c.beginPath(); c.moveTo(x(t) + .5, 0); c.lineTo(x(t) + .5, h - 16); c.stroke();
    const label = new Date(t - state.skew).toLocaleTimeString("en-GB", step < 60 ? {} : { hour: "2-digit", minute: "2-digit" });
    if (x(t) + c.measureText(label).width / 2 < w) { c.textAlign = "center"; c.fillText(label, x(t), h - 4); }
  }
  c.textAlign = "left";
  hosts.forEach((n, i) => { c.fillStyle = get("--soft"); c.fillText(n, 0, i * lane + 14, left - 8); });
  for (const m of recent) {
    const i = hosts.indexOf(m.lane);
    if (i < 0) continue;
    c.fillStyle = get({ good: "--good", bad: "--bad", move: "--move", idle: "--soft" }[m.kind]);
    c.globalAlpha = 0.85;
    c.beginPath();
    c.roundRect(x(m.began), i * lane + 4, Math.max(3, x(m.ended) - x(m.began)), lane - 8, 2);
    c.fill();
  }
  c.globalAlpha = 1;
}
