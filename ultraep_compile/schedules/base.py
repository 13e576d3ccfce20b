"""Orders of the LLM's own operations: the base schedules into which encoders and generators are nested.

Every builder writes the schedule of a microbatch count that it likes; microbatches beyond M are then struck
out, which keeps any schedule feasible. `lag` is the number of microbatches that may wait between the last
forward and its backward (1: none waits; a generator that works on q microbatches at once needs q, or q+1
where each is split)."""

from __future__ import annotations

from collections import deque

from ultraep_compile.errors import ScheduleError, nearest
from ultraep_compile.schedules.actions import Op

Orders = list[list[Op]]
BASES = ("1f1b", "gpipe", "interleaved", "zero-bubble", "dualpipev")


def base_order(base: str, ranks: int, virtual: int, microbatches: int, lag: int = 1) -> Orders:
    """The operations of each rank in order."""
    if base not in BASES:
        raise ScheduleError(f"There is no base schedule {base!r}. {nearest(base, BASES)}")
    if base == "dualpipev":
        if virtual != 2:
            raise ScheduleError(f"dualpipev has 2 virtual stages per rank, not {virtual}. Give virtual=2.")
        orders = _dualpipev(ranks, max(microbatches, 2 * ranks))
    elif base == "interleaved" or (base == "1f1b" and virtual > 1):
        orders = _interleaved(ranks, virtual, -(-microbatches // ranks) * ranks, lag)
    elif virtual > 1 and base != "gpipe":
        raise ScheduleError(
            f"{base} has 1 virtual stage per rank, not {virtual}. Use interleaved or dualpipev."
        )
    elif base == "gpipe":
        orders = _gpipe(ranks, virtual, microbatches)
    elif base == "zero-bubble":
        orders = _zero_bubble(ranks, microbatches, lag)
    else:
        orders = _one_forward_one_backward(ranks, microbatches, lag)
    return [[op for op in order if op.microbatch < microbatches] for order in orders]


def _one_forward_one_backward(p: int, m: int, lag: int) -> Orders:
    """Rank r: P-1-r + lag-1 warm-up forwards, then pairs F, B, then the remaining backwards."""
    orders = []
    for r in range(p):
        warm = min(m, p - 1 - r + lag - 1)
        order = [Op("F", r, j) for j in range(warm)]
        for j in range(warm, m):
            order += (Op("F", r, j), Op("B", r, j - warm))
        orders.append(order + [Op("B", r, j) for j in range(m - warm, m)])
    return orders


def _gpipe(p: int, v: int, m: int) -> Orders:
    """All forwards, then all backwards; virtual stages one after the other."""
    orders = []
    for r in range(p):
        stages = range(r, p * v, p)
        forward = [Op("F", s, j) for s in stages for j in range(m)]
        orders.append(forward + [Op("B", s, j) for s in reversed(stages) for j in range(m)])
    return orders


def _interleaved(p: int, v: int, m: int, lag: int) -> Orders:
    """Interleaved 1F1B: microbatches pass in groups of P, each group through a rank's V stages in turn."""
    n = m * v
    orders = []
    for r in range(p):
        forward = [Op("F", (i // p % v) * p + r, i // (p * v) * p + i % p) for i in range(n)]
        backward = [Op("B", (v - 1 - i // p % v) * p + r, i // (p * v) * p + i % p) for i in range(n)]
        warm = min(n, (2 * (p - 1 - r) + (v - 1) * p if v > 1 else p - 1 - r) + lag - 1)
        order = forward[:warm]
        for i in range(warm, n):
            order += (forward[i], backward[i - warm])
        orders.append(order + backward[n - warm :])
    return orders


def _zero_bubble(p: int, m: int, lag: int) -> Orders:
    """1F1B with split backwards (ZB-H1): rank r runs the weight part r microbatches late, in what were
    bubbles.

    Every rank then holds as much as rank 0 of 1F1B. Bubble: (P-1)(F + I - W) instead of (P-1)(F + I + W).
    """
    orders = []
    for r in range(p):
        warm = min(m, p - 1 - r + lag - 1)
        order = [Op("F", r, j) for j in range(warm)]
        for j in range(m):
            if warm + j < m:
                order.append(Op("F", r, warm + j))
            order.append(Op("I", r, j))
            if j >= r:
                order.append(Op("W", r, j - r))
        orders.append(order + [Op("W", r, j) for j in range(max(0, m - r), m)])
    return orders


def _dualpipev(p: int, m: int) -> Orders:
    """DualPipe folded into a V: rank r has stages r and 2P-1-r; needs m >= 2P."""
    orders = []
    for r in range(p):
        stage = (r, 2 * p - 1 - r)
        forwards, backwards = [0, 0], [0, 0]
        weights: deque[Op] = deque()
        order: list[Op] = []

        def forward(half: int, stage=stage, done=forwards, order=order) -> None:
            order.append(Op("F", stage[half], done[half]))
            done[half] += 1

        def backward(
            half: int, split=False, stage=stage, done=backwards, order=order, weights=weights
        ) -> None:
            order.append(Op("I" if split else "B", stage[half], done[half]))
            if split:
                weights.append(Op("W", stage[half], done[half]))
            done[half] += 1

        for _ in range(2 * (p - 1 - r)):
            forward(0)
        for _ in range(r + 1):
            forward(0)
            forward(1)
        for _ in range(p - 1 - r):
            backward(1, split=True)
            order.append(weights.popleft())
            forward(1)
        for _ in range(m - 2 * p + r + 1):
            forward(0)
            backward(1)
            forward(1)
            backward(0)
        for _ in range(p - 1 - r):
            backward(1)
            forward(1)
            backward(0)
        split = False
        for i in range(r + 1):
            split = split or (i == (r + 1) // 2 and r % 2 == 1)
            backward(1, split)
            split = split or (i == (r + 1) // 2 and r % 2 == 0)
            backward(0, split)
        for _ in range(p - 1 - r):
            order.append(weights.popleft())
            backward(0, split=True)
        orders.append(order + list(weights))
    return orders
