"""The run-time proof that a row function treats rows one by one.

Whole-model equality does not show it (all rows are there), and probing cannot see an op that keeps all shapes
and mixes rows. So each distinct function runs once on a few random rows: permuted, padded, poisoned, and in
gradient. Only what lies between the products is on trial; these are replaced by a cheap stand-in that is row
by row for certain, over parameters that overlap in memory. So it takes milliseconds whatever the size of the
model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ultraep_compile.passes.lift.markers import expert_mm, expert_take
from ultraep_compile.passes.lift.nodes import draws_random, held
from ultraep_compile.passes.lift.site import Site
from ultraep_compile.passes.lift.values import Refusal

_proven: set[tuple] = set()
_ROWS = 7


def verify_site(site: Site) -> None:
    """Raise `Refusal` unless the row function is proven to be row by row. Each distinct function is tried
    once.
    """
    if site.row_function.meta.get("proven"):  # sites that are alike share the module
        return
    key = _key(site)
    if key not in _proven:
        _try(site)
        _proven.add(key)
    site.row_function.meta["proven"] = True


def _try(site: Site) -> None:
    with unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        trial = _Trial(site)
        trial.permuted()
        trial.poisoned()
        trial.more_experts()
        trial.gradient()


def _key(site: Site) -> tuple:
    """What the proof depends on: the code, and the shapes of one row and of one expert."""
    shapes = [(tuple(held(n).shape[1:]), held(n).dtype) for n in (site.hidden, *site.params)]
    shapes += [(tuple(held(c).shape), held(c).dtype) for c in site.consts]
    text = site.row_function.print_readable(print_output=False, include_stride=False, include_device=False)
    return (text, str(shapes), site.uses_weight)


class _StandIn(fx.Interpreter):
    """The row function with its expert ops replaced: x -> (x . w[e, :, 0]) * w[e, 0, :], zero for foreign
    ids.
    """

    def call_function(self, target: Any, args: tuple, kwargs: dict) -> Any:
        if target is expert_mm:
            x, weight, ids = args
            ours = (ids >= 0) & (ids < weight.shape[0])
            pick = ids.clamp(0, weight.shape[0] - 1)
            y = (x * weight[:, :, 0][pick]).sum(-1, keepdim=True) * weight[:, 0, :][pick]
            return torch.where(ours[:, None], y, torch.zeros((), dtype=y.dtype, device=y.device))
        if target is expert_take:
            return expert_take(*args)
        return super().call_function(target, args, kwargs)


class _Trial:
    def __init__(self, site: Site) -> None:
        self.site = site
        hidden = held(site.hidden)
        self.device = hidden.device
        self.rows = torch.randn(_ROWS, int(hidden.shape[1])).to(self.device, hidden.dtype)
        self.ids = torch.arange(_ROWS, device=self.device) % 2
        self.weight = None
        if site.uses_weight and site.weight is not None:
            self.weight = torch.rand(_ROWS, 1).to(self.device, held(site.weight).dtype)
        self.consts = [self._random(held(c)) for c in site.consts]
        self.params = self._params(2)
        self.y = self.run(self.rows, self.ids, self.weight)
        if self.y.ndim != 2 or self.y.shape[0] != _ROWS:
            raise Refusal(f"the row function gives {list(self.y.shape)} for {_ROWS} rows")
        if not self.y.isfinite().all():
            raise Refusal("the row function does not give finite numbers on random rows")

    def _random(self, like: Tensor) -> Tensor:
        return (torch.rand(tuple(int(s) for s in like.shape)) + 0.5).to(self.device, like.dtype)

    def _params(self, experts: int) -> list[Tensor]:
        """Parameters [experts, ...] whose entries p[e, i, o] = s[e + i + o]: full size in shape, tiny in
        memory.
        """
        made = []
        for node in self.site.params:
            like = held(node)
            shape = (experts, *(int(s) for s in like.shape[1:]))
            generator = torch.Generator().manual_seed(len(made))
            entries = torch.randn(sum(shape) + 64, generator=generator).to(self.device, like.dtype)
            made.append(entries.as_strided(shape, (1,) * len(shape)))
        return made

    def run(self, rows: Tensor, ids: Tensor, weight: Tensor | None, params: list[Tensor] | None = None) -> Tensor:
        torch.manual_seed(1)  # random draws, if any, are the same for the same number of rows
        inputs = [rows, ids, *([] if weight is None else [weight]), *(params or self.params), *self.consts]
        return _StandIn(self.site.row_function).run(*inputs)

    def permuted(self) -> None:
        """Another order, with padded rows in between."""
        if any(map(draws_random, self.site.row_function.graph.nodes)):
            return
        pad = 3
        order = torch.randperm(_ROWS + pad, device=self.device)
        real = order < _ROWS
        pick = order.clamp(max=_ROWS - 1)
        rows = torch.where(real[:, None], self.rows[pick], torch.full_like(self.rows[pick], 3.0))
        ids = torch.where(real, self.ids[pick], 2)  # 2 experts: padded rows carry id E
        weight = None if self.weight is None else self.weight[pick]
        y = self.run(rows, ids, weight)
        if not _close(y[real], self.y[pick[real]]):
            raise Refusal("the result of a row depends on its place or on padded rows")

    def poisoned(self) -> None:
        """NaN, or huge numbers, in some rows change no other: every second row, then the rest."""
        for bad in (float("nan"), 1e4):
            for hit in self._halves():
                rows, ids = self.rows.clone(), self.ids.clone()
                rows[hit], ids[hit] = bad, 1 - ids[hit]
                weight = None if self.weight is None else torch.where(hit[:, None], bad, self.weight)
                if not _close(self.run(rows, ids, weight)[~hit], self.y[~hit]):
                    raise Refusal("one row changes the result of another")

    def _halves(self) -> tuple[Tensor, Tensor]:
        even = torch.arange(_ROWS, device=self.device) % 2 == 0
        return even, ~even

    def more_experts(self) -> None:
        """The number of experts is not baked in."""
        if not _close(self.run(self.rows, self.ids, self.weight, self._params(4)), self.y):
            raise Refusal("the result depends on the number of experts")

    def gradient(self) -> None:
        """The gradient of one row's result reaches no other row."""
        leaves = [t.clone().requires_grad_() for t in (self.rows, self.weight) if t is not None]
        with torch.enable_grad():
            y = self.run(leaves[0], self.ids, leaves[1] if len(leaves) > 1 else None)
            if not y.requires_grad:
                return
            for hit in self._halves():
                grads = torch.autograd.grad(y[hit].float().sum(), leaves, allow_unused=True, retain_graph=True)
                if any(g is not None and bool(g[~hit].any()) for g in grads):
                    raise Refusal("the gradient of one row reaches another")


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-5 if a.dtype in (torch.float32, torch.float64) else 2e-2
    return bool(torch.allclose(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.float().abs().mean())))
