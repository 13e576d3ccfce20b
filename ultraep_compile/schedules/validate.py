"""Prove that a schedule can run, from the problem alone: no order and no dependency comes from the builders
or the simulator. Shared with them is only how much an operation holds (holdings.py).

Checked: every operation once and on a rank that may run it; all data in time, in some order of execution;
memory; one send and one receive per message, in the same order at both ends of a channel; no deadlock when
every send waits for its receive. A failure names the rank and the operation and prints the schedule around
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeAlias

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.collection import without_collection
from ultraep_compile.schedules.holdings import memory_steps
from ultraep_compile.schedules.messages import CHANNELS, Message, Programs, Transfer, lower
from ultraep_compile.schedules.problem import Caps, Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Place = tuple[int, int]  # rank, position
Numbers: TypeAlias = "NDArray[np.int64]"


@without_collection
def validate(schedule: Schedule, programs: Programs | None = None) -> Programs:
    """Raise ScheduleError unless the schedule is sound; returns its programs (or the given ones, checked)."""
    places = check_operations(schedule)
    check_order(schedule, places)
    for caps in (schedule.caps, schedule.problem.caps):
        check_memory(schedule, caps)
    programs = lower(schedule) if programs is None else programs
    check_messages(schedule, programs, places)
    return programs


def check_operations(schedule: Schedule) -> dict[Op, Place]:
    """Every operation of the problem exactly once, on a rank that may run it. Returns where each is."""
    problem = schedule.problem
    if len(schedule.ranks) != problem.ranks:
        raise ScheduleError(f"The schedule has {len(schedule.ranks)} ranks, the problem {problem.ranks}.")
    places: dict[Op, Place] = {}
    for r, ops in enumerate(schedule.ranks):
        for i, op in enumerate(ops):
            if op in places:
                first = places[op]
                _fail(
                    schedule, r, i, f"runs {op} a second time (first on rank {first[0]}, position {first[1]})"
                )
            places[op] = (r, i)
            if op.kind in ("F", "B", "I", "W"):
                _check_llm_op(schedule, r, i, op)
            else:
                _check_unit_op(schedule, r, i, op)
    _check_llm_complete(schedule, places)
    _check_units_complete(schedule, places)
    return places


def _check_llm_op(schedule: Schedule, r: int, i: int, op: Op) -> None:
    problem = schedule.problem
    if op.items or not (0 <= op.stage < problem.stages and 0 <= op.microbatch < problem.microbatches):
        _fail(schedule, r, i, f"runs {op}, which is no operation of this problem")
    if problem.stage_rank[op.stage] != r:
        _fail(schedule, r, i, f"runs {op}, but stage {op.stage} is on rank {problem.stage_rank[op.stage]}")


def _check_unit_op(schedule: Schedule, r: int, i: int, op: Op) -> None:
    problem = schedule.problem
    units = problem.generators if op.kind == "G" else problem.encoders
    if op.kind not in ("EF", "EB", "G") or not 0 <= op.stage < len(units):
        _fail(schedule, r, i, f"runs {op}, which is no operation of this problem")
    pairs = op.items or ((op.microbatch, -1),)
    known = units[op.stage].items
    for j, k in pairs:
        if not 0 <= j < problem.microbatches or (k >= 0 and not (known and k < len(known[j]))):
            _fail(schedule, r, i, f"runs {op}, which is no operation of this problem")


def _check_llm_complete(schedule: Schedule, places: dict[Op, Place]) -> None:
    problem = schedule.problem
    for s in range(problem.stages):
        for j in range(problem.microbatches):
            if ("F", s, j, ()) in places and ("B", s, j, ()) in places:
                if ("I", s, j, ()) not in places and ("W", s, j, ()) not in places:
                    continue
            have = {kind: places.get(Op(kind, s, j)) for kind in ("F", "B", "I", "W")}
            if have["F"] is None:
                _missing(schedule, problem.stage_rank[s], f"never runs {s}F{j}")
            if have["B"] is not None and (place := have["I"] or have["W"]) is not None:
                _fail(schedule, *place, f"runs a part of the backward {s}B{j}, which also runs whole")
            for kind in ("I", "W") if have["B"] is None else ():
                if have[kind] is None:
                    _missing(schedule, problem.stage_rank[s], f"never runs {s}{kind}{j} nor {s}B{j}")


def _check_units_complete(schedule: Schedule, places: dict[Op, Place]) -> None:
    """All encoder and generator work done once; each encoder backward on the rank that holds its
    activations."""
    problem = schedule.problem
    done: Counter[tuple[str, int, int, int]] = Counter()
    for op, (r, i) in places.items():
        if op.kind not in ("EF", "EB", "G"):
            continue
        for j, k in op.items or ((op.microbatch, -1),):
            done[op.kind, op.stage, j, k] += 1
        if op.kind == "EB":
            if problem.encoders[op.stage].frozen:
                _fail(schedule, r, i, f"runs {op}, but that encoder is frozen")
            if (source := places.get(op._replace(kind="EF"))) is None:
                _fail(schedule, r, i, f"runs {op} without its forward {op._replace(kind='EF')} on any rank")
            elif source[0] != r:
                _fail(schedule, r, i, f"runs {op}, whose activations are on rank {source[0]}")
    for key in expected_work(problem, done):
        kind, unit, j, k = key
        name = f"{unit}{kind}{j}" if k < 0 else f"item {k} of microbatch {j} in {unit}{kind}"
        if done[key] != 1:
            _missing(schedule, None, f"{name} runs {done[key]} times, not once")
        del done[key]
    for (kind, unit, j, _), _count in done.items():
        _missing(
            schedule,
            None,
            f"{unit}{kind} works on microbatch {j}, which has no such work (or not in that form)",
        )


def expected_work(problem: Problem, done: Counter) -> Iterator[tuple[str, int, int, int]]:
    """(kind, unit, microbatch, item) of all encoder and generator work; item -1 where the microbatch runs
    whole."""
    for kind, units in (("EF", problem.encoders), ("EB", problem.encoders), ("G", problem.generators)):
        for unit, module in enumerate(units):
            if kind == "EB" and module.frozen:  # type: ignore[union-attr]
                continue
            costs = module.cost if kind == "G" else module.forward  # type: ignore[union-attr]
            for j, cost in enumerate(costs):
                if cost > 0:
                    whole = not module.items or (kind, unit, j, -1) in done
                    yield from ((kind, unit, j, k) for k in ([-1] if whole else range(len(module.items[j]))))


def data_edges(problem: Problem, places: dict[Op, Place]) -> Iterator[tuple[Op, Op]]:
    """(producer, consumer) for all data, written down from the model's structure."""
    ops = list(places)
    producers, consumers = _numbered_edges(problem, ops)
    yield from ((ops[a], ops[b]) for a, b in zip(producers.tolist(), consumers.tolist(), strict=True))


