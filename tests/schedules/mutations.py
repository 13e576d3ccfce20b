"""Ways to break a schedule or its messages. Each returns what no validator may accept, or None where it does
not apply. Shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import replace

from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.messages import Transfer, lower
from ultraep_compile.schedules.simulate import peaks
from ultraep_compile.schedules.validate import data_edges


def edit(schedule: Schedule, rank: int, ops) -> Schedule:
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(ops)
    return replace(schedule, ranks=tuple(ranks))


def place(schedule, op):
    return next((r, ops.index(op)) for r, ops in enumerate(schedule.ranks) if op in ops)


def all_ops(schedule):
    return [(r, i, op) for r, ops in enumerate(schedule.ranks) for i, op in enumerate(ops)]


def drop(schedule, draw):
    r, i, _ = draw.choice(all_ops(schedule))
    return edit(schedule, r, schedule.ranks[r][:i] + schedule.ranks[r][i + 1 :])


def repeat(schedule, draw):
    r, i, op = draw.choice(all_ops(schedule))
    return edit(schedule, r, (*schedule.ranks[r][: i + 1], op, *schedule.ranks[r][i + 1 :]))


def repeat_elsewhere(schedule, draw):
    r, _, op = draw.choice(all_ops(schedule))
    other = (r + 1) % len(schedule.ranks)
    return edit(schedule, other, (*schedule.ranks[other], op))


def move_llm_op(schedule, draw):
    r, i, op = draw.choice([x for x in all_ops(schedule) if x[2].kind in "FBIW"])
    other = (r + 1) % len(schedule.ranks)
    moved = edit(schedule, r, schedule.ranks[r][:i] + schedule.ranks[r][i + 1 :])
    return edit(moved, other, (*moved.ranks[other], op))


def move_encoder_backward(schedule, draw):
    found = [x for x in all_ops(schedule) if x[2].kind == "EB"]
    if not found:
        return None
    r, i, op = draw.choice(found)
    other = (r + 1) % len(schedule.ranks)
    moved = edit(schedule, r, schedule.ranks[r][:i] + schedule.ranks[r][i + 1 :])
    return edit(moved, other, (*moved.ranks[other], op))


def relabel(schedule, draw):
    r, i, op = draw.choice(all_ops(schedule))
    changed = draw.choice(
        (
            op._replace(stage=op.stage + 99),
            op._replace(microbatch=schedule.problem.microbatches, items=()),
            op._replace(kind="X"),
        )
    )
    return edit(schedule, r, (*schedule.ranks[r][:i], changed, *schedule.ranks[r][i + 1 :]))


def lose_item(schedule, draw):
    found = [x for x in all_ops(schedule) if len(x[2].items) > 1]
    if not found:
        return None
    r, i, op = draw.choice(found)
    return edit(
        schedule, r, (*schedule.ranks[r][:i], op._replace(items=op.items[1:]), *schedule.ranks[r][i + 1 :])
    )


def break_dependency(schedule, draw):
    """Put a consumer before its producer, on one rank at once or across ranks through their orders."""
    places = {op: (r, i) for r, i, op in all_ops(schedule)}
    edges = [e for e in data_edges(schedule.problem, places) if places[e[0]][0] == places[e[1]][0]]
    producer, consumer = draw.choice(edges)
    r, i = places[producer]
    ops = [op for op in schedule.ranks[r] if op != consumer]
    ops.insert(i, consumer)
    return edit(schedule, r, ops)


def cross_ranks(schedule, draw):
    """A cycle through two ranks: on each rank the operation that the other waits for comes last."""
    if len(schedule.ranks) < 2 or schedule.problem.microbatches < 2:
        return None
    a, b = schedule.problem.stage_rank[:2]
    if a == b:
        return None
    first = [Op("F", 0, 1), *(op for op in schedule.ranks[a] if op != Op("F", 0, 1))]
    # stage 1 runs its forwards last to first, and stage 0 its last forward after a backward
    last = Op("F", 0, schedule.problem.microbatches - 1)
    back = next(op for op in schedule.ranks[a] if op.kind in ("B", "I") and op.stage == 0)
    ops = [op for op in first if op != last]
    ops.insert(ops.index(back) + 1, last)
    other = [op for op in schedule.ranks[b] if op.kind != "F" or op.stage != 1]
    forward = sorted(
        (op for op in schedule.ranks[b] if op.kind == "F" and op.stage == 1), key=lambda op: -op.microbatch
    )
    return edit(edit(schedule, a, ops), b, forward + other)


def hold_too_much(schedule, draw):
    """Delay an encoder backward to the end of its rank, past the promise."""
    worst = max(peaks(schedule).encoder)
    found = [x for x in all_ops(schedule) if x[2].kind == "EB"]
    draw.shuffle(found)
    for r, i, op in found:
        changed = edit(schedule, r, (*schedule.ranks[r][:i], *schedule.ranks[r][i + 1 :], op))
        if max(peaks(changed).encoder) > worst + 1e-6:
            return changed
    return None


MUTATIONS = (
    drop,
    repeat,
    repeat_elsewhere,
    move_llm_op,
    move_encoder_backward,
    relabel,
    lose_item,
    break_dependency,
    cross_ranks,
    hold_too_much,
)


def programs_of(schedule):
    return [list(p) for p in lower(schedule)]


def transfers(programs, kind=None):
    return [
        (r, i, a)
        for r, p in enumerate(programs)
        for i, a in enumerate(p)
        if isinstance(a, Transfer) and kind in (None, a.kind)
    ]


def drop_transfer(programs, draw):
    r, i, _ = draw.choice(transfers(programs))
    del programs[r][i]


def repeat_transfer(programs, draw):
    r, i, a = draw.choice(transfers(programs))
    programs[r].insert(i, a)


def misdirect(programs, draw):
    r, i, a = draw.choice(transfers(programs))
    programs[r][i] = a._replace(message=a.message._replace(target=a.message.target + 1))


def swap_ends(programs, draw):
    """Two receives of one pair of ranks and channel in the other order."""
    pairs = {}
    for r, i, a in transfers(programs, "RECV"):
        pairs.setdefault((r, a.message.channel, a.message.source), []).append(i)
    (r, *_), where = draw.choice([x for x in pairs.items() if len(x[1]) > 1])
    i, k = where[0], where[-1]
    programs[r][i], programs[r][k] = programs[r][k], programs[r][i]


def send_early(programs, draw):
    r, i, a = draw.choice(transfers(programs, "SEND"))
    del programs[r][i]
    programs[r].insert(0, a)


def receive_late(programs, draw):
    r, i, a = draw.choice(transfers(programs, "RECV"))
    del programs[r][i]
    programs[r].append(a)


def drop_operation(programs, draw):
    r = draw.randrange(len(programs))
    del programs[r][next(i for i, a in enumerate(programs[r]) if isinstance(a, Op))]


MESSAGE_MUTATIONS = (
    drop_transfer,
    repeat_transfer,
    misdirect,
    swap_ends,
    send_early,
    receive_late,
    drop_operation,
)
