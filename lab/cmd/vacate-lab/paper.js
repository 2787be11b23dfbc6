"use strict";
(function () {
  const contention = data.contention, runs = contention.runs, m = contention.machine;
  const unique = list => [...new Set(list)];
  const servers = unique(runs.map(r => r.server)), rates = unique(runs.map(r => r.link_bits_per_s)), strategies = unique(runs.map(r => r.strategy));
  const bits = n => n >= 1e9 ? n / 1e9 + " Gbit/s" : n / 1e6 + " Mbit/s";
  const isQEMU = s => !s.startsWith("vacate");
  // What the paper has, in seconds: live migration (pre-copy), enlightened post-copy. [D] there: read off its plots.
  const paper = {
    memcached: { name: "memcached", total: [[39.9, 39.4], [64.1, 49.6], [null, 94.0]], back: [[40.5, 38.0], [64.5, 48.5], [null, 92.5]] },
    postgresql: { name: "MySQL (OLTPBench Twitter)", total: [[41.6, 50.7], [60.5, 56.0], [138.5, 103.5]], back: [[42, 12.5], [61, 14], [139.5, 26]] },
    redis: { name: "Cassandra (YCSB F)", total: [[47.2, 22.0], [46.4, 22.4], [69.5, 33.2]], back: [[47, 5.5], [46, 6], [70, 7.5]] },
  };
  const of = (server, rate, strategy) => runs.filter(r => r.server === server && r.link_bits_per_s === rate && r.strategy === strategy);
  const median = list => { const v = list.filter(x => x !== null && x !== undefined).sort((a, b) => a - b); return v.length ? v[Math.floor((v.length - 1) / 2)] : null; };
  const figure = (server, rate, strategy, f) => { const all = of(server, rate, strategy); return all.length && all.some(r => r[f] === null || r[f] === undefined) ? null : median(all.map(r => r[f])); };
  const shown = (server, rate, strategy, f) => of(server, rate, strategy).length ? (figure(server, rate, strategy, f) === null ? "never" : seconds(figure(server, rate, strategy, f))) : "–";
  const precise = x => x === null ? "never" : x.toFixed(1) + " s";

  main.append(el("h1", {}, "Two VMs on one core, and one of them leaves"),
    el("p", { class: "soft" }, [m.cpu, m.cores + " cores", "Linux " + m.kernel, "QEMU " + m.qemu + " (" + m.accel + ")", "guests: Linux " + m.guest_kernel].join(" · ")),
    el("p", {}, "Two VMs of " + contention.memory_mib + " MiB, each with the same server that holds " + contention.server_mib + " MiB, share the one core of host a. Their clients want " + contention.wanted_cores + " of a core for each, and check every value; a share of " + contention.clients.writes + " of what they ask writes. " +
      "At 0 s it is decided to evict one VM to host b, which has a core to spare, by one of several strategies. A VM is back when its answers per second are at 90 % of their final level for a second; both are back when their sum is."),
    el("p", {}, "This repeats the evaluation of Abe et al., \"Urgent Virtual Machine Eviction with Enlightened Post-Copy\" (VEE 2016), where VMs of 30 GB moved over 10, 5 and 2.5 Gbit/s; memory and links are scaled down together."));

  main.append(el("h2", {}, "Both VMs together"), el("p", { class: "soft" }, "Answers of both per second, averaged over half a second, of the first run of each strategy."),
    el("img", { src: "data:image/svg+xml;base64," + data.svg, alt: "the answers of both VMs per second, over time", style: { width: "100%" } }));

  const server = el("select", {}, servers.map(s => el("option", { value: s }, s)));
  const rate = el("select", {}, rates.map(r => el("option", { value: r }, bits(r))));
  const strategy = el("select", {}, strategies.map(s => el("option", { value: s }, s)));
  const figures = el("div", {}), single = el("div", {});
  const typical = (s, r, st) => { const all = of(s, r, st).slice().sort((a, b) => (a.total_s || 1e9) - (b.total_s || 1e9)); return all[Math.floor((all.length - 1) / 2)]; };

  function drawAll() {
    const s = server.value, r = Number(rate.value);
    figures.textContent = "";
    figures.append(table(["strategy", "outcome", "runs there", "stood still", "total", "contending VM back", "migrated VM back", "both back", "over the link"], strategies.filter(st => of(s, r, st).length).map(st => {
      const run = typical(s, r, st);
      return [st, run.outcome, shown(s, r, st, "execution_transfer_s"), shown(s, r, st, "down_time_s"), shown(s, r, st, "total_s"), shown(s, r, st, "contending_90_s"), shown(s, r, st, "migrated_90_s"), shown(s, r, st, "aggregate_90_s"), size(run.link_bytes)];
    }), [2, 3, 4, 5, 6, 7, 8]));
    drawOne();
  }
  function drawOne() {
    const run = typical(server.value, Number(rate.value), strategy.value);
    single.textContent = "";
    if (!run || !run.moves || !run.moves.length) { single.append(el("p", {}, "There is no such run.")); return; }
    const events = [{ name: "decision", at: 0 }, run.execution_transfer_s !== null && { name: "runs on host b", at: run.execution_transfer_s }, run.total_s !== null && { name: "host a is free of it", at: run.total_s }].filter(Boolean);
    for (const [title, unit, column, scale] of [["Answers of each VM", "answers per second", 1, 1], ["Latency, median", "ms", 2, 1000], ["Latency, 90th percentile", "ms", 3, 1000]]) {
      const lines = [["the VM that moves", run.moves], ["the VM that stays", run.stays]].map(([name, steps]) => ({ name, points: steps.filter(p => column === 1 || p[2] > 0).map(p => [p[0], p[column] * scale]) }));
      chart(single, { title: title + ": " + run.strategy, unit, lines, events }, { xlabel: "seconds after the decision to evict" });
    }
  }
  server.addEventListener("change", drawAll);
  rate.addEventListener("change", drawAll);
  strategy.addEventListener("change", drawOne);
  main.append(el("div", { class: "controls" }, el("span", {}, "server "), server, el("span", {}, "link "), rate), figures,
    el("h2", {}, "One strategy, each VM"), el("div", { class: "controls" }, el("span", {}, "strategy "), strategy), single);

  main.append(el("h2", {}, "Until both are back, beside the paper"), el("p", { class: "soft" }, "The best of QEMU's is the one with both back the soonest. The paper's servers are others: those beside ours are the ones of the same place in its table; its seconds are for 30 GB."));
  const rows = [];
  for (const s of servers) rates.forEach((r, i) => {
    const ours = figure(s, r, "vacate", "aggregate_90_s");
    const theirs = strategies.filter(isQEMU).map(st => [st, figure(s, r, st, "aggregate_90_s")]).filter(x => x[1] !== null).sort((a, b) => a[1] - b[1])[0];
    const p = paper[s];
    rows.push([s, bits(r), precise(ours), theirs ? precise(theirs[1]) + " (" + theirs[0] + ")" : "never", ours && theirs ? (theirs[1] / ours).toFixed(2) : "–",
      p ? p.name : "–", p && p.back[i] ? precise(p.back[i][0]) + " / " + precise(p.back[i][1]) : "–"]);
  });
  main.append(table(["server", "link", "vacate", "best of QEMU's", "times sooner", "in the paper", "live migration / enlightened post-copy"], rows, [2, 3, 4, 6]));

  main.append(el("h2", {}, "Until all memory has moved"), el("p", { class: "soft" }, "The ratio is to the memory that vacate moved, pages of zeroes not counted, at the link's rate: no way to move it takes less."));
  const totals = [];
  for (const s of servers) rates.forEach((r, i) => {
    const run = typical(s, r, "vacate"), p = paper[s];
    const moved = run && run.pages ? run.pages.pushed + run.pages.fetched - run.pages.zero : 0;
    const least = moved ? moved * 4096 * 8 / r : null;
    totals.push([s, bits(r)].concat(strategies.map(st => shown(s, r, st, "total_s"))).concat([least && run.total_s ? (run.total_s / least).toFixed(2) : "–", p && p.total[i] ? precise(p.total[i][0]) + " / " + precise(p.total[i][1]) : "–"]));
  });
  main.append(table(["server", "link"].concat(strategies).concat(["vacate's to the least", "paper: live / enlightened"]), totals, strategies.map((_, i) => i + 2).concat([strategies.length + 2, strategies.length + 3])));

  main.append(el("h2", {}, "Until the VM that stays is back"), el("p", { class: "soft" }, "What the eviction is for: the VM that shared its core is at 90 % of its final level."));
  main.append(table(["server", "link"].concat(strategies), servers.flatMap(s => rates.map(r => [s, bits(r)].concat(strategies.map(st => shown(s, r, st, "contending_90_s"))))), strategies.map((_, i) => i + 2)));
  main.append(el("footer", {}, "Written by vacate-lab paper. This file needs no network. Charts: uPlot (MIT)."));
  drawAll();
})();
