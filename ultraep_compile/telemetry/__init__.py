"""Load traces: record them, keep them in a file, sum them up, and show them as one HTML page.

    recorder.get_recorder(path).record(...)    while the model runs (forward only, never in a recomputation)
    read_trace(path) -> Trace                  checked; raises `TraceError`
    summarize(trace) -> Summary                the numbers on the report's tiles
    write_report(trace, "report.html")         one self-contained file

Symbols: N records, R ranks, E experts, S slots per rank, M = E/R, P = R*(M+S) physical experts. Loads count
routed rows (tokens times top-k). Imbalance is max/mean over ranks, never over layers or experts.
"""

from ultraep_compile.telemetry.recorder import Recorder, get_recorder
from ultraep_compile.telemetry.report import write_report
from ultraep_compile.telemetry.summary import Summary, summarize
from ultraep_compile.telemetry.trace import LayerTrace, Trace
from ultraep_compile.telemetry.trace_file import read_trace, write_trace

__all__ = [
    "LayerTrace",
    "Recorder",
    "Summary",
    "Trace",
    "get_recorder",
    "read_trace",
    "summarize",
    "write_report",
    "write_trace",
]
