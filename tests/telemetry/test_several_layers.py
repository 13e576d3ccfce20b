"""One compiled graph may serve several layers and threads: each keeps its own name and its own records."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

from tests.test_agreement import MoE
from ultraep_compile.telemetry import get_recorder, read_trace


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_layers_compiled_one_by_one(tmp_path, inner: str) -> None:
    path = str(tmp_path / "t.npz")
    torch._dynamo.reset()
    layers = nn.ModuleList(MoE() for _ in range(4))
    for layer in layers:
        layer.compile(backend="ultraep", options={"ranks": 4, "inner": inner, "trace": path})
    for _ in range(3):
        x = torch.randn(32, 8, requires_grad=True)
        for layer in layers:
            x = layer(x)
        x.sum().backward()
    get_recorder(path).close()
    trace = read_trace(path)
    assert [layer.name for layer in trace] == ["MoE", "MoE#2", "MoE#3", "MoE#4"]
    for layer in trace:
        assert len(layer) == 3 and (layer.realised_NP == layer.quota_NP).all()
        assert (layer.seconds["grad_reduce"] > 0).all()  # of its own backward, which runs in the other order
        assert layer.facts["top_k"] == 2


def test_threads_do_not_mix(tmp_path) -> None:
    path = str(tmp_path / "t.npz")
    torch._dynamo.reset()
    model, errors = MoE(), []
    model.compile(backend="ultraep", options={"ranks": 4, "inner": "eager", "trace": path}, dynamic=True)
    model(torch.randn(30, 8)), model(torch.randn(31, 8))

    def work(seed: int) -> None:
        try:
            for _ in range(30):
                model(torch.randn(20 + 10 * seed, 8)).sum().backward()
        except Exception as error:  # of a thread: it must reach the test
            errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        [w.start() for w in workers], [w.join(120) for w in workers]
    finally:
        sys.setswitchinterval(before)
    get_recorder(path).close()
    (layer,) = read_trace(path).layers
    assert not errors and len(layer) == 122
    assert (layer.realised_NP == layer.quota_NP).all()
    assert sorted(set(layer.source_load_NR.sum(1).tolist())) == [40, 60, 62, 80, 100]
