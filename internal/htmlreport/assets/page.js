"use strict";
// What the pages have in common. All texts are put in as texts: some come from other hosts and from guests.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
main.textContent = "";

function el(name, attrs, ...children) {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attrs || {})) {
    if (k === "style") Object.assign(e.style, v);
    else if (k.startsWith("on")) e.addEventListener(k.slice(2), v);
    else if (v !== undefined && v !== null) e.setAttribute(k, v);
  }
  for (const c of children.flat()) if (c !== undefined && c !== null) e.append(c);
  return e;
}

// Colours that people with any colour vision tell apart (Okabe and Ito).
const colours = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6b00", "#999999", "#6a3d9a", "#b15928", "#444444"];
const dashes = [[], [7, 4], [2, 3], [9, 3, 2, 3], [12, 4], [4, 4]];

function seconds(s) {
  if (s === undefined || s === null) return "–";
  return s < 0.0995 ? (s * 1000).toFixed(1) + " ms" : s < 0.9995 ? (s * 1000).toFixed(0) + " ms" : s < 99.95 ? s.toFixed(2) + " s" : s.toFixed(0) + " s";
}
function size(b) {
  if (b === undefined || b === null) return "–";
  for (const [u, n] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]]) if (b >= n) return (b / n).toFixed(b / n < 10 ? 2 : b / n < 100 ? 1 : 0) + " " + u;
  return b + " B";
}
const whole = n => n === undefined || n === null ? "–" : Number(n).toLocaleString("en");
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name);
const tile = (value, what) => el("div", { class: "tile" }, el("b", {}, value), el("span", {}, what));
const key = list => el("div", { class: "key" }, list.map(([name, colour]) => el("span", {}, el("i", { style: { background: colour } }), name)));

function table(head, rows, numbers) {
  const cell = (kind, c, i) => el(kind, { class: numbers && numbers.includes(i) ? "n" : undefined }, c);
  return el("div", { class: "scroll" }, el("table", {}, el("tr", {}, head.map((h, i) => cell("th", h, i))), rows.map(r => el("tr", {}, r.map((c, i) => cell("td", c, i))))));
}

// instants draws named moments as vertical lines.
function instants(events) {
  return { hooks: { draw: [u => {
    const c = u.ctx;
    c.save();
    c.font = 11 * devicePixelRatio + "px system-ui, sans-serif";
    c.textAlign = "left";
    c.textBaseline = "alphabetic";
    c.fillStyle = c.strokeStyle = style("--soft");
    let row = 0;
    for (const e of events || []) {
      const x = u.valToPos(e.at, "x", true);
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      c.setLineDash([3, 3]);
      c.beginPath(); c.moveTo(x, u.bbox.top); c.lineTo(x, u.bbox.top + u.bbox.height); c.stroke();
      const w = c.measureText(e.name).width, right = x + w + 8 > u.bbox.left + u.bbox.width;
      c.fillText(e.name, right ? x - w - 4 : x + 4, u.bbox.top + 12 * devicePixelRatio * (1 + row++ % 4));
    }
    c.restore();
  }] } };
}

// plot draws lines over time: xs in seconds, and of each line its name, values and colour.
function plot(parent, xs, lines, unit, options) {
  options = options || {};
  const box = el("div", { class: "chart" });
  parent.append(box);
  const axis = extra => Object.assign({ stroke: style("--soft"), grid: { stroke: style("--line"), width: 1 }, ticks: { stroke: style("--line"), width: 1 } }, extra);
  const value = v => v === null || v === undefined ? "–" : (Math.abs(v) >= 100 ? whole(Math.round(v)) : v.toFixed(2));
  const u = new uPlot({
    width: box.clientWidth || 1000, height: options.height || 260, cursor: { drag: { x: true, y: false } },
    scales: { x: { time: false, range: options.range ? () => options.range : undefined }, y: { range: (u, lo, hi) => [0, (options.top || hi || 1) * 1.06] } },
    axes: [axis({ label: options.xlabel || "seconds after the eviction began", labelSize: 22 }), axis({ label: unit, labelSize: 22, size: 66 })],
    series: [{ label: "s", value: (u, v) => value(v) }].concat(lines.map((l, i) => ({
      label: l.name, stroke: l.colour || colours[i % colours.length], width: l.width === undefined ? 2 : l.width, dash: l.dash, fill: l.fill, points: { show: false }, spanGaps: true,
      value: (u, v, s, at) => value(l.raw && at !== null && at !== undefined ? l.raw[at] : v),
    }))),
    bands: options.bands, plugins: [instants(options.events)],
  }, [xs].concat(lines.map(l => l.values)), box);
  new ResizeObserver(() => { if (box.clientWidth && box.clientWidth !== u.width) u.setSize({ width: box.clientWidth, height: options.height || 260 }); }).observe(box);
  return u;
}

// stacked draws areas on top of one another.
function stacked(parent, xs, lines, unit, options) {
  const sums = xs.map(() => 0);
  const up = lines.map((l, i) => {
    l.values.forEach((v, x) => { sums[x] += v; });
    const colour = l.colour || colours[i % colours.length];
    return { name: l.name, values: sums.slice(), raw: l.values, colour, fill: colour + "cc", width: 0.5 };
  }).reverse();
  const bands = up.slice(1).map((_, i) => ({ series: [i + 1, i + 2] }));
  return plot(parent, xs, up, unit, Object.assign({ bands }, options));
}

// joined makes lines of points with times of their own ones with the same times.
function joined(lines) {
  const xs = [...new Set(lines.flatMap(l => l.points.map(p => p[0])))].sort((a, b) => a - b);
  const at = new Map(xs.map((x, i) => [x, i]));
  return [xs, lines.map(l => {
    const values = xs.map(() => null);
    for (const p of l.points) values[at.get(p[0])] = p[1];
    return values;
  })];
}

// chart draws one of package page's charts.
function chart(parent, c, options) {
  parent.append(el("h2", {}, c.title));
  const [xs, values] = joined(c.lines);
  const lines = c.lines.map((l, i) => ({ name: l.name, values: values[i], colour: colours[i % colours.length], dash: dashes[i % dashes.length] }));
  plot(parent, xs, lines, c.unit, Object.assign({ events: c.events }, options));
}
