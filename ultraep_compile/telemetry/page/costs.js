// Traffic, realised loads, time, other numbers of slots, the table of layers.

function drawTraffic() {
  const layer = layers[state.layer], traffic = layer.traffic, R = layer.ranks;
  if (!traffic) {
    $("traffic-note").textContent = "";
    return empty("traffic", "No record of this layer kept its source ranks.");
  }
  $("traffic-note").textContent = `Mean rows per microbatch from rank to rank, over ${whole(traffic.records)} records. The diagonal stays at home.`;
  const both = [unpack(traffic.before), unpack(traffic.after)];
  const most = Math.max(...both.map((m) => m.values.reduce((a, b) => Math.max(a, b), 0)));
  const z = [...Array(R)].map((_, r) => Array.from(unpack(traffic[state.view]).row(r)));
  const ranks = [...Array(R)].map((_, r) => r);
  plot("traffic", [{
    type: "heatmap", x: ranks, y: ranks, z, colorscale: coolScale(), zmin: 0, zmax: most || 1, xgap: R <= 32 ? 1 : 0, ygap: R <= 32 ? 1 : 0,
    ...(R <= 12 ? { text: z.map((row) => row.map(few)), texttemplate: "%{text}", textfont: { size: 11 } } : {}),
    hovertemplate: "rank %{y} → rank %{x}<br>%{z:,.1f} rows per microbatch<extra></extra>", colorbar: colourbar("rows"),
  }], {
    xaxis: axis("Rank that computes", { showgrid: false, zeroline: false, dtick: R <= 24 ? 1 : undefined }),
    yaxis: axis("Rank that sends", { showgrid: false, zeroline: false, autorange: "reversed", dtick: R <= 24 ? 1 : undefined }),
    uirevision: "traffic" + state.layer,
  });
}

function drawLeaving() {
  const layer = layers[state.layer], r = layer.records, mbs = Array.from(unpack(layer.microbatch).values);
  const rows = unpack(r.rows).values;
  const part = (name) => Array.from(unpack(r[name]).values, (v, n) => (rows[n] ? v / rows[n] : null));
  const line = (name, y, colour, more) => ({ type: "scatter", mode: "lines", x: mbs, y, name, line: { color: colour, width: 1.7 }, ...more });
  const percent = (name) => ({ hovertemplate: "microbatch %{x}<br>%{y:.1%} leave<extra>" + name + "</extra>" });
  plot("leaving", [
    line("before", part("left_before"), css("--before"), percent("before")),
    line("after", part("left_after"), css("--after"), percent("after")),
    line("replicas", Array.from(unpack(r.replicas).values), css("--bound"), {
      yaxis: "y2", line: { color: css("--bound"), width: 1.4, shape: "hvh" }, hovertemplate: "microbatch %{x}<br>%{y} replicas<extra></extra>",
    }),
  ], {
    xaxis: axis("Microbatch", { zeroline: false, showgrid: false, anchor: "y2" }),
    yaxis: axis("Share of rows", { tickformat: ".0%", rangemode: "tozero", domain: [0.4, 1] }),
    yaxis2: axis("Replicas", { rangemode: "tozero", domain: [0, 0.28], nticks: 4 }), margin: { l: 58, r: 12, t: 30, b: 42 },
  });
  const facts = layer.facts, records = layer.summary.records || 1, mean = (name) => sum(unpack(r[name]).values) / records;
  const list = [];
  if (facts.row_bytes) {
    list.push(["Rows that leave, before", few(mean("left_before")), bytes(mean("left_before") * facts.row_bytes)]);
    list.push(["Rows that leave, after", few(mean("left_after")), bytes(mean("left_after") * facts.row_bytes)]);
  }
  if (facts.expert_bytes) {
    list.push(["Weights of replicas", few(mean("replicas")), bytes(mean("replicas") * facts.expert_bytes)]);
    list.push(["Memory of slots, per rank", whole(layer.slots), bytes(layer.slots * facts.expert_bytes)]);
  }
  table($("bytes"), list.length ? ["Per microbatch, one way", "Count", "Size"] : [], list);
}

