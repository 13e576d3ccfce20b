"use strict";
// Data, formatting, colours and the one place that draws a chart. Symbols as in the Python modules.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const TYPES = {
  u1: Uint8Array, i1: Int8Array, u2: Uint16Array, i2: Int16Array, u4: Uint32Array, i4: Int32Array,
  f4: Float32Array, f8: Float64Array,
};

/** A packed array as {values, shape, row(i)}; unpacked on first use. */
function unpack(packed) {
  if (!packed.values) {
    const text = atob(packed.d);
    const bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    packed.values = new TYPES[packed.t](bytes.buffer);
    packed.shape = packed.s;
    const width = packed.s.slice(1).reduce((a, b) => a * b, 1);
    packed.row = (i) => packed.values.subarray(i * width, (i + 1) * width);
    delete packed.d;
  }
  return packed;
}

// ---- formatting -----------------------------------------------------------------------------------------------
const known = (x) => x !== null && x !== undefined && Number.isFinite(x);
const ratio = (x) => (known(x) ? x.toFixed(x < 1.0995 ? 3 : 2) : "–");
const whole = (x) => (known(x) ? Math.round(x).toLocaleString("en-US") : "–");
const share = (x) => (known(x) ? (100 * x).toFixed(Math.abs(x) < 0.0995 && x !== 0 ? 1 : 0) + " %" : "–");
const few = (x) => (known(x) ? (x < 10 && x % 1 ? x.toFixed(1) : whole(x)) : "–");
function seconds(x) {
  if (!known(x)) return "–";
  if (x < 1e-3) return (x * 1e6).toPrecision(3) + " µs";
  return x < 1 ? (x * 1e3).toPrecision(3) + " ms" : x.toPrecision(3) + " s";
}
function bytes(x) {
  if (!known(x)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (x >= 1000 && unit < 4) { x /= 1000; unit++; }
  return (unit && x < 100 ? x.toPrecision(3) : Math.round(x)) + " " + units[unit];
}
/** Plotly reads a few tags in its labels; names from a model must stay text. */
const esc = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

/** Names without what all of them share, cut at dots: model.layers.3.mlp -> 3. */
function shortNames(names) {
  const parts = names.map((name) => name.split("."));
  const same = (index) => parts.every((p) => p.at(index) === parts[0].at(index));
  let head = 0, tail = 0;
  const least = Math.min(...parts.map((p) => p.length));
  if (names.length > 1) {
    while (head < least - 1 && same(head)) head++;
    while (tail < least - 1 - head && same(-1 - tail)) tail++;
  }
  const cut = parts.map((p) => p.slice(head, p.length - tail).join("."));
  const around = (list) => (list.length ? list.join(".") : "");
  return {
    short: cut.map((name) => (name.length > 32 ? "…" + name.slice(-31) : name)),
    pattern: head + tail ? [around(parts[0].slice(0, head)), "*", around(parts[0].slice(parts[0].length - tail))].filter(Boolean).join(".") : "",
  };
}
const layers = data.layers;
const { short, pattern } = layers.length ? shortNames(layers.map((layer) => layer.name)) : { short: [], pattern: "" };
/** How a layer is called in headings. */
const called = (l) => (pattern ? "layer " + short[l] : short[l]);

// ---- elements: text only, never markup from data --------------------------------------------------------------
function element(tag, text, cls) {
  const node = document.createElement(tag);
  if (text !== undefined && text !== null) node.textContent = text;
  if (cls) node.className = cls;
  return node;
}
function tiles(target, list) {
  target.replaceChildren(...list.map(([name, value, hint, cls]) => {
    const tile = element("div", null, "tile");
    tile.append(element("div", name, "name"), element("div", value, "value " + (cls || "")));
    if (hint !== undefined) { const h = element("div", hint, "hint"); h.title = hint; tile.append(h); }
    return tile;
  }));
}
/** Rows of plain text; `pick(i)` makes rows clickable. */
function table(target, head, rows, pick, chosen) {
  const top = element("thead"), line = element("tr"), body = element("tbody");
  line.append(...head.map((text) => element("th", text)));
  top.append(line);
  rows.forEach((row, i) => {
    const tr = element("tr", null, i === chosen ? "chosen" : "");
    tr.append(...row.map((text) => { const td = element("td", text); td.title = text; return td; }));
    if (pick) tr.addEventListener("click", () => pick(i));
    body.append(tr);
  });
  target.replaceChildren(top, body);
}

// ---- colours --------------------------------------------------------------------------------------------------
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = () => document.documentElement.dataset.theme === "dark";

/** OKLCH -> #rrggbb, so that hues look equally strong. */
function oklch(L, C, hue) {
  const h = (hue * Math.PI) / 180, a = C * Math.cos(h), b = C * Math.sin(h);
  const l = (L + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (L - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (L - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const rgb = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  return "#" + rgb.map((v) => {
    const c = v <= 0.0031308 ? 12.92 * v : 1.055 * Math.max(v, 0) ** (1 / 2.4) - 0.055;
    return Math.round(255 * Math.min(1, Math.max(0, c))).toString(16).padStart(2, "0");
  }).join("");
}
/** One hue per rank; `local` of `count` experts on it varies the lightness. */
function rankColour(rank, ranks, local = 0, count = 1) {
  const step = count > 1 ? local / (count - 1) - 0.5 : 0;
  const swing = ranks > 12 ? (rank % 2 ? 0.06 : -0.06) : 0;
  const L = (dark() ? 0.68 : 0.66) + swing + 0.2 * step;
  return oklch(L, 0.105, 35 + (360 * rank) / Math.max(ranks, 1));
}
/** A colour mixed into the card's background, for what lies under text. */
function faint(colour) {
  const mix = (i) => Math.round(0.4 * parseInt(colour.slice(i, i + 2), 16) + 0.6 * parseInt(css("--card").slice(i, i + 2), 16));
  return "#" + [1, 3, 5].map((i) => mix(i).toString(16).padStart(2, "0")).join("");
}
const heatScale = () => [[0, css("--heat0")], [0.25, css("--heat1")], [0.6, css("--heat2")], [1, css("--heat3")]];
const coolScale = () => [[0, css("--cool0")], [0.3, css("--cool1")], [0.65, css("--cool2")], [1, css("--cool3")]];

// ---- charts ---------------------------------------------------------------------------------------------------
const CONFIG = {
  responsive: true, displaylogo: false, displayModeBar: true,
  modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
};
function axis(title, more) {
  return {
    title: { text: title, font: { size: 12.5, color: css("--muted") }, standoff: 6 }, automargin: true,
    gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), tickcolor: css("--line"),
    tickfont: { size: 12, color: css("--muted") }, ...more,
  };
}
/** Draw or redraw a chart. `click(point)` is told of clicks. */
function plot(id, traces, layout, click) {
  const node = $(id);
  node.classList.remove("empty");
  if (!node.data) node.replaceChildren();
  const base = {
    font: { family: getComputedStyle(document.body).fontFamily, size: 12.5, color: css("--ink") },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 54, r: 14, t: 10, b: 42 },
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--line"), font: { size: 13, color: css("--ink") }, align: "left" },
    modebar: { bgcolor: css("--card"), color: css("--bound"), activecolor: css("--accent") },
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12.5 } },
    hovermode: "closest", barcornerradius: 1,
  };
  Plotly.react(node, traces, { ...base, ...layout }, CONFIG);
  if (click && !node.hasClick) {
    node.hasClick = true;
    node.on("plotly_click", (event) => event.points.length && node.onPick(event.points[0], event));
  }
  node.onPick = click;
}
/** A sentence in place of a chart. */
function empty(id, text) {
  const node = $(id);
  if (node.data) Plotly.purge(node);
  node.classList.add("empty");
  node.replaceChildren(element("p", text));
}
function colourbar(title, more) {
  return {
    title: { text: title, side: "right", font: { size: 12, color: css("--muted") } }, thickness: 10, outlinewidth: 0,
    tickfont: { size: 11.5, color: css("--muted") }, len: 0.9, ...more,
  };
}
