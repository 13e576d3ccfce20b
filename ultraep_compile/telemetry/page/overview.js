// Tiles, the run's own curves, the map of all records, the histogram.

function drawHeader() {
  const s = data.summary, l = s.loads, info = data.info;
  const started = info.started ? new Date(info.started * 1000).toISOString().slice(0, 16).replace("T", " ") + " UTC" : "";
  $("subtitle").textContent = [started, info.torch ? "torch " + info.torch : ""].filter(Boolean).join(" · ");
  if (!s.records) {
    $("verdict").textContent =
      "There was nothing to balance: no MoE layer was recorded. A dense model compiles and runs as it would without balancing.";
    tiles($("tiles"), [["Records", "0"], ["Layers", "0"], ["Ranks", "0"]]);
    return;
  }
  const saved = l.busiest_rows_before ? 1 - l.busiest_rows_after / l.busiest_rows_before : 0;
  const verdict = $("verdict");
  const bit = (text, cls) => verdict.append(cls ? Object.assign(element("b", text), { className: cls }) : text);
  bit("In the median record the busiest rank had ");
  bit(ratio(l.before_p50) + "×", "b");
  bit(" the mean load; balanced, it has ");
  bit(ratio(l.after_p50) + "×", "a");
  bit(`, where no plan with these slots can go below ${ratio(l.lower_bound)}×. `);
  if (saved > 0.0005) {
    bit("Summed over the run, the rank that all others wait for computes ");
    bit(share(saved) + " fewer", "a");
    bit(" rows.");
  }
  const slots = [...new Set(layers.map((layer) => layer.slots))].sort((a, b) => a - b);
  tiles($("tiles"), [
    ["Records", whole(s.records), info.seen > s.records ? `of ${whole(info.seen)} microbatches` : "layers × microbatches"],
    ["Layers", whole(s.layers), "with routed experts"],
    ["Ranks", whole(s.ranks), slots.join("–") + (slots.at(-1) === 1 ? " slot each" : " slots each")],
    ["Before, p50", ratio(l.before_p50), `p99 ${ratio(l.before_p99)}`, "b"],
    ["After, p50", ratio(l.after_p50), "max/mean of ranks", "a"],
    ["After, p99", ratio(l.after_p99), `worst ${ratio(l.after_max)}`, "a"],
    ["Lower bound", ratio(l.lower_bound), "median over records"],
    ["Replicas", few(l.replicas), "per record, mean"],
    ["Rows leaving rank", share(l.remote_after), `${share(l.remote_before)} before`],
    ["Balancing time", seconds(l.balancing_seconds), "per record, mean"],
  ]);
}

function drawRun() {
  $("run").hidden = !(data.notes.length || data.curves.length);
  $("notes-card").hidden = !data.notes.length;
  $("notes").replaceChildren(...data.notes.map((note) => {
    const line = element("p"), cut = note.indexOf(": ");
    if (cut > 0 && cut < 40) {
      line.className = "fact";
      line.append(element("b", note.slice(0, cut)), element("span", note.slice(cut + 2)));
    }
    else line.textContent = note;
    return line;
  }));
  const groups = [...new Set(data.curves.map((curve) => curve.group))];
  groups.forEach((group, g) => {
    const curves = data.curves.filter((curve) => curve.group === group);
    if (!$("curves" + g)) {
      const card = element("div", null, "card " + (groups.length === 1 ? "span12" : "span6"));
      const chart = element("div", null, "plot h300");
      chart.id = "curves" + g;
      card.append(element("h2", group.charAt(0).toUpperCase() + group.slice(1) || "Curves"), element("p", sameness(curves) || "\u00a0", "muted"), chart);
      $("run").append(card);
    }
    const same = sameness(curves), rate = group.includes("/");
    const colours = [css("--after"), css("--before"), css("--bound"), oklch(0.62, 0.13, 300), oklch(0.62, 0.13, 140)];
    // Of equal curves the first is broad and pale and the second thin, so that both can be seen.
    plot("curves" + g, curves.map((curve, i) => ({
      x: curve.x, y: curve.y, name: esc(curve.name), mode: curve.x.length === 1 ? "markers" : "lines",
      line: { color: colours[i % 5], width: same && !i ? 7 : 1.8 }, opacity: same && !i ? 0.4 : 1,
      hovertemplate: "%{y:.6g} at step %{x}<extra>" + esc(curve.name) + "</extra>",
    })), { xaxis: axis("Step"), yaxis: axis("", { rangemode: rate ? "tozero" : "normal" }), hovermode: "x unified" });
  });
}
/** How much two curves over the same steps differ, in words. */
function sameness(curves) {
  if (curves.length !== 2 || curves[0].x.length !== curves[1].x.length) return "";
  let worst = 0, points = 0;
  for (let i = 0; i < curves[0].x.length; i++) {
    const a = curves[0].y[i], b = curves[1].y[i];
    if (curves[0].x[i] !== curves[1].x[i]) return "";
    if (a === null || b === null) continue;
    worst = Math.max(worst, Math.abs(a - b) / Math.max(Math.abs(a), Math.abs(b), 1e-300));
    points++;
  }
  if (!points || worst > 0.01) return "";
  const difference = worst ? "differ by at most " + worst.toExponential(1) + " relative" : "are equal to the last bit";
  return `The two curves ${difference}, over ${whole(points)} points.`;
}

