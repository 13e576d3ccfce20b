"""A schedule made ready for one rank: what to run, send and receive in order, and who holds what."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from ultraep_compile.errors import ScheduleError
from ultraep_compile.executor.agreement import digest_of
from ultraep_compile.schedules import Message, Op, Problem, Schedule, validate
from ultraep_compile.schedules.dependencies import Graph
from ultraep_compile.schedules.messages import Action, lower, messages_of

ALL = -1  # item number that stands for every item of a microbatch


@dataclass(frozen=True, slots=True)
class Program:
    """One rank's part of a schedule."""

    schedule: Schedule
    rank: int
    actions: tuple[Action, ...]
    needs: dict[Op, tuple[Message, ...]]  # messages that an operation is the first to use, in order of arrival
    gives: dict[Op, tuple[Message, ...]]  # messages with an operation's output
    hosts: dict[tuple[int, int, int], int]  # (encoder, microbatch, item or ALL) -> rank that encodes it
    generated: frozenset[int]  # microbatches that some generator works on, anywhere
    backwards: tuple[Op, ...]  # of this rank's stages, whole or their input part, in order
    digest: int  # of the schedule: equal on ranks that run the same

    @property
    def problem(self) -> Problem:
        return self.schedule.problem

    def host(self, encoder: int, microbatch: int, item: int) -> int | None:
        """The rank that encodes an item."""
        whole = self.hosts.get((encoder, microbatch, ALL))
        return self.hosts.get((encoder, microbatch, item)) if whole is None else whole

    def count(self, kind: str) -> Counter[int]:
        """How many operations of a kind on this rank work on each microbatch."""
        return Counter(j for op in self.schedule.ranks[self.rank] if op.kind == kind for j in op.microbatches)


def program_of(schedule: Schedule, rank: int) -> Program:
    """The program of one rank of a schedule."""
    graph = Graph(schedule.problem, schedule.ranks)
    found = messages_of(schedule, graph)
    actions = lower(schedule)[rank]
    order = {a.message: i for i, a in enumerate(actions) if not isinstance(a, Op)}
    needs: dict[Op, list[Message]] = {}
    gives: dict[Op, list[Message]] = {}
    for message, (_, consumer) in found.items():
        if message.target == rank:
            needs.setdefault(graph.ops[consumer], []).append(message)
        elif message.source == rank:
            gives.setdefault(message.producer, []).append(message)
    hosts = {}
    for r, ops in enumerate(schedule.ranks):
        for op in ops:
            if op.kind == "EF":
                for j, i in op.items or ((op.microbatch, ALL),):
                    hosts[op.stage, j, i] = r
    mine = schedule.ranks[rank]
    return Program(
        schedule,
        rank,
        actions,
        {op: tuple(sorted(m, key=order.__getitem__)) for op, m in needs.items()},
        {op: tuple(m) for op, m in gives.items()},
        hosts,
        frozenset(j for ops in schedule.ranks for op in ops if op.kind == "G" for j in op.microbatches),
        tuple(op for op in mine if op.kind in ("B", "I")),
        digest_of(schedule.ranks),
    )


_FORWARD_CHANNELS = ("FWD", "EMB", "H")


def forward_of(program: Program) -> Program:
    """The forwards of a program with their messages, in the same order: what waits for what stays, so it cannot wait for ever."""

    def stays(action: Action) -> bool:
        return action.kind in ("EF", "F", "G") if isinstance(action, Op) else on_its_way(action.message)

    def on_its_way(message: Message) -> bool:
        return message.channel in _FORWARD_CHANNELS

    def kept(messages: dict[Op, tuple[Message, ...]]) -> dict[Op, tuple[Message, ...]]:
        return {op: tuple(filter(on_its_way, several)) for op, several in messages.items()}

    return dataclasses.replace(
        program,
        actions=tuple(filter(stays, program.actions)),
        needs=kept(program.needs),
        gives=kept(program.gives),
        backwards=(),
    )


def check_fits(schedule: Schedule, problem: Problem) -> None:
    """Raise ScheduleError unless a schedule runs this step's work on these ranks, and is sound."""
    theirs = schedule.problem
    for what, given, wanted in (
        ("ranks", theirs.ranks, problem.ranks),
        ("microbatches", theirs.microbatches, problem.microbatches),
        ("stages on ranks", theirs.stage_rank, problem.stage_rank),
        ("encoders", len(theirs.encoders), len(problem.encoders)),
        (
            "stages that read each encoder's features",
            [e.feeds for e in theirs.encoders],
            [e.feeds for e in problem.encoders],
        ),
        ("frozen encoders", [e.frozen for e in theirs.encoders], [e.frozen for e in problem.encoders]),
        ("generators", len(theirs.generators), len(problem.generators)),
    ):
        if given != wanted:
            raise ScheduleError(
                f"The schedule ({schedule.method}) is for {what} {given}; this pipeline has {wanted}. Plan it for this pipeline"
                " (Pipeline.problem), or leave `schedule` out."
            )
    validate(schedule)
