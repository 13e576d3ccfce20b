"""Prove that a schedule can run, from the problem alone: no order and no dependency comes from the builders
or the simulator. Shared with them is only how much an operation holds (holdings.py).

Checked: every operation once and on a rank that may run it; all data in time, in some order of execution;
memory; one send and one receive per message, in the same order at both ends of a channel; no deadlock when
every send waits for its receive. A failure names the rank and the operation and prints the schedule around
it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

from ultraep_compile.errors import ScheduleError
from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.holdings import memory_steps
from ultraep_compile.schedules.messages import CHANNELS, Message, Programs, Transfer, lower
from ultraep_compile.schedules.problem import Caps, Problem

Place = tuple[int, int]  # rank, position


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
    """(producer, consumer) for all data, written down per microbatch from the model's structure."""
    holders: dict[tuple[str, int, int], list[Op]] = {}
    for op in places:
        if op.kind in ("EF", "EB", "G"):
            for j in op.microbatches:
                holders.setdefault((op.kind, op.stage, j), []).append(op)
    last = problem.stages - 1
    for j in range(problem.microbatches):
        forward = [Op("F", s, j) for s in range(last + 1)]
        whole = [Op("B", s, j) in places for s in range(last + 1)]
        backward = [Op("B" if whole[s] else "I", s, j) for s in range(last + 1)]
        yield from pairwise(forward)
        yield from zip(backward[1:], backward, strict=False)
        yield from zip(forward, backward, strict=True)  # the stage's own activations
        yield from ((backward[s], Op("W", s, j)) for s in range(last + 1) if not whole[s])
        for g in range(len(problem.generators)):
            for op in holders.get(("G", g, j), ()):
                yield forward[last], op
                yield op, backward[last]
        for e, encoder in enumerate(problem.encoders):
            for s in encoder.feeds:
                yield from ((op, forward[s]) for op in holders.get(("EF", e, j), ()))
                yield from ((backward[s], op) for op in holders.get(("EB", e, j), ()))
    yield from ((op._replace(kind="EF"), op) for op in places if op.kind == "EB")


def check_order(schedule: Schedule, places: dict[Op, Place]) -> None:
    """Data edges and each rank's order together must leave some order of execution."""
    import networkx as nx  # here, because it is half of this package's import time

    graph = nx.DiGraph()
    graph.add_nodes_from(places)
    for ops in schedule.ranks:
        nx.add_path(graph, ops)
    for producer, consumer in data_edges(schedule.problem, places):
        if places[producer][0] == places[consumer][0] and places[producer][1] > places[consumer][1]:
            _fail(schedule, *places[consumer], f"runs {consumer} before {producer}, whose output it needs")
        graph.add_edge(producer, consumer)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        told = " -> ".join(f"{op} (rank {places[op][0]})" for op in [*cycle, cycle[0]])
        _fail(schedule, *places[cycle[0]], f"can never run {cycle[0]}: deadlock {told}")


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
    needed = _needed_messages(schedule.problem, places)
    where: dict[tuple[str, Message], Place] = {}
    for r, program in enumerate(programs):
        for i, action in enumerate(program):
            if isinstance(action, Transfer):
                message, end = action.message, action.kind
                if message not in needed:
                    _fail_program(programs, r, i, f"has {action}, which nothing needs")
                if (end, message) in where:
                    _fail_program(programs, r, i, f"has {action} twice")
                if r != (message.source if end == "SEND" else message.target):
                    _fail_program(programs, r, i, f"has {action}, which belongs to another rank")
                where[end, message] = (r, i)
    position = {a: i for program in programs for i, a in enumerate(program) if isinstance(a, Op)}
    for message, consumers in needed.items():
        for end, r in (("SEND", message.source), ("RECV", message.target)):
            if (end, message) not in where:
                raise ScheduleError(f"Rank {r} lacks {Transfer(end, message)}, needed by {consumers[0]}.")
        r, i = where["SEND", message]
        if i < position[message.producer]:
            _fail_program(programs, r, i, f"sends the output of {message.producer} before it runs")
        r, i = where["RECV", message]
        late = [op for op in consumers if position[op] < i]
        if late:
            _fail_program(programs, r, i, f"receives the input of {late[0]} after it runs")
    _check_pair_order(programs)
    _check_rendezvous(programs, needed)


def _needed_messages(problem: Problem, places: dict[Op, Place]) -> dict[Message, list[Op]]:
    needed: dict[Message, list[Op]] = {}
    for producer, consumer in data_edges(problem, places):
        source, target = places[producer][0], places[consumer][0]
        if source == target:
            continue
        kinds = (producer.kind, consumer.kind)
        if "EF" in kinds:
            channel = "EMB"
        elif "EB" in kinds:
            channel = "EGRAD"
        elif "G" in kinds:
            channel = "H" if consumer.kind == "G" else "DH"
        else:
            channel = "FWD" if consumer.kind == "F" else "BWD"
        j = consumer.microbatch if consumer.microbatch >= 0 else producer.microbatch
        needed.setdefault(Message(channel, source, target, producer, j), []).append(consumer)
    return needed


def _check_pair_order(programs: Programs) -> None:
    """The k-th send of a pair of ranks on a channel must meet the k-th receive."""
    queues: dict[tuple[str, str, int, int], list[tuple[Message, Place]]] = {}
    for r, program in enumerate(programs):
        for i, action in enumerate(program):
            if isinstance(action, Transfer):
                m = action.message
                queues.setdefault((action.kind, m.channel, m.source, m.target), []).append((m, (r, i)))
    for (kind, channel, source, target), sends in queues.items():
        if kind == "SEND":
            receives = queues["RECV", channel, source, target]
            for (sent, _), (received, place) in zip(sends, receives, strict=True):
                if sent != received:
                    told = f"expects {received.producer} from rank {source} on {channel}"
                    told += f", which sends {sent.producer}"
                    _fail_program(programs, *place, told)


def _check_rendezvous(programs: Programs, needed: dict[Message, list[Op]]) -> None:
    """The wait-for graph when each queue of a rank and channel moves one message at a time, sends waiting for
    receives.

    An operation waits for the one before it and for the messages it consumes; a message for the operation
    before its send and before its receive, and for the previous message in both queues."""
    import networkx as nx

    graph = nx.DiGraph()
    for program in programs:
        latest: dict[str, Message] = {}
        ran: Op | None = None
        for action in program:
            if isinstance(action, Op):
                if ran is not None:
                    graph.add_edge(ran, action)
                ran = action
                continue
            message = action.message
            if ran is not None:
                graph.add_edge(ran, message)
            if (previous := latest.get(message.channel)) is not None:
                graph.add_edge(previous, message)
            latest[message.channel] = message
    for message, consumers in needed.items():
        graph.add_edges_from((message, op) for op in consumers)
    if not nx.is_directed_acyclic_graph(graph):
        cycle = [edge[0] for edge in nx.find_cycle(graph)]
        told = " -> ".join(
            str(n) if isinstance(n, Op) else f"{n.channel} of {n.producer} from rank {n.source} to {n.target}"
            for n in cycle
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
