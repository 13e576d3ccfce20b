"""What training and serving code does around a model: each thing with a balanced model beside the same in eager."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests import pretraining_style, zoo
from tests.balancing import assert_as_good_as_eager, backend, oracle_step, prepared, relative, step
from ultraep_compile.codegen import row_function
from ultraep_compile.config import Options
from ultraep_compile.cost_model import Layer
from ultraep_compile.errors import OptionError, RoutingError
from ultraep_compile.ops import routing
from ultraep_compile.passes.lift import verify
from ultraep_compile.report import collect_reports
from ultraep_compile.worth import NEVER, _solved

Pair = tuple[nn.Module, nn.Module]


def pair(kind: Callable[[], nn.Module] = zoo.HandMoE, **options) -> Pair:
    """A model compiled with balancing, and its untouched copy."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = kind()
    model = copy.deepcopy(plain)
    model.compile(backend=backend(**{"ranks": 4, **options}))
    return model, plain


def batch(rows: int = 2, length: int = 16, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, zoo.WIDTH, generator=torch.Generator().manual_seed(seed))


def rewritten(collected) -> int:
    return sum(len(g.prepared) for g in collected.graphs)


def assert_same_grads(models: Pair, bound: float = 1e-5) -> None:
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert relative(p.grad, q.grad) < bound, name


# ---- precision, gradients -------------------------------------------------------------------------------------------


def test_autocast() -> None:
    """Entered around the call, left again, entered again: errors at most twice those of eager under autocast."""
    models, x = pair(), batch()
    exact = oracle_step(models[1], {"x": x.double()})
    with collect_reports() as collected:
        for enabled in (True, False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                ours, eager = (step(m, m, {"x": x}) for m in models)
            assert_as_good_as_eager(ours, eager, exact, 2e-3 if enabled else 1e-6)
    assert rewritten(collected) == 2


def test_gradient_accumulation_and_clipping() -> None:
    models = pair()
    norms = []
    for model in models:
        for turn in range(4):
            zoo.loss_of(model(batch(2, 8 + turn, seed=turn))).div(4).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    assert relative(norms[0], norms[1]) < 1e-6 and norms[0] > 0.01
    assert_same_grads(models)


@pytest.mark.parametrize(
    "frozen",
    [("up", "up_bias", "down"), ("up",), ("down",), ("router.weight",), ("up", "up_bias", "down", "router.weight")],
    ids="-".join,
)
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    """No gradient where eager has none, and the rest as in eager."""
    models = pair()
    inputs = []
    with collect_reports() as collected:
        for model in models:
            for name, p in model.named_parameters():
                p.requires_grad_(name not in frozen)
            inputs.append(batch().requires_grad_())
            zoo.loss_of(model(inputs[-1])).backward()
    assert rewritten(collected) == 1
    assert relative(inputs[0].grad, inputs[1].grad) < 1e-5
    assert_same_grads(models)


class WithDropout(zoo.HandMoE):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.3, self.training)


def test_mode_switches() -> None:
    models, x = pair(WithDropout), batch()
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
    for mode in ("train", "eval", "no_grad", "train", "inference", "eval", "train"):
        out = []
        for model in models:
            torch.manual_seed(3)
            with modes.get(mode, contextlib.nullcontext)():
                out.append(model.train(mode == "train")(x))
        assert out[0].requires_grad == out[1].requires_grad
        assert relative(out[0].detach(), out[1].detach()) < 1e-6, mode


