// Orders: each shows first what would come of it, and asks what the command line asks.
import { $, el, text, toast, percent, seconds, size } from "./dom.js";
import { call, state } from "./app.js";

export function close() { $("dialog").close(); }

const titles = { evict: o => "Evict " + o.vm, abort: o => "Abort the eviction of " + o.vm, relieve: o => "Relieve " + name(o.host), evacuate: o => "Evacuate " + name(o.host),
  "resume-here": o => "Resume " + o.vm + " on " + name(o.host), discard: o => "Discard the copy of " + o.vm + " on " + name(o.host), start: o => "Start " + o.vm, stop: o => "Stop " + o.vm,
  drain: o => "Drain " + o.host, restore: o => "Restore " + o.host, forget: o => "Forget " + o.host, approve: o => "Evict " + o.vm, reject: o => "Do not evict " + o.vm, mode: o => "Mode " + o.mode,
  rule: o => o.name ? "Rule " + o.name : "A new rule", unrule: o => "Remove the rule " + o.name, place: () => "Where would a new VM best start?" };
const verbs = { evict: "Evict", abort: "Abort the eviction", relieve: "Relieve", evacuate: "Evacuate", "resume-here": "Resume here", discard: "Discard", start: "Start", stop: "Stop",
  drain: "Drain", restore: "Restore", forget: "Forget", approve: "Approve", reject: "Reject", mode: "Set the mode", rule: "Set the rule", unrule: "Remove", place: "" };
const waits = { evict: "Looking at both hosts and the VM …", relieve: "Measuring and predicting …", evacuate: "Measuring and predicting …", drain: "Forecasting …" };
const name = key => { const h = state.hosts.get(key); return h ? h.name : key; };

let asked = 0;

// order opens the dialog of an order.
export function order(o) {
  const d = $("dialog"), h = state.hosts.get(o.host), back = document.activeElement;
  const body = el("div", { class: "ask" }), act = el("button", { type: "submit", class: "act", disabled: true }, verbs[o.kind]);
  const choices = el("div", { class: "choices" });
  const form = el("form", { method: "dialog", class: "order", "data-kind": o.kind }, el("h2", {}, titles[o.kind](o)), choices, body,
    el("div", { class: "buttons" }, el("button", { type: "button", class: "cancel", onclick: close }, "Cancel"), act));
  act.hidden = !verbs[o.kind];
  if (["discard", "stop", "forget", "unrule"].includes(o.kind)) act.classList.add("danger");
  const ask = () => preview(o, body, act);
  const select = (label, options, value, set) => choices.append(el("label", {}, label, el("select", { onchange: e => { set(e.target.value); ask(); } }, options.map(([v, t]) => el("option", { value: v, selected: v === value }, t)))));
  const field = (label, attrs, set) => choices.append(el("label", {}, label, el("input", { type: "text", autocomplete: "off", spellcheck: "false", "aria-label": label, ...attrs, onchange: e => { set(e.target.value.trim()); ask(); } })));
  if (o.kind === "drain") {
    field("Host, or hosts by label", { name: "host", value: o.host, placeholder: "rack=r1", size: 14 }, v => { o.host = v; });
    field("Begin at", { type: "time", name: "at" }, v => { o.at = v; });
    field("Done by", { type: "time", name: "by" }, v => { o.by = v; });
    field("Reason", { placeholder: "what others are told of it", name: "reason" }, v => { o.reason = v; });
  } else if (o.kind === "rule") {
    field("Name", { name: "name", value: o.name, size: 12 }, v => { o.name = v; });
    field("Rule", { name: "rule", value: o.rule, size: 44, placeholder: "vms name=db* must run apart by rack" }, v => { o.rule = v; });
  } else if (o.kind === "place") {
    field("Memory, MiB", { type: "number", min: 1, name: "memory", value: o.memory_mib }, v => { o.memory_mib = Math.max(0, Math.floor(Number(v)) || 0); });
    field("Cores", { type: "number", min: 0, step: "any", name: "cpu", value: o.cpu }, v => { o.cpu = Number(v) || 0; });
    field("Name", { name: "name", size: 12 }, v => { o.name = v; });
  } else if (o.kind === "evict") {
    o.to = o.to || h.peers[0];
    select("To host", h.peers.map(p => [p, p]), o.to, v => { o.to = v; });
  } else if (o.kind === "evacuate") {
    select("To host", [["", "any"], ...h.peers.map(p => [p, p])], "", v => { o.to = v; });
    choices.append(el("label", {}, el("input", { type: "checkbox", onchange: e => { o.force = e.target.checked; ask(); } }), " Overload other hosts rather than leave a VM here"));
  } else if (o.kind === "relieve") {
    choices.append(el("label", {}, "Goal", el("input", { type: "text", placeholder: "cpu<111%", "aria-label": "Goal, such as cpu<80% or free 8GiB", onchange: e => { o.goal = e.target.value.trim(); ask(); } })));
  }
  form.addEventListener("submit", async e => {
    e.preventDefault();
    if (act.disabled) return;
    act.disabled = true;
    const was = act.textContent;
    act.textContent = "…";
    o.answers = Object.fromEntries([...form.querySelectorAll("input[data-field]")].map(i => [i.dataset.field, i.value]));
    try {
      const r = await call("do", o);
      close();
      toast(r.said);
    } catch (err) {
      act.textContent = was;
      act.disabled = false;
      const bad = form.querySelector(".refused") || body.appendChild(el("p", { class: "refused", role: "alert" }));
      text(bad, err.message);
    }
  });
  d.className = "";
  d.replaceChildren(form);
  d.onclose = () => { asked++; if (back && back.isConnected) back.focus(); };
  d.showModal();
  ask();
}

