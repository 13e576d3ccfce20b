"""What must hold around a balanced model: state, memory, checkpointing, shapes, switches, hard and bad input."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import re

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import ultraep_compile
from tests import zoo
from tests.balancing import backend, compiled_step, prepared, relative, step
from ultraep_compile import shadow, ultraep
from ultraep_compile.codegen import row_function
from ultraep_compile.errors import OptionError, RoutingError, SiteCountError, TopologyError, VerificationError
from ultraep_compile.ops import routing
from ultraep_compile.ops.transport import VirtualTransport
from ultraep_compile.passes.lift import verify
from ultraep_compile.report import collect_reports


def test_state_dict_is_untouched_by_compile_and_step() -> None:
    model, inputs = prepared("mixtral", "batched_mm")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.compile(backend=backend(ranks=4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    step(model, model, inputs)
    optimizer.step()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(after[k].shape == v.shape and after[k].dtype == v.dtype for k, v in before.items())
    fresh, _ = prepared("mixtral", "batched_mm")
    fresh.load_state_dict(after)
    assert len(optimizer.state) == len(list(model.parameters()))


def test_new_weights_take_effect_at_the_next_call() -> None:
    model, inputs = prepared("mixtral", "batched_mm")
    model.compile(backend=backend(ranks=4))
    step(model, model, inputs)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    other = copy.deepcopy(model)
    assert relative(step(model, model, inputs).loss, step(other, other, inputs).loss) < 1e-6


def test_training_losses_equal_eager() -> None:
    model, inputs = prepared("qwen2_moe", "batched_mm")
    plain = copy.deepcopy(model)
    model.compile(backend=backend(ranks=8))
    for m in (model, plain):
        m.optimizer = torch.optim.AdamW(m.parameters(), lr=1e-3, eps=1e-6)
    for _ in range(5):
        losses = []
        for m in (model, plain):
            losses.append(step(m, m, inputs).loss)
            m.optimizer.step()
        assert relative(losses[0], losses[1]) < 1e-5


class Block(nn.Module):
    """A MoE block under an activation checkpoint."""

    def __init__(self, context_fn=None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.moe = zoo.HandMoE()
        self.context_fn = context_fn

    def forward(self, x):
        extra = {} if self.context_fn is None else {"context_fn": self.context_fn}
        return checkpoint(self.moe, x, use_reentrant=False, **extra)


def _save_ultraep(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if op.namespace == "ultraep" else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_activation_checkpointing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same gradients; under the selective policy the plan is made once."""
    plans = []
    real = routing.make_plan
    monkeypatch.setattr(routing, "make_plan", lambda *a, **k: plans.append(1) or real(*a, **k))
    context = functools.partial(create_selective_checkpoint_contexts, _save_ultraep) if kind == "selective" else None
    inputs = {"x": torch.randn(2, 16, zoo.WIDTH)}
    plain, checkpointed = Block(), Block(context)
    plain.forward = plain.moe.forward
    expected = step(plain, plain, inputs)
    ours, graphs = compiled_step(checkpointed, inputs, ranks=4)
    assert sum(len(g.prepared) for g in graphs) == 1
    assert len(plans) == (1 if kind == "selective" else 2)
    for name, grad in expected.grads.items():
        assert relative(ours.grads[name], grad) < 1e-5, name


OPS = torch.ops.ultraep
CHECKPOINTS = {
    "reentrant": (2, lambda m, call: call(lambda x: checkpoint(m, x.requires_grad_(), use_reentrant=True))),
    "list of ops": (2, lambda m, call: call(_selective(m, [OPS.experts.default]))),
    "save all": (1, lambda m, call: call(_selective(m, lambda *_, **__: CheckpointPolicy.MUST_SAVE))),
    "recompute all": (2, lambda m, call: call(_selective(m, lambda *_, **__: CheckpointPolicy.MUST_RECOMPUTE))),
    "plan alone": (1, lambda m, call: call(_selective(m, [OPS.plan.default, OPS.reroute.default]))),
    "nested": (2, lambda m, call: call(_full(_full(m)))),
    "wrapper": (2, lambda m, call: call(checkpoint_wrapper(m))),
    "around what is compiled": (2, lambda m, call: _full(call(m))),
    "reentrant, around": (2, lambda m, call: (lambda c: lambda x: checkpoint(c, x.requires_grad_(), use_reentrant=True))(call(m))),
    "memory budget": (2, lambda m, call: call(m)),
}


