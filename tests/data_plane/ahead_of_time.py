"""Compiles the data plane for GPUs that are not there: python -m tests.data_plane.ahead_of_time 90 [--print]"""

from __future__ import annotations

import re
import sys

import torch

from tests.data_plane import cases
from tests.symmetric.ahead_of_time import compiled
from ultraep_compile.codegen.bundle import Bundle, Part, alignment_of, route_layout, sender_offset
from ultraep_compile.codegen.emit import load_source
from ultraep_compile.codegen.reduce import reduce_source
from ultraep_compile.codegen.replicate import _await_kernel, _clear_kernel, replicate_source
from ultraep_compile.codegen.routes import routes_kernel, tree_kernel
from ultraep_compile.symmetric.pool import with_own_regions
from ultraep_compile.symmetric.regions import lay_out

EXPERT = (Part((4096, 3072), torch.bfloat16), Part((1536, 4096), torch.bfloat16))
GRADIENT = (Part((4096, 3072), torch.float32), Part((1536, 4096), torch.float32))
HUGE = (Part((1 << 16, 70001), torch.int8),)  # more than 2^32 bytes


def offsets_of(regions) -> dict[str, int]:
    return {name: place.offset for name, place in lay_out(with_own_regions(regions, 64))[0].items()}


def streams(capability: int, parts: tuple[Part, ...]) -> dict[str, dict]:
    bundle = Bundle("w", 64, 4, 2, parts)
    out = {}
    for relay in (False, True):
        aligned = [alignment_of(p.nbytes) for p in parts]
        module = load_source(replicate_source(bundle, offsets_of(bundle.replicate_regions()), aligned, relay))
        signature = {"bases_p": "*i64", "rank0": "i32", "site": "i32"}
        if not relay:
            signature |= {f"part{i}_p": "*u8" for i in range(len(parts))}
        out["pass_on" if relay else "push"] = compiled(module.pass_on if relay else module.push, capability, 4, signature)
    return out


def reduction(capability: int, parts: tuple[Part, ...], own: str) -> dict:
    bundle = Bundle("g", 64, 4, 2, parts)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[own]
    aligned = [alignment_of(p.nbytes) for p in parts]
    source = reduce_source(bundle, offsets_of(bundle.reduce_regions()), [dtype] * len(parts), aligned)
    signature = {"bases_p": "*i64", "rank0": "i32"} | {f"grad{i}_p": f"*{own}" for i in range(len(parts))}
    return compiled(load_source(source).pull, capability, 4, signature)


def main(capability: int, show: bool) -> None:
    found = streams(capability, EXPERT)
    for asm in found.values():  # 16 bytes at a time, and a release that all ranks see
        assert "ld.global.L1::evict_first.L2::cache_hint.v4.b32" in asm["ptx"] and "st.global.v4.b32" in asm["ptx"] and "fence.acq_rel.sys" in asm["ptx"]
    assert "sys.acquire" in found["pass_on"]["ptx"]
    for name, parts in (("odd", cases.WEIGHTS), ("huge", HUGE)):
        found |= {f"{name} {kernel}": asm for kernel, asm in streams(capability, parts).items()}
    for own in ("fp32", "bf16"):
        found[f"pull {own}"] = reduction(capability, GRADIENT, own)
        assert "ld.global.v4.b32" in found[f"pull {own}"]["ptx"]
        found[f"odd pull {own}"] = reduction(capability, cases.GRADS, own)
    bundle = Bundle("w", 64, 4, 2, EXPERT)
    sizes = {"R": 64, "M": 4, "S": 2}
    plan = {"slot_expert_p": "*i32", "bases_p": "*i64", "rank0": "i32", "route_offset": "i32"}
    for relay in (False, True):
        found[f"routes {relay}"] = compiled(
            routes_kernel, capability, 4, {**plan, "targets_offset": "i32"}, **sizes, MP=4, QP=128, BLOCK=64,
            LISTS=route_layout(bundle, 0).source, SENDER=sender_offset(bundle), RELAY=relay, STAGE=0,
        )  # fmt: skip
    constants = {"RP": 64, "QP": 128, "SENDER": sender_offset(bundle), "FORCE": False}
    found["tree"] = compiled(tree_kernel, capability, 4, plan, **sizes, **constants)
    signature = {"slot_expert_p": "*i32", "chunks_p": "*i32", "bases_p": "*i64", "rank0": "i32", "site": "i32"}
    constants = {"ARRIVED": 256, "CONTROL": 512, "M": 4, "S": 2, "PARTS": 2, "PHASE_CODE": 2, "WIDTH": 32}
    found["await"] = compiled(_await_kernel, capability, 1, signature, **constants)
    compiled(_clear_kernel, capability, 1, {"bases_p": "*i64", "rank0": "i32"}, OFFSET=256, WORDS=4, WIDTH=32)
    for name, asm in found.items():
        assert asm["cubin"], name
        if show:
            loads = re.findall(r"(?:ld|st)\.global[^ ]*(?:v\d|b\d+)[^ ]*", asm["ptx"])
            print(name, "local memory" if "ld.local" in asm["ptx"] else "", sorted({*loads}))


if __name__ == "__main__":
    main(int(sys.argv[1]), "--print" in sys.argv)