// preview shows what would come of an order.
async function preview(o, body, act) {
  const mine = ++asked;
  act.disabled = true;
  body.replaceChildren(el("p", { class: "soft busy" }, waits[o.kind] || "Asking …"));
  let p;
  try { p = await call("ask", o); } catch (e) {
    if (mine === asked) body.replaceChildren(el("p", { class: "refused", role: "alert" }, e.message));
    return;
  }
  if (mine !== asked) return;
  const parts = [];
  if (p.text) parts.push(el("p", { class: "what" }, p.text));
  if (p.lines && p.lines.length) parts.push(el("ul", { class: "lines" }, p.lines.map(t => el("li", {}, t))));
  if (p.staying && p.staying.length) parts.push(el("ul", { class: "findings staying" }, p.staying.map(t => el("li", { "data-is": "warning" }, el("b", {}, "stays "), t))));
  if (p.steps && p.steps.length) parts.push(steps(p.steps));
  if (p.plan && p.plan.candidates) parts.push(table(p.plan));
  const found = (p.findings || []).filter(f => f.level !== "ok"), fine = (p.findings || []).length - found.length;
  if (p.findings) parts.push(el("ul", { class: "findings" }, found.map(f => el("li", { "data-is": f.level }, el("b", {}, f.level), " ", (f.host ? f.host + ": " : "") + f.check + ": " + f.text, f.remedy ? el("code", {}, f.remedy) : null)),
    el("li", { "data-is": "ok" }, el("b", {}, "ok"), " ", fine + " checks of both hosts, the VM and the link found nothing wrong")));
  const check = () => { act.disabled = !!p.refused || [...body.querySelectorAll("input[data-field]")].some(i => i.value !== i.dataset.want); };
  const fenced = [];
  for (const q of p.questions || []) {
    const part = el("label", { class: "question" }, el("span", {}, q.text), el("span", { class: "soft" }, "Type " + q.want + " if so:"),
      el("input", { type: "text", "data-field": q.field, "data-want": q.want, autocomplete: "off", spellcheck: "false", oninput: check }));
    if (q.field === "fenced") fenced.push(part);
    parts.push(part);
  }
  if (p.can_fence) parts.unshift(el("label", { class: "choice" }, el("input", { type: "checkbox", onchange: e => {
    o.fence = e.target.checked;
    for (const f of fenced) { const i = f.querySelector("input"); f.hidden = o.fence; if (o.fence) delete i.dataset.field; else i.dataset.field = "fenced"; }
    check();
  } }), " vacated fences the other host first, by its command"));
  if (p.refused) parts.push(el("p", { class: "refused", role: "alert" }, p.refused));
  parts.push(el("p", { class: "soft command" }, state.fleet ? "The same: " : "The same on that host: ", el("code", {}, p.command)));
  if (state.fleet) parts.push(el("p", { class: "soft" }, "It is logged that " + state.who + " asked."));
  body.replaceChildren(...parts);
  check();
  const first = body.querySelector("input[type=text]");
  if (first) first.focus(); else if (!act.disabled && !act.hidden && !body.parentElement.querySelector(".choices:focus-within")) act.focus();
}

// steps shows who leaves when in a drain.
function steps(all) {
  const last = Math.max(0.001, ...all.map(s => s.done_s));
  return el("div", { class: "scroll leaves", tabindex: 0 }, el("table", {}, el("thead", {}, el("tr", {}, ["VM", "from", "to", "gone after", ""].map((t, i) => el("th", { scope: "col", class: i === 3 ? "n" : undefined }, t)))), el("tbody", {}, all.map(s =>
    el("tr", {}, el("th", { scope: "row" }, s.vm), el("td", {}, s.from), el("td", {}, s.to), el("td", { class: "n" }, seconds(s.done_s)), el("td", {}, el("i", { class: "until", style: { width: (100 * s.done_s / last).toFixed(1) + "%" } })))))));
}

function table(plan) {
  const load = l => percent(l);
  const rows = plan.candidates.map((c, i) => {
    let why = c.refused;
    if (!why && c.beyond) why = "goes by force: " + c.beyond;
    else if (!why && plan.goal) why = i === 0 ? (c.meets ? "best: it reaches the goal, and has all back the soonest" : "best: it comes the nearest to the goal") : c.meets ? "reaches the goal" : "comes nearer to the goal";
    else if (!why) why = "goes";
    const cells = c.to ? [c.vm, c.to, (c.gain_cores >= 0 ? "+" : "") + c.gain_cores.toFixed(2), load(c.load_here), load(c.load_there), size(c.freed_bytes), seconds(c.back_s), seconds(c.total_s), why] : [c.vm, "", "", "", "", "", "", "", why];
    return el("tr", { "data-is": c.refused ? "no" : "yes" }, cells.map((x, j) => el(j ? "td" : "th", j ? { class: j > 1 && j < 8 ? "n" : undefined } : { scope: "row" }, x)));
  });
  return el("div", { class: "scroll", tabindex: 0 }, el("table", {}, el("thead", {}, el("tr", {}, ["VM", "to", "gain, cores", "load here", "load there", "frees", "all back", "done", "verdict"].map((t, j) => el("th", { scope: "col", class: j > 1 && j < 8 ? "n" : undefined }, t)))), el("tbody", {}, rows)));
}
