"""The HTML page of a replay: one file with its charts, its numbers and its formulas; it loads nothing."""

from __future__ import annotations

import html
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np

from ultraep_compile import cost_model
from ultraep_compile.html import json_text, plotly_script, script_policy

if TYPE_CHECKING:
    from ultraep_compile.replay.run import Outcome, Replayed

COLOURS = {
    "none": "#8a8a8a", "ideal": "#1b1b1b", "greedy": "#c98a1b", "eplb": "#b5485d", "lplb": "#7b5ea7", "quota": "#1f7a8c",
}  # fmt: skip
PHASES = {
    "gemm": ("products of the experts", "#1f7a8c"),
    "exchange": ("dispatch and combine", "#7fb7be"),
    "replicate": ("copies of weights", "#e3a857"),
    "reduce": ("gradients of copies", "#b5485d"),
    "plan": ("planning", "#4a4a4a"),
}


def page(result: Replayed) -> str:
    """The page as text."""
    plotly = plotly_script()
    best = [result.best(spec) for spec in result.question.specs]
    figures = {
        "time": _time(best),
        "imbalance": _imbalance(result, best),
        "slots": _slots(result),
        "traffic": _traffic(best),
    }
    first = result.source.sequences[0]
    return _PAGE.substitute(
        policy=script_policy(plotly, _SCRIPT),
        title=html.escape(f"{result.source.title}: what balancing would cost and save"),
        verdict=html.escape(verdict(result)),
        about=html.escape(about(result)),
        table=_table(result, best),
        formulas=html.escape(cost_model.explain(first.layer, result.question.rates, result.question.phase)),
        data=json_text(figures),
        plotly=plotly,
        script=_SCRIPT,
    )


def about(result: Replayed) -> str:
    """One line on what was replayed."""
    shapes = {s.counts_NRE.shape for s in result.source.sequences}
    layers = f"{len(result.source.sequences)} layers" if len(result.source.sequences) > 1 else "1 layer"
    if len(shapes) > 1:
        return f"{layers} of {len(shapes)} shapes, {result.question.phase}"
    _, ranks, experts = shapes.pop()
    where = f", domains of {result.question.domain} ranks" if result.question.domain else ""
    return (
        f"{layers}, {len(result.before) // len(result.source.sequences)} microbatches, {ranks} ranks, {experts} experts"
        f"{where}; {'forward and backward' if result.question.phase == 'train' else 'forward only'}"
    )


def verdict(result: Replayed) -> str:
    """What to do, in one or two sentences."""
    winner = result.winner()
    gain = result.none_us / winner.step_us if winner.step_us else 1.0
    if not winner.spec.uses_slots or gain < 1.001:
        return "Balancing does not pay here: the copies cost as much time as the even load saves. Use the planner none."
    text = f"Fastest: {winner.spec} with {_slot_words(winner.slots)} a rank, {gain:.2f} times as fast as without copies"
    ideal = [o for o in result.outcomes if o.spec.planner == "ideal"]
    if ideal:
        text += f", {ideal[0].step_us / winner.step_us:.0%} of the speed of perfectly even routing"
    even = winner.break_even_tokens
    return text + (f". It pays from {even:,.0f} tokens a rank on." if even is not None else ".")


def _slot_words(slots: int) -> str:
    return "1 slot" if slots == 1 else f"{slots} slots"


def _label(one: Outcome) -> str:
    return f"{one.spec}, {_slot_words(one.slots)}" if one.spec.uses_slots else str(one.spec)


def _colour(one: Outcome) -> str:
    return COLOURS.get(one.spec.planner, "#555555")


def _time(best: list[Outcome]) -> dict[str, Any]:
    scale, unit = (1e3, "ms") if max(o.step_us for o in best) > 5e3 else (1.0, "µs")
    x = [_label(o).replace(", ", "<br>") for o in best]
    traces = [
        {
            "type": "bar", "x": x, "y": [o.parts_us[name] / scale for o in best], "name": text,
            "marker": {"color": colour}, "hovertemplate": f"%{{x}}<br>%{{y:.3g}} {unit}<extra>{text}</extra>",
        }
        for name, (text, colour) in PHASES.items()
        if any(o.parts_us[name] for o in best)
    ]  # fmt: skip
    return {"data": traces, "layout": {"barmode": "stack", "yaxis": {"title": {"text": f"{unit} per microbatch"}}}}


