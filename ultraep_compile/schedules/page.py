"""Schedules as one self-contained HTML page: timelines, memory per rank, comparison. It loads nothing from
elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from string import Template
from typing import Any

from ultraep_compile.schedules.memory import memory_curves
from ultraep_compile.schedules.picture import COLOURS, CURVES, LABELS
from ultraep_compile.schedules.report import Report
from ultraep_compile.schedules.simulate import CAUSES, bubbles


def page(reports: Sequence[Report], title: str = "Pipeline schedules", above: str = "", compare: bool = True) -> str:
    """The page of one schedule, or of several beside one another.

    Args:
        above: HTML that stands between the title and the table.
        compare: say how much faster the first one is; without sense where all are the same schedule.
    """
    data = {
        "schedules": [_data(report) for report in reports],
        "colours": COLOURS,
        "labels": LABELS,
        "curves": CURVES,
        "longest": max(r.makespan for r in reports),
    }
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return _PAGE.substitute(title=html.escape(title), above=above, table=_table(reports, compare), data=text)


def _data(report: Report) -> dict[str, Any]:
    schedule, timeline = report.schedule, report.timeline
    rows = []
    for ops, starts, ends in zip(schedule.ranks, timeline.start, timeline.end, strict=True):
        rows.append(
            [[op.kind, str(op), round(s, 6), round(e, 6)] for op, s, e in zip(ops, starts, ends, strict=True)]
        )
    return {
        "method": schedule.method,
        "note": schedule.note,
        "makespan": report.makespan,
        "rows": rows,
        "memory": memory_curves(timeline),
        "bubbles": bubbles(timeline),
    }


def _table(reports: Sequence[Report], compare: bool) -> str:
    first = reports[0]
    faster = [f"{first.schedule.method} is faster by"] if compare else []
    head = ["method", "makespan", *faster, "x ideal", "x lower bound", "idle"]
    head += ["encoder held", "LLM held", "generator held", *(f"idle: {cause}" for cause in CAUSES)]
    lines = ["<tr>" + "".join(f"<th>{h}</th>" for h in head) + "</tr>"]
    for r in reports:
        area = len(r.schedule.ranks) * r.makespan
        idle = bubbles(r.timeline)
        cells = [f"{r.makespan:.5g}", *([f"{r.makespan / first.makespan:.2f}x"] if compare else [])]
        cells += [f"{r.makespan / r.ideal:.3f}", f"{r.makespan / r.lower_bound:.3f}", f"{r.timeline.bubble:.1%}"]
        cells += [f"{max(held):.3g}" for held in (r.peak.encoder, r.peak.llm, r.peak.generator)]
        cells += [f"{sum(rank[cause] for rank in idle) / area:.1%}" for cause in CAUSES]
        name, note = html.escape(r.schedule.method), html.escape(r.schedule.note)
        row = f'<td class="name" title="{note}">{name}</td>' + "".join(f"<td>{x}</td>" for x in cells)
        lines.append(f"<tr>{row}</tr>")
    return "\n".join(lines)


_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>$title</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body {
  font: 14px/1.45 system-ui, sans-serif; color: #1b1b1b;
  margin: 0 auto; padding: 16px 24px 48px; max-width: 1600px;
}
h1 { font-size: 20px; margin: 0 0 4px; }
h2 { font-size: 15px; margin: 24px 0 2px; }
p { margin: 0 0 10px; color: #555; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { font-weight: 600; color: #444; }
td.name, th:first-child { text-align: left; }
td.name { font-weight: 600; }
.scroll { overflow-x: auto; }
canvas { width: 100%; display: block; background: #f2f2f2; border-radius: 4px; cursor: crosshair; }
canvas.memory { background: #fafafa; margin-top: 4px; height: 88px; }
#legend { margin-top: 14px; }
#legend span { display: inline-block; margin-right: 16px; }
#legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 5px; }
#tip {
  position: fixed; display: none; z-index: 2; pointer-events: none; white-space: pre;
  background: #1b1b1b; color: #fff; padding: 5px 9px; border-radius: 4px; font-size: 12px;
}
button { font: inherit; padding: 2px 10px; }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e6e6e6; }
  p, th { color: #aaa; }
  th, td { border-color: #333; }
  canvas { background: #24272b; }
  canvas.memory { background: #1c1f22; }
}
</style></head><body>
<h1>$title</h1>
$above
<p>One row per rank, time to the right, all on one axis. Wheel over a timeline to zoom, drag to move, point
at an operation to see what it is. Below each timeline: what its ranks hold (strong line: the fullest).</p>
<div class="scroll"><table>$table</table></div>
<p id="legend"></p>
<p><button id="reset">whole step</button></p>
<div id="charts"></div><div id="tip"></div>
<script>
const D = $data;
const dark = matchMedia("(prefers-color-scheme: dark)").matches;
const ink = dark ? "#ddd" : "#222", paper = dark ? "#1c1f22" : "#fafafa", LEFT = 54;
const tip = document.getElementById("tip");
const whole = () => [0, D.longest * 1.01];
let view = whole(), drag = null;

const used = new Set(D.schedules.flatMap(s => s.rows.flat().map(o => o[0])));
document.getElementById("legend").innerHTML = Object.keys(D.labels).filter(k => used.has(k))
  .map(k => `<span><i style="background:$${D.colours[k]}"></i>$${D.labels[k]}</span>`).join("");

const charts = D.schedules.map(s => {
  const make = (tag, text) => Object.assign(document.createElement(tag), {textContent: text || ""});
  const box = make("div"), rows = make("canvas"), held = make("canvas");
  box.append(make("h2", s.method), make("p", s.note), rows, held);
  document.getElementById("charts").append(box);
  held.className = "memory";
  rows.style.height = Math.max(60, Math.min(30, 480 / s.rows.length + 6) * s.rows.length) + "px";
  for (const el of [rows, held]) {
    el.addEventListener("wheel", e => zoom(el, e), {passive: false});
    el.addEventListener("mousedown", e => { drag = [e.clientX, ...view]; });
    el.addEventListener("mousemove", e => move(el, e));
    el.addEventListener("mouseleave", () => { tip.style.display = "none"; });
  }
  rows.addEventListener("mousemove", e => point(s, rows, e));
  return [s, rows, held];
});
addEventListener("mouseup", () => { drag = null; });
addEventListener("resize", draw);
document.getElementById("reset").onclick = () => { view = whole(); draw(); };

function time(el, e) {
  const b = el.getBoundingClientRect();
  return view[0] + (e.clientX - b.left - LEFT) / (b.width - LEFT) * (view[1] - view[0]);
}
function zoom(el, e) {
  e.preventDefault();
  const t = time(el, e), k = Math.exp(Math.sign(e.deltaY) * 0.18);
  view = [t - (t - view[0]) * k, t + (view[1] - t) * k];
  draw();
}
function move(el, e) {
  if (!drag) return;
  const dt = (drag[0] - e.clientX) / (el.clientWidth - LEFT) * (drag[2] - drag[1]);
  view = [drag[1] + dt, drag[2] + dt];
  draw();
}
function point(s, c, e) {
  const b = c.getBoundingClientRect(), t = time(c, e);
  const r = Math.floor((e.clientY - b.top) / b.height * s.rows.length);
  const o = (s.rows[r] || []).find(o => o[2] <= t && t < o[3]);
  tip.style.display = o && !drag ? "block" : "none";
  if (!o) return;
  tip.textContent = `$${o[1]}  $${D.labels[o[0]]}\\nrank $${r}, $${o[2]} to $${o[3]}`;
  tip.style.left = Math.min(e.clientX + 14, innerWidth - 220) + "px";
  tip.style.top = e.clientY + 14 + "px";
}
function prepare(c) {
  const k = devicePixelRatio || 1, w = c.clientWidth, h = c.clientHeight, g = c.getContext("2d");
  c.width = w * k;
  c.height = h * k;
  g.scale(k, k);
  g.font = "10px system-ui, sans-serif";
  g.textBaseline = "middle";
  return [g, t => LEFT + (t - view[0]) / (view[1] - view[0]) * (w - LEFT), w, h];
}
function draw() {
  for (const [s, rows, held] of charts) { timeline(s, rows); memory(s, held); }
}
function timeline(s, c) {
  const [g, x, w, h] = prepare(c), step = h / s.rows.length;
  s.rows.forEach((row, r) => {
    const y = r * step;
    for (const [kind, name, a, b] of row) {
      const u = Math.max(x(a), LEFT), v = Math.min(x(b), w);
      if (v <= LEFT || u >= w || v - u < 0.05) continue;
      g.fillStyle = D.colours[kind];
      g.fillRect(u, y + 1, Math.max(v - u - 0.6, 0.4), step - 2);
      const text = v - u > 46 ? name : name.replace(/^\\d+[A-Z]+/, "");
      if (step < 11 || g.measureText(text).width > v - u - 3) continue;
      g.fillStyle = kind == "B" || kind == "I" ? "#fff" : "#111";
      g.textAlign = "center";
      g.fillText(text, (u + v) / 2, y + step / 2);
    }
    g.textAlign = "right";
    g.fillStyle = ink;
    if (step > 9 || r % 4 == 0) g.fillText("rank " + r, LEFT - 8, y + step / 2);
  });
  g.strokeStyle = ink;
  g.setLineDash([3, 3]);
  g.beginPath();
  g.moveTo(x(s.makespan), 0);
  g.lineTo(x(s.makespan), h);
  g.stroke();
}
function fullest(rows) {
  const now = rows.map(() => 0);
  return rows.flatMap((points, r) => points.map(([t, v]) => [t, r, v])).sort((a, b) => a[0] - b[0])
    .map(([t, r, v]) => { now[r] = v; return [t, Math.max(...now)]; });
}
function steps(g, x, y, points) {
  g.beginPath();
  points.forEach(([t, v], i) => {
    if (i) g.lineTo(x(t), y(points[i - 1][1]));
    else g.moveTo(x(t), y(v));
    g.lineTo(x(t), y(v));
  });
  g.stroke();
}
function memory(s, c) {
  const [g, x, w, h] = prepare(c), labels = [];
  const top = Math.max(...s.memory.flatMap(m => Object.values(m).flat().map(p => p[1]))) * 1.12 || 1;
  const y = v => h - 8 - v / top * (h - 16);
  g.save();
  g.beginPath();
  g.rect(LEFT, 0, w - LEFT, h);
  g.clip();
  for (const what of Object.keys(D.curves)) {
    const rows = s.memory.map(m => m[what]).filter(Boolean);
    if (!rows.length) continue;
    const most = fullest(rows);
    labels.push([what, Math.max(...most.map(p => p[1]))]);
    g.strokeStyle = D.curves[what];
    g.globalAlpha = 0.22;
    g.lineWidth = 0.8;
    for (const points of rows) steps(g, x, y, points);
    g.globalAlpha = 1;
    g.lineWidth = 2;
    steps(g, x, y, most);
  }
  g.textAlign = "right";
  labels.forEach(([what, v], i) => {
    const text = `$${what}: at most $${+v.toFixed(3)}`;
    g.fillStyle = paper;
    g.fillRect(w - 14 - g.measureText(text).width, 3 + 13 * i, g.measureText(text).width + 10, 13);
    g.fillStyle = D.curves[what];
    g.fillText(text, w - 8, 10 + 13 * i);
  });
  g.restore();
  g.fillStyle = ink;
  g.textAlign = "right";
  g.fillText("held", LEFT - 8, 10);
  g.fillText("0", LEFT - 8, y(0));
}
draw();
</script></body></html>
""")
