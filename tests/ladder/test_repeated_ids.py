"""Tokens whose ids name one expert twice, in batches that come after `prepare`: eager's results and gradients, or an error that says so.

Whether both results count, one of them or none is the layer's own doing; ids of one top-k never repeat.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from tests.balancing import relative
from ultraep_compile import prepare
from ultraep_compile.errors import RoutingError
from ultraep_compile.ladder.install import lifted_layer

WIDTH, EXPERTS, TOKENS = 16, 4, 24


class Given(nn.Module):
    """Routing weights are the router's, ids are the caller's; `add` says how results of an expert are added to the sum."""

    def __init__(self, choices: int = 2) -> None:
        super().__init__()
        self.choices = choices
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        one = lambda: nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, WIDTH))  # noqa: E731
        self.experts = nn.ModuleList(one() for _ in range(EXPERTS))

    def ids(self, x: Tensor, given: Tensor) -> Tensor:
        return given

    def add(self, y: Tensor, rows: Tensor, results: Tensor) -> Tensor:
        y[rows] += results
        return y

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        ids = self.ids(x, given)
        w, y = self.gate(x).softmax(-1).gather(1, ids), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel():
                y = self.add(y, t, expert(x[t]) * w[t, k, None])
        return x + y


class Put(Given):
    def add(self, y, rows, results):
        return y.index_put((rows,), y[rows] + results)


class Copied(Given):
    def add(self, y, rows, results):
        return y.index_copy(0, rows, y[rows] + results)


class Summed(Given):
    def add(self, y, rows, results):
        return y.index_add(0, rows, results)


class Accumulated(Given):
    def add(self, y, rows, results):
        return y.index_put((rows,), results, accumulate=True)


class Table(Given):
    """Ids by a table of token numbers, which may be loaded anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(50)]))

    def ids(self, x, given):
        return self.table[given[:, 0]]


class Hashed(Given):
    """Two hash functions, which may meet."""

    def ids(self, x, given):
        return torch.stack([given[:, 0] % EXPERTS, (given[:, 0] * 7 + given[:, 1]) % EXPERTS], 1)


class Renamed(Given):
    """A top-k whose choices are renamed by a table: many names, few experts."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, 2 * EXPERTS)
        self.register_buffer("names", torch.arange(2 * EXPERTS) % EXPERTS)

    def ids(self, x, given):
        return self.names[self.wide(x).topk(2, -1).indices]


class TwoRouters(Given):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(WIDTH, EXPERTS)

    def ids(self, x, given):
        return torch.cat([self.gate(x).argmax(-1, keepdim=True), self.other(x).argmax(-1, keepdim=True)], -1)


class ByMask(Given):
    """Weights [T, E]: an expert counts once, however often it is named."""

    def forward(self, x, given):
        g, y = self.gate(x).softmax(-1), torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t = (given == e).any(-1).nonzero().flatten()
            if t.numel():
                y[t] += expert(x[t]) * g[t, e, None]
        return x + y


class TopK(Given):
    def ids(self, x, given):
        return self.gate(x).topk(2, -1)[1][:, :2]


def distinct(seed: int, choices: int = 2, rows: int = TOKENS) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(EXPERTS, generator=generator)[:choices] for _ in range(rows)])


def ids_with_repeats(how: str, choices: int) -> Tensor:
    ids = distinct(3, choices)
    if how == "one row":
        ids[5, -1] = ids[5, 0]
    elif how == "all alike":
        ids[:] = 1
    elif how == "all rows":
        ids[:, 1:] = ids[:, :1]
    return ids


def step(model: nn.Module, x: Tensor, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x, ids)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {
        "y": y.detach(),
        "x": x.grad,
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


def prepared(model: nn.Module, ids: Tensor) -> nn.Module:
    ours = copy.deepcopy(model)
    prepare(ours, (torch.randn(TOKENS, WIDTH), ids))
    assert lifted_layer(ours) is not None
    torch._dynamo.reset()
    ours.compile(
        backend="ultraep", options={"ranks": 2, "redundant_experts": 1, "inner": "aot_eager", "expect_moe_sites": 1}
    )
    return ours


KEEPS_ONE = {"Given": Given, "Put": Put, "Copied": Copied}
EQUAL = {"Summed": Summed, "Accumulated": Accumulated, "ByMask": ByMask}


DEFAULT = ("Given", "Summed", "ByMask")


@pytest.mark.parametrize(
    "name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in KEEPS_ONE | EQUAL]
)
def test_given_ids(name):
    torch.manual_seed(0)
    choices = 3 if name in ("Given", "Summed") else 2
    model = (KEEPS_ONE | EQUAL)[name](choices)
    ours = prepared(model, distinct(0, choices))
    x = torch.randn(TOKENS, WIDTH)
    for how in ("none", "one row", "all rows", "all alike"):
        ids = ids_with_repeats(how, choices)
        if how != "none" and name in KEEPS_ONE:
            with pytest.raises(RoutingError, match=r"more than once.*index_add_"):
                ours(x, ids)
            continue
        want, got = step(model, x, ids), step(ours, x, ids)
        assert all(relative(got[n], t) < 1e-5 for n, t in want.items()), how
    if name in KEEPS_ONE:
        with pytest.raises(RoutingError, match=r"token 5 names expert .*again in choice"):
            ours(x, ids_with_repeats("one row", choices))


@pytest.mark.parametrize(
    "kind", [Table, *(pytest.param(k, marks=pytest.mark.slow) for k in (Hashed, Renamed, TwoRouters))]
)
def test_ids_made_in_the_forward(kind):
    """Repeats that no probe has: a table changed later, hash functions and routers that meet."""
    torch.manual_seed(0)
    model = kind()
    tokens = torch.randint(0, 50, (TOKENS, 2))
    if kind is Hashed:  # 7 t + u = t + 1 (mod 4): the two never meet in the example
        tokens[:, 1] = (1 - 6 * tokens[:, 0]) % EXPERTS
    ours = copy.deepcopy(model)
    prepare(ours, (torch.randn(TOKENS, WIDTH), tokens))
    torch._dynamo.reset()
    ours.compile(backend="ultraep", options={"ranks": 2, "redundant_experts": 1, "inner": "aot_eager"})
    x = torch.randn(TOKENS, WIDTH)
    other = torch.randint(0, 50, (TOKENS, 2), generator=torch.Generator().manual_seed(1))
    if kind is Table:
        model.table[:, 1] = model.table[:, 0]
        ours.table[:, 1] = ours.table[:, 0]
    want = step(model, x, other)
    try:
        got = step(ours, x, other)
    except RoutingError as error:
        assert "more than once" in str(error)
    else:
        assert all(relative(got[n], t) < 1e-5 for n, t in want.items())


def test_a_top_k_needs_no_check():
    torch.manual_seed(0)
    model = TopK()
    prepare(model, (torch.randn(TOKENS, WIDTH), distinct(0)))
    layer = lifted_layer(model)
    assert layer is not None and not any("distinct" in lift.source for lift in layer.lifts.values())
