"""The lives of models: random steps of training and changes of Python's state, on a compiled model and its eager twin."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable

import torch
import torch.utils.checkpoint as checkpoint
from torch import Tensor, nn

import ultraep_compile
from tests.ladder.changing import OPTIONS, WIDTH, Dense, difference


class Lifted(nn.Module):
    """Experts called one by one from a list, as a compiler cannot see them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.temperature, self.k, self.scale = 1.0, 2, 1.0
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        one = lambda: nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Dropout(0.0), nn.Linear(24, WIDTH))  # noqa: E731
        self.experts = nn.ModuleList(one() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        w, ids = (self.gate(x) / self.temperature).softmax(-1).topk(self.k, -1)
        w, y = w * self.scale, torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            t, k = torch.where(ids == e)
            if t.numel():
                y = y.index_add(0, t, expert(x[t]) * w[t, k, None])
        return x + y


class Model(nn.Module):
    """The layer between two others, under an activation checkpoint where that is asked for."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.before, self.layer, self.after, self.recomputed = (
            nn.Linear(WIDTH, WIDTH),
            layer,
            nn.Linear(WIDTH, WIDTH),
            False,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        y = checkpoint.checkpoint(self.layer, x, use_reentrant=False) if self.recomputed else self.layer(x)
        return self.after(y)


def _adapted() -> nn.Module:
    import peft

    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=r".*experts\.\d+\.[03]", init_lora_weights=False)
    return peft.get_peft_model(Model(Lifted()), config)  # type: ignore[arg-type]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lifted": lambda: Model(Lifted()),
    "traced": lambda: Model(Dense()),
    "adapted": _adapted,
}


class Life:
    """One compiled model, its twin, and what has happened to them.

    Args:
        name: in `MODELS`.
        seed: of all that is random.
    """

    def __init__(self, name: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        self.plain = MODELS[name]()
        self.ours = copy.deepcopy(self.plain)
        self.batch, self.traced = 0, name == "traced"
        ultraep_compile.prepare(self.ours, (self._x(),))
        self.ours.compile(backend="ultraep", options=OPTIONS)
        self.history: list[str] = []
        self.hooks: list[tuple] = []
        self.kinds: dict[str, Callable[[nn.Module, random.Random], object]] = dict(_COMMON)
        self.kinds |= {"lifted": _OF_LISTS, "adapted": _OF_LISTS | _OF_ADAPTERS}.get(name, {})

    @property
    def seen(self) -> int:
        return len({entry.split(" ")[0] for entry in self.history})

    def _x(self) -> Tensor:
        self.batch += 1
        dtype = next(self.plain.parameters()).dtype
        tokens = self.random.choice((24, 24, 40))
        return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(self.batch)).to(dtype)

    def step(self) -> str:
        """Change both models alike and run a step of each: what differs, "" if nothing."""
        # a hook on what torch.compile sees whole is one of those that Dynamo says it does not look for
        name = self.random.choice([*self.kinds, "train step", *(() if self.traced else ("hook",))])
        if name == "hook":
            self._hook()
        elif name != "train step":
            seed = self.random.random()
            for model in (self.plain, self.ours):
                self.kinds[name](model, random.Random(seed))
        self.history.append(name)
        wrong = difference(self.plain, self.ours, self._x())
        if name == "train step":
            for model in (self.plain, self.ours):
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            p -= 0.01 * p.grad
        if len(self.history) % 12 == 0:  # as a new process would: graphs are not what is tested
            torch._dynamo.reset()
        return wrong

    def _hook(self) -> None:
        if self.hooks:
            for handle in self.hooks.pop():
                handle.remove()
            return
        names = [
            n for n, m in self.plain.named_modules() if isinstance(m, nn.Linear) and "layer" in n and "lora" not in n
        ]
        where = self.random.choice(names)
        double = lambda module, args, out: out * 1.5  # noqa: E731
        self.hooks.append(tuple(m.get_submodule(where).register_forward_hook(double) for m in (self.plain, self.ours)))


def _layer(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, (Lifted, Dense)))


def _set(name: str, values: tuple) -> Callable[[nn.Module, random.Random], object]:
    return lambda model, at: setattr(_layer(model), name, at.choice(values))


def _swap_activations(model: nn.Module, at: random.Random) -> None:
    new = at.choice((nn.SiLU, nn.GELU, nn.ReLU))
    for module in _layer(model).modules():
        for name, child in module.named_children():
            if isinstance(child, (nn.SiLU, nn.GELU, nn.ReLU)):
                setattr(module, name, new())


def _freeze(model: nn.Module, at: random.Random) -> None:
    trained = at.random() < 0.6
    for parameter in _layer(model).parameters():
        parameter.requires_grad_(trained)


def _load(model: nn.Module, at: random.Random) -> None:
    factor = at.choice((0.9, 1.1))
    model.load_state_dict({k: v * factor for k, v in model.state_dict().items()})


def _half_of_experts(model: nn.Module, at: random.Random) -> None:
    layer = _layer(model)
    if len(layer.experts) == 4:
        del layer.experts[2:]
    else:
        layer.experts.extend(copy.deepcopy([*layer.experts]))
    gate = nn.Linear(WIDTH, len(layer.experts), bias=False).to(layer.gate.weight.dtype)
    rows = [e % layer.gate.out_features for e in range(len(layer.experts))]
    gate.weight.data.copy_(layer.gate.weight.data[rows] + 0.1 * torch.arange(len(rows))[:, None])
    layer.gate = gate


_COMMON: dict[str, Callable[[nn.Module, random.Random], object]] = {
    "temperature": _set("temperature", (1.0, 0.5, 2.0)),
    "k": _set("k", (1, 2)),
    "scale": _set("scale", (1.0, 2.0)),
    "eval": lambda m, at: m.eval(),
    "train": lambda m, at: m.train(),
    "activations": _swap_activations,
    "freeze": _freeze,
    "load": _load,
    "dtype": lambda m, at: m.to(at.choice((torch.float32, torch.float32, torch.float64))),
    "checkpointing": lambda m, at: [
        setattr(x, "recomputed", at.random() < 0.4) for x in m.modules() if isinstance(x, Model)
    ],
}
_OF_LISTS: dict[str, Callable[[nn.Module, random.Random], object]] = {
    "experts.eval": lambda m, at: [e.eval() for e in _layer(m).experts],
    "experts": _half_of_experts,
    "p": lambda m, at: [setattr(d, "p", at.choice((0.0, 1.0))) for d in m.modules() if type(d) is nn.Dropout],
}


def _merge(model: nn.Module, at: random.Random) -> None:
    model.base_model.enable_adapter_layers()  # merged ones that are disabled write to weights in a forward, which nobody compiles
    model.merge_adapter()


def _disable(model: nn.Module, at: random.Random) -> None:
    model.unmerge_adapter()
    model.base_model.disable_adapter_layers()


def _scaled(model: nn.Module, at: random.Random) -> None:
    factor = at.choice((0.5, 1.0, 2.0))
    for module in model.modules():
        if hasattr(module, "set_scale") and "default" in getattr(module, "scaling", {}):
            module.set_scale("default", factor)


_OF_ADAPTERS: dict[str, Callable[[nn.Module, random.Random], object]] = {
    "disable": _disable,
    "enable": lambda m, at: m.base_model.enable_adapter_layers(),
    "merge": _merge,
    "unmerge": lambda m, at: m.unmerge_adapter(),
    "set_scale": _scaled,
}
