"""Local search: move encoder and generator operations that lie on the critical path, within the promised
memory."""

from __future__ import annotations

from dataclasses import replace

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.validate import check_memory

_SHIFTS = (1, -1, 2, -2, 3, -3, 5, -5, 8, -8, 13, -13)
_GAIN = 1e-9


def improve(schedule: Schedule, target: float, tries: int = 400) -> Schedule:
    """A schedule no slower than the given one; stops at makespan `target`, after `tries` attempts, or when no
    single move helps. Deterministic."""
    best, path = _critical(schedule)
    while best > target and tries > 0:
        better = None
        for rank, position in path:
            if schedule.ranks[rank][position].kind not in ("EF", "EB", "G"):
                continue
            for shift in _SHIFTS:
                tries -= 1
                moved = _moved(schedule, rank, position, position + shift)
                found = _try(moved) if moved else None
                if moved and found and found[0] < best * (1 - _GAIN):
                    better = (moved, *found)
                    break
                if tries <= 0:
                    break
            if better or tries <= 0:
                break
        if better is None:
            break
        schedule, best, path = better
    return schedule


def _moved(schedule: Schedule, rank: int, position: int, to: int) -> Schedule | None:
    ops: list[Op] = list(schedule.ranks[rank])
    if not 0 <= to < len(ops):
        return None
    ops.insert(to, ops.pop(position))
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(ops)
    return replace(schedule, ranks=tuple(ranks))


def _try(schedule: Schedule) -> tuple[float, list[tuple[int, int]]] | None:
    try:
        found = _critical(schedule)
        check_memory(schedule, schedule.caps)
    except ScheduleError:
        return None
    return found


def _critical(schedule: Schedule) -> tuple[float, list[tuple[int, int]]]:
    """The makespan and one longest path, as (rank, position), last operation first."""
    graph = Graph(schedule.problem, schedule.ranks)
    start, end = graph.replay()
    makespan = max(end)
    i = end.index(makespan)
    path = []
    while i >= 0:
        rank = graph.rank[i]
        path.append((rank, i - graph.first[rank]))
        before = i - 1 if i > graph.first[rank] else -1
        hop = schedule.problem.latency
        late = [p for p in graph.preds[i] if end[p] + (graph.rank[p] != rank) * hop >= start[i]]
        waits = before < 0 or end[before] < start[i]
        i = (late[0] if late else -1) if waits else before
    return makespan, path
