"""Exchanges between processes, all of which end.

`line_of(group)` is what the ranks of a group exchange over: on the host through gloo connections of our own, on GPUs
through the group's NCCL. Every wait has a deadline and notices a rank that has died, raised or gone elsewhere; it then
raises `PeerTimeoutError` on every rank that takes part, with the place in the program and the ranks that are missing.
"""

from ultraep_compile.exchange.line import DEADLINE_S, Line, line_named, line_of
from ultraep_compile.exchange.place import Place, at, here
from ultraep_compile.exchange.watchdog import Failure, failing, watchdog

__all__ = ["DEADLINE_S", "Failure", "Line", "Place", "at", "failing", "here", "line_named", "line_of", "watchdog"]
