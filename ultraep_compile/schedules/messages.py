"""Point-to-point messages of a schedule, in an order under which no transport can deadlock.

Channels, each with its own communicator so that none holds up another:
  FWD, BWD    activations and gradients between neighbouring stages
  EMB, EGRAD  an encoder's features to the stages that read them, and their gradients back
  H, DH       the last stage's output to the generator's rank, and its gradient back

A rank has one queue per channel. The transport is taken at its worst: rendezvous (a send ends only when its
receive is posted) and one message at a time per queue. Every queue is in the order in which the messages are
*consumed* when the schedule is replayed. Then a message waits only for its producer, for messages consumed
earlier and for the operation before its consumer's predecessor: all of them come before its consumer in the
replay, so waiting cannot go in a circle, whatever the real timing is."""

from __future__ import annotations

from typing import NamedTuple

from ultraep_compile.schedules.actions import Op, Schedule
from ultraep_compile.schedules.collection import without_collection
from ultraep_compile.schedules.dependencies import Graph

CHANNELS = ("FWD", "BWD", "EMB", "EGRAD", "H", "DH")


class Message(NamedTuple):
    """What one rank sends another. A message is consumed by the first operation there that needs it."""

    channel: str
    source: int
    target: int
    producer: Op
    microbatch: int


class Transfer(NamedTuple):
    """One end of a message in a rank's program. A receive is posted here and waited for before its
    consumer."""

    kind: str  # SEND or RECV
    message: Message

    def __str__(self) -> str:
        message = self.message
        arrow = f">{message.target}" if self.kind == "SEND" else f"<{message.source}"
        return f"{self.kind}_{message.channel}[{message.producer}:{message.microbatch}{arrow}]"


Action = Op | Transfer
Programs = tuple[tuple[Action, ...], ...]


def channel_of(producer: Op, consumer: Op) -> str:
    """The channel on which a producer's output travels to a consumer."""
    if producer.kind == "EF":
        return "EMB"
    if consumer.kind == "EB":
        return "EGRAD"
    if consumer.kind == "G":
        return "H"
    if producer.kind == "G":
        return "DH"
    return "FWD" if consumer.kind == "F" else "BWD"


def messages_of(schedule: Schedule, graph: Graph | None = None) -> dict[Message, tuple[int, int]]:
    """Every message with the numbers of its producer and its first consumer in the schedule's graph."""
    graph = graph or Graph(schedule.problem, schedule.ranks)
    found: dict[Message, tuple[int, int]] = {}
    ops, rank = graph.ops, graph.rank
    for i, need in enumerate(graph.preds):
        consumer, target = ops[i], rank[i]
        for p in need:
            if rank[p] == target:
                continue
            producer = ops[p]
            channel = channel_of(producer, consumer)
            if not producer.items and not consumer.items:
                found.setdefault(Message(channel, rank[p], target, producer, producer.microbatch), (p, i))
                continue
            shared = consumer.microbatches if producer.items else producer.microbatches
            for j in shared:
                if j in producer.microbatches and j in consumer.microbatches:
                    found.setdefault(Message(channel, rank[p], target, producer, j), (p, i))
    return found


@without_collection
def lower(schedule: Schedule) -> Programs:
    """Each rank's operations with its sends and receives between them."""
    graph = Graph(schedule.problem, schedule.ranks)
    start, _ = graph.replay()
    turn = graph.linear_order()
    first, ops = graph.first, graph.ops
    ordered = sorted(
        (start[consumer], turn[consumer], producer, message.microbatch, consumer, message)
        for message, (producer, consumer) in messages_of(schedule, graph).items()
    )
    slot: dict[tuple[int, str], int] = {}  # (rank, channel) -> operation before which its latest transfer stands
    before: list[list[Action]] = [[] for _ in range(len(ops) + len(schedule.ranks))]  # each operation, each rank's end
    for _, _, producer, _, consumer, message in ordered:
        channel, source, target, _, _ = message
        ends = (
            ("SEND", source, producer + 1 + source),
            ("RECV", target, max(first[target], consumer - 1) + target),
        )
        for kind, rank, earliest in ends:
            at = slot.get((rank, channel), 0)
            if at < earliest:
                at = slot[rank, channel] = earliest
            before[at].append(Transfer(kind, message))
    programs = []
    for rank, row in enumerate(schedule.ranks):
        program: list[Action] = []
        shift = first[rank] + rank
        for i, op in enumerate(row):
            program += before[shift + i]
            program.append(op)
        programs.append(tuple(program + before[shift + len(row)]))
    return tuple(programs)


def queue(program: tuple[Action, ...], channel: str) -> list[Transfer]:
    """The transfers of one rank on one channel, in order."""
    return [a for a in program if isinstance(a, Transfer) and a.message.channel == channel]
