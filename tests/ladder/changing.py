"""Layers whose forward reads Python in every way that we know of, and changes of what they read."""

from __future__ import annotations

import copy
import dataclasses
import functools
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ultraep_compile
from tests.ladder import changing_settings as settings

OPTIONS = {"ranks": 2, "redundant_experts": 1, "inner": "aot_eager"}
SHIFT = 0.0
SCALES = {"out": 1.0}
WIDTH, EXPERTS = 16, 4


@dataclasses.dataclass
class Config:
    gain: float = 1.0
    powers: list[float] = dataclasses.field(default_factory=lambda: [1.0, 2.0])


class Slotted:
    __slots__ = ("offset",)

    def __init__(self) -> None:
        self.offset = 0.0


class Expert(nn.Module):
    """Reads an attribute, a class attribute, a function kept on the instance and a closure."""

    bias_scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.0)
        self.squash = lambda x: torch.tanh(x)
        self.residual = False

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(self.drop(self.act(self.up(x)))) * self.bias_scale
        y = self.squash(y)
        return y + x if self.residual else y


def scaled_by(factor: float) -> tuple[Callable[[Tensor], Tensor], Callable[[float], None]]:
    def run(x: Tensor) -> Tensor:
        return x * factor

    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return run, change


class Reader(nn.Module):
    """A router before experts called one by one, which reads Python's state in every way."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.temperature, self.k, self.normalize = 1.0, 2, False
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))
        self.config, self.space, self.slotted = Config(), types.SimpleNamespace(gain=1.0), Slotted()
        self.table, self.pruned = {"a": {"b": 1.0}}, set[int]()
        self.closure, self.change_closure = scaled_by(1.0)
        self.partial = functools.partial(torch.add, alpha=1.0)
        self.holder = [nn.Identity()]
        self.register_buffer("limit", torch.tensor(3.0))

    def weighing(self, x: Tensor) -> Tensor:
        return x * settings.GAIN

    def forward(self, x: Tensor) -> Tensor:
        logits = self.gate(x) / self.temperature
        if getattr(self, "extra", None) is not None:
            logits = logits * self.extra
        weights, ids = logits.softmax(-1).topk(self.k, -1)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = self.weighing(weights) * self.scale * self.config.gain * self.config.powers[0] * self.space.gain
        weights = self.closure(weights + SHIFT) * SCALES["out"] * self.table["a"]["b"] + self.slotted.offset
        weights = weights.clamp(max=float(self.limit))
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            tokens, choice = torch.where(ids == e)
            if tokens.numel() and e not in self.pruned:
                y = y.index_add(0, tokens, expert(x[tokens]) * weights[tokens, choice, None])
        return self.partial(x, self.holder[0](y))


class Dense(nn.Module):
    """Experts that a compiler's graph shows as they are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.temperature, self.k, self.scale = 1.0, 2, 1.0
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 24) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, 24, WIDTH) / 5)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = (self.gate(x) / self.temperature).softmax(-1).topk(self.k, -1)
        flat = ids.reshape(-1)
        rows = x.repeat_interleave(ids.shape[1], 0).unsqueeze(1)
        y = torch.bmm(self.drop(self.act(torch.bmm(rows, self.up[flat]))), self.down[flat]).squeeze(1)
        return x + (y.reshape(*ids.shape, -1) * (weights * self.scale).unsqueeze(-1)).sum(1)


Change = Callable[[nn.Module], object]


def set_at(path: str, value: object) -> Change:
    """Set an attribute of the model or of something below it."""

    def change(model: nn.Module) -> None:
        *above, name = path.split(".")
        at: object = model
        for step in above:
            at = at[int(step)] if step.isdigit() else getattr(at, step)  # type: ignore[index]
        setattr(at, name, value)

    return change


def for_all(cls: type, name: str, value: object) -> Change:
    return lambda model: [setattr(m, name, value) for m in model.modules() if isinstance(m, cls)]


class Swapped:
    """A change of what is outside of all models, undone at the end."""

    def __init__(self, holder: object, name: str, value: object) -> None:
        self.holder, self.name, self.value = holder, name, value

    def __call__(self, model: nn.Module) -> None:
        held = self.holder if isinstance(self.holder, dict) else None
        self.before = held[self.name] if held is not None else getattr(self.holder, self.name)
        self._put(self.value)

    def _put(self, value: object) -> None:
        if isinstance(self.holder, dict):
            self.holder[self.name] = value
        elif isinstance(self.holder, type(settings)):
            vars(self.holder)[self.name] = value
        else:
            setattr(self.holder, self.name, value)

    def undo(self) -> None:
        self._put(self.before)


