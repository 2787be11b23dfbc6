// A fleet: its brain, plans that wait for a yes, drains, and decisions with what came of them.
import { $, el, text, attr, styled, list, seconds, cores, ago, clock } from "./dom.js";
import { order } from "./orders.js";
import { showReport, timeline } from "./evictions.js";
import { state } from "./app.js";

const rank = { view: 1, act: 2, admin: 3 };
export const may = role => !!state.fleet && (rank[state.fleet.role] || 0) >= rank[role];

const causes = { relieve: "VMs starve", mend: "a rule is broken", drain: "a drain", restore: "a host is back" };
const now = () => Date.now() + state.skew;
// Outcomes that are neither good nor bad: nothing was done.
const idle = new Set(["watched", "rejected", "never began"]);
const kindOf = d => d.state === "completed" ? "good" : d.state === "goes on" ? "move" : d.state === "waits" ? "wait" : idle.has(d.state) ? "idle" : "bad";

export function draw(decisions) {
  const f = state.fleet;
  if (!f) return;
  document.body.classList.add("fleet");
  brain(f);
  if (decisions) {
    waiting();
    past();
  }
  drains();
  troubles(f);
}

// brain shows who leads, and the mode.
function brain(f) {
  const bar = $("brain");
  if (!bar.firstChild) {
    bar.append(el("div", { id: "mode", role: "group", "aria-label": "What becomes of decisions" }, ["watch", "ask", "auto"].map(mode =>
      el("button", { type: "button", "data-mode": mode, onclick: () => order({ kind: "mode", mode }) }, mode))),
    el("button", { type: "button", id: "rules", onclick: rules }, "Rules"),
    el("button", { type: "button", id: "place", onclick: () => order({ kind: "place", memory_mib: 8192, cpu: 2, name: "" }) }, "Place a VM…"),
    el("span", { class: "soft", id: "leader" }));
    bar.hidden = false;
  }
  for (const b of $("mode").children) {
    attr(b, "aria-pressed", String(b.dataset.mode === f.mode));
    b.disabled = b.dataset.mode === f.mode || !may("admin");
  }
  text($("rules"), f.rules.length ? "Rules: " + f.rules.length : "Rules");
  text($("leader"), f.leader ? f.leader.split("@")[0] + " leads" : "");
  attr($("leader"), "title", f.leader + ", version " + f.version + (f.since_ms ? ", since " + new Date(f.since_ms).toLocaleString("en-GB") : ""));
  $("silent").hidden = !f.error;
  text($("silent"), f.error ? "What you see is old. " + f.error[0].toUpperCase() + f.error.slice(1) + "." : "");
}

const figures = d => [d.gain_cores > 0.005 ? "gains " + cores(d.gain_cores) + " cores" : "", "runs there after " + seconds(d.transfer_s), d.back_s > 0 ? "all back after " + seconds(d.back_s) : "", "done after " + seconds(d.total_s)].filter(Boolean).join(" · ");

// waiting shows plans that wait for an operator.
function waiting() {
  const all = state.decisions.filter(d => d.state === "waits");
  $("asks").hidden = !all.length;
  text($("asktitle"), all.length === 1 ? "One plan waits for your yes" : all.length + " plans wait for your yes");
  const part = all.slice(0, 24).map(d => ({ d, k: d.id }));
  if (all.length > part.length) part.push({ k: "more", n: all.length - part.length });
  list($("asklist"), part, x => x.k, x => x.d ? makeAsk(x.d) : el("p", { class: "soft" }), (e, x) => {
    if (!x.d) { text(e, "and " + x.n + " more"); return; }
    const [head, why, what, more, foot] = e.children;
    text(head.children[0], x.d.vm);
    text(head.children[1], x.d.from + " → " + x.d.to);
    text(why, x.d.reasons.join("; "));
    text(what, figures(x.d));
    more.hidden = !x.d.beaten.length;
    for (const b of foot.children) b.disabled = !may("act");
  });
}

function makeAsk(d) {
  return el("article", { class: "card asks", "data-id": d.id }, el("header", {}, el("b"), " ", el("span", { class: "soft" })), el("p"), el("p", { class: "soft" }),
    el("details", {}, el("summary", {}, "What it beat"), el("ul", {}, d.beaten.map(t => el("li", {}, t)))),
    el("footer", {}, el("button", { type: "button", class: "approve act", onclick: () => order({ kind: "approve", id: d.id, vm: d.vm }) }, "Approve…"),
      el("button", { type: "button", class: "reject", onclick: () => order({ kind: "reject", id: d.id, vm: d.vm }) }, "Reject…")));
}

