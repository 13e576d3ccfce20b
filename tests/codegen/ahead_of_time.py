"""Compiles kernels for GPUs that are not there: python -m tests.codegen.ahead_of_time 90"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultraep_compile.codegen import count_kernels, planner_kernels

INT64 = {"load_p", "before_p", "own_p", "key_p", "table_p", "quota_p", "ids_p"}
NUMBERS = {"rank", "R", "E", "DOMAINS", "tolerance", "n"}


def compiled(kernel: Any, capability: int, warps: int, **constants: Any) -> dict[str, Any]:
    """The compiler's output by stage; the other arguments are aligned pointers and 32-bit numbers."""
    types = {name: "i32" if name in NUMBERS else "*i64" if name in INT64 else "*i32" for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in ("R", "E")]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # type: ignore[arg-type]
    )
    options = {"num_warps": warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def main(capability: int) -> None:
    """The planner for 64 ranks, 4 experts and 2 slots each; the counts of 8192 x 8 ids of 256 experts."""
    sizes = {"D": 64, "M": 4, "S": 2, "ALL_C": planner_kernels.CANDIDATES + planner_kernels.REFINED, "PDL": True}
    for refine in (False, True):
        asm = compiled(
            planner_kernels.search, capability, 1, **sizes, G_BITS=6, M_BITS=2, SP=2, EVEN=True, REFINE=refine
        )
        # one instruction over the warp for every choice, nothing through shared memory
        assert asm["ptx"].count("redux.sync") >= 7 and "st.shared" not in asm["ptx"] and asm["cubin"]
    for everyone in (False, True):
        common = {"ALL": everyone, "PDL": True, "BLOCK": 16}
        compiled(planner_kernels.prepare, capability, 4, D=64, M=4, DOMAINS=1, RP=64, **common)
        compiled(planner_kernels.finish, capability, 4, **(sizes | common), XP=128, PER_DOMAIN=24)
    compiled(count_kernels.count_part, capability, 4, EP=256, BLOCK=1024, PER=1, PDL=True)
    compiled(count_kernels.count_sum, capability, 4, P=64, BLOCK=32, PDL=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
