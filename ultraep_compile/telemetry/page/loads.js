// Loads over time, and the loads, experts and replicas of one microbatch.

const STACK_LIMIT = 24; // ranks with a legend and thin separating lines

function drawTime() {
  const layer = layers[state.layer], mbs = unpack(layer.microbatch).values;
  const index = unpack(layer.series.index).values, loads = unpack(layer.series[state.view]);
  const x = Array.from(index, (n) => mbs[n]);
  const every = index.length < layer.summary.records ? `Loads of every ${index[1] - index[0]}th record. ` : "";
  $("time-note").textContent = every + (state.time === "stack"
    ? "Bands of equal height mean balance; the lines above show max/mean of every record."
    : "Load of each rank relative to the mean: orange ranks have too much, teal ranks too little.");
  const line = (name, values, colour, more) => ({
    type: "scatter", mode: "lines", x: Array.from(mbs), y: Array.from(values), name, yaxis: "y2", line: { color: colour, width: 1.6, ...more },
    hovertemplate: "microbatch %{x}<br>%{y:.4f}<extra>" + name + "</extra>",
  });
  const r = layer.records;
  const lines = [
    line("before", unpack(r.before).values, css("--before")), line("after", unpack(r.after).values, css("--after")),
    { ...line("lower bound", unpack(r.bound).values, css("--bound"), { dash: "dot" }), connectgaps: true },
  ];
  const traces = state.time === "stack" ? stackTraces(layer, x, loads) : [loadMap(layer, x, loads)];
  const many = layer.ranks > STACK_LIMIT;
  plot("time", [...lines, ...traces], {
    xaxis: axis("Microbatch", { zeroline: false, anchor: "y", showgrid: false }),
    yaxis: axis(state.time === "stack" ? "Rows per rank, " + state.view : "Rank", {
      domain: [0, 0.7], zeroline: false, ...(state.time === "map" ? { autorange: "reversed", showgrid: false } : { rangemode: "tozero" }),
    }),
    yaxis2: axis("max/mean", { domain: [0.78, 1] }), barmode: "stack", bargap: x.length > 200 ? 0 : 0.08,
    legend: { orientation: "h", y: 1.01, yanchor: "bottom", x: 0, traceorder: "normal" }, uirevision: "time" + state.layer, margin: { l: 66, r: 14, t: many ? 30 : 34, b: 42 },
  }, (point) => select({ mb: nearest(mbs, point.x) }));
  markTime();
}
function stackTraces(layer, x, loads) {
  const R = layer.ranks, asArea = x.length * R > 4000;
  return [...Array(R)].map((_, rank) => {
    const y = x.map((_, i) => loads.row(i)[rank]), colour = rankColour(rank, R);
    const common = {
      x, y, name: "rank " + rank, showlegend: R <= STACK_LIMIT, hovertemplate: "microbatch %{x}<br>%{y:,} rows<extra>rank " + rank + "</extra>",
    };
    if (asArea) {
      return { ...common, type: "scatter", mode: "lines", stackgroup: "ranks", fillcolor: colour, line: { width: 0, color: colour, shape: "hvh" } };
    }
    return { ...common, type: "bar", marker: { color: colour, line: { width: 0 } } };
  });
}
function loadMap(layer, x, loads) {
  const R = layer.ranks;
  const mean = x.map((_, i) => loads.row(i).reduce((a, b) => a + b, 0) / R);
  const z = [...Array(R)].map((_, rank) => x.map((_, i) => (mean[i] ? loads.row(i)[rank] / mean[i] : 1)));
  return {
    type: "heatmap", x, y: [...Array(R)].map((_, r) => r), z, zmin: 0, zmid: 1, zmax: 2,
    colorscale: [[0, css("--cool3")], [0.25, css("--cool1")], [0.5, css("--heat0")], [0.7, css("--heat1")], [0.85, css("--heat2")], [1, css("--heat3")]],
    hovertemplate: "rank %{y}, microbatch %{x}<br>%{z:.3f} of the mean<extra></extra>",
    colorbar: colourbar("load / mean, " + state.view, { len: 0.7, y: 0.35 }),
  };
}
function markTime() {
  if (!$("time").data) return;
  Plotly.relayout("time", { shapes: [{
    type: "line", x0: state.mb, x1: state.mb, yref: "paper", y0: 0, y1: 1, line: { color: css("--select"), width: 1.5, dash: "dot" },
  }] });
}
/** The value of a sorted list that is nearest to `wanted`. */
function nearest(values, wanted) {
  let best = values[0];
  for (const v of values) if (Math.abs(v - wanted) < Math.abs(best - wanted)) best = v;
  return best;
}

