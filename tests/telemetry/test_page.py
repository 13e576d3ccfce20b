"""The report in a real browser: nothing fails, nothing is loaded, and every control does what it says."""

from __future__ import annotations

import pytest
from browser import FOUND, Page
from synthetic_traces import record_run
from test_report import HOSTILE

from ultraep_compile.telemetry import Recorder, Trace, write_report

pytestmark = [pytest.mark.slow, pytest.mark.skipif(FOUND is None, reason="needs Chromium")]
READY = "document.documentElement.dataset.ready === 'yes'"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    trace = record_run(Recorder(folder / "t.npz"), layers=4, microbatches=20)
    write_report(trace, folder / "report.html", curves={"loss: a": ([0, 1], [2.0, 1.0])}, notes=["a: b"])
    return folder / "report.html"


def check(page: Page) -> None:
    assert page.problems == []
    assert [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))] == []


def test_all_charts_are_drawn_and_nothing_is_loaded(report):
    with Page(report) as page:
        page.wait(READY)
        drawn = page.js(
            "[...document.querySelectorAll('.plot')].filter((n) => n.data || n.textContent).length"
        )
        assert drawn == page.js("document.querySelectorAll('.plot').length") == 12
        check(page)


def test_address_selects_layer_microbatch_and_view(report):
    with Page(report, "#layer=2&mb=17&view=after&map=all") as page:
        page.wait(READY)
        assert page.js("[state.layer, state.mb, state.view, state.map]") == [2, 17, "after", "all"]
        assert page.js("$('layer').value + ' ' + $('mb-label').textContent.slice(0, 2)") == "2 17"
        assert page.js("$('time').data.at(-1).y[17]") == page.js("unpack(layers[2].series.after).row(17)[3]")
        page.js("location.hash = '#layer=1&mb=3&view=nonsense'")
        page.wait("state.layer === 1 && state.mb === 3 && state.view === 'after'")
        check(page)


def test_buttons_keys_and_clicks_select(report):
    with Page(report, "#layer=0&mb=5&view=before", height=1600) as page:
        page.wait(READY)
        page.js("document.querySelector('[data-state=view] [data-value=after]').click()")
        page.settle()
        assert page.js("state.view + ' ' + location.hash").startswith("after #layer=0&mb=5&view=after")
        before, after = page.js(
            "['before', 'after'].map((v) => Array.from(unpack(layers[0].series[v]).row(5)))"
        )
        assert page.js("$('time').data.slice(3).map((trace) => trace.y[5])") == after != before
        for key, expected in (
            ("ArrowRight", [0, 6]),
            ("ArrowDown", [1, 6]),
            ("ArrowLeft", [1, 5]),
            ("ArrowUp", [0, 5]),
        ):
            page.js(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: '{key}'}}))")
            assert page.js("[state.layer, state.mb]") == expected
        page.settle()
        page.js("$('heat').scrollIntoView({block: 'center'})")
        x, y = page.js(
            "(() => { const b = $('heat').getBoundingClientRect(), f = $('heat')._fullLayout;"
            " return [b.x + f.xaxis._offset + f.xaxis.d2p(12), b.y + f.yaxis._offset + f.yaxis.d2p(3)]; })()"
        )
        page.click(x, y)
        assert page.js("[state.layer, state.mb]") == [3, 12]
        total = page.js(
            "$('bars-after').data.flatMap((t) => t.type === 'bar' ? t.y : []).reduce((a, b) => a + b, 0)"
        )
        assert total == page.js("unpack(layers[3].records.rows).values[12]")
        check(page)


def test_dragging_zooms_and_the_theme_changes(report):
    with Page(report) as page:
        page.wait(READY)
        page.js("void Plotly.relayout('time', {'xaxis.range': [3, 9]})")
        page.js("select({view: 'after'})")
        page.settle()
        assert page.js("$('time').layout.xaxis.range") == [3, 9]
        colour = page.js("getComputedStyle(document.body).backgroundColor")
        page.js("document.documentElement.dataset.ready = ''; $('theme').click()")
        page.wait(READY)
        assert page.js("getComputedStyle(document.body).backgroundColor") != colour
        check(page)


def test_hostile_names_run_nothing(tmp_path):
    recorder = Recorder(tmp_path / "t.npz")
    for name in (HOSTILE, HOSTILE + "2"):
        recorder.record(name, *record_inputs())
    write_report(
        recorder.trace(), tmp_path / "r.html", title=HOSTILE, notes=[HOSTILE], curves={HOSTILE: ([0], [1])}
    )
    with Page(tmp_path / "r.html") as page:
        page.wait(READY)
        assert page.js("$('layer').options[0].textContent") == HOSTILE
        assert page.js("document.querySelectorAll('img').length") == 0
        check(page)


def test_empty_report(tmp_path):
    write_report(Trace(), tmp_path / "r.html", title="dense", curves={"loss": ([0, 1], [2, 1])})
    with Page(tmp_path / "r.html") as page:
        page.wait(READY)
        assert "nothing to balance" in page.js("document.body.innerText")
        assert page.js("$('loads').hidden") is True
        check(page)


def record_inputs():
    from synthetic_traces import random_counts, simple_plan

    counts = random_counts(0, 4, 8)
    return counts, *simple_plan(counts, 1)
