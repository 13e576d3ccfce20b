"""The exact optimum of small planning problems, by mixed-integer programming (scipy's HiGHS)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp


def optimal_max_load(loads_E: NDArray, ranks: int, slots: int, limit_s: float = 5.0) -> int | None:
    """The lowest largest load of any plan; None when the solver runs out of time.

    Variables: x[e, r] tokens of expert e on rank r, y[e, r] whether r holds a copy of e (1 at home), and the
    largest load. Given y the rest is a transport problem, so whole x need not be asked for.
    """
    experts = loads_E.size
    home_E = np.arange(experts) // (experts // ranks)
    x, y, top = experts * ranks, 2 * experts * ranks, 2 * experts * ranks  # x ends, y ends, index of the load
    eye_E, eye_R = np.eye(experts), np.eye(ranks)
    nothing = np.zeros((experts, x))
    all_tokens = np.hstack([np.kron(eye_E, np.ones((1, ranks))), nothing, np.zeros((experts, 1))])
    only_copies = np.hstack([np.eye(x), -np.diag(np.repeat(loads_E, ranks)), np.zeros((x, 1))])
    slot_use = np.hstack([np.zeros((ranks, x)), np.tile(eye_R, experts), np.zeros((ranks, 1))])
    loads = np.hstack([np.tile(eye_R, experts), np.zeros((ranks, x)), -np.ones((ranks, 1))])
    at_home = np.zeros((experts, ranks))
    at_home[np.arange(experts), home_E] = 1
    low, high = np.zeros(y + 1), np.full(y + 1, np.inf)
    low[x:y], high[x:y] = at_home.ravel(), 1
    low[top] = -(-int(loads_E.sum()) // ranks)
    answer = milp(
        np.eye(y + 1)[top],
        constraints=[
            LinearConstraint(all_tokens, loads_E, loads_E),  # pyright: ignore[reportArgumentType]
            LinearConstraint(only_copies, -np.inf, 0),
            LinearConstraint(slot_use, 0, slots + experts // ranks),
            LinearConstraint(loads, -np.inf, 0),
        ],
        integrality=np.repeat([0, 1], [x, x + 1]),
        bounds=Bounds(low, high),  # pyright: ignore[reportArgumentType]
        options={"time_limit": limit_s},
    )
    return round(answer.fun) if answer.status == 0 else None