const phases = { planned: "will be drained", draining: "is being drained", drained: "is empty", restoring: "comes back", closed: "takes no VMs" };

// drains shows hosts in maintenance: how far each is, beside what was forecast.
function drains() {
  const all = [...state.hosts.values()].filter(h => h.maintenance).sort((a, b) => a.maintenance.asked_ms - b.maintenance.asked_ms);
  $("drains").hidden = !all.length;
  const part = all.slice(0, 60).map(h => ({ h, k: h.key }));
  if (all.length > part.length) part.push({ k: "\0more", n: all.length - part.length });
  list($("drains"), part, x => x.k, x => x.h ? makeDrain(x.h) : el("p", { class: "soft" }), (e, x) => {
    if (x.h) updateDrain(e, x.h);
    else text(e, "and " + x.n + " more hosts");
  });
}

function makeDrain(h) {
  return el("article", { class: "card drain", "data-host": h.key }, el("header", {}, el("b"), " ", el("span")),
    el("div", { class: "progress", role: "progressbar", "aria-valuemin": 0, "aria-valuemax": 100 }, el("i"), el("em")),
    el("p", { class: "told" }), el("p", { class: "soft asked" }), el("ul", { class: "staying" }),
    el("footer", {}, el("button", { type: "button", class: "restore", onclick: () => order({ kind: "restore", host: h.key }) }, "Restore…")));
}

function updateDrain(e, h) {
  const m = h.maintenance, begun = Math.max(m.asked_ms, m.at_ms || 0), [head, bar, said, asked, staying, foot] = e.children;
  attr(e, "data-is", m.phase);
  text(head.children[0], h.name);
  text(head.children[1], phases[m.phase] || m.phase);
  const going = m.going.length, stay = m.staying.length, all = Math.max(m.vms, going + stay), left = all - going - stay;
  const share = m.phase === "drained" ? 1 : all ? left / all : 0, spent = Math.max(0, (now() - begun) / 1000);
  bar.hidden = m.phase !== "draining";
  styled(bar.children[0], "width", (100 * share).toFixed(1) + "%");
  attr(bar, "aria-valuenow", (100 * share).toFixed(0));
  // The mark is where the drain would be by its forecast.
  bar.children[1].hidden = !m.takes_s;
  if (m.takes_s) styled(bar.children[1], "left", Math.min(100, 100 * spent / m.takes_s * (all ? (all - stay) / all : 1)).toFixed(1) + "%");
  const end = m.takes_s === null ? "" : "forecast: " + seconds(m.takes_s) + ", empty at " + clock(begun + 1000 * m.takes_s);
  const late = m.phase === "draining" && m.by_ms && (m.takes_s !== null && begun + 1000 * m.takes_s > m.by_ms || going && now() > m.by_ms);
  attr(said, "data-is", late ? "hot" : null);
  text(said, (m.phase === "draining" ? left + " of " + all + " VMs have left" + (end ? " · " + end : "") + (m.by_ms ? (late ? " · later than " : " · to be done by ") + clock(m.by_ms) : "")
    : m.phase === "planned" ? "begins at " + clock(m.at_ms) + (m.by_ms ? " · to be done by " + clock(m.by_ms) : "")
    : m.phase === "drained" ? "no VM comes until it is restored" : m.phase === "restoring" ? going + " VMs may come back" : ""));
  text(asked, "asked " + ago(now() - m.asked_ms) + (m.who ? " by " + m.who : "") + (m.reason ? ": " + m.reason : ""));
  list(staying, m.staying.slice(0, 20).map((t, i) => ({ t, i })), x => x.i, () => el("li"), (li, x) => text(li, "stays: " + x.t));
  foot.children[0].disabled = !may("act");
  foot.hidden = m.phase === "restoring";
}

// troubles shows what is not as it should be.
function troubles(f) {
  $("troubles").hidden = !f.troubles.length;
  const box = $("troubles");
  if (!box.firstChild) box.append(el("details", { class: "card", open: true }, el("summary"), el("ul")));
  const [head, ul] = box.firstChild.children;
  text(head, f.troubles.length === 1 ? "One thing is not as it should be" : f.troubles.length + " things are not as they should be");
  list(ul, f.troubles.slice(0, 50).map((t, i) => ({ t, i })), x => x.i, () => el("li"), (li, x) => text(li, x.t));
}

