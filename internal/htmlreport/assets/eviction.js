"use strict";
(function () {
  const r = data.report, t = data.trace, p = r.pages || {};
  const pageSize = 4096;
  const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0)); // as Go's encoding/json writes them
  if (t) Object.assign(t, { why: bytes(t.why), class: bytes(t.class) });
  const reasonText = { early: "ahead of the devices, which need them", fetched: "fetched: the guest waited for it", near: "neighbour of one that was fetched", planned: "pushed by the plan", skipped: "never sent: free in the guest", unused: "never sent: not there at the source", before: "was there when the eviction was taken up again", left: "left", none: "none" };
  const reasonColour = { early: "#cc79a7", fetched: "#d55e00", near: "#e69f00", planned: "#0072b2", skipped: "#b8c4cc", unused: "#b8c4cc", before: "#7f6b00" };
  const unsent = ["skipped", "unused", "before"]; // not by the engine that ended the eviction

  main.append(el("h1", {}, "Eviction of " + data.vm), el("p", { class: "soft" },
    [data.from && "from " + data.from, data.to && "to " + data.to, data.started && new Date(data.started).toISOString().replace("T", " ").slice(0, 19) + " UTC", r.qemu && "QEMU " + r.qemu, r.machine, data.id].filter(Boolean).join(" · ")));
  for (const n of data.notes || []) main.append(el("p", {}, n));
  main.append(el("p", {}, "Outcome: ", el("span", { class: ["completed", "shut down"].includes(data.outcome) ? "" : "bad" }, data.outcome || "not ended"), data.reason ? ": " + data.reason : ""));
  const moved = (p.total || 0) - unsent.reduce((a, n) => a + (p[n] || 0), 0);
  main.append(el("div", { class: "tiles" },
    tile(seconds(r.execution_transfer_s), r.stood ? "until the VM might run on the other host" : "until the VM ran on the other host"),
    r.stood ? tile("stood", "all along: " + r.stood) : tile(seconds(r.down_time_s), "in which it ran nowhere"),
    tile(seconds(r.total_s), "until nothing was left here"),
    tile(size(r.link_bytes), "over the link"),
    tile(size(((p.skipped || 0) + (p.unused || 0)) * pageSize), "never sent: free, or not there"),
    tile(p.total ? (100 * (p.fetched || 0) / Math.max(1, moved)).toFixed(2) + " %" : "–", "of the memory the guest waited for"),
    tile(r.fetch_latency_s ? seconds(r.fetch_latency_s.p50) + " / " + seconds(r.fetch_latency_s.p99) : "–", "a fetch took: median / 99th percentile"),
    tile(whole(p.duplicate || 0), "pages sent twice")));

  // Phases, in seconds after the eviction began.
  const phases = (r.phases || []).slice().sort((a, b) => a.at_s - b.at_s);
  const switching = phases.find(x => x.state === "switching");
  const begun = switching ? switching.at_s : 0;
  const end = phases.length ? phases[phases.length - 1].at_s : 0;
  if (phases.length > 1) {
    main.append(el("h2", {}, "What was done when"), el("p", { class: "soft" }, "Times are from the moment when the VM was first touched. Phases that last less than a hundredth of all are drawn wider than they are."));
    const shown = phases.slice(0, -1).map((x, i) => ({ name: x.state, from: x.at_s, to: x.for_s === undefined ? phases[i + 1].at_s : x.at_s + x.for_s }));
    const least = (end - shown[0].from) / 100;
    const widths = shown.map(x => Math.max(x.to - x.from, least)), sum = widths.reduce((a, b) => a + b, 0);
    const bar = el("div", { class: "phases" });
    let left = 0;
    shown.forEach((x, i) => {
      const w = 100 * widths[i] / sum;
      bar.append(el("div", { class: "phase", title: x.name + ": " + seconds(x.to - x.from), style: { left: left + "%", width: "calc(" + w + "% - 1px)", background: colours[i % colours.length] } }, w > 6 ? x.name + " " + seconds(x.to - x.from) : ""));
      left += w;
    });
    main.append(bar, key(shown.map((x, i) => [x.name + " " + seconds(x.to - x.from), colours[i % colours.length]])));
  }
  const events = phases.map(x => ({ name: x.state, at: x.at_s - begun })).filter(x => ["pushing", "retiring", "reconnecting"].includes(x.name));
  for (const c of data.charts || []) chart(main, Object.assign({ events }, c));

  if (t) {
    const xs = t.pages.map((_, i) => i * t.step_ms / 1000);
    const names = t.reasons.map((n, i) => [n, i]).filter(([n, i]) => !unsent.includes(n) && t.pages.some(s => s[i]));
    main.append(el("h2", {}, "What was sent"), el("p", { class: "soft" }, "Memory handed to the link over time, by why it went. Pages that are free in the guest, or not there, are not among it; pages of zeroes are, which go as a mark only, so that a few peaks are cut off."));
    const sums = t.pages.map(s => names.reduce((a, [, i]) => a + s[i], 0)).sort((a, b) => a - b);
    const top = sums[Math.floor(sums.length * 0.97)] * 1.3 * pageSize / (1 << 20) / (t.step_ms / 1000);
    stacked(main, xs, names.map(([n, i]) => ({ name: n, colour: reasonColour[n], values: t.pages.map(s => s[i] * pageSize / (1 << 20) / (t.step_ms / 1000)) })), "MiB per second", { events, top });
    const classes = t.classes.map((n, i) => [n, i]).filter(([, i]) => t.fetched.some(s => s[i]));
    main.append(el("h2", {}, "What the guest waited for"));
    if (classes.length) {
      main.append(el("p", { class: "soft" }, "Pages that were fetched because the running guest touched them before they had come, by what they are used for."));
      stacked(main, xs, classes.map(([n, i]) => ({ name: n, colour: colours[i % colours.length], values: t.fetched.map(s => s[i] / (t.step_ms / 1000)) })), "fetches per second", { events });
    } else main.append(el("p", {}, "No page had to be fetched."));
    map();
  } else main.append(el("p", { class: "soft" }, "Nothing is kept of when each page went: that is so only where the VM came from, with a daemon, once the eviction has ended."));

  // The guest's memory, cell by cell.
  function map() {
    const n = t.when_ms.length, last = t.when_ms.reduce((a, b) => Math.max(a, b), 1);
    const columns = Math.min(512, Math.max(64, 2 ** Math.ceil(Math.log2(Math.sqrt(n * 2)))));
    // Each block begins a row of its own.
    const rows = [];
    t.blocks.forEach((b, i) => {
      const cells = (i + 1 < t.blocks.length ? t.blocks[i + 1].cell : n) - b.cell;
      for (let c = 0; c < cells; c += columns) rows.push({ block: b, first: b.cell + c, count: Math.min(columns, cells - c) });
    });
    const canvas = el("canvas", { width: columns, height: rows.length });
    const ctx = canvas.getContext("2d"), image = ctx.createImageData(columns, rows.length);
    const rgb = h => [1, 3, 5].map(i => parseInt(h.slice(i, i + 2), 16));
    const whyRGB = t.reasons.map(r => rgb(reasonColour[r] || "#444444")), classRGB = t.classes.map((_, i) => rgb(colours[i % colours.length]));
    // From early to late: viridis, coarsely.
    const scale = ["#fde725", "#7ad151", "#22a884", "#2a788e", "#414487", "#440154"].map(rgb);
    const when = f => { const x = Math.min(0.9999, Math.max(0, f)) * (scale.length - 1), i = Math.floor(x), d = x - i; return scale[i].map((v, k) => v + (scale[i + 1][k] - v) * d); };
    const never = [t.reasons.indexOf("skipped"), t.reasons.indexOf("unused")];
    const readout = el("span", { class: "soft" }, "Point at the map.");
    const clock = el("span", {}, ""), legend = el("div", {});
    const slider = el("input", { type: "range", min: 0, max: 1000, value: 1000, "aria-label": "time" });
    const mode = el("select", { "aria-label": "colours" }, el("option", { value: "why" }, "why each page came"), el("option", { value: "when" }, "when each page came"), el("option", { value: "class" }, "what each page is used for"));
    function draw() {
      const until = slider.value / 1000 * last, m = mode.value, bytes = image.data;
      bytes.fill(0);
      let come = 0, all = 0;
      rows.forEach((row, y) => {
        for (let x = 0; x < row.count; x++) {
          const c = row.first + x, o = 4 * (y * columns + x), w = t.when_ms[c];
          if (!never.includes(t.why[c]) || w < 0) all++;
          if (w < 0 || w > until) { bytes[o] = bytes[o + 1] = bytes[o + 2] = 128; bytes[o + 3] = 40; continue; }
          if (!never.includes(t.why[c])) come++;
          const v = m === "why" ? whyRGB[t.why[c]] : m === "class" ? classRGB[t.class[c]] : never.includes(t.why[c]) ? rgb(reasonColour.skipped) : when(w / last);
          bytes[o] = v[0]; bytes[o + 1] = v[1]; bytes[o + 2] = v[2]; bytes[o + 3] = 255;
        }
      });
      ctx.putImageData(image, 0, 0);
      clock.textContent = seconds(until / 1000) + ": " + (all ? (100 * come / all).toFixed(1) : 100) + " % of what had to go";
    }
    function explain() {
      const seen = new Set();
      legend.textContent = "";
      if (mode.value === "when") {
        legend.append(key([0, 0.25, 0.5, 0.75, 1].map(f => [seconds(f * last / 1000), "rgb(" + when(f).map(Math.round).join(",") + ")"]).concat([["never sent", reasonColour.skipped]])));
        return;
      }
      const of = mode.value === "why" ? t.why : t.class;
      of.forEach((v, i) => { if (t.when_ms[i] >= 0) seen.add(v); });
      legend.append(key([...seen].sort((a, b) => a - b).map(v => mode.value === "why" ? [reasonText[t.reasons[v]] || t.reasons[v], reasonColour[t.reasons[v]] || "#444444"] : [t.classes[v], colours[v % colours.length]])));
    }
    canvas.addEventListener("mousemove", ev => {
      const b = canvas.getBoundingClientRect(), x = Math.floor((ev.clientX - b.left) / b.width * columns), row = rows[Math.floor((ev.clientY - b.top) / b.height * rows.length)];
      if (!row || x >= row.count) { readout.textContent = ""; return; }
      const c = row.first + x, at = (c - row.block.cell) * t.pages_per_cell * row.block.page_size, w = t.when_ms[c];
      readout.textContent = row.block.name + " + " + size(at) + ": " + (w < 0 ? "never came" : "after " + seconds(w / 1000) + ", " + (reasonText[t.reasons[t.why[c]]] || t.reasons[t.why[c]])) + "; " + t.classes[t.class[c]];
    });
    let timer = 0;
    const play = el("button", { onclick: () => {
      if (timer) { cancelAnimationFrame(timer); timer = 0; play.textContent = "Play"; return; }
      const from = performance.now();
      play.textContent = "Stop";
      const step = now => {
        slider.value = Math.min(1000, (now - from) / 6);
        draw();
        if (slider.value < 1000) timer = requestAnimationFrame(step);
        else { timer = 0; play.textContent = "Play"; }
      };
      timer = requestAnimationFrame(step);
    } }, "Play");
    slider.addEventListener("input", draw);
    mode.addEventListener("change", () => { explain(); draw(); });
    canvas.style.height = Math.min(620, Math.max(90, rows.length * 2.2)) + "px";
    main.append(el("h2", {}, "The guest's memory"), el("p", { class: "soft" },
      "Each dot is " + (t.pages_per_cell === 1 ? "a page" : t.pages_per_cell + " pages") + ", in order of address: " + t.blocks.map(b => b.name + " (" + size(b.pages * b.page_size) + ")").join(", ") + ". Move the slider, or play, to see when each came."),
      el("div", { class: "controls" }, play, slider, clock, mode), el("div", { class: "map" }, canvas), readout, legend);
    explain();
    draw();
  }

  main.append(el("h2", {}, "All figures"), table(["figure", "", "what it means"], [
    ["prepare", seconds(r.prepare_s), "looking at the VM and the other host, before anything was touched"],
    ["execution transfer", seconds(r.execution_transfer_s), "from then until the VM " + (r.stood ? "might run" : "ran") + " on the other host"],
    ["down time", r.stood ? "-" : seconds(r.down_time_s), r.stood ? "it stood all along: " + r.stood : "in which it ran nowhere"],
    ["total", seconds(r.total_s), "until this host held nothing of it"],
    ["link lost", (r.gaps || []).length ? seconds(r.gaps.reduce((a, g) => a + g.for_s, 0)) : "–", (r.gaps || []).length + " times after the commit"],
    ["rate", r.rate_bytes_per_s ? (r.rate_bytes_per_s * 8 / 1e6).toFixed(0) + " Mbit/s" : "–", "while pages were pushed, without the times when the link was lost"],
    ["round trip", seconds(r.round_trip_s), "of the link, uncongested"],
    ["pages", whole(p.total), "of the VM"],
    ["pushed", whole(p.pushed), "by the plan"], ["near", whole(p.near), "as neighbours of fetched ones"], ["fetched", whole(p.fetched), "because the guest waited"],
    ["early", whole(p.early), "ahead of the device state"], ["zero", whole(p.zero), "of all: sent as a mark only"], ["never sent", whole(p.skipped), "free in the guest"], ["not there", whole(p.unused), "at the source, and never sent"],
    ["before", whole(p.before || 0), "were there when the eviction was taken up again"],
    ["order", r.order, "of the push"], ["enlightenment", r.enlightenment && [r.enlightenment.source, r.enlightenment.kernel].filter(Boolean).join(", "), "where it was learnt what pages are used for"],
  ], [1]));
  main.append(el("footer", {}, "Written by vacate. This file needs no network. Charts: uPlot (MIT)."));
})();
