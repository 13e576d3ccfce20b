"""The split of quotas over source ranks: exact in both margins, local first."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ultraep_compile.planner.shares import split_quotas


def test_example():
    # one expert with quotas 4 on rank 0 and 2 on rank 1; sources hold 3, 1 and 2 of its tokens
    counts_RE = np.array([[3, 0, 0], [1, 0, 0], [2, 0, 0]])
    slot_expert_RS = np.array([[-1], [0], [-1]])
    shares_RP = split_quotas(counts_RE, slot_expert_RS, np.array([4, 0, 0, 2, 0, 0]))
    assert shares_RP.tolist() == [[3, 0, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 0]]


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 7), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**31), st.booleans())
def test_any_quotas_are_met_exactly(ranks, masters, slots, seed, large):
    rng = np.random.default_rng(seed)
    experts, slots = ranks * masters, min(slots, (ranks - 1) * masters)
    counts_RE = rng.integers(0, 2**31 // ranks if large else 9, (ranks, experts))
    slot_expert_RS = np.full((ranks, slots), -1)
    for rank in range(ranks):
        foreign = np.delete(np.arange(experts), np.s_[rank * masters : (rank + 1) * masters])
        number = rng.integers(0, slots + 1)
        slot_expert_RS[rank, rng.permutation(slots)[:number]] = rng.choice(foreign, number, replace=False)
    home_RM = np.arange(experts).reshape(ranks, masters)
    expert_P = np.concatenate([home_RM, slot_expert_RS], 1).ravel()
    host_P = np.arange(expert_P.size) // (masters + slots)
    quota_P = np.zeros(expert_P.size, np.int64)
    for expert in range(experts):
        copies = np.flatnonzero(expert_P == expert)
        cuts = np.sort(rng.integers(0, counts_RE[:, expert].sum() + 1, copies.size - 1))
        quota_P[copies] = np.diff(np.concatenate([[0], cuts, [counts_RE[:, expert].sum()]]))

    shares_RP = split_quotas(counts_RE, slot_expert_RS, quota_P)

    assert shares_RP.min() >= 0
    assert (shares_RP.sum(0) == quota_P).all()
    for expert in range(experts):
        assert (shares_RP[:, expert_P == expert].sum(1) == counts_RE[:, expert]).all()
    own = counts_RE[host_P, np.maximum(expert_P, 0)]
    local = shares_RP[host_P, np.arange(expert_P.size)]
    assert (local == np.where(expert_P >= 0, np.minimum(own, quota_P), 0)).all()
    # laid on lines, sources and copies cross at most once each
    for expert in range(experts):
        block = shares_RP[:, expert_P == expert]
        assert np.count_nonzero(block) <= ranks + 2 * block.shape[1] - 1
