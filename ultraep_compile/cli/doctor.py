"""`ultraep-compile doctor`"""

from __future__ import annotations

import importlib
import json as jsonlib
import platform
from typing import Annotated, Any

import typer

from ultraep_compile.versions import installed, untested

PACKAGES = ("torch", "triton", "numpy", "transformers", "networkx", "sympy", "plotly", "hypothesis")


def examine() -> dict[str, Any]:
    """Versions, devices, peer access and what they mean for us, as plain data."""
    import torch

    versions = {name: installed(name) for name in PACKAGES}
    devices, peers = [], []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "index": i,
                "name": facts.name,
                "capability": f"{facts.major}.{facts.minor}",
                "bytes": facts.total_memory,
                "sms": facts.multi_processor_count,
            }
        )
        peers.append(
            [j for j in range(torch.cuda.device_count()) if j != i and torch.cuda.can_device_access_peer(i, j)]
        )
    return {
        "ultraep_compile": importlib.import_module("ultraep_compile").__version__,
        "python": platform.python_version(),
        "versions": versions,
        "cpu_threads": torch.get_num_threads(),
        "cpu_bf16_products": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        "devices": devices,
        "peer_access": peers,
        "distributed": {
            "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
            "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
        },
        "untested": list(untested()),
        "backend_registered": "ultraep" in torch._dynamo.list_backends(exclude_tags=None),
    }


def verdicts(facts: dict[str, Any]) -> list[str]:
    """What will be used, and why."""
    out = []
    if facts["backend_registered"]:
        out.append('torch.compile(model, backend="ultraep") is registered.')
    else:
        out.append(
            'the backend is not registered by an installed package; "import ultraep_compile.backend" and pass '
            "backend=ultraep_compile.ultraep, or run: pip install -e ."
        )
    if facts["devices"]:
        out.append(f"{len(facts['devices'])} CUDA device(s): grouped products and data plane are Triton kernels.")
    else:
        out.append("no CUDA device: everything runs on the CPU, with the same plans and the same results.")
        if not facts["cpu_bf16_products"]:
            out.append("this CPU has no bf16 products: experts in bf16 are multiplied in fp32 and rounded.")
    out.append("one process: virtual ranks (option ranks=R).")
    reached = [i for i, peers in enumerate(facts["peer_access"]) if len(peers) == len(facts["devices"]) - 1]
    if not facts["devices"]:
        out.append("transport=auto is collective here; symmetric on request (shared files, for tests).")
    elif facts["versions"]["triton"] and len(reached) == len(facts["devices"]):
        out.append("transport=auto is symmetric between processes of this host: every GPU reaches every other's memory.")
    else:
        why = "not every GPU reaches every other's memory" if facts["versions"]["triton"] else "triton is missing"
        out.append(f"transport=auto is collective where that fails: {why}.")
    available = [name for name, there in facts["distributed"].items() if there]
    out.append(
        f"several processes: collectives over {' or '.join(available) or 'nothing: torch.distributed is missing'}."
    )
    out += facts["untested"]
    if facts["versions"]["transformers"] is None:
        out.append("transformers is missing: `ultraep-compile demo` needs it (pip install 'ultraep-compile[hf]').")
    return out


def doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine offers, what will be used, and why."""
    facts = examine()
    facts["verdicts"] = verdicts(facts)
    if json:
        typer.echo(jsonlib.dumps(facts, indent=2))
        return
    typer.echo(
        f"ultraep_compile {facts['ultraep_compile']}, Python {facts['python']}, {facts['cpu_threads']} CPU threads"
    )
    typer.echo("  ".join(f"{name} {version or '-'}" for name, version in facts["versions"].items()))
    for device, peers in zip(facts["devices"], facts["peer_access"], strict=True):
        typer.echo(
            f"cuda:{device['index']} {device['name']}, sm_{device['capability'].replace('.', '')}, {device['bytes'] / 2**30:.0f} GiB, peers {peers}"
        )
    for line in facts["verdicts"]:
        typer.echo(f"* {line}")
