"""Compiles kernels for GPUs that are not there: python -m tests.codegen.ahead_of_time 90"""

from __future__ import annotations

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultraep_compile.codegen import count_kernels, grouped_gemm_kernels, guard_kernels, search_kernel, share_kernels

INT64 = {"load_p", "before_p", "own_p", "key_p", "table_p", "heat_p", "keys_p", "quota_p", "ids_p"}
NUMBERS = {"rank", "R", "E", "DOMAINS", "tolerance", "copy_tokens", "n"}


def compiled(kernel: Any, capability: int, warps: int, **constants: Any) -> dict[str, Any]:
    """The compiler's output by stage; the other arguments are aligned pointers and 32-bit numbers."""
    types = {name: "i32" if name in NUMBERS else "*i64" if name in INT64 else "*i32" for name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else kind for name, kind in types.items()}
    divisible = {"R", "E"} - set(kernel.do_not_specialize)
    aligned = [i for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*") or name in divisible]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},  # type: ignore[arg-type]
    )
    options = {"num_warps": warps, "launch_pdl": True}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


def grouped(capability: int) -> None:
    """Products by descriptor in both layouts, through pointers in fp32, and the gradients."""
    hopper, pointers = grouped_gemm_kernels.TENSOR_CORE_TILE, grouped_gemm_kernels.FP32_TILE
    tile = hopper if capability == 90 else grouped_gemm_kernels.BLACKWELL_TILE
    sizes = {"IN": 2880, "OUT": 2880, "ON_GPU": True}

    def blocks(tile: grouped_gemm_kernels.Tile) -> dict[str, int]:
        return {"BM": tile.rows, "BN": tile.columns, "BK": tile.inner}

    def built(kernel: Any, types: dict[str, str], tile: grouped_gemm_kernels.Tile, **constants: Any) -> Any:
        types = {n: types.get(n) or ("*i32" if n.endswith("_p") else "i64") for n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else kind for n, kind in types.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    def described(*block: int) -> str:
        return f"tensordesc<bf16[{','.join(map(str, block))}]>"

    common = {"MASTERS": True, "SLOTS": True, "SPAN": 8}
    numbers = {"rows": "i32", "G": "i32", "GM": "i32", "size": "i32"}
    for last in (False, True):
        weight = described(1, tile.columns, tile.inner) if last else described(1, tile.inner, tile.columns)
        types = {"x": described(tile.rows, tile.inner), "masters": weight, "slots": weight, "y_p": "*bf16", **numbers}
        flags = {"TMA": True, "MASTERS_INNER_LAST": last, "SLOTS_INNER_LAST": last, "WAIT": last}
        made = built(grouped_gemm_kernels.product, types, tile, **common, **sizes, **flags, **blocks(tile))
        assert "wgmma" in made.asm["ptx"] or "tcgen05.mma" in made.asm["ptx"]
        assert made.metadata.shared <= 227 * 1024
    types = {"x": "*fp32", "masters": "*fp32", "slots": "*fp32", "y_p": "*fp32", **numbers}
    flags = {"TMA": False, "MASTERS_INNER_LAST": True, "SLOTS_INNER_LAST": True, "WAIT": False}
    made = built(grouped_gemm_kernels.product, types, pointers, **common, **sizes, **flags, **blocks(pointers))
    assert "tf32" not in made.asm["ptx"]
    types = {"x_d": described(tile.inner, tile.rows), "g_d": described(tile.inner, tile.columns), "G": "i32"}
    types |= {"x_p": "*bf16", "g_p": "*bf16", "out_p": "*bf16"}
    shape = {"BI": tile.rows, "BO": tile.columns, "BK": tile.inner, "TMA": True}
    assert built(grouped_gemm_kernels.weight_grad, types, tile._replace(stages=3), **sizes, **shape).metadata.shared <= 227 * 1024
    small = grouped_gemm_kernels.Tile(0, 0, 0, 4, 3)
    built(grouped_gemm_kernels.row_tiles, numbers, small, GP=128, BM=128, BLOCK=128)
    part = {"g_p": "*bf16", "part_p": "*fp32", "C": "i32", **numbers}
    built(grouped_gemm_kernels.take_part, part, small, BM=512, STEP=16, BC=128)
    built(grouped_gemm_kernels.take_sum, {"part_p": "*fp32", "out_p": "*bf16", "C": "i32"}, small, BC=128)


def guards(capability: int) -> None:
    """Late checks, poison and the exchange of counts."""
    kinds = {"values_p": "*i64", "note_p": "*i64", "rows_p": "*bf16", "control_p": "*i64", "boards_p": "*i64", "page_p": "*i64"}
    for kernel, constants in (
        (guard_kernels.first_bad, {"IDS": True, "BLOCK": 4096}),
        (guard_kernels.poison, {"PAIRS": True, "ROWS": 16, "BLOCK": 256}),
        (count_kernels.post, {"BLOCK": 1024}),
        (count_kernels.read, {"BLOCK": 1024}),
    ):
        types = {n: kinds.get(n) or ("*i32" if n.endswith("_p") else "i32") for n in kernel.arg_names}
        signature = {n: "constexpr" if n in constants else kind for n, kind in types.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


def main(capability: int) -> None:
    """The planner for 64 ranks with 4 experts and for 8 ranks with 128, and 2 slots each; the counts of 8192 x 8 ids of 256 experts."""
    tables = {"S": 2, "ALL_C": search_kernel.CANDIDATES}
    few = {"D": 64, "M": 4, "G_BITS": 6, "M_BITS": 2, "PDL": True}
    many = {"D": 8, "M": 128, "G_BITS": 5, "M_BITS": 7, "PDL": True}
    for sizes, timed in ((few, False), (few, True), (many, False)):
        asm = compiled(search_kernel.search, capability, 1, **sizes, **tables, SP=2, EVEN=True, TIMED=timed)
        # one instruction over the warp for every choice, nothing through shared memory
        assert asm["ptx"].count("redux.sync") >= 14 and "st.shared" not in asm["ptx"] and asm["cubin"]
    for sizes, block, slots in ((few, 4, 128), (many, 128, 16)):
        for everyone in (False, True):
            shape = {"DOMAINS": 1, "RP": sizes["D"], "KEYS": sizes is many}
            compiled(share_kernels.prepare, capability, 1, **sizes, **shape, ALL=everyone, BLOCK=block)
            sizes_here = {name: size for name, size in sizes.items() if name != "G_BITS"}
            compiled(share_kernels.finish, capability, 4, **sizes_here, **tables, ALL=everyone, XP=slots, BLOCK=8, PER_DOMAIN=24)
    compiled(count_kernels.count_part, capability, 4, EP=256, BLOCK=1024, PER=1, PDL=True)
    compiled(count_kernels.count_sum, capability, 4, P=64, BLOCK=32, PDL=True)
    grouped(capability)
    guards(capability)


if __name__ == "__main__":
    main(int(sys.argv[1]))
