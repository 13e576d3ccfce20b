"""What the ranks of a group must have alike, compared before they exchange anything.

A rank that is about to run a graph with layers that it has not run on this group yet states what it will do: versions,
options, every layer's sizes, digests of the routers that all ranks should hold alike. Statements go through the store that
the group was made with, never over the transport that they speak of; all ranks read all of them, so all raise alike or
none. What was agreed on once is not stated again: a rank may compile a graph of known layers anew, alone. From then on
every exchange of counts starts with a word of what is exchanged (`Common.word`), which costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import time
import weakref
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from ultraep_compile.errors import PeerTimeoutError, TopologyError
from ultraep_compile.exchange import line_of

Facts = dict[str, str]
RUNS = "what they run"
"""The fact that comes first: where it differs, nothing else is worth comparing."""
GATHERS = "a layer that gathers all experts' weights (unbalanced, or in eager mode)"
BALANCED = "a compiled graph with balanced layers"
SWITCHED_OFF = "the unmodified model, as ULTRAEP_COMPILE_DISABLE is set"
_SHOWN = 6  # differences in one message
_FEW_S = 10.0
"""Seconds that a rank waits which could as well go on alone: one that is switched off, or that fails anyway."""


@dataclass(frozen=True, slots=True)
class Statement:
    """What one rank says of a graph. Names of facts read well in "NAME: VALUE on rank 0, VALUE on rank 1"."""

    settings: Facts
    """Versions and options."""
    layers: tuple[tuple[str, Facts], ...] = ()
    """(name, facts) of every balanced layer, in the order of the graph."""
    widest: int = 0
    """Experts of the layer that has most."""
    routers: Facts = field(default_factory=dict)
    """Digests of weights that change with training: compared, and no part of what is known."""
    wants: Facts = field(default_factory=dict)
    """What ranks may differ in and yet should know of each other."""
    failed: str = ""
    """The error that the rank raises instead of running the graph."""

    def known_as(self) -> frozenset[str]:
        """Digests of what the statement speaks of: agreed on once, ranks may run any graph of these layers."""
        each = [(self.settings, name, facts) for name, facts in self.layers] or [(self.settings, "", {})]
        return frozenset(_digest(e) for e in each)

    def packed(self) -> str:
        return json.dumps([self.settings, self.layers, self.widest, self.routers, self.wants, self.failed])

    @classmethod
    def unpacked(cls, text: bytes) -> Statement:
        settings, layers, *rest = json.loads(text)
        return cls(settings, tuple((name, facts) for name, facts in layers), *rest)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


class Common:
    """What the ranks of one group have agreed on, as one of them knows it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = weakref.ref(group)
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.turns = 0
        """How many statements were made."""
        self.agreed = 0
        """How many of them by all ranks, alike."""
        self.known: set[str] = set()
        self.widest = 0
        """Experts of the widest layer that was agreed on: every exchange of counts has room for as many."""
        self.wanted: dict[str, list[Facts]] = {}
        """What each rank said that it wants, by what they have agreed on."""
        self._last, self._ways = "", set[tuple[str, str]]()
        self._open: tuple[int, Statement] | None = None  # said, and not heard of everybody

    def wants(self, statement: Statement) -> list[Facts]:
        """What each rank wanted when they agreed on the layers of this statement; nothing where they did not."""
        return next((self.wanted[k] for k in statement.known_as() if k in self.wanted), [{} for _ in range(self.ranks)])

    @property
    def alone(self) -> bool:
        """Is there nobody to ask? So in a group of one, and in torch's fake groups."""
        return self.ranks == 1 or dist.get_backend(self._here()) == "fake"

    def state(self, statement: Statement, what: str, deadline_s: float) -> None:
        """Return once all ranks have stated the same; at once if that is known.

        Raises: TopologyError on every rank where they differ; PeerTimeoutError where some say nothing.
        """
        if self.alone or (not statement.failed and statement.known_as() <= self.known):
            return
        turn = self._say(statement)
        self._wait(turn, what, deadline_s)
        self._settle(turn, statement, what)

    def state_if_heard(self, statement: Statement, what: str, patience_s: float = _FEW_S) -> bool:
        """The same for a rank that can do without the others; False where some have not said anything yet. Then it looks
        again when asked again."""
        if self.alone or (not statement.failed and statement.known_as() <= self.known):
            return True
        if self._open is None or self._open[1] != statement:
            self._open = self._say(statement), statement
            self._look(self._open[0], patience_s, what)
        turn = self._open[0]
        if self._missing(turn):
            return False
        self._open = None
        self._settle(turn, statement, what)
        return True

    def word(self, doing: str) -> int:
        """31 bits that differ where ranks do different things or have agreed on different ones."""
        return zlib.crc32(f"{self.agreed} {doing}".encode()) >> 1

    def went_to(self, doing: str) -> None:
        """Remember the way from one exchange to the next."""
        self._ways.add((self._last, doing))
        self._last = doing

    def comes_anew_to(self, doing: str) -> bool:
        """Has this rank never gone from its last exchange to this one? Ranks that run the same program answer alike."""
        anew = (self._last, doing) not in self._ways
        self.went_to(doing)
        return anew and not self.alone

    def disagree(self, facts: Facts, where: str, deadline_s: float) -> NoReturn:
        """Every rank comes here that has seen words differ: each says what it was about to do.

        Raises: TopologyError.
        """
        turn = self._say(Statement({RUNS: "", **facts}))
        self._wait(turn, where, min(deadline_s, _FEW_S))
        every = self._read(turn)
        told = (
            _compared(every)
            or f"they have agreed on {self.agreed} graphs or sets of layers so far, others on more or fewer"
        )
        raise TopologyError(f"{where}: the ranks do not agree ({told}). {_cure(every)}")

    def _here(self) -> dist.ProcessGroup:
        group = self._group()
        assert group is not None
        return group

    def _store(self) -> c10d.Store:
        """Asked for anew each time: holding it would keep the server of a dead group alive."""
        group = self._here()
        find = getattr(group, "get_group_store", None)
        store = find() if find is not None else c10d._get_process_group_store(group)  # pyright: ignore
        return c10d.PrefixStore("ultraep/agreement", store)

    def _say(self, statement: Statement) -> int:
        self.turns += 1
        self._store().set(f"{self.turns}/{self.rank}", statement.packed())
        return self.turns

    def _read(self, turn: int) -> list[Statement]:
        store = self._store()
        return [Statement.unpacked(store.get(f"{turn}/{rank}")) for rank in range(self.ranks)]

    def _missing(self, turn: int) -> list[int]:
        store = self._store()
        return [rank for rank in range(self.ranks) if not store.check([f"{turn}/{rank}"])]

    def _look(self, turn: int, patience_s: float, what: str) -> list[int]:
        """Ranks that have said nothing after that time. Raises PeerTimeoutError where one of them is known to have failed."""
        began, pause = time.monotonic(), 0.001
        store, line, missing = self._store(), line_of(self._here()), list(range(self.ranks))
        with line.watchdog.waits(what):
            while missing := [rank for rank in missing if not store.check([f"{turn}/{rank}"])]:
                if (waited := time.monotonic() - began) > patience_s:
                    break
                if line.watchdog.heard is not None:
                    line.fail(what, waited)
                time.sleep(pause)
                pause = min(2 * pause, 0.05)
        return missing

    def _wait(self, turn: int, what: str, deadline_s: float) -> None:
        try:
            missing = self._look(turn, deadline_s, f"the agreement on {what}")
            if not missing:
                return
            told = "; ".join(self._what_is_known_of(rank, turn) for rank in missing[:_SHOWN])
        except RuntimeError as error:
            raise PeerTimeoutError(
                f"{what}: the store of the process group no longer answers: the process that hosts it (rank 0, or the launcher) "
                "has ended. Look at its own error or log."
            ) from error
        late = PeerTimeoutError(
            f"{what}: rank {self.rank} waited {deadline_s:g} s for rank{'s' * (len(missing) > 1)} "
            f"{', '.join(map(str, missing))} to say what they run; {told}. Give all ranks the same model and options and as many "
            "calls; if a rank only compiles for longer, raise deadline_s."
        )
        line_of(self._here()).watchdog.tell(late)  # so that whoever waits for this rank elsewhere ends as well
        raise late

    def _what_is_known_of(self, rank: int, turn: int) -> str:
        store, name = self._store(), f"did/{rank}"
        did = (
            store.get(name).decode()
            if store.check([name])
            else "has compiled nothing with backend='ultraep' on this group"
        )
        so_far = next((n for n in range(turn - 1, 0, -1) if store.check([f"{n}/{rank}"])), 0)
        return f"rank {rank} {did}, and has agreed on {so_far} of {turn} graphs or sets of layers so far"

    def note(self, did: str) -> None:
        """Tell the others what this rank did, in case they wait for it: a clause behind "rank 1"."""
        if not self.alone:
            self._store().set(f"did/{self.rank}", did)

    def _settle(self, turn: int, statement: Statement, what: str) -> None:
        every = self._read(turn)
        failed = {rank: s.failed for rank, s in enumerate(every) if s.failed}
        if statement.failed:
            return  # its own error says it best
        if failed:
            rank, text = next(iter(failed.items()))
            raise TopologyError(f"{what}: the ranks do not agree: rank {rank} cannot run it ({text}). Mend that first.")
        if differences := _compared(every):
            raise TopologyError(f"{what}: the ranks do not agree ({differences}). {_cure(every)}")
        self.agreed += 1
        self.known |= statement.known_as()
        self.widest = max(self.widest, statement.widest)
        for known in statement.known_as():
            self.wanted[known] = [s.wants for s in every]