// ---- one microbatch -------------------------------------------------------------------------------------------
/** Record and detail nearest to the chosen microbatch: {layer, n, d, mb, load, quota, slot, realised}. */
function chosenRecord() {
  const layer = layers[state.layer], mbs = unpack(layer.microbatch).values, detail = layer.detail;
  const index = unpack(detail.index).values;
  const mb = nearest(Array.from(index, (n) => mbs[n]), state.mb), d = index.findIndex((n) => mbs[n] === mb);
  const row = (name) => unpack(detail[name]).row(d);
  return { layer, n: index[d], d, mb, load: row("load"), quota: row("quota"), slot: row("slot"), realised: row("realised") };
}
const sum = (values) => values.reduce((a, b) => a + b, 0);

function drawRecord() {
  const record = chosenRecord(), { layer, n } = record, r = layer.records;
  const get = (name) => unpack(r[name]).values[n], rows = get("rows");
  document.querySelectorAll(".recordname").forEach((e) => { e.textContent = `· ${called(state.layer)}, microbatch ${whole(record.mb)}`; });
  $("record-note").textContent = record.mb === state.mb ? "" :
    `Microbatch ${whole(state.mb)} is not kept by expert in this report; this is the nearest that is.`;
  const gone = (a, b) => (a > b ? "−" + share(1 - b / a) : "unchanged");
  tiles($("record-tiles"), [
    ["Before", ratio(get("before")), "max/mean of ranks", "b"],
    ["After", ratio(get("after")), `bound ${ratio(get("bound"))}`, "a"],
    ["Busiest rank", `${whole(get("max_before"))} → ${whole(get("max_after"))}`, "rows, " + gone(get("max_before"), get("max_after"))],
    ["Rows routed", whole(rows), layer.facts.top_k ? `tokens × top-${layer.facts.top_k}` : "tokens × top-k"],
    ["Replicas", whole(get("replicas")), `in ${whole(layer.ranks * layer.slots)} slots`],
    ["Rows leaving rank", rows ? share(get("left_after") / rows) : "–", rows ? share(get("left_before") / rows) + " before" : ""],
  ]);
  const top = (...names) => 1.06 * Math.max(1, ...(state.scale === "one" ? ["max_before", "max_after"] : names).map(get));
  drawBars("bars-before", record, false, top("max_before"), "Before: max/mean " + ratio(get("before")));
  drawBars("bars-after", record, true, top("max_after"), "After: max/mean " + ratio(get("after")));
  drawReplicas();
}
function drawBars(id, record, after, top, title) {
  const { layer, load, quota, slot } = record, R = layer.ranks, M = layer.experts / R, S = layer.slots, L = M + S;
  const ranks = [...Array(R)].map((_, r) => r), rows = sum(load), traces = [];
  for (let local = 0; local < (after ? L : M); local++) {
    const expert = ranks.map((r) => (local < M ? r * M + local : slot[r * S + local - M]));
    const y = ranks.map((r) => (after ? quota[r * L + local] : load[r * M + local]));
    const home = expert.map((e) => Math.floor(e / M)), isSlot = local >= M;
    if (isSlot && expert.every((e) => e < 0)) continue;
    const colour = expert.map((e, r) => rankColour(e < 0 ? r : home[r], R, e < 0 ? 0 : e % M, M));
    traces.push({
      type: "bar", x: ranks, y, name: isSlot ? "slot " + (local - M) : "master " + local, showlegend: false,
      text: expert.map((e, r) => (e < 0 || y[r] < top * 0.075 ? "" : (R <= 12 ? "e" : "") + e)), textposition: "inside", insidetextanchor: "middle",
      textangle: 0, constraintext: "both", insidetextfont: { color: isSlot ? css("--ink") : dark() ? "#10151a" : "#ffffff", size: 12 },
      marker: {
        color: isSlot ? css("--bound") : colour,
        line: { color: css("--card"), width: R > 40 ? 0.4 : 1 },
        // With one marker colour Plotly takes the colours of the pattern bar by bar.
        pattern: isSlot ? { shape: "/", size: 7, solidity: 0.3, fillmode: "replace", fgcolor: colour, bgcolor: colour.map(faint) } : undefined,
      },
      customdata: expert.map((e, r) => [
        e, isSlot ? `slot ${local - M}, replica of an expert of rank ${home[r]}` : `master ${local}`, rows ? share(y[r] / rows) : "–",
        e < 0 ? "–" : whole(load[e]),
      ]),
      hovertemplate: "<b>rank %{x} · expert %{customdata[0]}</b><br>%{customdata[1]}<br>%{y:,} rows, %{customdata[2]} of all"
        + "<br>expert has %{customdata[3]} rows in all<extra></extra>",
    });
  }
  if (after && record.realised.some((v) => v >= 0)) {
    traces.push({
      type: "scatter", mode: "markers", x: ranks, y: Array.from(record.realised, (v) => (v < 0 ? null : v)), name: "realised",
      marker: { symbol: "line-ew-open", size: Math.max(6, Math.min(26, 420 / R)), color: css("--ink"), line: { width: 2 } },
      hovertemplate: "rank %{x} realised %{y:,} rows<extra></extra>", showlegend: false,
    });
  }
  const mean = rows / R;
  plot(id, traces, {
    barmode: "stack", bargap: R > 40 ? 0.08 : 0.18, uniformtext: { minsize: 9, mode: "hide" },
    xaxis: axis("Rank", { dtick: R <= 32 ? 1 : undefined, showgrid: false, zeroline: false, range: [-0.6, R - 0.4] }),
    yaxis: axis("Rows", { range: [0, top] }), margin: { l: 60, r: 12, t: 34, b: 42 },
    title: { text: title, font: { size: 14.5, color: css(after ? "--after" : "--before") }, x: 0, xanchor: "left", xref: "paper", y: 1, yref: "paper", yanchor: "bottom", pad: { b: 4 } },
    shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: mean, y1: mean, line: { color: css("--ink"), width: 1.2, dash: "dot" } }],
    annotations: [{
      xref: "paper", x: 1, y: 1, yref: "paper", xanchor: "right", yanchor: "bottom", text: "dotted: mean, " + whole(mean) + " rows" + (after && traces.at(-1)?.name === "realised" ? "; dash: realised" : ""),
      showarrow: false, font: { size: 12, color: css("--muted") },
    }],
  });
}