function drawRealised() {
  const layer = layers[state.layer], found = layer.realised;
  if (!found) {
    $("realised-note").textContent = "";
    return empty("realised", "Realised loads were not reported for this layer. The other charts show planned loads.");
  }
  const same = found.equal === found.records;
  $("realised-note").textContent = same
    ? `In all ${whole(found.records)} records each physical expert got exactly the rows planned for it.`
    : `In ${whole(found.equal)} of ${whole(found.records)} records each physical expert got the rows planned for it; elsewhere one was off by up to ${whole(found.largest)} rows.`;
  const index = unpack(found.index).values, mbs = unpack(layer.microbatch).values, R = layer.ranks;
  const planned = Array.from(unpack(found.planned).values), real = Array.from(unpack(found.realised).values);
  const most = Math.max(1, ...[planned, real].map((v) => v.reduce((a, b) => Math.max(a, b), 0)));
  const least = Math.min(most, ...[planned, real].map((v) => v.reduce((a, b) => Math.min(a, b), most)));
  const pad = 0.05 * (most - least || most);
  plot("realised", [
    { type: "scatter", mode: "lines", x: [least - pad, most + pad], y: [least - pad, most + pad], line: { color: css("--bound"), width: 1, dash: "dot" }, hoverinfo: "skip" },
    {
      type: "scatter", mode: "markers", x: planned, y: real, marker: { color: css("--after"), size: 5, opacity: 0.5 },
      customdata: planned.map((_, i) => [i % R, mbs[index[Math.floor(i / R)]]]),
      hovertemplate: "rank %{customdata[0]}, microbatch %{customdata[1]}<br>planned %{x:,}, realised %{y:,} rows<extra></extra>",
    },
  ], { xaxis: axis("Rows planned for a rank", { zeroline: false }), yaxis: axis("Rows it got", { zeroline: false }), showlegend: false });
}

function drawPhases() {
  const phases = [...new Set(layers.flatMap((layer) => Object.keys(layer.seconds)))].filter((p) => layers.some((l) => l.seconds[p]));
  if (!phases.length) {
    $("phases-note").textContent = "";
    table($("phase-table"), [], []);
    return empty("phases", "No times were reported in this run.");
  }
  $("phases-note").textContent = "Median time of each phase per microbatch, layer by layer.";
  const largest = Math.max(...layers.map((l) => sum(phases.map((p) => l.seconds[p]?.p50 ?? 0))));
  const [scale, unit] = largest < 1e-3 ? [1e6, "µs"] : largest < 1 ? [1e3, "ms"] : [1, "s"];
  const y = layers.map((_, l) => l);
  plot("phases", phases.map((phase, i) => ({
    type: "bar", x: y, y: layers.map((layer) => (layer.seconds[phase] ? scale * layer.seconds[phase].p50 : null)), name: esc(phase),
    marker: { color: oklch(dark() ? 0.7 : 0.62, 0.1, 210 + i * 47), line: { width: 0 } }, text: layers.map((layer) => esc(layer.name)), textposition: "none",
    hovertemplate: "%{text}<br>%{y:.3g} " + unit + "<extra>" + esc(phase) + "</extra>",
  })), {
    barmode: "stack", bargap: 0.25, xaxis: axis(esc(pattern) || "Layer", { showgrid: false, tickmode: "array", ...thinTicks(y, short.map(esc), 24) }),
    yaxis: axis(unit), legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal" }, margin: { l: 54, r: 10, t: phases.length > 4 ? 48 : 30, b: 42 },
  }, (point) => select({ layer: point.x }));
  const layer = layers[state.layer], total = sum(phases.map((p) => layer.seconds[p]?.mean ?? 0));
  table($("phase-table"), ["Phase, " + called(state.layer), "p50", "p99", "Mean", "Share"], phases.filter((p) => layer.seconds[p]).map((p) => {
    const s = layer.seconds[p];
    return [p, seconds(s.p50), seconds(s.p99), seconds(s.mean), total ? share(s.mean / total) : "–"];
  }));
}