def _numbered_edges(problem: Problem, ops: Sequence[Op]) -> tuple[Numbers, Numbers]:
    """Producers and consumers of all data, as places in the list of operations."""
    import numpy as np  # here and below, because planning alone needs none

    shape = (problem.stages, problem.microbatches)
    table = {kind: np.full(shape, -1) for kind in ("F", "B", "I", "W")}
    holders: dict[tuple[str, int, int], list[int]] = {}
    twins: dict[tuple[int, int, tuple], int] = {}  # encoder forwards
    pairs: list[tuple[int, int]] = []
    for n, op in enumerate(ops):
        if op.kind in table:
            table[op.kind][op.stage, op.microbatch] = n
            continue
        if op.kind == "EF":
            twins[op[1:]] = n
        for j in op.microbatches:
            holders.setdefault((op.kind, op.stage, j), []).append(n)
    pairs += ((twins[op[1:]], n) for n, op in enumerate(ops) if op.kind == "EB")
    forward, weight = table["F"], table["W"]
    backward = np.where(table["B"] >= 0, table["B"], table["I"])
    split = weight >= 0
    for (kind, unit, j), numbers in holders.items():
        if kind == "G":
            pairs += ((forward[-1, j], n) for n in numbers)
            pairs += ((n, backward[-1, j]) for n in numbers)
            continue
        for s in problem.encoders[unit].feeds:
            pairs += ((n, forward[s, j]) if kind == "EF" else (backward[s, j], n) for n in numbers)
    others = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    producers = (forward[:-1], backward[1:], forward, backward[split], others[:, 0])
    consumers = (forward[1:], backward[:-1], backward, weight[split], others[:, 1])
    return np.concatenate([x.ravel() for x in producers]), np.concatenate([x.ravel() for x in consumers])


def check_order(schedule: Schedule, places: dict[Op, Place]) -> None:
    """Data edges and each rank's order together must leave some order of execution."""
    import numpy as np

    ops, rank = list(places), np.repeat(np.arange(len(schedule.ranks)), [len(row) for row in schedule.ranks])
    producers, consumers = _numbered_edges(schedule.problem, ops)
    backward = np.flatnonzero((rank[producers] == rank[consumers]) & (producers > consumers))
    if len(backward):
        producer, consumer = ops[producers[backward[0]]], ops[consumers[backward[0]]]
        _fail(schedule, *places[consumer], f"runs {consumer} before {producer}, whose output it needs")
    chained = np.flatnonzero(rank[:-1] == rank[1:])
    if cycle := _cycle(len(ops), (producers, chained), (consumers, chained + 1)):
        loop = [ops[n] for n in cycle]
        told = " -> ".join(f"{op} (rank {places[op][0]})" for op in [*loop, loop[0]])
        _fail(schedule, *places[loop[0]], f"can never run {loop[0]}: deadlock {told}")


