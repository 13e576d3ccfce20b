"""Who sends what to whom, read from the plan on the device: lists for the streaming kernels.

`slot_expert_RS` int32 [R, S] says which expert each slot holds, -1 = empty. The owner sends to all of an expert's slots
itself (direct), or to some which pass it on (relay: a tree of depth two). `sender_reference` and `routes_reference` say
the same in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from ultraep_compile.codegen.bundle import (
    ACTIVE,
    EPOCH,
    Bundle,
    route_layout,
    sender_offset,
)

ACTIVE_WORD, EPOCH_WORD = tl.constexpr(ACTIVE), tl.constexpr(EPOCH)
COLUMNS = tl.constexpr(32)
BLOCK = 64  # targets that one program places


@triton.jit(do_not_specialize=["rank0"])
def routes_kernel(
    slot_expert_p, bases_p, rank0, route_offset, targets_offset,
    R: tl.constexpr, M: tl.constexpr, S: tl.constexpr, MP: tl.constexpr, QP: tl.constexpr,
    BLOCK: tl.constexpr, LISTS: tl.constexpr, SENDER: tl.constexpr, RELAY: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Program (i, b): the lists of rank rank0 + i for one stage; BLOCK targets, and all sources if b = 0.

    Targets are sorted by (source, slot).

    Example: R=3, M=2, S=1, slots [[4], [1], [1]]: for rank 0, stage 0, one active source, expert 1, with two targets,
    slot 0 of rank 1 and slot 0 of rank 2; for rank 2, expert 0 with slot 0 of rank 0.
    """
    Q: tl.constexpr = R * S
    rank = rank0 + tl.program_id(0)
    own_p = tl.load(bases_p + rank)
    route_p = (own_p + route_offset).to(tl.pointer_type(tl.int32))
    targets_p = (own_p + targets_offset).to(tl.pointer_type(tl.int64)) + STAGE * Q
    N: tl.constexpr = M if STAGE == 0 else S
    lists_p = route_p + LISTS
    q = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    source = _source(slot_expert_p, route_p, q, rank, R, M, S, SENDER, RELAY, STAGE)
    place = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < QP:
        other = start + tl.arange(0, COLUMNS)
        theirs = _source(slot_expert_p, route_p, other, rank, R, M, S, SENDER, RELAY, STAGE)
        same = (theirs[None, :] == source[:, None]) & (other[None, :] < q[:, None])
        earlier = ((theirs[None, :] < source[:, None]) | same) & (theirs >= 0)[None, :]
        place += tl.sum(earlier.to(tl.int32), 1)
        start += COLUMNS
    tl.store(lists_p + 3 * N + place, q % S, mask=source >= 0)
    tl.store(targets_p + place, tl.load(bases_p + q // S, mask=source >= 0, other=0), mask=source >= 0)
    if tl.program_id(1) == 0:
        m = tl.arange(0, MP)
        first, fan = tl.zeros((MP,), tl.int32), tl.zeros((MP,), tl.int32)
        start = 0
        while start < QP:
            theirs = _source(
                slot_expert_p, route_p, start + tl.arange(0, COLUMNS), rank, R, M, S, SENDER, RELAY, STAGE
            )
            fan += tl.sum((theirs[None, :] == m[:, None]).to(tl.int32), 1)
            first += tl.sum(((theirs[None, :] < m[:, None]) & (theirs >= 0)[None, :]).to(tl.int32), 1)
            start += COLUMNS
        active = (fan > 0) & (m < N)
        position = tl.cumsum(active.to(tl.int32), 0) - 1
        tl.store(lists_p + position, m, mask=active)
        tl.store(lists_p + N + position, first, mask=active)
        tl.store(lists_p + 2 * N + position, fan, mask=active)
        tl.store(route_p + ACTIVE_WORD + STAGE, tl.sum(active.to(tl.int32), 0))
        if STAGE == 0:
            tl.store(route_p + EPOCH_WORD, tl.load(route_p + EPOCH_WORD) + 1)


@triton.jit
def _source(
    slot_expert_p, route_p, q, rank,
    R: tl.constexpr, M: tl.constexpr, S: tl.constexpr, SENDER: tl.constexpr, RELAY: tl.constexpr, STAGE: tl.constexpr,
):  # fmt: skip
    """Local expert (stage 0) or local slot (stage 1) of this rank from which slot q is filled; -1 if from elsewhere."""
    inside = q < R * S
    sender = q * 0 - 1
    if RELAY:
        sender = tl.load(route_p + SENDER + q, mask=inside, other=-1)
    if STAGE == 0:
        expert = tl.load(slot_expert_p + q, mask=inside, other=-1)
        mine = (expert >= rank * M) & (expert < rank * M + M) & (sender < 0)
        return tl.where(mine, expert - rank * M, -1)
    else:
        return tl.where((sender >= 0) & (sender // S == rank), sender % S, -1)


@triton.jit(do_not_specialize=["rank0"])
def tree_kernel(
    slot_expert_p, bases_p, rank0, route_offset,
    R: tl.constexpr, M: tl.constexpr, S: tl.constexpr, RP: tl.constexpr, QP: tl.constexpr,
    SENDER: tl.constexpr, FORCE: tl.constexpr,
):  # fmt: skip
    """Program i, for rank rank0 + i: the sender of every slot (a slot that passes on, or -1 for the owner).

    Every rank computes the same. Experts are taken by falling number of copies n, then by id. The floor(sqrt(n)) hosts
    with the least projected egress pass on to the others in turn. That is kept if it lowers the worst projected traffic,
    out or in, of the owner and the hosts concerned (always, with FORCE). Traffic is counted in experts.
    """
    Q: tl.constexpr = R * S
    rank = rank0 + tl.program_id(0)
    route_p = (tl.load(bases_p + rank) + route_offset).to(tl.pointer_type(tl.int32))
    sender_p = route_p + SENDER
    key_p, order_p, egress_p = sender_p + Q, sender_p + 2 * Q, sender_p + 3 * Q
    q, r = tl.arange(0, QP), tl.arange(0, RP)
    inside = q < Q
    expert = tl.load(slot_expert_p + q, mask=inside, other=-1)
    tl.store(sender_p + q, tl.zeros((QP,), tl.int32) - 1, mask=inside)
    copies = tl.zeros((QP,), tl.int32)
    egress, ingress = tl.zeros((RP,), tl.int32), tl.zeros((RP,), tl.int32)
    start = 0
    while start < QP:
        c = start + tl.arange(0, COLUMNS)
        theirs = tl.load(slot_expert_p + c, mask=c < Q, other=-1)
        copies += tl.sum((theirs[None, :] == expert[:, None]).to(tl.int32), 1)
        egress += tl.sum(((theirs >= 0)[None, :] & ((theirs // M)[None, :] == r[:, None])).to(tl.int32), 1)
        ingress += tl.sum(((theirs >= 0)[None, :] & ((c // S)[None, :] == r[:, None])).to(tl.int32), 1)
        start += COLUMNS
    copies = tl.where(expert >= 0, copies, 0)
    tl.store(egress_p + r, egress, mask=r < R)
    taken = tl.zeros((QP,), tl.int32)
    n = tl.max(copies, 0)
    while n >= (2 if FORCE else 4):
        candidate = tl.min(tl.where((copies == n) & (taken == 0), expert, 2147483647), 0)
        hosts = expert == candidate
        owner = candidate // M
        taken = tl.where(hosts, 1, taken)
        tl.debug_barrier()
        key = tl.where(hosts, tl.load(egress_p + q // S, mask=inside, other=0) * R + q // S, 2147483647)
        tl.store(key_p + q, key, mask=inside)
        tl.debug_barrier()
        order = tl.zeros((QP,), tl.int32)
        start = 0
        while start < QP:
            c = start + tl.arange(0, COLUMNS)
            order += tl.sum((tl.load(key_p + c, mask=c < Q, other=2147483647)[None, :] < key[:, None]).to(tl.int32), 1)
            start += COLUMNS
        k = 1
        while (k + 1) * (k + 1) <= n:
            k += 1
        relays = hosts & (order < k)
        children = tl.where(relays, (n - 1 - order) // k, 0)
        now_q = tl.load(egress_p + q // S, mask=inside, other=0)
        in_q = tl.zeros((QP,), tl.int32)
        start = 0
        while start < QP:
            c = start + tl.arange(0, COLUMNS)
            full = tl.load(slot_expert_p + c, mask=c < Q, other=-1) >= 0
            in_q += tl.sum((full[None, :] & ((c // S)[None, :] == (q // S)[:, None])).to(tl.int32), 1)
            start += COLUMNS
        out_owner = tl.load(egress_p + owner)
        in_owner = tl.sum(tl.where(r == owner, ingress, 0), 0)
        before = tl.maximum(out_owner, in_owner)
        worst = tl.max(tl.where(relays, tl.maximum(now_q + children, in_q), 0), 0)
        after = tl.maximum(worst, tl.maximum(out_owner - n + k, in_owner))
        tl.store(order_p + q, tl.where(hosts, order, 2147483647), mask=inside)
        tl.debug_barrier()
        if FORCE or after < before:
            if n > k:
                wanted = tl.where(hosts & (order >= k), (order - k) % k, -1)
                sender = tl.zeros((QP,), tl.int32)
                start = 0
                while start < QP:
                    c = start + tl.arange(0, COLUMNS)
                    match = tl.load(order_p + c, mask=c < Q, other=2147483647)[None, :] == wanted[:, None]
                    sender += tl.sum(tl.where(match, c[None, :], 0), 1)
                    start += COLUMNS
                tl.store(sender_p + q, sender, mask=wanted >= 0)
                tl.store(egress_p + q // S, now_q + children, mask=relays)
                tl.debug_barrier()
                tl.store(egress_p + owner, tl.load(egress_p + owner) - n + k)
        n = tl.max(tl.where(taken == 0, copies, 0), 0)


def launch_routes(
    bundle: Bundle, slot_expert_RS, bases, rank0: int, hosted: int, offsets: tuple[int, int], mode: str
) -> None:
    """Fill the route regions of the hosted ranks for `mode` direct, relay (wherever n > 1) or adaptive."""
    R, M, S, Q = bundle.ranks, bundle.masters, bundle.slots, bundle.total_slots
    width = max(32, triton.next_power_of_2(Q))
    sizes = {"R": R, "M": M, "S": S, "QP": width, "SENDER": sender_offset(bundle)}
    if mode != "direct":
        tree_kernel[(hosted,)](
            slot_expert_RS, bases, rank0, offsets[0], **sizes, RP=triton.next_power_of_2(R), FORCE=mode == "relay"
        )
    for stage in (0, 1) if mode != "direct" else (0,):
        sources = triton.next_power_of_2((M, S)[stage])
        block = min(width, BLOCK)
        routes_kernel[(hosted, triton.cdiv(Q, block))](
            slot_expert_RS, bases, rank0, *offsets, **sizes, MP=sources, STAGE=stage, RELAY=mode != "direct", BLOCK=block,
            LISTS=route_layout(bundle, stage).source,
        )  # fmt: skip


def sender_reference(slot_expert: Sequence[Sequence[int]], masters: int, force: bool = False) -> list[int]:
    """The slot that passes the expert on to each slot, -1 for the owner; the rule of `tree_kernel`.

    Example: 1 master a rank, expert 0 in one slot of each of ranks 1..4: ranks 1 and 2 get it from the owner, rank 3
    from rank 1's slot and rank 4 from rank 2's: the owner sends 2 instead of 4.
    """
    slots = len(slot_expert[0])
    flat = [e for row in slot_expert for e in row]
    sender = [-1] * len(flat)
    copies: dict[int, list[int]] = {}
    for q, e in enumerate(flat):
        if e >= 0:
            copies.setdefault(e, []).append(q)
    egress = [sum(e >= 0 and e // masters == r for e in flat) for r in range(len(slot_expert))]
    ingress = [sum(e >= 0 for e in row) for row in slot_expert]
    for e, hosts in sorted(copies.items(), key=lambda item: (-len(item[1]), item[0])):
        n, owner = len(hosts), e // masters
        if n < (2 if force else 4):
            break
        k = math.isqrt(n)
        hosts = sorted(hosts, key=lambda q: (egress[q // slots], q // slots))
        children = [len(range(k + j, n, k)) for j in range(k)]
        relays = [(q // slots, more) for q, more in zip(hosts, children, strict=False)]
        after = max(max(egress[r] + more, ingress[r]) for r, more in relays)
        after = max(after, egress[owner] - n + k, ingress[owner])
        if force or after < max(egress[owner], ingress[owner]):
            for j, q in enumerate(hosts[k:]):
                sender[q] = hosts[j % k]
            for r, more in relays:
                egress[r] += more
            egress[owner] -= n - k
    return sender


def routes_reference(
    slot_expert: Sequence[Sequence[int]], masters: int, rank: int, sender: Sequence[int], stage: int
) -> list[tuple[int, list[int]]]:
    """(source, its target slots q) of one rank in order; the lists of `routes_kernel`."""
    slots = len(slot_expert[0])
    flat = [e for row in slot_expert for e in row]
    found: dict[int, list[int]] = {}
    for q, e in enumerate(flat):
        if stage == 0 and e >= 0 and e // masters == rank and sender[q] < 0:
            found.setdefault(e % masters, []).append(q)
        if stage == 1 and sender[q] >= 0 and sender[q] // slots == rank:
            found.setdefault(sender[q] % slots, []).append(q)
    return sorted(found.items())
