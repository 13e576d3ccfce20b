"""Compiles reroute, dispatch and combine for GPUs that are not there: python -m tests.codegen.ahead_of_time_tokens 90"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultraep_compile.codegen import dispatch_kernels, reroute_kernels

TYPES = {
    "ids_p": "*i64", "bits_p": "*i64", "peers_p": "*i64", "references_p": "*i64", "counts_p": "*u8", "lead_p": "*u8",
    "wire_p": "*u8", "weight_p": "*fp32", "rows_p": "*bf16",
} | dict.fromkeys(
    ("rank", "low", "high", "T", "E", "R", "tiles", "capacity", "pairs", "rows", "tokens", "D"), "i32"
)  # fmt: skip


def compiled(kernel: Any, capability: int, types: dict[str, str] | None = None, **constants: Any) -> dict[str, Any]:
    """The compiler's output by stage; other arguments are pointers to int32. Pointers, E and R are multiples of 16."""
    kinds = TYPES | (types or {})
    signature = {n: "constexpr" if n in constants else kinds.get(n, "*i32") for n in kernel.arg_names}
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n in ("E", "R")]
    attributes: dict = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": 4, "launch_pdl": "PDL" in constants}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def reroute(capability: int) -> None:
    """64 ranks, 256 experts, 2 slots, 8 choices."""
    tables = {"M": 4, "S": 2, "BLOCK": 2, "GP": 8, "SOURCES": 64, "PDL": True}
    assert compiled(reroute_kernels.mark, capability, COUNTS=256, K=8, KP=8, EP=256, SLOTS=128, **tables)["cubin"]
    assert compiled(reroute_kernels.tabulate, capability, {"index_p": "*i32"}, **tables)["cubin"]
    assert compiled(reroute_kernels.add_up, capability, COUNTS=256, BLOCK=32, PDL=True)["cubin"]
    sizes = {"COUNTS": 256, "K": 8, "KP": 8, "SPAN": 128, "TILES": 128, "WORDS": 64, "L": 6, "PDL": True}
    for many, wide, lead in ((False, False, False), (True, True, True)):
        ptx = compiled(reroute_kernels.deal, capability, MANY=many, WIDE=wide, LEAD=lead, **sizes)["ptx"]
        assert "griddepcontrol.wait" in ptx and ("rem" in ptx or "div" in ptx)
    assert compiled(reroute_kernels.lead, capability, K=8, KP=8, L=6, BLOCK=8)["cubin"]


def rows(capability: int) -> None:
    """Rows of 4096 bf16: 16-byte accesses only."""
    shape = {"L": 6, "WORDS": 2048, "ROWS": 4, "BLOCK": 1024}
    for once, gradient in ((False, False), (False, True), (True, False)):
        ptx = compiled(
            dispatch_kernels.push, capability, K=8, DIVISOR=8, ONCE=once, GRADIENT=gradient, HINT=16, **shape
        )["ptx"]
        assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    ptx = compiled(dispatch_kernels.pull, capability, ZERO=False, HINT=16, **shape)["ptx"]
    assert "ld.global.v4.b32" in ptx and "st.global.v4.b32" in ptx
    out = {"out_p": "*bf16"}
    summed = {"D": 4096, "K": 8, "KP": 8, "L": 6, "WEIGHTED": True, "SIZE": 2, "HINT": 16, "BLOCK": 1024}
    assert "ld.global.v4.b32" in compiled(dispatch_kernels.pull_sum, capability, out, **summed)["ptx"]
    types = out | {"pairs_p": "*bf16"}
    assert compiled(dispatch_kernels.sum_choices, capability, types, D=4096, K=8, BLOCK=1024)["cubin"]
    for kernel in (dispatch_kernels.spread, dispatch_kernels.clear):
        assert compiled(kernel, capability, L=6, WORDS=2048, BLOCK=2048)["cubin"]
    packed = {"D": 4096, "ROW": 4224, "SCALES": 4096, "ROWS": 1, "BLOCKS": 32}
    assert compiled(dispatch_kernels.pack, capability, **packed)["cubin"]
    assert compiled(dispatch_kernels.unpack, capability, out, L=6, ALL=False, **packed)["cubin"]
    assert compiled(dispatch_kernels.pull_packed, capability, out, L=6, ZERO=True, **packed)["cubin"]


if __name__ == "__main__":
    reroute(int(sys.argv[1]))
    rows(int(sys.argv[1]))