function drawSlots() {
  const rows = data.slots;
  if (!rows.length) {
    $("slots-note").textContent = "";
    table($("slot-table"), [], []);
    return empty("slots", "No record kept the full load matrix that planning again needs.");
  }
  $("slots-note").textContent = `The same loads planned again with the planner "quota", over ${whole(rows[0].records)} records of all layers. Memory is that of a rank's slots.`;
  const x = rows.map((row) => String(row.slots));
  plot("slots", [
    {
      type: "scatter", mode: "lines+markers+text", x, y: rows.map((row) => row.p50), name: "p50, whisker to p99", text: rows.map((row) => "\u2003\u2002" + ratio(row.p50)),
      textposition: "middle right", textfont: { size: 13, color: css("--ink") }, line: { color: css("--line"), width: 1.5 },
      marker: { size: 12, color: rows.map((row) => css(row.slots ? "--after" : "--before")) }, cliponaxis: false,
      error_y: { type: "data", symmetric: false, array: rows.map((row) => row.p99 - row.p50), arrayminus: rows.map(() => 0), color: css("--bound"), thickness: 1.4, width: 6 },
      hovertemplate: "%{x} slots<br>p50 %{y:.4f}<extra></extra>",
    },
    {
      type: "scatter", mode: "markers", x, y: rows.map((row) => row.bound), name: "lower bound", marker: { symbol: "line-ew-open", size: 30, color: css("--bound"), line: { width: 2.5 } },
      hovertemplate: "%{x} slots<br>no plan goes below %{y:.4f}<extra></extra>",
    },
  ], {
    xaxis: axis("Slots per rank", { type: "category", showgrid: false, range: [-0.5, rows.length - 0.4] }), yaxis: axis("max/mean", { range: [0.9, 1.06 * Math.max(1.1, ...rows.map((row) => row.p99))] }),
    margin: { l: 54, r: 10, t: 30, b: 42 },
  });
  const recorded = new Set(layers.map((layer) => layer.slots)), sized = rows.some((row) => row.slot_bytes !== null);
  table($("slot-table"), ["Slots", "p50", "p99", "Bound", "Replicas", "Leaving", ...(sized ? ["Memory"] : []), "Planning"],
    rows.map((row) => [
      row.slots + (recorded.has(row.slots) ? " · this run" : ""), ratio(row.p50), ratio(row.p99), ratio(row.bound), few(row.replicas), share(row.remote),
      ...(sized ? [bytes(row.slot_bytes)] : []), seconds(row.plan_seconds),
    ]), null, rows.findIndex((row) => recorded.has(row.slots)));
}

// ---- layers ---------------------------------------------------------------------------------------------------
const LAYER_COLUMNS = [
  ["Layer", (l) => l.name, (v) => v], ["Records", (l) => l.summary.records, whole], ["Experts", (l) => l.experts, whole],
  ["Ranks", (l) => l.ranks, whole], ["Slots", (l) => l.slots, whole], ["Before p50", (l) => l.summary.before_p50, ratio],
  ["Before p99", (l) => l.summary.before_p99, ratio], ["After p50", (l) => l.summary.after_p50, ratio], ["After p99", (l) => l.summary.after_p99, ratio],
  ["Worst", (l) => l.summary.after_max, ratio], ["Bound", (l) => l.summary.lower_bound, ratio], ["Replicas", (l) => l.summary.replicas, few],
  ["Leave, before", (l) => l.summary.remote_before, share], ["Leave, after", (l) => l.summary.remote_after, share],
  ["Balancing", (l) => l.summary.balancing_seconds, seconds],
];
const sorting = { column: -1, down: false };

function drawLayers() {
  const order = layers.map((_, l) => l);
  if (sorting.column >= 0) {
    const value = LAYER_COLUMNS[sorting.column][1], sign = sorting.down ? -1 : 1;
    const key = (l) => value(layers[l]) ?? -1;
    order.sort((a, b) => sign * (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : a - b));
  }
  const target = $("layer-table");
  const rows = order.map((l) => LAYER_COLUMNS.map(([, value, show]) => show(value(layers[l]))));
  table(target, LAYER_COLUMNS.map(([name]) => name), rows, (i) => select({ layer: order[i] }), order.indexOf(state.layer));
  target.querySelectorAll("th").forEach((th, c) => {
    if (c === sorting.column) th.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    th.addEventListener("click", () => {
      sorting.down = sorting.column === c ? !sorting.down : c > 0;
      sorting.column = c;
      drawLayers();
    });
  });
}
function drawFooter() {
  const info = data.info, lines = [
    "Imbalance is max/mean of the ranks' loads in one record, a microbatch of a layer; percentiles run over records. Loads count routed rows: tokens times top-k. "
    + "Before: every row goes to its expert's master. After: as planned, with replicas.",
  ];
  if (info.stride > 1) lines.push(`To bound the trace, every ${info.stride}th microbatch of a layer was kept; ${whole(info.thinned)} records were left out.`);
  if (info.dropped) lines.push(`${whole(info.dropped)} records were dropped because copies from the device fell behind.`);
  lines.push("Keys: ← → microbatch, ↑ ↓ layer, b before or after. The address of this page keeps the selection. This file loads nothing from anywhere.");
  $("footer").replaceChildren(...lines.map((text) => element("p", text)));
}
