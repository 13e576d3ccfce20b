"""The option `verify` accepts what is right and names what is wrong, however a model is compiled and divided."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from tests.multirank import run_ranks
from ultraep_compile import prepare, shadow, shard_experts
from ultraep_compile.errors import VerificationError
from ultraep_compile.ops.transport import CollectiveTransport, VirtualTransport

WIDTH, EXPERTS = 16, 8


class Stacked(nn.Module):
    """Experts as stacked weights, dropout before and a buffer that counts tokens."""

    def __init__(self, dropout: float = 0.0, counting: bool = True) -> None:
        super().__init__()
        self.counting = counting
        self.gate, self.dropout = nn.Linear(WIDTH, EXPERTS, bias=False), nn.Dropout(dropout)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 12) * 0.3)
        self.down = nn.Parameter(torch.randn(EXPERTS, 12, WIDTH) * 0.3)
        self.register_buffer("counts", torch.zeros(EXPERTS, dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(x)
        weight, ids = self.gate(x).softmax(-1).topk(2, -1)
        if self.counting:
            self.counts += nn.functional.one_hot(ids, EXPERTS).sum((0, 1))
        hidden = torch.einsum("td,tkdf->tkf", x, self.up[ids]).relu()
        return (torch.einsum("tkf,tkfd->tkd", hidden, self.down[ids]) * weight[..., None]).sum(1)


class Looped(nn.Module):
    """Experts that are modules, called in a loop; half of the tokens choose among the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 12), nn.SiLU(), nn.Linear(12, WIDTH)) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weight, ids = self.gate(x).softmax(-1).topk(2, -1)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, choice = torch.where(ids == e)
            if token.numel():
                y.index_add_(0, token, expert(x[token]) * weight[token, choice, None])
        return y


class Net(nn.Module):
    def __init__(self, layer: Callable[[], nn.Module], checkpointed: bool = False, broken: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(2))
        self.checkpointed, self.broken = checkpointed, broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
            if self.broken:
                torch._dynamo.graph_break()
        return x


def skewed(rows: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens that mostly go the same way, so that something is copied."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(1, WIDTH, generator=generator) + 0.3 * torch.randn(rows, WIDTH, generator=generator)).to(dtype)


def built(model: Callable[[], nn.Module], **options: Any) -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made = model()
    prepare(made, (skewed(32),))
    compiled = {"ranks": 4, "redundant_experts": 2, "inner": "aot_eager", "verify": 3, **options}
    made.compile(backend="ultraep", options=compiled, dynamic=options.pop("dynamic", None))
    return made


CASES: dict[str, dict[str, Any]] = {
    "stacked": {"model": lambda: Net(Stacked)},
    "looped, checkpointed": {"model": lambda: Net(Looped, checkpointed=True)},
    "stacked, checkpointed": {"model": lambda: Net(lambda: Stacked(counting=False), checkpointed=True)},
    "several graphs": {"model": lambda: Net(Stacked, broken=True)},
    "autocast": {"model": lambda: Net(Looped), "autocast": True},
    "frozen": {"model": lambda: Net(Stacked), "frozen": "up"},
    "sizes": {"model": lambda: Net(Stacked), "rows": (32, 40, 48)},
    "dropout": {"model": lambda: Net(lambda: Stacked(0.2))},
}


def steps(model: nn.Module, rows: tuple[int, ...] = (32, 32), autocast: bool = False, frozen: str = "none") -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    for n in rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(skewed(n))
        y.float().square().mean().backward()


@pytest.mark.parametrize("case", CASES)
def test_right_ones_pass_and_faults_are_named(case: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = dict(CASES[case])
    make, verified = given.pop("model"), []
    judge = shadow.Shadow._judge
    monkeypatch.setattr(shadow.Shadow, "_judge", lambda self, *found: (judge(self, *found), verified.append(found)))
    model = built(make)
    steps(model, **given)
    layers = 1 if case == "several graphs" else 2
    assert verified and all(len(found[0]) == layers and found[3] for found in verified), "layers and gradients are compared"
    counted = [b["buffer"] for b in verified[0][2]]
    assert case != "stacked" or counted == ["layers.0.counts", "layers.1.counts"]
    right = VirtualTransport.fill_slots
    monkeypatch.setattr(VirtualTransport, "fill_slots", lambda *args: right(*args) * 1.3)
    with pytest.raises(VerificationError, match=r"layer (layers\.0|getitem_\d+) .* sent to a copy"):
        steps(built(make), **given)
    monkeypatch.setattr(VirtualTransport, "fill_slots", right)
    monkeypatch.setattr(VirtualTransport, "reduce_slots", lambda self, masters, *rest: masters)
    if case != "autocast":  # in which half of a gradient may be rounding
        with pytest.raises(VerificationError, match=r"the gradient of \w"):
            steps(built(make), **given)


@pytest.mark.slow
def test_dropout_under_inductor_is_no_difference() -> None:
    steps(built(lambda: Net(lambda: Stacked(0.2)), inner="inductor"))


def _over_ranks(rank: int, ranks: int, folder: str) -> list[str]:
    """What became of each case: `ok`, or the error's message. Only one rank has the fault."""
    import os

    os.chdir(folder)
    found = []
    right = CollectiveTransport.fill_slots, VirtualTransport.fill_slots
    for how, layer in (("sharded", Looped), ("group", Stacked)):
        for fault in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = nn.Sequential(layer())
            options: dict[str, Any] = {"inner": "aot_eager", "redundant_experts": 2, "verify": 1}
            if how == "sharded":
                shard_experts(model, init_device_mesh("cpu", (ranks,)), (skewed(32),))
            else:
                options["group"] = dist.group.WORLD
                prepare(model, (skewed(32),))
            model.compile(backend="ultraep", options=options, dynamic=False)
            if fault and rank == 1:
                CollectiveTransport.fill_slots = lambda *args: right[0](*args) * 1.3
                VirtualTransport.fill_slots = lambda *args: right[1](*args) * 1.3
            try:
                for turn in range(2):  # one rank compiles again for another size, and verifies again
                    model(skewed(32 + 8 * rank * turn, seed=0)).square().mean().backward()
            except VerificationError as error:
                found.append(str(error))
            else:
                found.append("ok")
            finally:
                CollectiveTransport.fill_slots, VirtualTransport.fill_slots = right
    return found


def test_all_ranks_verify_together_and_raise_what_one_finds(tmp_path) -> None:
    """Sharded experts, and whole ones with the option `group`, whose gradients are compared as sums over the ranks."""
    first, second = run_ranks(2, _over_ranks, 2, str(tmp_path))
    assert first == second
    assert first[::2] == ["ok"] * 2
    assert all("of the rewritten graph differs" in text and text.startswith("on rank ") for text in first[1::2]), first