// ---- replicas -------------------------------------------------------------------------------------------------
const MAX_EXPERTS = 40;

/** Rows per expert and rank, of one detail record or the mean of all, and how often a copy was there. */
function copies(layer, details) {
  const R = layer.ranks, E = layer.experts, M = E / R, S = layer.slots, L = M + S;
  const rows = new Float64Array(E * R), seen = new Float64Array(E * R);
  for (const d of details) {
    const quota = unpack(layer.detail.quota).row(d), slot = unpack(layer.detail.slot).row(d);
    for (let e = 0; e < E; e++) rows[e * R + Math.floor(e / M)] += quota[Math.floor(e / M) * L + (e % M)];
    for (let r = 0; r < R; r++) for (let s = 0; s < S; s++) {
      const e = slot[r * S + s];
      if (e >= 0) { rows[e * R + r] += quota[r * L + M + s]; seen[e * R + r] += 1; }
    }
  }
  return { rows: rows.map((v) => v / details.length), seen: seen.map((v) => v / details.length) };
}
function drawReplicas() {
  const record = chosenRecord(), { layer } = record, R = layer.ranks, E = layer.experts, M = E / R;
  const all = state.map === "all", count = unpack(layer.detail.index).values.length;
  const { rows, seen } = copies(layer, all ? [...Array(count)].map((_, d) => d) : [record.d]);
  const away = (e) => sum(seen.subarray(e * R, (e + 1) * R));
  const moved = (e) => sum(rows.subarray(e * R, (e + 1) * R)) - rows[e * R + Math.floor(e / M)];
  const experts = [...Array(E)].map((_, e) => e).filter((e) => away(e) > 0);
  const chosen = experts.sort((a, b) => moved(b) - moved(a) || a - b).slice(0, MAX_EXPERTS);
  document.querySelectorAll(".scopename").forEach((e) => { e.textContent = all ? `· ${called(state.layer)}, ${whole(count)} microbatches` : `· ${called(state.layer)}, microbatch ${whole(record.mb)}`; });
  if (!chosen.length) {
    $("replica-note").textContent = "";
    return empty("replicas", "No expert was replicated here: the loads were balanced well enough as they came, or there are no slots.");
  }
  $("replica-note").textContent = (all ? "Mean rows per microbatch" : "Rows") + " of each replicated expert on each rank. A frame marks the expert's home."
    + (experts.length > MAX_EXPERTS ? ` The ${MAX_EXPERTS} of ${whole(experts.length)} experts that moved most.` : "");
  const height = Math.min(760, Math.max(340, 96 + 22 * chosen.length));
  $("replicas").style.height = height + "px";
  const y = chosen.map((_, i) => i), cell = (e, r) => rows[e * R + r], used = (e, r) => seen[e * R + r] > 0 || r === Math.floor(e / M);
  const z = chosen.map((e) => [...Array(R)].map((_, r) => (used(e, r) ? cell(e, r) : null)));
  const custom = chosen.map((e) => [...Array(R)].map((_, r) => [
    e, r === Math.floor(e / M) ? "home" : all ? "a copy in " + share(seen[e * R + r]) + " of microbatches" : "replica", few(cell(e, r)),
  ]));
  const cells = R * chosen.length <= 400;
  plot("replicas", [{
    type: "heatmap", x: [...Array(R)].map((_, r) => r), y, z, customdata: custom, colorscale: coolScale(), zmin: 0, zmax: Math.max(1e-9, ...z.flat()), hoverongaps: false, xgap: 1, ygap: 1,
    ...(cells ? { text: z.map((row) => row.map((v) => (v === null ? "" : whole(v)))), texttemplate: "%{text}", textfont: { size: 11.5 } } : {}),
    hovertemplate: "<b>expert %{customdata[0]} on rank %{x}</b><br>%{customdata[1]}<br>%{customdata[2]} rows<extra></extra>", colorbar: colourbar("rows"),
  }], {
    xaxis: axis("Rank", { showgrid: false, zeroline: false, dtick: R <= 24 ? 1 : undefined, range: [-0.5, R - 0.5] }),
    yaxis: axis("", { autorange: "reversed", showgrid: false, zeroline: false, tickmode: "array", ...thinTicks(y, chosen.map((e) => "expert " + e), MAX_EXPERTS) }),
    shapes: chosen.map((e, i) => ({
      type: "rect", x0: Math.floor(e / M) - 0.49, x1: Math.floor(e / M) + 0.49, y0: i - 0.48, y1: i + 0.48, line: { color: css("--before"), width: 2 },
    })),
    margin: { l: 70, r: 10, t: 6, b: 42 },
  });
}