def _compared(every: Sequence[Statement]) -> str:
    """What differs between statements, as a clause; empty where nothing does."""
    runs = [{RUNS: s.settings.get(RUNS, "")} for s in every]
    if differs := _differences(runs) or _differences([s.settings for s in every]):
        return differs
    layers = [[name for name, _ in s.layers] for s in every]
    if len({len(names) for names in layers}) > 1:
        return _differences([{"balanced MoE layers": _listed(names)} for names in layers])
    for index, here in enumerate(zip(*(s.layers for s in every), strict=True)):
        names = [{f"MoE layer {index + 1}": name} for name, _ in here]
        if differs := _differences(names) or _differences([facts for _, facts in here], f" of layer {here[0][0]}"):
            return differs
    return _differences([s.routers for s in every])


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({', '.join(names[:4])}{', ...' * (len(names) > 4)})" if names else "none"


def _differences(every: Sequence[Mapping[str, str]], of: str = "") -> str:
    """Example: [{"planner": "quota"}, {"planner": "none"}] -> "planner: quota on rank 0, none on rank 1"."""
    names = [n for n in {n: None for facts in every for n in facts} if len({f.get(n) for f in every}) > 1]
    out = []
    for name in names[:_SHOWN]:
        ranks: dict[str, list[int]] = {}
        for rank, facts in enumerate(every):
            ranks.setdefault(facts.get(name, "nothing of the kind"), []).append(rank)
        out.append(f"{name}{of}: " + ", ".join(f"{value} on {_ranks(who)}" for value, who in ranks.items()))
    return "; ".join(out) + ("; ..." if len(names) > _SHOWN else "")


def _ranks(who: Sequence[int]) -> str:
    """Example: [0] -> "rank 0", [0, 2] -> "ranks 0, 2"."""
    if len(who) > _SHOWN:
        return f"{len(who)} ranks ({who[0]}, {who[1]}, ..., {who[-1]})"
    return f"rank{'s' * (len(who) > 1)} {', '.join(map(str, who))}"


def _cure(every: Sequence[Statement]) -> str:
    run = {s.settings.get(RUNS) for s in every}
    if GATHERS in run and len(run) > 1:
        return (
            "A rank does so whose model runs in eager mode. Dynamo changes to that after torch._dynamo.config.recompile_limit "
            "recompilations, for batches of ever new sizes say: compile with dynamic=True, or pad batches to a few sizes, on all ranks "
            "alike."
        )
    return "Give all of them the same options, model, weights and versions."


_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, Common] = weakref.WeakKeyDictionary()


def common(group: dist.ProcessGroup) -> Common:
    """What this group has agreed on. A group that is made again, under whatever name, starts anew."""
    if group not in _groups:
        _groups[group] = Common(group)
    return _groups[group]
