"""Is balancing worth it? Recorded or synthetic loads through several planners: predicted time, memory and traffic.

    read_source("run.npz", ...) -> Source      a recorded trace, a file of load matrices, or a workload by name
    replay(source, specs, ...) -> list[Outcome]
    page(replayed) -> str                      one self-contained HTML page
"""

from ultraep_compile.replay.page import page
from ultraep_compile.replay.run import Outcome, Question, Replayed, Spec, replay
from ultraep_compile.replay.source import Sequence, Source, read_source, rehomed

__all__ = ["Outcome", "Question", "Replayed", "Sequence", "Source", "Spec", "page", "read_source", "rehomed", "replay"]