def test_deterministic_algorithms() -> None:
    """They fill every new tensor with NaN: nothing may read what was not written. Two runs give the same bits."""
    models, x = pair(), batch()
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (step(models[0], models[0], {"x": x}) for _ in range(2))
        eager = step(models[1], models[1], {"x": x})
    finally:
        torch.use_deterministic_algorithms(False)
    for name, grad in eager.grads.items():
        assert torch.equal(first.grads[name], again.grads[name]), name
        assert relative(first.grads[name], grad) < 1e-5, name


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "around",
    [
        pytest.param(torch.autograd.graph.save_on_cpu, id="activations offloaded"),
        pytest.param(torch.autograd.set_detect_anomaly, id="anomaly detection"),
        pytest.param(lambda: default_dtype(torch.bfloat16), id="default dtype"),
        pytest.param(lambda: torch.device("meta"), id="default device"),
        pytest.param(torch.profiler.profile, id="profiler"),
    ],
)
def test_what_a_step_runs_under(around: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes that are entered around the first step as around others cost no balance: layers are found and proven for the first
    time under them.
    """
    monkeypatch.setattr(row_function, "_programs", {})
    monkeypatch.setattr(verify, "_proven", set())
    (model, plain), x = pair(), batch()
    eager = step(plain, plain, {"x": x})
    enter = around if around is not torch.autograd.set_detect_anomaly else lambda: around(True)
    with collect_reports() as collected, enter():
        ours = step(model, model, {"x": x})
    assert rewritten(collected) == 1
    assert all(relative(ours.grads[n], g) < 1e-5 for n, g in eager.grads.items())


@pytest.mark.parametrize("dynamic", [True, False])
def test_sizes_that_are_all_dynamic_or_none(dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = zoo.HandMoE()
    compiled = torch.compile(model, backend=backend(ranks=4), dynamic=dynamic, fullgraph=True)
    shapes = [(2, 16), (3, 7), (1, 1)]
    with collect_reports() as collected:
        for rows, length in shapes:
            ours, eager = step(compiled, model, {"x": batch(rows, length)}), step(model, model, {"x": batch(rows, length)})
            assert all(relative(ours.grads[n], g) < 1e-5 for n, g in eager.grads.items())
    assert rewritten(collected) == len(collected.graphs) <= len(shapes)


# ---- several models, several compilations, faults -------------------------------------------------------------------


def test_two_models_in_one_process() -> None:
    """Of one class with other weights and options, and of two classes; steps interleaved."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = [zoo.HandMoE(), zoo.HandMoE(), zoo.SigmoidBias()]
    ours = [copy.deepcopy(m) for m in plain]
    options = [{"ranks": 4}, {"ranks": 2, "redundant_experts": 1}, {"ranks": 8}]
    for model, chosen in zip(ours, options, strict=True):
        model.compile(backend=backend(**chosen))
    with collect_reports() as collected:
        for models in (ours, plain):
            losses = [zoo.loss_of(m(batch(1, 7 + i, seed=i))) for i, m in enumerate(models)]
            for loss in reversed(losses):
                loss.backward()
    layouts = [s.layout for g in collected.graphs for s in g.prepared.values()]
    assert [(layout.ranks, layout.slots) for layout in layouts] == [(4, 2), (2, 1), (8, 2)]
    for models in zip(ours, plain, strict=True):
        assert_same_grads(models)


def test_compiling_twice() -> None:
    """The last options count; wrapping a compiled model once more changes nothing."""
    (model, plain), x = pair(), batch()
    expected = plain(x)
    assert relative(model(x).detach(), expected.detach()) < 1e-6
    model.compile(backend=backend(ranks=2))
    with collect_reports() as collected:
        assert relative(model(x).detach(), expected.detach()) < 1e-6
    assert [s.layout.ranks for g in collected.graphs for s in g.prepared.values()] == [2]
    nested = torch.compile(torch.compile(plain, backend=backend(ranks=4)), backend=backend(ranks=4))
    with collect_reports() as collected:
        assert relative(nested(x).detach(), expected.detach()) < 1e-6
    assert rewritten(collected) == 1


def test_going_on_after_an_exception() -> None:
    """In forward by a bad batch, in backward by a hook: the next step is as if nothing had been."""
    models, x = pair(), batch()
    model = models[0]
    bad = x.clone()
    bad[0, 3, 2] = float("nan")
    with pytest.raises(RoutingError):
        model(bad)
    hook = model.router.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(x).sum().backward()
    hook.remove()
    ours, eager = (step(m, m, {"x": x}) for m in models)
    assert all(relative(ours.grads[n], g) < 1e-5 for n, g in eager.grads.items())


@pytest.mark.parametrize("kind", ["one expert", "none for most", "ties", "no slots"])
def test_hard_loads(kind: str) -> None:
    """All tokens to one pair of experts; a router that cannot decide; nowhere to put a copy."""
    models = pair(redundant_experts=0 if kind == "no slots" else 2)
    x = batch(4, 16)
    for model in models:
        with torch.no_grad():
            if kind == "one expert":
                model.router.weight.zero_()[5] = 1.0
                x = x.abs()
            elif kind == "none for most":
                model.router.weight[2:] = -1.0
                x = x.abs()
            elif kind == "ties":
                model.router.weight.zero_()
    ours, eager = (step(m, m, {"x": x}) for m in models)
    assert relative(ours.loss, eager.loss) < 1e-6
    for name, grad in eager.grads.items():
        if grad.norm() > 1e-7:
            assert relative(ours.grads[name], grad) < 1e-5, name


# ---- generation, Trainer, pretraining code --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cache",
    [
        pytest.param({}, id="dynamic"),
        pytest.param({"cache_implementation": "static"}, id="static", marks=pytest.mark.slow),
    ],
)
def test_generation_with_a_cache(cache: dict) -> None:
    """The same tokens as eager; prefill is balanced, and decoding, one token a rank or fewer, is right."""
    plain, _ = prepared("mixtral", "batched_mm", output_router_logits=False)
    torch._dynamo.reset()
    model = copy.deepcopy(plain.eval())
    model.compile(backend=backend(ranks=4))
    ids = zoo.tokens(2, 12)["input_ids"]
    with collect_reports() as collected:
        ours = model.generate(ids, max_new_tokens=6, do_sample=False, **cache)
    assert torch.equal(ours, plain.generate(ids, max_new_tokens=6, do_sample=False))
    assert len(collected.graphs[0].prepared) == zoo.LAYERS and not collected.graphs[0].misses