def _cycle(count: int, sources: Sequence[Numbers], targets: Sequence[Numbers]) -> list[int]:
    """The nodes of one cycle of a graph, in order; empty if it has none."""
    import numpy as np
    from scipy.sparse import coo_array  # here, because it is half of this package's import time
    from scipy.sparse.csgraph import connected_components

    a, b = np.concatenate(sources), np.concatenate(targets)
    graph = coo_array((np.ones(len(a), dtype=np.int8), (a, b)), shape=(count, count))
    parts, label = connected_components(graph.tocsr(), connection="strong")
    if parts == count:
        return []
    import networkx as nx

    inside = (label[a] == label[b]) & (np.bincount(label)[label[a]] > 1)
    knot = nx.DiGraph(zip(a[inside].tolist(), b[inside].tolist(), strict=True))
    return [edge[0] for edge in nx.find_cycle(knot)]


def check_memory(schedule: Schedule, caps: Caps) -> None:
    """What each rank holds, after each start of an operation, against the limits."""
    limits = {"count": caps.encoder, "generator": caps.generator}
    for r, ops in enumerate(schedule.ranks):
        held: dict[tuple[str, int], float] = {}
        for i, (op, takes, gives) in enumerate(memory_steps(schedule.problem, ops)):
            for what, amount in takes:
                unit = 0 if what == "llm" else op.stage
                held[what, unit] = held.get((what, unit), 0.0) + amount
                limit = caps.llm[r] if what == "llm" and caps.llm else limits.get(what)
                if limit is not None and held[what, unit] > limit + 1e-6:
                    noun = {"count": "microbatches of the encoder", "llm": "stage activations"}.get(
                        what, "microbatches of the generator"
                    )
                    _fail(
                        schedule, r, i, f"holds {held[what, unit]:g} {noun} at {op}; its limit is {limit:g}"
                    )
            for what, amount in gives:
                held[what, 0 if what == "llm" else op.stage] -= amount


def check_messages(schedule: Schedule, programs: Programs, places: dict[Op, Place]) -> None:
    """Sends and receives: complete, once, at the right place, in one order per channel, and free of
    deadlock."""
    for r, program in enumerate(programs):
        if tuple(a for a in program if isinstance(a, Op)) != schedule.ranks[r]:
            raise ScheduleError(
                f"Rank {r}'s program does not run the operations of its schedule in their order."
            )
    ops = list(places)
    needed = _needed_messages(schedule, ops)
    number, known = {message: n for n, message in enumerate(needed)}, {}
    where: dict[str, list[int]] = {end: [-1] * len(number) for end in ("SEND", "RECV")}  # position in its program
    queues: dict[tuple[str, str, int, int], list[int]] = {}  # messages of a pair of ranks on a channel, in order
    position: list[int] = []  # of every operation in its program
    waits: list[tuple[int, int]] = []  # (earlier, later), operations first, then messages
    for r, program in enumerate(programs):
        latest: dict[str, int] = {}
        ran = -1
        for i, action in enumerate(program):
            if isinstance(action, Op):
                if ran >= 0:
                    waits.append((ran, len(position)))
                ran = len(position)
                position.append(i)
                continue
            end, message = action
            channel, source, target, _, _ = message
            n = known.get(id(message), -1)  # both ends are usually the same object, and hashes take their time
            if n < 0:
                n = known[id(message)] = number.get(message, -1)
            if n < 0:
                _fail_program(programs, r, i, f"has {action}, which nothing needs")
            if where[end][n] >= 0:
                _fail_program(programs, r, i, f"has {action} twice")
            if r != (source if end == "SEND" else target):
                _fail_program(programs, r, i, f"has {action}, which belongs to another rank")
            where[end][n] = i
            queues.setdefault((end, channel, source, target), []).append(n)
            node = len(ops) + n
            if ran >= 0:
                waits.append((ran, node))
            if channel in latest:
                waits.append((latest[channel], node))
            latest[channel] = node
    for n, (message, (producer, consumer)) in enumerate(needed.items()):
        send, receive = where["SEND"][n], where["RECV"][n]
        if send < 0 or receive < 0:
            end, r = ("SEND", message.source) if send < 0 else ("RECV", message.target)
            raise ScheduleError(f"Rank {r} lacks {Transfer(end, message)}, needed by {ops[consumer]}.")
        if send < position[producer]:
            what = f"sends the output of {message.producer} before it runs"
            _fail_program(programs, message.source, send, what)
        if position[consumer] < receive:
            _fail_program(programs, message.target, receive, f"receives the input of {ops[consumer]} after it runs")
        waits.append((len(ops) + n, consumer))
    messages = list(needed)
    _check_pair_order(programs, messages, queues, where["RECV"])
    _check_rendezvous(ops, messages, waits)