def _full(call):
    return lambda x: checkpoint(call, x, use_reentrant=False)


def _selective(call, policy):
    return lambda x: checkpoint(
        call, x, use_reentrant=False, context_fn=functools.partial(create_selective_checkpoint_contexts, policy)
    )


_QUICK = ("around what is compiled", "reentrant, around", "plan alone", "recompute all")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in _QUICK else pytest.mark.slow) for n in CHECKPOINTS])
def test_forms_of_activation_checkpointing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager's gradients in every form; what is planned again is planned on the same loads. Nothing has been proven before: trials
    must not be counted among the tensors that a checkpoint saves.
    """
    monkeypatch.setattr(row_function, "_programs", {})
    monkeypatch.setattr(verify, "_proven", set())
    counted: list[torch.Tensor] = []
    real = routing.make_plan
    monkeypatch.setattr(routing, "make_plan", lambda counts, *a, **k: counted.append(counts.clone()) or real(counts, *a, **k))
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = zoo.HandMoE()
    model, x = copy.deepcopy(plain), torch.randn(2, 16, zoo.WIDTH)
    plans, make = CHECKPOINTS[name]
    wrapped = make(model, lambda f: torch.compile(f, backend=backend(ranks=4)))
    budget = 0.3 if name == "memory budget" else 1.0
    with torch._functorch.config.patch(activation_memory_budget=budget), collect_reports() as collected:
        model.zero_grad()
        zoo.loss_of(wrapped(x.clone())).backward()
    assert sum(len(g.prepared) for g in collected.graphs) == len(collected.graphs) > 0
    assert len(counted) == plans and all(torch.equal(c, counted[0]) for c in counted)
    zoo.loss_of(plain(x)).backward()
    for (n, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and relative(p.grad, q.grad) < 1e-5, n


@pytest.mark.parametrize("name", ["HandMoE", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_changing_sizes_compile_no_more_often_than_without_us(name: str) -> None:
    model = zoo.HandMoE() if name == "HandMoE" else prepared(name, "batched_mm", num_hidden_layers=1)[0]
    shapes = [(2, 16), (3, 24), (4, 7)]

    def graphs_of(make) -> int:
        torch._dynamo.reset()
        count = [0]

        def counting(gm, example_inputs):
            count[0] += 1
            return make(gm, example_inputs)

        compiled = torch.compile(model, backend=counting)
        for batch, length in shapes:
            inputs = {"x": torch.randn(batch, length, zoo.WIDTH)} if name == "HandMoE" else zoo.tokens(batch, length)
            got = step(compiled, model, inputs)
            assert relative(got.loss, step(model, model, inputs).loss) < 1e-6
        return count[0]

    from torch._dynamo.backends.debugging import aot_eager

    assert graphs_of(backend(ranks=4)) <= graphs_of(aot_eager)


def test_slots_are_not_held_between_forward_and_backward() -> None:
    """Memory kept for backward does not grow with the number of slots."""

    def kept_bytes(slots: int) -> int:
        model = zoo.HandMoE()
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend(ranks=8, redundant_experts=slots, inner="eager"))
        seen: dict[int, int] = {}

        def pack(t):
            seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = compiled(torch.randn(2, 16, zoo.WIDTH))
        zoo.loss_of(out).backward()
        return sum(seen.values())

    rows_per_slot = 8 * 7 * 4 * 2 * 64  # padding rows of one more slot on each of 8 ranks, generously
    expert_bytes = sum(p[0].numel() * 4 for p in zoo.HandMoE().parameters() if p.dim() == 3)
    grown = kept_bytes(4) - kept_bytes(1)
    assert grown < 3 * rows_per_slot
    assert grown < 3 * 8 * expert_bytes


def test_ranks_1_and_dense_models_give_the_inner_backend_its_own_graph() -> None:
    dense = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    moe, inputs = prepared("mixtral", "batched_mm")
    for model, options, args in ((dense, {"ranks": 4}, {"input": torch.randn(3, 8)}), (moe, {}, inputs)):
        seen: dict[str, list[str]] = {"ours": [], "theirs": []}

        def record(kind, gm, example_inputs, seen=seen):
            seen[kind].append(gm.code)
            return gm.forward

        import ultraep_compile.backend as module

        torch._dynamo.reset()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "compile_inner", lambda gm, ex, o, m, rewritten: record("ours", gm, ex))
            torch.compile(model, backend=backend(**options))(**args)
        torch._dynamo.reset()
        torch.compile(model, backend=functools.partial(record, "theirs"))(**args)
        assert seen["ours"] == seen["theirs"] != []


@ultraep_compile.balance(ranks=4, inner="aot_eager")
class Decorated(zoo.HandMoE):
    pass


class Derived(Decorated):
    def forward(self, x):
        return super().forward(x) * 2


def test_decorator_keeps_the_class_a_class() -> None:
    torch.manual_seed(0)
    model, x = Decorated(), torch.randn(2, 16, zoo.WIDTH)
    plain = zoo.HandMoE()
    plain.load_state_dict(model.state_dict())
    assert isinstance(model, zoo.HandMoE) and list(model.state_dict()) == list(plain.state_dict())
    from ultraep_compile.report import collect_reports

    with collect_reports() as collected:
        assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert sum(len(g.prepared) for g in collected.graphs) == 1
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with collect_reports() as collected:
            assert torch.allclose(copied(x), plain(x), atol=1e-5)
        assert sum(len(g.prepared) for g in collected.graphs) == 1
    derived = Derived()
    derived.load_state_dict(model.state_dict())
    assert torch.allclose(derived(x), 2 * plain(x), atol=1e-5)


def test_verify_accepts_the_right_and_refuses_the_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = prepared("mixtral", "batched_mm")
    ours, _ = compiled_step(model, inputs, ranks=4, verify=2)
    assert torch.isfinite(ours.loss)
    monkeypatch.setattr(routing, "deal", lambda ordinal, first, *rest: (first, ordinal))  # shares unmet: rows collide
    with pytest.raises((VerificationError, IndexError, RuntimeError)):
        compiled_step(model, inputs, ranks=4, verify=2)


@pytest.mark.parametrize("fault", ["weights", "plan"])
def test_verify_names_the_first_layer_and_writes_a_report(fault, tmp_path, monkeypatch) -> None:
    """A copy with other weights, and a plan that breaks its promises: the layer, and a file with all that was measured."""
    monkeypatch.chdir(tmp_path)
    model, inputs = prepared("mixtral", "batched_mm")
    if fault == "weights":
        real = VirtualTransport.fill_slots
        monkeypatch.setattr(VirtualTransport, "fill_slots", lambda *args: real(*args) * 1.01)
        reason = "differs from the unmodified graph"
    else:
        monkeypatch.setattr(shadow, "broken_promises", lambda *args: ["an expert has two copies on rank 0"])
        reason = "its plan is illegal: an expert has two copies on rank 0"
    with pytest.raises(VerificationError, match=r"layer model.layers.0.mlp of the rewritten graph") as caught:
        compiled_step(model, inputs, ranks=4, verify=1)
    assert reason in str(caught.value)
    tokens = r"\d+ of 32 tokens differ, (\d+) of them sent to a copy; the first is token \d+, which went to .*the copy of expert \d on rank \d"
    assert fault == "plan" or re.search(tokens, str(caught.value))
    report = json.loads((tmp_path / "ultraep-verify.json").read_text())
    assert [x["layer"] for x in report["layers"]] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert report["options"]["ranks"] == "4" and report["torch"] == torch.__version__


def test_verify_sees_what_only_gradients_show(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of copies that never come home: no output tells, the masters' gradients do."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, inputs = nn.Sequential(zoo.HandMoE(), zoo.HandMoE()), {"input": torch.randn(2, 16, zoo.WIDTH)}
    compiled_step(model, inputs, ranks=4, verify=1)
    monkeypatch.setattr(VirtualTransport, "reduce_slots", lambda self, masters, slots, *rest: masters)
    with pytest.raises(VerificationError, match=r"the gradient of 0\.\w+ of .* the first of 6 differences; rewritten layers"):
        compiled_step(model, inputs, ranks=4, verify=1)
    report = json.loads((tmp_path / "ultraep-verify.json").read_text())
    wrong = {x["gradient"] for x in report["gradients"] if x["difference"] > x["allowed"]}
    assert wrong == {f"{i}.{n}" for i in (0, 1) for n in ("up", "up_bias", "down")}
    assert not any(x["difference"] > x["allowed"] for x in (*report["layers"], *report["outputs"]))
    with torch.no_grad():
        torch.compile(model, backend=backend(ranks=4, verify=1))(**inputs)


def test_verify_takes_what_is_not_finite_for_equal_where_it_is_so_in_both(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, inputs = zoo.HandMoE(), {"x": torch.randn(2, 16, zoo.WIDTH)}
    with torch.no_grad():
        model.down[2, 0, 0] = torch.nan
    ours, _ = compiled_step(model, inputs, ranks=4, verify=1)
    assert ours.loss.isnan()
    real = VirtualTransport.fill_slots
    monkeypatch.setattr(VirtualTransport, "fill_slots", lambda *args: real(*args) * torch.nan)
    with pytest.raises(VerificationError, match=r"layer .* by 1\.00e\+00 .* sent to a copy"):
        compiled_step(model, inputs, ranks=4, verify=1)
    assert "NaN" not in (tmp_path / "ultraep-verify.json").read_text()


# ---- hard input that must simply work -------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_fewer_tokens_than_ranks(rows: int) -> None:
    model = zoo.HandMoE()
    inputs = {"x": torch.randn(1, rows, zoo.WIDTH)}
    ours, _ = compiled_step(model, inputs, ranks=8)
    assert relative(ours.loss, step(model, model, inputs).loss) < 1e-6


def test_no_token_at_all() -> None:
    model = zoo.HandMoE()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend(ranks=4))
    for rows in (0, 5, 0):
        x = torch.randn(1, rows, zoo.WIDTH, requires_grad=True)
        compiled(x).sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


# ---- bad input, each a clear error ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranks": 3}, TopologyError, r"8 experts cannot be divided over 3 ranks.*\[1, 2, 4, 8\]"),
        ({"ranks": 4, "redundant_experts": 7}, TopologyError, "redundant_experts=7.*at most 6"),
        ({"ranks": 4, "redundant_experts": -1}, OptionError, "redundant_experts' is -1"),
        ({"ranks": 0}, OptionError, "'ranks' is 0"),
        ({"ranks": 4, "rnks": 2}, OptionError, "unknown option 'rnks'. Did you mean 'ranks'"),
        ({"ranks": 4, "planner": "quote"}, OptionError, "Did you mean 'quota'"),
        ({"ranks": 4, "inner": "indctor"}, OptionError, "Did you mean 'inductor'"),
        ({"ranks": 4, "expect_moe_sites": 5}, SiteCountError, "expected 5 MoE layers.*rewrote 1"),
        ({"ranks": "8"}, OptionError, "not an integer"),
        ({"expect_moe_sites": 2}, SiteCountError, "expected 2 MoE layers.*rewrote 1"),  # also with nothing to balance
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_options(options, error, message) -> None:
    model = zoo.HandMoE()
    torch._dynamo.reset()
    with pytest.raises(error, match=message):
        torch.compile(model, backend=functools.partial(ultraep, options=options))(torch.randn(1, 4, zoo.WIDTH))


def test_a_wrong_option_of_the_decorator_is_refused_where_it_stands() -> None:
    with pytest.raises(OptionError, match="unknown option 'slots'"):
        ultraep_compile.balance(slots=2)


def test_a_fault_in_detection_costs_the_balance_not_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    from ultraep_compile.passes import pipeline

    def faulty(gm):
        raise KeyError("never seen before")

    monkeypatch.setattr(pipeline, "find_moe_sites", faulty)
    model, x = zoo.HandMoE(), torch.randn(1, 6, zoo.WIDTH)
    torch._dynamo.reset()
    with pytest.warns(UserWarning, match="internal error KeyError at .*never seen before"):
        got = torch.compile(model, backend=backend(ranks=4))(x)
    assert torch.allclose(got, model(x))


def test_nan_scores_name_layer_and_token() -> None:
    model = zoo.HandMoE()
    x = torch.randn(1, 6, zoo.WIDTH)
    x[0, 4, 3] = float("nan")
    torch._dynamo.reset()
    with pytest.raises(RoutingError, match=r"score of token 4 .* is nan"):
        torch.compile(model, backend=backend(ranks=4))(x)