def test_decoding_is_not_planned_below_the_threshold(monkeypatch) -> None:
    """With `balance_from`, prefill is balanced, steps of few tokens are not planned, and the tokens are the same."""
    plain, _ = prepared("mixtral", "batched_mm", output_router_logits=False)
    plain.eval()
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.mlp.gate.weight[0] += 0.3  # one expert is hot
    ids = zoo.tokens(2, 24)["input_ids"]
    calls: list[tuple[int, str]] = []
    make = routing.make_plan

    def counted(counts, slots, planner, **rest):
        calls.append((int(counts.sum()), planner))
        return make(counts, slots, planner, **rest)

    monkeypatch.setattr(routing, "make_plan", counted)
    expected = plain.generate(ids, max_new_tokens=4, do_sample=False)
    for start, threshold in ((40, 40 * zoo.TOP_K), ("auto", NEVER)):
        calls.clear()
        torch._dynamo.reset()
        model = copy.deepcopy(plain)
        model.compile(backend=backend(ranks=4, balance_from=start))
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
        assert {n for n, _ in calls} == {2 * zoo.TOP_K, 48 * zoo.TOP_K}
        assert all(planner == ("quota" if n >= threshold else "none") for n, planner in calls)


def test_thresholds_follow_the_cost_model() -> None:
    """Large experts pay from a few hundred tokens a rank on, and copies of them need more tokens in serving than tiny ones."""
    layer = Layer.gated(4096, 1536, 8)
    serving, training = (_solved(layer, 128, 8, 2, t) for t in (False, True))
    assert serving is not None and training is not None and 8 * 64 < training and 8 * 64 < serving < 8 * 65536
    assert _solved(layer, 128, 1, 2, True) is None and _solved(layer, 128, 8, 0, True) is None
    with pytest.raises(OptionError, match="'balance_from' is 'often'"):
        Options(balance_from="often")


@pytest.fixture
def named_backend():
    """The name `ultraep`, also where the package is not installed and so has no entry point."""
    if "ultraep" not in torch._dynamo.list_backends():
        from ultraep_compile import ultraep

        torch._dynamo.register_backend(ultraep, name="ultraep")