// ---- all records ----------------------------------------------------------------------------------------------
const MAX_COLUMNS = 1500;
let heatColumns = null;

/** Microbatch indices of all layers, in order; in very long runs several share a column (the worst counts). */
function columns() {
  if (heatColumns) return heatColumns;
  const all = [...new Set(layers.flatMap((layer) => Array.from(unpack(layer.microbatch).values)))].sort((a, b) => a - b);
  const size = Math.ceil(all.length / MAX_COLUMNS) || 1;
  const place = new Map(all.map((mb, i) => [mb, Math.floor(i / size)]));
  heatColumns = { x: all.filter((_, i) => i % size === 0), place };
  return heatColumns;
}
function heatRows(name) {
  const { x, place } = columns();
  const record = layers.map(() => new Array(x.length).fill(null));
  const z = layers.map((layer, l) => {
    const row = new Array(x.length).fill(null), value = unpack(layer.records[name]).values;
    unpack(layer.microbatch).values.forEach((mb, n) => {
      const c = place.get(mb);
      if (row[c] === null || value[n] > row[c]) { row[c] = value[n]; record[l][c] = n; }
    });
    return row;
  });
  return { x, z, record };
}
function drawHeat() {
  const { x, z, record } = heatRows(state.view);
  const scaled = state.scale === "own" ? state.view : "before";
  const most = Math.max(1.01, ...layers.map((layer) => layer.summary[scaled + "_p99"]));
  const height = Math.min(1000, Math.max(468, 84 + 9 * layers.length));
  $("heat").style.height = height + "px";
  layers.forEach((layer) => { unpack(layer.records.before); unpack(layer.records.after); });
  const custom = z.map((row, l) => row.map((_, c) => {
    const n = record[l][c], r = layers[l].records;
    return n === null ? ["", "", ""] : [unpack(layers[l].microbatch).values[n], ratio(r.before.values[n]), ratio(r.after.values[n])];
  }));
  const y = short.map((_, l) => l);
  plot("heat", [{
    type: "heatmap", x, y, z, customdata: custom, colorscale: heatScale(), zmin: 1, zmax: most, hoverongaps: false,
    text: z.map((row, l) => row.map(() => esc(layers[l].name))),
    hovertemplate: "%{text}<br>microbatch %{customdata[0]}<br>before %{customdata[1]}, after %{customdata[2]}<extra></extra>",
    colorbar: colourbar("max/mean, " + state.view),
  }], {
    xaxis: axis("Microbatch", { showgrid: false, zeroline: false }),
    yaxis: axis(esc(pattern), {
      autorange: "reversed", showgrid: false, zeroline: false, tickmode: "array",
      ...thinTicks(y, short.map(esc), Math.floor(height / 18)),
    }),
    uirevision: "heat", margin: { l: 60, r: 10, t: 8, b: 42 },
  }, (point) => {
    const l = point.y, row = record[l], c = point.pointIndex[1];
    if (row[c] !== null) select({ layer: l, mb: unpack(layers[l].microbatch).values[row[c]] });
  });
  markHeat();
}
/** At most `most` tick labels, evenly. */
function thinTicks(values, texts, most) {
  const step = Math.ceil(values.length / most) || 1;
  const keep = (_, i) => i % step === 0;
  return { tickvals: values.filter(keep), ticktext: texts.filter(keep) };
}
function markHeat() {
  if (!$("heat").data) return;
  const { x, place } = columns();
  const c = place.get(state.mb) ?? 0, half = (i) => (x.length > 1 ? ((x[i + 1] ?? 2 * x[i] - x[i - 1]) - x[i]) / 2 : 0.5);
  const left = x[c] - half(Math.max(0, c - 1)), right = x[c] + half(c);
  const pad = Math.max(0, ((x.at(-1) - x[0]) / 160 - (right - left)) / 2);
  Plotly.relayout("heat", { shapes: [{
    type: "rect", x0: left - pad, x1: right + pad, y0: state.layer - 0.5, y1: state.layer + 0.5,
    line: { color: css("--select"), width: 2 },
  }] });
}

