"""The control block of a pool: what device waits need, and the record that a failed wait leaves to the host.

The block is an int64 region of every rank's memory. The record lies where the host can read it without the device
(pinned memory on CUDA), so that asking after a failure costs a memory read and works while a stream is stuck.
"""

from __future__ import annotations

CONTROL = "pool.control"
BARRIER = "pool.barrier"

# words of the control block, int64
CLOCK, LIMIT, FAILED, RECORD, RANK = range(5)
CONTROL_WORDS = 16

# words of the record, int64; the counts that the wait had seen from each rank follow at SEEN_BY_RANK
VALID, PHASE, PEER, EXPECTED, SEEN, SITE, INDEX, MISSING = range(8)
SEEN_BY_RANK = 8

PHASES = (
    "barrier",
    "slots are free",
    "weights have arrived",
    "a chunk to pass on has arrived",
    "slot gradients are complete",
    "slot gradients have been read",
    "dispatched rows have arrived",
    "rows to combine have arrived",
    "receive buffers are free",
    "counts have arrived",
)
"""What a wait waits for; a kernel passes the position in this tuple."""

MICROBATCH_BITS = 20  # of a site: (layer + 1) << 20 | microbatch; 0 is an unknown site


def phase_code(name: str) -> int:
    return PHASES.index(name)