def _forward_put_on_an_instance(model: nn.Module) -> None:
    expert = model.experts[1]
    expert.forward = lambda x: type(expert).forward(expert, x) * 0.5


CHANGES: dict[str, Change] = {
    "attribute": set_at("temperature", 0.3),
    "choices": set_at("k", 3),
    "flag": set_at("normalize", True),
    "attribute that was not there": set_at("extra", 0.2),
    "attribute of one expert": set_at("experts.2.residual", True),
    "dataclass": set_at("config.gain", 2.0),
    "another dataclass": set_at("config", Config(gain=3.0)),
    "entry of a list in a dataclass": lambda m: m.config.powers.__setitem__(0, 0.5),
    "namespace": set_at("space.gain", 0.5),
    "slot": set_at("slotted.offset", 0.1),
    "nested dict": lambda m: m.table["a"].__setitem__("b", 3.0),
    "set": lambda m: m.pruned.add(1),
    "closure": lambda m: m.change_closure(0.5),
    "function on an instance": set_at("experts.0.squash", torch.sin),
    "forward on an instance": _forward_put_on_an_instance,
    "partial": set_at("partial", functools.partial(torch.add, alpha=0.5)),
    "module in a list": lambda m: m.holder.__setitem__(0, nn.Tanh()),
    "number of a buffer": lambda m: m.limit.fill_(0.05),
    "activation of one expert": set_at("experts.3.act", nn.GELU()),
    "activations": for_all(Expert, "act", nn.ReLU()),
    "dropout's own mode": lambda m: [e.eval() for e in m.experts],
    "experts swapped": lambda m: m._modules.__setitem__("experts", nn.ModuleList([*m.experts][::-1])),
    "class of an expert": lambda m: m.experts.__setitem__(0, _Doubled.of(m.experts[0])),
    "class attribute": Swapped(Expert, "bias_scale", 0.5),
    "class attribute of the layer": Swapped(Reader, "scale", 0.5),
    "method of a class": Swapped(Reader, "weighing", lambda self, x: x * 0.25),
    "global": Swapped(globals(), "SHIFT", 0.05),
    "entry of a global": Swapped(SCALES, "out", 0.5),
    "attribute of a module object": Swapped(settings, "GAIN", 0.5),
    "hook on an expert": lambda m: m.experts[1].register_forward_hook(lambda mod, args, out: out * 2),
    "hook inside an expert": lambda m: m.experts[1].up.register_forward_pre_hook(lambda mod, args: (args[0] * 2,)),
    "hook on the router": lambda m: m.gate.register_forward_hook(lambda mod, args, out: out * 3),
    "frozen": lambda m: m.experts[0].requires_grad_(False),
    "tied": lambda m: setattr(m.experts[0].up, "weight", m.experts[1].up.weight),
    "experts pruned": lambda m: (m.experts.__delitem__(slice(2, 4)), setattr(m, "gate", _fewer(m.gate, 2))),
    "experts added": lambda m: (
        m.experts.extend(copy.deepcopy([*m.experts][:2])),
        setattr(m, "gate", _more(m.gate, 2)),
    ),
    "weight norm": lambda m: [torch.nn.utils.parametrizations.weight_norm(e.up) for e in m.experts],
    "dtype": lambda m: m.to(torch.float64),
    "numbers loaded": lambda m: m.load_state_dict({k: v * 0.5 for k, v in m.state_dict().items()}),
}