def test_huggingface_trainer(tmp_path, monkeypatch: pytest.MonkeyPatch, named_backend: None) -> None:
    """By name alone; options come from the environment, since the Trainer passes none."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    monkeypatch.setenv("ULTRAEP_COMPILE_RANKS", "4")
    monkeypatch.setenv("ULTRAEP_COMPILE_INNER", "aot_eager")
    torch._dynamo.reset()
    plain, _ = prepared("mixtral", "batched_mm", output_router_logits=False)
    data = [{k: v[0] for k, v in zoo.tokens(1, 16).items()} for _ in range(12)]
    losses, norms, counts = [], [], []
    for named in ({}, {"torch_compile": True, "torch_compile_backend": "ultraep"}):
        model = copy.deepcopy(plain)
        args = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=3, max_grad_norm=0.5,
            use_cpu=True, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, **named,
        )  # fmt: skip
        with collect_reports() as collected:
            trainer = Trainer(model=model, args=args, train_dataset=data)
            trainer.train()
        trainer.save_model(str(tmp_path / "saved"))
        history = [h for h in trainer.state.log_history if "loss" in h]
        losses.append(torch.tensor([h["loss"] for h in history]))
        norms.append(torch.tensor([h["grad_norm"] for h in history]))
        counts.append(rewritten(collected))
    assert counts[0] == 0 and counts[1] >= zoo.LAYERS
    assert relative(losses[1], losses[0]) < 1e-5 and relative(norms[1], norms[0]) < 1e-4
    saved = type(plain).from_pretrained(tmp_path / "saved")
    assert {k: v.shape for k, v in saved.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}


@pytest.mark.slow
def test_trainer_with_checkpoints_of_all_kinds(tmp_path, monkeypatch: pytest.MonkeyPatch, named_backend: None) -> None:
    """bf16 autocast, gradient checkpointing, evaluation in between, and training resumed from a saved step: as without us."""
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    monkeypatch.setenv("ULTRAEP_COMPILE_RANKS", "4")
    monkeypatch.setenv("ULTRAEP_COMPILE_INNER", "aot_eager")
    plain, _ = prepared("mixtral", "batched_mm", output_router_logits=False, num_hidden_layers=1)
    data = [{k: v[0] for k, v in zoo.tokens(1, 16).items()} for _ in range(12)]
    histories, keys = [], []
    for named in ({}, {"torch_compile": True, "torch_compile_backend": "ultraep"}):
        folder = str(tmp_path / f"run{len(histories)}")
        for resume in (None, f"{folder}/checkpoint-2"):
            torch._dynamo.reset()
            args = TrainingArguments(
                folder, per_device_train_batch_size=2, max_steps=4, use_cpu=True, logging_steps=1, report_to=[], save_steps=2,
                eval_strategy="steps", eval_steps=2, disable_tqdm=True, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=True, **named,
            )  # fmt: skip
            with collect_reports() as collected:
                trainer = Trainer(model=copy.deepcopy(plain), args=args, train_dataset=data, eval_dataset=data[:4])
                trainer.train(resume_from_checkpoint=resume)
            assert (rewritten(collected) > 0) == bool(named) and not any(g.misses for g in collected.graphs)
            history = [h.get("loss", h.get("eval_loss")) for h in trainer.state.log_history]
            histories.append(torch.tensor([h for h in history if h is not None]))
            keys.append(list(trainer.model.state_dict()))
    assert len(histories[0]) == len(histories[1]) == 6 and keys[0] == keys[2] == keys[3]
    for ours, eager in ((histories[2], histories[0]), (histories[3], histories[1])):
        assert relative(ours, eager) < 1e-4


def test_options_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ULTRAEP_COMPILE_RANKS", "8")
    monkeypatch.setenv("ULTRAEP_COMPILE_PLANNER", "none")
    assert (Options.of(None).ranks, Options.of({"ranks": 2}).ranks) == (8, 2)
    assert Options.of(None).planner == "none" and Options().ranks is None
    monkeypatch.setenv("ULTRAEP_COMPILE_VERIFY", "yes")
    with pytest.raises(OptionError, match="ULTRAEP_COMPILE_VERIFY is 'yes', which is not an integer"):
        Options.of({})


def test_pretraining_style_model() -> None:
    """Grouped bf16 products, histogram permutation, counters written in forward, router bias moved between steps."""
    models = pair(pretraining_style.Decoder)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-6) for m in models]
    for turn in range(3):
        with collect_reports() as collected:
            ours = step(models[0], models[0], {"x": batch(seed=turn)})
        eager = step(models[1], models[1], {"x": batch(seed=turn)})
        if turn == 0:
            assert rewritten(collected) == 2 and not any(g.misses for g in collected.graphs)
        assert relative(ours.loss, eager.loss) < 1e-3
        for name, grad in eager.grads.items():
            assert relative(ours.grads[name], grad) < 2e-2, name  # bf16: rows are summed in another order
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.step()
            assert all(layer.tokens_per_expert.sum() == 64 for layer in model.layers.values())
            pretraining_style.update_router_bias(model)
        for a, b in zip(models[0].layers.values(), models[1].layers.values(), strict=True):
            assert torch.equal(a.expert_bias, b.expert_bias) and a.expert_bias.any()