def _imbalance(result: Replayed, best: list[Outcome]) -> dict[str, Any]:
    """Worst layer of each microbatch, by planner."""
    layers = len(result.source.sequences)
    lengths = {len(s.counts_NRE) for s in result.source.sequences}

    def worst(values: np.ndarray) -> list[float]:
        return (values.reshape(layers, -1).max(0) if len(lengths) == 1 else values).tolist()

    start = max(spec.history for spec in result.question.specs)
    lines = [("without copies", COLOURS["none"], worst(result.before))]
    lines += [(_label(o), _colour(o), worst(o.imbalance)) for o in best if o.spec.uses_slots]
    traces = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x0": start, "y": y, "line": {"color": colour, "width": 2, "shape": "hvh"},
            "hovertemplate": "microbatch %{x}<br>%{y:.3f}<extra>" + name + "</extra>",
        }
        for name, colour, y in lines
    ]  # fmt: skip
    what = "microbatch" if len(lengths) == 1 else "record"
    return {
        "data": traces,
        "layout": {"xaxis": {"title": {"text": what}}, "yaxis": {"title": {"text": "max / mean"}, "rangemode": "normal"}},
    }


def _slots(result: Replayed) -> dict[str, Any]:
    scale, unit = (1e3, "ms") if result.none_us > 5e3 else (1.0, "µs")
    traces = []
    for spec in result.question.specs:
        mine = [o for o in result.outcomes if o.spec == spec]
        if spec.uses_slots:
            x, y = [0, *(o.slots for o in mine if o.slots)], [o.step_us / scale for o in mine if o.slots]
            traces.append(
                {
                    "type": "scatter", "mode": "lines+markers", "name": str(spec), "x": x, "y": [result.none_us / scale, *y],
                    "line": {"color": _colour(mine[0]), "width": 2},
                    "hovertemplate": f"%{{x}} slots<br>%{{y:.4g}} {unit}<extra>{spec}</extra>",
                }
            )  # fmt: skip
        elif spec.planner == "ideal":
            x = [0, max(result.question.slots)]
            traces.append(
                {
                    "type": "scatter", "mode": "lines", "name": "ideal", "x": x, "y": [mine[0].step_us / scale] * 2,
                    "line": {"color": COLOURS["ideal"], "width": 1.5, "dash": "dot"}, "hoverinfo": "skip",
                }
            )  # fmt: skip
    return {
        "data": traces,
        "layout": {
            "xaxis": {"title": {"text": "slots a rank"}, "dtick": 1},
            "yaxis": {"title": {"text": f"{unit} per microbatch"}},
        },
    }


def _traffic(best: list[Outcome]) -> dict[str, Any]:
    kinds = {
        "domain_bytes": ("rows within domains", "#7fb7be"),
        "network_bytes": ("rows between domains", "#1f7a8c"),
        "copy_bytes": ("weights of copies", "#e3a857"),
    }
    x = [_label(o).replace(", ", "<br>") for o in best]
    traces = [
        {
            "type": "bar", "x": x, "y": [getattr(o, name) / 1e9 for o in best], "name": text, "marker": {"color": colour},
            "hovertemplate": f"%{{x}}<br>%{{y:.3g}} GB<extra>{text}</extra>",
        }
        for name, (text, colour) in kinds.items()
        if any(getattr(o, name) for o in best)
    ]  # fmt: skip
    return {
        "data": traces,
        "layout": {"barmode": "stack", "yaxis": {"title": {"text": "GB per microbatch, forward, all ranks"}}},
    }


HEADS = (
    "planner", "slots", "imbalance, median", "worst", "copies", "into one rank", "from one rank", "leave rank", "step, µs",
    "times as fast", "slots, MB", "buffers, MB", "pays from, tokens a rank",
)  # fmt: skip