class _Doubled(Expert):
    @classmethod
    def of(cls, expert: Expert) -> _Doubled:
        new = cls()
        new.load_state_dict(expert.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _fewer(gate: nn.Linear, experts: int) -> nn.Linear:
    new = nn.Linear(WIDTH, experts, bias=False)
    new.weight.data.copy_(gate.weight.data[:experts])
    return new


def _more(gate: nn.Linear, experts: int) -> nn.Linear:
    new = nn.Linear(WIDTH, gate.out_features + experts, bias=False)
    new.weight.data.copy_(torch.cat([gate.weight.data, gate.weight.data[:experts] * 1.1]))
    return new


def twins(model: nn.Module, x: Tensor, **options: object) -> tuple[nn.Module, nn.Module]:
    """A model as it is, and an equal one that is prepared and compiled."""
    ours = copy.deepcopy(model)
    if isinstance(model, Reader):  # a copy shares what closures hold
        ours.closure, ours.change_closure = scaled_by(1.0)
    ultraep_compile.prepare(ours, (x,))
    ours.compile(backend="ultraep", options={**OPTIONS, **options})
    return model, ours


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = model(x)
    found = {"output": out.detach(), **{n: b.detach().clone() for n, b in model.named_buffers()}}
    if out.requires_grad and torch.is_grad_enabled():
        out.square().mean().backward()
        found |= {f"gradient of {n}": p.grad for n, p in (*model.named_parameters(), ("x", x)) if p.grad is not None}
    return found


def difference(plain: nn.Module, ours: nn.Module, x: Tensor) -> str:
    """What differs, "" where nothing does."""
    want, got = step(plain, x), step(ours, x)
    for here, there in ((want, got), (got, want)):  # an expert that no token came to has gradients of zero once it is stacked
        here |= {n: torch.zeros_like(v) for n, v in there.items() if n not in here and n.startswith("gradient of ")}
    if missing := want.keys() ^ got.keys():
        return f"only one has {sorted(missing)}"
    tolerance = 1e-9 if want["output"].dtype == torch.float64 else 2e-5
    scale = max(float(v.double().norm()) for v in want.values())
    for name, value in want.items():
        if value.dtype != got[name].dtype:
            return f"{name} is {got[name].dtype}, not {value.dtype}"
        off = float((value.double() - got[name].double()).norm())
        if not off <= tolerance * float(value.double().norm()) + 1e-7 * scale:
            return f"{name} is off by {off / max(float(value.double().norm()), 1e-30):.1e}"
    return ""


class Asking(nn.Module):
    """Asks its parameters in Python what they are: their dtype, whether they learn, whether they are there."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(AskingExpert() for _ in range(EXPERTS))
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        dtype = self.experts[0].up.weight.dtype
        weights, ids = self.gate(x.to(self.gate.weight.dtype)).softmax(-1).topk(2, -1)
        y = torch.zeros(x.shape, dtype=dtype)
        for e, expert in enumerate(self.experts):
            tokens, choice = torch.where(ids == e)
            if tokens.numel():
                y = y.index_add(0, tokens, (expert(x[tokens]) * weights[tokens, choice, None].to(dtype)).to(dtype))
        y = y if self.experts[0].up.weight.requires_grad else y * 2
        return x + y.to(x.dtype) * self.unused.shape[0]


class AskingExpert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.up(x.to(self.up.weight.dtype))))


def _learn(modules: str, learns: bool) -> Change:
    return lambda m: [p.requires_grad_(learns) for p in m.get_submodule(modules).parameters()]


def _other_parameters(dtype: torch.dtype) -> Change:
    def change(model: nn.Module) -> None:
        for linear in (x for x in model.experts.modules() if isinstance(x, nn.Linear)):
            linear.weight = nn.Parameter(linear.weight.detach().to(dtype) * 1.1)
            linear.bias = nn.Parameter(linear.bias.detach().to(dtype))

    return change


def _wider(model: nn.Module) -> None:
    torch.manual_seed(5)
    for expert in model.experts:
        expert.up, expert.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)


FORMS: dict[str, Change] = {
    "experts' dtype": lambda m: m.experts.to(torch.float64),
    "all experts frozen": _learn("experts", learns=False),
    "tied": lambda m: setattr(m.experts[1].up, "weight", m.experts[0].up.weight),
    "no bias": lambda m: [setattr(e.up, "bias", None) for e in m.experts],
    "the router's dtype": lambda m: m.gate.to(torch.float64),
    "dtype of one expert": lambda m: m.experts[1].to(torch.float64),
    "data of another dtype": lambda m: [setattr(p, "data", p.data.double()) for p in m.experts.parameters()],
    "other parameters": _other_parameters(torch.float32),
    "other parameters of another dtype": _other_parameters(torch.float64),
    "one expert frozen": _learn("experts.1", learns=False),
    "the router frozen": _learn("gate", learns=False),
    "everything frozen": _learn("", learns=False),
    "one expert twice": lambda m: m.experts.__setitem__(1, m.experts[0]),
    "wider experts": _wider,
    "a shape that nothing computes with": lambda m: setattr(m, "unused", nn.Parameter(torch.zeros(3))),
}
"""Changes of what parameters are."""


__all__ = ["CHANGES", "FORMS", "Asking", "Dense", "F", "Reader", "Swapped", "difference", "step", "twins"]
