"""Too little memory for slots and buffers is said before anything is allocated, with what would fit."""

from __future__ import annotations

import re

import pytest
import torch

from ultraep_compile.codegen.bundle import Part
from ultraep_compile.errors import TopologyError
from ultraep_compile.ops.layout import ExpertLayout
from ultraep_compile.ops.plane import Geometry, refuse_too_large, regions_of

GEOMETRY = Geometry(
    "g", torch.device("cpu"), ExpertLayout(8, 2, 3), 64, 64, 4, (Part((256, 64), torch.float32),), 2, 60
)


def _needed(capacity: int, slots: int) -> int:
    layout = ExpertLayout(8, 2, slots)
    geometry = Geometry("g", torch.device("cpu"), layout, 64, 64, 4, GEOMETRY.parts, 2, 60)
    return sum(r.nbytes for r in regions_of(geometry, capacity).values())


def test_what_fits_is_named() -> None:
    refuse_too_large(GEOMETRY, 100, [_needed(100, 3)] * 2)
    with pytest.raises(TopologyError, match=r"slots for 3 copies.*rank 1 has .* redundant_experts=1 fits"):
        refuse_too_large(GEOMETRY, 100, [1 << 40, _needed(100, 2) - 1])
    with pytest.raises(TopologyError, match="Without slots it does not fit either"):
        refuse_too_large(GEOMETRY, 100, [_needed(100, 0) - 1] * 2)


def test_so_many_rows_fit_indeed() -> None:
    free = _needed(10_000, 3) // 2
    with pytest.raises(TopologyError) as error:
        refuse_too_large(GEOMETRY, 10_000, [free, free])
    found = re.search(r"at most about (\d+) rows", str(error.value))
    assert found and 0 < int(found[1]) < 10_000
    assert _needed(int(found[1]) * 98 // 100, 3) <= free
