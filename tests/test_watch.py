"""The watch finds what no guard sees, leaves no trace in a step, and all ranks look together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.multirank import run_ranks
from tests.test_verify import Looped, Net, Stacked, skewed
from ultraep_compile import prepare, shard_experts, spot_check
from ultraep_compile.errors import VerificationError
from ultraep_compile.ops.transport import CollectiveTransport, VirtualTransport

OPTIONS = {"ranks": 4, "redundant_experts": 2, "inner": "aot_eager", "watch": True}


def looks(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """(layer, was its module's own forward the measure?) of every look."""
    found: list[tuple[str, bool]] = []
    real = spot_check._reference

    def noting(layer: Any, *rest: Any) -> Any:
        result = real(layer, *rest)
        found.append((layer.site.name, result[1] is not None))
        return result

    monkeypatch.setattr(spot_check, "_reference", noting)
    return found


def test_clock_looks_at_powers_of_two_and_then_at_least_every_1024_steps() -> None:
    clock = spot_check.Clock()
    due = [n for n in range(1, 5000) if clock.tick() is not None]
    assert due[:11] == [2**n for n in range(11)]
    assert due[11:] == [2047, 3070, 4093]


@pytest.mark.parametrize("case", ["stacked", "looped, checkpointed", "several graphs", "autocast", "eval"])
def test_right_layers_pass_in_turn_and_faults_are_named(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> nn.Module:
        if case == "looped, checkpointed":
            return Net(Looped, checkpointed=True)
        return Net(Stacked, broken=case == "several graphs")

    def steps() -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = make()
        prepare(model, (skewed(32),))
        model.compile(backend="ultraep", options=OPTIONS)
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), torch.set_grad_enabled(case != "eval"):
                y = model(skewed(32))
            if case != "eval":
                y.float().square().mean().backward()

    seen = looks(monkeypatch)
    steps()
    assert len(seen) == (6 if case == "several graphs" else 3) and (case == "several graphs" or len({name for name, _ in seen}) == 2)
    assert all(own for _, own in seen) == (case == "looped, checkpointed")
    right = VirtualTransport.fill_slots
    monkeypatch.setattr(VirtualTransport, "fill_slots", lambda *args: right(*args) * 1.5)
    with pytest.raises(VerificationError, match=r"the watch found that .*: tokens \d"):
        steps()
    monkeypatch.setattr(VirtualTransport, "fill_slots", right)
    if case not in ("eval", "autocast"):
        monkeypatch.setattr(VirtualTransport, "reduce_slots", lambda self, masters, *rest: masters)
        with pytest.raises(VerificationError, match="the gradient of a parameter is off"):
            steps()


def test_what_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An own forward that changes behind all guards: here, by a class that is given another one."""
    torch._dynamo.reset()
    model = Looped()
    prepare(model, (skewed(32),))
    model.compile(backend="ultraep", options=OPTIONS)
    model(skewed(32))
    model.notes = "other"  # nothing reads it, so nothing guards it
    real = Looped.forward
    other = type("Other", (Looped,), {"forward": lambda self, x: 2 * real(self, x)})
    monkeypatch.setattr(spot_check, "_plain_class", lambda m: other if isinstance(m, Looped) else type(m))
    with pytest.raises(VerificationError, match=r"tokens 0, 1.*Changed since prepare: .*notes: nothing -> 'other'"):
        model(skewed(32))


def test_a_look_leaves_no_trace() -> None:
    """Random state, buffers, gradients and what the forward writes are as without it."""
    found = []
    for watched in (True, False):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = Net(lambda: Stacked(0.2))
        model.compile(backend="ultraep", options={**OPTIONS, "watch": watched})
        torch.manual_seed(3)
        for _ in range(2):
            y = model(skewed(32))
            y.square().mean().backward()
        state = {n: b.clone() for n, b in model.named_buffers()} | {n: p.grad for n, p in model.named_parameters()}
        found.append({**state, "output": y.detach(), "random": torch.get_rng_state()})
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def _over_ranks(rank: int, ranks: int) -> list[str]:
    found = []
    right = CollectiveTransport.fill_slots, VirtualTransport.fill_slots
    for how, layer in (("sharded", Looped), ("group", Stacked)):
        for fault in (False, True):
            torch._dynamo.reset()
            spot_check._clocks.clear()
            torch.manual_seed(0)
            model = nn.Sequential(layer())
            options: dict[str, Any] = {"inner": "aot_eager", "redundant_experts": 2, "watch": True}
            if how == "sharded":
                shard_experts(model, init_device_mesh("cpu", (ranks,)), (skewed(32),))
            else:
                options["group"] = dist.group.WORLD
                prepare(model, (skewed(32),))
            model.compile(backend="ultraep", options=options, dynamic=False)
            if fault and rank == 1:
                CollectiveTransport.fill_slots = lambda *args: right[0](*args) * 1.5
                VirtualTransport.fill_slots = lambda *args: right[1](*args) * 1.5
            try:
                for _ in range(2):
                    model(skewed(32)).square().mean().backward()
            except VerificationError as error:
                found.append(str(error))
            else:
                clocks = list(spot_check._clocks.values())
                found.append(f"{[c.looks for c in clocks]}")
            finally:
                CollectiveTransport.fill_slots, VirtualTransport.fill_slots = right
    return found


def test_all_ranks_look_together_and_raise_what_one_finds() -> None:
    first, second = run_ranks(2, _over_ranks, 2)
    assert first == second
    assert first[::2] == ["[2]", "[2]"], first
    assert all("the watch found" in text and text.startswith("on rank ") for text in first[1::2]), first