// rules lists the rules in a dialog, with what changes them.
function rules() {
  const d = $("dialog");
  const rows = state.fleet.rules.map(r => el("li", {}, el("b", {}, r.name), el("code", {}, r.rule), el("span", { class: "soft" }, r.by ? "by " + r.by : ""),
    el("span", { class: "do" }, el("button", { type: "button", class: "change", disabled: !may("admin"), onclick: () => order({ kind: "rule", name: r.name, rule: r.rule }) }, "Change…"),
      el("button", { type: "button", class: "remove danger", disabled: !may("admin"), onclick: () => order({ kind: "unrule", name: r.name }) }, "Remove…"))));
  d.className = "";
  d.onclose = null;
  d.replaceChildren(el("h2", {}, "Rules"), rows.length ? el("ul", { class: "rulelist" }, rows) : el("p", { class: "soft" }, "There is none. Such as: vms name=db* must run apart by rack"),
    el("div", { class: "buttons" }, el("button", { type: "button", class: "add", disabled: !may("admin"), onclick: () => order({ kind: "rule", name: "", rule: "" }) }, "Add a rule…"), el("button", { type: "button", onclick: () => d.close() }, "Close")));
  if (!d.open) d.showModal();
}

let shown = 20;
// past shows decisions that have ended, with what was predicted beside what came.
function past() {
  let all = state.decisions.filter(d => d.state !== "waits" && d.state !== "goes on");
  const word = $("filter").value.trim().toLowerCase();
  if (word) all = all.filter(d => (d.vm + " " + d.from + " " + d.to + " " + d.state + " " + d.cause).toLowerCase().includes(word));
  $("decisions").hidden = !state.decisions.length;
  timeline($("decisionline"), state.decisions.filter(d => d.state !== "waits").map(d => ({ lane: d.cause, kind: kindOf(d), began: Date.parse(d.at), ended: d.ended_at ? Date.parse(d.ended_at) : now() })), state);
  const part = all.slice(0, shown).map(d => ({ d, k: d.id }));
  if (all.length > shown) part.push({ k: "more" });
  const longest = Math.max(0.001, ...part.map(x => x.d ? Math.max(x.d.total_s, x.d.came_total_s || 0) : 0));
  list($("decisionlist"), part, x => x.k, x => x.d ? makePast(x.d) : el("button", { type: "button", class: "more", onclick: () => { shown += 100; past(); } }, "Earlier ones"), (e, x) => { if (x.d) updatePast(e, x.d, longest); });
}

function makePast(d) {
  return el("details", { class: "decision", role: "listitem", "data-id": d.id },
    el("summary", {}, el("i", { class: "dot" }), el("span", { class: "name" }), el("span", { class: "way" }), el("span", { class: "cause" }), el("span", { class: "when" }),
      el("span", { class: "bars", "aria-hidden": "true" }, el("i", { class: "said" }), el("i", { class: "took" })), el("span", { class: "came" })),
    el("div", { class: "more" }, el("ul"), el("p", { class: "soft predicted" }), el("p", { class: "soft outcome" }), el("ul", { class: "soft beaten" }),
      el("button", { type: "button", class: "report", "aria-label": "Report of " + d.vm, onclick: e => showReport(d.from, d.eviction_id, d.vm, e.currentTarget) }, "Report")));
}

function updatePast(e, d, longest) {
  const [head, more] = e.children, [, name, way, cause, when, bars, came] = head.children;
  const kind = kindOf(d);
  attr(e, "data-is", kind);
  text(name, d.vm);
  text(way, d.from + " → " + d.to);
  text(cause, causes[d.cause] || d.cause);
  text(when, ago(now() - (d.ended_at ? Date.parse(d.ended_at) : Date.parse(d.at))));
  styled(bars.children[0], "width", Math.max(1, 100 * d.total_s / longest).toFixed(1) + "%");
  styled(bars.children[1], "width", (100 * (d.came_total_s || 0) / longest).toFixed(1) + "%");
  text(came, kind === "good" ? "predicted " + seconds(d.total_s) + ", took " + seconds(d.came_total_s) : d.state + (d.reason ? ": " + d.reason : ""));
  const [reasons, predicted, outcome, beaten, report] = more.children;
  list(reasons, d.reasons.map((t, i) => ({ t, i })), x => x.i, () => el("li"), (li, x) => text(li, x.t));
  text(predicted, "Predicted: " + figures(d));
  text(outcome, kind === "good" ? "Came: down " + seconds(d.came_down_s) + ", done after " + seconds(d.came_total_s) + (d.by ? " · approved by " + d.by : "") : "Came: " + d.state + (d.reason ? ": " + d.reason : ""));
  list(beaten, d.beaten.map((t, i) => ({ t, i })), x => x.i, () => el("li"), (li, x) => text(li, "not " + x.t));
  report.hidden = !d.eviction_id;
}