def cells(result: Replayed, one: Outcome) -> list[str]:
    """One row of the table, under `HEADS`."""
    mb = 1e6
    even = one.break_even_tokens
    pays = "" if not one.spec.uses_slots else "never" if even is None else f"{even:,.0f}"
    return [
        str(one.spec),
        str(one.slots) if one.spec.uses_slots else "",
        f"{np.median(one.imbalance):.3f}",
        f"{one.imbalance.max():.3f}",
        f"{one.replicas:,.1f}",
        str(one.max_ingress),
        str(one.max_egress),
        f"{one.remote_share:.1%}",
        f"{one.step_us:,.0f}",
        f"{result.none_us / one.step_us:.2f}" if one.step_us else "",
        f"{one.slot_bytes / mb:,.1f}",
        f"{one.buffer_bytes / mb:,.1f}",
        pays,
    ]


def _table(result: Replayed, best: list[Outcome]) -> str:
    rows = ["<tr>" + "".join(f"<th>{html.escape(head)}</th>" for head in HEADS) + "</tr>"]
    for one in result.outcomes:
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells(result, one))
        rows.append(f'<tr class="best">{row}</tr>' if one in best and one.spec.uses_slots else f"<tr>{row}</tr>")
    return "\n".join(rows)


_SCRIPT = """
const figures = JSON.parse(document.getElementById("data").textContent);
const base = {
  font: {family: "system-ui, sans-serif", size: 12, color: "#333"}, paper_bgcolor: "#fff", plot_bgcolor: "#fff",
  margin: {l: 64, r: 12, t: 40, b: 46}, legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, traceorder: "normal"}, bargap: 0.35,
};
for (const [name, figure] of Object.entries(figures)) {
  const layout = {...base, ...figure.layout};
  layout.xaxis = {linecolor: "#999", ticks: "outside", ticklen: 4, tickcolor: "#999", showgrid: false, ...figure.layout.xaxis};
  layout.yaxis = {gridcolor: "#e8e8e8", zeroline: false, rangemode: "tozero", ...figure.layout.yaxis};
  Plotly.newPlot(name, figure.data, layout, {displayModeBar: false, responsive: true});
}
"""

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src $policy">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light">
<title>$title</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #f6f6f4; margin: 0 auto;
  padding: 18px 24px 48px; max-width: 1400px; }
h1 { font-size: 21px; margin: 0 0 2px; }
h2 { font-size: 15px; margin: 0 0 2px; }
p { margin: 0 0 10px; color: #555; }
.verdict { font-size: 16px; color: #14505c; margin: 10px 0 16px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(520px, 1fr)); gap: 14px; }
.card { background: #fff; border: 1px solid #e2e2de; border-radius: 8px; padding: 14px 16px; min-width: 0; }
.card p { font-size: 12.5px; }
.plot { height: 330px; }
.wide { margin-top: 14px; overflow-x: auto; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e6e6e2; white-space: nowrap; }
th { font-weight: 600; color: #555; }
td:first-child, th:first-child { text-align: left; }
tr.best td { background: #eef6f7; }
pre { font: 12px/1.5 ui-monospace, monospace; margin: 0; white-space: pre; }
</style></head><body>
<h1>$title</h1>
<p>$about</p>
<p class="verdict">$verdict</p>
<noscript><p>The charts need the JavaScript inside this file; the table below does not.</p></noscript>
<div class="grid">
<div class="card"><h2>Where the time goes</h2><p>Predicted time of all MoE layers, each planner with its best number of slots.</p>
<div id="time" class="plot"></div></div>
<div class="card"><h2>Imbalance over time</h2><p>Busiest rank over the mean; the worst layer of each microbatch.</p>
<div id="imbalance" class="plot"></div></div>
<div class="card"><h2>How many slots</h2><p>Predicted time by redundant experts a rank.</p><div id="slots" class="plot"></div></div>
<div class="card"><h2>Traffic</h2><p>Bytes that leave a rank.</p><div id="traffic" class="plot"></div></div>
</div>
<div class="card wide"><h2>All numbers</h2>
<p>Copies and bytes per microbatch over all layers. Shaded: the fastest number of slots of a planner.</p>
<table>$table</table></div>
<div class="card wide"><h2>The formulas</h2><p>Numbers of the first layer.</p><pre>$formulas</pre></div>
<script type="application/json" id="data">$data</script>
<script>$plotly</script>
<script>$script</script>
</body></html>
""")
