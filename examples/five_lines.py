"""Balance a transformers MoE model in five lines; prove that nothing but the balance changed.

    python examples/five_lines.py
    ultraep-compile explain examples/five_lines.py:model_and_batch     # what is found in the model

A Mixtral of toy size is trained for a few steps over 4 virtual ranks, beside an untouched copy of itself.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

import ultraep_compile
from ultraep_compile.telemetry import get_recorder, read_trace, summarize

STEPS = 5


def model_and_batch() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, output_router_logits=True,
    )  # fmt: skip
    text = Path(__file__).read_bytes()[: 4 * 64]  # real text: its letters are anything but evenly spread
    ids = torch.tensor(list(text)).view(4, 64)
    return transformers.MixtralForCausalLM(config), {"input_ids": ids, "labels": ids}


def train(model: nn.Module, batch: dict[str, Tensor]) -> list[float]:
    """The losses of a few steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-6, foreach=False)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    model, batch = model_and_batch()
    untouched = copy.deepcopy(model)
    trace = Path(tempfile.mkdtemp()) / "trace.npz"

    # The five lines. Without `inner` the graph goes to Inductor, which needs a C++ compiler on a CPU.
    ultraep_compile.prepare(model, batch)
    options = {"ranks": 4, "redundant_experts": 2, "inner": "aot_eager", "trace": trace}
    model.compile(backend=ultraep_compile.ultraep, options=options)  # or backend="ultraep" once installed
    losses = train(model, batch)
    get_recorder(trace).close()

    expected = train(untouched, batch)
    loads = summarize(read_trace(trace)).loads
    before, after, bound = loads.before_p50, loads.after_p50, loads.lower_bound
    print(f"loss      {losses[0]:.6f} -> {losses[-1]:.6f}, plain {expected[0]:.6f} -> {expected[-1]:.6f}")
    print(f"imbalance {before:.3f} -> {after:.3f} (median; no plan can beat {bound:.3f})")

    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    assert worst < 1e-5, f"the losses differ by {worst:.1e}"
    assert after < before, "balancing did not balance"
    assert list(model.state_dict()) == list(untouched.state_dict())
    print("ok")


if __name__ == "__main__":
    main()