def _needed_messages(schedule: Schedule, ops: Sequence[Op]) -> dict[Message, tuple[int, int]]:
    """Every message that crosses ranks, with the numbers of its producer and of the first operation there that needs
    it."""
    import numpy as np

    rank = np.repeat(np.arange(len(schedule.ranks)), [len(row) for row in schedule.ranks])
    producers, consumers = _numbered_edges(schedule.problem, ops)
    crossing = rank[producers] != rank[consumers]
    a, b = producers[crossing], consumers[crossing]
    needed: dict[Message, tuple[int, int]] = {}
    edges = zip(a.tolist(), b.tolist(), rank[a].tolist(), rank[b].tolist(), strict=True)
    for producer, consumer, source, target in edges:
        giver, taker = ops[producer], ops[consumer]
        if giver.kind == "EF":
            channel = "EMB"
        elif taker.kind == "EB":
            channel = "EGRAD"
        elif "G" in (giver.kind, taker.kind):
            channel = "H" if taker.kind == "G" else "DH"
        else:
            channel = "FWD" if taker.kind == "F" else "BWD"
        j = taker.microbatch if taker.microbatch >= 0 else giver.microbatch
        message = Message(channel, source, target, giver, j)
        known = needed.get(message)
        if known is None or consumer < known[1]:
            needed[message] = (producer, consumer)
    return needed


def _check_pair_order(
    programs: Programs,
    messages: Sequence[Message],
    queues: dict[tuple[str, str, int, int], list[int]],
    received_at: Sequence[int],
) -> None:
    """The k-th send of a pair of ranks on a channel must meet the k-th receive."""
    for (kind, channel, source, target), sends in queues.items():
        receives = queues["RECV", channel, source, target]
        if kind == "RECV" or sends == receives:
            continue
        sent, received = next((s, r) for s, r in zip(sends, receives, strict=True) if s != r)
        told = f"expects {messages[received].producer} from rank {source} on {channel}"
        told += f", which sends {messages[sent].producer}"
        _fail_program(programs, target, received_at[received], told)


def _check_rendezvous(ops: Sequence[Op], messages: Sequence[Message], waits: list[tuple[int, int]]) -> None:
    """The wait-for graph when each queue of a rank and channel moves one message at a time, sends waiting for
    receives.

    An operation waits for the one before it and for the messages it consumes; a message for the operation
    before its send and before its receive, and for the previous message in both queues."""
    import numpy as np

    edges = np.array(waits, dtype=np.int64).reshape(-1, 2)
    if cycle := _cycle(len(ops) + len(messages), (edges[:, 0],), (edges[:, 1],)):
        nodes = [ops[n] if n < len(ops) else messages[n - len(ops)] for n in cycle]
        told = " -> ".join(
            str(n) if isinstance(n, Op) else f"{n.channel} of {n.producer} from rank {n.source} to {n.target}"
            for n in nodes
        )
        raise ScheduleError(
            f"Deadlock when sends wait for their receives: {told} -> back to the first. Change the order of"
            f" the messages on one of {', '.join(c for c in CHANNELS if c in told)}."
        )


def excerpt(ranks: Sequence[Sequence[object]], rank: int, position: int, width: int = 4) -> str:
    """The schedule around one position, that position in >> <<."""
    lines = []
    for r, row in enumerate(ranks):
        low, high = max(0, position - width), position + width + 1
        words = [f">>{a}<<" if (r, i) == (rank, i) and i == position else str(a) for i, a in enumerate(row)]
        cut = " ".join(words[low:high])
        lines.append(f"  rank {r}: {'... ' if low else ''}{cut}{' ...' if high < len(words) else ''}")
    return "\n".join(lines)


def _fail(schedule: Schedule, rank: int, position: int, what: str) -> None:
    around = excerpt(schedule.ranks, rank, position)
    raise ScheduleError(f"Rank {rank}, position {position}: {what}. The schedule there:\n{around}")


def _fail_program(programs: Programs, rank: int, position: int, what: str) -> None:
    raise ScheduleError(
        f"Rank {rank}, position {position}: {what}. The program there:\n{excerpt(programs, rank, position)}"
    )


def _missing(schedule: Schedule, rank: int | None, what: str) -> None:
    who = f"Rank {rank} " if rank is not None else ""
    lines = excerpt(schedule.ranks, -1, 0, width=6)
    raise ScheduleError(f"{who}{what}. The schedule begins:\n{lines}")