function drawHist() {
  const chosen = state.hist === "layer" ? [layers[state.layer]] : layers;
  const values = (name) => chosen.flatMap((layer) => Array.from(unpack(layer.records[name]).values));
  const before = values("before"), after = values("after");
  const sorted = [...before].sort((a, b) => a - b);
  const top = Math.max(sorted[Math.floor(0.995 * (sorted.length - 1))], after.reduce((a, b) => Math.max(a, b), 1), 1.05);
  const bins = 36, size = (top - 1) / bins;
  const count = (list) => {
    const bars = new Array(bins).fill(0);
    for (const v of list) bars[Math.min(bins - 1, Math.max(0, Math.floor((v - 1) / size)))] += 1 / list.length;
    return bars;
  };
  const x = [...Array(bins)].map((_, i) => 1 + (i + 0.5) * size);
  const text = x.map((v) => `${(v - size / 2).toFixed(2)} to ${(v + size / 2).toFixed(2)}`);
  const numbers = state.hist === "layer" ? layers[state.layer].summary : data.summary.loads;
  const bars = (name, list, yaxis) => ({
    type: "bar", x, y: count(list), name, yaxis, width: size, marker: { color: css("--" + name), line: { width: 0 } }, showlegend: false,
    customdata: text, hovertemplate: "max/mean %{customdata}<br>%{y:.1%} of records<extra>" + name + "</extra>",
  });
  const label = (name, y) => ({
    xref: "paper", x: 1, xanchor: "right", yref: "paper", y, yanchor: "top", showarrow: false, align: "right",
    text: `<b>${name}</b>, median ${ratio(numbers[name + "_p50"])}`, font: { size: 13, color: css("--" + name) },
  });
  const scale = (domain) => axis("", { tickformat: ".0%", domain, nticks: 4, rangemode: "tozero" });
  plot("hist", [bars("before", before, "y2"), bars("after", after, "y")], {
    bargap: 0, margin: { l: 48, r: 8, t: 6, b: 40 }, yaxis: scale([0, 0.44]), yaxis2: scale([0.56, 1]),
    xaxis: axis("max/mean of ranks", { zeroline: false, showgrid: false, range: [1 - size * 0.6, top + size * 0.6] }),
    annotations: [label("before", 1), label("after", 0.44)],
  });
}
function drawWorst() {
  const all = [];
  layers.forEach((layer, l) => unpack(layer.records[state.view]).values.forEach((v, n) => all.push([v, l, n])));
  all.sort((a, b) => b[0] - a[0] || a[1] - b[1] || a[2] - b[2]);
  const worst = all.slice(0, 5), mb = (l, n) => unpack(layers[l].microbatch).values[n];
  table($("worst"), ["Layer", "Microbatch", "Before", "After"], worst.map(([, l, n]) => [
    short[l], whole(mb(l, n)), ratio(unpack(layers[l].records.before).values[n]), ratio(unpack(layers[l].records.after).values[n]),
  ]), (i) => select({ layer: worst[i][1], mb: mb(worst[i][1], worst[i][2]) }));
}
