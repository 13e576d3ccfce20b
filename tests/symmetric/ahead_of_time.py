"""Compiles the handshake and a wait for GPUs that are not there: python -m tests.symmetric.ahead_of_time 90"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests.symmetric.interpreted import take
from ultraep_compile.codegen.handshake import arrive_kernel, await_kernel, meet_kernel


def compiled(kernel: Any, capability: int, warps: int, signature: dict[str, str], **constants: Any) -> dict[str, Any]:
    """The compiler's output by stage; pointers are aligned to 16 bytes."""
    signature = {**signature, **{name: "constexpr" for name in constants}}
    assert list(signature) == kernel.arg_names
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*")]
    attributes: dict = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps}).asm


def main(capability: int) -> None:
    tables = {"counts_p": "*i64", "control_p": "*i64", "rank0": "i32"}
    ptx = compiled(arrive_kernel, capability, 1, {**tables, "R": "i32"}, RP=32)["ptx"]
    assert "fence.acq_rel.sys" in ptx and "sys.release" in ptx
    signature = {**tables, "site": "i32", "lag": "i32", "R": "i32"}
    ptx = compiled(await_kernel, capability, 1, signature, RP=64, PHASE_CODE=0)["ptx"]
    assert "sys.acquire" in ptx and "globaltimer" in ptx
    signature = {"counts_p": "*i64", "control_p": "*i64", "rank": "i32", "site": "i32", "R": "i32"}
    ptx = compiled(meet_kernel, capability, 1, signature, RP=32, PHASE_CODE=0)["ptx"]
    assert ptx.index("sys.release") < ptx.index("sys.acquire")
    signature = {"rows_p": "*i64", "flags_p": "*i64", "control_p": "*i64", "out_p": "*i64"}
    signature |= {"rank": "i32", "turn": "i32", "site": "i32"}
    ptx = compiled(take, capability, 4, signature, CODE=6)["ptx"]
    assert "sys.acquire" in ptx and "fence.acq_rel.sys" in ptx


if __name__ == "__main__":
    main(int(sys.argv[1]))
